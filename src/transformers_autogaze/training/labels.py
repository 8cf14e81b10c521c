"""
Labels: which patches of each frame to keep, in which order, and the task loss after each.

This module owns the greedy search that makes them and the files that hold them. It knows nothing of models; what a
patch is worth it asks of a reconstruction.
"""

from typing import NamedTuple

import torch

from ..composite_autogaze import CompositeReconstruction, mse_to_task_loss


class ClipLabels(NamedTuple):
    """
    What to learn from one clip.

    Args:
        gazing_pos (`list[list[int]]`):
            For each frame, the patches to keep in the order of choice, counted from the first patch of the frame.
        task_losses (`list[list[float]]`):
            Task loss of the frame after each of them.
    """

    gazing_pos: list[list[int]]
    task_losses: list[list[float]]


def label_clip(
    composite: CompositeReconstruction,
    pixels: torch.Tensor,
    budgets: torch.Tensor,
    max_error: torch.Tensor | None = None,
) -> tuple[ClipLabels, torch.Tensor]:
    """
    Labels one clip by the greedy search of the closed form.

    Args:
        composite ([`CompositeReconstruction`]): the closed form.
        pixels (`torch.FloatTensor` of shape `(frames, 3, height, width)`): pixels in 0..1, of the finest scale's size.
        budgets (`torch.LongTensor` of shape `(frames,)`): patches of each frame at most.
        max_error (`torch.FloatTensor` of shape `(frames,)`, *optional*):
            Mean squared error at which a frame is done; see [`CompositeReconstruction.search`].

    Returns:
        `tuple` of the [`ClipLabels`] and the images that the frames stood on before their patches were laid, a
        `torch.FloatTensor` shaped like `pixels`: the reconstruction of the frame before, mid-grey before the first.
    """
    standing = [pixels.new_full((1, *pixels.shape[1:]), 0.5)]
    ids, losses = [], []
    for t in range(len(pixels)):
        limit = None if max_error is None else max_error[None, t : t + 1]
        found = composite.search(pixels[None, t : t + 1], budgets[t : t + 1], limit, standing[-1])
        count = int(found.counts)
        ids.append(found.ids[0, 0, :count].tolist())
        losses.append(mse_to_task_loss(found.mse[0, 0, :count]).tolist())
        standing.append(found.reconstruction)
    return ClipLabels(ids, losses), torch.cat(standing[:-1])
