"""The implementation of `autogaze label`: labels the videos of a folder with `training.labels`."""

import argparse

from ..configuration_autogaze import AutoGazeConfig
from ..hub.checkpoints import check_device
from ..token_budgets_autogaze import check_budgets
from ..training.label_files import read_labels
from ..training.labels import GreedyLabeller, label_videos
from ..training.videos import VideoCollection
from ..utils.video_files import find_videos
from .training_inputs import load_task


def label(options: argparse.Namespace) -> None:
    """Runs `autogaze label`."""
    try:
        shard, num_shards = (int(part) for part in options.shard.split("/"))
    except ValueError:
        raise ValueError(f"`--shard` must be two numbers such as 3/16, got {options.shard!r}") from None
    check_budgets(options.gazing_ratio, options.task_loss_requirement)
    find_videos(options.videos, "VIDEOS")
    grid = AutoGazeConfig().grid
    device = check_device(options.device)
    videos = VideoCollection(options.videos)
    labeller = GreedyLabeller(
        grid,
        load_task(options, grid),
        gazing_ratio=options.gazing_ratio,
        task_loss_requirement=options.task_loss_requirement,
    )
    written = label_videos(
        videos,
        labeller,
        options.output,
        options.num_frames,
        options.batch_size,
        options.num_workers,
        device,
        (shard, num_shards),
    )
    print(f"{written}: {len(read_labels(written))} videos labelled, {videos.num_skipped} skipped")
