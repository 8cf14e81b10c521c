"""
The output folder of a dataset: each row is written to a file of its own at first, and complete shards are joined from these.

Files take their names when they are complete, so that rows survive a run that is interrupted at any time.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..utils.json_files import describe_json, read_json_object
from ..utils.output_files import check_folder, lock_file, replacing
from .samples import join_samples


_NUMBERS = pa.list_(pa.int32())
ROWS = pa.schema(
    [
        ("identity", pa.string()),
        ("error", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("duration", pa.float64()),
        ("frame_indices", _NUMBERS),
        ("frame_times", pa.list_(pa.float64())),
        ("scales", pa.list_(_NUMBERS)),
        ("patch_size", pa.int32()),
        ("frame_sampling_rate", pa.int32()),
        ("extent", _NUMBERS),
        ("ids", _NUMBERS),
        ("patches_each_frame", _NUMBERS),
        ("patches_each_scale", pa.list_(pa.int64())),
        ("num_frames", pa.int64()),
        ("num_patches", pa.int64()),
        ("kept_ratio", pa.float64()),
        ("reduction_factor", pa.float64()),
        ("psnr", pa.float64()),
    ]
)
"""Columns of the rows, which docs/scale.md describes."""
_SETTINGS, _UNFINISHED, _LOCK = "settings.json", "unfinished", "lock"
_VERSION = 1
_ROW_GROUP_BYTES = 2**25  # about, in memory


class PrunedFolder:
    """
    An output folder, locked against other runs until the block ends.

    It contains `settings.json`, `shard-00000.parquet` and so on and, if kept patches are written, `shard-00000.tar` and so on.
    Rows whose shard is not complete are in `unfinished/`, one file each.

    Args:
        folder (`str` or `os.PathLike`): the folder; made if it is missing.
        settings (`Mapping[str, Any]`): the settings that all rows of the folder are made with.

    Attributes:
        shards (`list[Path]`): the complete shards.

    Raises:
        ValueError: if the folder is a file, another run writes to it, or its rows were made with other settings.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        check_folder(self.folder)
        self.unfinished = self.folder / _UNFINISHED
        self._check_settings(dict(settings))
        self.unfinished.mkdir(parents=True, exist_ok=True)
        self._lock = (self.unfinished / _LOCK).open("a")
        try:
            lock_file(
                self._lock,
                f"OUTPUT {str(self.folder)!r} is being written to by another process: wait for it, or give another folder",
            )
            self._write_settings(dict(settings))
            self._remove_leftovers()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "PrunedFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    @property
    def shards(self) -> list[Path]:
        return find_shards(self.folder)

    def finished(self) -> set[str]:
        """Returns the names of the videos whose rows are in shards."""
        return {name for shard in self.shards for name in read_shard(shard, ["identity"])[0].to_pylist()}

    def waiting(self) -> set[str]:
        """Returns the keys (see [`key_of`]) of the videos whose rows are not in a shard yet."""
        return {path.stem for path in self.unfinished.glob("*.parquet")}

    def free_numbers(self) -> Iterator[int]:
        """Yields numbers that no shard has, in ascending order, so that a resumed run numbers shards as one run would have."""
        taken = {int(path.stem.rpartition("-")[2]) for path in self.shards}
        return (number for number in count() if number not in taken)

    def remove_unfinished(self) -> None:
        """Removes `unfinished/` if every row is in a shard."""
        if not self.waiting():
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / _SETTINGS
        if not path.exists():
            if find_shards(self.folder):
                raise ValueError(
                    f"OUTPUT must be a folder that is new or of an earlier run, but {str(path)!r} is missing"
                )
            return
        where, expected = f"OUTPUT: {str(path)!r}", "the settings of an earlier run"
        contents = read_json_object(path, where, expected, ["version", "settings"])
        version, made_with = contents["version"], contents["settings"]
        if not isinstance(made_with, dict):
            raise ValueError(f"{where} must hold {expected}, got {describe_json(made_with)} as 'settings'")
        if version != _VERSION:
            raise ValueError(
                f"OUTPUT: {str(path)!r} must be of version {_VERSION}, got {version}; give another folder"
            )
        # A run that wrote no row leaves its settings behind; any others may follow.
        for name, value in settings.items() if self.shards or self.waiting() else ():
            if made_with.get(name) != value:
                raise ValueError(
                    f"OUTPUT {str(self.folder)!r} has rows that were made with `{name}` {made_with.get(name)}, but it is {value} "
                    "now: give the same settings, or another folder"
                )

    def _write_settings(self, settings: dict[str, Any]) -> None:
        if not (self.folder / _SETTINGS).exists() or not (self.shards or self.waiting()):
            with replacing(self.folder / _SETTINGS) as unfinished:
                unfinished.write_text(
                    json.dumps({"version": _VERSION, "settings": settings}, indent=1), encoding="utf-8"
                )

    def _remove_leftovers(self) -> None:
        """Removes what an interrupted run left: incomplete files, and files of rows that are in a shard."""
        for path in self.unfinished.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".tries" or (path.suffix == ".parquet" and not _is_whole(path)):
                path.unlink()
        for path in self.folder.glob(".unfinished-*"):
            shutil.rmtree(path, ignore_errors=True)
        keys = {key_of(name) for name in self.finished()} if self.waiting() else ()
        for key in keys:
            _remove_files(self.unfinished, key)


