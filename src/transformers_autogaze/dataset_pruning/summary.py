"""Totals over the rows of a dataset, as numbers and as a table."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from .shards import find_shards, read_shard


_COLUMNS = ["error", "duration", "num_frames", "num_patches", "reduction_factor"]
_MAX_REASONS, _MAX_CHARS = 5, 90  # reasons of errors, and characters of each, in the table


@dataclass
class DatasetSummary:
    """
    Totals over all rows of a folder.

    Args:
        folder (`Path`): the folder.
        num_videos, num_failed (`int`): number of videos, and of those that could not be pruned.
        num_frames, num_patches (`int`): number of frames taken, and of patches kept.
        num_dense (`float`): number of tokens of a dense encoder for these frames.
        seconds_of_video (`float`): total duration of the videos whose files have one.
        errors (`Counter`): number of videos for each reason; names and numbers in reasons are replaced by `..`.
        num_done (`int`): number of videos pruned in this run.
        seconds (`float`): duration of this run.
    """

    folder: Path
    num_videos: int = 0
    num_failed: int = 0
    num_frames: int = 0
    num_patches: int = 0
    num_dense: float = 0.0
    seconds_of_video: float = 0.0
    errors: Counter = field(default_factory=Counter)
    num_done: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, folder: Path, num_done: int = 0, seconds: float = 0.0) -> "DatasetSummary":
        """Adds up the shards of a folder; `num_done` and `seconds` are those of the run that ends."""
        summary = cls(folder, num_done=num_done, seconds=seconds)
        for shard in find_shards(folder):
            summary._add(read_shard(shard, _COLUMNS))
        return summary

    def _add(self, rows: pa.Table) -> None:
        self.num_videos += rows.num_rows
        self.num_failed += rows.num_rows - rows["error"].null_count
        for name, column in (
            ("num_frames", "num_frames"),
            ("num_patches", "num_patches"),
            ("seconds_of_video", "duration"),
        ):
            setattr(self, name, getattr(self, name) + (pc.sum(rows[column]).as_py() or 0))
        self.num_dense += pc.sum(pc.multiply(rows["num_patches"], rows["reduction_factor"])).as_py() or 0
        self.errors.update(re.sub(r"'[^']*'|\d+", "..", text) for text in rows["error"].drop_null().to_pylist())

    def __str__(self) -> str:
        factor = f"{self.num_dense / self.num_patches:.1f}x fewer than " if self.num_patches else "of "
        mean = f", {self.num_patches / self.num_frames:.1f} a frame" if self.num_frames else ""
        rate = f", {self.num_done / self.seconds:.2f} videos/s" if self.num_done else ""
        rows = {
            "videos": f"{self.num_videos}, {self.num_failed} of them with an error; {self.num_done} done in this run",
            "frames": f"{self.num_frames} of {self.seconds_of_video / 3600:.2f} hours of video",
            "patches kept": f"{self.num_patches}{mean}",
            "tokens": f"{factor}the {self.num_dense:.0f} of a dense encoder",
            "time": f"{self.seconds:.1f} s{rate}",
            "written": str(self.folder),
        }
        lines = [f"{name:<16}{value}" for name, value in rows.items()]
        for reason, number in self.errors.most_common(_MAX_REASONS):
            lines.append(
                f"{'errors':<16}{number} x {reason if len(reason) <= _MAX_CHARS else f'{reason[:_MAX_CHARS]}..'}"
            )
        return "\n".join(lines)
