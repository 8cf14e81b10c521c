"""
The files of visitors: where they are stored, which of them the page accepts, and when they are removed.

All files are in one temporary folder. The path of the video to prune comes from a visitor's browser and so is not trusted: only
uploads in that folder are accepted.
"""

import re
import secrets
import shutil
import threading
import time
from collections.abc import Hashable
from pathlib import Path

from ..video.demo import render_demo_clip
from ..video.writing import write_video


_EXAMPLE, _RESULTS = "example", "results"
_UPLOADED = r"[0-9a-f]{64}"  # name of the folder that Gradio makes for an upload


class VisitorFiles:
    """
    The files of all visitors.

    Args:
        folder (`Path`): where they are stored; Gradio writes uploads there, too.
        max_age (`float`, *optional*, defaults to 3600): seconds after which [`~VisitorFiles.sweep`] removes a file.
    """

    def __init__(self, folder: Path, max_age: float = 3600):
        self.folder, self.max_age = Path(folder).resolve(), max_age
        self._uploads: dict[Hashable, set[Path]] = {}
        self._results: dict[Hashable, Path] = {}
        self._lock = threading.Lock()

    def check_upload(self, name: object) -> Path:
        """
        Checks that a name is the path of an uploaded file or of the example clip.

        Args:
            name: the value that a browser sent.

        Returns:
            `Path`: the file.

        Raises:
            ValueError: if it is anything else, or the file was removed.
        """
        if not name:
            raise ValueError("Choose a video first: drop one, record one, or take the example clip.")
        wrong = ValueError("Only a video that was uploaded here can be pruned.")
        if not isinstance(name, str) or "\0" in name:
            raise wrong
        path = Path(name)
        parts = path.relative_to(self.folder).parts if path.is_relative_to(self.folder) else ()
        if len(parts) != 2 or not re.fullmatch(rf"{_UPLOADED}|{_EXAMPLE}", parts[0]) or parts[1] == "..":
            raise wrong
        if not path.exists():
            raise ValueError("The video was removed. Upload it again.")
        # A symbolic link could lead out of the folder.
        if path.resolve() != path or not path.is_file():
            raise wrong
        return path

    def holds(self, name: str) -> bool:
        """Whether a name is an absolute path inside the folder; the file need not exist."""
        path = Path(name)
        return path.is_absolute() and ".." not in path.parts and path.is_relative_to(self.folder)

    def example(self) -> Path:
        """Returns the path of the example clip, which is rendered at the first call."""
        path = self.folder / _EXAMPLE / "demo.mp4"
        with self._lock:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, render_demo_clip(), fps=15)
        return path

    def remember(self, visitor: Hashable, upload: Path) -> None:
        """Records that an upload belongs to a visitor, for [`~VisitorFiles.forget`] to remove."""
        if upload.parent.name != _EXAMPLE:
            with self._lock:
                self._uploads.setdefault(visitor, set()).add(upload)

    def new_results(self, visitor: Hashable) -> Path:
        """Makes a new folder for a visitor's results, and removes the visitor's previous one."""
        folder = self.folder / _RESULTS / secrets.token_hex(16)
        folder.mkdir(parents=True)
        with self._lock:
            last, self._results[visitor] = self._results.get(visitor), folder
        if last is not None:
            shutil.rmtree(last, ignore_errors=True)
        return folder

    def forget(self, visitor: Hashable) -> None:
        """Removes all files of a visitor that no other visitor has."""
        with self._lock:
            uploads, results = self._uploads.pop(visitor, set()), self._results.pop(visitor, None)
            # Gradio stores equal uploads of two visitors as one file.
            others = set().union(*self._uploads.values())
        for upload in uploads - others:
            shutil.rmtree(upload.parent, ignore_errors=True)
        if results is not None:
            shutil.rmtree(results, ignore_errors=True)

    def sweep(self) -> None:
        """Removes all uploads and results that are older than `max_age`."""
        end = time.time() - self.max_age
        folders = [path for path in self.folder.glob("*") if path.name not in (_EXAMPLE, _RESULTS)]
        for folder in [*folders, *(self.folder / _RESULTS).glob("*")]:
            try:
                if folder.stat().st_mtime < end:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:  # removed by a call of another visitor
                pass

    def size(self) -> int:
        """Returns the total size of all files in bytes."""
        total = 0
        for path in self.folder.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                pass
        return total
