"""The commands `autogaze train` and `autogaze train-grpo`, which run `training`; every field of its dataclasses is an argument."""

import argparse
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, Trainer, set_seed

from transformers_autogaze_cli.arguments import HelpFormatter, add_command, nonempty_path, task_arguments

from ..configuration_autogaze import AutoGazeConfig
from ..hub.checkpoints import load_selector
from ..hub.model_cards import make_card
from ..training.augmentation import ClipAugmentation
from ..training.data import BudgetSchedule, GazeClipDataset
from ..training.grpo import AutoGazeGRPOConfig, AutoGazeGRPOTrainer
from ..training.label_files import read_labels
from ..training.ntp import AutoGazeTrainer, AutoGazeTrainingArguments
from ..training.videos import VideoCollection
from ..utils.output_files import replacing
from ..utils.video_files import find_videos
from .dataclass_arguments import check_output, dataclass_arguments, from_arguments
from .training_inputs import clip_arguments, load_clips, load_model, load_task


def add_commands(commands: Any) -> None:
    """Adds `train` and `train-grpo` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    train = add_command(
        commands,
        "train",
        parents=[
            clip_arguments("checkpoint to start from; a new model if not given"),
            task_arguments(),
            dataclass_arguments(AutoGazeTrainingArguments, BudgetSchedule, ClipAugmentation),
        ],
        usage="autogaze train VIDEOS -o DIR [options]",
        formatter_class=HelpFormatter,
    )
    train.add_argument(
        "--num-multi-token-pred",
        type=int,
        default=10,
        metavar="K",
        help="patches that a new model predicts per decoding step",
    )
    train.add_argument(
        "--labels",
        nargs="+",
        type=nonempty_path,
        metavar="FILE",
        help="label files of the training videos; by default random clips are labelled during training",
    )
    train.set_defaults(run=_train)

    train_grpo = add_command(
        commands,
        "train-grpo",
        parents=[
            clip_arguments("checkpoint to train further, such as that of `autogaze train`"),
            task_arguments(),
            dataclass_arguments(AutoGazeGRPOConfig, ClipAugmentation),
        ],
        usage="autogaze train-grpo VIDEOS --model DIR -o DIR [options]",
        formatter_class=HelpFormatter,
    )
    train_grpo.set_defaults(run=_train_grpo)


def _check_start(options: argparse.Namespace) -> None:
    """Checks the folders of videos, the initial checkpoint and the output folder."""
    find_videos(options.videos, "VIDEOS")
    if options.eval_videos is not None:
        find_videos(options.eval_videos, "`--eval-videos`")
    check_output(options.output_dir, options.model)
    if options.resume_from_checkpoint is not None:
        load_selector(options.resume_from_checkpoint, [AutoGazeConfig], "--resume-from-checkpoint")


def _finish(trainer: Trainer, options: argparse.Namespace, command: str) -> None:
    """Trains, saves the model with its card, and prints the folder."""
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        args, clips = trainer.args, cast(GazeClipDataset, trainer.train_dataset)
        made = {
            "command": f"`autogaze {command}`",
            "started from": "a new model" if options.model is None else Path(options.model).name,
            "task": options.task,
            "videos": len(clips.videos),
            "frames of a clip": options.num_frames,
            "steps": trainer.state.global_step,
            "clips of a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning rate": f"{args.learning_rate:g}",
            "seed": args.seed,
        }
        is_on_hub = options.model is not None and not Path(options.model).is_dir()
        model = cast(PreTrainedModel, trainer.model)
        card = make_card(model, Path(options.output_dir).name, made, base_model=options.model if is_on_hub else None)
        with replacing(Path(options.output_dir) / "README.md") as unfinished:
            unfinished.write_text(card, encoding="utf-8")
        print(f"written: {options.output_dir}")


def _train(options: argparse.Namespace) -> None:
    args = from_arguments(AutoGazeTrainingArguments, options)
    _check_start(options)
    schedule, augmentation = from_arguments(BudgetSchedule, options), from_arguments(ClipAugmentation, options)
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
    args, augmentation = from_arguments(AutoGazeGRPOConfig, options), from_arguments(ClipAugmentation, options)
    _check_start(options)
    model, processor = load_model(options)
    clips = load_clips(options, model, processor, augmentation)
    task = load_task(options, model.config.grid)
    trainer = AutoGazeGRPOTrainer(model, args, reconstruction=task, processing_class=processor, **clips)
    _finish(trainer, options, "train-grpo")
