"""
Pooling as an MLLM of the LLaVA family does it, for some places of a frame only.

This module knows which patches a pooled place is made of and makes it of them. It knows neither MLLMs nor gazes.
"""

import torch


class PlacePooling:
    """
    Makes the features of pooled places out of those of their patches.

    Args:
        weights (`torch.FloatTensor` of shape `(places, patches)`): how much of each patch of a frame is in each place.

    Example:

    ```python
    >>> from transformers_autogaze.integrations.place_pooling import PlacePooling

    >>> pooling = PlacePooling(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    >>> is_kept = torch.tensor([[True, False], [False, True]])  # of two frames
    >>> pooling.patches_of(is_kept).int().tolist()
    [[1, 1, 0], [0, 0, 1]]
    >>> features, frame, place = pooling.pool(
    ...     torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]), is_kept
    ... )
    >>> features.tolist(), frame.tolist(), place.tolist()
    ([[1.5], [5.0]], [0, 1], [0, 1])

    ```
    """

    def __init__(self, weights: torch.Tensor):
        self._is_in = weights > 0
        most = int(self._is_in.sum(1).max())
        self._weights, self._patches = weights.topk(most, dim=1)

    def patches_of(self, is_kept: torch.Tensor) -> torch.Tensor:
        """Gives the patches `(.., patches)` that kept places `(.., places)` are made of, both `torch.BoolTensor`."""
        return is_kept.float() @ self._is_in.to(is_kept.device).float() > 0

    def pool(
        self, features: torch.Tensor, frame: torch.Tensor, patch: torch.Tensor, is_kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Pools the patches of all kept places.

        Args:
            features (`torch.FloatTensor` of shape `(tokens, channels)`): those of the patches, in any order.
            frame, patch (`torch.LongTensor` of shape `(tokens,)`): which patch of which frame each is.
            is_kept (`torch.BoolTensor` of shape `(frames, places)`): the places to make.

        Returns:
            `tuple`: `torch.FloatTensor` of shape `(kept places, channels)`, and their frame and place, both
            `torch.LongTensor` of shape `(kept places,)`.
        """
        device = features.device
        token_of = torch.zeros(len(is_kept), self._is_in.shape[1], dtype=torch.long, device=device)
        token_of[frame.to(device), patch.to(device)] = torch.arange(len(features), device=device)
        of_frame, place = is_kept.to(device).nonzero(as_tuple=True)
        tokens = token_of[of_frame[:, None], self._patches.to(device)[place]]
        weights = self._weights.to(device, features.dtype)[place]
        return torch.einsum("kn,knc->kc", weights, features[tokens]), of_frame, place
