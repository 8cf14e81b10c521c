"""
Pruning a video: what is kept of it, how good that is, and pictures and files that show it, in one object.

Everything that prunes whole videos (the command line, pages, jobs over many videos) calls [`prune_video`]. Frames pass through
in chunks, so a long video takes no more memory than a short one.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .gaze_files_autogaze import GazeFileWriter
from .gaze_pictures_autogaze import contact_sheet, name_scales, stack_pictures
from .gazing_autogaze import GazeOutput
from .kept_ids import KeptIds
from .opened_video import OpenedVideo
from .output_files import replacing_files
from .processing_autogaze import AutoGazeProcessor
from .scene_cuts import SceneCuts
from .selection_autogaze import GazeSelector
from .tile_gazing import FRAME_RATE, to_levels
from .video import write_video
from .video_gazing import GazeChunk, next_frames, stream_gaze
from .video_rebuilding import VideoRebuilder, chunk_pixels, psnr_of
from .visualization import PANELS, FrameView, OverlayDrawer, draw_panels, draw_timeline, side_by_side


FILES = OVERLAY, GAZE_FILE, SHEET = "overlay.mp4", "gaze.json", "contact_sheet.png"
"""What [`VideoPruning.save`] writes."""
_SHOWN = 8  # frames on the contact sheet


class KeptPatches(NamedTuple):
    """
    The kept patches of a frame, ready to train on.

    Args:
        pixels (`torch.ByteTensor` of shape `(N, 3, patch_size, patch_size)`):
            Levels 0..255 (RGB), cut out of the frame resized to the scale of each.
        ids (`torch.LongTensor` of shape `(N,)`): the number of each among the frame's patches, in the order of choice.
        frame (`int`): the frame, counted over those taken from the video.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    frame: int


