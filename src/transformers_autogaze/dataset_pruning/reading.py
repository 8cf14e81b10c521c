"""
Getting at the videos of a plan: contents out of tables and from afar, again where a read failed that may yet succeed.

This module reads bytes and knows nothing of pixels.
"""

import errno
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, NamedTuple, TypeVar
from urllib.error import HTTPError

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ..video_sources_autogaze import resolve_source
from .inputs import open_lance, place_beside


HELD = 2**26
"""Bytes of a video that are read ahead; of a larger one, its place is handed on."""
_ATTEMPTS, _FIRST_WAIT = 4, 0.5  # seconds, and twice as long after every attempt
# Errors that stay, however often one tries.
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG}
_LATER = (408, 425, 429)  # answers of a web server that are no refusal

T = TypeVar("T")


class Video(NamedTuple):
    """
    A video of a plan, as far as it was read.

    Args:
        identity (`str`): what it is called.
        address (`str`, *optional*): where it can be opened.
        contents (`bytes`, *optional*): what is in it, where that was read already.
        error (`str`, *optional*): why it could not be read.
    """

    identity: str
    address: str | None = None
    contents: bytes | None = None
    error: str | None = None


def read_plan(plan: pa.Table, video_column: str = "video") -> Iterator[Video]:
    """
    Reads the videos of a plan, as far as that is done ahead: those of tables, and those from afar that are not too large.

    Args:
        plan (`pa.Table`): a plan, as [`~inputs.plan_videos`] makes it.
        video_column (`str`, *optional*, defaults to `"video"`): the column of tables that has the videos.

    Yields:
        [`Video`]: one after the other. One that cannot be read has its error; no other suffers from it.
    """
    rows = plan.to_pylist()
    start = 0
    while start < len(rows):
        first, stop = rows[start], start + 1
        key = (first["address"], first["group"] >= 0)
        while stop < len(rows) and (rows[stop]["address"], rows[stop]["group"] >= 0) == key and first["group"] >= 0:
            stop += 1
        part = rows[start:stop]
        yield from (_read_table(part, video_column) if first["group"] >= 0 else map(_read_one, part))
        start = stop


def is_passing(error: BaseException | None) -> bool:
    """
    Tells whether what failed may succeed when it is tried again, such as a read over a network.

    Args:
        error (`BaseException`): the error; what it was raised from counts as well.

    Example:

    ```python
    >>> from transformers_autogaze.dataset_pruning.reading import is_passing

    >>> is_passing(TimeoutError("no answer")), is_passing(FileNotFoundError(2, "no such file")), is_passing(ValueError("text"))
    (True, False, False)

    ```
    """
    while error is not None:
        if isinstance(error, HTTPError):
            return error.code >= 500 or error.code in _LATER
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
            return False
        if isinstance(error, OSError):
            return error.errno not in _LASTING
        # Clients of object stores have kinds of their own for what is lost on the way.
        if isinstance(error, HTTPException) or re.search("Timeout|Connection|Payload", type(error).__name__):
            return True
        error = error.__cause__ or error.__context__
    return False


def patiently(work: Callable[[], T], wait: float = _FIRST_WAIT) -> T:
    """
    Does something that may fail for a moment, up to four times.

    Args:
        work (`Callable[[], T]`): what to do.
        wait (`float`, *optional*, defaults to 0.5): seconds after the first attempt; twice as many after every further one.

    Returns:
        What `work` returns.
    """
    for attempt in range(1, _ATTEMPTS):
        try:
            return work()
        except Exception as error:
            if not is_passing(error):
                raise
            # Not all workers at once.
            time.sleep(wait * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
    return work()


@contextmanager
def opened(video: Video) -> Iterator[Any]:
    """
    Gives a video as it can be gone through more than once: its contents, its path, or a temporary copy of what lies elsewhere.

    Args:
        video ([`Video`]): a video that could be read.

    Yields:
        `bytes` or `str`: what [`prune_video`] takes.
    """
    if video.contents is not None:
        yield video.contents
    elif video.address is None:
        raise ValueError("the row names no video")
    elif is_local(video.address) or _is_web(video.address):
        yield video.address
    else:
        with tempfile.TemporaryDirectory(prefix="autogaze-") as folder:
            copy = os.path.join(folder, f"video{os.path.splitext(video.address)[1][:8]}")
            patiently(lambda: _download(video.address, copy))
            yield copy


def is_at_hand(row: Mapping[str, Any]) -> bool:
    """Tells whether a row of a plan needs no reading ahead."""
    return row["group"] < 0 and (row["address"] is None or is_local(row["address"]))


def is_local(address: str) -> bool:
    """Tells whether an address is that of a file, which needs no copy."""
    return not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", address) or os.path.exists(address) or address.startswith("file:")


def _is_web(address: str) -> bool:
    return re.match(r"(https?|data):", address, re.IGNORECASE) is not None


def _download(address: str, path: str) -> None:
    with fsspec.open(address, "rb") as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, 2**20)


def _read_one(row: dict[str, Any]) -> Video:
    identity, address = row["identity"], row["address"]
    try:
        if address is None or is_local(address):
            return Video(identity, address)
        return Video(identity, address, patiently(lambda: _fetch(address)))
    except Exception as error:
        return Video(identity, address, error=f"{type(error).__name__}: {error}")


def _fetch(address: str) -> bytes | None:
    """Reads what lies at a URL, `None` if it is too large to be held."""
    if _is_web(address):
        target = resolve_source(address).target
        size = target.seek(0, os.SEEK_END)
        target.seek(0)
        return target.read() if size <= HELD else None
    with fsspec.open(address, "rb") as file:
        if (getattr(file, "size", None) or 0) > HELD:
            return None
        contents = file.read(HELD + 1)
    return contents if len(contents) <= HELD else None


def _read_table(rows: list[dict[str, Any]], column: str) -> Iterator[Video]:
    """Reads videos out of a table, one after the other; where it fails on the way, it begins anew after the last one."""
    done, wait, failures = 0, _FIRST_WAIT, 0
    while done < len(rows):
        try:
            for value in _values(rows[done:], column):
                yield _video_of(rows[done], value)
                done, failures = done + 1, 0
        except Exception as error:
            failures += 1
            if is_passing(error) and failures < _ATTEMPTS:
                time.sleep(wait * 2 ** (failures - 1))
                continue
            text = f"{type(error).__name__}: {error}"
            yield from (Video(row["identity"], error=text) for row in rows[done:])
            return


def _values(rows: list[dict[str, Any]], column: str) -> Iterator[Any]:
    """Gives the values of a column in some rows of a table, in order, with few of them in memory."""
    address = rows[0]["address"]
    if address.endswith(".lance"):
        table = open_lance(address)
        for row in rows:
            yield table.take([row["row"]], columns=[column])[column][0].as_py()
        return
    wanted = {row["row"] for row in rows}
    groups = {row["group"] for row in rows}
    with fsspec.open(address, "rb") as source:
        file = pq.ParquetFile(source, pre_buffer=False)
        place = 0
        for number in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            if number in groups:
                batches = file.iter_batches(batch_size=1, row_groups=[number], columns=[column])
                for row, batch in enumerate(batches, place):
                    if row in wanted:
                        yield batch.column(0)[0].as_py()
            place += count


def _video_of(row: dict[str, Any], value: Any) -> Video:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path") is not None:
            return _read_one({"identity": row["identity"], "address": place_beside(row["address"], value["path"])})
        value = value.get("bytes")
    return Video(
        row["identity"], contents=value, error=None if value is not None else "ValueError: the row has no video"
    )
