"""
Writing files under temporary names in the same folder, and renaming them when they are complete.

If a run fails, or the disk is full, earlier files are unchanged.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


try:
    import fcntl
except ImportError:  # On Windows nothing prevents two processes from writing to the same file.
    fcntl = None


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields a temporary file name; the file written there replaces `path` when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`): the file to write. If it is a link to a file, this file is replaced, not the link.

    Yields:
        `Path`: a name to write to, with the file name of `path`.

    Raises:
        ValueError: if `path` is a folder.

    Example:

    ```python
    >>> from transformers_autogaze.utils.output_files import replacing

    >>> with replacing("notes.txt") as unfinished:
    ...     _ = unfinished.write_text("complete")
    >>> open("notes.txt").read()
    'complete'

    ```
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"a file is to be written, but {str(path)!r} is a folder; give another name")
    path = Path(os.path.realpath(path))
    with replacing_files(path.parent) as folder:
        yield folder / path.name


@contextmanager
def replacing_files(folder: str | os.PathLike, names: Sequence[str] = ()) -> Iterator[Path]:
    """
    Yields an empty temporary folder, whose files move to `folder` when the block ends without an error.

    Args:
        folder (`str` or `os.PathLike`): folder for the files; created if it is missing. Other files there are kept.
        names (`Sequence[str]`, *optional*):
            Names of all files of a run: those that are not written are removed from `folder`, as they are of an earlier run.

    Yields:
        `Path`: the temporary folder, inside `folder`.

    Raises:
        ValueError: if `folder` is a file, or a file would replace a folder.
    """
    folder = Path(folder)
    created = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        yield temporary
        moves = {path: folder / path.relative_to(temporary) for path in sorted(temporary.rglob("*")) if path.is_file()}
        for target in moves.values():
            if target.is_dir():
                raise ValueError(f"a file is to be written, but {str(target)!r} is a folder; give another output")
        for name in names:
            if not (temporary / name).exists():
                (folder / name).unlink(missing_ok=True)
        for path, target in moves.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, os.path.realpath(target))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in created:
            if not any(parent.iterdir()):
                parent.rmdir()


def check_folder(folder: str | os.PathLike) -> list[Path]:
    """
    Checks that files can be written to a folder.

    Args:
        folder (`str` or `os.PathLike`): a folder that need not exist.

    Returns:
        `list[Path]`: the missing folders, the innermost first.

    Raises:
        ValueError: if the folder, or one that would contain it, is a file.
    """
    folder = Path(folder)
    missing: list[Path] = []
    for path in (folder, *folder.parents):
        if path.is_dir():
            return missing
        if os.path.lexists(path):
            raise ValueError(f"the output must be a folder, but {str(path)!r} is a file; give another name")
        missing.append(path)
    return missing


def lock_file(file: IO, message: str) -> None:
    """
    Takes an exclusive lock on an open file, which is released when the file is closed or the process ends.

    Args:
        file (`IO`): the open file.
        message (`str`): message of the error.

    Raises:
        ValueError: if another process holds the lock.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(message) from None


def check_not_inputs(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]) -> None:
    """
    Checks that no output is the same file as an input, even by another path or link.

    Args:
        outputs (`Iterable` of `str` or `os.PathLike`): files to write.
        inputs (`Iterable` of `str` or `os.PathLike`): files to read.

    Raises:
        ValueError: if an output is an input.
    """
    inputs = [path for path in inputs if os.path.exists(path)]
    for output in (path for path in outputs if os.path.exists(path)):
        for path in inputs:
            if os.path.samefile(output, path):
                raise ValueError(
                    f"the output {os.fspath(output)!r} is the input {os.fspath(path)!r}; give another output"
                )


def to_json(value: Any, **options: Any) -> str:
    """
    Converts to strict JSON: numbers that are not finite become null.

    Args:
        value: a value that `json.dumps` accepts.
        options: arguments of `json.dumps`, such as `indent`.

    Returns:
        `str`

    Example:

    ```python
    >>> from transformers_autogaze.utils.output_files import to_json

    >>> to_json({"psnr": [float("inf"), 1.5]})
    '{"psnr": [null, 1.5]}'

    ```
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
