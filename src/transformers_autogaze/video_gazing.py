"""
Gazing at videos of any size and length, chunk by chunk, in memory that does not grow with the length.

This module decides how frames become tiles and tiles become whole-frame gazes, and carries a selector along a video. How
files are decoded, pixels resized and patches chosen it leaves to others; it draws and writes nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from .gazing_autogaze import GazeOutput
from .grid_autogaze import GazeGrid
from .selection_autogaze import GazeSelector, budget_each_frame, threshold_each_frame
from .token_budgets_autogaze import read_token_budget
from .video_decoding_autogaze import stream_video
from .video_frames_autogaze import is_video_source, unwrap_frames
from .video_processing_autogaze import AutoGazeVideoProcessor
from .video_sampling_autogaze import check_start_frame, sample_indices


Setting = float | Sequence[float] | None

_CHUNK = 16  # frames, where the selector itself has no limit
_WHOLE_CLIP = 64, 2**25  # frames, and pixels, of a video at most that is searched as a whole under a budget over time
_SEARCHED = 2**22  # pixels of the frames of a whole grid that are gazed at together, one frame at least
_FRAME_RATE = 30.0  # frames per second where nobody knows; it only sets how long a stretch of a stream is
_TILINGS = ("whole", "grid", "native")


class GazeChunk(NamedTuple):
    """
    The gaze of some consecutive frames of a video, and where they lie in it.

    Args:
        gaze ([`GazeOutput`]):
            A batch of one over the whole frame; ids count from the first frame of the chunk.
        start, stop (`int`):
            The frames taken from the video that these are, `stop` not included: `start_frame=stop` goes on after them.
        frame_indices (`list[int]`):
            The same frames as the video itself counts them.
        frames (`np.ndarray` of shape `(frames, height, width, 3)` and type uint8):
            The frames as they were filmed (RGB).
        levels (`torch.ByteTensor` of shape `(frames, 3, tile rows * height, tile columns * width)`):
            The frames as they were gazed at, levels 0..255, on the selector's device; with `tiles="native"` the frames
            themselves, without the padding.
        extent (`tuple[int, int]`):
            Height and width in the frame's own pixels that the gaze's grid spans, so `gaze.boxes(*extent)` lies right.
            It is the frame's size, but for `tiles="native"`, whose grid reaches to the ends of the last tiles.
    """

    gaze: GazeOutput
    start: int
    stop: int
    frame_indices: list[int]
    frames: np.ndarray
    levels: torch.Tensor
    extent: tuple[int, int]


def choose_tile_grid(height: int, width: int, max_tiles: int) -> tuple[int, int]:
    """
    Chooses how many rows and columns of square tiles to resize a frame to.

    Args:
        height, width (`int`): size of the frame in pixels.
        max_tiles (`int`): tiles at most, at least 1.

    Returns:
        `tuple[int, int]`: rows and columns whose aspect ratio is nearest to the frame's, the most tiles of equally near.

    Example:

    ```python
    >>> from transformers_autogaze.video_gazing import choose_tile_grid

    >>> choose_tile_grid(2160, 3840, max_tiles=45), choose_tile_grid(1080, 1920, max_tiles=12)
    ((5, 9), (2, 4))

    ```
    """

    def stretch(layout: tuple[int, int]) -> tuple[Fraction, int]:
        rows, cols = layout
        ratio = Fraction(cols * height, rows * width)
        return max(ratio, 1 / ratio), -rows * cols

    layouts = [(rows, cols) for rows in range(1, max_tiles + 1) for cols in range(1, max_tiles // rows + 1)]
    return min(layouts, key=stretch)


def gaze_video(
    selector: GazeSelector, source: Any, processor: AutoGazeVideoProcessor | None = None, **options: Any
) -> GazeOutput:
    """
    Gazes at a whole video of any size and length.

    Only the gaze is kept; [`stream_gaze`] gives it chunk by chunk, with the frames.

    Args:
        selector, source, processor: as in [`stream_gaze`].
        options: the other arguments of [`stream_gaze`].

    Returns:
        [`GazeOutput`], a batch of one over whole frames; ids count from the first frame taken.

    Raises:
        ValueError: as [`stream_gaze`].

    Example:

    ```python
    >>> from transformers_autogaze import GreedyGazeSelector, gaze_video

    >>> frames = np.zeros((20, 90, 160, 3), dtype=np.uint8)
    >>> gaze = gaze_video(GreedyGazeSelector(), frames, tiles="grid", max_tiles=2, task_loss_requirement=0.7)
    >>> gaze.num_frames, gaze.scales[-1]
    (20, (224, 448))

    ```
    """
    return GazeOutput.concatenate([chunk.gaze for chunk in stream_gaze(selector, source, processor, **options)])


def stream_gaze(
    selector: GazeSelector,
    source: Any,
    processor: AutoGazeVideoProcessor | None = None,
    tiles: str = "whole",
    max_tiles: int = 48,
    chunk_frames: int | None = None,
    max_batch_size: int = 16,
    num_frames: int | None = None,
    fps: float | None = None,
    start_frame: int = 0,
    gazing_ratio: Setting = None,
    task_loss_requirement: Setting = None,
    clip_ratio: float | None = None,
    tokens_per_second: float | None = None,
    frame_rate: float | None = None,
    progress: bool = False,
) -> Iterator[GazeChunk]:
    """
    Gazes at a video of any size and length, chunk by chunk as they are asked for.

    Memory depends on the size of a frame and the length of a chunk, not on the length of the video. Frames stay whole
    levels until a batch of tiles is gazed at, on the selector's device.

    Args:
        selector ([`GazeSelector`]):
            What chooses, such as [`AutoGazeModel`] or [`GreedyGazeSelector`]. Where `config.max_num_frames` names a
            length, every chunk is a clip of its own; where it is `None`, the chunks are one stream.
        source:
            A video as [`read_video`] opens it: a path, a URL, bytes or a file object; a decoder of torchcodec or decord;
            frames and their metadata as `load_video` returns them; or frames: an array or tensor of
            shape `(frames, height, width, 3)` and type uint8, or any iterable of frames `(height, width, 3)`, which is
            read no further than the chunk that is asked for.
        processor ([`AutoGazeVideoProcessor`], *optional*):
            Whose filter and normalisation to use, and for whole frames its `size`. The published one by default.
        tiles (`str`, *optional*, defaults to `"whole"`):
            `"whole"` preprocesses every frame as the processor does; the selector then makes a square of it, whatever
            its aspect ratio: the published way. `"grid"` resizes it to a
            grid of at most `max_tiles` tiles of that size, near to its aspect ratio; see [`choose_tile_grid`].
            `"native"` does not resize: the frame is padded at the right and bottom to whole tiles, and patches that lie
            outside it altogether are dropped; a budget or threshold is still that of the padded tile. A selector that
            takes any grid and has a single scale needs no tiles: it chooses among all patches of the resized frame, or
            of the frame padded to whole patches, so budgets and thresholds are those of the frame.
        max_tiles (`int`, *optional*, defaults to 48): tiles of a frame at most, for `"grid"`.
        chunk_frames (`int`, *optional*): frames of a chunk; `config.max_num_frames` by default, or 16.
        max_batch_size (`int`, *optional*, defaults to 16): tiles that are gazed at together. Changes no result.
        num_frames, fps (*optional*): which frames to take, evenly over the video; see [`sample_indices`]. `fps` needs a
            file, `num_frames` anything whose length is known.
        start_frame (`int`, *optional*, defaults to 0):
            How many of the frames taken to pass over, to go on where an earlier chunk had its `stop`. The chunks are
            those that would have followed, unless the selector streams: its stream then starts anew.
        gazing_ratio, task_loss_requirement (`float` or sequence of `float`, *optional*):
            As in [`~GazeSelector.generate`], for every tile; a sequence names one value per frame of a chunk, and every
            chunk takes it from its start.
        clip_ratio (`float`, *optional*):
            Share of a dense encoder's tokens to keep of the video, spent where they gain most. A video of up to 64 frames is
            searched as a whole and keeps exactly that many; a longer one, or one of unknown length, is a stream of so
            many tokens per second.
        tokens_per_second (`float`, *optional*):
            Tokens to keep per second; every stretch of ten seconds stays within a tenth of that.
        frame_rate (`float`, *optional*):
            Frames taken per second of the video, for `tokens_per_second`; a file tells it itself.
        progress (`bool`, *optional*, defaults to `False`): whether to show a bar.

    Without any of these budgets and thresholds, the selector's configuration decides.

    Returns:
        `Iterator[GazeChunk]`. A gaze of more than one tile has its ids in ascending order, for tiles have no common
        order of choice, and no scores.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is out of range, the source is no video, or frames are no such arrays or change their
            size. All but the frames is checked at once.

    Example:

    ```python
    >>> from transformers_autogaze import GreedyGazeSelector, stream_gaze

    >>> frames = np.zeros((40, 90, 160, 3), dtype=np.uint8)
    >>> for chunk in stream_gaze(GreedyGazeSelector(), frames, task_loss_requirement=0.7):
    ...     print(chunk.start, chunk.stop, chunk.gaze.num_real_each_frame[0, :3].tolist())
    0 16 [4, 1, 1]
    16 32 [1, 1, 1]
    32 40 [1, 1, 1]

    ```
    """
    config = selector.config
    _check_layout(selector, tiles, max_tiles, chunk_frames, max_batch_size)
    settings = {
        "gazing_ratio": gazing_ratio,
        "task_loss_requirement": task_loss_requirement,
        "clip_ratio": clip_ratio,
        "tokens_per_second": tokens_per_second,
    }
    if all(setting is None for setting in settings.values()):
        settings["clip_ratio"] = getattr(config, "clip_ratio", None)
    _check_settings(selector, settings, chunk_frames or config.max_num_frames or _CHUNK)
    processor = AutoGazeVideoProcessor() if processor is None else processor
    indices, frames, known_rate = _open_source(source, num_frames, fps, start_frame)
    if tokens_per_second is not None and frame_rate is None and known_rate is None:
        raise ValueError(
            "`frame_rate` must be given with `tokens_per_second` where the source is no video file, got None"
        )
    gazer = _TileGazer(selector, processor, tiles, max_tiles, max_batch_size, settings)
    gazer.frame_rate = frame_rate or known_rate or _FRAME_RATE
    total = None if indices is None else len(indices) - start_frame
    # Only a selector whose stream may be of any length can take a whole video for one clip.
    is_clip = settings["clip_ratio"] is not None and config.max_num_frames is None and chunk_frames is None
    if is_clip and total is not None and total <= _WHOLE_CLIP[0]:
        chunk_frames = max(total, config.frame_sampling_rate)
    chunk_frames = chunk_frames or config.max_num_frames or _CHUNK

    def chunks() -> Iterator[GazeChunk]:
        start = start_frame
        with tqdm(total=total, unit="frame", desc="gazing", disable=not progress) as bar:
            parts = _chunks_of(frames, chunk_frames, start)
            # A device and this machine work at the same time; a CPU has no time left over.
            for pixels in _ahead(parts) if gazer.device.type == "cuda" else parts:
                stop = start + len(pixels)
                numbers = list(range(start, stop)) if indices is None else list(indices[start:stop])
                gaze, levels, extent = gazer.gaze(pixels, is_whole=len(pixels) == total)
                chunk = GazeChunk(gaze, start, stop, numbers, pixels, levels, extent)
                bar.update(stop - start)
                # What the caller lets go must be gone before the next chunk is decoded.
                del pixels, levels, gaze
                yield chunk
                del chunk
                start = stop

    return chunks()


def _check_layout(
    selector: GazeSelector, tiles: str, max_tiles: int, chunk_frames: int | None, max_batch_size: int
) -> None:
    if tiles not in _TILINGS:
        raise ValueError(f"`tiles` must be one of {', '.join(map(repr, _TILINGS))}, got {tiles!r}")
    rate = selector.config.frame_sampling_rate
    for name, value in {
        "max_tiles": max_tiles,
        "chunk_frames": rate if chunk_frames is None else chunk_frames,
        "max_batch_size": max_batch_size,
    }.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    if chunk_frames is not None and chunk_frames % rate:
        raise ValueError(f"`chunk_frames` must be a multiple of {rate}, the selector's rate, got {chunk_frames}")


def _check_settings(selector: GazeSelector, settings: dict[str, Setting], chunk_frames: int) -> None:
    """Checks budgets and thresholds, or a bad number would show only when the first chunk has been decoded."""
    num_frames, grid = chunk_frames // selector.config.frame_sampling_rate, selector.config.grid
    for name in ("gazing_ratio", "task_loss_requirement"):
        if settings[name] is not None and np.ndim(settings[name]) and np.shape(settings[name]) != (num_frames,):
            raise ValueError(
                f"`{name}` must be one number or one for each of the {num_frames} frames of a chunk, got "
                f"the shape {np.shape(settings[name])}"
            )
    budgets = {name: setting for name, setting in settings.items() if name != "task_loss_requirement"}
    rate = None if settings["tokens_per_second"] is None else _FRAME_RATE
    selector.check_token_budget(read_token_budget(grid, num_frames, **budgets, frame_rate=rate))
    if settings["gazing_ratio"] is not None:
        budget_each_frame(settings["gazing_ratio"], num_frames, grid.num_patches)
    if settings["task_loss_requirement"] is not None:
        selector.check_task_loss_requirement(threshold_each_frame(settings["task_loss_requirement"], 1, num_frames))


class _TileGazer:
    """Gazes at chunks of frames of one size, tile by tile, and keeps what a streaming selector remembers of each."""

    def __init__(
        self,
        selector: GazeSelector,
        processor: AutoGazeVideoProcessor,
        tiles: str,
        max_tiles: int,
        max_batch_size: int,
        settings: dict[str, Setting],
    ):
        self.selector, self.processor, self.settings = selector, processor, settings
        self.tiles, self.max_tiles, self.max_batch_size = tiles, max_tiles, max_batch_size
        side = selector.config.image_size
        self.tile_size: tuple[int, int] = (side, side) if isinstance(side, int) else tuple(side)
        self.device = torch.device(getattr(selector, "device", "cpu"))
        self.dtype = torch.promote_types(getattr(selector, "dtype", torch.float32), torch.float32)
        self.streams = selector.config.max_num_frames is None
        self.needs_no_tiles = selector.takes_any_grid and len(selector.config.grid.grids) == 1 and tiles != "whole"
        self.frame_rate = _FRAME_RATE
        self.size: tuple[int, int] | None = None
        self.states: dict[int, object] = {}

    @torch.no_grad()
    def gaze(self, frames: np.ndarray, is_whole: bool) -> tuple[GazeOutput, torch.Tensor, tuple[int, int]]:
        """
        Gazes at frames `(frames, height, width, 3)`, whether or not they are the whole video.

        Gives the gaze, the levels gazed at and the grid's extent.
        """
        if self.size is None:
            self._plan(frames.shape[1:3])
        levels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self.device)
        if self.tiles == "whole":
            # As the pipeline does: the processor's own size first, the selector's square in `generate`.
            levels = self.processor.resize_levels(levels)
            self.tile_size = tuple(levels.shape[-2:])
        elif self.tiles == "grid":
            levels = self.processor.resize_levels(
                levels, (self.rows * self.tile_size[0], self.cols * self.tile_size[1])
            )
        settings, step = self._settings(levels, is_whole)
        if self.rows * self.cols == 1:
            steps = range(0, len(levels), step)
            gazes = [self._gaze_tiles(levels[first : first + step], range(1), settings, first) for first in steps]
            gaze = GazeOutput.concatenate(gazes)
            return self._drop_outside(gaze.replace(cache=None)), levels, self.extent
        return self._gaze_grid(levels, settings), levels, self.extent

    def _gaze_grid(self, levels: torch.Tensor, settings: dict[str, Setting]) -> GazeOutput:
        """Gazes at all tiles of frames and joins them."""
        own, count = self.selector.config.grid, self.rows * self.cols
        parts = [
            self._gaze_tiles(levels, range(first, min(first + self.max_batch_size, count)), settings)
            for first in range(0, count, self.max_batch_size)
        ]
        masks = [torch.cat(scale) for scale in zip(*(part.gazing_mask for part in parts), strict=True)]
        masks = self.grid.stitch_tiles(masks, own)
        if self.inside is not None:
            masks = [mask & inside for mask, inside in zip(masks, self.inside, strict=True)]
        threshold = parts[0].task_loss_requirement
        return GazeOutput.from_masks(
            masks,
            self.grid,
            self.selector.config.frame_sampling_rate,
            task_loss_requirement=None if threshold is None else threshold[:1],
            first_frame=parts[0].first_frame,
        )

    def _settings(self, levels: torch.Tensor, is_whole: bool) -> tuple[dict[str, Setting], int]:
        """Gives the settings for the next frames, and how many frames are gazed at together."""
        settings = dict(self.settings)
        pixels = levels[0, 0].numel()
        step = max(1, _SEARCHED // pixels) if self.needs_no_tiles else len(levels)
        if settings["clip_ratio"] is not None:
            if is_whole and len(levels) * pixels <= _WHOLE_CLIP[1]:
                step = len(levels)
            else:
                share = settings.pop("clip_ratio") * self.selector.config.grid.num_patches_each_scale[-1]
                settings["tokens_per_second"] = share * self.frame_rate
        if settings["tokens_per_second"] is not None:
            settings["frame_rate"] = self.frame_rate
        return settings, step

    def _plan(self, size: tuple[int, int]) -> None:
        """Lays out the tiles for frames of a height and width."""
        self.size, own = tuple(size), self.selector.config.grid
        self.rows = self.cols = 1
        self.extent, self.inside = self.size, None
        if self.tiles == "grid":
            tall, wide = self.tile_size
            self.rows, self.cols = choose_tile_grid(size[0] * wide, size[1] * tall, self.max_tiles)
        if self.needs_no_tiles:
            patch, wanted = own.patch_size, (self.rows * self.tile_size[0], self.cols * self.tile_size[1])
            if self.tiles == "native":
                wanted = self.extent = tuple(-(-side // patch) * patch for side in size)
            self.rows, self.cols, self.tile_size = 1, 1, wanted
            self.grid = GazeGrid([wanted], patch)
            self.selector = self.selector.for_grid(self.grid)
            return
        if self.tiles == "native":
            self.rows, self.cols = (-(-whole // tile) for whole, tile in zip(size, self.tile_size, strict=True))
            self.extent = self.rows * self.tile_size[0], self.cols * self.tile_size[1]
        scales = [(self.rows * height, self.cols * width) for height, width in own.sizes]
        self.grid = own if self.rows * self.cols == 1 else GazeGrid(scales, own.patch_size)
        if self.extent != self.size:
            boxes = self.grid.boxes(torch.arange(self.grid.num_patches, device=self.device), *self.extent)
            inside = (boxes[:, 0] < size[1]) & (boxes[:, 1] < size[0])
            self.inside = self.grid.split_by_scale(inside)

    def _gaze_tiles(
        self, levels: torch.Tensor, numbers: range, settings: dict[str, Setting], first_frame: int = 0
    ) -> GazeOutput:
        """Gazes at some tiles, counted row by row, of frames `(frames, 3, height, width)`, numbered in their chunk."""
        height, width = self.tile_size
        # Padding is zeros among normalised values, as that of `GazeGrid.cut_tiles`.
        video = torch.zeros(len(numbers), len(levels), 3, height, width, dtype=self.dtype, device=self.device)
        for tile, number in zip(video, numbers, strict=True):
            top, left = number // self.cols * height, number % self.cols * width
            part = levels[..., top : top + height, left : left + width]
            tile[..., : part.shape[-2], : part.shape[-1]] = self.processor.to_pixel_values(part)
        start, count = (frames // self.selector.config.frame_sampling_rate for frames in (first_frame, len(levels)))
        settings = {
            name: setting if setting is None or not np.ndim(setting) else setting[start : start + count]
            for name, setting in settings.items()
        }
        if not self.streams:
            return self.selector.generate(video, **settings)
        state = self.states.get(numbers.start)
        gaze = self.selector.generate(video, **settings, past_key_values=state, use_cache=True)
        self.states[numbers.start] = gaze.cache
        return gaze

    def _drop_outside(self, gaze: GazeOutput) -> GazeOutput:
        """Turns kept patches of a single tile that lie outside the frame into padding; the order stays."""
        if self.inside is None:
            return gaze
        first = gaze.frame_of_slot * self.grid.num_patches
        local = (gaze.gazing_pos - first).masked_fill(gaze.if_padded_gazing, 0)
        is_padding = gaze.if_padded_gazing | ~torch.cat(self.inside)[local]
        return gaze.replace(
            # The id after the last patch stands for none.
            gazing_pos=torch.where(
                is_padding & ~gaze.if_padded_gazing, first + self.grid.num_patches, gaze.gazing_pos
            ),
            if_padded_gazing=is_padding,
            gazing_mask=[mask & inside for mask, inside in zip(gaze.gazing_mask, self.inside, strict=True)],
        )


def _open_source(
    source: Any, num_frames: int | None, fps: float | None, start_frame: int
) -> tuple[Sequence[int] | None, Iterator[Any], float | None]:
    """Gives the numbers of the frames to take, those to gaze at, and how many come per second; `None` if nobody knows."""
    if is_video_source(source):
        metadata, frames = stream_video(source, num_frames, fps, start_frame)
        indices = metadata.frames_indices
        rate = None if not metadata.fps else metadata.fps * len(indices) / max(1, metadata.total_num_frames)
        return indices, frames, rate
    source, rate = unwrap_frames(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        if source.ndim != 4 or source.shape[-1] != 3:
            raise ValueError(f"`source` must have the shape (frames, height, width, 3), got {tuple(source.shape)}")
    elif not isinstance(source, Iterable):
        raise ValueError(
            "`source` must be a path, an http(s) URL, bytes, a binary file object, an array or tensor of shape (frames, "
            f"height, width, 3) or an iterable of frames, got {type(source)}"
        )
    if fps is not None and rate is None:
        raise ValueError(
            f"`fps` needs a video file, which tells its own rate, got {fps} with frames; give `num_frames`"
        )
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        if len(source) == 0:
            raise ValueError("`source` must hold at least one frame, got none")
        indices = sample_indices(len(source), rate, num_frames, fps)
        check_start_frame(start_frame, len(indices))
        rate = None if rate is None else rate * len(indices) / len(source)
        return indices, (source[index] for index in indices[start_frame:]), rate
    if num_frames is not None:
        raise ValueError(
            f"`num_frames` needs a source whose length is known, got {num_frames} with {type(source).__name__}"
        )
    check_start_frame(start_frame)
    indices = range(len(source)) if hasattr(source, "__len__") else None
    return indices, _skip(iter(source), start_frame), None


def _skip(frames: Iterator[Any], count: int) -> Iterator[Any]:
    for passed in range(count):
        if next(frames, None) is None:
            check_start_frame(count, passed)
    first = next(frames, None)
    if first is None:
        check_start_frame(count, count)
        raise ValueError("`source` must hold at least one frame, got none")
    yield first
    yield from frames


def _chunks_of(frames: Iterator[Any], count: int, start: int) -> Iterator[np.ndarray]:
    """Joins every `count` frames, and those left, into one array; `start` is the number of the first."""
    size = None
    while (chunk := _next_frames(frames, count, size, start)) is not None:
        size, start = chunk.shape[1:3], start + len(chunk)
        yield chunk
        del chunk


def _ahead(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Takes the next part in a thread of its own while the last one is worked on."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, parts, None)
        while (part := following.result()) is not None:
            following = pool.submit(next, parts, None)
            yield part
            del part


def _next_frames(frames: Iterator[Any], count: int, size: tuple[int, int] | None, start: int) -> np.ndarray | None:
    """Takes the next `count` frames, or those left, into one array; `None` if there is none."""
    chunk, taken = None, 0
    while taken < count and (frame := next(frames, None)) is not None:
        frame = frame.cpu().numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
        size = frame.shape[:2] if size is None else size
        if frame.dtype != np.uint8 or frame.shape != (*size, 3) or 0 in size:
            what = "as those before" if taken or start else "(height, width, 3)"
            raise ValueError(
                f"`source`: frame {start + taken} must be uint8 of shape {(*size, 3) if taken or start else what}, got "
                f"{frame.dtype} of shape {frame.shape}"
            )
        if chunk is None:
            chunk = np.empty((count, *frame.shape), np.uint8)
        chunk[taken] = frame
        taken += 1
    return None if chunk is None else chunk[:taken]
