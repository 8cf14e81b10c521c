"""
The command line of training: `autogaze label`, `autogaze train` and `autogaze train-grpo`.

A thin layer over `training`: every field of its dataclasses is an argument of the same name.
"""

import argparse
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from transformers_autogaze_cli import COMMANDS
from transformers_autogaze_cli.arguments import a_count, a_name, a_number, a_path, add_device, add_output

from . import FEATURES_SELECTOR
from .checkpoints import check_device, load_selector
from .configuration_autogaze import AutoGazeConfig
from .feature_network_autogaze import FeatureGazeConfig
from .grid_autogaze import GazeGrid
from .model_cards import make_card
from .modeling_autogaze import AutoGazeModel
from .output_files import check_folder, check_not_inputs, replacing
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
        description=f"{COMMANDS['label'][0]}.".capitalize(),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    label.add_argument("videos", type=a_path, metavar="VIDEOS", help="folder of videos")
    add_output(label, "FILE", "JSON file to write")
    label.add_argument("--num-frames", type=a_count, default=16, metavar="N", help="frames to take of each video")
    label.add_argument(
        "--gazing-ratio", type=a_number, default=0.1, metavar="R", help="share of patches to choose, 0..1"
    )
    label.add_argument("--task-loss-requirement", type=a_number, metavar="L", help="loss at which a frame is done")
    label.add_argument("--shard", default="1/1", metavar="I/N", help="label only the I-th of N parts of the videos")
    label.add_argument("--batch-size", type=a_count, default=8, metavar="N", help="clips to search together")
    label.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that decode")
    add_device(label)
    label.set_defaults(run=_label)

    train = commands.add_parser(
        "train",
        parents=[
            clip_arguments(),
            task_arguments(),
            dataclass_arguments(AutoGazeTrainingArguments, BudgetSchedule, ClipAugmentation),
        ],
        description=f"{COMMANDS['train'][0]}.".capitalize(),
        usage="autogaze train VIDEOS -o DIR [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument(
        "--num-multi-token-pred", type=int, default=10, metavar="K", help="patches a step of a new model proposes"
    )
    train.add_argument(
        "--labels",
        nargs="+",
        type=a_path,
        metavar="FILE",
        help="label files of the videos to train on, in place of random clips that are labelled on the way",
    )
    train.set_defaults(run=_train)

    train_grpo = commands.add_parser(
        "train-grpo",
        parents=[clip_arguments(), task_arguments(), dataclass_arguments(AutoGazeGRPOConfig, ClipAugmentation)],
        description=f"{COMMANDS['train-grpo'][0]}.".capitalize(),
        usage="autogaze train-grpo VIDEOS --model DIR -o DIR [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train_grpo.set_defaults(run=_train_grpo)


def dataclass_arguments(*types: type) -> argparse.ArgumentParser:
    """
    Makes a parent parser with one argument for every field of some dataclasses.

    Fields of their own come first, each dataclass in a group; those of [`~transformers.TrainingArguments`] come last.
    """
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)} - {"output_dir"}
    own, others = [], []
    for settings in types:
        names = {field.name for field in dataclasses.fields(settings) if field.init}
        of_trainer = names & inherited if issubclass(settings, TrainingArguments) else set()
        own.append(_select_fields(settings, names - of_trainer, f"{settings.__name__}, of this package"))
        others.append(_select_fields(settings, of_trainer, "TrainingArguments, of transformers"))
    return HfArgumentParser([made for made in (*own, *others) if dataclasses.fields(made)], add_help=False)


def _select_fields(settings: type, names: Collection[str], group: str) -> type:
    """Makes a dataclass of some fields of another one, for a group of arguments of that name."""
    hints = get_type_hints(settings)
    fields = []
    for field in dataclasses.fields(settings):
        if field.name in names:
            default = {"default": field.default, "default_factory": field.default_factory, "metadata": field.metadata}
            default = {key: value for key, value in default.items() if value is not dataclasses.MISSING}
            if field.name == "output_dir":
                default["metadata"] = {**field.metadata, "aliases": ["-o", "--output"]}
            fields.append((field.name, hints[field.name], dataclasses.field(**default)))
    return dataclasses.make_dataclass(settings.__name__, fields, namespace={"_argument_group_name": group})