def prune_video(
    source: Any,
    selector: GazeSelector,
    processor: AutoGazeProcessor | None = None,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    tiles: str = "whole",
    max_tiles: int | None = None,
    gazing_ratio: float | None = None,
    task_loss_requirement: float | None = None,
    clip_ratio: float | None = None,
    tokens_per_second: float | None = None,
    frame_rate: float | None = None,
    measures_quality: bool = True,
    title: str | None = None,
    selector_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "VideoPruning":
    """
    Prunes a video: chooses the patches to keep.

    The video is opened and everything is checked at once; frames are decoded and gazed at when something is asked of the
    result.

    Args:
        source:
            A video as [`read_video`] opens it; frames whose number is known, as [`stream_gaze`] takes them; or an
            [`OpenedVideo`].
        selector ([`GazeSelector`]): what chooses.
        processor ([`AutoGazeProcessor`], *optional*): what makes its pixel values; the published one by default.
        num_frames, fps (*optional*): which frames to take, evenly over the video; see [`stream_gaze`].
        tiles, max_tiles (*optional*): how frames are seen; see [`stream_gaze`].
        gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_second (`float`, *optional*):
            How much to keep; see [`stream_gaze`]. Without any of them, the share that the selector's configuration names, or,
            where it names none, a ratio of 0.75 and a threshold of 0.7 for every frame.
        frame_rate (`float`, *optional*): frames taken per second of the video; a file tells it itself.
        measures_quality (`bool`, *optional*, defaults to `True`):
            Whether to rebuild the frames from the kept patches, which `psnr` is measured by.
        title (`str`, *optional*): what to call the video in `gaze.json`; its path or URL by default.
        selector_name (`str`, *optional*): what to call the selector there; the checkpoint that it was loaded from by default.
        progress (`Callable[[int, int], None]`, *optional*):
            Is called with the frames done and those in all, whenever some are done. An error that it raises ends the work.

    Returns:
        [`VideoPruning`]

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is out of range, or the source is no video.

    Example:

    ```python
    >>> from transformers_autogaze import GreedyGazeSelector, prune_video

    >>> pruning = prune_video(np.zeros((20, 90, 160, 3), dtype=np.uint8), GreedyGazeSelector(), task_loss_requirement=0.7)
    >>> pruning.statistics["num_patches"], pruning.gaze.num_frames, len(list(pruning.overlay()))
    (23, 20, 20)

    ```
    """
    if isinstance(source, OpenedVideo) and (num_frames, fps) != (None, None):
        raise ValueError(
            f"`num_frames` and `fps` must be those of the OpenedVideo, got {num_frames} and {fps} beside one"
        )
    _check_parts(selector, processor, progress)
    asked = {
        "clip_ratio": clip_ratio,
        "tokens_per_second": tokens_per_second,
        "gazing_ratio": gazing_ratio,
        "task_loss_requirement": task_loss_requirement,
    }
    settings = {name: _finite(name, value) for name, value in asked.items() if value is not None}
    if not settings:
        share = getattr(selector.config, "clip_ratio", None)
        settings = {"gazing_ratio": 0.75, "task_loss_requirement": 0.7} if share is None else {"clip_ratio": share}
    if title is None and isinstance(source, (str, os.PathLike)):
        title = source
    video = source if isinstance(source, OpenedVideo) else OpenedVideo(source, num_frames, fps)
    return VideoPruning(
        video=video,
        selector=selector,
        processor=AutoGazeProcessor() if processor is None else processor,
        settings=settings,
        tiles=tiles,
        options={"max_tiles": max_tiles, "frame_rate": video.frame_rate if frame_rate is None else frame_rate},
        measures_quality=measures_quality,
        title=_name("title", title),
        selector_name=_name("selector_name", selector_name or getattr(selector, "name_or_path", None) or None),
        progress=progress,
    )


def _check_parts(selector: Any, processor: Any, progress: Any) -> None:
    """Checks what must be able to do something; classes that came with a checkpoint are not those of this package."""
    if isinstance(selector, type) or not callable(getattr(selector, "generate", None)):
        raise ValueError(
            f"`selector` must be a loaded selector, such as AutoModel.from_pretrained(DEFAULT_SELECTOR), got {selector!r}"
        )
    if processor is not None and not hasattr(processor, "video_processor"):
        raise ValueError(f"`processor` must be an AutoGazeProcessor, got {processor!r}")
    if progress is not None and not callable(progress):
        raise ValueError(f"`progress` must be a function of the frames done and those in all, got {progress!r}")


def _finite(name: str, value: Any) -> float:
    """Takes a number, of a tensor or an array as well, as it can be written to a file."""
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}")
    return float(number)


def _name(argument: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"`{argument}` must be text or a path, got {value!r}")
    return None if value is None else os.fspath(value)


