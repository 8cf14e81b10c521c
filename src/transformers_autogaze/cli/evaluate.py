"""The arguments of `autogaze evaluate`, which `evaluate_pixels` and `evaluate_features` implement."""

import argparse
from fractions import Fraction
from typing import Any

from transformers_autogaze_cli.arguments import (
    add_command,
    add_device,
    add_output,
    finite_number,
    nonempty_string,
    positive_integer,
)
from transformers_autogaze_cli.prune import SELECTORS

from ..evaluation.feature_clips import SAMPLINGS
from ..evaluation.feature_comparison import ATTENTIONS, BUDGETS, THRESHOLDS
from ..evaluation.feature_report import LABELS, fraction
from ..evaluation.plots import check_matplotlib
from ..evaluation.report import CURVES
from ..hub.checkpoints import check_device
from ..token_budgets_autogaze import check_budgets
from ..utils.output_files import check_folder, check_not_inputs
from .evaluate_features import evaluate_on_features
from .evaluate_pixels import evaluate_on_pixels


_ON_PIXELS = {"gazing_ratio": [0.1, 0.25], "max_gazing_ratio": 0.75, "batch_size": 4}
_ON_FEATURES = {
    "size": None,
    "sampling": list(SAMPLINGS),
    "clip_ratio": list(BUDGETS),
    "attention": list(ATTENTIONS),
    "selector": list(LABELS),
    "dtype": "float32",
}
"""Arguments that only one of the two evaluations has, with their defaults."""
_PIXEL_THRESHOLDS = [0.7]
_FILES = ("results.json", "results.md", *(f"{name}.png" for name in (*CURVES, *SAMPLINGS)))


def add_commands(commands: Any) -> None:
    """Adds `evaluate` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    evaluate = add_command(
        commands,
        "evaluate",
        usage="autogaze evaluate MODEL VIDEO ... -o OUT [options]\n"
        "       autogaze evaluate --encoder DIR [MODEL] VIDEO ... -o OUT [options]",
    )
    evaluate.add_argument(
        "inputs",
        nargs="+",
        type=nonempty_string,
        metavar="[MODEL] VIDEO",
        help=f"checkpoint of a selector (a folder, a Hub repository or one of {', '.join(SELECTORS)}) and videos; with "
        "--encoder, the checkpoint must be a folder or one of these names, or is left out",
    )
    add_output(evaluate)
    evaluate.add_argument(
        "--encoder",
        type=nonempty_string,
        metavar="DIR",
        help="vision tower, a folder or a Hub repository, whose preserved features are measured",
    )
    evaluate.add_argument(
        "--num-frames", type=positive_integer, default=16, metavar="N", help="frames of a clip (default: 16)"
    )
    evaluate.add_argument(
        "--max-clips",
        type=positive_integer,
        default=4,
        metavar="N",
        help="maximum number of clips of a video (default: 4)",
    )
    evaluate.add_argument(
        "--task-loss-requirement",
        type=finite_number,
        nargs="+",
        metavar="L",
        help="thresholds of the loss at which a frame ends: of pixels (default: 0.7) or, with --encoder, shares of the variance "
        f"of features, 0..1 (default: {' '.join(map(str, THRESHOLDS))}); none if only a ratio is given",
    )
    add_device(evaluate)
    _add_pixel_options(evaluate.add_argument_group("by reconstructions, without --encoder"))
    _add_feature_options(evaluate.add_argument_group("by preserved features, with --encoder"))
    evaluate.set_defaults(run=_evaluate)


def _add_pixel_options(group: Any) -> None:
    group.add_argument(
        "--gazing-ratio",
        type=finite_number,
        nargs="+",
        metavar="R",
        help="shares of patches to keep of every frame, 0..1 (default: 0.1 0.25, none with --task-loss-requirement alone)",
    )
    group.add_argument(
        "--max-gazing-ratio",
        type=finite_number,
        metavar="R",
        help="maximum share of patches to keep with --task-loss-requirement (default: 0.75)",
    )
    group.add_argument("--batch-size", type=positive_integer, metavar="N", help="clips in a batch (default: 4)")


def _add_feature_options(group: Any) -> None:
    group.add_argument(
        "--size",
        type=positive_integer,
        metavar="PIXELS",
        help="height and width of the encoder's frames (default: 14 patches per side)",
    )
    group.add_argument(
        "--sampling",
        nargs="+",
        choices=SAMPLINGS,
        help="sampling of the frames of clips: consecutive, or spread over the video (default: both)",
    )
    group.add_argument(
        "--clip-ratio",
        type=_share,
        nargs="+",
        metavar="R",
        help=f"shares of a dense encoder's tokens to keep (default: {' '.join(map(fraction, BUDGETS))})",
    )
    group.add_argument("--attention", nargs="+", choices=ATTENTIONS, help="attentions of the encoder (default: all)")
    group.add_argument("--selector", nargs="+", choices=LABELS, help="selectors to compare (default: all)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision of the encoder (default: float32)")


def _share(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"must be a share such as 1/8 or 0.125, got {text!r}") from error


def _evaluate(options: argparse.Namespace) -> None:
    defaults, others = (_ON_PIXELS, _ON_FEATURES) if options.encoder is None else (_ON_FEATURES, _ON_PIXELS)
    for name in others:
        if getattr(options, name) is not None:
            needs = "needs" if options.encoder is None else "does not go with"
            raise ValueError(f"`--{name.replace('_', '-')}` {needs} `--encoder`, got {getattr(options, name)}")
    thresholds, ratio = (_PIXEL_THRESHOLDS, "gazing_ratio") if options.encoder is None else (THRESHOLDS, "clip_ratio")
    if getattr(options, ratio) is None and options.task_loss_requirement is None:
        options.task_loss_requirement = list(thresholds)
    else:  # Of budgets and thresholds, only the given ones are used.
        options.task_loss_requirement = options.task_loss_requirement or []
        setattr(options, ratio, getattr(options, ratio) or [])
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    _check_ranges(options)
    check_folder(options.output)
    check_not_inputs([options.output / name for name in _FILES], options.inputs)
    check_matplotlib()
    options.device = check_device(options.device)
    if options.encoder is None:
        evaluate_on_pixels(options)
    else:
        evaluate_on_features(options)


def _check_ranges(options: argparse.Namespace) -> None:
    """Checks budgets and thresholds before a video is opened or a model is loaded."""
    for name in ("gazing_ratio", "clip_ratio", "task_loss_requirement"):
        for value in getattr(options, name) or ():
            check_budgets(**{name: value})
    most = options.max_gazing_ratio
    if most is not None and not 0 <= most <= 1:
        raise ValueError(f"`--max-gazing-ratio` must lie in 0..1, the share of patches to keep, got {most:g}")
    for threshold in options.task_loss_requirement if options.encoder is not None else ():
        if not 0 <= threshold <= 1:
            raise ValueError(
                "`--task-loss-requirement` must lie in 0..1 with `--encoder`, the share of the variance of features that a frame "
                f"may lose, got {threshold:g}"
            )
