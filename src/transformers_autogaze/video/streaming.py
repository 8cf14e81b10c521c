"""
Gazing at videos of any size and length, chunk by chunk, in memory that does not grow with the length.

This module checks arguments, opens sources of frames and cuts the frames into chunks; `tiles` gazes at the chunks.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from ..frame_arrays_autogaze import is_video_source, unwrap_frames
from ..frame_decoding_autogaze import stream_video
from ..frame_sampling_autogaze import check_start_frame, sample_indices
from ..gazing_autogaze import GazeOutput
from ..selection_autogaze import GazeSelector
from ..token_budgets_autogaze import (
    budget_each_frame,
    check_budgets,
    check_rate,
    read_token_budget,
    threshold_each_frame,
)
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .tiles import FRAME_RATE, MAX_WHOLE_FRAMES, Setting, TileGazer


_CHUNK_FRAMES = 16  # for selectors without a maximum
_MAX_CLIP_PIXELS = 2**27  # of the original frames of a clip of a long video; a clip has 16 frames at least
_END = object()  # not `None`, which an iterable of frames may contain by mistake
_TILINGS = ("whole", "grid", "native")
_MAX_TILES = 48


class GazeChunk(NamedTuple):
    """
    The gaze of some consecutive frames of a video, and the frames.

    Args:
        gaze ([`GazeOutput`]):
            A batch of one over the whole frame; ids count from the first frame of the chunk.
        start, stop (`int`):
            Indices of the frames among those taken from the video, `stop` exclusive: `start_frame=stop` continues here.
        frame_indices (`list[int]`):
            Indices of the frames among all frames of the video.
        frames (`np.ndarray` of shape `(frames, height, width, 3)` and type uint8):
            The original frames (RGB).
        levels (`torch.ByteTensor` of shape `(frames, 3, tile rows * height, tile columns * width)`):
            The resized frames that were gazed at, levels 0..255, on the selector's device; with `tiles="native"` the
            original frames without the padding.
        extent (`tuple[int, int]`):
            Height and width of the gaze's grid in pixels of the original frame, for `gaze.boxes(*extent)`. It is the
            frame's size, except with `tiles="native"`, whose grid ends with the last tiles.
    """

    gaze: GazeOutput
    start: int
    stop: int
    frame_indices: list[int]
    frames: np.ndarray
    levels: torch.Tensor
    extent: tuple[int, int]


def gaze_video(
    selector: GazeSelector, source: Any, processor: AutoGazeVideoProcessor | None = None, **options: Any
) -> GazeOutput:
    """
    Gazes at a whole video of any size and length.

    It returns only the gaze; [`stream_gaze`] yields it chunk by chunk, with the frames.

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
    max_tiles: int | None = None,
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
    Gazes at a video of any size and length, chunk by chunk, as the chunks are iterated over.

    Memory depends on the size of a frame and the length of a chunk, not on the length of the video. Frames are uint8 until
    a batch of tiles is gazed at, on the selector's device.

    Args:
        selector ([`GazeSelector`]):
            The selector, such as [`AutoGazeModel`] or [`GreedyGazeSelector`]. If `config.max_num_frames` is a number,
            every chunk is a clip of its own; if it is `None`, the chunks are one stream.
        source:
            A video as [`read_video`] opens it: a path, a URL, bytes or a file object; a decoder of torchcodec or decord;
            frames and their metadata as `load_video` returns them; or frames: an array or tensor of
            shape `(frames, height, width, 3)` and type uint8, or any iterable of frames `(height, width, 3)`, which is
            read chunk by chunk.
        processor ([`AutoGazeVideoProcessor`], *optional*):
            Determines the resampling filter and the normalisation, and for whole frames the `size`; by default with the
            published settings.
        tiles (`str`, *optional*, defaults to `"whole"`):
            `"whole"` preprocesses every frame as the processor does; the selector then resizes it to a square, whatever
            its aspect ratio, as published. `"grid"` resizes it to a grid of at most `max_tiles` tiles of that size, with
            the nearest aspect ratio; see [`choose_tile_grid`]. `"native"` does not resize: the frame is padded at the right
            and bottom to whole tiles, and patches entirely outside the frame are dropped; budgets and thresholds are those of
            the padded tile. A selector that takes any grid and has a single scale needs no tiles: it chooses among all patches
            of the resized frame, or of the frame padded to whole patches, so budgets and thresholds are those of the frame.
        max_tiles (`int`, *optional*): maximum number of tiles of a frame, only for `"grid"`; 48 by default.
        chunk_frames (`int`, *optional*): frames of a chunk; by default `config.max_num_frames`, or 16.
        max_batch_size (`int`, *optional*, defaults to 16): tiles in a batch of the selector. It changes no result.
        num_frames, fps (*optional*): which frames to take, evenly over the video; see [`sample_indices`]. `fps` needs a
            file, `num_frames` a source whose length is known.
        start_frame (`int`, *optional*, defaults to 0):
            Number of the frames taken to skip, to continue at the `stop` of an earlier chunk. The chunks are those that would
            have followed, unless the selector streams: its stream then starts anew.
        gazing_ratio, task_loss_requirement (`float` or sequence of `float`, *optional*):
            As in [`~GazeSelector.generate`], for every tile. A sequence has one value for each frame of a chunk, and applies
            to every chunk from its start.
        clip_ratio (`float`, *optional*):
            Share of a dense encoder's tokens to keep of the video: those with the largest gains. A video of up to 64 frames,
            and 2**25 pixels in all, is searched as a whole and keeps exactly that many. For a selector of one
            scale and `tiles="whole"`, a longer one of known length is cut into clips of about equal length, of up to 64 frames
            (16 for 4K), each of which keeps its share. Any other video, and one with `chunk_frames`, is a stream with the same
            number of tokens per second, which keeps 0.92 to 1.02 times as many. For a selector of several scales, the budget
            applies to each tile separately.
        tokens_per_second (`float`, *optional*):
            Tokens to keep per second; every interval of ten seconds is within a tenth of that.
        frame_rate (`float`, *optional*):
            Frames taken per second of the video, for `tokens_per_second`; by default that of the file.
        progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

    Without any of these budgets and thresholds, those of the selector's configuration are used.

    Returns:
        `Iterator[GazeChunk]`. A gaze of more than one tile has its ids in ascending order, as tiles have no common order of
        choice, and no scores.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is out of range, the source is not a video, or frames are no such arrays or change their
            size. Everything but the frames is checked before this function returns.

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
    _check_parts(selector, processor)
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
    check_budgets(**settings)
    if frame_rate is not None:
        check_rate("frame_rate", frame_rate)
    processor = AutoGazeVideoProcessor() if processor is None else processor
    indices, frames, known_rate = open_source(source, num_frames, fps, start_frame)
    if tokens_per_second is not None and frame_rate is None and known_rate is None:
        raise ValueError(
            "`frame_rate` must be given with `tokens_per_second` where the source is not a video file, got None"
        )
    rate = frame_rate or known_rate or FRAME_RATE
    gazer = TileGazer(selector, processor, tiles, max_tiles or _MAX_TILES, max_batch_size, settings, rate)
    total = None if indices is None else len(indices) - start_frame
    # Only a selector without a maximum of frames can gaze at so many frames as one clip.
    can_choose_length = settings["clip_ratio"] is not None and config.max_num_frames is None and chunk_frames is None
    is_long = total is None or total > MAX_WHOLE_FRAMES
    if can_choose_length and not is_long:
        chunk_frames = max(total, config.frame_sampling_rate)
    chunk_frames = chunk_frames or config.max_num_frames or _CHUNK_FRAMES
    _check_settings(selector, settings, chunk_frames)
    start = int(start_frame)
    # Several scales would need many passes over every clip.
    are_clips = can_choose_length and total is not None and tiles == "whole" and len(config.grid.grids) == 1
    if is_long and are_clips and not np.ndim(task_loss_requirement):
        chunks = _clips_of(frames, total, start, config.frame_sampling_rate)
    else:
        chunks, are_clips = _chunks_of(frames, chunk_frames, start), total is not None and total <= chunk_frames
    return _gaze_chunks(gazer, chunks, are_clips, start, total, indices, progress)


