"""The inputs of the training commands (model, task and clips): their arguments, and how they are loaded."""

import argparse
from typing import Any

from transformers_autogaze_cli.arguments import a_count, a_name, a_path

from .. import FEATURES_SELECTOR
from ..configuration_autogaze import AutoGazeConfig
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


def clip_arguments() -> argparse.ArgumentParser:
    """Makes a parent parser with the arguments of the model to train and of the clips to train on."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("videos", type=a_path, metavar="VIDEOS", help="folder of videos to train on")
    parser.add_argument("--eval-videos", type=a_path, metavar="DIR", help="folder of videos to evaluate on")
    parser.add_argument(
        "--model", type=a_name, metavar="DIR", help="checkpoint to start from; a new model if not given"
    )
    parser.add_argument("--num-frames", type=a_count, default=16, metavar="N", help="frames of a clip")
    parser.add_argument(
        "--max-stride", type=int, default=4, metavar="N", help="largest distance between the frames of a clip"
    )
    parser.add_argument("--clips-per-video", type=int, default=1, metavar="N", help="clips of each video in an epoch")
    parser.add_argument("--in-memory", action="store_true", help="decode all videos once and keep them in memory")
    return parser


def task_arguments() -> argparse.ArgumentParser:
    """Makes a parent parser with the arguments of a [`GazeTask`]."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--task",
        choices=["pixels", "features"],
        default="pixels",
        help="loss that patches are chosen by: of rebuilt pixels, (40 - PSNR) / 20, or of an encoder's features, the share of "
        "their variance that a frame loses, 0..1",
    )
    parser.add_argument(
        "--feature-model",
        type=a_name,
        metavar="DIR",
        help="with --task features, the selector distilled from the encoder; if not given, the one from DINOv2 that comes "
        "with the package",
    )
    return parser


def load_task(options: argparse.Namespace, grid: GazeGrid) -> GazeTask:
    """Makes the task that the arguments name."""
    if options.task == "pixels":
        if options.feature_model is not None:
            raise ValueError(f"`--feature-model` needs `--task features`, got {options.feature_model!r}")
        return GazeTask(grid)
    folder = FEATURES_SELECTOR if options.feature_model is None else options.feature_model
    return GazeTask(grid, load_selector(folder, [FeatureGazeConfig], "--feature-model")[0])


def load_model(options: argparse.Namespace, **config: Any) -> tuple[AutoGazeModel, AutoGazeVideoProcessor]:
    """Loads the model that training starts from, in float32, and its video processor, or makes new ones."""
    if options.model is None:
        return AutoGazeModel(AutoGazeConfig(**config)), AutoGazeVideoProcessor()
    model, processor = load_selector(options.model, [AutoGazeConfig])
    return model, processor.video_processor


def load_clips(
    options: argparse.Namespace,
    model: AutoGazeModel,
    processor: AutoGazeVideoProcessor,
    augmentation: ClipAugmentation | None = None,
    schedule: BudgetSchedule | None = None,
    task: GazeTask | None = None,
    labels: dict[str, ClipLabels] | None = None,
) -> dict[str, GazeClipDataset | None]:
    """Makes the datasets that the arguments name: random clips, or those that have labels; whole frames to evaluate on."""
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
