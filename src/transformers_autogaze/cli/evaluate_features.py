"""The implementation of `autogaze evaluate --encoder`: selectors compared by the encoder features that are preserved."""

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

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


def evaluate_on_features(options: argparse.Namespace) -> None:
    """Measures the chosen selectors, reuses earlier results of the same folder, and writes tables and curves."""
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
        "model_weights": None if folder is None else _fingerprint(load_selector(folder, argument="MODEL")[0]),
        "features_weights": _fingerprint(load_selector("features", argument="MODEL")[0]),
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
    if missing and options.selector != list(LABELS):
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
    """Returns a hash of the weights, so that results of different weights are not mixed."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _clip_selectors(
    options: argparse.Namespace, tower: torch.nn.Module, size: int, patch_size: int, folder: str | None
) -> dict[str, ClipSelector]:
    """Makes the chosen selectors, as far as the size allows them, in the order of `LABELS`."""
    made: dict[str, ClipSelector] = pixel_clip_selectors(size, patch_size, options.device)
    if folder is not None and {"model", "model-scales"} & {*options.selector}:
        made |= _model_clip_selectors(folder, size, patch_size, options.device)
    if {"features", "features-scales"} & {*options.selector}:
        found = _model_clip_selectors("features", size, patch_size, options.device)
        made |= {name.replace("model", "features"): selector for name, selector in found.items()}
    if "encoder" in options.selector and (grid := scales_of_encoder(size, patch_size)) is not None:
        made["encoder"] = EncoderClipSelector(GazeVisionModel(tower, grid.scales))
    if "encoder-finest" in options.selector:
        made["encoder-finest"] = EncoderClipSelector(GazeVisionModel(tower, [size]))
    return {name: made[name] for name in LABELS if name in made and name in options.selector}


def _model_clip_selectors(folder: str, size: int, patch_size: int, device: torch.device) -> dict[str, ClipSelector]:
    """
    Makes the selectors of one model: `"model"` on its own scales. A model that takes any grid is `"model"` on the finest scale
    only, and `"model-scales"` on the published scales. Those that the size or the model does not allow are left out.
    """
    model, processor = load_selector(folder, argument="MODEL")
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
            continue  # The model has other scales.
        made[name] = PixelClipSelector(model, grid, processor.video_processor, published_way=not model.takes_any_grid)
    return made
