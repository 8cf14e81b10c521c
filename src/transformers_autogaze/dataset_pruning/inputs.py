"""
Lists the videos of a dataset: a folder, a pattern, a list or a table, local or at any URL that fsspec opens.

The result is a plan: a table with the name and the address of every video. No video is opened to make it.
"""

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..utils.video_files import VIDEO_SUFFIXES


PLAN = pa.schema([("identity", pa.string()), ("address", pa.string()), ("row", pa.int64()), ("group", pa.int64())])
"""
Columns of a plan: the name of the video; its path or URL, or that of the table that contains it; its row in that table and the
index of the row group that has to be read to get it, both -1 for a video that is a file of its own.
"""
_EXPECTED = (
    "INPUT must be a folder of videos, a pattern such as 'clips/*.mp4', a list of paths or URLs in a .txt file, or a .parquet or "
    ".lance table, on this machine or at a URL such as s3://bucket/clips"
)
_MAX_NAMES = 5  # in an error message


class TableColumns(NamedTuple):
    """
    A table of videos, opened to read single columns.

    Args:
        schema (`pa.Schema`): names and types of the columns.
        num_rows (`int`): number of rows.
        groups (`list[int]`): number of rows of each row group.
        read (`Callable[[str], pa.ChunkedArray]`): reads the column of a name.
    """

    schema: pa.Schema
    num_rows: int
    groups: list[int]
    read: Callable[[str], Any]


