"""Limits on the length and size of a video, and on the work of pruning it."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..pruning.opened_video import OpenedVideo


_MEGABYTE = 10**6
_MAX_FRAME_RATE = 240  # limits the number of frames that are decoded, whatever duration a file claims


@dataclass(frozen=True)
class Limits:
    """
    Upper limits on a video and on the work of pruning it.

    Args:
        seconds (`float`): length of the video.
        megabytes (`int`): size of its file, in units of 10**6 bytes.
        pixels (`int`): pixels of a frame.
        frames (`int`): frames taken from the video.
        gazed_pixels (`int`): pixels that the selector processes, over all frames.

    Example:

    ```python
    >>> from transformers_autogaze.app.limits import Limits

    >>> print(Limits())
    Videos of up to 60 seconds, 100 MB and 1920x1080 pixels.

    ```
    """

    seconds: float = 60
    megabytes: int = 100
    pixels: int = 1920 * 1080
    frames: int = 64
    gazed_pixels: int = 2**25

    def __str__(self) -> str:
        height = round((self.pixels * 9 / 16) ** 0.5)
        size = f"{self.pixels // height}x{height}"
        return f"Videos of up to {self.seconds:g} seconds, {self.megabytes} MB and {size} pixels."

    def open(self, path: Path, name: str) -> OpenedVideo:
        """
        Opens a video and checks it against the limits.

        Args:
            path (`Path`): its file.
            name (`str`): its name in error messages.

        Raises:
            ValueError: if the file is not a video, or exceeds a limit.
        """
        size = os.stat(path).st_size
        if size > self.megabytes * _MEGABYTE:
            raise ValueError(f"{name} has {size / _MEGABYTE:.0f} MB. {self}")
        video = OpenedVideo(str(path))
        metadata = video.metadata
        # The length of a file without a frame rate is estimated at 30 frames per second.
        seconds = metadata.duration or metadata.total_num_frames / (metadata.fps or 30)
        if seconds > self.seconds or metadata.total_num_frames > self.seconds * _MAX_FRAME_RATE:
            raise ValueError(f"{name} has {seconds:.0f} seconds and {metadata.total_num_frames} frames. {self}")
        if metadata.width * metadata.height > self.pixels:
            raise ValueError(f"{name} has {metadata.width}x{metadata.height} pixels. {self}")
        return video

    def check_work(self, num_frames: int, pixels: int) -> None:
        """
        Checks the number of pixels that the selector processes.

        Args:
            num_frames (`int`): number of frames.
            pixels (`int`): pixels of each frame that the selector processes.

        Raises:
            ValueError: if they are more than `gazed_pixels`.
        """
        if num_frames * pixels > self.gazed_pixels:
            max_frames = self.gazed_pixels // pixels
            raise ValueError(
                f"{num_frames} frames are too many if the selector processes {pixels / 1e6:.1f} million pixels of each. Take "
                f"{max_frames} frames at most, or fewer tiles."
            )
