"""Undoing the rescaling and normalisation of an encoder's processor, so that a selector can gaze at the same frames."""

from typing import Any

import torch


def normalizing_part(processor: Any) -> Any:
    """
    Finds the part of a processor that normalises frames.

    Args:
        processor: a processor, or its video processor or image processor.

    Returns:
        The part with `image_mean`, `image_std` and `rescale_factor`.

    Raises:
        ValueError: if there is none.
    """
    part = processor
    for name in ("video_processor", "image_processor"):
        part = getattr(part, name, None) or part
    if not all(hasattr(part, key) for key in ("image_mean", "image_std", "rescale_factor")):
        raise ValueError(
            "`processor` must be the processor, video processor or image processor that normalised the frames, with "
            f"`image_mean`, `image_std` and `rescale_factor`, got {type(part).__name__}"
        )
    return part


def undo_normalization(frames: torch.Tensor, part: Any) -> torch.Tensor:
    """
    Computes the levels of frames before they were rescaled and normalised.

    Args:
        frames (`torch.FloatTensor` of shape `(.., channels, height, width)`): normalised frames.
        part: the processor that normalised them; see [`normalizing_part`].

    Returns:
        `torch.FloatTensor` shaped like `frames`, of at least float32 precision: levels 0..255.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import AutoGazeVideoProcessor
    >>> from transformers_autogaze.integrations.normalization import undo_normalization

    >>> processor = AutoGazeVideoProcessor(rescale_factor=1 / 255, offset=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    >>> undo_normalization(torch.tensor([-1.0, -0.2, 1.0]).view(3, 1, 1), processor).flatten().round().tolist()
    [0.0, 102.0, 255.0]

    ```
    """
    levels = frames.to(torch.promote_types(frames.dtype, torch.float32))
    if getattr(part, "do_normalize", True):
        mean, std = (levels.new_tensor(numbers)[:, None, None] for numbers in (part.image_mean, part.image_std))
        levels = levels * std + mean
    if getattr(part, "offset", False):
        levels = levels + 1
    if getattr(part, "do_rescale", True):
        levels = levels / part.rescale_factor
    return levels
