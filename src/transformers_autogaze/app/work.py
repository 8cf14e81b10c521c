"""Prunes a video for the page by [`prune_video`], with progress, and writes the files to download."""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch.overrides import TorchFunctionMode

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..hub.checkpoints import load_selector
from ..processing_autogaze import AutoGazeProcessor
from ..pruning.opened_video import OpenedVideo
from ..pruning.video_pruning import GAZE_FILE, OVERLAY, VideoPruning, prune_video
from ..selection_autogaze import GazeSelector
from ..video.tiles import FRAME_RATE
from ..video.writing import write_video
from .choices import OF_MLLM, OWN, Choices
from .limits import Limits
from .mllm_tokens import TokenCount, count_mllm_tokens


_CALLS_PER_REPORT = 16  # calls of torch functions between two reports, whose overhead is so negligible
Report = Callable[[str, int, int], None]
"""Called with the current stage, its finished steps and their total, 0 if unknown. An exception that it raises ends the work."""


class Result(NamedTuple):
    """
    The results of one selector for a video.

    Args:
        selector (`str`): name of the selector.
        statistics (`dict`): see [`VideoPruning.statistics`].
        times (`list[float]`): time stamp of each frame of the gaze in seconds, or the frame index if the video has no time stamps.
        cuts (`list[float]`): the same for the first frame of each new scene.
        tokens ([`TokenCount`], *optional*): tokens of the MLLM; `None` if they cannot be counted for this gaze.
        seconds, gazing_seconds (`float`): total time, and the time in the selector.
        overlay, gaze_file (`Path`): files to download.
    """

    selector: str
    statistics: dict[str, Any]
    times: list[float]
    cuts: list[float]
    tokens: TokenCount | None
    seconds: float
    gazing_seconds: float
    overlay: Path
    gaze_file: Path


class Selectors:
    """Loads selectors by name and caches them."""

    def __init__(self, device: Any = "cpu"):
        self.device = device
        self._loaded: dict[str, tuple[GazeSelector, AutoGazeProcessor]] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str) -> tuple[GazeSelector, AutoGazeProcessor]:
        """
        Returns a selector and its processor.

        Raises:
            ValueError: if the selector cannot be loaded.
        """
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = load_selector(name, argument="selector", device=self.device)
            return self._loaded[name]


class _ReportingVideo(OpenedVideo):
    """A video that reports every decoded frame."""

    report: Report | None = None

    def __iter__(self) -> Iterator[Any]:
        total = len(self)
        for number, frame in enumerate(super().__iter__(), 1):
            if self.report is not None:
                self.report("reading frames", number, total)
            yield frame


class _ReportingMode(TorchFunctionMode):
    """Calls `report` between calls of torch functions, so that long computations can be cancelled."""

    def __init__(self, report: Callable[[], None]):
        super().__init__()
        self.report, self.count = report, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count % _CALLS_PER_REPORT == 0:
            self.report()
        return function(*args, **(kwargs or {}))


class _ReportingSelector:
    """
    Wraps a selector: reports while it runs, and measures the time of every call.

    Patches can be chosen for several consecutive frames at a time, as Qwen's merge units need.
    """

    def __init__(
        self, selector: GazeSelector, report: Report, frames_of_token: int = 1, times: list[float] | None = None
    ):
        self.selector, self.report, self.frames_of_token = selector, report, frames_of_token
        self.times = [] if times is None else times  # seconds of every call
        self.config = copy.copy(selector.config)
        if frames_of_token > 1:
            self.config.frame_sampling_rate = frames_of_token

    def __getattr__(self, name: str) -> Any:
        return getattr(self.selector, name)

    def for_grid(self, grid: GazeGrid) -> "_ReportingSelector":
        return _ReportingSelector(self.selector.for_grid(grid), self.report, self.frames_of_token, self.times)

    def generate(self, video: Any, **options: Any) -> GazeOutput:
        start = time.perf_counter()
        if self.frames_of_token > 1:
            options["tubelet_size"] = self.frames_of_token
        with _ReportingMode(lambda: self.report("choosing patches", 0, 0)):
            gaze = self.selector.generate(video, **options)
        self.times.append(time.perf_counter() - start)
        return gaze


