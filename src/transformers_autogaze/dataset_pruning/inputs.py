"""
Which videos a dataset has: a folder, a pattern, a list, or a table, on this machine or where fsspec reaches.

The plan of a dataset names every video, and where it lies; no video is opened for it. This module knows nothing of what is
done with them.
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

from ..training.videos import VIDEO_SUFFIXES


PLAN = pa.schema([("identity", pa.string()), ("address", pa.string()), ("row", pa.int64()), ("group", pa.int64())])
"""
Columns of a plan: what a video is called; its path or URL, or that of the table that holds it; there, its row and the number of
what has to be read at once to come to it, -1 for a video of its own.
"""
_KINDS = (
    "INPUT must be a folder of videos, a pattern such as 'clips/*.mp4', a list of paths or URLs in a .txt file, or a .parquet or "
    ".lance table, on this machine or at a URL such as s3://bucket/clips"
)
_SHOWN = 5  # names in a message


class TableColumns(NamedTuple):
    """
    What a plan needs of a table.

    Args:
        schema (`pa.Schema`): its columns.
        num_rows (`int`): its rows.
        groups (`list[int]`): how many rows have to be read at once, one number for each group of them.
        read (`Callable[[str], pa.Array]`): gives a column.
    """

    schema: pa.Schema
    num_rows: int
    groups: list[int]
    read: Callable[[str], Any]


def plan_videos(source: str, video_column: str = "video", id_column: str | None = None) -> pa.Table:
    """
    Finds the videos of a dataset.

    Args:
        source (`str`):
            A folder, searched with the folders in it for videos by the endings of their names, or else for Parquet tables; a
            pattern with `*`, `?` or `[`; a `.txt` file of a path or URL a line; a video; a `.parquet` file or a `.lance`
            folder. Of any of these the path, or a URL that fsspec opens, such as `s3://`, `gs://` or `hf://`. What a list or
            a table names lies where it says, seen from the folder that the list or table is in.
        video_column (`str`, *optional*, defaults to `"video"`):
            Column of a table: of paths or URLs, of contents, or of both as `datasets` stores videos.
        id_column (`str`, *optional*):
            Column of a table that says what each video is called; by default its path or URL as the table names it, and for
            contents the name of the table and the number of the row, as in `train.parquet#12`.

    Returns:
        `pa.Table` with the columns of `PLAN`. Videos of a folder or a pattern are called by their paths inside the folder.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ImportError: if a package that opens such a URL or table is missing.
        ValueError: if it is nothing of these, holds no video, a column is missing or of another type, or two videos of
            `id_column` are called alike.

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
        raise ValueError(f"{_KINDS}, got {source!r}, which holds both tables and videos")
    if tables:
        parts = [
            _plan_table(_full(system, path), posixpath.relpath(path, root), video_column, id_column) for path in tables
        ]
        plan = pa.concat_tables(parts)
        _check_unlike(plan["identity"], id_column)
    elif len(files) == 1 and files[0].endswith(".txt"):
        lines = system.cat_file(files[0]).decode("utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        plan = _plan_of(names, _beside(_full(system, files[0]), names))
    else:
        plan = _plan_of([posixpath.relpath(path, root) for path in files], [_full(system, path) for path in files])
    plan = _first_of_each(plan)
    if not plan.num_rows:
        raise ValueError(f"{_KINDS}, got {source!r}, which names no video")
    return plan


def open_table(address: str) -> TableColumns:
    """
    Opens a table to plan its videos.

    Args:
        address (`str`): its path or URL.

    Raises:
        ImportError: for `.lance`, if pylance is missing.
        ValueError: if it is no such table.
    """
    if address.endswith(".lance"):
        table = open_lance(address)
        rows = table.count_rows()
        return TableColumns(table.schema, rows, [1] * rows, lambda name: table.to_table(columns=[name])[name])
    try:
        with fsspec.open(address, "rb") as file:
            known = pq.ParquetFile(file).metadata
    except pa.ArrowInvalid as error:
        raise ValueError(f"INPUT: {address!r} must be a Parquet table: {error}") from error
    groups = [known.row_group(number).num_rows for number in range(known.num_row_groups)]

    def read(name: str) -> Any:
        with fsspec.open(address, "rb") as file:
            return pq.ParquetFile(file).read(columns=[name])[name]

    return TableColumns(known.schema.to_arrow_schema(), known.num_rows, groups, read)


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


def place_beside(listing: str, name: str) -> str:
    """
    Finds what a list or a table names.

    Args:
        listing (`str`): path or URL of the list or table.
        name (`str`): a path or a URL; a relative path is seen from the folder that the list or table is in.

    Example:

    ```python
    >>> from transformers_autogaze.dataset_pruning.inputs import place_beside

    >>> place_beside("s3://bucket/table.parquet", "clips/a.mp4")
    's3://bucket/clips/a.mp4'

    ```
    """
    is_whole = os.path.isabs(name) or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", name)
    return name if is_whole else posixpath.join(posixpath.dirname(listing), name)


def _find_files(source: str) -> tuple[list[str], Any, str]:
    """Gives the files that a dataset consists of, their file system, and the folder that their names start from."""
    if not source.strip():
        raise ValueError(f"{_KINDS}, got {source!r}")
    system, path = fsspec.core.url_to_fs(source)
    if system.exists(path):
        name = path.rstrip("/")
        if name.endswith((".txt", ".parquet", ".lance", *VIDEO_SUFFIXES)):
            return [name], system, posixpath.dirname(name)
        if not system.isdir(path):
            raise ValueError(f"{_KINDS}, got the file {source!r}")
        found = sorted(system.find(path))
        videos = [file for file in found if file.lower().endswith(VIDEO_SUFFIXES)]
        files = videos or [file for file in found if file.endswith(".parquet")]
        if not files:
            raise ValueError(
                f"{_KINDS}, got the folder {source!r}, which holds no video ({', '.join(VIDEO_SUFFIXES)})"
            )
        return files, system, name
    if not re.search(r"[*?\[]", path):
        raise FileNotFoundError(f"{_KINDS}, but there is no {source!r}")
    files = sorted(file for file in system.glob(path) if file.endswith(".lance") or system.isfile(file))
    if not files:
        raise FileNotFoundError(f"{_KINDS}, but no file is like {source!r}")
    return files, system, posixpath.dirname(re.split(r"[*?\[]", path)[0])


def _full(system: Any, path: str) -> str:
    """Writes a path of a file system so that `fsspec.open` finds it: a local one as it is, others as a URL."""
    return path if "file" in _protocols(system) else system.unstrip_protocol(path)


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _beside(listing: str, names: list[str | None]) -> list[str | None]:
    return [None if name is None else place_beside(listing, name) for name in names]


def _plan_of(identities: Any, addresses: Any, rows: Any = None, groups: Any = None) -> pa.Table:
    count = len(identities)
    rows, groups = (rows, groups) if rows is not None else ([-1] * count, [-1] * count)
    columns = zip(PLAN, (identities, addresses, rows, groups), strict=True)
    return pa.table([pa.array(values, field.type) for field, values in columns], PLAN)


def _plan_table(address: str, name: str, video_column: str, id_column: str | None) -> pa.Table:
    table = open_table(address)
    kind = _column(table, video_column, address).type
    numbered = [f"{name}#{row}" for row in range(table.num_rows)]
    identities = None if id_column is None else _read_identities(table, id_column, address)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        names = table.read(video_column).to_pylist()
        identities = identities or [numbered[row] if name is None else name for row, name in enumerate(names)]
        return _plan_of(identities, _beside(address, names))
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
    return _plan_of(identities or numbered, [address] * table.num_rows, range(table.num_rows), list(groups))


def _column(table: TableColumns, name: str, address: str, argument: str = "--video-column") -> pa.Field:
    if name not in table.schema.names:
        raise ValueError(
            f"`{argument}` must be one of the columns {', '.join(table.schema.names)} of {address!r}, got {name!r}"
        )
    return table.schema.field(name)


def _read_identities(table: TableColumns, name: str, address: str) -> list[str]:
    _column(table, name, address, "--id-column")
    values = table.read(name)
    if values.null_count:
        raise ValueError(f"`--id-column` must name every video, but {name!r} of {address!r} has rows without a value")
    return [str(value) for value in values.to_pylist()]


def _check_unlike(identities: pa.ChunkedArray, id_column: str | None) -> None:
    """A path may come twice, for it is the same video; a name that somebody gave may not."""
    if id_column is None:
        return
    counts = identities.value_counts()
    twice = [pair["values"] for pair in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()]
    if twice:
        raise ValueError(
            f"`--id-column` must name no two videos alike, but {id_column!r} has {', '.join(map(repr, twice[:_SHOWN]))} more than "
            "once"
        )


def _first_of_each(plan: pa.Table) -> pa.Table:
    """Leaves one of the videos of one name."""
    first: dict[str, int] = {}
    for place, identity in enumerate(plan["identity"].to_pylist()):
        first.setdefault(identity, place)
    return plan if len(first) == plan.num_rows else plan.take(list(first.values()))


def split_plan(plan: pa.Table, num_rows: int) -> Iterator[tuple[int, int]]:
    """
    Cuts a plan into parts that are read by themselves.

    Args:
        plan (`pa.Table`): a plan.
        num_rows (`int`): how many videos, about, but what has to be read at once stays together.

    Yields:
        `tuple[int, int]`: the rows of the plan, the second number not included, that a part has.
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