def key_of(identity: str) -> str:
    """Returns the name that the files of a video start with: 32 hexadecimal digits."""
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def find_shards(folder: str | os.PathLike) -> list[Path]:
    """Finds the shards of a folder, in order."""
    return sorted(Path(folder).glob("shard-*.parquet"))


def tar_of(folder: Path, identity: str) -> Path:
    """Returns the path of a video's kept patches before they are in a shard; `folder` is the folder `unfinished`."""
    return folder / f"{key_of(identity)}.tar"


def write_row(folder: Path, row: Mapping[str, Any]) -> None:
    """
    Writes a row to a file of its own, until its shard is complete.

    Args:
        folder (`Path`): the folder `unfinished`.
        row (`Mapping[str, Any]`): the row.
    """
    key = key_of(row["identity"])
    with replacing(folder / f"{key}.parquet") as unfinished:
        pq.write_table(pa.Table.from_pylist([dict(row)], ROWS), unfinished)


def count_try(folder: Path, identity: str) -> int:
    """
    Counts the attempts at a video in a run, so that a video that crashes its worker is not tried forever.

    Args:
        folder (`Path`): the folder `unfinished`.
        identity (`str`): the video.

    Returns:
        `int`: the number of this attempt, from 1.
    """
    path = folder / f"{key_of(identity)}.tries"
    with path.open("ab") as file:
        file.write(b".")
    return path.stat().st_size


def write_shard(folder: Path, number: int, identities: Sequence[str]) -> None:
    """
    Joins rows, and kept patches if there are any, into a shard, and removes their files.

    Args:
        folder (`Path`): the output folder.
        number (`int`): the number of the shard.
        identities (`Sequence[str]`): names of the videos of the shard, in order.
    """
    keys, unfinished = [key_of(identity) for identity in identities], folder / _UNFINISHED
    tars = [path for identity in identities if (path := tar_of(unfinished, identity)).exists()]
    if tars:
        with replacing(folder / f"shard-{number:05}.tar") as beside:
            join_samples(beside, tars)
    with replacing(folder / f"shard-{number:05}.parquet") as beside, pq.ParquetWriter(beside, ROWS) as writer:
        parts: list[pa.Table] = []
        for key in keys:
            parts.append(pq.read_table(unfinished / f"{key}.parquet", schema=ROWS))
            if sum(part.nbytes for part in parts) > _ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(parts).combine_chunks())
                parts = []
        if parts:
            writer.write_table(pa.concat_tables(parts).combine_chunks())
    for key in keys:
        _remove_files(unfinished, key)


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """
    Reads a shard.

    Args:
        path (`Path`): the shard.
        columns (`Sequence[str]`, *optional*): the columns to read; all by default.

    Returns:
        `pa.Table`

    Raises:
        ValueError: if the file is not a Parquet table, or has not the columns of a shard.
    """
    wanted = ROWS.names if columns is None else list(columns)
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"shard {str(path)!r} must be a whole Parquet table, but reading it gave {error}") from error
    with file:
        found = file.schema_arrow.names
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(
                f"shard {str(path)!r} must have the columns that `autogaze prune-dataset` writes, but {', '.join(missing)} are "
                f"missing; it has {', '.join(found)}"
            )
        return file.read(columns=wanted)


def read_rows(folder: str | os.PathLike, columns: Sequence[str] | None = None) -> pa.Table:
    """
    Reads the rows of an output folder, sorted by `identity`.

    Args:
        folder (`str` or `os.PathLike`): a folder that `autogaze prune-dataset` wrote.
        columns (`Sequence[str]`, *optional*): the columns to read; all by default.

    Returns:
        `pa.Table`

    Raises:
        ValueError: if the folder has no shard, or one cannot be read.
    """
    shards = find_shards(folder)
    if not shards:
        raise ValueError(f"`folder` must hold shards that `autogaze prune-dataset` wrote, got {str(folder)!r}")
    wanted = None if columns is None else list(dict.fromkeys([*columns, "identity"]))
    table = pa.concat_tables([read_shard(shard, wanted) for shard in shards])
    table = table.take(pc.sort_indices(table, sort_keys=[("identity", "ascending")]))
    return table if columns is None else table.select(list(columns))


def _is_whole(path: Path) -> bool:
    try:
        return pq.read_metadata(path).num_rows == 1
    except (OSError, pa.ArrowInvalid):
        return False


def _remove_files(folder: Path, key: str) -> None:
    for suffix in (".parquet", ".tar", ".tries"):
        (folder / f"{key}{suffix}").unlink(missing_ok=True)
