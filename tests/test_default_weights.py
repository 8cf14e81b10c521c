"""The weights that come with the package."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

import transformers_autogaze
from transformers_autogaze import (
    FEATURES_SELECTOR,
    AutoGazeModel,
    AutoGazeProcessor,
    CompositeReconstruction,
    FeatureGazeModel,
)
from transformers_autogaze.demo import render_demo_clip
from transformers_autogaze.evaluation.selectors import baseline_selectors


FOLDER = Path(transformers_autogaze.__file__).parent / "pretrained" / "autogaze"


@pytest.fixture(scope="module")
def model():
    return AutoGazeModel.from_default()


def test_they_load_whole_and_ready_to_gaze(model, caplog):
    with caplog.at_level(logging.WARNING):
        loaded, info = AutoGazeModel.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")) and not caplog.records
    assert not model.training and model.num_parameters() == 3_258_240
    assert model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert AutoGazeModel.from_default(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_they_are_small_and_come_with_no_code():
    assert sorted(path.name for path in FOLDER.iterdir()) == [
        "config.json",
        "model.safetensors",
        "processor_config.json",
    ]
    assert (FOLDER / "model.safetensors").stat().st_size < 7e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_auto_classes_take_their_folder():
    assert type(AutoModel.from_pretrained(FOLDER)) is AutoGazeModel
    shipped, own = AutoProcessor.from_pretrained(FOLDER).video_processor, AutoGazeProcessor().video_processor
    for key in ("size", "rescale_factor", "offset", "image_mean", "image_std"):
        assert getattr(shipped, key) == getattr(own, key) or list(getattr(shipped, key)) == list(getattr(own, key))


def test_they_know_what_is_worth_keeping(model):
    """On drawn clips, which they were not trained on, far better than patches at random."""
    videos = [render_demo_clip(8, 224, 224, seed) for seed in range(2)]
    processor = AutoGazeProcessor()
    inputs = torch.cat([processor(videos=video, return_tensors="pt")["pixel_values_videos"] for video in videos])
    pixels = processor.video_processor.to_pixels(inputs).clamp(0, 1)
    composite, losses = CompositeReconstruction(model.config.grid), {}
    for name, selector in {"model": model, **baseline_selectors(model.config.grid)}.items():
        if name in ("model", "random", "greedy"):
            losses[name] = float(composite(pixels, selector.generate(inputs, gazing_ratio=0.1)).loss.mean())
    assert losses["greedy"] < losses["model"] < losses["random"] - 0.15


def test_without_the_package_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers_autogaze.modeling_autogaze.__file__", str(tmp_path / "modeling_autogaze.py"))
    with pytest.raises(OSError, match="come with the package transformers-autogaze: name a checkpoint"):
        AutoGazeModel.from_default()


def test_the_distilled_selector_keeps_what_changes_and_needs_no_more_than_its_share():
    selector = AutoModel.from_pretrained(FEATURES_SELECTOR)
    assert type(selector) is FeatureGazeModel and selector.dtype == torch.float32 and not selector.training
    assert (FEATURES_SELECTOR / "model.safetensors").stat().st_size < 8e6
    video = render_demo_clip(8, 224, 224)
    video[1:5] = video[0]
    gaze = selector.generate(**AutoGazeProcessor()(videos=video, return_tensors="pt"), clip_ratio=0.25)
    counts = gaze.num_real_each_frame[0]
    assert (
        int(gaze.num_real) == 8 * 196 // 4 and counts[0] == 196 and counts[1:5].sum() == 0 and counts[5:].sum() == 196
    )
