"""The work behind the page: a video and choices in, files and figures out, by [`prune_video`]."""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch.overrides import TorchFunctionMode

from ..checkpoints import load_selector
from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..opened_video import OpenedVideo
from ..processing_autogaze import AutoGazeProcessor
from ..pruning import GAZE_FILE, OVERLAY, VideoPruning, prune_video
from ..selection_autogaze import GazeSelector
from ..tile_gazing import FRAME_RATE
from ..video import write_video
from .choices import OF_MLLM, Choices
from .limits import Limits
from .mllm_tokens import TokenCount, count_mllm_tokens


_REPORTED_EACH = 16  # calls of torch; more often would cost small ones time
Report = Callable[[str, int, int], None]
"""Is told what is done now, how much of it, and of how much; an error that it raises ends the work."""


class Result(NamedTuple):
    """
    What one selector kept of a video.

    Args:
        selector (`str`): its name.
        statistics (`dict`): see [`VideoPruning.statistics`].
        times (`list[float]`): when each frame of the gaze is shown, in seconds, or their numbers.
        cuts (`list[float]`): when a new scene begins, in the same way.
        tokens ([`TokenCount`], *optional*): what the MLLM reads; `None` if the gaze is not for it.
        seconds, gazing_seconds (`float`): time in all, and of choosing alone.
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
    """Selectors, each loaded when it is first asked for."""

    def __init__(self, device: Any = "cpu"):
        self.device = device
        self._loaded: dict[str, tuple[GazeSelector, AutoGazeProcessor]] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str) -> tuple[GazeSelector, AutoGazeProcessor]:
        """
        Gives a selector and its processor.

        Raises:
            ValueError: if it cannot be loaded.
        """
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = load_selector(name, argument="selector", device=self.device)
            return self._loaded[name]


class _WatchedVideo(OpenedVideo):
    """A video that reports every frame that is decoded."""

    report: Report | None = None

    def __iter__(self) -> Iterator[Any]:
        total = len(self)
        for number, frame in enumerate(super().__iter__(), 1):
            if self.report is not None:
                self.report("reading frames", number, total)
            yield frame


class _Reporting(TorchFunctionMode):
    """Reports while torch computes, whatever it does, so that long computations can be cancelled."""

    def __init__(self, report: Callable[[], None]):
        super().__init__()
        self.report, self.count = report, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count % _REPORTED_EACH == 0:
            self.report()
        return function(*args, **(kwargs or {}))


class _WatchedSelector:
    """
    A selector that reports while it chooses, and measures how long it takes.

    It can choose for several frames at once, as Qwen's merge units need.
    """

    def __init__(
        self, selector: GazeSelector, report: Report, frames_of_token: int = 1, times: list[float] | None = None
    ):
        self.selector, self.report, self.frames_of_token = selector, report, frames_of_token
        self.times = [] if times is None else times  # in seconds, of every call
        self.config = copy.copy(selector.config)
        if frames_of_token > 1:
            self.config.frame_sampling_rate = frames_of_token

    def __getattr__(self, name: str) -> Any:
        return getattr(self.selector, name)

    def for_grid(self, grid: GazeGrid) -> "_WatchedSelector":
        return _WatchedSelector(self.selector.for_grid(grid), self.report, self.frames_of_token, self.times)

    def generate(self, video: Any, **options: Any) -> GazeOutput:
        start = time.perf_counter()
        if self.frames_of_token > 1:
            options["tubelet_size"] = self.frames_of_token
        with _Reporting(lambda: self.report("choosing patches", 0, 0)):
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
        name (`str`): what to call it.
        choices ([`Choices`]), limits ([`Limits`]): what is asked for, and what may be.
        selectors ([`Selectors`]): where they come from.
        folder (`Path`): where to write; a folder for each selector is made in it.
        report (`Callable[[str, int, int], None]`): see [`Report`].

    Returns:
        `list[Result]`: one for each selector.

    Raises:
        ValueError: if something is out of range, or the video cannot be read.
    """
    report("opening the video", 0, 0)
    known = limits.open(path, name).metadata
    count = choices.count_frames(known.total_num_frames, limits)
    results = []
    for number, selector_name in enumerate(choices.selectors, 1):
        place = folder / f"{number}-{selector_name}"
        place.mkdir(parents=True)
        video = _WatchedVideo(str(path), num_frames=count)

        def reported(stage: str, done: int = 0, total: int = 0, name: str = selector_name) -> None:
            report(f"{name}: {stage}", done, total)

        results.append(_prune(video, name, selector_name, choices, limits, selectors, place, reported))
    return results


def _prune(
    video: _WatchedVideo,
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
    watched = _WatchedSelector(selector, report, choices.frames_of_token)
    video.report = report
    pruning = prune_video(
        video,
        watched,
        processor,
        **choices.layout(),
        **choices.settings(),
        title=name,
        selector_name=selector_name,
    )
    overlay, gaze_file = folder / OVERLAY, folder / GAZE_FILE
    # Times of their own only where the frames come unevenly.
    times = getattr(video.metadata, "frame_times", None)
    write_video(overlay, _drawing(pruning, report), fps=video.frame_rate or FRAME_RATE, times=times)
    pruning.write_gaze_file(gaze_file)
    gaze, shown_at = pruning.gaze, pruning.frame_times or list(map(float, pruning.frame_indices))
    return Result(
        selector=selector_name,
        statistics=pruning.statistics,
        times=shown_at[:: gaze.frame_sampling_rate],
        cuts=[shown_at[frame] for frame in pruning.cuts],
        tokens=count_mllm_tokens(choices.mllm, gaze, height, width),
        seconds=time.perf_counter() - start,
        gazing_seconds=sum(watched.times),
        overlay=overlay,
        gaze_file=gaze_file,
    )


def _drawing(pruning: VideoPruning, report: Report) -> Iterator[Any]:
    total = len(pruning.video)
    for number, frame in enumerate(pruning.overlay(), 1):
        report("drawing", number, total)
        yield frame


def _fit(
    selectors: Selectors, name: str, choices: Choices, height: int, width: int
) -> tuple[GazeSelector, AutoGazeProcessor]:
    """Gives a selector for the chosen patches, and a processor that resizes frames to what it looks at."""
    selector, processor = selectors(name)
    grid = choices.grid(height, width)
    if grid is None:
        return selector, processor
    if not selector.takes_any_grid:
        raise ValueError(f"{name} has patches of its own: choose these for it.")
    if choices.patches == OF_MLLM:
        # The frames that an MLLM gets are of another size than the selector's own.
        tall, wide = grid.sizes[-1]
        processor = copy.copy(processor)
        processor.video_processor = copy.copy(processor.video_processor)
        processor.video_processor.size = {"height": tall, "width": wide}
    return selector.for_grid(grid), processor
