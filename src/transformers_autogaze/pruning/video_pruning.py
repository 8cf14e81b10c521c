"""
Pruning of whole videos: the kept patches, the quality of the reconstruction from them, pictures and files, in one object.

Everything that prunes whole videos (the command line, the web page, jobs over many videos) calls [`prune_video`]. Frames are
processed in chunks, so a long video takes no more memory than a short one.
"""

import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..gaze_files_autogaze import GazeFileWriter
from ..gaze_pictures_autogaze import contact_sheet, name_scales, stack_pictures
from ..gazing_autogaze import GazeOutput
from ..processing_autogaze import AutoGazeProcessor
from ..selection_autogaze import GazeSelector
from ..token_budgets_autogaze import check_budgets, read_number
from ..utils.output_files import replacing_files
from ..video.streaming import GazeChunk, next_frames, stream_gaze
from ..video.tiles import FRAME_RATE, to_levels
from ..video.visualization import PANELS, FrameView, OverlayDrawer, draw_panels, draw_timeline, side_by_side
from ..video.writing import write_video
from .kept_ids import KeptIds
from .opened_video import OpenedVideo
from .rebuilding import VideoRebuilder, chunk_pixels, psnr_of
from .scene_cuts import SceneCuts


FILES = OVERLAY, GAZE_FILE, SHEET = "overlay.mp4", "gaze.json", "contact_sheet.png"
"""What [`VideoPruning.save`] writes."""
DEFAULT_SETTINGS = {"gazing_ratio": 0.75, "task_loss_requirement": 0.7}
"""Settings of [`prune_video`] where neither the caller nor the selector's configuration gives any."""
_SHEET_FRAMES = 8  # frames on the contact sheet, at most


class KeptPatches(NamedTuple):
    """
    The kept patches of one frame, as training data.

    Args:
        pixels (`torch.ByteTensor` of shape `(N, 3, patch_size, patch_size)`):
            Levels 0..255 (RGB); each patch is cut out of the frame resized to the patch's scale.
        ids (`torch.LongTensor` of shape `(N,)`): patch ids, counted from the first patch of the frame, in the order of choice.
        frame (`int`): index of the frame among those taken from the video.
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
    title: str | os.PathLike | None = None,
    selector_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "VideoPruning":
    """
    Prunes a video: chooses the patches to keep.

    This call opens the video and checks every argument. Frames are decoded, and patches chosen, when the result is first used.

    Args:
        source:
            A video as [`read_video`] opens it; frames whose number is known, as [`stream_gaze`] takes them; or an
            [`OpenedVideo`].
        selector ([`GazeSelector`]): chooses the patches.
        processor ([`AutoGazeProcessor`], *optional*): preprocesses the frames; by default one with the published settings.
        num_frames, fps (*optional*): which frames to take, evenly over the video; see [`stream_gaze`].
        tiles, max_tiles (*optional*): how frames are cut into tiles; see [`stream_gaze`].
        gazing_ratio, task_loss_requirement, clip_ratio, tokens_per_second (`float`, *optional*):
            How much to keep; see [`stream_gaze`]. Without any of them, the `clip_ratio` of the selector's configuration; where
            it has none, its `gazing_ratio` and `task_loss_requirement`; where it has none of these either,
            `DEFAULT_SETTINGS`.
        frame_rate (`float`, *optional*): frames taken per second of the video; by default that of the file.
        measures_quality (`bool`, *optional*, defaults to `True`):
            Whether to rebuild the frames from the kept patches and measure their PSNR.
        title (`str` or `os.PathLike`, *optional*): name of the video in `gaze.json`; its path or URL by default.
        selector_name (`str` or `os.PathLike`, *optional*):
            Name of the selector there; by default the checkpoint that it was loaded from.
        progress (`Callable[[int, int], None]`, *optional*):
            Called after each chunk with the numbers of finished and of all frames. An error that it raises is passed on.

    Returns:
        [`VideoPruning`]

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is out of range, or the source is not a video.

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
            "`num_frames` and `fps` must be those of the OpenedVideo: give them to OpenedVideo(..) instead, got "
            f"{num_frames} and {fps}"
        )
    _check_parts(selector, processor, progress)
    given = {
        "clip_ratio": clip_ratio,
        "tokens_per_second": tokens_per_second,
        "gazing_ratio": gazing_ratio,
        "task_loss_requirement": task_loss_requirement,
    }
    settings = {name: read_number(name, value) for name, value in given.items() if value is not None}
    check_budgets(**settings)
    if title is None and isinstance(source, (str, os.PathLike)):
        title = source
    video = source if isinstance(source, OpenedVideo) else OpenedVideo(source, num_frames, fps)
    return VideoPruning(
        video=video,
        selector=selector,
        processor=AutoGazeProcessor() if processor is None else processor,
        settings=settings or _default_settings(selector),
        tiles=tiles,
        options={"max_tiles": max_tiles, "frame_rate": video.frame_rate if frame_rate is None else frame_rate},
        measures_quality=measures_quality,
        title=_name("title", title),
        selector_name=_name("selector_name", selector_name or getattr(selector, "name_or_path", None) or None),
        progress=progress,
    )


