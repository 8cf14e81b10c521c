"""
The command line of evaluation: `autogaze evaluate`.

A thin layer over `evaluation`: a checkpoint and videos in, or an encoder and videos, results and curves out.
"""

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from transformers_autogaze_cli import COMMANDS
from transformers_autogaze_cli.arguments import a_count, a_name, a_number, add_device, add_output
from transformers_autogaze_cli.prune import SELECTORS

from .checkpoints import check_device, load_encoder, load_selector
from .evaluation.comparison import GazeSetting, evaluate_selectors, load_clips
from .evaluation.encoder_selector import EncoderClipSelector
from .evaluation.feature_clips import SAMPLINGS, FeatureClip, count_clips, read_clips
from .evaluation.feature_comparison import (
    ATTENTIONS,
    BUDGETS,
    EVS,
    THRESHOLDS,
    FeatureComparison,
    FeatureResults,
    finest_grid,
)
from .evaluation.feature_report import LABELS, fraction, write_feature_report
from .evaluation.feature_selectors import (
    ClipSelector,
    PixelClipSelector,
    pixel_clip_selectors,
    scales_of_encoder,
)
from .evaluation.plots import check_matplotlib
from .evaluation.report import CURVES, markdown_tables, write_report
from .evaluation.selectors import baseline_selectors
from .grid_autogaze import GazeGrid
from .integrations.vision import GazeVisionModel
from .output_files import check_folder, check_not_inputs
from .selection_autogaze import GazeSelector
from .video_decoding_autogaze import stream_video
from .video_processing_autogaze import AutoGazeVideoProcessor


_ON_PIXELS = {"gazing_ratio": [0.1, 0.25], "max_gazing_ratio": 0.75, "batch_size": 4}
_ON_FEATURES = {
    "size": None,
    "sampling": list(SAMPLINGS),
    "clip_ratio": list(BUDGETS),
    "attention": list(ATTENTIONS),
    "selector": list(LABELS),
    "dtype": "float32",
}
"""Options of one of the two evaluations alone, with their defaults."""
_PIXEL_THRESHOLDS = [0.7]
_FILES = ("results.json", "results.md", *(f"{name}.png" for name in (*CURVES, *SAMPLINGS)))


def add_commands(commands: Any) -> None:
    """Adds `evaluate` to the commands of the command line, an action of `argparse`'s `add_subparsers`."""
    evaluate = commands.add_parser(
        "evaluate",
        description=f"{COMMANDS['evaluate'][0]}.".capitalize(),
        usage="autogaze evaluate MODEL VIDEO ... -o OUT [options]\n"
        "       autogaze evaluate --encoder DIR [MODEL] VIDEO ... -o OUT [options]",
    )
    evaluate.add_argument(
        "inputs",
        nargs="+",
        type=a_name,
        metavar="[MODEL] VIDEO",
        help=f"checkpoint of a selector, a folder, a Hub repository or one of {', '.join(SELECTORS)}, and videos to measure "
        "on; with --encoder, the checkpoint must be a folder or one of these names, and can be left out",
    )
    add_output(evaluate)
    evaluate.add_argument(
        "--encoder",
        type=a_name,
        metavar="DIR",
        help="a vision tower, a folder or a Hub repository: measure what it keeps",
    )
    evaluate.add_argument("--num-frames", type=a_count, default=16, metavar="N", help="frames of a clip (default: 16)")
    evaluate.add_argument(
        "--max-clips", type=a_count, default=4, metavar="N", help="clips of one video at most (default: 4)"
    )
    evaluate.add_argument(
        "--task-loss-requirement",
        type=a_number,
        nargs="+",
        metavar="L",
        help="losses at which a frame is good enough: of pixels (default: 0.7) or, with --encoder, the share of the variance "
        f"of features, 0..1 (default: {' '.join(map(str, THRESHOLDS))}); none where only a ratio is given",
    )
    add_device(evaluate)
    _add_pixel_options(evaluate.add_argument_group("by rebuilt pixels, without --encoder"))
    _add_feature_options(evaluate.add_argument_group("by what an encoder keeps, with --encoder"))
    evaluate.set_defaults(run=_evaluate)


def _add_pixel_options(group: Any) -> None:
    group.add_argument(
        "--gazing-ratio",
        type=a_number,
        nargs="+",
        metavar="R",
        help="shares of patches to keep of every frame, 0..1 (default: 0.1 0.25, none with --task-loss-requirement alone)",
    )
    group.add_argument(
        "--max-gazing-ratio",
        type=a_number,
        metavar="R",
        help="share of patches to keep at most with --task-loss-requirement (default: 0.75)",
    )
    group.add_argument("--batch-size", type=a_count, metavar="N", help="clips to gaze at together (default: 4)")