class VideoPruning:
    """
    A video and what is kept of it; [`prune_video`] makes it.

    The first thing that is asked for decodes and gazes at the video. Later ones use the gaze as it is, and decode the video again
    only if they need its pixels. [`~VideoPruning.save`] does all in one pass.

    Attributes:
        video ([`OpenedVideo`]): the video, its metadata and the frames taken.
        selector ([`GazeSelector`]), processor ([`AutoGazeProcessor`]): what chooses, and makes its pixel values.
        settings (`dict[str, float]`): budgets and thresholds.
        tiles (`str`): how frames are seen.
        title, selector_name (`str`, *optional*): how the video and the selector are called.
    """

    def __init__(
        self,
        video: OpenedVideo,
        selector: GazeSelector,
        processor: AutoGazeProcessor,
        settings: dict[str, float],
        tiles: str,
        options: dict[str, Any],
        measures_quality: bool,
        title: str | None,
        selector_name: str | None,
        progress: Callable[[int, int], None] | None,
    ):
        self.video, self.selector, self.processor = video, selector, processor
        self.settings, self.tiles, self.title, self.selector_name = settings, tiles, title, selector_name
        self._options, self._measures_quality, self._progress = options, measures_quality, progress
        self._kept: KeptIds | None = None
        self._cuts: list[int] = []
        self._squared_errors: list[float] = []
        # Opened at once, so that what is wrong is said before anything is decoded.
        self._stream: Iterator[GazeChunk] | None = self._open()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"VideoPruning({self.title!r}, {len(self.video)} frames, {settings})"

    @property
    def frame_indices(self) -> list[int]:
        """The frames that were gazed at, as the video counts them."""
        return self.video.metadata.frames_indices[: self._finished().num_frames]

    @property
    def frame_times(self) -> list[float] | None:
        """When each of them is shown, in seconds from the start of the video; `None` if the video does not tell."""
        times = self.video.frame_times
        return None if times is None else times[: self._finished().num_frames]

    @property
    def gaze(self) -> GazeOutput:
        """The gaze of the whole video, a batch of one, in the order of choice; without padding and scores."""
        return GazeOutput.concatenate([gaze for _, _, gaze in self._finished()])

    @property
    def statistics(self) -> dict[str, Any]:
        """
        What was kept, in plain numbers: see [`~GazeOutput.statistics`]. With `psnr`, unless quality is not to be measured: that of
        the closed-form reconstruction from the kept patches, in dB.
        """
        statistics = self._finished().statistics()
        return statistics | ({"psnr": psnr_of(self._squared_errors)} if self._measures_quality else {})

    @property
    def psnr_each_frame(self) -> list[float]:
        """
        The quality of every frame, rebuilt from the kept patches, in dB.

        Raises:
            ValueError: if quality is not to be measured.
        """
        if not self._measures_quality:
            raise ValueError("`measures_quality` must be True for the quality of frames to be known, got False")
        self._finished()
        return [psnr_of([error]) for error in self._squared_errors]

    @property
    def cuts(self) -> list[int]:
        """The frames that begin a new scene, counted over the frames taken; see [`SceneCuts`]."""
        self._finished()
        return self._cuts

    def records(self) -> Iterator[dict[str, Any]]:
        """
        Gives every kept patch as plain numbers.

        Yields:
            `dict`: a record as [`~AutoGazeProcessor.post_process_gaze`] gives it, its `frame` counted over the frames taken and
            its `box` inside the video's frame.
        """
        kept, known = self._finished(), self.video.metadata
        for start, _, gaze in kept:
            for record in self.processor.post_process_gaze(gaze, kept.extent)[0]:
                left, top, right, bottom = record["box"]
                record["box"] = [left, top, min(right, known.width), min(bottom, known.height)]
                record["frame"] = record["frame"] * kept.frame_sampling_rate + start
                yield record

    def chunks(self) -> Iterator[GazeChunk]:
        """
        Goes through the video.

        Yields:
            [`GazeChunk`]: the frames of the next chunk with their gaze. What is not finished is begun anew the next time.
        """
        total, indices = len(self.video), self.video.metadata.frames_indices
        for chunk in self._gaze_at() if self._kept is None else self._look_again(self._kept):
            stop = chunk.stop
            yield chunk._replace(frame_indices=indices[chunk.start : stop])
            del chunk
            if self._progress is not None:
                self._progress(stop, total)

    def kept_patches(self) -> Iterator[KeptPatches]:
        """
        Cuts out the kept patches, to train on them.

        Yields:
            [`KeptPatches`]: those of the next frame of the gaze, none where nothing was kept.
        """
        for chunk, part, pixels, _ in self._rebuild():
            rate, grid = chunk.gaze.frame_sampling_rate, chunk.gaze.grid
            ids = chunk.gaze.ids_each_frame()
            for place in range(part.start, part.stop):
                if place % rate == 0:
                    own = ids[place // rate]
                    frame = pixels[:, place - part.start]
                    patches = grid.cut_patches(frame, torch.zeros_like(own), own).clamp(0, 1)
                    yield KeptPatches((patches * 255).round().byte().cpu(), own.cpu(), chunk.start + place)

    def overlay(self, timeline: bool = False) -> Iterator[np.ndarray]:
        """
        Draws the video beside its kept patches and what they show of it, with a legend and what was kept so far.

        Args:
            timeline (`bool`, *optional*, defaults to `False`):
                Whether to draw the patches of every frame over time and where scenes are cut, below. That is known only once
                the video has been gazed at, so it is decoded twice.

        Yields:
            `np.ndarray` of shape `(height, width, 3)` and type uint8: one for every frame taken.
        """
        return self._draw_overlay([], timeline)

    def contact_sheet(self, timeline: bool = False) -> Image.Image:
        """
        Draws some frames, evenly chosen, what was kept of them and what that shows.

        Args:
            timeline (`bool`, *optional*, defaults to `False`):
                Whether to draw the patches of every frame over time and where scenes are cut, below.

        Returns:
            `PIL.Image.Image`
        """
        return self._lay_out(list(self._draw(self._on_sheet())), timeline)

    def save(self, folder: str | os.PathLike, overlay: bool = True, timeline: bool = False) -> None:
        """
        Writes [`FILES`]: the gaze, the contact sheet and the overlay; all of them, or nothing.

        Args:
            folder (`str` or `os.PathLike`): where; made if it is missing. What it holds of an earlier run is replaced.
            overlay (`bool`, *optional*, defaults to `True`): whether to write the overlay, the slowest part.
            timeline (`bool`, *optional*, defaults to `False`): whether both pictures have a timeline.

        Raises:
            ValueError: if `folder` is a file.
        """
        with replacing_files(folder, FILES) as unfinished:
            shown: list[FrameView] = []
            if overlay:
                # Times of their own only where the frames come unevenly.
                times = getattr(self.video.metadata, "frame_times", None)
                rate = self._options["frame_rate"] or FRAME_RATE
                write_video(unfinished / OVERLAY, self._draw_overlay(shown, timeline), fps=rate, times=times)
            else:
                shown += self._draw(self._on_sheet())
            self.write_gaze_file(unfinished / GAZE_FILE)
            self._lay_out(shown, timeline).save(unfinished / SHEET)

    def write_gaze_file(self, path: str | os.PathLike) -> None:
        """
        Writes the gaze alone: `gaze.json`, as `docs/gaze_file.md` describes it.

        Args:
            path (`str` or `os.PathLike`): the file; one that is there is replaced.
        """
        kept, known = self._finished(), self.video.metadata
        with GazeFileWriter(known.frames_indices, self.video.frame_times) as writer:
            for record in self.records():
                writer.add([record])
            writer.write(
                path,
                grid=kept.grid,
                extent=kept.extent,
                frame_sampling_rate=kept.frame_sampling_rate,
                num_frames=kept.num_frames,
                video=self.title,
                selector=self.selector_name,
                tiles=self.tiles,
                settings=self.settings,
                fps=known.fps,
                width=known.width,
                height=known.height,
                duration=known.duration,
                statistics=self.statistics,
            )

    def _draw_overlay(self, shown: list[FrameView], timeline: bool) -> Iterator[np.ndarray]:
        """Draws the overlay, and fills `shown` with what is on the contact sheet."""
        on_sheet, length, drawer = self._on_sheet(), len(self.video), None
        known = self._finished() if timeline else None
        for view in self._draw(range(length)):
            if view.frame in on_sheet:
                shown.append(view)
            if drawer is None:
                width = side_by_side(view.panels).shape[1]
                strip = None if known is None else self._draw_timeline(width)
                drawer = OverlayDrawer(length if known is None else known.num_frames, strip)
            yield drawer.draw(view)

    def _draw_timeline(self, width: int) -> Image.Image:
        kept = self._finished()
        counts = kept.counts.repeat(kept.frame_sampling_rate, 0)
        rate = self._options["frame_rate"]
        return draw_timeline(counts, self.cuts, width, None if rate is None else len(counts) / rate)

    def _open(self) -> Iterator[GazeChunk]:
        options = {**self.settings, **self._options, "tiles": self.tiles}
        return stream_gaze(self.selector, self.video, self.processor.video_processor, **options)

    def _gaze_at(self) -> Iterator[GazeChunk]:
        stream, self._stream = self._stream or self._open(), None
        kept, cuts = None, SceneCuts()
        for chunk in stream:
            kept = kept or KeptIds(chunk)
            kept.add(chunk)
            cuts.add(chunk.levels)
            yield chunk
            # What the caller lets go must be gone before the next chunk is decoded.
            del chunk
        self._kept, self._cuts = kept, cuts.cuts

    def _look_again(self, kept: KeptIds) -> Iterator[GazeChunk]:
        """Decodes the video again, with the gaze that is known."""
        frames, size = iter(self.video), None
        device = getattr(self.selector, "device", "cpu")
        for start, stop, gaze in kept:
            pixels = next_frames(frames, stop - start, size, start)
            size = pixels.shape[1:3]
            levels = to_levels(pixels, self.processor.video_processor, self.tiles, kept.level_size, device)
            chunk = GazeChunk(gaze.to(device), start, stop, [], pixels, levels, kept.extent)
            del pixels, levels
            yield chunk
            del chunk

    def _draw(self, numbers: Collection[int]) -> Iterator[FrameView]:
        """Goes through the video and draws some of its frames."""
        times, tokens, processor = self.video.frame_times, 0, self.processor.video_processor
        for chunk, part, _, rebuilt in self._rebuild(is_shown=True):
            grid, rate = chunk.gaze.grid, chunk.gaze.frame_sampling_rate
            names, counts = name_scales(grid, *chunk.extent), chunk.gaze.num_real_each_frame[0].tolist()
            for place in range(part.start, part.stop):
                number, kept = chunk.start + place, counts[place // rate]
                tokens += kept if place % rate == 0 else 0
                if number in numbers:
                    yield FrameView(
                        frame=number,
                        index=chunk.frame_indices[place],
                        time=None if times is None else times[number],
                        kept=kept,
                        total=grid.num_patches,
                        tokens=tokens,
                        dense=(number // rate + 1) * grid.num_patches_each_scale[-1],
                        scales=names,
                        panels=draw_panels(chunk, place, rebuilt[place - part.start], processor),
                    )
            del chunk

    def _rebuild(self, is_shown: bool = False) -> Iterator[tuple[GazeChunk, slice, torch.Tensor, torch.Tensor | None]]:
        """
        Goes through the video and measures the quality.

        Yields a chunk, some of its frames, their pixels and what is rebuilt of them, `None` if nobody needs that.
        """
        processor = self.processor.video_processor
        rebuilder = VideoRebuilder(processor)
        for chunk in self.chunks():
            if is_shown or self._measures_quality:
                yield from ((chunk, *parts) for parts in rebuilder.rebuild(chunk))
            else:
                yield from ((chunk, *parts, None) for parts in chunk_pixels(chunk, processor))
            del chunk
        self._squared_errors = rebuilder.squared_errors

    def _finished(self) -> KeptIds:
        """Gives what was kept, once the whole video was gazed at."""
        if self._measures_quality and not self._squared_errors:
            for _ in self._rebuild():
                pass
        if self._kept is None:
            for _ in self.chunks():
                pass
        return self._kept

    def _on_sheet(self) -> set[int]:
        length = len(self.video)
        count = min(length, _SHOWN)
        return {index * (length - 1) // max(1, count - 1) for index in range(count)}

    def _lay_out(self, shown: list[FrameView], timeline: bool) -> Image.Image:
        panels = zip(*(view.panels for view in shown), strict=True)
        rows = [(name, np.stack(strip)) for name, strip in zip(PANELS, panels, strict=True)]
        sheet = contact_sheet(rows, shown[0].scales, captions=[view.caption for view in shown])
        return stack_pictures([sheet, self._draw_timeline(sheet.width)]) if timeline else sheet