def _check_parts(selector: Any, processor: Any, progress: Any) -> None:
    """Checks for methods instead of types, as the classes of remote code are not those of this package."""
    if isinstance(selector, type) or not callable(getattr(selector, "generate", None)):
        raise ValueError(
            f"`selector` must be a loaded selector, such as AutoModel.from_pretrained(DEFAULT_SELECTOR), got {selector!r}"
        )
    if processor is not None and not hasattr(processor, "video_processor"):
        raise ValueError(f"`processor` must be an AutoGazeProcessor, got {processor!r}")
    if progress is not None and not callable(progress):
        raise ValueError(f"`progress` must be a function of the frames done and those in all, got {progress!r}")


def _default_settings(selector: GazeSelector) -> dict[str, float]:
    """Returns the settings of the selector's configuration, or `DEFAULT_SETTINGS` where it has none."""
    share = getattr(selector.config, "clip_ratio", None)
    if share is not None:
        return {"clip_ratio": share}
    return {name: getattr(selector.config, name, value) for name, value in DEFAULT_SETTINGS.items()}


def _name(argument: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"`{argument}` must be text or a path, got {value!r}")
    return None if value is None else os.fspath(value)


class VideoPruning:
    """
    A video and its kept patches; [`prune_video`] makes it.

    The first property or method that is used decodes the video and chooses the patches. Later ones use these patches, and decode
    the video again only if they need its pixels. [`~VideoPruning.save`] does everything in one pass.

    Attributes:
        video ([`OpenedVideo`]): the video, its metadata and the frames taken.
        selector ([`GazeSelector`]), processor ([`AutoGazeProcessor`]): as given to [`prune_video`].
        settings (`dict[str, float]`): budgets and thresholds.
        tiles (`str`): how frames are cut into tiles; see [`stream_gaze`].
        title, selector_name (`str`, *optional*): names of the video and of the selector.
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
        # Opened at once, so that wrong arguments are reported before anything is decoded.
        self._stream: Iterator[GazeChunk] | None = self._open()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"VideoPruning({self.title!r}, {len(self.video)} frames, {settings})"

    @property
    def frame_indices(self) -> list[int]:
        """Indices of the frames taken, counted over all frames of the video."""
        return self.video.metadata.frames_indices[: self._finished().num_frames]

    @property
    def frame_times(self) -> list[float] | None:
        """Times of the frames taken, in seconds from the start of the video; `None` if the video has no times."""
        times = self.video.frame_times
        return None if times is None else times[: self._finished().num_frames]

    @property
    def gaze(self) -> GazeOutput:
        """The gaze of the whole video, a batch of one, in the order of choice; without padding and scores."""
        return GazeOutput.concatenate([gaze for _, _, gaze in self._finished()])

    @property
    def statistics(self) -> dict[str, Any]:
        """
        Numbers of kept patches, as [`~GazeOutput.statistics`] has them, and with `measures_quality` the `psnr` of the closed-form
        reconstruction from the kept patches, in dB.
        """
        statistics = self._finished().statistics()
        return statistics | ({"psnr": psnr_of(self._squared_errors)} if self._measures_quality else {})

    @property
    def psnr_each_frame(self) -> list[float]:
        """
        PSNR of every frame rebuilt from the kept patches, in dB.

        Raises:
            ValueError: if `measures_quality` is `False`.
        """
        if not self._measures_quality:
            raise ValueError("`measures_quality` must be True for `psnr_each_frame`, got False")
        self._finished()
        return [psnr_of([error]) for error in self._squared_errors]

    @property
    def cuts(self) -> list[int]:
        """Indices, among the frames taken, of those that begin a new scene; see [`SceneCuts`]."""
        self._finished()
        return self._cuts

    def records(self) -> Iterator[dict[str, Any]]:
        """
        Yields every kept patch as plain numbers.

        Yields:
            `dict`: a record as [`~AutoGazeProcessor.post_process_gaze`] gives it, its `frame` counted over the frames taken and
            its `box` inside the video's frame.
        """
        kept, metadata = self._finished(), self.video.metadata
        for start, _, gaze in kept:
            for record in self.processor.post_process_gaze(gaze, kept.extent)[0]:
                left, top, right, bottom = record["box"]
                record["box"] = [left, top, min(right, metadata.width), min(bottom, metadata.height)]
                record["frame"] = record["frame"] * kept.frame_sampling_rate + start
                yield record

    def chunks(self) -> Iterator[GazeChunk]:
        """
        Iterates over the video chunk by chunk.

        Yields:
            [`GazeChunk`]: the frames of the next chunk with their gaze. If an iteration is not finished, its gazes are
            discarded, and the next one starts from the first frame.
        """
        total, indices = len(self.video), self.video.metadata.frames_indices
        for chunk in self._choose_patches() if self._kept is None else self._decode_again(self._kept):
            stop = chunk.stop
            yield chunk._replace(frame_indices=indices[chunk.start : stop])
            del chunk
            if self._progress is not None:
                self._progress(stop, total)

    def kept_patches(self) -> Iterator[KeptPatches]:
        """
        Cuts the kept patches out of the frames, as training data.

        Yields:
            [`KeptPatches`]: the patches of the next frame of the gaze; empty where no patch was kept.
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
        Draws the video beside its kept patches and the reconstruction from them, with a legend and the tokens kept so far.

        Args:
            timeline (`bool`, *optional*, defaults to `False`):
                Whether to draw a timeline below: the number of patches of every frame, and scene cuts. It needs all kept patches
                beforehand, so the video is decoded twice.

        Yields:
            `np.ndarray` of shape `(height, width, 3)` and type uint8: one for every frame taken.
        """
        return self._draw_overlay([], timeline)

    def contact_sheet(self, timeline: bool = False) -> Image.Image:
        """
        Draws a few frames, evenly spaced, their kept patches and the reconstruction from these.

        Args:
            timeline (`bool`, *optional*, defaults to `False`): whether to draw a timeline below; see [`~VideoPruning.overlay`].

        Returns:
            `PIL.Image.Image`
        """
        return self._compose_sheet(list(self._draw(self._sheet_frames())), timeline)

    def save(self, folder: str | os.PathLike, overlay: bool = True, timeline: bool = False) -> None:
        """
        Writes [`FILES`]: the gaze, the contact sheet and the overlay; all of them, or nothing.

        Args:
            folder (`str` or `os.PathLike`): folder to write to; made if it is missing. Files of an earlier run are replaced.
            overlay (`bool`, *optional*, defaults to `True`): whether to write the overlay, the slowest part.
            timeline (`bool`, *optional*, defaults to `False`): whether both pictures have a timeline.

        Raises:
            ValueError: if `folder` is a file.
        """
        with replacing_files(folder, FILES) as unfinished:
            views: list[FrameView] = []
            if overlay:
                # The metadata have `frame_times` only where frames are unevenly spaced.
                times = getattr(self.video.metadata, "frame_times", None)
                rate = self._options["frame_rate"] or FRAME_RATE
                write_video(unfinished / OVERLAY, self._draw_overlay(views, timeline), fps=rate, times=times)
            else:
                views += self._draw(self._sheet_frames())
            self.write_gaze_file(unfinished / GAZE_FILE)
            self._compose_sheet(views, timeline).save(unfinished / SHEET)

    def write_gaze_file(self, path: str | os.PathLike) -> None:
        """
        Writes only the gaze: `gaze.json`, as `docs/gaze_file.md` describes it.

        Args:
            path (`str` or `os.PathLike`): the file; an existing one is replaced.
        """
        kept, metadata = self._finished(), self.video.metadata
        with GazeFileWriter(metadata.frames_indices, self.video.frame_times) as writer:
            writer.add(self.records())
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
                fps=metadata.fps,
                width=metadata.width,
                height=metadata.height,
                duration=metadata.duration,
                statistics=self.statistics,
            )

    def _draw_overlay(self, sheet_views: list[FrameView], timeline: bool) -> Iterator[np.ndarray]:
        """Draws the overlay, and adds the frames of the contact sheet to `sheet_views`."""
        on_sheet, length, drawer = self._sheet_frames(), len(self.video), None
        kept = self._finished() if timeline else None
        for view in self._draw(range(length)):
            if view.frame in on_sheet:
                sheet_views.append(view)
            if drawer is None:
                width = side_by_side(view.panels).shape[1]
                strip = None if kept is None else self._draw_timeline(width)
                drawer = OverlayDrawer(length if kept is None else kept.num_frames, strip)
            yield drawer.draw(view)

    def _draw_timeline(self, width: int) -> Image.Image:
        kept = self._finished()
        counts = kept.counts.repeat(kept.frame_sampling_rate, 0)
        rate = self._options["frame_rate"]
        return draw_timeline(counts, self.cuts, width, None if rate is None else len(counts) / rate)

    def _open(self) -> Iterator[GazeChunk]:
        options = {**self.settings, **self._options, "tiles": self.tiles}
        return stream_gaze(self.selector, self.video, self.processor.video_processor, **options)

    def _choose_patches(self) -> Iterator[GazeChunk]:
        """Decodes the video and chooses the patches, which are stored at the end."""
        stream, self._stream = self._stream or self._open(), None
        kept, cuts = None, SceneCuts()
        for chunk in stream:
            kept = kept or KeptIds(chunk)
            kept.add(chunk)
            cuts.add(chunk.levels)
            yield chunk
            # Without this reference the chunk can be freed before the next one is decoded.
            del chunk
        self._kept, self._cuts = kept, cuts.cuts

    def _decode_again(self, kept: KeptIds) -> Iterator[GazeChunk]:
        """Decodes the video again, with the patches that were chosen before."""
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

    def _draw(self, wanted: Collection[int]) -> Iterator[FrameView]:
        """Iterates over the video and draws the wanted frames."""
        times, tokens, processor = self.video.frame_times, 0, self.processor.video_processor
        for chunk, part, _, rebuilt in self._rebuild(always=True):
            grid, rate = chunk.gaze.grid, chunk.gaze.frame_sampling_rate
            names, counts = name_scales(grid, *chunk.extent), chunk.gaze.num_real_each_frame[0].tolist()
            for place in range(part.start, part.stop):
                number, kept = chunk.start + place, counts[place // rate]
                tokens += kept if place % rate == 0 else 0
                if number in wanted:
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

    def _rebuild(self, always: bool = False) -> Iterator[tuple[GazeChunk, slice, torch.Tensor, torch.Tensor | None]]:
        """
        Iterates over the video, rebuilds its frames and measures the errors.

        Yields a chunk, a slice of its frames, their pixels and the rebuilt pixels. Without `measures_quality` these are rebuilt
        only where `always` is true, and otherwise `None`.
        """
        processor = self.processor.video_processor
        rebuilder = VideoRebuilder(processor)
        for chunk in self.chunks():
            if always or self._measures_quality:
                yield from ((chunk, *parts) for parts in rebuilder.rebuild(chunk))
            else:
                yield from ((chunk, *parts, None) for parts in chunk_pixels(chunk, processor))
            del chunk
        self._squared_errors = rebuilder.squared_errors

    def _finished(self) -> KeptIds:
        """Returns the kept patches of the whole video; chooses them, and measures the quality, if not done before."""
        if self._measures_quality and not self._squared_errors:
            for _ in self._rebuild():
                pass
        if self._kept is None:
            for _ in self.chunks():
                pass
        return self._kept

    def _sheet_frames(self) -> set[int]:
        """Returns the frames of the contact sheet, evenly spaced."""
        length = len(self.video)
        count = min(length, _SHEET_FRAMES)
        return {index * (length - 1) // max(1, count - 1) for index in range(count)}

    def _compose_sheet(self, views: list[FrameView], timeline: bool) -> Image.Image:
        panels = zip(*(view.panels for view in views), strict=True)
        rows = [(name, np.stack(strip)) for name, strip in zip(PANELS, panels, strict=True)]
        sheet = contact_sheet(rows, views[0].scales, captions=[view.caption for view in views])
        return stack_pictures([sheet, self._draw_timeline(sheet.width)]) if timeline else sheet