def from_arguments(settings: type[Settings], options: argparse.Namespace) -> Settings:
    """Builds a dataclass from arguments that [`dataclass_arguments`] made."""
    names = [field.name for field in dataclasses.fields(settings) if field.init]
    return settings(**{name: getattr(options, name) for name in names})


def clip_arguments() -> argparse.ArgumentParser:
    """Makes a parent parser with the arguments of a model to train and the clips to train it on."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("videos", type=a_path, metavar="VIDEOS", help="folder of videos to train on")
    parser.add_argument("--eval-videos", type=a_path, metavar="DIR", help="folder of videos to evaluate on")
    parser.add_argument(
        "--model", type=a_name, metavar="DIR", help="checkpoint to start from; a new model if not given"
    )
    parser.add_argument("--num-frames", type=a_count, default=16, metavar="N", help="frames of a clip")
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


def check_output(output: str | None, *inputs: str | None) -> None:
    """Checks that a checkpoint can be written to a folder, and that none to start from lies there."""
    if not output or not output.strip():
        raise ValueError(f"`--output` must name a folder to write to, got {output!r}")
    check_folder(output)
    check_not_inputs([output], [path for path in inputs if path is not None])


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


def _check_start(options: argparse.Namespace) -> None:
    """Checks where a training begins and ends."""
    check_output(options.output_dir, options.model)
    if options.resume_from_checkpoint is not None:
        load_selector(options.resume_from_checkpoint, [AutoGazeConfig], "--resume-from-checkpoint")


def _finish(trainer: Trainer, options: argparse.Namespace, command: str) -> None:
    """Trains, writes the model with its card and says where it lies."""
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        args = trainer.args
        made = {
            "command": f"`autogaze {command}`",
            "started from": "a new model" if options.model is None else Path(options.model).name,
            "task": options.task,
            "videos": len(trainer.train_dataset.videos),
            "frames of a clip": options.num_frames,
            "steps": trainer.state.global_step,
            "clips of a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning rate": f"{args.learning_rate:g}",
            "seed": args.seed,
        }
        is_on_hub = options.model is not None and not Path(options.model).is_dir()
        card = make_card(
            trainer.model, Path(options.output_dir).name, made, base_model=options.model if is_on_hub else None
        )
        with replacing(Path(options.output_dir) / "README.md") as unfinished:
            unfinished.write_text(card, encoding="utf-8")
        print(f"written: {options.output_dir}")


def _label(options: argparse.Namespace) -> None:
    try:
        shard, num_shards = (int(part) for part in options.shard.split("/"))
    except ValueError:
        raise ValueError(f"`--shard` must be two numbers such as 3/16, got {options.shard!r}") from None
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


def _train(options: argparse.Namespace) -> None:
    args = from_arguments(AutoGazeTrainingArguments, options)
    _check_start(options)
    schedule, augmentation = (from_arguments(settings, options) for settings in (BudgetSchedule, ClipAugmentation))
    set_seed(args.seed)
    model, processor = load_model(options, decoder_config={"num_multi_token_pred": options.num_multi_token_pred})
    task, labels = load_task(options, model.config.grid), None
    if options.labels is not None:
        settings = {"num_frames": options.num_frames // model.config.frame_sampling_rate, **task.settings}
        sizes = VideoCollection(options.videos).file_sizes
        labels = read_labels(*options.labels, grid=model.config.grid, settings=settings, file_sizes=sizes)
    clips = load_clips(options, model, processor, augmentation, schedule, task, labels)
    trainer = AutoGazeTrainer(model, args, processing_class=processor, task=task, **clips)
    _finish(trainer, options, "train")


def _train_grpo(options: argparse.Namespace) -> None:
    if options.model is None:
        raise ValueError("`--model` must name a checkpoint to train further, got none")
    args, augmentation = (from_arguments(settings, options) for settings in (AutoGazeGRPOConfig, ClipAugmentation))
    _check_start(options)
    model, processor = load_model(options)
    clips = load_clips(options, model, processor, augmentation)
    task = load_task(options, model.config.grid)
    trainer = AutoGazeGRPOTrainer(model, args, reconstruction=task, processing_class=processor, **clips)
    _finish(trainer, options, "train-grpo")
