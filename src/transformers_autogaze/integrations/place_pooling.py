"""The pooling of an MLLM of the LLaVA family, for some places of a frame only."""

import torch


class PlacePooling:
    """
    Pools the features of patches to those of places.

    Args:
        weights (`torch.FloatTensor` of shape `(places, patches)`): weights of a frame's patches in each place.

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
        self._has_patch = weights > 0
        max_patches = int(self._has_patch.sum(1).max())
        self._weights, self._patches = weights.topk(max_patches, dim=1)

    def patches_of(self, is_kept: torch.Tensor) -> torch.Tensor:
        """Returns the mask of the patches `(.., patches)` of kept places, a mask `(.., places)`."""
        return is_kept.float() @ self._has_patch.to(is_kept.device).float() > 0

    def pool(
        self, features: torch.Tensor, frame: torch.Tensor, patch: torch.Tensor, is_kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Pools the patches of all kept places.

        Args:
            features (`torch.FloatTensor` of shape `(tokens, channels)`): features of the patches, in any order.
            frame, patch (`torch.LongTensor` of shape `(tokens,)`): frame and id of each patch.
            is_kept (`torch.BoolTensor` of shape `(frames, places)`): the kept places.

        Returns:
            `tuple`: `torch.FloatTensor` of shape `(kept places, channels)`, and their frame and place, both
            `torch.LongTensor` of shape `(kept places,)`.
        """
        device = features.device
        token_of_patch = torch.zeros(len(is_kept), self._has_patch.shape[1], dtype=torch.long, device=device)
        token_of_patch[frame.to(device), patch.to(device)] = torch.arange(len(features), device=device)
        place_frame, place = is_kept.to(device).nonzero(as_tuple=True)
        tokens = token_of_patch[place_frame[:, None], self._patches.to(device)[place]]
        weights = self._weights.to(device, features.dtype)[place]
        return torch.einsum("kn,knc->kc", weights, features[tokens]), place_frame, place
