"""
The command line of training: `autogaze train` and `autogaze train-grpo`.

A thin layer over `training`: every field of its dataclasses is an argument of the same name.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser, set_seed

from .configuration_autogaze import AutoGazeConfig
from .modeling_autogaze import AutoGazeModel
from .training.augmentation import ClipAugmentation
from .training.data import BudgetSchedule, GazeClipDataset
from .training.grpo import AutoGazeGRPOConfig, AutoGazeGRPOTrainer
from .training.ntp import AutoGazeTrainer, AutoGazeTrainingArguments
from .video_processing_autogaze import AutoGazeVideoProcessor


Settings = TypeVar("Settings")


def add_commands(commands: Any) -> None:
    """Adds the commands of training to those of the command line, an action of `argparse`'s `add_subparsers`."""
    train = commands.add_parser(
        "train",
        parents=[dataclass_arguments(AutoGazeTrainingArguments, BudgetSchedule, ClipAugmentation), clip_arguments()],
        help="train a model on labels (stage 1)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument(
        "--num-multi-token-pred", type=int, default=10, metavar="K", help="patches a step of a new model proposes"
    )
    train.set_defaults(run=_train)

    train_grpo = commands.add_parser(
        "train-grpo",
        parents=[dataclass_arguments(AutoGazeGRPOConfig, ClipAugmentation), clip_arguments()],
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


def load_model(options: argparse.Namespace, **config: Any) -> tuple[AutoGazeModel, AutoGazeVideoProcessor]:
    """Loads the model that training starts from, in float32, and its video processor, or makes new ones."""
    if options.model is None:
        return AutoGazeModel(AutoGazeConfig(**config)), AutoGazeVideoProcessor()
    model = AutoGazeModel.from_pretrained(options.model, dtype="float32")
    return model, AutoGazeVideoProcessor.from_pretrained(options.model)


def load_clips(
    options: argparse.Namespace, model: AutoGazeModel, processor: AutoGazeVideoProcessor, **settings: Any
) -> dict[str, GazeClipDataset | None]:
    """Makes the datasets that the arguments name; those for evaluation hold whole frames, not varied."""
    shared = {
        "config": model.config,
        "num_frames": options.num_frames,
        "max_stride": options.max_stride,
        "in_memory": options.in_memory,
        "processor": processor,
        "seed": options.seed,
        "schedule": settings.get("schedule"),
    }
    evaluation = None
    if options.eval_videos is not None:
        evaluation = GazeClipDataset(options.eval_videos, **shared)
    training = GazeClipDataset(options.videos, **{**shared, **settings}, clips_per_video=options.clips_per_video)
    return {"train_dataset": training, "eval_dataset": evaluation}


def _train(options: argparse.Namespace) -> None:
    args = from_arguments(AutoGazeTrainingArguments, options)
    schedule, augmentation = (from_arguments(settings, options) for settings in (BudgetSchedule, ClipAugmentation))
    set_seed(args.seed)
    model, processor = load_model(options, decoder_config={"num_multi_token_pred": options.num_multi_token_pred})
    clips = load_clips(options, model, processor, schedule=schedule, augmentation=augmentation)
    trainer = AutoGazeTrainer(model, args, processing_class=processor, **clips)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


def _train_grpo(options: argparse.Namespace) -> None:
    if options.model is None:
        raise ValueError("`--model` must name a checkpoint to train further, got none")
    args, augmentation = (from_arguments(settings, options) for settings in (AutoGazeGRPOConfig, ClipAugmentation))
    model, processor = load_model(options)
    clips = load_clips(options, model, processor, augmentation=augmentation)
    trainer = AutoGazeGRPOTrainer(model, args, processing_class=processor, **clips)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
