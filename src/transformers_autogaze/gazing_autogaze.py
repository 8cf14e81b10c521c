"""Gaze as data: which patches of which frames, at which scales, were kept.

This module owns all geometry (ids, grids, boxes, masks, tiles) and the output object that every selector returns. It
knows nothing of models, videos or files; selectors make a [`GazeOutput`], encoders, reconstructions and pictures use it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput


class GazeGrid:
    """
    The patches of one frame at several scales, and how their ids, rows, columns, boxes and masks relate.

    The frame is resized to every scale and cut into square patches there. Ids run over the scales in the given order
    and row by row inside a scale; over a clip they count on from frame to frame, `id + num_patches * frame`.

    Args:
        scales (`Sequence[int | tuple[int, int]]`):
            Sizes in pixels that a frame is resized to, coarse to fine: one number for a square, `(height, width)` for
            a rectangle.
        patch_size (`int`, *optional*, defaults to 16):
            Height and width of a patch in pixels; every scale is a multiple of it.

    Raises:
        ValueError: if there is no scale, a scale is no multiple of `patch_size`, or the scales do not ascend.

    Example:

    ```python
    >>> from transformers_autogaze import GazeGrid

    >>> grid = GazeGrid([32, 64, 112, 224], patch_size=16)
    >>> grid.num_patches, grid.grids
    (265, ((2, 2), (4, 4), (7, 7), (14, 14)))
    >>> grid.boxes(torch.tensor([0, 264]), height=448, width=448).tolist()
    [[0.0, 0.0, 224.0, 224.0], [416.0, 416.0, 448.0, 448.0]]

    ```
    """

    def __init__(self, scales: Sequence[int | tuple[int, int]], patch_size: int = 16):
        if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"`patch_size` must be a positive number of pixels, got {patch_size!r}")
        if isinstance(scales, (str, int)) or len(scales) == 0:
            raise ValueError(f"`scales` must be a list of sizes in pixels such as [32, 64, 112, 224], got {scales!r}")
        sizes = []
        for index, scale in enumerate(scales):
            size = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
            if len(size) != 2 or any(not isinstance(s, int) or s < patch_size or s % patch_size for s in size):
                raise ValueError(
                    f"`scales[{index}]` must be a positive multiple of the patch size {patch_size}, got {scale!r}"
                )
            if sizes and (size[0] < sizes[-1][0] or size[1] < sizes[-1][1] or size == sizes[-1]):
                raise ValueError(f"`scales` must ascend from coarse to fine, got {list(scales)}")
            sizes.append(size)
        self.patch_size = patch_size
        self.sizes: tuple[tuple[int, int], ...] = tuple(sizes)
        """Height and width in pixels of every scale."""
        self.grids: tuple[tuple[int, int], ...] = tuple((h // patch_size, w // patch_size) for h, w in sizes)
        """Rows and columns of every scale."""
        self.num_patches_each_scale: tuple[int, ...] = tuple(rows * cols for rows, cols in self.grids)
        self.num_patches: int = sum(self.num_patches_each_scale)
        """Patches of one frame over all scales."""

    @property
    def scales(self) -> list[int | tuple[int, int]]:
        """The scales as they were given: a number for a square, `(height, width)` otherwise."""
        return [height if height == width else (height, width) for height, width in self.sizes]

    def __repr__(self) -> str:
        return f"GazeGrid(scales={self.scales}, patch_size={self.patch_size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GazeGrid) and (self.sizes, self.patch_size) == (other.sizes, other.patch_size)

    def __hash__(self) -> int:
        return hash((self.sizes, self.patch_size))

    def locate(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Finds the scale, row and column of patches.

        Args:
            ids (`torch.LongTensor` of any shape):
                Patch ids, `0 <= id < num_patches`, counted from the first patch of their frame.

        Returns:
            `tuple` of three `torch.LongTensor` shaped like `ids`: index of the scale, row and column in its grid.

        Raises:
            ValueError: if an id lies outside the grid.
        """
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.num_patches):
            raise ValueError(f"`ids` must lie in 0..{self.num_patches - 1}, got {int(ids.min())}..{int(ids.max())}")
        first, cols = self._first_ids(ids.device), self._columns(ids.device)
        scale = torch.searchsorted(first, ids.contiguous(), right=True) - 1
        local = ids - first[scale]
        return scale, local // cols[scale], local % cols[scale]

    def ids(self, scale: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        """
        Gives the ids of the patches at a scale index, row and column; the inverse of [`~GazeGrid.locate`].

        Args:
            scale, row, col (`torch.LongTensor` of one shape): index of the scale, row and column in its grid.

        Returns:
            `torch.LongTensor`: ids counted from the first patch of the frame.

        Raises:
            ValueError: if a scale, row or column does not exist.
        """
        grids = torch.tensor(self.grids, device=scale.device)
        inside = (scale >= 0) & (scale < len(self.grids))
        if inside.all():
            inside = (row >= 0) & (col >= 0) & (row < grids[scale, 0]) & (col < grids[scale, 1])
        if not inside.all():
            raise ValueError(f"`scale`, `row` and `col` must name patches of the grids {self.grids}")
        return self._first_ids(scale.device)[scale] + row * grids[scale, 1] + col

    def boxes(self, ids: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """
        Gives the boxes that patches cover in a frame of any size.

        Args:
            ids (`torch.LongTensor` of any shape): patch ids counted from the first patch of their frame.
            height, width (`int`): size of the frame in pixels.

        Returns:
            `torch.FloatTensor` of shape `(*ids.shape, 4)`: left, top, right, bottom in pixels.
        """
        scale, row, col = self.locate(ids)
        grids = torch.tensor(self.grids, device=ids.device)
        unit_y, unit_x = height / grids[scale, 0], width / grids[scale, 1]
        return torch.stack([col * unit_x, row * unit_y, (col + 1) * unit_x, (row + 1) * unit_y], dim=-1)

    def split_by_scale(self, per_patch: torch.Tensor) -> list[torch.Tensor]:
        """Cuts the last dimension, one entry per patch of a frame, into one tensor per scale."""
        return list(per_patch.split(self.num_patches_each_scale, dim=-1))

    def masks_from_ids(self, gazing_pos: torch.Tensor, is_real: torch.Tensor, num_frames: int) -> list[torch.Tensor]:
        """
        Marks the gazed patches of every frame.

        Args:
            gazing_pos (`torch.LongTensor` of shape `(batch, N)`): ids counted from the first patch of the clip.
            is_real (`torch.BoolTensor` of shape `(batch, N)`): false where `gazing_pos` is padding.
            num_frames (`int`): frames of the clip.

        Returns:
            `list` with a `torch.BoolTensor` of shape `(batch, num_frames, patches)` for every scale.

        Raises:
            ValueError: if a real id lies outside the clip.
        """
        total = self.num_patches * num_frames
        real = gazing_pos[is_real]
        if real.numel() and (real.min() < 0 or real.max() >= total):
            raise ValueError(
                f"`gazing_pos` must lie in 0..{total - 1} for {num_frames} frames of {self.num_patches} patches, "
                f"got {int(real.min())}..{int(real.max())}"
            )
        # Padding is written to one extra place at the end, which is cut off again.
        mask = torch.zeros(len(gazing_pos), total + 1, dtype=torch.bool, device=gazing_pos.device)
        mask.scatter_(1, torch.where(is_real, gazing_pos, total), True)
        return self.split_by_scale(mask[:, :-1].view(len(gazing_pos), num_frames, self.num_patches))

    def ids_from_masks(self, masks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Reads ids off masks, in ascending order inside a frame; a frame is padded to its longest count in the batch.

        Args:
            masks (`Sequence[torch.BoolTensor]` of shape `(batch, num_frames, patches)`): one mask per scale.

        Returns:
            `tuple`: `gazing_pos` and `if_padded_gazing` of shape `(batch, N)`, `num_gazing_each_frame` of shape
            `(num_frames,)`. Padding of frame `t` holds the id before the first of that frame, as the published code
            has it (SPEC, "Other resolutions").
        """
        mask = torch.cat(list(masks), dim=-1)
        num_each_frame = mask.sum(-1).amax(0)
        order = torch.argsort(mask, dim=-1, descending=True, stable=True)
        is_padding = ~mask.gather(-1, order)
        first = torch.arange(mask.shape[1], device=mask.device)[:, None] * self.num_patches
        ids = torch.where(is_padding, -1, order) + first
        keep = torch.arange(mask.shape[-1], device=mask.device) < num_each_frame[:, None]
        return ids[:, keep], is_padding[:, keep], num_each_frame

    def tile_layout(self, tile: "GazeGrid") -> tuple[int, int]:
        """
        Counts the tiles needed to cover this grid.

        Args:
            tile (`GazeGrid`): the grid of one tile, with as many scales.

        Returns:
            `tuple[int, int]`: rows and columns of tiles; those at the right and bottom may reach beyond the frame.

        Raises:
            ValueError: if the numbers of scales differ or some scale of this grid is not covered by the tiles that
                cover its finest one.
        """
        if len(self.grids) != len(tile.grids):
            raise ValueError(f"`scales` must be {len(tile.grids)} to match the tiles', got {len(self.grids)}")
        rows, cols = (math.ceil(whole / part) for whole, part in zip(self.grids[-1], tile.grids[-1], strict=True))
        for size, whole, part in zip(self.sizes, self.grids, tile.grids, strict=True):
            if whole[0] > rows * part[0] or whole[1] > cols * part[1]:
                raise ValueError(
                    f"`scales` holds {size}, a grid of {whole[0]}x{whole[1]} patches, but the {rows}x{cols} tiles that "
                    f"cover the finest scale {self.sizes[-1]} give only {rows * part[0]}x{cols * part[1]} there"
                )
        return rows, cols

    def cut_tiles(self, video: torch.Tensor, tile: "GazeGrid") -> torch.Tensor:
        """
        Cuts frames of this grid's finest size into tiles, zero-padded at the right and bottom to whole tiles.

        Args:
            video (`torch.Tensor` of shape `(batch, frames, channels, height, width)`): frames, `(height, width)` being
                the finest scale.
            tile (`GazeGrid`): the grid of one tile, with as many scales.

        Returns:
            `torch.Tensor` of shape `(batch * tiles, frames, channels, tile height, tile width)`, tiles row by row.
        """
        if tuple(video.shape[-2:]) != self.sizes[-1]:
            raise ValueError(
                f"`video` must be {self.sizes[-1]} pixels, the finest scale, got {tuple(video.shape[-2:])}"
            )
        rows, cols = self.tile_layout(tile)
        height, width = (patches * self.patch_size for patches in tile.grids[-1])
        video = F.pad(video, (0, cols * width - video.shape[-1], 0, rows * height - video.shape[-2]))
        batch, frames, channels = video.shape[:3]
        tiles = video.view(batch, frames, channels, rows, height, cols, width).permute(0, 3, 5, 1, 2, 4, 6)
        return tiles.reshape(batch * rows * cols, frames, channels, height, width)

    def stitch_tiles(self, masks: Sequence[torch.Tensor], tile: "GazeGrid") -> list[torch.Tensor]:
        """
        Joins the masks of tiles to masks of the whole frame; what falls outside the frame is dropped.

        Args:
            masks (`Sequence[torch.BoolTensor]` of shape `(batch * tiles, num_frames, patches)`): per scale, tiles in
                the order of [`~GazeGrid.cut_tiles`].
            tile (`GazeGrid`): the grid of one tile.

        Returns:
            `list[torch.BoolTensor]` of shape `(batch, num_frames, patches)`, one mask per scale.
        """
        rows, cols = self.tile_layout(tile)
        whole = []
        for mask, (height, width), part in zip(masks, self.grids, tile.grids, strict=True):
            mask = mask.view(-1, rows, cols, mask.shape[1], *part).permute(0, 3, 1, 4, 2, 5)
            mask = mask.reshape(len(mask), mask.shape[1], rows * part[0], cols * part[1])
            whole.append(mask[..., :height, :width].flatten(2))
        return whole

    def split_tiles(self, masks: Sequence[torch.Tensor], tile: "GazeGrid") -> list[torch.Tensor]:
        """
        Cuts masks of the whole frame into masks of its tiles; the inverse of [`~GazeGrid.stitch_tiles`].

        Args:
            masks (`Sequence[torch.BoolTensor]` of shape `(batch, num_frames, patches)`): one mask per scale.
            tile (`GazeGrid`): the grid of one tile.

        Returns:
            `list[torch.BoolTensor]` of shape `(batch * tiles, num_frames, patches)`; false outside the frame.
        """
        rows, cols = self.tile_layout(tile)
        parts = []
        for mask, (height, width), part in zip(masks, self.grids, tile.grids, strict=True):
            batch, frames = mask.shape[:2]
            mask = mask.view(batch, frames, height, width)
            mask = F.pad(mask, (0, cols * part[1] - width, 0, rows * part[0] - height))
            mask = mask.view(batch, frames, rows, part[0], cols, part[1]).permute(0, 2, 4, 1, 3, 5)
            parts.append(mask.reshape(batch * rows * cols, frames, -1))
        return parts

    def _first_ids(self, device: torch.device) -> torch.Tensor:
        counts = torch.tensor((0, *self.num_patches_each_scale[:-1]), device=device)
        return counts.cumsum(0)

    def _columns(self, device: torch.device) -> torch.Tensor:
        return torch.tensor([cols for _, cols in self.grids], device=device)


@dataclass
class GazeOutput(ModelOutput):
    """
    The patches that a selector kept of a batch of clips, with the keys of the published code (SPEC, "Output keys").

    Slots are ordered frame by frame and, inside a frame, in the order of choice. In a batch, every frame is padded to
    its longest count.

    Args:
        gazing_pos (`torch.LongTensor` of shape `(batch, N)`):
            Patch ids, counted from the first patch of the first frame.
        if_padded_gazing (`torch.BoolTensor` of shape `(batch, N)`):
            True where a slot is padding.
        num_gazing_each_frame (`torch.LongTensor` of shape `(frames,)`):
            Slots of each frame, padding included; their sum is `N`.
        gazing_mask (`list[torch.BoolTensor]` of shape `(batch, frames, patches)`):
            Per scale, true where a patch was kept.
        scales (`list[int | tuple[int, int]]`):
            Sizes in pixels of the scales, coarse to fine.
        patch_size (`int`):
            Height and width of a patch in pixels.
        frame_sampling_rate (`int`):
            Video frames per frame of gaze.
        num_vision_tokens_each_frame (`int`):
            Patches of a frame over all scales.
        log_action_probs (`torch.FloatTensor` of shape `(batch, N)`, *optional*):
            Log-probability of each choice.
        task_loss_prediction (`torch.FloatTensor` of shape `(batch, N)`, *optional*):
            Predicted reconstruction loss after each choice. Selectors that measure instead put the measured loss here.
        task_loss_requirement (`torch.FloatTensor` of shape `(batch, frames)`, *optional*):
            The threshold that ended a frame, if there was one.
        clip_num_gazing_each_frame (`torch.LongTensor` of shape `(batch, frames)`, *optional*):
            Slots that each clip would have taken alone, padding included.
        past_key_values (`GazeCache`, *optional*):
            State to continue the stream with, if asked for.

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

    gazing_pos: torch.LongTensor | None = None
    if_padded_gazing: torch.BoolTensor | None = None
    num_gazing_each_frame: torch.LongTensor | None = None
    gazing_mask: list[torch.BoolTensor] | None = None
    scales: list[int | tuple[int, int]] | None = None
    patch_size: int | None = None
    frame_sampling_rate: int | None = None
    num_vision_tokens_each_frame: int | None = None
    log_action_probs: torch.FloatTensor | None = None
    task_loss_prediction: torch.FloatTensor | None = None
    task_loss_requirement: torch.FloatTensor | None = None
    clip_num_gazing_each_frame: torch.LongTensor | None = None
    past_key_values: object | None = None

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
        Builds a gaze from ids; the masks and the sizes follow from the grid.

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
        Builds a gaze from masks, ids ascending inside a frame.

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
        """`torch.LongTensor` of shape `(batch, frames)`: kept patches, padding not counted."""
        counts = torch.zeros(self.batch_size, self.num_frames, dtype=torch.long, device=self.gazing_pos.device)
        return counts.index_add_(1, self.frame_of_slot, (~self.if_padded_gazing).long())

    @property
    def num_real(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch,)`: kept patches of each clip."""
        return (~self.if_padded_gazing).sum(-1)

    @property
    def kept_ratio(self) -> torch.Tensor:
        """`torch.FloatTensor` of shape `(batch,)`: kept patches over all patches of all scales, as `gazing_ratio` is."""
        return self.num_real / (self.num_frames * self.num_vision_tokens_each_frame)

    @property
    def reduction_factor(self) -> torch.Tensor:
        """`torch.FloatTensor` of shape `(batch,)`: patches of the finest scale, all a dense encoder sees, over kept ones."""
        return self.num_frames * self.grid.num_patches_each_scale[-1] / self.num_real

    def ids_each_frame(self, clip: int = 0) -> list[torch.Tensor]:
        """
        Gives the kept ids of one clip, frame by frame, in the order of choice and without padding.

        Args:
            clip (`int`, *optional*, defaults to 0): which clip of the batch.

        Returns:
            `list[torch.LongTensor]`, one per frame: ids counted from the first patch of their frame.
        """
        real = ~self.if_padded_gazing[clip]
        ids = (self.gazing_pos[clip] - self.frame_of_slot * self.num_vision_tokens_each_frame)[real]
        return list(ids.split(self.num_real_each_frame[clip].tolist()))

    def boxes(self, height: int, width: int) -> torch.Tensor:
        """
        Gives the box of every slot in frames of any size.

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
        Tells for every pixel the finest kept patch that it lies in.

        Args:
            height, width (`int`): size of the frames in pixels.

        Returns:
            `torch.LongTensor` of shape `(batch, frames, height, width)`: ids counted from their frame, -1 where no kept
            patch lies; a pixel lies where its centre lies.
        """
        device = self.gazing_pos.device
        finest = torch.full((self.batch_size, self.num_frames, height, width), -1, device=device)
        first = 0
        for mask, (rows, cols) in zip(self.gazing_mask, self.grid.grids, strict=True):
            row = (2 * torch.arange(height, device=device) + 1) * rows // (2 * height)
            col = (2 * torch.arange(width, device=device) + 1) * cols // (2 * width)
            patch = row[:, None] * cols + col
            finest = torch.where(mask[..., patch], first + patch, finest)
            first += rows * cols
        return finest

    def coverage(self, height: int, width: int) -> torch.Tensor:
        """
        Marks the pixels that lie in at least one kept patch.

        Args:
            height, width (`int`): size of the frames in pixels.

        Returns:
            `torch.BoolTensor` of shape `(batch, frames, height, width)`.
        """
        return self.finest_patches(height, width) >= 0

    def gather_patches(self, video: torch.Tensor) -> torch.Tensor:
        """
        Cuts the kept patches out of the frames, resized to every scale (SPEC, "The vision tower").

        Args:
            video (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`):
                The frames that the gaze is for, of any size and in any range of values.

        Returns:
            `torch.FloatTensor` of shape `(batch, N, channels, patch_size, patch_size)`: resized bicubically without
            antialiasing; zeros for padding.

        Raises:
            ValueError: if the clips or frames are not as many as the gaze's.
        """
        expected = (self.batch_size, self.num_frames * self.frame_sampling_rate)
        if video.ndim != 5 or tuple(video.shape[:2]) != expected:
            raise ValueError(
                f"`video` must have the shape {expected} and then (channels, height, width), got {tuple(video.shape)}"
            )
        frames = video[:, :: self.frame_sampling_rate].flatten(0, 1)
        patches = []
        for size in self.grid.sizes:
            resized = frames
            if tuple(frames.shape[-2:]) != size:
                resized = F.interpolate(frames, size=size, mode="bicubic", align_corners=False)
            columns = F.unfold(resized, self.patch_size, stride=self.patch_size)
            patches.append(columns.transpose(1, 2).unflatten(2, (-1, self.patch_size, self.patch_size)))
        patches = torch.cat(patches, dim=1).unflatten(0, (self.batch_size, -1)).flatten(1, 2)
        slots = self.gazing_pos.masked_fill(self.if_padded_gazing, 0)
        clip = torch.arange(self.batch_size, device=slots.device)[:, None]
        return patches[clip, slots].masked_fill(self.if_padded_gazing[..., None, None, None], 0)

    def select(self, clip: int) -> "GazeOutput":
        """
        Takes one clip out of the batch, as it would have come out alone.

        Args:
            clip (`int`): which clip of the batch, `-batch <= clip < batch`.

        Returns:
            [`GazeOutput`] with a batch of one; without `past_key_values`.
        """
        if not -self.batch_size <= clip < self.batch_size:
            raise ValueError(f"`clip` must lie in 0..{self.batch_size - 1}, got {clip}")
        clip %= self.batch_size
        counts = self.num_gazing_each_frame
        if self.clip_num_gazing_each_frame is not None:
            counts = self.clip_num_gazing_each_frame[clip]
        starts = self.num_gazing_each_frame.cumsum(0) - self.num_gazing_each_frame
        place = torch.arange(self.gazing_pos.shape[1], device=counts.device) - starts[self.frame_of_slot]
        own = place < counts[self.frame_of_slot]
        return self.replace(
            **{
                key: self[key][clip : clip + 1, own]
                for key in ("gazing_pos", "if_padded_gazing", "log_action_probs", "task_loss_prediction")
                if self.get(key) is not None
            },
            **{
                key: self[key][clip : clip + 1]
                for key in ("task_loss_requirement", "clip_num_gazing_each_frame")
                if self.get(key) is not None
            },
            num_gazing_each_frame=counts,
            gazing_mask=[mask[clip : clip + 1] for mask in self.gazing_mask],
            past_key_values=None,
        )

    @classmethod
    def concatenate(cls, gazes: Sequence["GazeOutput"]) -> "GazeOutput":
        """
        Joins gazes of the same clips in time, such as the frames of a stream or the chunks of a long video.

        Args:
            gazes (`Sequence[GazeOutput]`): in order of time, of one batch size, scales and patch size; the ids of each
                count from its own first frame.

        Returns:
            [`GazeOutput`] whose ids count from the first frame of the first; the state is the last one's.

        Raises:
            ValueError: if there is no gaze or they differ in scales, patch size, sampling rate or batch size.
        """
        if not gazes:
            raise ValueError("`gazes` must hold at least one gaze, got none")
        first = gazes[0]
        for index, gaze in enumerate(gazes):
            for key in ("scales", "patch_size", "frame_sampling_rate", "batch_size"):
                if getattr(gaze, key) != getattr(first, key):
                    raise ValueError(
                        f"`gazes[{index}].{key}` is {getattr(gaze, key)}, but that of the first is {getattr(first, key)}"
                    )

        def joined(key: str) -> torch.Tensor | None:
            parts = [gaze.get(key) for gaze in gazes]
            return None if any(part is None for part in parts) else torch.cat(parts, dim=-1)

        ids, start = [], 0
        for gaze in gazes:
            ids.append(gaze.gazing_pos + start * first.num_vision_tokens_each_frame)
            start += gaze.num_frames
        return first.replace(
            gazing_pos=torch.cat(ids, dim=1),
            **{
                key: joined(key)
                for key in (
                    "if_padded_gazing",
                    "num_gazing_each_frame",
                    "log_action_probs",
                    "task_loss_prediction",
                    "task_loss_requirement",
                    "clip_num_gazing_each_frame",
                )
            },
            gazing_mask=[torch.cat(parts, dim=1) for parts in zip(*(gaze.gazing_mask for gaze in gazes), strict=True)],
            past_key_values=gazes[-1].past_key_values,
        )

    def to(self, device: torch.device | str) -> "GazeOutput":
        """Moves every tensor to a device; a streaming state stays where it is."""
        moved = {key: value.to(device) for key, value in self.items() if isinstance(value, torch.Tensor)}
        return self.replace(**moved, gazing_mask=[mask.to(device) for mask in self.gazing_mask])

    def replace(self, **changes) -> "GazeOutput":
        """Gives a copy with some fields changed."""
        return type(self)(**{**self, **changes})
