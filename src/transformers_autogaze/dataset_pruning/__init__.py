"""
Pruning whole datasets of videos: a row for each video in Parquet shards, by many workers, in runs that may break off.

`prune_dataset` does it on Ray Data; the other modules know nothing of Ray, and each video is [`prune_video`]'s work.
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