def _add_feature_options(group: Any) -> None:
    group.add_argument(
        "--size",
        type=a_count,
        metavar="PIXELS",
        help="height and width that the encoder sees frames at (default: 14 of its patches)",
    )
    group.add_argument(
        "--sampling",
        nargs="+",
        choices=SAMPLINGS,
        help="frames of clips: consecutive, or spread over the video (default: both)",
    )
    group.add_argument(
        "--clip-ratio",
        type=_share,
        nargs="+",
        metavar="R",
        help=f"shares of a dense encoder's tokens to keep (default: {' '.join(map(fraction, BUDGETS))})",
    )
    group.add_argument("--attention", nargs="+", choices=ATTENTIONS, help="attentions of the encoder (default: all)")
    group.add_argument("--selector", nargs="+", choices=LABELS, help="what to measure (default: all)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="precision that the encoder computes in (default: float32)"
    )


def _share(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"must be a share such as 1/8 or 0.125, got {text!r}") from error


def _evaluate(options: argparse.Namespace) -> None:
    ours, others = (_ON_PIXELS, _ON_FEATURES) if options.encoder is None else (_ON_FEATURES, _ON_PIXELS)
    for name in others:
        if getattr(options, name) is not None:
            needs = "needs" if options.encoder is None else "does not go with"
            raise ValueError(f"`--{name.replace('_', '-')}` {needs} `--encoder`, got {getattr(options, name)}")
    thresholds, ratio = (_PIXEL_THRESHOLDS, "gazing_ratio") if options.encoder is None else (THRESHOLDS, "clip_ratio")
    if getattr(options, ratio) is None and options.task_loss_requirement is None:
        options.task_loss_requirement = list(thresholds)
    else:  # Off is leaving it out.
        options.task_loss_requirement = options.task_loss_requirement or []
        setattr(options, ratio, getattr(options, ratio) or [])
    for name, default in ours.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    check_folder(options.output)
    check_not_inputs([options.output / name for name in _FILES], options.inputs)
    check_matplotlib()
    options.device = check_device(options.device)
    if options.encoder is None:
        _evaluate_on_pixels(options)
    else:
        _evaluate_on_features(options)


def _evaluate_on_pixels(options: argparse.Namespace) -> None:
    name, *videos = options.inputs
    if not videos:
        raise ValueError(f"a MODEL and at least one VIDEO must be given, got only {name}")
    settings = [GazeSetting(ratio) for ratio in options.gazing_ratio]
    settings += [GazeSetting(options.max_gazing_ratio, loss) for loss in options.task_loss_requirement]
    for video in videos:
        stream_video(video)  # What cannot be read is told before the model is loaded.
    model, processor = _load_model(name)
    grid = model.config.grid
    clips = load_clips(videos, processor, grid.sizes[-1], options.num_frames, options.max_clips)
    selectors = {"model": model, **baseline_selectors(grid, processor)}
    selectors = {name: selector.to(options.device) for name, selector in selectors.items()}
    scores = evaluate_selectors(selectors, clips, settings, processor, options.batch_size, progress=True)
    about = {
        "model": name,
        "videos": [Path(video).name for video in videos],
        "clips": len(clips.names),
        "frames_of_a_clip": options.num_frames,
    }
    written = write_report(scores, options.output, about)
    print(markdown_tables(scores))
    print("\nwritten: " + ", ".join(map(str, written)))


def _load_model(folder: str | os.PathLike) -> tuple[GazeSelector, AutoGazeVideoProcessor]:
    """Loads a selector and what makes its pixel values."""
    model, processor = load_selector(folder, argument="MODEL")
    return model, processor.video_processor