def _gaze_chunks(
    gazer: TileGazer,
    chunks: Iterator[np.ndarray],
    are_clips: bool,
    start: int,
    total: int | None,
    indices: Sequence[int] | None,
    progress: bool,
) -> Iterator[GazeChunk]:
    """Gazes at chunks, `total` frames in all, from the frame `start` of those taken; `are_clips` as in `TileGazer.gaze`."""
    with tqdm(total=total, unit="frame", desc="gazing", disable=not progress) as bar:
        # With a GPU the next chunk is decoded in the meantime; on a CPU that would save no time.
        for pixels in _prefetch(chunks) if gazer.device.type == "cuda" else chunks:
            stop = start + len(pixels)
            frame_indices = list(range(start, stop)) if indices is None else list(indices[start:stop])
            gaze, levels, extent = gazer.gaze(pixels, are_clips)
            chunk = GazeChunk(gaze, start, stop, frame_indices, pixels, levels, extent)
            bar.update(stop - start)
            # Without these references the chunk can be freed before the next one is decoded.
            del pixels, levels, gaze
            yield chunk
            del chunk
            start = stop


def _check_parts(selector: Any, processor: Any) -> None:
    """Checks for methods instead of types, as the classes of remote code are not those of this package."""
    if not (hasattr(selector, "config") and hasattr(selector, "generate")):
        raise ValueError(f"`selector` must be a loaded selector such as GreedyGazeSelector(), got {selector!r}")
    if processor is not None and not hasattr(processor, "resize_levels"):
        remedy = "; give its `video_processor`" if hasattr(processor, "video_processor") else ""
        raise ValueError(f"`processor` must be an AutoGazeVideoProcessor, got {type(processor).__name__}{remedy}")


