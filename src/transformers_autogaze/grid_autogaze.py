"""The geometry of patches: ids, rows, columns, boxes, masks and tiles of a frame at several scales."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F


class GazeGrid:
    """
    The patches of a frame at several scales, with conversions between ids, rows, columns, boxes and masks.

    The frame is resized to every scale and cut into square patches. Ids are numbered scale by scale in the given order, and
    row by row in a scale. In a clip, the ids of frame `t` are offset by `t * num_patches`.

    Args:
        scales (`Sequence[int | tuple[int, int]]`):
            Sizes in pixels that a frame is resized to, coarse to fine: one number for a square, `(height, width)` for
            a rectangle.
        patch_size (`int`, *optional*, defaults to 16):
            Height and width of a patch in pixels; every scale is a multiple of it.

    Raises:
        ValueError: if there is no scale, a scale is not a multiple of `patch_size`, or the scales do not ascend.

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
        sizes: list[tuple[int, int]] = []
        for index, scale in enumerate(scales):
            size: Any = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
            if len(size) != 2 or any(not isinstance(s, int) or s < patch_size or s % patch_size for s in size):
                raise ValueError(
                    f"`scales[{index}]` must be a positive multiple of the patch size {patch_size}, got {scale!r}"
                )
            if sizes and (size[0] < sizes[-1][0] or size[1] < sizes[-1][1] or size == sizes[-1]):
                raise ValueError(f"`scales` must ascend from coarse to fine, got {list(scales)}")
            sizes.append(size)
        self.patch_size = patch_size
        self.sizes: tuple[tuple[int, int], ...] = tuple(sizes)
        """Height and width in pixels of each scale."""
        self.grids: tuple[tuple[int, int], ...] = tuple((h // patch_size, w // patch_size) for h, w in sizes)
        """Rows and columns of each scale."""
        self.num_patches_each_scale: tuple[int, ...] = tuple(rows * cols for rows, cols in self.grids)
        self.num_patches: int = sum(self.num_patches_each_scale)
        """Number of patches of a frame over all scales."""

    @property
    def scales(self) -> list[int | tuple[int, int]]:
        """The scales: a number for a square, `(height, width)` otherwise."""
        return [height if height == width else (height, width) for height, width in self.sizes]

    def __repr__(self) -> str:
        return f"GazeGrid(scales={self.scales}, patch_size={self.patch_size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GazeGrid) and (self.sizes, self.patch_size) == (other.sizes, other.patch_size)

    def __hash__(self) -> int:
        return hash((self.sizes, self.patch_size))

    def locate(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Returns the scale, row and column of patches.

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
        Returns the ids of the patches at a scale, row and column; the inverse of [`~GazeGrid.locate`].

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

    def patches_at(self, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """
        Returns the patch of each scale at every pixel of a frame, by the centre of the pixel.

        Args:
            height, width (`int`): size of the frame in pixels, or rows and columns of any regular grid.
            device (`torch.device`, *optional*): device of the result.

        Returns:
            `torch.LongTensor` of shape `(scales, height, width)`: ids counted from the first patch of the frame.

        Example:

        ```python
        >>> from transformers_autogaze import GazeGrid

        >>> GazeGrid([16, 32], patch_size=16).patches_at(height=2, width=2).tolist()
        [[[0, 0], [0, 0]], [[1, 2], [3, 4]]]

        ```
        """
        scales, first = [], 0
        for rows, cols in self.grids:
            row = (2 * torch.arange(height, device=device) + 1) * rows // (2 * height)
            col = (2 * torch.arange(width, device=device) + 1) * cols // (2 * width)
            scales.append(first + row[:, None] * cols + col)
            first += rows * cols
        return torch.stack(scales)

    def boxes(self, ids: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """
        Returns the boxes of patches in a frame of any size.

        Args:
            ids (`torch.LongTensor` of any shape): patch ids counted from the first patch of their frame.
            height, width (`int`): size of the frame in pixels.

        Returns:
            `torch.FloatTensor` of shape `(*ids.shape, 4)`: left, top, right, bottom in pixels, inside the frame.

        Raises:
            ValueError: if the height or the width is below 1.
        """
        if height < 1 or width < 1:
            raise ValueError(f"`height` and `width` must be at least 1, got {height} and {width}")
        scale, row, col = self.locate(ids)
        rows, cols = torch.tensor(self.grids, device=ids.device)[scale].unbind(-1)

        def edge(place: torch.Tensor, size: int, count: torch.Tensor) -> torch.Tensor:
            # Integer division first, so that edges of neighbours are equal and the last one is that of the frame.
            pixels = place * size // count
            return pixels + (place * size - pixels * count) / count

        return torch.stack(
            [edge(col, width, cols), edge(row, height, rows), edge(col + 1, width, cols), edge(row + 1, height, rows)],
            dim=-1,
        )

    def cut_patches(self, frames: torch.Tensor, frame: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """
        Cuts patches out of frames, resized to each scale (docs/specification.md, section 10).

        Args:
            frames (`torch.FloatTensor` of shape `(frames, channels, height, width)`):
                Frames of any size and range of values.
            frame (`torch.LongTensor` of shape `(patches,)`): the frame that each patch is cut out of.
            ids (`torch.LongTensor` of shape `(patches,)`): patch ids counted from the first patch of their frame.

        Returns:
            `torch.FloatTensor` of shape `(patches, channels, patch_size, patch_size)`: resized bicubically without
            antialiasing.
        """
        scale, row, col = self.locate(ids)
        patches = frames.new_empty(len(ids), frames.shape[1], self.patch_size, self.patch_size)
        for index, (size, (rows, cols)) in enumerate(zip(self.sizes, self.grids, strict=True)):
            wanted = (scale == index).nonzero().squeeze(1)
            if not len(wanted):
                continue
            source, number = frames, frame[wanted]
            if tuple(frames.shape[-2:]) != size:
                used, number = number.unique(return_inverse=True)
                source = F.interpolate(frames[used], size=size, mode="bicubic", align_corners=False)
            windows = source.unflatten(3, (cols, self.patch_size)).unflatten(2, (rows, self.patch_size))
            patches[wanted] = windows[number, :, row[wanted], :, col[wanted]]
        return patches

    def for_encoder(self, image_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> "GazeGrid":
        """
        Matches this grid of a selector to an encoder (docs/specification.md, section 7).

        A grid of one scale becomes that of the encoder's patches. A grid of several scales becomes a whole number of tiles of
        this grid, at least one, that is closest to the encoder's patches; so patches of all scales overlap as in this grid.

        Args:
            image_size (`int` or `tuple[int, int]`): size in pixels of the encoder's images, square or `(height, width)`.
            patch_size (`int` or `tuple[int, int]`): size in pixels of its patches, which must be square.

        Returns:
            [`GazeGrid`] with the same number of scales, for `target_scales` and `target_patch_size` of `generate`.

        Raises:
            ValueError: if the patches are not square or the image is smaller than one.

        Example:

        ```python
        >>> from transformers_autogaze import GazeGrid

        >>> GazeGrid([32, 64, 112, 224], patch_size=16).for_encoder(image_size=384, patch_size=14)
        GazeGrid(scales=[56, 112, 196, 392], patch_size=14)
        >>> GazeGrid([224], patch_size=16).for_encoder(image_size=384, patch_size=14)
        GazeGrid(scales=[378], patch_size=14)

        ```
        """
        sides = [tuple(size) if isinstance(size, (tuple, list)) else (size, size) for size in (image_size, patch_size)]
        (height, width), (patch, other) = sides
        if patch != other:
            raise ValueError(f"`patch_size` must be that of square patches, got {patch_size!r}")
        if min(height, width) < patch:
            raise ValueError(f"`image_size` must be at least the patch size {patch}, got {image_size!r}")
        if len(self.sizes) == 1:
            return GazeGrid([(height // patch * patch, width // patch * patch)], patch)
        tiles = [
            max(1, int(side / patch / own + 0.5)) for side, own in zip((height, width), self.grids[-1], strict=True)
        ]
        return GazeGrid([(rows * tiles[0] * patch, cols * tiles[1] * patch) for rows, cols in self.grids], patch)

    def split_by_scale(self, per_patch: torch.Tensor) -> list[torch.Tensor]:
        """Splits the last dimension, with an entry per patch of a frame, into one tensor per scale."""
        return list(per_patch.split(self.num_patches_each_scale, dim=-1))

    def masks_from_ids(self, gazing_pos: torch.Tensor, is_real: torch.Tensor, num_frames: int) -> list[torch.Tensor]:
        """
        Converts ids to masks of the kept patches of every frame.

        Args:
            gazing_pos (`torch.LongTensor` of shape `(batch, N)`): ids counted from the first patch of the clip.
            is_real (`torch.BoolTensor` of shape `(batch, N)`): false where `gazing_pos` is padding.
            num_frames (`int`): number of frames of the clip.

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
        # Padding is written to an extra entry at the end, which is dropped.
        mask = torch.zeros(len(gazing_pos), total + 1, dtype=torch.bool, device=gazing_pos.device)
        mask.scatter_(1, torch.where(is_real, gazing_pos, total), True)
        return self.split_by_scale(mask[:, :-1].view(len(gazing_pos), num_frames, self.num_patches))

    def ids_from_masks(self, masks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Converts masks to ids, in ascending order in a frame; every frame is padded to its largest count in the batch.

        Args:
            masks (`Sequence[torch.BoolTensor]` of shape `(batch, num_frames, patches)`): one mask per scale.

        Returns:
            `tuple`: `gazing_pos` and `if_padded_gazing` of shape `(batch, N)`, `num_gazing_each_frame` of shape
            `(num_frames,)`. Padding of frame `t` is the id before the first of that frame, as in the published code
            (docs/specification.md, section 7).
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
        Computes the number of tiles that cover this grid.

        Args:
            tile (`GazeGrid`): the grid of a tile, with the same number of scales.

        Returns:
            `tuple[int, int]`: rows and columns of tiles; those at the right and bottom may extend beyond the frame.

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
            tile (`GazeGrid`): the grid of a tile, with the same number of scales.

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
        Joins the masks of tiles to masks of the whole frame; patches outside the frame are dropped.

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


PUBLISHED_GRID = GazeGrid([32, 64, 112, 224], patch_size=16)
"""The grid of the published AutoGaze model."""
