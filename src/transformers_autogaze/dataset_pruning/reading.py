"""
Reads the files of a plan's videos, out of tables and over a network, with retries.

This module reads bytes; it decodes nothing.
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
from itertools import groupby
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.error import HTTPError

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ..video_sources_autogaze import resolve_source
from .inputs import has_scheme, open_lance, resolve_path


MAX_PREFETCHED_BYTES = 2**26
"""Size in bytes of the largest remote video that is read before a worker asks for it; a worker downloads a larger one itself."""
_MAX_ATTEMPTS, _FIRST_WAIT_SECONDS = 4, 0.5  # the wait doubles after every attempt
# Errors that another attempt would give again.
_PERMANENT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG}
_RETRIED_STATUS_CODES = (408, 425, 429)  # beside 5xx

T = TypeVar("T")


class Video(NamedTuple):
    """
    A video of a plan, on its way to a worker.

    Args:
        identity (`str`): its name.
        address (`str`, *optional*): its path or URL.
        contents (`bytes`, *optional*): the bytes of its file, if they have been read already.
        error (`str`, *optional*): why it could not be read.
    """

    identity: str
    address: str | None = None
    contents: bytes | None = None
    error: str | None = None


def read_plan(plan: pa.Table, video_column: str = "video") -> Iterator[Video]:
    """
    Reads those videos of a plan that workers do not open themselves: those in tables, and remote ones that are not too large.

    Args:
        plan (`pa.Table`): a plan, see [`~inputs.plan_videos`].
        video_column (`str`, *optional*, defaults to `"video"`): column of tables with the videos.

    Yields:
        [`Video`]: the videos in order. One that cannot be read has its error, and reading continues with the next one.
    """
    for table, rows in groupby(plan.to_pylist(), lambda row: row["address"] if row["group"] >= 0 else None):
        part = list(rows)
        yield from map(_prefetch, part) if table is None else _read_table(part, video_column)


def is_transient(error: BaseException | None) -> bool:
    """
    Tells whether an operation that failed, such as a read over a network, may succeed when it is tried again.

    Args:
        error (`BaseException`, *optional*): the error; the errors that it was raised from are looked at as well.

    Example:

    ```python
    >>> from transformers_autogaze.dataset_pruning.reading import is_transient

    >>> is_transient(TimeoutError("no answer")), is_transient(FileNotFoundError(2, "no such file")), is_transient(ValueError("text"))
    (True, False, False)

    ```
    """
    while error is not None:
        if isinstance(error, HTTPError):
            return error.code >= 500 or error.code in _RETRIED_STATUS_CODES
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
            return False
        if isinstance(error, OSError):
            return error.errno not in _PERMANENT
        # Clients of object stores raise classes of their own for lost connections.
        if isinstance(error, HTTPException) or re.search("Timeout|Connection|Payload", type(error).__name__):
            return True
        error = error.__cause__ or error.__context__
    return False


def retry(work: Callable[[], T]) -> T:
    """
    Calls a function up to four times, as long as it raises transient errors; see [`is_transient`].

    Args:
        work (`Callable[[], T]`): the function.

    Returns:
        The result of `work`.
    """
    for attempt in range(1, _MAX_ATTEMPTS):
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            _wait(attempt)
    return work()


def _wait(attempt: int) -> None:
    """Waits after an attempt that failed, of which the first is 1; at random, so that not all workers try again at once."""
    time.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))


@contextmanager
def video_source(video: Video) -> Iterator[Any]:
    """
    Yields a video for [`prune_video`]: its bytes, its path or web address, or the path of a temporary copy.

    Args:
        video ([`Video`]): a video that could be read.

    Yields:
        `bytes` or `str`: the source, until the block ends.
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
            retry(lambda: _download(video.address, copy))
            yield copy


def needs_prefetch(row: Mapping[str, Any]) -> bool:
    """Returns whether the video of a row of a plan is to be read before a worker asks for it; local files are not."""
    return row["group"] >= 0 or not (row["address"] is None or is_local(row["address"]))


def is_local(address: str) -> bool:
    """Tells whether an address is that of a local file."""
    return not has_scheme(address) or os.path.exists(address) or address.startswith("file:")


def describe_error(error: Exception) -> str:
    """Writes the class and the message of an error."""
    return f"{type(error).__name__}: {error}"


def _is_web(address: str) -> bool:
    return re.match(r"(https?|data):", address, re.IGNORECASE) is not None


def _download(address: str, path: str) -> None:
    with fsspec.open(address, "rb") as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, 2**20)


def _prefetch(row: dict[str, Any]) -> Video:
    identity, address = row["identity"], row["address"]
    try:
        if address is None or is_local(address):
            return Video(identity, address)
        return Video(identity, address, retry(lambda: _read_remote(address)))
    except Exception as error:
        return Video(identity, address, error=describe_error(error))


def _read_remote(address: str) -> bytes | None:
    """Reads the file at a URL; returns `None` if it has more than `MAX_PREFETCHED_BYTES`."""
    if _is_web(address):
        target = cast(BinaryIO, resolve_source(address).target)
        size = target.seek(0, os.SEEK_END)
        target.seek(0)
        return target.read() if size <= MAX_PREFETCHED_BYTES else None
    with fsspec.open(address, "rb") as file:
        if (getattr(file, "size", None) or 0) > MAX_PREFETCHED_BYTES:
            return None
        contents = file.read(MAX_PREFETCHED_BYTES + 1)
    return contents if len(contents) <= MAX_PREFETCHED_BYTES else None


def _read_table(rows: list[dict[str, Any]], column: str) -> Iterator[Video]:
    """Reads videos out of a table, one after the other; after a transient error it continues with the first missing one."""
    done, failures = 0, 0
    while done < len(rows):
        try:
            for value in _values(rows[done:], column):
                yield _video_of(rows[done], value)
                done, failures = done + 1, 0
        except Exception as error:
            failures += 1
            if is_transient(error) and failures < _MAX_ATTEMPTS:
                _wait(failures)
                continue
            yield from (Video(row["identity"], error=describe_error(error)) for row in rows[done:])
            return


def _values(rows: list[dict[str, Any]], column: str) -> Iterator[Any]:
    """Yields the values of a column in some rows of a table, in order, without reading all of them into memory."""
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
                for index, batch in enumerate(batches, place):
                    if index in wanted:
                        yield batch.column(0)[0].as_py()
            place += count


def _video_of(row: dict[str, Any], value: Any) -> Video:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path") is not None:
            return _prefetch({"identity": row["identity"], "address": resolve_path(row["address"], value["path"])})
        value = value.get("bytes")
    return Video(
        row["identity"], contents=value, error=None if value is not None else "ValueError: the row has no video"
    )
