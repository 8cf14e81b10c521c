"""
Files that are written: under temporary names beside their places, which they take when they are whole.

A run that fails, or a disk that is full, leaves what was there before. This module knows nothing of what is in the files.
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
except ImportError:  # Windows, where two processes are not kept from writing to the same file.
    fcntl = None


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a temporary file name, whose file replaces another one when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`): the file to write; a link to a file stays, and the file is replaced.

    Yields:
        `Path`: a name to write to, which ends as `path` does.

    Raises:
        ValueError: if `path` is a folder.

    Example:

    ```python
    >>> from transformers_autogaze.utils.output_files import replacing

    >>> with replacing("notes.txt") as unfinished:
    ...     _ = unfinished.write_text("whole")
    >>> open("notes.txt").read()
    'whole'

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
    Gives an empty temporary folder, whose files all move to another one when the block ends without an error.

    Args:
        folder (`str` or `os.PathLike`): where the files belong; made if it is missing. Other files there stay.
        names (`Sequence[str]`, *optional*):
            Files that belong together: of these, what is not written anew is removed, as it tells of another run.

    Yields:
        `Path`: the temporary folder, inside the other one.

    Raises:
        ValueError: if `folder` is a file, or something to replace is a folder.
    """
    folder = Path(folder)
    made = check_folder(folder)
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
        for missing in made:
            if not any(missing.iterdir()):
                missing.rmdir()


def check_folder(folder: str | os.PathLike) -> list[Path]:
    """
    Checks that files can be written to a folder.

    Args:
        folder (`str` or `os.PathLike`): a folder, which may be missing yet.

    Returns:
        `list[Path]`: the folders that are missing, the innermost first.

    Raises:
        ValueError: if it, or what it would lie in, is a file.
    """
    folder = Path(folder)
    missing = []
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
    Checks that no output is an input as well, by another path or link either.

    Args:
        outputs (`Iterable` of `str` or `os.PathLike`): what is to be written.
        inputs (`Iterable` of `str` or `os.PathLike`): what is to be read.

    Raises:
        ValueError: if one is.
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
    Writes JSON that every reader takes: numbers that are not finite become null.

    Args:
        value: what `json.dumps` takes.
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
