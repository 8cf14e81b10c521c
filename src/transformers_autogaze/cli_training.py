"""
The command line of training: `autogaze label`, `autogaze train` and `autogaze train-grpo`.

A thin layer over `training`: every field of its dataclasses is an argument of the same name.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModel, HfArgumentParser, set_seed

from . import FEATURES_SELECTOR
from .configuration_autogaze import AutoGazeConfig
from .grid_autogaze import GazeGrid
from .modeling_autogaze import AutoGazeModel
from .training.augmentation import ClipAugmentation
from .training.data import BudgetSchedule, GazeClipDataset
from .training.grpo import AutoGazeGRPOConfig, AutoGazeGRPOTrainer
from .training.label_files import ClipLabels, read_labels
from .training.labels import GreedyLabeller, label_videos
from .training.ntp import AutoGazeTrainer, AutoGazeTrainingArguments
from .training.task import GazeTask
from .training.videos import VideoCollection
from .video_processing_autogaze import AutoGazeVideoProcessor


Settings = TypeVar("Settings")


def add_commands(commands: Any) -> None:
    """Adds the commands of training to those of the command line, an action of `argparse`'s `add_subparsers`."""
    label = commands.add_parser(
        "label",
        parents=[task_arguments()],
        help="label videos by greedy search, once, to train on later",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    label.add_argument("videos", type=Path, metavar="VIDEOS", help="folder of videos")
    label.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    label.add_argument("--num-frames", type=int, default=16, metavar="N", help="frames to take of each video")
    label.add_argument("--gazing-ratio", type=float, default=0.1, metavar="R", help="share of patches to choose, 0..1")
    label.add_argument("--task-loss-requirement", type=float, metavar="L", help="loss at which a frame is done")
    label.add_argument("--shard", default="1/1", metavar="I/N", help="label only the I-th of N parts of the videos")
    label.add_argument("--batch-size", type=int, default=8, metavar="N", help="clips to search together")
    label.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that decode")
    label.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to search")
    label.set_defaults(run=_label)

    train = commands.add_parser(
        "train",
        parents=[
            dataclass_arguments(AutoGazeTrainingArguments, BudgetSchedule, ClipAugmentation),
            clip_arguments(),
            task_arguments(),
        ],
        help="train a model on labels (stage 1)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument(
        "--num-multi-token-pred", type=int, default=10, metavar="K", help="patches a step of a new model proposes"
    )
    train.add_argument(
        "--labels",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="label files of the videos to train on, in place of random clips that are labelled on the way",
    )
    train.set_defaults(run=_train)

    train_grpo = commands.add_parser(
        "train-grpo",
        parents=[dataclass_arguments(AutoGazeGRPOConfig, ClipAugmentation), clip_arguments(), task_arguments()],
        help="train a model further on gazes that it samples itself (stage 2)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train_grpo.set_defaults(run=_train_grpo)


def dataclass_arguments(*types: type) -> argparse.ArgumentParser:
    """Makes a parent parser with one argument for every field of some dataclasses."""
    return HfArgumentParser(types, add_help=False)


def from_arguments(settings: type[Settings], options: argparse.Namespace) -> Settings:
    """Builds a dataclass from arguments that [`dataclass_arguments`] made."""
    names = [field.name for field in dataclasses.fields(settings) if field.init]
    return settings(**{name: getattr(options, name) for name in names})


def clip_arguments() -> argparse.ArgumentParser:
    """Makes a parent parser with the arguments of a model to train and the clips to train it on."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="folder of videos to train on")
    parser.add_argument("--eval-videos", type=Path, metavar="DIR", help="folder of videos to evaluate on")
    parser.add_argument("--model", metavar="DIR", help="checkpoint to start from; a new model if not given")
    parser.add_argument("--num-frames", type=int, default=16, metavar="N", help="frames of a clip")
    parser.add_argument("--max-stride", type=int, default=4, metavar="N", help="a clip takes every N-th frame at most")
    parser.add_argument("--clips-per-video", type=int, default=1, metavar="N", help="clips of each video in an epoch")
    parser.add_argument("--in-memory", action="store_true", help="decode all videos once and hold them")
    return parser


def task_arguments() -> argparse.ArgumentParser:
    """Makes a parent parser with the arguments of a [`GazeTask`]."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--task",
        choices=["pixels", "features"],
        default="pixels",
        help="what patches are worth: how well they rebuild pixels, a loss being (40 - PSNR) / 20, or what an encoder keeps, a "
        "loss being the share of its feature variance that a frame loses, 0..1",
    )
    parser.add_argument(
        "--feature-model",
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
    folder = options.feature_model or FEATURES_SELECTOR
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    except OSError as error:
        raise ValueError(
            f"`--feature-model` must be a distilled selector's folder or Hub repository, got {str(folder)!r}: {error}"
        ) from error
    return GazeTask(grid, model)


def load_model(options: argparse.Namespace, **config: Any) -> tuple[AutoGazeModel, AutoGazeVideoProcessor]:
    """Loads the model that training starts from, in float32, and its video processor, or makes new ones."""
    if options.model is None:
        return AutoGazeModel(AutoGazeConfig(**config)), AutoGazeVideoProcessor()
    model = AutoGazeModel.from_pretrained(options.model, dtype="float32")
    return model, AutoGazeVideoProcessor.from_pretrained(options.model)


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


def _label(options: argparse.Namespace) -> None:
    try:
        shard, num_shards = (int(part) for part in options.shard.split("/"))
    except ValueError:
        raise ValueError(f"`--shard` must be two numbers such as 3/16, got {options.shard!r}") from None
    grid = AutoGazeConfig().grid
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
        options.device,
        (shard, num_shards),
    )
    print(f"{written}: {len(read_labels(written))} videos labelled, {videos.num_skipped} skipped")


def _train(options: argparse.Namespace) -> None:
    args = from_arguments(AutoGazeTrainingArguments, options)
    schedule, augmentation = (from_arguments(settings, options) for settings in (BudgetSchedule, ClipAugmentation))
    set_seed(args.seed)
    model, processor = load_model(options, decoder_config={"num_multi_token_pred": options.num_multi_token_pred})
    task, labels = load_task(options, model.config.grid), None
    if options.labels is not None:
        settings = {"num_frames": options.num_frames // model.config.frame_sampling_rate, **task.settings}
        labels = read_labels(*options.labels, grid=model.config.grid, settings=settings)
    clips = load_clips(options, model, processor, augmentation, schedule, task, labels)
    trainer = AutoGazeTrainer(model, args, processing_class=processor, task=task, **clips)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


def _train_grpo(options: argparse.Namespace) -> None:
    if options.model is None:
        raise ValueError("`--model` must name a checkpoint to train further, got none")
    args, augmentation = (from_arguments(settings, options) for settings in (AutoGazeGRPOConfig, ClipAugmentation))
    model, processor = load_model(options)
    clips = load_clips(options, model, processor, augmentation)
    task = load_task(options, model.config.grid)
    trainer = AutoGazeGRPOTrainer(model, args, reconstruction=task, processing_class=processor, **clips)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
