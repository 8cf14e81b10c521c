"""
Losses of reconstructed frames, in pixels and features.

Losses are modules that are called as `loss(rebuilt, frames)` with pixels in 0..1, and return one number per frame.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


_NUM_HIDDEN_STATES = 4
_PUBLISHED_WEIGHTS = (1.0, 0.3, 0.3)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class L1Loss(nn.Module):
    """
    Mean absolute error of pixels.

    Args:
        std (`Sequence[float]`, *optional*, defaults to 1 per channel):
            Divisors of the errors of the channels, for the error of normalised values.

    Example:

    ```python
    >>> from transformers_autogaze.reconstruction.losses import L1Loss

    >>> frames = torch.zeros(1, 2, 3, 8, 8)
    >>> L1Loss()(frames + 0.5, frames).tolist(), L1Loss(std=[0.25] * 3)(frames + 0.5, frames).tolist()
    ([[0.5, 0.5]], [[2.0, 2.0]])

    ```
    """

    def __init__(self, std: Sequence[float] = (1.0, 1.0, 1.0)):
        super().__init__()
        self.std = tuple(std)

    def forward(self, rebuilt: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """
        Computes the loss of each frame.

        Args:
            rebuilt, frames (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`): pixels in 0..1.

        Returns:
            `torch.FloatTensor` of shape `(batch, frames)`.
        """
        return ((rebuilt - frames).abs().mean((-2, -1)) / rebuilt.new_tensor(self.std)).mean(-1)


class FeatureLoss(nn.Module):
    """
    Mean squared distance of the patch tokens of a vision model over its last four hidden states.

    See docs/specification.md, section 12.2.

    It supports any vision model of transformers that takes `pixel_values` and has a `config.patch_size`, such as DINOv2 with
    registers or SigLIP 2. Other tokens (CLS, registers) are ignored. The model's weights are frozen; gradients reach the
    reconstructed frames. Frames are not resized, so they should have the model's size.

    Args:
        model (`PreTrainedModel`): the vision model.
        image_mean, image_std (`Sequence[float]`): the model's normalisation of pixels in 0..1, one number per channel.

    Example:

    ```python
    >>> from transformers import SiglipVisionConfig, SiglipVisionModel
    >>> from transformers_autogaze.reconstruction.losses import FeatureLoss

    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    >>> loss = FeatureLoss(SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32)), [0.5] * 3, [0.5] * 3)
    >>> frames = torch.rand(1, 2, 3, 32, 32)
    >>> loss(frames, frames).tolist()
    [[0.0, 0.0]]

    ```
    """

    def __init__(self, model: PreTrainedModel, image_mean: Sequence[float], image_std: Sequence[float]):
        super().__init__()
        if getattr(model.config, "patch_size", None) is None:
            raise ValueError(
                f"`model` must be a vision model whose config has a `patch_size`, got {type(model).__name__}"
            )
        self.model = model.eval().requires_grad_(False)
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        # Without this option, models with learned positions raise an error for other sizes than their own.
        can_interpolate = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if can_interpolate else {}

    def train(self, mode: bool = True) -> "FeatureLoss":
        """Sets the training mode; the vision model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, rebuilt: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """
        Computes the loss of each frame.

        Args:
            rebuilt, frames (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`): pixels in 0..1.

        Returns:
            `torch.FloatTensor` of shape `(batch, frames)`.
        """
        with torch.no_grad():
            targets = self._features(frames)
        distances = [
            (features - target).square().mean((-2, -1))
            for features, target in zip(self._features(rebuilt), targets, strict=True)
        ]
        return torch.stack(distances).mean(0).view(rebuilt.shape[:2])

    def _features(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Returns the last hidden states of the patches, each `(batch * frames, patches, hidden)`."""
        mean, std = (frames.new_tensor(numbers)[:, None, None] for numbers in (self.image_mean, self.image_std))
        images = ((frames - mean) / std).flatten(0, 1).to(self.model.dtype)
        states = self.model(images, output_hidden_states=True, **self._options).hidden_states[-_NUM_HIDDEN_STATES:]
        patch_size = self.model.config.patch_size
        num_patches = (images.shape[-2] // patch_size) * (images.shape[-1] // patch_size)
        return [state[:, -num_patches:] for state in states]


class WeightedLoss(nn.Module):
    """
    A weighted sum of losses.

    Args:
        losses (`Sequence[nn.Module]`): the losses, each called as `loss(rebuilt, frames)`.
        weights (`Sequence[float]`): one weight for each loss.

    Raises:
        ValueError: if the numbers of losses and weights differ.
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float]):
        super().__init__()
        if not losses or len(losses) != len(weights):
            raise ValueError(f"`weights` must be one for each of the {len(losses)} losses, got {list(weights)}")
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights)

    def forward(self, rebuilt: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """
        Computes the loss of each frame.

        Args:
            rebuilt, frames (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`): pixels in 0..1.

        Returns:
            `torch.FloatTensor` of shape `(batch, frames)`.
        """
        return sum(weight * loss(rebuilt, frames) for loss, weight in zip(self.losses, self.weights, strict=True))


def published_loss(dinov2: PreTrainedModel, siglip2: PreTrainedModel, std: Sequence[float]) -> WeightedLoss:
    """
    Makes the published loss: L1 of normalised pixels, plus 0.3 times the feature losses of DINOv2 and SigLIP 2.

    See docs/specification.md, section 12.2.

    Args:
        dinov2 (`PreTrainedModel`): DINOv2 with registers; the base size in the published loss.
        siglip2 (`PreTrainedModel`): vision tower of SigLIP 2; base size, patch 16 and 224 pixels in the published loss.
        std (`Sequence[float]`):
            See [`L1Loss`]; half of `image_std` in the published loss, where pixels are scaled to -1..1 before normalisation.

    Returns:
        [`WeightedLoss`]
    """
    features = [FeatureLoss(dinov2, *_IMAGENET), FeatureLoss(siglip2, *_HALF)]
    return WeightedLoss([L1Loss(std), *features], _PUBLISHED_WEIGHTS)
