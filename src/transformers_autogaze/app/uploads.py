"""
The files of visitors: where they lie, which of them the page takes, and when they go.

Everything lies in one temporary folder. A visitor's browser says which uploaded file to work on, so a name from there is not
to be trusted: only files in that folder are taken, and of those only what was uploaded.
"""

import re
import secrets
import shutil
import threading
import time
from collections.abc import Hashable
from pathlib import Path

from ..demo import render_demo_clip
from ..video import write_video


_EXAMPLE, _RESULTS = "example", "results"
_UPLOADED = r"[0-9a-f]{64}"  # a folder that Gradio makes for an upload


class VisitorFiles:
    """
    The files of all visitors.

    Args:
        folder (`Path`): where they lie; Gradio puts uploads there, too.
        max_age (`float`, *optional*, defaults to 3600): seconds after which a file is removed in any case.
    """

    def __init__(self, folder: Path, max_age: float = 3600):
        self.folder, self.max_age = Path(folder).resolve(), max_age
        self._uploads: dict[Hashable, set[Path]] = {}
        self._results: dict[Hashable, Path] = {}
        self._lock = threading.Lock()

    def check_upload(self, name: object) -> Path:
        """
        Checks that a name is that of an uploaded file, or of the example.

        Args:
            name: what a browser sent.

        Returns:
            `Path`: the file.

        Raises:
            ValueError: if it is anything else, or is no longer there.
        """
        if not name:
            raise ValueError("Choose a video first: drop one, record one, or take the example.")
        wrong = ValueError("Only a video that was uploaded here can be taken.")
        if not isinstance(name, str) or "\0" in name:
            raise wrong
        path = Path(name)
        parts = (
            path.parts[len(self.folder.parts) :] if path.parts[: len(self.folder.parts)] == self.folder.parts else ()
        )
        if len(parts) != 2 or not re.fullmatch(rf"{_UPLOADED}|{_EXAMPLE}", parts[0]) or parts[1] == "..":
            raise wrong
        if not path.exists():
            raise ValueError("The video is no longer here. Upload it again.")
        # A link would lead out of the folder.
        if path.resolve() != path or not path.is_file():
            raise wrong
        return path

    def holds(self, name: str) -> bool:
        """Tells whether a name is that of a place in the folder, whatever is there."""
        path = Path(name)
        return path.is_absolute() and ".." not in path.parts and path.is_relative_to(self.folder)

    def example(self) -> Path:
        """Gives the example, which is drawn if it is not there."""
        path = self.folder / _EXAMPLE / "demo.mp4"
        with self._lock:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, render_demo_clip(), fps=15)
        return path

    def remember(self, visitor: Hashable, upload: Path) -> None:
        """Notes whose an upload is, so that it goes with the visitor."""
        if upload.parent.name != _EXAMPLE:
            with self._lock:
                self._uploads.setdefault(visitor, set()).add(upload)

    def new_results(self, visitor: Hashable) -> Path:
        """Gives a visitor a new, empty folder for results; what the last one held is removed."""
        folder = self.folder / _RESULTS / secrets.token_hex(16)
        folder.mkdir(parents=True)
        with self._lock:
            last, self._results[visitor] = self._results.get(visitor), folder
        if last is not None:
            shutil.rmtree(last, ignore_errors=True)
        return folder

    def forget(self, visitor: Hashable) -> None:
        """Removes all that belongs to a visitor alone."""
        with self._lock:
            uploads, results = self._uploads.pop(visitor, set()), self._results.pop(visitor, None)
            # Equal uploads of two visitors are one file.
            others = set().union(*self._uploads.values())
        for upload in uploads - others:
            shutil.rmtree(upload.parent, ignore_errors=True)
        if results is not None:
            shutil.rmtree(results, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what is old, whosever it is."""
        end = time.time() - self.max_age
        folders = [path for path in self.folder.glob("*") if path.name not in (_EXAMPLE, _RESULTS)]
        for folder in [*folders, *(self.folder / _RESULTS).glob("*")]:
            try:
                if folder.stat().st_mtime < end:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:  # Another visitor's call was quicker.
                pass

    def size(self) -> int:
        """Gives the bytes that lie in the folder."""
        total = 0
        for path in self.folder.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                pass
        return total
