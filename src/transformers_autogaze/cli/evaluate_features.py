"""The implementation of `autogaze evaluate --encoder`: compares selectors by preserved encoder features."""

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from transformers_autogaze_cli.prune import SELECTORS

from ..evaluation.encoder_selector import EncoderClipSelector
from ..evaluation.feature_clips import FeatureClip, count_clips, read_clips
from ..evaluation.feature_comparison import EVS, FeatureComparison, FeatureResults, finest_grid
from ..evaluation.feature_report import LABELS, write_feature_report
from ..evaluation.feature_selectors import (
    ClipSelector,
    PixelClipSelector,
    pixel_clip_selectors,
    scales_of_encoder,
)
from ..grid_autogaze import GazeGrid
from ..hub.checkpoints import load_encoder, load_selector
from ..integrations.vision import GazeVisionModel
from ..utils.video_files import check_videos, is_url


def evaluate_on_features(options: argparse.Namespace) -> None:
    """Measures the chosen selectors, reuses earlier results of the same folder, and writes tables and curves."""
    folder, videos = _split_inputs(options.inputs)
    num_clips = count_clips(videos, options.sampling, options.num_frames, options.max_clips)
    model, processor = load_encoder(options.encoder, getattr(torch, options.dtype))
    tower = model.vision_model
    grid = finest_grid(tower, options.size)
    settings = _collect_settings(options, tower, folder, videos, grid)
    results = FeatureResults(options.output / "results.json", settings)
    comparison = FeatureComparison(
        tower.to(options.device),
        processor,
        _make_selectors(options, tower, grid, folder),
        grid.sizes[-1][0],
        options.clip_ratio,
        options.attention,
        options.task_loss_requirement,
        evs=EVS in options.selector,
    )
    _measure_clips(options, comparison, results, videos, num_clips)
    dense_tokens = options.num_frames * grid.num_patches
    about = {key: value for key, value in settings.items() if value is not None}
    written = [results.path, *write_feature_report(results.rows, options.output, about, dense_tokens)]
    print((options.output / "results.md").read_text(encoding="utf-8"))
    print("written: " + ", ".join(map(str, written)))


def _split_inputs(inputs: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """Returns the model, if one is given, and the videos."""
    first, *others = inputs
    is_model = os.path.isdir(first) or (first in SELECTORS and not os.path.exists(first))
    if not is_model and not is_url(first) and not os.path.exists(first):
        raise FileNotFoundError(
            "with `--encoder`, the first argument must be a MODEL, a folder or one of "
            f"{', '.join(SELECTORS)}, or a VIDEO, a file or an http(s) URL, but there is neither a model nor a video {first!r}"
        )
    if is_model and not others:
        raise ValueError(f"at least one VIDEO must be given, got only the MODEL {first!r}")
    videos = others if is_model else inputs
    check_videos(videos)
    return (first if is_model else None), videos


def _collect_settings(
    options: argparse.Namespace, tower: torch.nn.Module, folder: str | None, videos: Sequence[str], grid: GazeGrid
) -> dict[str, Any]:
    """Returns the settings that all results in a file must share."""
    return {
        "encoder": Path(options.encoder).name,
        "encoder_weights": _fingerprint(tower),
        "model": None if folder is None else Path(folder).name,
        "model_weights": None if folder is None else _fingerprint(load_selector(folder, argument="MODEL")[0]),
        "features_weights": _fingerprint(load_selector("features", argument="MODEL")[0]),
        "videos": [Path(video).name for video in videos],
        "size": grid.sizes[-1][0],
        "frames_of_a_clip": options.num_frames,
        "clips_of_a_video": options.max_clips,
        "device": str(options.device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
    }


def _measure_clips(
    options: argparse.Namespace,
    comparison: FeatureComparison,
    results: FeatureResults,
    videos: Sequence[str],
    num_clips: int,
) -> None:
    """Adds the missing statistics and rows to the results, clip by clip."""

    def clips(samplings: Sequence[str]) -> Iterator[FeatureClip]:
        for sampling in samplings:
            for video in videos:
                size = comparison.finest.sizes[-1][0]
                yield from read_clips(video, size, sampling, options.num_frames, options.max_clips)

    if missing := [sampling for sampling in options.sampling if sampling not in results.statistics]:
        progress = tqdm(clips(missing), unit="clip", desc="mean feature")
        results.add(statistics=comparison.feature_statistics(progress))
    for clip in tqdm(clips(options.sampling), unit="clip", desc="evaluating", total=num_clips):
        if rows := list(comparison.measure(clip, results.statistics[clip.sampling], results.keys)):
            results.add(rows)


def _fingerprint(model: Any) -> str:
    """Returns a hash of the weights, so that results of different weights are not mixed."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _make_selectors(
    options: argparse.Namespace, tower: torch.nn.Module, grid: GazeGrid, folder: str | None
) -> dict[str, ClipSelector]:
    """Makes the chosen selectors that support the size, in the order of `LABELS`; others must not be chosen by name."""
    (size, _), patch_size = grid.sizes[-1], grid.patch_size
    selectors: dict[str, ClipSelector] = pixel_clip_selectors(size, patch_size, options.device)
    if folder is not None and {"model", "model-scales"} & {*options.selector}:
        selectors |= _model_clip_selectors(folder, size, patch_size, options.device)
    if {"features", "features-scales"} & {*options.selector}:
        for name, selector in _model_clip_selectors("features", size, patch_size, options.device).items():
            selectors[name.replace("model", "features")] = selector
    if "encoder" in options.selector and (scales := scales_of_encoder(size, patch_size)) is not None:
        selectors["encoder"] = EncoderClipSelector(GazeVisionModel(tower, scales.scales))
    if "encoder-finest" in options.selector:
        selectors["encoder-finest"] = EncoderClipSelector(GazeVisionModel(tower, [size]))
    optional = (EVS, "model-scales", "features-scales")
    missing = [name for name in options.selector if name not in selectors and name not in optional]
    if missing and options.selector != list(LABELS):
        raise ValueError(
            f'`--selector` cannot be {", ".join(missing)} here: "model" needs a MODEL, and selectors of four scales need a size '
            f"of a multiple of 14 patches, got {size} pixels with patches of {patch_size}"
        )
    return {name: selectors[name] for name in LABELS if name in selectors and name in options.selector}


def _model_clip_selectors(folder: str, size: int, patch_size: int, device: torch.device) -> dict[str, ClipSelector]:
    """
    Makes the selectors of one model.

    `"model"` has the scales of the model. For a model that takes any grid, `"model"` has the finest scale only and
    `"model-scales"` the published scales. Selectors that the size or the model does not support are left out.
    """
    model, processor = load_selector(folder, argument="MODEL", device=device)
    own_grid = model.config.grid
    grids = {"model": scales_of_encoder(size, patch_size, own_grid)}
    if model.takes_any_grid:
        grids = {"model": GazeGrid([size], patch_size), "model-scales": scales_of_encoder(size, patch_size)}
    selectors: dict[str, ClipSelector] = {}
    for name, grid in grids.items():
        if grid is None:
            continue
        try:
            model.for_grid(grid if model.takes_any_grid else own_grid)
        except ValueError:
            continue  # The model has other scales.
        selectors[name] = PixelClipSelector(
            model, grid, processor.video_processor, published_way=not model.takes_any_grid
        )
    return selectors
