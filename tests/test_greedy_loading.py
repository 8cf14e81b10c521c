"""The greedy selector loads, and is called, as models of the library are, though it has no weights."""

import pytest
import torch
from transformers import AutoModel

from transformers_autogaze import (
    GREEDY_SELECTOR,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeOutput,
    GreedyGazeConfig,
    GreedyGazeSelector,
)


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randn(1, 3, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cls", [GreedyGazeSelector, AutoModel])
def test_values_of_the_configuration_can_be_given_when_it_is_loaded(cls, video):
    selector = cls.from_pretrained(GREEDY_SELECTOR, gazing_ratio=0.2, task_loss_requirement=-3.0)
    assert selector.config.gazing_ratio == 0.2 and not selector.training
    expected = GreedyGazeSelector(GreedyGazeConfig(gazing_ratio=0.2, task_loss_requirement=-3.0)).generate(video)
    assert torch.equal(selector.generate(video).gazing_pos, expected.gazing_pos)


@pytest.mark.parametrize("cls", [GreedyGazeSelector, AutoModel])
def test_an_argument_that_nobody_knows_is_named(cls):
    with pytest.raises(TypeError, match="gazing_rato"):
        cls.from_pretrained(GREEDY_SELECTOR, gazing_rato=0.2)


@pytest.mark.parametrize("dtype", ["auto", torch.float64, torch.bfloat16])
def test_what_the_library_gives_for_loading_a_model_comes(video, dtype, tmp_path):
    selector, info = GreedyGazeSelector.from_pretrained(GREEDY_SELECTOR, output_loading_info=True, dtype=dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert selector.dtype == (torch.float32 if dtype == "auto" else dtype)
    assert selector.name_or_path == str(GREEDY_SELECTOR)
    expected = GreedyGazeSelector().to_pixels(video)
    assert torch.equal(selector.to_pixels(video), expected)
    selector.save_pretrained(tmp_path)
    given = GreedyGazeSelector.from_pretrained(tmp_path, config=GreedyGazeConfig(gazing_ratio=0.3))
    assert given.config.gazing_ratio == 0.3


def test_a_configuration_and_weights_that_are_given_need_no_folder():
    config = GreedyGazeConfig(gazing_ratio=0.3)
    loaded = GreedyGazeSelector.from_pretrained(None, config=config, state_dict=GreedyGazeSelector().state_dict())
    assert loaded.config.gazing_ratio == 0.3 and not loaded.training


@pytest.mark.parametrize(
    "selector",
    [
        GreedyGazeSelector(),
        FeatureGazeModel(FeatureGazeConfig(hidden_sizes=[8, 16, 32], depths=[1, 1, 1], feature_size=8)).eval(),
    ],
    ids=["greedy", "features"],
)
def test_calling_a_selector_gazes(selector, video):
    expected = selector.generate(video, gazing_ratio=0.1)
    called = selector(video, gazing_ratio=0.1)
    assert isinstance(called, GazeOutput) and torch.equal(called.gazing_pos, expected.gazing_pos)
    given = selector(pixel_values_videos=video, gazing_ratio=0.1, return_dict=False)
    assert isinstance(given, tuple) and torch.equal(given[0], expected.gazing_pos)


def test_further_steps_after_the_making_of_a_model_run(monkeypatch):
    called = []
    monkeypatch.setattr(GreedyGazeSelector, "post_init", lambda self: called.append(self))
    selector = GreedyGazeSelector()
    assert called == [selector]
