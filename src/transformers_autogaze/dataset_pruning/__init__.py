"""
Prunes datasets of videos on many workers into Parquet shards with one row per video; an interrupted run can be resumed.

`job` runs the workers on Ray Data; the other modules do not use Ray. Each video is pruned by [`prune_video`].
"""

from importlib import import_module
from typing import Any


_MODULES = {
    "PruneSettings": "rows",
    "gaze_of_row": "rows",
    "prune_dataset": "job",
    "prune_to_row": "rows",
    "read_rows": "shards",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
