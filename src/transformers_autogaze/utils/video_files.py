"""Videos on the command line: finding those of a folder, and checking that files exist."""

import os
import re
from collections.abc import Sequence
from pathlib import Path


VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def find_videos(folder: Path, argument: str = "`videos`") -> list[str]:
    """
    Finds the videos in a folder and its subfolders by their suffixes.

    Args:
        folder (`Path`): the folder.
        argument (`str`, *optional*, defaults to "`videos`"): name of the argument in messages.

    Returns:
        `list[str]`: sorted paths.

    Raises:
        ValueError: if the folder does not exist or holds no video.
    """
    if not folder.is_dir():
        problem = f"{str(folder)!r} is a file" if folder.exists() else f"there is no folder {str(folder)!r}"
        raise ValueError(f"{argument} must be a folder of videos, but {problem}")
    found = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ValueError(f"{argument} {str(folder)!r} must hold videos ({', '.join(VIDEO_SUFFIXES)}), found none")
    return found


def is_url(item: str) -> bool:
    """Whether a string starts with the scheme of a URL, such as `https:`; a letter and a colon are a drive."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", item) is not None


def check_videos(videos: Sequence[str]) -> None:
    """
    Checks that all videos of a command that takes no folders exist.

    Args:
        videos (`Sequence[str]`): paths and URLs; URLs are not opened.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if one is a folder.
    """
    for video in videos:
        if os.path.isdir(video):
            raise ValueError(f"VIDEO must be a video file or an http(s) URL, but {video!r} is a folder")
        if not is_url(video) and not os.path.exists(video):
            raise FileNotFoundError(f"VIDEO must be a video file or an http(s) URL, but there is no {video!r}")
