"""What one worker does: a selector, and videos one after the other, each of which ends as a row that is written."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ..output_files import replacing
from ..pruning import VideoPruning
from .reading import Video, opened, patiently
from .rows import PruneSettings, row_of, row_of_error
from .samples import write_sample
from .shards import count_try, key_of, tar_of, write_row


VIDEOS = pa.schema(
    [("identity", pa.string()), ("address", pa.string()), ("contents", pa.large_binary()), ("error", pa.string())]
)
"""Columns of [`Video`]s on their way to a worker."""
_MOST_TRIES = 3
_FACTS = ("identity", "width", "height", "fps", "frame_indices", "frame_times", "scales", "patch_size", "extent")


class PruneWorker:
    """
    Prunes videos and writes their rows.

    Args:
        settings ([`PruneSettings`]): what decides what is kept.
        folder (`Path`): where the rows wait for their shard.
        device (`str`): where to compute. On the CPU, with one thread: more workers make it faster, and each computes alike.
    """

    def __init__(self, settings: PruneSettings, folder: Path, device: str):
        if device == "cpu":
            torch.set_num_threads(1)
        self.settings, self.folder = settings, folder
        self.selector, self.processor = settings.load(device)

    def __call__(self, videos: pa.Table) -> pa.Table:
        """Prunes videos, of the columns `VIDEOS`, and gives their names."""
        for number in range(videos.num_rows):
            self.prune(Video(**{name: videos[name][number].as_py() for name in VIDEOS.names}))
        return videos.select(["identity"])

    def prune(self, video: Video) -> None:
        """Prunes a video and writes its row, whatever is wrong with it."""
        if video.error is not None:
            write_row(self.folder, row_of_error(video.identity, video.error))
        elif count_try(self.folder, video.identity) > _MOST_TRIES:
            reason = f"the process that pruned it ended {_MOST_TRIES} times without an answer"
            write_row(self.folder, row_of_error(video.identity, reason))
        else:
            try:
                with opened(video) as source:
                    patiently(lambda: self._prune(video.identity, source))
            except Exception as error:  # A broken file can raise anything.
                write_row(self.folder, row_of_error(video.identity, error))

    def _prune(self, identity: str, source: str | bytes) -> None:
        pruning = self.settings.open(source, self.selector, self.processor)
        if self.settings.keeps_patches:
            # The first pass over the video gazes and cuts out at once.
            with replacing(tar_of(self.folder, identity)) as unfinished:
                write_sample(unfinished, key_of(identity), pruning.kept_patches(), lambda: _facts(identity, pruning))
        # The row comes last: what has a row is done.
        write_row(self.folder, row_of(identity, pruning))


def _facts(identity: str, pruning: VideoPruning) -> dict[str, Any]:
    row = row_of(identity, pruning)
    return {name: row[name] for name in _FACTS}
