"""
What gazes leave on a canvas, whoever made them: the error after each of their choices, and what the search would choose next.

This module adds to the search of `canvas_search_autogaze` what judges and teaches other selectors.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from .canvas_search_autogaze import ERROR_UNIT, Canvas, CanvasSearch
from .cells_autogaze import choose_patches
from .gazing_autogaze import GazeOutput


class MeasuringSearch(CanvasSearch):
    """A [`CanvasSearch`] that also measures gazes which others made, and tells what it would choose in their place."""

    @torch.no_grad()
    def measure_choices(self, frames: torch.Tensor, gaze: GazeOutput, canvas: Canvas | None = None) -> torch.Tensor:
        """
        Measures the error after each choice of a gaze.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, ..)`): as [`~CanvasSearch.search_clip`] takes them.
            gaze ([`GazeOutput`]): what was kept of them, in the order of choice.
            canvas ([`Canvas`], *optional*): what was kept before the first frame.

        Returns:
            `torch.DoubleTensor` of shape `(batch, N)`: squared error of the slot's frame, summed over all values, with the
            frames before it and the patches of its own up to this slot; padding repeats the slot before it.
        """
        errors_left = []
        with torch.autocast(frames.device.type, enabled=False):
            for _, errors, shown in self._frames_of(frames, gaze, canvas):
                errors_left.append(errors.gather(1, shown).sum(-1) * ERROR_UNIT)
        return torch.cat(errors_left, dim=1)

    @torch.no_grad()
    def continuations(
        self, frames: torch.Tensor, gaze: GazeOutput, step_size: int, canvas: Canvas | None = None
    ) -> torch.Tensor:
        """
        Tells what the search would choose at every step of a gaze, given what the gaze kept before that step.

        Args:
            frames, gaze, canvas: as in [`~MeasuringSearch.measure_choices`].
            step_size (`int`): patches of a step, at least 1; steps begin anew with every frame.

        Returns:
            `torch.LongTensor` of shape `(batch, N)`: for every slot the patch that the search would choose there, counted
            from its frame, after those that it would choose in the slots of the same step before.

        Raises:
            ValueError: if `step_size` is below 1.
        """
        if step_size < 1:
            raise ValueError(f"`step_size` must be at least 1, got {step_size}")
        last, chosen = self.grid.num_patches, []
        with torch.autocast(frames.device.type, enabled=False):
            for ids, errors, shown in self._frames_of(frames, gaze, canvas):
                # A cell that shows the patch of some scale can only be bettered by finer ones, so for all that is
                # coarser it counts with the error that it shows. The canvas is layer 0 here.
                shown = F.pad(shown, (0, 0, 1, 0))[:, :-1:step_size]
                layer = torch.arange(errors.shape[1] - 1, device=shown.device)[:, None]
                errors = (
                    errors[:, None]
                    .expand(-1, shown.shape[1], -1, -1)
                    .gather(2, torch.maximum(shown[:, :, None], layer))
                )
                is_kept = F.one_hot(ids, last + 1).cummax(1).values[..., :-1].bool()
                is_kept = F.pad(is_kept, (0, 0, 1, 0))[:, :-1:step_size].flatten(0, 1)
                errors = errors.flatten(0, 1).unflatten(-1, self.cells)
                best, _ = choose_patches(self._tables(frames), errors, min(step_size, last), None, is_kept)
                # A step can ask for more patches than there are: the rest names the last one again.
                best = torch.cat([best, best[:, -1:].expand(-1, step_size - best.shape[1])], dim=1)
                chosen.append(best.view(len(frames), -1)[:, : ids.shape[1]])
        return torch.cat(chosen, dim=1)

    def _frames_of(
        self, frames: torch.Tensor, gaze: GazeOutput, canvas: Canvas | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """
        Goes through the frames of a gaze.

        Gives of each the ids `(batch, slots)`, counted from the frame and past the last patch where a slot is padding; the
        errors of cells with the canvas and with each scale, `(batch, 1 + scales, cells)`; and which of these each cell shows
        after each slot, `(batch, slots, cells)`.
        """
        canvas, last = self.start_canvas(frames) if canvas is None else canvas, self.grid.num_patches
        layer_of_patch = self.layers_of_patches(frames.device)
        ids = (gaze.gazing_pos - gaze.frame_of_slot * last).masked_fill(gaze.if_padded_gazing, last)
        for t, ids_of_frame in enumerate(ids.split(gaze.num_gazing_each_frame.tolist(), dim=1)):
            layers = self._render(frames[:, t].contiguous())
            errors = self._errors_on(canvas, layers, prefers_empty=False).flatten(2)
            # The finest patch laid so far decides what a cell shows, in whatever order they came; it leaves no error.
            shown = layer_of_patch[ids_of_frame].cummax(1).values
            yield ids_of_frame, F.pad(errors, (0, 0, 0, 1)), shown
            canvas = self._lay_chosen(canvas, layers, ids_of_frame.where(ids_of_frame < last, -1))
