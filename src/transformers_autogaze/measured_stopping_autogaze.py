"""
The measured reconstruction loss during decoding, for models that end a frame by it instead of a predicted loss.

The reconstruction is that of `composite_autogaze`; the decode loop is in `generation_autogaze`.
"""

import torch

from .composite_autogaze import CompositeReconstruction, mse_to_task_loss


class FrameLossTracker:
    """
    Measures the task loss of each frame of a batch of clips after every chosen patch.

    Args:
        composite ([`CompositeReconstruction`]): the reconstruction.
        pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
            The clips, pixels in 0..1, in the size of the finest scale.
        previous (`torch.FloatTensor` of shape `(batch, 3, height, width)`, *optional*):
            Reconstruction of the frame before the first; mid-grey if not given.
    """

    def __init__(self, composite: CompositeReconstruction, pixels: torch.Tensor, previous: torch.Tensor | None = None):
        self.composite, self.pixels = composite, pixels
        self.reconstruction = torch.full_like(pixels[:, 0], 0.5) if previous is None else previous
        self.scale_of_patch = composite.scale_of_patch(pixels.device)
        self.frame = -1

    def begin_frame(self) -> None:
        """Starts the next frame, with no patch chosen."""
        self.frame += 1
        errors = self.composite.cell_errors(self.pixels[:, self.frame], self.reconstruction)
        self.errors = errors.flatten(2) / self.pixels[0, 0].numel()
        self.scale_of_cell = self.scale_of_patch.new_zeros(len(self.pixels), self.scale_of_patch.shape[1])

    def add_patches(self, clips: list[int], ids: torch.Tensor) -> torch.Tensor:
        """
        Adds chosen patches to the frames of some clips and measures the loss before, between and after them.

        Args:
            clips (`list[int]`): indices of the clips in the batch.
            ids (`torch.LongTensor` of shape `(len(clips), n)`): patch ids, counted from the first patch of their frame.

        Returns:
            `torch.DoubleTensor` of shape `(len(clips), n + 1)`: task losses, `(40 - PSNR) / 20`.
        """
        index = slice(None) if len(clips) == len(self.pixels) else clips
        # A cell shows the finest patch that covers it, in whatever order patches are chosen.
        scale_of_cell = torch.cat([self.scale_of_cell[index][:, None], self.scale_of_patch[ids]], dim=1)
        scale_of_cell = scale_of_cell.cummax(1).values
        self.scale_of_cell[index] = scale_of_cell[:, -1]
        return mse_to_task_loss(self.errors[index].gather(1, scale_of_cell).sum(-1))

    def end_frame(self, ids: torch.Tensor) -> None:
        """
        Reconstructs the frame from its kept patches.

        Args:
            ids (`torch.LongTensor` of shape `(batch, slots)`): kept patches; `grid.num_patches` where a slot is padding.
        """
        num_patches = self.composite.grid.num_patches
        kept = torch.zeros(len(ids), num_patches + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
        masks = [mask[:, None] for mask in self.composite.grid.split_by_scale(kept[:, :-1])]
        frame = self.pixels[:, self.frame, None]
        self.reconstruction = self.composite.reconstruct(frame, masks, self.reconstruction)[:, 0]
