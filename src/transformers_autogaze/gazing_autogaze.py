"""
The output of every selector, [`GazeOutput`]: which patches of which frames were kept, at which scales.

Encoders, reconstructions and pictures take it. The geometry of patches is in `grid_autogaze`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data._utils.collate import default_collate_fn_map
from transformers.utils import ModelOutput

from .gaze_batches_autogaze import concatenate_gazes, select_clip, stack_gazes
from .gaze_files_autogaze import load_gaze, save_gaze
from .gaze_pictures_autogaze import count_statistics, describe_gaze, gaze_to_html, plot_gaze
from .grid_autogaze import GazeGrid


@dataclass
class GazeOutput(ModelOutput):
    """
    The patches that a selector kept of a batch of clips; the keys are those of the published code.

    See docs/specification.md, section 8.

    Slots are ordered by frame and, in a frame, by the order of choice. Every frame is padded to its largest count in the
    batch.

    Args:
        gazing_pos (`torch.LongTensor` of shape `(batch, N)`):
            Patch ids, counted from the first patch of the first frame.
        if_padded_gazing (`torch.BoolTensor` of shape `(batch, N)`):
            True where a slot is padding.
        num_gazing_each_frame (`torch.LongTensor` of shape `(frames,)`):
            Number of slots of each frame, padding included; their sum is `N`.
        gazing_mask (`list[torch.BoolTensor]` of shape `(batch, frames, patches)`):
            Masks, one per scale: true where a patch was kept.
        scales (`list[int | tuple[int, int]]`):
            Sizes in pixels of the scales, coarse to fine.
        patch_size (`int`):
            Height and width of a patch in pixels.
        frame_sampling_rate (`int`):
            Video frames per frame of gaze.
        num_vision_tokens_each_frame (`int`):
            Number of patches of a frame over all scales.
        log_action_probs (`torch.FloatTensor` of shape `(batch, N)`, *optional*):
            Log-probability of each choice.
        task_loss_prediction (`torch.FloatTensor` of shape `(batch, N)`, *optional*):
            Predicted reconstruction loss after each choice; the measured loss of selectors that measure it.
        task_loss_requirement (`torch.FloatTensor` of shape `(batch, frames)`, *optional*):
            The threshold of each frame, if there was one.
        clip_num_gazing_each_frame (`torch.LongTensor` of shape `(batch, frames)`, *optional*):
            Number of slots that each clip takes alone, padding included.
        first_frame (`int`, *optional*):
            Number of frames of gaze in the stream before the first of these; `None` for clips that are not part of a stream.
        cache (`GazeCache`, *optional*):
            State to continue the stream with, if requested; also available as `past_key_values`.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid, GazeOutput

    >>> grid = GazeGrid([16, 32], patch_size=16)
    >>> masks = [torch.tensor([[[True], [False]]]), torch.tensor([[[False] * 4, [True, False, False, True]]])]
    >>> gaze = GazeOutput.from_masks(masks, grid)
    >>> gaze.gazing_pos.tolist(), gaze.num_gazing_each_frame.tolist()
    ([[0, 6, 9]], [1, 2])
    >>> gaze.boxes(height=100, width=100)[0, -1].tolist()
    [50.0, 50.0, 100.0, 100.0]

    ```
    """

    gazing_pos: torch.Tensor | None = None
    if_padded_gazing: torch.Tensor | None = None
    num_gazing_each_frame: torch.Tensor | None = None
    gazing_mask: list[torch.Tensor] | None = None
    scales: list[int | tuple[int, int]] | None = None
    patch_size: int | None = None
    frame_sampling_rate: int | None = None
    num_vision_tokens_each_frame: int | None = None
    log_action_probs: torch.Tensor | None = None
    task_loss_prediction: torch.Tensor | None = None
    task_loss_requirement: torch.Tensor | None = None
    clip_num_gazing_each_frame: torch.Tensor | None = None
    first_frame: int | None = None
    cache: object | None = None

    @property
    def past_key_values(self) -> object | None:
        """The state to continue with, for the argument of `generate` with this name; the same as `cache`."""
        return self.cache

    @classmethod
    def from_ids(
        cls,
        gazing_pos: torch.Tensor,
        if_padded_gazing: torch.Tensor,
        num_gazing_each_frame: torch.Tensor,
        grid: GazeGrid,
        frame_sampling_rate: int = 1,
        **extra,
    ) -> "GazeOutput":
        """
        Builds a gaze from ids; masks and sizes are those of the grid.

        Args:
            gazing_pos, if_padded_gazing, num_gazing_each_frame: see [`GazeOutput`].
            grid (`GazeGrid`): the grid that the ids belong to.
            frame_sampling_rate (`int`, *optional*, defaults to 1): video frames per frame of gaze.
            extra: further fields of [`GazeOutput`].
        """
        return cls(
            gazing_pos=gazing_pos,
            if_padded_gazing=if_padded_gazing,
            num_gazing_each_frame=num_gazing_each_frame,
            gazing_mask=grid.masks_from_ids(gazing_pos, ~if_padded_gazing, len(num_gazing_each_frame)),
            scales=grid.scales,
            patch_size=grid.patch_size,
            frame_sampling_rate=frame_sampling_rate,
            num_vision_tokens_each_frame=grid.num_patches,
            **extra,
        )

    @classmethod
    def from_masks(
        cls, masks: Sequence[torch.Tensor], grid: GazeGrid, frame_sampling_rate: int = 1, **extra
    ) -> "GazeOutput":
        """
        Builds a gaze from masks, with ascending ids in a frame.

        Args:
            masks (`Sequence[torch.BoolTensor]` of shape `(batch, frames, patches)`): one mask per scale.
            grid (`GazeGrid`): the grid that the masks belong to.
            frame_sampling_rate (`int`, *optional*, defaults to 1): video frames per frame of gaze.
            extra: further fields of [`GazeOutput`].
        """
        gazing_pos, if_padded_gazing, num_gazing_each_frame = grid.ids_from_masks(masks)
        return cls(
            gazing_pos=gazing_pos,
            if_padded_gazing=if_padded_gazing,
            num_gazing_each_frame=num_gazing_each_frame,
            gazing_mask=list(masks),
            scales=grid.scales,
            patch_size=grid.patch_size,
            frame_sampling_rate=frame_sampling_rate,
            num_vision_tokens_each_frame=grid.num_patches,
            clip_num_gazing_each_frame=torch.cat(list(masks), dim=-1).sum(-1),
            **extra,
        )

    @classmethod
    def full(
        cls, grid: GazeGrid, batch_size: int, num_frames: int, scale: int | None = None, frame_sampling_rate: int = 1
    ) -> "GazeOutput":
        """
        Builds a gaze that keeps all patches.

        Args:
            grid (`GazeGrid`): the patches to keep.
            batch_size (`int`): number of clips.
            num_frames (`int`): number of gazed frames of a clip.
            scale (`int`, *optional*): index of the only scale to keep, such as -1 for the finest; all by default.
            frame_sampling_rate (`int`, *optional*, defaults to 1): video frames per frame of gaze.

        Example:

        ```python
        >>> from transformers_autogaze import GazeGrid, GazeOutput

        >>> gaze = GazeOutput.full(GazeGrid([16, 32], patch_size=16), batch_size=1, num_frames=2, scale=-1)
        >>> gaze.gazing_pos.tolist()
        [[1, 2, 3, 4, 6, 7, 8, 9]]

        ```
        """
        kept = range(len(grid.grids)) if scale is None else [range(len(grid.grids))[scale]]
        masks = [
            torch.full((batch_size, num_frames, count), index in kept)
            for index, count in enumerate(grid.num_patches_each_scale)
        ]
        return cls.from_masks(masks, grid, frame_sampling_rate)

    @property
    def grid(self) -> GazeGrid:
        """The grid that the ids belong to."""
        return GazeGrid(self.scales, self.patch_size)

    @property
    def batch_size(self) -> int:
        """Number of clips."""
        return len(self.gazing_pos)

    @property
    def num_frames(self) -> int:
        """Number of gazed frames of a clip."""
        return len(self.num_gazing_each_frame)

    @property
    def frame_of_slot(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(N,)`: the frame that each slot belongs to."""
        counts = self.num_gazing_each_frame
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    @property
    def num_real_each_frame(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch, frames)`: number of kept patches, without padding."""
        counts = torch.zeros(self.batch_size, self.num_frames, dtype=torch.long, device=self.gazing_pos.device)
        return counts.index_add_(1, self.frame_of_slot, (~self.if_padded_gazing).long())

    @property
    def num_real(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch,)`: number of kept patches of each clip."""
        return (~self.if_padded_gazing).sum(-1)

    @property
    def kept_ratio(self) -> torch.Tensor:
        """`torch.FloatTensor` of shape `(batch,)`: share of kept patches among those of all scales, like `gazing_ratio`."""
        return self.num_real / (self.num_frames * self.num_vision_tokens_each_frame)

    @property
    def reduction_factor(self) -> torch.Tensor:
        """`torch.FloatTensor` of shape `(batch,)`: tokens of a dense encoder (finest scale) divided by kept patches."""
        return self.num_frames * self.grid.num_patches_each_scale[-1] / self.num_real

    def statistics(self, clip: int = 0) -> dict[str, Any]:
        """
        Summarises one clip in plain numbers, for JSON.

        Args:
            clip (`int`, *optional*, defaults to 0): index of the clip in the batch.

        Returns:
            `dict` with `num_frames`, `num_patches` (kept), `kept_ratio`, `reduction_factor` (`None` where nothing was kept),
            `patches_each_frame` (a list) and `patches_each_scale` (a dictionary by scale, coarse to fine).
        """
        counts = torch.stack([mask[clip].sum(-1) for mask in self.gazing_mask], dim=-1)
        return count_statistics(counts.cpu().numpy(), self.grid)

    def ids_each_frame(self, clip: int = 0) -> list[torch.Tensor]:
        """
        Returns the kept ids of one clip, frame by frame, in the order of choice and without padding.

        Args:
            clip (`int`, *optional*, defaults to 0): index of the clip in the batch.

        Returns:
            `list[torch.LongTensor]`, one per frame: ids counted from the first patch of their frame.
        """
        real = ~self.if_padded_gazing[clip]
        ids = (self.gazing_pos[clip] - self.frame_of_slot * self.num_vision_tokens_each_frame)[real]
        return list(ids.split(self.num_real_each_frame[clip].tolist()))

    def boxes(self, height: int, width: int) -> torch.Tensor:
        """
        Returns the box of every slot in frames of any size.

        Args:
            height, width (`int`): size of the frames in pixels.

        Returns:
            `torch.FloatTensor` of shape `(batch, N, 4)`: left, top, right, bottom in pixels; zeros for padding.
        """
        local = self.gazing_pos - self.frame_of_slot * self.num_vision_tokens_each_frame
        boxes = self.grid.boxes(local.masked_fill(self.if_padded_gazing, 0), height, width)
        return boxes.masked_fill(self.if_padded_gazing[..., None], 0)

    def finest_patches(self, height: int, width: int) -> torch.Tensor:
        """
        Returns the finest kept patch at every pixel, by the centre of the pixel.

        Args:
            height, width (`int`): size of the frames in pixels.

        Returns:
            `torch.LongTensor` of shape `(batch, frames, height, width)`: ids counted from the first patch of their frame, -1
            where there is no kept patch.
        """
        device = self.gazing_pos.device
        finest = torch.full((self.batch_size, self.num_frames, height, width), -1, device=device)
        mask = torch.cat(self.gazing_mask, dim=-1)
        for patch in self.grid.patches_at(height, width, device):
            finest = torch.where(mask[..., patch], patch, finest)
        return finest

    def coverage(self, height: int, width: int) -> torch.Tensor:
        """
        Returns a mask of the pixels in kept patches.

        Args:
            height, width (`int`): size of the frames in pixels.

        Returns:
            `torch.BoolTensor` of shape `(batch, frames, height, width)`.
        """
        return self.finest_patches(height, width) >= 0

    def covered_cells(self, rows: int, cols: int) -> torch.Tensor:
        """
        Returns a mask of the cells of any regular grid over the frame that overlap a kept patch of any scale.

        Args:
            rows, cols (`int`): number of rows and columns of cells.

        Returns:
            `torch.BoolTensor` of shape `(batch, frames, rows, cols)`: true where the overlap has an area above 0; edges that
            only touch do not count.

        Example:

        ```python
        >>> from transformers_autogaze import GazeGrid, GazeOutput

        >>> gaze = GazeOutput.from_masks([torch.tensor([[[True, False, False, False]]])], GazeGrid([32]))
        >>> gaze.covered_cells(rows=2, cols=3)[0, 0].int().tolist()
        [[1, 1, 0], [0, 0, 0]]

        ```
        """

        def overlaps(cells: int, patches: int) -> torch.Tensor:
            # In units of 1 / (cells * patches) of the frame, all edges are whole numbers.
            cell = torch.arange(cells, device=self.gazing_pos.device)[:, None] * patches
            patch = torch.arange(patches, device=self.gazing_pos.device) * cells
            return ((cell < patch + cells) & (patch < cell + patches)).float()

        covered = torch.zeros(self.batch_size, self.num_frames, rows, cols, device=self.gazing_pos.device)
        for mask, (height, width) in zip(self.gazing_mask, self.grid.grids, strict=True):
            covered += overlaps(rows, height) @ mask.unflatten(-1, (height, width)).float() @ overlaps(cols, width).T
        return covered > 0

    def gather_patches(self, video: torch.Tensor) -> torch.Tensor:
        """
        Cuts the kept patches out of frames, resized to each scale (docs/specification.md, section 10).

        Args:
            video (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`):
                The frames of the gaze, of any size and range of values.

        Returns:
            `torch.FloatTensor` of shape `(batch, N, channels, patch_size, patch_size)`: resized bicubically without
            antialiasing; zeros for padding.

        Raises:
            ValueError: if the number of clips or frames differs from that of the gaze.
        """
        expected = (self.batch_size, self.num_frames * self.frame_sampling_rate)
        if video.ndim != 5 or tuple(video.shape[:2]) != expected:
            raise ValueError(
                f"`video` must have the shape {expected} and then (channels, height, width), got {tuple(video.shape)}"
            )
        real = ~self.if_padded_gazing
        clip, slot = real.nonzero(as_tuple=True)
        frame = self.frame_of_slot[slot]
        ids = self.gazing_pos[clip, slot] - frame * self.num_vision_tokens_each_frame
        frames = video[:, :: self.frame_sampling_rate].flatten(0, 1)
        patches = self.grid.cut_patches(frames, clip * self.num_frames + frame, ids)
        slots = patches.new_zeros(*real.shape, *patches.shape[1:])
        slots[clip, slot] = patches
        return slots

    def select(self, clip: int) -> "GazeOutput":
        """
        Returns one clip of the batch, as `generate` returns it alone.

        Args:
            clip (`int`): index of the clip in the batch, `-batch <= clip < batch`.

        Returns:
            [`GazeOutput`] with a batch of one; without `cache`.
        """
        return select_clip(self, clip)

    @classmethod
    def stack(cls, gazes: Sequence["GazeOutput"]) -> "GazeOutput":
        """
        Stacks clips of equal length to a batch; the inverse of [`~GazeOutput.select`].

        A `DataLoader` collates gazes this way.

        Args:
            gazes (`Sequence[GazeOutput]`): batches with the same scales, patch size, sampling rate and number of frames.

        Returns:
            [`GazeOutput`]; every frame is padded to its largest count. Without `cache`.

        Raises:
            ValueError: if there is no gaze, or gazes differ in one of these.

        Example:

        ```python
        >>> from transformers_autogaze import GazeGrid, GazeOutput

        >>> grid = GazeGrid([32], patch_size=16)
        >>> one, two = (GazeOutput.from_masks([mask], grid) for mask in torch.eye(4, dtype=torch.bool)[:2, None, None])
        >>> GazeOutput.stack([one, two]).gazing_pos.tolist()
        [[0], [1]]

        ```
        """
        return cls(**stack_gazes(gazes))  # an instance of this class, of which remote code may load several

    @classmethod
    def concatenate(cls, gazes: Sequence["GazeOutput"]) -> "GazeOutput":
        """
        Concatenates gazes of the same clips in time, such as the frames of a stream or the chunks of a long video.

        Args:
            gazes (`Sequence[GazeOutput]`): gazes in order of time, with the same batch size, scales and patch size; the ids
                of each count from its own first frame.

        Returns:
            [`GazeOutput`] with ids counted from the first frame of the first gaze, and the `cache` of the last one.

        Raises:
            ValueError: if there is no gaze, gazes differ in scales, patch size, sampling rate or batch size, or they are parts
                of a stream that are not consecutive.
        """
        return cls(**concatenate_gazes(gazes))

    def to(self, device: torch.device | str) -> "GazeOutput":
        """Moves all tensors to a device, except those of `cache`."""
        moved = {key: value.to(device) for key, value in self.items() if isinstance(value, torch.Tensor)}
        return self.replace(**moved, gazing_mask=[mask.to(device) for mask in self.gazing_mask])

    def replace(self, **changes) -> "GazeOutput":
        """Returns a copy with some fields changed."""
        return type(self)(**{**self, **changes})

    def pin_memory(self) -> "GazeOutput":
        """Copies all tensors to pinned memory; a `DataLoader` calls it with `pin_memory=True`."""
        pinned = {key: value.pin_memory() for key, value in self.items() if isinstance(value, torch.Tensor)}
        return self.replace(**pinned, gazing_mask=[mask.pin_memory() for mask in self.gazing_mask])

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes all fields except `cache` to a file.

        Args:
            path (`str` or `os.PathLike`): a path that ends in `.safetensors`; an existing file is replaced.

        Raises:
            ValueError: if the path has another ending.
        """
        save_gaze(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "GazeOutput":
        """
        Reads a file of [`~GazeOutput.save`], or the gaze in a `gaze.json` of the command line.

        Args:
            path (`str` or `os.PathLike`): a path that ends in `.safetensors` or `.json`. [`GazeFile`] also reads the other
                fields of a `gaze.json`.

        Raises:
            ValueError: if the file is invalid, or of a newer version.
        """
        return load_gaze(cls, path)

    def plot(self, frames: np.ndarray, clip: int = 0, max_frames: int = 8) -> Image.Image:
        """
        Draws frames, and their kept patches below them.

        Args:
            frames (`np.ndarray` of shape `(frames, height, width, 3)`, uint8): the frames of the clip, of any size.
            clip (`int`, *optional*, defaults to 0): index of the clip in the batch.
            max_frames (`int`, *optional*, defaults to 8): maximum number of frames, evenly spaced.

        Returns:
            `PIL.Image.Image`: the picture.
        """
        return plot_gaze(self, frames, clip, max_frames)

    def __repr__(self) -> str:
        return describe_gaze(self)

    def _repr_html_(self) -> str:
        return gaze_to_html(self)


# A DataLoader stacks gazes.
default_collate_fn_map[GazeOutput] = lambda gazes, *, collate_fn_map=None: GazeOutput.stack(gazes)