def _evaluate_on_features(options: argparse.Namespace) -> None:
    folder, videos = None, options.inputs
    if os.path.isdir(options.inputs[0]) or (options.inputs[0] in SELECTORS and not os.path.exists(options.inputs[0])):
        folder, *videos = options.inputs
    taken = {"num_frames": options.num_frames, "max_clips": options.max_clips}
    num_clips = count_clips(videos, options.sampling, **taken)
    wrapped, processor = load_encoder(options.encoder, getattr(torch, options.dtype))
    tower = wrapped.vision_model
    grid = finest_grid(tower, options.size)
    size, _ = grid.sizes[-1]
    settings = {
        "encoder": Path(options.encoder).name,
        "encoder_weights": _fingerprint(tower),
        "model": None if folder is None else Path(folder).name,
        "model_weights": None if folder is None else _fingerprint(_load_model(folder)[0]),
        "features_weights": _fingerprint(_load_model("features")[0]),
        "videos": [Path(video).name for video in videos],
        "size": size,
        "frames_of_a_clip": options.num_frames,
        "clips_of_a_video": options.max_clips,
        "device": str(options.device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
    }
    results = FeatureResults(options.output / "results.json", settings)
    tower.to(options.device)
    selectors = _clip_selectors(options, tower, size, grid.patch_size, folder)
    optional = (EVS, "model-scales", "features-scales")
    missing = [name for name in options.selector if name not in selectors and name not in optional]
    if missing and options.selector != _ON_FEATURES["selector"]:
        raise ValueError(
            f'`--selector` cannot be {", ".join(missing)} here: "model" needs a MODEL, and selectors of four scales a size '
            f"of a multiple of 14 patches, got {size} pixels with patches of {grid.patch_size}"
        )
    comparison = FeatureComparison(
        tower,
        processor,
        selectors,
        size,
        options.clip_ratio,
        options.attention,
        options.task_loss_requirement,
        evs=EVS in options.selector,
    )

    def clips(samplings: Sequence[str]) -> Iterator[FeatureClip]:
        for sampling in samplings:
            for video in videos:
                yield from read_clips(video, size, sampling, **taken)

    if unknown := [sampling for sampling in options.sampling if sampling not in results.statistics]:
        seen = tqdm(clips(unknown), unit="clip", desc="mean feature")
        results.add(statistics=comparison.feature_statistics(seen))
    for clip in tqdm(clips(options.sampling), unit="clip", desc="evaluating", total=num_clips):
        if rows := list(comparison.measure(clip, results.statistics[clip.sampling], results.keys)):
            results.add(rows)
    dense_tokens = options.num_frames * grid.num_patches
    about = {key: value for key, value in settings.items() if value is not None}
    written = [results.path, *write_feature_report(results.rows, options.output, about, dense_tokens)]
    print((options.output / "results.md").read_text(encoding="utf-8"))
    print("written: " + ", ".join(map(str, written)))


def _fingerprint(model: torch.nn.Module) -> str:
    """Tells weights of one name apart, so that figures of different ones are not mixed."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _clip_selectors(
    options: argparse.Namespace, tower: torch.nn.Module, size: int, patch_size: int, folder: str | None
) -> dict[str, ClipSelector]:
    """Makes the selectors that were asked for and that the size allows, in the order of `LABELS`."""
    made: dict[str, ClipSelector] = pixel_clip_selectors(size, patch_size, options.device)
    if folder is not None and {"model", "model-scales"} & {*options.selector}:
        made |= _model_clip_selectors(*_load_model(folder), size, patch_size, options.device)
    if {"features", "features-scales"} & {*options.selector}:
        found = _model_clip_selectors(*_load_model("features"), size, patch_size, options.device)
        made |= {name.replace("model", "features"): selector for name, selector in found.items()}
    if "encoder" in options.selector and (grid := scales_of_encoder(size, patch_size)) is not None:
        made["encoder"] = EncoderClipSelector(GazeVisionModel(tower, grid.scales))
    if "encoder-finest" in options.selector:
        made["encoder-finest"] = EncoderClipSelector(GazeVisionModel(tower, [size]))
    return {name: made[name] for name in LABELS if name in made and name in options.selector}


def _model_clip_selectors(
    model: GazeSelector, processor: AutoGazeVideoProcessor, size: int, patch_size: int, device: torch.device
) -> dict[str, ClipSelector]:
    """
    Makes what a model is measured as: `"model"` on its own scales or, where it takes any grid, on the finest alone; such a
    one also as `"model-scales"` on the published scales. What the size or the model does not allow is left out.
    """
    model, own = model.to(device), model.config.grid
    grids = {"model": scales_of_encoder(size, patch_size, own)}
    if model.takes_any_grid:
        grids = {"model": GazeGrid([size], patch_size), "model-scales": scales_of_encoder(size, patch_size)}
    made: dict[str, ClipSelector] = {}
    for name, grid in grids.items():
        if grid is None:
            continue
        try:
            model.for_grid(grid if model.takes_any_grid else own)
        except ValueError:
            continue  # A model that knows other scales.
        made[name] = PixelClipSelector(model, grid, processor, published_way=not model.takes_any_grid)
    return made
