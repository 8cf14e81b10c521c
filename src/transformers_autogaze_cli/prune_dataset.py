"""The arguments of `autogaze prune-dataset`, which `transformers_autogaze.dataset_pruning` implements."""

import argparse
import signal
from dataclasses import fields
from typing import Any, NoReturn

from . import print_error
from .arguments import add_command, finite_number, nonempty_path, nonempty_string, positive_integer
from .prune import SELECTORS, add_budgets, add_frames, add_selector, check_frames


def add_commands(commands: Any) -> None:
    """Adds `prune-dataset` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    command = add_command(
        commands,
        "prune-dataset",
        more=" A video that cannot be read gets a row with the error. Running the same command again resumes an interrupted run. "
        "Ray runs on this machine, or on the cluster of RAY_ADDRESS.",
        usage="autogaze prune-dataset INPUT OUTPUT [options]",
    )
    command.add_argument(
        "source",
        type=nonempty_string,
        metavar="INPUT",
        help="folder of videos, pattern such as 'clips/*.mp4', .txt list of paths or URLs, or .parquet or .lance table; a local "
        "path or a URL that fsspec supports, such as s3://, gs:// or hf://",
    )
    command.add_argument(
        "output",
        type=nonempty_path,
        metavar="OUTPUT",
        help="folder to write to, on a file system that all machines of the cluster share",
    )
    command.add_argument(
        "--patches", action="store_true", help="also write the pixels of kept patches, in WebDataset tars"
    )
    command.add_argument(
        "--psnr", action="store_true", help="reconstruct the frames from the kept patches and measure their PSNR"
    )
    _add_tables(command.add_argument_group("tables"))
    _add_workers(command.add_argument_group("execution"))
    add_selector(command.add_argument_group("selector"))
    add_budgets(command.add_argument_group("budget and threshold"))
    add_frames(command.add_argument_group("frames and tiles"))
    command.set_defaults(run=_run)


def _add_tables(group: Any) -> None:
    group.add_argument(
        "--video-column",
        type=nonempty_string,
        default="video",
        metavar="NAME",
        help="column with paths, URLs or encoded bytes of videos (default: video)",
    )
    group.add_argument(
        "--id-column",
        type=nonempty_string,
        metavar="NAME",
        help="column with a unique name for each video (default: the path or URL, or the table and the row number)",
    )


def _add_workers(group: Any) -> None:
    group.add_argument(
        "--workers",
        type=positive_integer,
        metavar="N",
        help="number of videos that are pruned in parallel (default: all cores but one, or with --gpus-per-worker as many as the "
        "GPUs allow)",
    )
    group.add_argument(
        "--gpus-per-worker",
        type=finite_number,
        default=0,
        metavar="F",
        help="share of a GPU for each worker, such as 0.25 (default: 0, compute on the CPU)",
    )
    group.add_argument(
        "--rows-per-shard",
        type=positive_integer,
        default=1024,
        metavar="N",
        help="number of videos of a shard (default: 1024)",
    )


def _run(options: argparse.Namespace) -> int:
    from transformers_autogaze.dataset_pruning import PruneSettings, prune_dataset

    check_frames(options)
    values = {
        **vars(options),
        "selector": options.model or options.selector or SELECTORS[0],
        "measures_quality": options.psnr,
        "keeps_patches": options.patches,
    }
    settings = PruneSettings(**{field.name: values[field.name] for field in fields(PruneSettings)})
    previous_handler = signal.signal(signal.SIGTERM, _stop)
    try:
        summary = prune_dataset(
            options.source,
            options.output,
            settings,
            video_column=options.video_column,
            id_column=options.id_column,
            workers=options.workers,
            gpus_per_worker=options.gpus_per_worker,
            rows_per_shard=options.rows_per_shard,
        )
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print_error(
            f"stopped by {signal.Signals(number).name}; written rows are kept, and the same command resumes the run"
        )
        return 128 + number
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    print(summary)
    return 0


def _stop(number: int, _: Any) -> NoReturn:
    """Handles SIGTERM like SIGINT, so that open files and workers are closed."""
    raise KeyboardInterrupt(number)
