"""One worker of a pool: it loads the selector once, then prunes one video after the other and writes its row."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ..pruning.video_pruning import VideoPruning
from ..utils.output_files import replacing
from .reading import Video, retry, video_source
from .rows import PruneSettings, row_of, row_of_error
from .samples import write_sample
from .shards import count_try, key_of, tar_of, write_row


VIDEOS = pa.schema(
    [("identity", pa.string()), ("address", pa.string()), ("contents", pa.large_binary()), ("error", pa.string())]
)
"""Columns of the tables of [`Video`]s that workers take."""
_MAX_TRIES = 3
_SAMPLE_COLUMNS = (
    "identity",
    "width",
    "height",
    "fps",
    "frame_indices",
    "frame_times",
    "scales",
    "patch_size",
    "extent",
)


class PruneWorker:
    """
    Prunes videos and writes their rows.

    Args:
        settings ([`PruneSettings`]): selector, budgets and frames.
        folder (`Path`): folder of the rows that are not in a shard yet.
        device (`str`): `"cpu"`, on which each worker computes with one thread, or `"cuda"`.
    """

    def __init__(self, settings: PruneSettings, folder: Path, device: str):
        if device == "cpu":
            torch.set_num_threads(1)
        self.settings, self.folder = settings, folder
        self.selector, self.processor = settings.load(device)

    def __call__(self, videos: pa.Table) -> pa.Table:
        """Prunes the videos of a table with the columns `VIDEOS`; returns a table of their names."""
        for number in range(videos.num_rows):
            self.prune(Video(**{name: videos[name][number].as_py() for name in VIDEOS.names}))
        return videos.select(["identity"])

    def prune(self, video: Video) -> None:
        """Prunes a video and writes its row, also of a video that cannot be read."""
        if video.error is not None:
            write_row(self.folder, row_of_error(video.identity, video.error))
        elif count_try(self.folder, video.identity) > _MAX_TRIES:
            reason = f"the process that pruned it ended {_MAX_TRIES} times without an answer"
            write_row(self.folder, row_of_error(video.identity, reason))
        else:
            try:
                with video_source(video) as source:
                    retry(lambda: self._prune(video.identity, source))
            except Exception as error:  # A broken file can raise anything.
                write_row(self.folder, row_of_error(video.identity, error))

    def _prune(self, identity: str, source: str | bytes) -> None:
        pruning = self.settings.open(source, self.selector, self.processor)
        if self.settings.keeps_patches:
            # Before the row: then one pass over the video both selects patches and cuts them out.
            with replacing(tar_of(self.folder, identity)) as unfinished:
                write_sample(
                    unfinished, key_of(identity), pruning.kept_patches(), lambda: _metadata(identity, pruning)
                )
        # The row is written last, as a video with a row counts as finished.
        write_row(self.folder, row_of(identity, pruning))


def _metadata(identity: str, pruning: VideoPruning) -> dict[str, Any]:
    row = row_of(identity, pruning)
    return {name: row[name] for name in _SAMPLE_COLUMNS}
