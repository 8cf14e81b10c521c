"""Sampling of video frames, by number or by time stamps."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
from transformers.video_utils import VideoMetadata


_ROUNDING = 1e-3  # seconds; many containers keep no finer time stamps


def sample_indices(
    total_num_frames: int,
    video_fps: float | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
) -> list[int]:
    """
    Samples frames evenly, as the video processors of transformers do.

    Frame `i` of `n` is `floor(i * total_num_frames / n)`; with `fps`, `n = max(1, floor(seconds * fps))`.

    Args:
        total_num_frames (`int`): number of frames of the video, at least 1.
        video_fps (`float`, *optional*): frames per second of the video; needed with `fps`.
        num_frames (`int`, *optional*): number of frames to sample. Excludes `fps`.
        fps (`float`, *optional*):
            Number of frames to sample per second, at most the video's own rate (plus one percent, so that 30 is allowed for
            29.97). Excludes `num_frames`. With neither, all frames are sampled.

    Returns:
        `list[int]`: different indices in ascending order.

    Raises:
        ValueError: if both are given, or if there are not enough frames.

    Example:

    ```python
    >>> from transformers_autogaze.frame_sampling_autogaze import sample_indices

    >>> sample_indices(64, num_frames=4)
    [0, 16, 32, 48]
    >>> sample_indices(64, video_fps=30, fps=2)
    [0, 16, 32, 48]

    ```
    """
    check_sampling(num_frames, fps)
    if total_num_frames < 1:
        raise ValueError("the video must have at least one frame, got none")
    if fps is not None:
        if not video_fps:
            raise ValueError(
                f"`fps` is {fps}, but how many frames per second the video itself has is unknown; give `num_frames`, "
                "or `video_metadata` with `fps` if the video is an array"
            )
        if fps > 1.01 * video_fps:
            raise ValueError(f"`fps` must be at most {video_fps:g}, the video's own frames per second, got {fps}")
        # The small term compensates for rounding errors just below a whole number.
        num_frames = min(max(1, int(total_num_frames / video_fps * fps + 1e-6)), total_num_frames)
    if num_frames is None:
        return list(range(total_num_frames))
    # Indices must be Python integers, whatever integer type is given.
    total_num_frames, num_frames = int(total_num_frames), int(num_frames)
    if num_frames > total_num_frames:
        raise ValueError(f"`num_frames` must be at most {total_num_frames}, the video's frames, got {num_frames}")
    return [index * total_num_frames // num_frames for index in range(num_frames)]


def check_start_frame(start_frame: int, count: int | None = None):
    """Checks that a stream of `count` frames (`None` if unknown) can start at `start_frame`."""
    if isinstance(start_frame, bool) or not isinstance(start_frame, Integral) or start_frame < 0:
        raise ValueError(f"`start_frame` must be a whole number of at least 0, got {start_frame!r}")
    if start_frame and count is not None and start_frame >= count:
        raise ValueError(f"`start_frame` must be below {count}, the number of frames taken, got {start_frame}")


def check_sampling(num_frames: int | None, fps: float | None):
    """Checks that at most one of the arguments is given, and its range."""
    if num_frames is not None and fps is not None:
        raise ValueError(f"give one of `num_frames` and `fps`, not both; got {num_frames} and {fps}")
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, Integral) or num_frames < 1
    ):
        raise ValueError(f"`num_frames` must be a whole number of at least 1, got {num_frames!r}")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps < float("inf")):
        raise ValueError(f"`fps` must be above 0 frames per second, got {fps!r}")


@dataclass
class TimedVideoMetadata(VideoMetadata):
    """
    Metadata of a video with uneven frame times; its `fps` is the mean rate.

    Args:
        frame_times (`list[float]`, *optional*): times in seconds of the sampled frames, from the first frame of the video.
    """

    frame_times: list[float] | None = None

    @property
    def timestamps(self) -> list[float]:
        """Times in seconds of the sampled frames, from the first frame of the video."""
        return list(self.frame_times or [])


class Timeline(NamedTuple):
    """
    Display times of the frames of a video.

    Args:
        num_frames (`int`): number of frames.
        fps (`float`, *optional*): frames per second, the mean rate if times are uneven; `None` if unknown.
        times (`np.ndarray` of shape `(num_frames,)`, *optional*):
            Times in seconds from the first frame, if they are uneven.
        duration (`float`, *optional*): duration in seconds, including that of the last frame.
    """

    num_frames: int
    fps: float | None = None
    times: np.ndarray | None = None
    duration: float | None = None

    def choose(self, num_frames: int | None, fps: float | None) -> list[int]:
        """
        Samples frames like [`sample_indices`].

        With uneven times, `fps` takes the frames displayed at each `i / fps` seconds, as many as FFmpeg (`seconds * fps`,
        rounded), and a frame that is displayed at several of them once.
        """
        check_sampling(num_frames, fps)
        if self.times is None or fps is None:
            return sample_indices(self.num_frames, self.fps, num_frames, fps)
        moments = np.arange(max(1, int(self.duration * fps + 0.5))) / fps
        return np.unique(np.searchsorted(self.times, moments + _ROUNDING, side="right") - 1).tolist()

    def metadata(self, frame: np.ndarray, indices: list[int]) -> VideoMetadata:
        """Returns the metadata of the video, given one of its frames and the sampled indices."""
        fields = {
            "total_num_frames": self.num_frames,
            "fps": self.fps,
            "width": frame.shape[1],
            "height": frame.shape[0],
            "duration": self.duration,
            "video_backend": "pyav",
            "frames_indices": indices,
        }
        if self.times is None:
            return VideoMetadata(**fields)
        return TimedVideoMetadata(**fields, frame_times=self.times[indices].tolist())


def measure_timeline(
    stamps: Sequence[int | None], tick: Fraction | None, rates: Sequence[Fraction | None], last: int | None = None
) -> Timeline:
    """
    Computes the display times of frames from their time stamps.

    Args:
        stamps (`Sequence[int | None]`): time stamp of each frame, in any order; `None` where there is none.
        tick (`Fraction`, *optional*): unit of the time stamps in seconds.
        rates (`Sequence[Fraction | None]`): frame rates in the header, the most reliable first.
        last (`int`, *optional*): duration of the last frame, in the same unit.

    Returns:
        [`Timeline`]: with the first rate of the header, or else the mean rate of the time stamps, from which no frame deviates
        by more than half a frame; if there is none, with the time of each frame.
    """
    count, rates = len(stamps), [rate for rate in rates if rate]
    has_times = count > 1 and tick is not None and None not in stamps
    ordered = np.sort(np.asarray(stamps, dtype=np.int64)) if has_times else np.zeros(0, np.int64)
    if len(ordered) < 2 or (np.diff(ordered) <= 0).any():
        fps = float(rates[0]) if rates else None
        return Timeline(count, fps, None, count / fps if fps else None)
    times = (ordered - ordered[0]) * float(tick)
    for rate in [*rates, _rate_of(count, int(ordered[-1] - ordered[0]), tick)]:
        if np.abs(times * float(rate) - np.arange(count)).max() <= 0.5:
            return Timeline(count, float(rate), None, count / float(rate))
    last_duration = last * float(tick) if last else times[-1] / (count - 1)
    duration = float(times[-1] + last_duration)
    return Timeline(count, count / duration, times, duration)


def _rate_of(count: int, span: int, tick: Fraction) -> Fraction:
    """Returns the simplest frame rate that matches a span of time stamps up to their rounding."""
    exact = (count - 1) / (span * tick)
    for limit in (1, 2, 5, 1001):
        rate = exact.limit_denominator(limit)
        if rate and abs((count - 1) / rate - span * tick) <= tick:
            return rate
    return exact
