"""
Ending a frame by what its patches are worth, measured as they are chosen, instead of predicted.

This module carries the closed-form reconstruction along a decode loop; what a reconstruction is `composite_autogaze` says,
when to stop the loop in `generation_autogaze`.
"""

import torch

from .composite_autogaze import CompositeReconstruction, mse_to_task_loss


class FrameMeter:
    """
    Measures the task losses of a batch of clips, frame by frame, patch by patch.

    Args:
        composite ([`CompositeReconstruction`]): the reconstruction whose loss counts.
        pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
            The clips, pixels in 0..1, in the size of the finest scale.
        standing (`torch.FloatTensor` of shape `(batch, 3, height, width)`, *optional*):
            Reconstruction of the frame before the first; mid-grey if not given.
    """

    def __init__(self, composite: CompositeReconstruction, pixels: torch.Tensor, standing: torch.Tensor | None = None):
        self.composite, self.pixels = composite, pixels
        self.standing = torch.full_like(pixels[:, 0], 0.5) if standing is None else standing
        self.layers = composite.layers_of_patches(pixels.device)
        self.frame = -1

    def begin_frame(self) -> None:
        """Goes on to the next frame, of which nothing is chosen yet."""
        self.frame += 1
        errors = self.composite.cell_errors(self.pixels[:, self.frame], self.standing)
        self.errors = errors.flatten(2) / self.pixels[0, 0].numel()
        self.shown = self.layers.new_zeros(len(self.pixels), self.layers.shape[1])

    def losses(self, clips: list[int], ids: torch.Tensor) -> torch.Tensor:
        """
        Takes the next choices of some clips; tells how good their frame is before, between and after them.

        Args:
            clips (`list[int]`): which clips of the batch.
            ids (`torch.LongTensor` of shape `(len(clips), n)`): patches, counted from their frame.

        Returns:
            `torch.DoubleTensor` of shape `(len(clips), n + 1)`: task losses, `(40 - PSNR) / 20`.
        """
        rows = slice(None) if len(clips) == len(self.pixels) else clips
        # The finest patch laid so far decides what a cell shows, in whatever order they came.
        shown = torch.cat([self.shown[rows][:, None], self.layers[ids]], dim=1).cummax(1).values
        self.shown[rows] = shown[:, -1]
        return mse_to_task_loss(self.errors[rows].gather(1, shown).sum(-1))

    def end_frame(self, ids: torch.Tensor) -> None:
        """Lays what was kept of the frame, ids `(batch, slots)`, the id after the last patch where a slot is padding."""
        num_patches = self.composite.grid.num_patches
        kept = torch.zeros(len(ids), num_patches + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
        masks = [mask[:, None] for mask in self.composite.grid.split_by_scale(kept[:, :-1])]
        frame = self.pixels[:, self.frame, None]
        self.standing = self.composite.reconstruct(frame, masks, self.standing)[:, 0]
