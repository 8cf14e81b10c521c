"""The inputs of the training commands: arguments and loading of the model, the task and the clips."""

import argparse
from typing import Any, cast

from transformers_autogaze_cli.arguments import nonempty_path, nonempty_string, positive_integer

from .. import FEATURES_SELECTOR
from ..configuration_autogaze import AutoGazeConfig
from ..feature_gaze_autogaze import FeatureGazeModel
from ..feature_network_autogaze import FeatureGazeConfig
from ..grid_autogaze import GazeGrid
from ..hub.checkpoints import load_selector
from ..modeling_autogaze import AutoGazeModel
from ..training.augmentation import ClipAugmentation
from ..training.data import BudgetSchedule, GazeClipDataset
from ..training.label_files import ClipLabels
from ..training.task import GazeTask
from ..training.videos import VideoCollection
from ..video_processing_autogaze import AutoGazeVideoProcessor


def clip_arguments(model_help: str) -> argparse.ArgumentParser:
    """Makes a parent parser with the arguments of the model and of the training clips."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("videos", type=nonempty_path, metavar="VIDEOS", help="folder of videos to train on")
    parser.add_argument("--eval-videos", type=nonempty_path, metavar="DIR", help="folder of videos to evaluate on")
    parser.add_argument("--model", type=nonempty_string, metavar="DIR", help=model_help)
    parser.add_argument("--num-frames", type=positive_integer, default=16, metavar="N", help="frames of a clip")
    parser.add_argument(
        "--max-stride", type=int, default=4, metavar="N", help="largest distance between the frames of a clip"
    )
    parser.add_argument("--clips-per-video", type=int, default=1, metavar="N", help="clips of each video in an epoch")
    parser.add_argument("--in-memory", action="store_true", help="decode all videos once and keep them in memory")
    return parser


def load_task(options: argparse.Namespace, grid: GazeGrid) -> GazeTask:
    """Makes the task of the arguments."""
    if options.task == "pixels":
        if options.feature_model is not None:
            raise ValueError(f"`--feature-model` needs `--task features`, got {options.feature_model!r}")
        return GazeTask(grid)
    folder = FEATURES_SELECTOR if options.feature_model is None else options.feature_model
    model, _ = load_selector(folder, [FeatureGazeConfig], "--feature-model")
    try:
        return GazeTask(grid, cast(FeatureGazeModel, model))
    except ValueError as error:
        raise ValueError(f"`--feature-model` must take patches of {grid}: {error}") from error


def load_model(options: argparse.Namespace, **config: Any) -> tuple[AutoGazeModel, AutoGazeVideoProcessor]:
    """Loads the initial model in float32 and its video processor, or makes new ones."""
    if options.model is None:
        return AutoGazeModel(AutoGazeConfig(**config)), AutoGazeVideoProcessor()
    model, processor = load_selector(options.model, [AutoGazeConfig])
    return cast(AutoGazeModel, model), processor.video_processor


def load_clips(
    options: argparse.Namespace,
    model: AutoGazeModel,
    processor: AutoGazeVideoProcessor,
    augmentation: ClipAugmentation | None = None,
    schedule: BudgetSchedule | None = None,
    task: GazeTask | None = None,
    labels: dict[str, ClipLabels] | None = None,
) -> dict[str, GazeClipDataset | None]:
    """Makes the datasets of the arguments: random or labelled clips for training, and clips of whole frames for evaluation."""
    shared = {
        "config": model.config,
        "num_frames": options.num_frames,
        "max_stride": options.max_stride,
        "processor": processor,
        "seed": options.seed,
    }
    evaluation = None
    if options.eval_videos is not None:
        videos = VideoCollection(options.eval_videos, in_memory=options.in_memory)
        evaluation = GazeClipDataset(videos, schedule=schedule, task=task, **shared)
    shared["clips_per_video"] = options.clips_per_video
    videos = VideoCollection(options.videos, in_memory=options.in_memory)
    if labels is None:
        training = GazeClipDataset(videos, augmentation=augmentation, schedule=schedule, task=task, **shared)
    else:
        training = GazeClipDataset(videos, labels=labels, **shared)
    return {"train_dataset": training, "eval_dataset": evaluation}