def prune_for_page(
    path: Path, name: str, choices: Choices, limits: Limits, selectors: Selectors, folder: Path, report: Report
) -> list[Result]:
    """
    Prunes a video with each of the chosen selectors.

    Args:
        path (`Path`): the video's file.
        name (`str`): name of the video in messages and in `gaze.json`.
        choices ([`Choices`]), limits ([`Limits`]): the settings and their limits.
        selectors ([`Selectors`]): loads the selectors.
        folder (`Path`): where to write; each selector gets a subfolder.
        report (`Callable[[str, int, int], None]`): see [`Report`].

    Returns:
        `list[Result]`: one for each selector.

    Raises:
        ValueError: if a setting or the video exceeds a limit, or the video cannot be read.
    """
    report("opening the video", 0, 0)
    count = choices.count_frames(limits.open(path, name).metadata.total_num_frames, limits)
    results = []
    for number, selector_name in enumerate(choices.selectors, 1):
        subfolder = folder / f"{number}-{selector_name}"
        subfolder.mkdir(parents=True)
        video = _ReportingVideo(str(path), num_frames=count)

        def report_with_name(stage: str, done: int = 0, total: int = 0, selector: str = selector_name) -> None:
            report(f"{selector}: {stage}", done, total)

        results.append(_prune(video, name, selector_name, choices, limits, selectors, subfolder, report_with_name))
    return results


def _prune(
    video: _ReportingVideo,
    name: str,
    selector_name: str,
    choices: Choices,
    limits: Limits,
    selectors: Selectors,
    folder: Path,
    report: Report,
) -> Result:
    report("loading the selector", 0, 0)
    start, (height, width) = time.perf_counter(), (video.metadata.height, video.metadata.width)
    selector, processor = _fit(selectors, selector_name, choices, height, width)
    tile_size = selector.config.grid.sizes[-1]
    limits.check_work(len(video), choices.count_pixels(tile_size, height, width))
    reporting = _ReportingSelector(selector, report, choices.frames_of_token)
    video.report = report
    pruning = prune_video(
        video,
        cast(GazeSelector, reporting),
        processor,
        **choices.layout(),
        **choices.settings(),
        title=name,
        selector_name=selector_name,
    )
    overlay, gaze_file = folder / OVERLAY, folder / GAZE_FILE
    # `frame_times` is set only if the frames are not evenly spaced.
    times = getattr(video.metadata, "frame_times", None)
    write_video(overlay, _draw_overlay(pruning, report), fps=video.frame_rate or FRAME_RATE, times=times)
    pruning.write_gaze_file(gaze_file)
    gaze, frame_times = pruning.gaze, pruning.frame_times or list(map(float, pruning.frame_indices))
    return Result(
        selector=selector_name,
        statistics=pruning.statistics,
        times=frame_times[:: gaze.frame_sampling_rate],
        cuts=[frame_times[frame] for frame in pruning.cuts],
        tokens=count_mllm_tokens(choices.mllm, gaze, height, width),
        seconds=time.perf_counter() - start,
        gazing_seconds=sum(reporting.times),
        overlay=overlay,
        gaze_file=gaze_file,
    )


def _draw_overlay(pruning: VideoPruning, report: Report) -> Iterator[Any]:
    total = len(pruning.video)
    for number, frame in enumerate(pruning.overlay(), 1):
        report("drawing", number, total)
        yield frame


def _fit(
    selectors: Selectors, name: str, choices: Choices, height: int, width: int
) -> tuple[GazeSelector, AutoGazeProcessor]:
    """Returns a selector for the chosen patches, and a processor that resizes frames to the size of their grid."""
    selector, processor = selectors(name)
    grid = choices.grid(height, width)
    if grid is None:
        return selector, processor
    if not selector.takes_any_grid:
        raise ValueError(f"{name} works only with '{OWN}' patches, got {choices.patches!r}.")
    if choices.patches == OF_MLLM:
        # Frames for an MLLM have another size than those for the selector's own patches.
        tall, wide = grid.sizes[-1]
        processor = copy.copy(processor)
        processor.video_processor = copy.copy(processor.video_processor)
        processor.video_processor.size = {"height": tall, "width": wide}
    return selector.for_grid(grid), processor