def _check_layout(
    selector: GazeSelector, tiles: str, max_tiles: int | None, chunk_frames: int | None, max_batch_size: int
) -> None:
    if tiles not in _TILINGS:
        raise ValueError(f"`tiles` must be one of {', '.join(map(repr, _TILINGS))}, got {tiles!r}")
    rate = selector.config.frame_sampling_rate
    for name, value in {
        "max_tiles": _MAX_TILES if max_tiles is None else max_tiles,
        "chunk_frames": rate if chunk_frames is None else chunk_frames,
        "max_batch_size": max_batch_size,
    }.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    if max_tiles is not None and tiles != "grid":
        raise ValueError(f'`max_tiles` needs `tiles="grid"`, got {max_tiles} with `tiles={tiles!r}`')
    if chunk_frames is not None and chunk_frames % rate:
        raise ValueError(f"`chunk_frames` must be a multiple of {rate}, the selector's rate, got {chunk_frames}")


def _check_settings(selector: GazeSelector, settings: dict[str, Any], chunk_frames: int) -> None:
    """Checks budgets and thresholds before the first chunk is decoded."""
    num_frames, grid = chunk_frames // selector.config.frame_sampling_rate, selector.config.grid
    for name in ("gazing_ratio", "task_loss_requirement"):
        if settings[name] is not None and np.ndim(settings[name]) and np.shape(settings[name]) != (num_frames,):
            raise ValueError(
                f"`{name}` must be one number or {num_frames} of them, one for each frame of a chunk (every chunk takes the "
                f"same numbers), got the shape {np.shape(settings[name])}"
            )
    budgets = {name: setting for name, setting in settings.items() if name != "task_loss_requirement"}
    rate = None if settings["tokens_per_second"] is None else FRAME_RATE
    selector.check_token_budget(read_token_budget(grid, num_frames, **budgets, frame_rate=rate))
    if settings["gazing_ratio"] is not None:
        budget_each_frame(settings["gazing_ratio"], num_frames, grid.num_patches)
    if settings["task_loss_requirement"] is not None:
        selector.check_task_loss_requirement(threshold_each_frame(settings["task_loss_requirement"], 1, num_frames))


