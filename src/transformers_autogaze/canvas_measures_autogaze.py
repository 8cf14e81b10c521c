"""
Measures of a given gaze on a canvas: the error after each of its choices, and the choices of the search in its place.

Evaluation and the labels of training use them.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from .canvas_search_autogaze import ERROR_UNIT, Canvas, CanvasSearch
from .cells_autogaze import choose_patches
from .gazing_autogaze import GazeOutput


class MeasuringSearch(CanvasSearch):
    """A [`CanvasSearch`] that also measures the gazes of other selectors."""

    @torch.no_grad()
    def measure_choices(self, frames: torch.Tensor, gaze: GazeOutput, canvas: Canvas | None = None) -> torch.Tensor:
        """
        Measures the error after each choice of a gaze.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, ..)`): clips, as in [`~CanvasSearch.search_clip`].
            gaze ([`GazeOutput`]): kept patches, in the order of choice.
            canvas ([`Canvas`], *optional*): canvas before the first frame.

        Returns:
            `torch.DoubleTensor` of shape `(batch, N)`: squared error of the slot's frame, summed over all values, with the
            kept patches up to this slot; padding repeats the previous slot.
        """
        errors_left = []
        with torch.autocast(frames.device.type, enabled=False):
            for _, errors, scale_of_cell in self._iterate_frames(frames, gaze, canvas):
                errors_left.append(errors.gather(1, scale_of_cell).sum(-1) * ERROR_UNIT)
        return torch.cat(errors_left, dim=1)

    @torch.no_grad()
    def continuations(
        self, frames: torch.Tensor, gaze: GazeOutput, step_size: int, canvas: Canvas | None = None
    ) -> torch.Tensor:
        """
        Computes the choices of the search at every step of a gaze, given the patches that the gaze kept before that step.

        Args:
            frames, gaze, canvas: as in [`~MeasuringSearch.measure_choices`].
            step_size (`int`): number of patches of a step, at least 1; every frame starts with a new step.

        Returns:
            `torch.LongTensor` of shape `(batch, N)`: the patch that the search chooses in each slot, counted from the first
            patch of its frame, given its choices in earlier slots of the same step.

        Raises:
            ValueError: if `step_size` is below 1.
        """
        if step_size < 1:
            raise ValueError(f"`step_size` must be at least 1, got {step_size}")
        last, chosen = self.grid.num_patches, []
        with torch.autocast(frames.device.type, enabled=False):
            for ids, errors, scale_of_cell in self._iterate_frames(frames, gaze, canvas):
                # Only finer patches can improve a cell that already shows a patch, so at all coarser scales it has the error
                # of that patch. Index 0 is the canvas here.
                scale_of_cell = F.pad(scale_of_cell, (0, 0, 1, 0))[:, :-1:step_size]
                scale = torch.arange(errors.shape[1] - 1, device=scale_of_cell.device)[:, None]
                errors = (
                    errors[:, None]
                    .expand(-1, scale_of_cell.shape[1], -1, -1)
                    .gather(2, torch.maximum(scale_of_cell[:, :, None], scale))
                )
                is_kept = F.one_hot(ids, last + 1).cummax(1).values[..., :-1].bool()
                is_kept = F.pad(is_kept, (0, 0, 1, 0))[:, :-1:step_size].flatten(0, 1)
                errors = errors.flatten(0, 1).unflatten(-1, self.cells)
                best, _ = choose_patches(self._tables(frames), errors, min(step_size, last), None, is_kept)
                # A step may be larger than the number of patches: the rest repeats the last one.
                best = torch.cat([best, best[:, -1:].expand(-1, step_size - best.shape[1])], dim=1)
                chosen.append(best.view(len(frames), -1)[:, : ids.shape[1]])
        return torch.cat(chosen, dim=1)

    def _iterate_frames(
        self, frames: torch.Tensor, gaze: GazeOutput, canvas: Canvas | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """
        Yields for each frame of a gaze:

        - ids `(batch, slots)`, counted from the first patch of the frame, `num_patches` where a slot is padding;
        - errors of cells with the canvas and with each scale, `(batch, 1 + scales, cells)`;
        - the index in these of the error of each cell after each slot, `(batch, slots, cells)`.
        """
        canvas, last = self.start_canvas(frames) if canvas is None else canvas, self.grid.num_patches
        scale_of_patch = self.scale_of_patch(frames.device)
        ids = (gaze.gazing_pos - gaze.frame_of_slot * last).masked_fill(gaze.if_padded_gazing, last)
        for t, ids_of_frame in enumerate(ids.split(gaze.num_gazing_each_frame.tolist(), dim=1)):
            images = self._render(frames[:, t].contiguous())
            errors = self._errors_on(canvas, images, prefers_empty=False).flatten(2)
            # A cell shows the finest patch that covers it, in whatever order patches are chosen. The finest scale has no error.
            scale_of_cell = scale_of_patch[ids_of_frame].cummax(1).values
            yield ids_of_frame, F.pad(errors, (0, 0, 0, 1)), scale_of_cell
            canvas = self._update_canvas(canvas, images, ids_of_frame.where(ids_of_frame < last, -1))