def plan_videos(source: str, video_column: str = "video", id_column: str | None = None) -> pa.Table:
    """
    Lists the videos of a dataset.

    Args:
        source (`str`):
            A folder, searched recursively for files with the suffix of a video, or for Parquet tables if there is no video; a
            pattern with `*`, `?` or `[`; a `.txt` file with one path or URL per line; a video; a `.parquet` file or a `.lance`
            folder. Each of these is given as a path, or as a URL that fsspec opens, such as `s3://`, `gs://` or `hf://`.
            Relative paths in a list or a table start from the folder of that list or table.
        video_column (`str`, *optional*, defaults to `"video"`):
            Column of a table with the videos: paths or URLs, bytes of files, or structs of both as `datasets` stores videos.
        id_column (`str`, *optional*):
            Column of a table with the name of each video; by default the path or URL as written in the table, and for bytes the
            name of the table and the row number, as in `train.parquet#12`.

    Returns:
        `pa.Table` with the columns of `PLAN`. The name of a video of a folder or a pattern is its path relative to the folder.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ImportError: if a package that opens such a URL or table is missing.
        ValueError: if `source` is none of these or contains no video, a column is missing or of another type, or `id_column`
            has a value twice.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_autogaze.dataset_pruning.inputs import plan_videos

    >>> _ = Path("list.txt").write_text("clips/a.mp4\\ns3://bucket/b.mp4\\n")
    >>> plan_videos("list.txt")["identity"].to_pylist()
    ['clips/a.mp4', 's3://bucket/b.mp4']

    ```
    """
    files, system, root = _find_files(source)
    tables = [path for path in files if path.endswith((".parquet", ".lance"))]
    if tables and len(tables) < len(files):
        raise ValueError(f"{_EXPECTED}, got {source!r}, which holds both tables and videos")
    if tables:
        parts = [
            _plan_table(_to_address(system, path), posixpath.relpath(path, root), video_column, id_column)
            for path in tables
        ]
        plan = pa.concat_tables(parts)
        _check_unique(plan["identity"], id_column)
    elif len(files) == 1 and files[0].endswith(".txt"):
        lines = system.cat_file(files[0]).decode("utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        plan = _make_plan(names, _resolve_paths(_to_address(system, files[0]), names))
    else:
        plan = _make_plan(
            [posixpath.relpath(path, root) for path in files], [_to_address(system, path) for path in files]
        )
    plan = _drop_duplicates(plan)
    if not plan.num_rows:
        raise ValueError(f"{_EXPECTED}, got {source!r}, which names no video")
    return plan


def open_table(address: str) -> TableColumns:
    """
    Opens a table of videos.

    Args:
        address (`str`): its path or URL.

    Raises:
        ImportError: for `.lance`, if pylance is missing.
        ValueError: if it is not a Parquet or Lance table.
    """
    if address.endswith(".lance"):
        table = open_lance(address)
        rows = table.count_rows()
        return TableColumns(table.schema, rows, [1] * rows, lambda name: table.to_table(columns=[name])[name])
    try:
        with fsspec.open(address, "rb") as file:
            metadata = pq.ParquetFile(file).metadata
    except pa.ArrowInvalid as error:
        raise ValueError(f"INPUT: {address!r} must be a Parquet table: {error}") from error
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def read(name: str) -> Any:
        with fsspec.open(address, "rb") as file:
            return pq.ParquetFile(file).read(columns=[name])[name]

    return TableColumns(metadata.schema.to_arrow_schema(), metadata.num_rows, groups, read)


def open_lance(address: str) -> Any:
    """Opens a Lance table."""
    try:
        import lance
    except ImportError as error:
        raise ImportError(
            f"a .lance table needs the package pylance: pip install pylance (got {address!r})"
        ) from error
    try:
        return lance.dataset(address)
    except ValueError as error:
        raise ValueError(f"INPUT: {address!r} must be a Lance table: {error}") from error


def resolve_path(listing: str, name: str) -> str:
    """
    Resolves a path that is written in a list or a table.

    Args:
        listing (`str`): path or URL of the list or table.
        name (`str`): a path or a URL; a relative path starts from the folder of the list or table.

    Example:

    ```python
    >>> from transformers_autogaze.dataset_pruning.inputs import resolve_path

    >>> resolve_path("s3://bucket/table.parquet", "clips/a.mp4")
    's3://bucket/clips/a.mp4'

    ```
    """
    is_absolute = os.path.isabs(name) or has_scheme(name)
    return name if is_absolute else posixpath.join(posixpath.dirname(listing), name)


def has_scheme(address: str) -> bool:
    """Tells whether an address starts as a URL does, with a scheme such as `s3:`; one letter alone is a drive of Windows."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", address) is not None


def _find_files(source: str) -> tuple[list[str], Any, str]:
    """Returns the files of a dataset, their file system, and the folder that the names of videos are relative to."""
    if not source.strip():
        raise ValueError(f"{_EXPECTED}, got {source!r}")
    system, path = fsspec.core.url_to_fs(source)
    if system.exists(path):
        name = path.rstrip("/")
        if name.endswith((".txt", ".parquet", ".lance", *VIDEO_SUFFIXES)):
            return [name], system, posixpath.dirname(name)
        if not system.isdir(path):
            raise ValueError(f"{_EXPECTED}, got the file {source!r}")
        found = sorted(system.find(path))
        videos = [file for file in found if file.lower().endswith(VIDEO_SUFFIXES)]
        files = videos or [file for file in found if file.endswith(".parquet")]
        if not files:
            raise ValueError(
                f"{_EXPECTED}, got the folder {source!r}, which holds no video ({', '.join(VIDEO_SUFFIXES)})"
            )
        return files, system, name
    if not re.search(r"[*?\[]", path):
        raise FileNotFoundError(f"{_EXPECTED}, but there is no {source!r}")
    files = sorted(file for file in system.glob(path) if file.endswith(".lance") or system.isfile(file))
    if not files:
        raise FileNotFoundError(f"{_EXPECTED}, but no file is like {source!r}")
    return files, system, posixpath.dirname(re.split(r"[*?\[]", path)[0])


def _to_address(system: Any, path: str) -> str:
    """Returns a path of a file system for `fsspec.open`: a local path itself, others as URLs."""
    return path if "file" in _protocols(system) else system.unstrip_protocol(path)


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _resolve_paths(listing: str, names: list[str | None]) -> list[str | None]:
    return [None if name is None else resolve_path(listing, name) for name in names]


def _make_plan(identities: Any, addresses: Any, rows: Any = None, groups: Any = None) -> pa.Table:
    count = len(identities)
    rows, groups = (rows, groups) if rows is not None else ([-1] * count, [-1] * count)
    columns = zip(PLAN, (identities, addresses, rows, groups), strict=True)
    return pa.table([pa.array(values, field.type) for field, values in columns], PLAN)


def _plan_table(address: str, name: str, video_column: str, id_column: str | None) -> pa.Table:
    table = open_table(address)
    kind = _find_column(table, video_column, address).type
    numbered = [f"{name}#{row}" for row in range(table.num_rows)]
    identities = None if id_column is None else _read_identities(table, id_column, address)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        names = table.read(video_column).to_pylist()
        identities = identities or [numbered[row] if name is None else name for row, name in enumerate(names)]
        return _make_plan(identities, _resolve_paths(address, names))
    is_both = pa.types.is_struct(kind) and {kind.field(place).name for place in range(kind.num_fields)} <= {
        "bytes",
        "path",
    }
    if not (is_both or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"`--video-column` must be a column of paths, URLs or contents of videos, but {video_column!r} of {address!r} has the "
            f"type {kind}"
        )
    groups = (number for number, count in enumerate(table.groups) for _ in range(count))
    return _make_plan(identities or numbered, [address] * table.num_rows, range(table.num_rows), list(groups))


def _find_column(table: TableColumns, name: str, address: str, argument: str = "--video-column") -> pa.Field:
    if name not in table.schema.names:
        raise ValueError(
            f"`{argument}` must be one of the columns {', '.join(table.schema.names)} of {address!r}, got {name!r}"
        )
    return table.schema.field(name)


def _read_identities(table: TableColumns, name: str, address: str) -> list[str]:
    _find_column(table, name, address, "--id-column")
    values = table.read(name)
    if values.null_count:
        raise ValueError(f"`--id-column` must name every video, but {name!r} of {address!r} has rows without a value")
    return [str(value) for value in values.to_pylist()]


def _check_unique(identities: pa.ChunkedArray, id_column: str | None) -> None:
    """Refuses an `id_column` with a value that occurs twice. A path may occur twice, as it is the same video."""
    if id_column is None:
        return
    counts = identities.value_counts()
    twice = [pair["values"] for pair in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()]
    if twice:
        raise ValueError(
            f"`--id-column` must have a different value for each video, but {id_column!r} has {', '.join(map(repr, twice[:_MAX_NAMES]))} more than "
            "once"
        )


def _drop_duplicates(plan: pa.Table) -> pa.Table:
    """Keeps the first of the videos that have the same name."""
    first: dict[str, int] = {}
    for place, identity in enumerate(plan["identity"].to_pylist()):
        first.setdefault(identity, place)
    return plan if len(first) == plan.num_rows else plan.take(list(first.values()))


def split_plan(plan: pa.Table, num_rows: int) -> Iterator[tuple[int, int]]:
    """
    Splits a plan into parts that are read independently of each other.

    Args:
        plan (`pa.Table`): a plan.
        num_rows (`int`): least number of videos per part, except for the last one; a row group of a table is not split.

    Yields:
        `tuple[int, int]`: start and end (exclusive) of a part, as rows of the plan.
    """
    rows = zip(plan["address"].to_pylist(), plan["group"].to_pylist(), strict=True)
    start, before = 0, None
    for place, (address, group) in enumerate(rows):
        own = (address, group) if group >= 0 else None
        if place - start >= num_rows and (own is None or own != before):
            yield start, place
            start = place
        before = own
    if plan.num_rows > start:
        yield start, plan.num_rows