def open_source(
    source: Any, num_frames: int | None = None, fps: float | None = None, start_frame: int = 0
) -> tuple[Sequence[int] | None, Iterator[Any], float | None]:
    """
    Opens a source of [`stream_gaze`].

    Args:
        source, num_frames, fps, start_frame: as in [`stream_gaze`].

    Returns:
        `tuple` of the indices of the frames to take, an iterator over these frames from `start_frame` on, and the number of
        frames taken per second. Indices and rate are `None` where the source does not have them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source is not a video, or does not have that many frames.
    """
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
    return range(len(source)) if hasattr(source, "__len__") else None, _skip(iter(source), start_frame), None


def _skip(frames: Iterator[Any], count: int) -> Iterator[Any]:
    """Yields frames after the first `count`."""
    for skipped in range(count):
        if next(frames, _END) is _END:
            check_start_frame(count, skipped)
    first = next(frames, _END)
    if first is _END:
        check_start_frame(count, count)
        raise ValueError("`source` must hold at least one frame, got none")
    yield first
    yield from frames


def _chunks_of(frames: Iterator[Any], count: int, start: int) -> Iterator[np.ndarray]:
    """Yields arrays of `count` frames, the last one of those left; `start` is the index of the first frame."""
    size = None
    while (chunk := next_frames(frames, count, size, start)) is not None:
        size, start = chunk.shape[1:3], start + len(chunk)
        yield chunk
        del chunk


def _clips_of(frames: Iterator[Any], total: int, start: int, multiple: int) -> Iterator[np.ndarray]:
    """Yields `total` frames as arrays of about equal length, a multiple of `multiple`; only the last may be shorter."""
    first: Any = next(frames, _END)
    if first is _END:
        return
    pixels = max(1, math.prod(np.shape(first)[:2]))
    most = max(_CHUNK_FRAMES, min(MAX_WHOLE_FRAMES, _MAX_CLIP_PIXELS // pixels))
    count = math.ceil(total / math.ceil(total / most) / multiple) * multiple
    yield from _chunks_of(itertools.chain([first], frames), count, start)


def _prefetch(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields chunks, and reads the next one in another thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = pool.submit(next, chunks, None)
            yield chunk
            del chunk


def next_frames(frames: Iterator[Any], count: int, size: tuple[int, int] | None, start: int) -> np.ndarray | None:
    """
    Takes the next frames into one array.

    Args:
        frames (`Iterator`): arrays, tensors or pictures, each of shape `(height, width, 3)` and type uint8.
        count (`int`): maximum number of frames to take.
        size (`tuple[int, int]`, *optional*): height and width that the frames must have; by default those of the first one.
        start (`int`): index of the first of them, for messages.

    Returns:
        `np.ndarray` of shape `(frames, height, width, 3)` and type uint8; `None` if there is no frame left.

    Raises:
        ValueError: if a frame has another shape or type.
    """
    chunk, taken = None, 0
    while taken < count and (frame := next(frames, _END)) is not _END:
        frame = frame.cpu().numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
        size = frame.shape[:2] if size is None else size
        if frame.dtype != np.uint8 or frame.shape != (*size, 3) or 0 in size:
            what = "as those before" if taken or start else "(height, width, 3)"
            raise ValueError(
                f"`source`: frame {start + taken} must be uint8 of shape {(*size, 3) if taken or start else what}, got "
                f"{frame.dtype} of shape {frame.shape}"
            )
        if chunk is None:
            # As in `read_video`, without the huge pages of numpy.
            chunk = torch.empty((count, *frame.shape), dtype=torch.uint8).numpy()
        chunk[taken] = frame
        taken += 1
    return None if chunk is None else chunk[:taken]
