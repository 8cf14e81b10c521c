"""
Closed-form reconstruction of a video from its kept patches (docs/design.md, section 5.2), and the greedy search on its error.

The reconstruction needs no weights. The search under budgets over time is that of `canvas_search_autogaze`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .canvas_measures_autogaze import MeasuringSearch
from .canvas_search_autogaze import ERROR_UNIT, Canvas
from .gazing_autogaze import GazeOutput
from .grid_autogaze import GazeGrid


# Undoing a normalisation leaves pixels outside 0..1 by a rounding error; anything more is wrong input.
_PIXEL_TOLERANCE = 1e-3
_LEAST_MSE = 1e-10


def mse_to_task_loss(mse: torch.Tensor) -> torch.Tensor:
    """
    Turns mean squared errors into task losses, `(40 - PSNR) / 20` (docs/design.md, section 5.3).

    Args:
        mse (`torch.FloatTensor` of any shape): mean squared errors of pixels in 0..1; below 1e-10 they count as 1e-10.

    Returns:
        `torch.FloatTensor` shaped like `mse`: 1 at 20 dB, 0.7 at 26 dB, 0 at 40 dB, negative above, and -3 (100 dB) for
        no error at all.
    """
    return 2 + mse.clamp(min=_LEAST_MSE).log10() / 2


def task_loss_to_mse(task_loss: torch.Tensor) -> torch.Tensor:
    """
    Turns task losses into mean squared errors; the inverse of [`mse_to_task_loss`] for losses from -3 up.

    Args:
        task_loss (`torch.FloatTensor` of any shape): losses `(40 - PSNR) / 20`.

    Returns:
        `torch.FloatTensor` shaped like `task_loss`: mean squared errors of pixels in 0..1.
    """
    return torch.pow(10, 2 * task_loss - 4)


class GreedySearchOutput(NamedTuple):
    """
    Patches that [`CompositeReconstruction.search`] chose; `K` is the largest budget of a frame.

    Args:
        ids (`torch.LongTensor` of shape `(batch, frames, K)`):
            Patches in the order of choice, counted from the first patch of their frame; -1 after the last.
        mse (`torch.FloatTensor` of shape `(batch, frames, K)`):
            Mean squared error of the frame after each choice, pixels in 0..1; constant after the last choice.
        counts (`torch.LongTensor` of shape `(batch, frames)`):
            Number of chosen patches.
        reconstruction (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
            Reconstruction of the last frame; `previous` for the frames that follow.
    """

    ids: torch.Tensor
    mse: torch.Tensor
    counts: torch.Tensor
    reconstruction: torch.Tensor


class ReconstructionOutput(NamedTuple):
    """
    Output of every reconstruction, for `F` frames.

    Args:
        reconstruction (`torch.FloatTensor` of shape `(batch, F, 3, height, width)`):
            Frames reconstructed from the kept patches, pixels in 0..1.
        loss (`torch.FloatTensor` of shape `(batch, F)`):
            Task loss of each frame, as the reconstruction defines it.
    """

    reconstruction: torch.Tensor
    loss: torch.Tensor


def check_reconstruction_inputs(
    pixels: torch.Tensor, gaze: GazeOutput, frames: Sequence[int] | None, grid: GazeGrid
) -> list[int]:
    """
    Checks the arguments of a reconstruction.

    Args:
        pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
            The clips, one frame per frame of gaze, in the size of the grid's finest scale.
        gaze ([`GazeOutput`]): kept patches, on the reconstruction's grid.
        frames (`Sequence[int]`, *optional*): indices of the frames to reconstruct; all if not given.
        grid ([`GazeGrid`]): the reconstruction's grid.

    Returns:
        `list[int]`: indices of the frames to reconstruct.

    Raises:
        ValueError: if an argument is not as above.
    """
    if gaze.grid != grid:
        raise ValueError(f"`gaze` must be one of {grid}, got one of {gaze.grid}")
    expected = (gaze.batch_size, gaze.num_frames, 3, *grid.sizes[-1])
    if tuple(pixels.shape) != expected:
        raise ValueError(
            f"`pixels` must be of shape {expected}, a frame in the size of the finest scale for every frame of the "
            f"gaze, got {tuple(pixels.shape)}"
        )
    frames = range(gaze.num_frames) if frames is None else frames
    index = [int(frame) for frame in frames]
    if not index or min(index) < 0 or max(index) >= gaze.num_frames:
        raise ValueError(f"`frames` must name at least one frame, each in 0..{gaze.num_frames - 1}, got {index}")
    return index


class CompositeReconstruction(MeasuringSearch):
    """
    Reconstructs frames from their kept patches without weights, and searches for the patches that reconstruct them best.

    The reconstruction of frame `t` starts from that of frame `t - 1`, or from mid-grey. The kept patches are pasted over it,
    coarse to fine: a patch is cut out of the frame resized to its scale (bicubic, antialiased) and resized to the block that
    it covers (bicubic inside the block, clamped to 0..1). Patches of the finest scale are pixels of the frame itself. Pixels
    that no kept patch covers do not change (docs/design.md, section 5.2).

    [`~CompositeReconstruction.search`] chooses under budgets per frame; [`~CanvasSearch.search_clip`] and
    [`~CanvasSearch.search_stream`] under budgets over time.

    Args:
        grid (`GazeGrid`):
            Scales and patches; frames come in the size of its finest scale.

    Raises:
        ValueError: if the finest scale does not divide into whole cells.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.composite_autogaze import CompositeReconstruction, task_loss_to_mse

    >>> clip = torch.full((1, 2, 3, 224, 224), 0.5)
    >>> clip[..., 208:, 208:] = 1.0  # a white patch in the last corner of both frames
    >>> composite = CompositeReconstruction(GazeGrid([32, 64, 112, 224], patch_size=16))
    >>> found = composite.search(clip, budgets=torch.tensor([3, 1]), max_error=task_loss_to_mse(torch.zeros(1, 2)))
    >>> found.ids.tolist()
    [[[264, -1, -1], [0, -1, -1]]]
    >>> torch.allclose(found.reconstruction, clip[:, -1])
    True

    ```
    """

    def __init__(self, grid: GazeGrid):
        super().__init__(grid)
        if any(size % cells for size, cells in zip(grid.sizes[-1], self.cells, strict=True)):
            raise ValueError(
                f"`grid` must have a finest scale that divides into {self.cells[0]}x{self.cells[1]} cells, the least "
                f"common multiples of its grids {grid.grids}, got {grid.sizes[-1]} pixels"
            )

    def __repr__(self) -> str:
        return f"CompositeReconstruction({self.grid})"

    def start_canvas(self, frames: torch.Tensor) -> Canvas:
        """Checks clips `(batch, frames, 3, height, width)` and returns a mid-grey canvas."""
        image = self._initial_image(frames, None)
        return Canvas(image, torch.ones(len(frames), *self.cells, dtype=torch.bool, device=frames.device))

    def __call__(
        self, pixels: torch.Tensor, gaze: GazeOutput, frames: Sequence[int] | None = None
    ) -> ReconstructionOutput:
        """
        Reconstructs frames and measures their loss; all reconstructions have this signature.

        Args:
            pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
                The clips, one frame per frame of gaze, float32 or float64 pixels in 0..1 (within 0.001), in the size of the
                finest scale.
            gaze ([`GazeOutput`]): kept patches of the clips.
            frames (`Sequence[int]`, *optional*):
                Indices of the frames to return; all if not given. They always build on the frames before them.

        Returns:
            [`ReconstructionOutput`] with the loss `(40 - PSNR) / 20` of each frame.

        Raises:
            ValueError: if pixels or gaze are not as above, or a frame does not exist.
        """
        index = check_reconstruction_inputs(pixels, gaze, frames, self.grid)
        length = max(index) + 1
        masks = [mask[:, :length] for mask in gaze.gazing_mask]
        rebuilt = self.reconstruct(pixels[:, :length], masks)[:, index]
        mse = (rebuilt - pixels[:, index]).square().mean((2, 3, 4))
        return ReconstructionOutput(rebuilt, mse_to_task_loss(mse))

    def reconstruct(
        self,
        pixels: torch.Tensor,
        gaze: GazeOutput | Sequence[torch.Tensor],
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Reconstructs clips from their kept patches.

        Args:
            pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
                The clips, float32 or float64 pixels in 0..1 (within 0.001), in the size of the finest scale.
            gaze (`GazeOutput` or `Sequence[torch.BoolTensor]` of shape `(batch, frames, patches)`):
                Kept patches: a gaze, or its masks, one per scale.
            previous (`torch.FloatTensor` of shape `(batch, 3, height, width)`, *optional*):
                Reconstruction of the frame before the first, to continue a stream; mid-grey if not given.

        Returns:
            `torch.FloatTensor` shaped like `pixels`.

        Raises:
            ValueError: if a shape, a dtype or the range of the pixels is not as above, or the gaze has another grid.
        """
        current = self._initial_image(pixels, previous)
        if isinstance(gaze, GazeOutput):
            if gaze.grid != self.grid:
                raise ValueError(f"`gaze` must be one of {self.grid}, got one of {gaze.grid}")
            gaze = gaze.gazing_mask
        expected = [((*pixels.shape[:2], patches), torch.bool) for patches in self.grid.num_patches_each_scale]
        given = [(tuple(mask.shape), mask.dtype) for mask in gaze]
        if given != expected:
            raise ValueError(f"`gaze` must hold one mask per scale, of {expected}, got {given}")
        frames = []
        # Under autocast, the products would be computed in half precision.
        with torch.autocast(pixels.device.type, enabled=False):
            for t in range(pixels.shape[1]):
                current = self._paste(current, self._render(pixels[:, t].contiguous()), [mask[:, t] for mask in gaze])
                frames.append(current)
        return torch.stack(frames, dim=1)

    @torch.no_grad()
    def search(
        self,
        pixels: torch.Tensor,
        budgets: Sequence[int] | torch.Tensor,
        max_error: torch.Tensor | None = None,
        previous: torch.Tensor | None = None,
    ) -> GreedySearchOutput:
        """
        Chooses patches greedily, each time the one that decreases the squared error of its frame most.

        Of equal gains, the lowest id is chosen. Without `max_error`, the search continues to the end of the budget. The error
        never increases, as patches of the finest scale have no error. The choice for a clip does not depend on its batch.

        Args:
            pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
                The clips, float32 or float64 pixels in 0..1 (within 0.001), in the size of the finest scale.
            budgets (`Sequence[int]` or `torch.LongTensor` of shape `(frames,)`):
                Patches to choose in each frame, 1 to `grid.num_patches`.
            max_error (`torch.FloatTensor` of shape `(batch, frames)`, *optional*):
                A frame is done as soon as one patch is chosen and its mean squared error is at most this; `-inf` for
                never. If not given, every frame uses its whole budget.
            previous (`torch.FloatTensor` of shape `(batch, 3, height, width)`, *optional*):
                Reconstruction of the frame before the first, to continue a stream; mid-grey if not given.

        Returns:
            [`GreedySearchOutput`]

        Raises:
            ValueError: if a shape, a dtype, the range of the pixels or a budget is not as above, or `max_error` is NaN.
        """
        current = self._initial_image(pixels, previous)
        batch, num_frames = pixels.shape[:2]
        budgets = torch.as_tensor(budgets)
        if budgets.shape != (num_frames,) or budgets.is_floating_point():
            raise ValueError(f"`budgets` must be {num_frames} whole numbers, one per frame, got {budgets.tolist()}")
        if budgets.min() < 1 or budgets.max() > self.grid.num_patches:
            raise ValueError(f"`budgets` must lie in 1..{self.grid.num_patches}, got {budgets.tolist()}")
        if max_error is not None and max_error.shape != (batch, num_frames):
            raise ValueError(f"`max_error` must be of shape {(batch, num_frames)}, got {tuple(max_error.shape)}")
        if max_error is not None and max_error.isnan().any():
            raise ValueError(f"`max_error` must be numbers, `-inf` for no threshold, got {max_error.tolist()}")

        limit = None if max_error is None else max_error.double() * pixels[0, 0].numel()
        found = self.search_frames(pixels, budgets, limit, self._full_canvas(current))
        mse = (found.errors / pixels[0, 0].numel()).to(pixels.dtype)
        return GreedySearchOutput(found.ids, mse, found.counts, found.canvas.image)

    @torch.no_grad()
    def measure(self, pixels: torch.Tensor, gaze: GazeOutput, previous: torch.Tensor | None = None) -> torch.Tensor:
        """
        Measures the error after each choice of a gaze, of any selector.

        Args:
            pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
                The clips, one frame per frame of gaze, as in [`~CompositeReconstruction.reconstruct`].
            gaze ([`GazeOutput`]): kept patches, in the order of choice.
            previous (`torch.FloatTensor` of shape `(batch, 3, height, width)`, *optional*):
                Reconstruction of the frame before the first, to continue a stream; mid-grey if not given.

        Returns:
            `torch.FloatTensor` of shape `(batch, N)`: mean squared error of the slot's frame, reconstructed from the kept
            patches up to this slot; padding repeats the previous slot.

        Raises:
            ValueError: if pixels or gaze are not as above.
        """
        check_reconstruction_inputs(pixels, gaze, None, self.grid)
        errors = self.measure_choices(pixels, gaze, self._full_canvas(self._initial_image(pixels, previous)))
        return (errors / pixels[0, 0].numel()).to(pixels)

    @torch.no_grad()
    def cell_errors(self, frames: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """
        Measures the error of every cell before any patch is kept, and with patches of each scale.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, 3, height, width)`): pixels in 0..1.
            previous (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
                Reconstruction of the previous frames, or mid-grey.

        Returns:
            `torch.DoubleTensor` of shape `(batch, 1 + scales, *cells)`: squared errors, summed over the pixels and
            channels of a cell; first of `previous`, then of the scales, coarse to fine (0 for the finest).
        """
        self._initial_image(frames[:, None], previous)
        with torch.autocast(frames.device.type, enabled=False):
            frames = frames.contiguous()
            return self._squared_errors(frames, (previous.to(frames), *self._render(frames))) * ERROR_UNIT

    @torch.no_grad()
    def gains(self, errors: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """
        Computes the gain of every patch of a frame as the next choice.

        Args:
            errors (`torch.DoubleTensor` of shape `(batch, 1 + scales, *cells)`):
                Errors of the frames, as [`~CompositeReconstruction.cell_errors`] returns them.
            kept (`torch.BoolTensor` of shape `(batch, patches)`, *optional*):
                The patches of the frames that are kept already; none by default.

        Returns:
            `torch.DoubleTensor` of shape `(batch, patches)`: the decrease of the squared error of the frame by each patch.
        """
        errors = errors.flatten(2)
        scale_of_patch = self.scale_of_patch(errors.device)[:-1]
        scale_of_cell = torch.zeros_like(scale_of_patch[:1]).expand(len(errors), 1, -1)
        if kept is not None:
            scale_of_cell = (kept[..., None] * scale_of_patch).amax(1, keepdim=True)
        covered = torch.maximum(scale_of_cell, scale_of_patch)
        return (errors.gather(1, scale_of_cell) - errors.gather(1, covered)).sum(-1)

    def _initial_image(self, pixels: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        """Checks clips and the state of their stream; returns the image `(batch, 3, height, width)` before them."""
        height, width = self.grid.sizes[-1]
        if pixels.ndim != 5 or 0 in pixels.shape or pixels.shape[2] % 3 or tuple(pixels.shape[3:]) != (height, width):
            raise ValueError(
                f"`pixels` must be of shape (batch, frames, 3, {height}, {width}), none of them 0, got "
                f"{tuple(pixels.shape)}"
            )
        if pixels.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`pixels` must be float32 or float64, got {pixels.dtype}")
        lowest, highest = (float(value) for value in pixels.aminmax())
        if not (lowest >= -_PIXEL_TOLERANCE and highest <= 1 + _PIXEL_TOLERANCE):
            raise ValueError(
                f"`pixels` must lie in 0..1, got {lowest:.4g}..{highest:.4g}: undo the normalisation and clamp them"
            )
        shape = (len(pixels), *pixels.shape[2:])
        if previous is None:
            return pixels.new_full(shape, 0.5)
        if tuple(previous.shape) != shape:
            raise ValueError(f"`previous` must be of shape {shape}, got {tuple(previous.shape)}")
        return previous.to(pixels)

    def _full_canvas(self, image: torch.Tensor) -> Canvas:
        """Makes a canvas that is nowhere empty, as budgets for each frame need it."""
        return Canvas(image, torch.zeros(len(image), *self.cells, dtype=torch.bool, device=image.device))

    def _render(self, frame: torch.Tensor) -> list[torch.Tensor]:
        """Returns a frame `(batch, 3, height, width)` made of all patches of each scale; the finest is the frame itself."""
        patch, images = self.grid.patch_size, []
        for (rows, cols), resize in zip(self.grid.grids[:-1], self._tables(frame).resizes, strict=True):
            small = resize.down_rows @ (frame @ resize.down_cols)
            wide = small.view(*frame.shape[:2], rows * patch, cols, patch) @ resize.up_cols
            image = resize.up_rows @ wide.view(*frame.shape[:2], rows, patch, frame.shape[-1])
            images.append(image.view_as(frame).clamp_(0, 1))
        return [*images, frame]
