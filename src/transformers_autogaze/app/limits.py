"""How long and large videos may be, and how much work they may make: checked before a selector is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..opened_video import OpenedVideo


_MEGABYTE = 10**6


@dataclass(frozen=True)
class Limits:
    """
    What visitors may ask for.

    Args:
        seconds (`float`): length of a video.
        megabytes (`int`): size of its file, in units of 10**6 bytes.
        pixels (`int`): pixels of a frame.
        frames (`int`): frames taken from a video.
        gazed_pixels (`int`): pixels that are gazed at in all frames together.

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
        Opens a video of these limits.

        Args:
            path (`Path`): its file.
            name (`str`): what to call it in messages.

        Raises:
            ValueError: if it is no video, or beyond a limit.
        """
        size = os.stat(path).st_size
        if size > self.megabytes * _MEGABYTE:
            raise ValueError(f"{name} has {size / _MEGABYTE:.0f} MB. {self}")
        video = OpenedVideo(str(path))
        known = video.metadata
        # A file that tells no rate is as long as one of 30 frames per second.
        seconds = known.duration or known.total_num_frames / (known.fps or 30)
        if seconds > self.seconds or known.total_num_frames > self.seconds * 240:
            raise ValueError(f"{name} has {seconds:.0f} seconds and {known.total_num_frames} frames. {self}")
        if known.width * known.height > self.pixels:
            raise ValueError(f"{name} has {known.width}x{known.height} pixels. {self}")
        return video

    def check_work(self, num_frames: int, pixels: int) -> None:
        """
        Checks how much is to be gazed at.

        Args:
            num_frames (`int`): frames.
            pixels (`int`): pixels that are gazed at in each.

        Raises:
            ValueError: if it is too much.
        """
        if num_frames * pixels > self.gazed_pixels:
            most = self.gazed_pixels // pixels
            raise ValueError(
                f"{num_frames} frames are too many where {pixels / 1e6:.1f} million pixels of each are gazed at. Take "
                f"{most} frames at most, or fewer tiles."
            )
