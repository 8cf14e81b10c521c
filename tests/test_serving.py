import re

import pytest
import torch

from transformers_autogaze import FEATURES_SELECTOR, FeatureGazeModel, GazeGrid, GreedyGazeSelector
from transformers_autogaze.serving.settings import GazeSettings, load_gaze_model, read_settings


QUARTER = {"gazing_ratio": 0.25}


def test_without_settings_videos_are_seen_whole():
    assert read_settings({}, {}) is None
    assert read_settings({"fps": 2, "gaze_model": "greedy"}, {"max_pixels": 9}) is None


def test_a_request_goes_before_the_server_argument_by_argument():
    configured = {"gazing_ratio": 0.5, "gaze_model": "greedy"}
    assert read_settings(configured, {}) == GazeSettings("greedy", {"gazing_ratio": 0.5})
    assert read_settings(configured, QUARTER) == GazeSettings("greedy", QUARTER)
    both = {"gazing_ratio": 0.5, "task_loss_requirement": 0.2}
    assert read_settings(configured, {"task_loss_requirement": 0.2}) == GazeSettings("greedy", both)
    instead = {"gazing_ratio": None, "clip_ratio": 0.1, "gaze_model": "features"}
    assert read_settings(configured, instead) == GazeSettings("features", {"clip_ratio": 0.1})
    assert read_settings(configured, {"gazing_ratio": None}) is None


@pytest.mark.parametrize(
    "requested, message",
    [
        ({"gazing_ratio": 2}, "`gazing_ratio` must lie in 0..1"),
        ({"gazing_ratio": float("nan")}, "`gazing_ratio` must lie in 0..1"),
        ({"gazing_ratio": "0.5"}, "`gazing_ratio` must be a number"),
        ({"gazing_ratio": {"a": 1}}, "`gazing_ratio` must be a number"),
        ({"gazing_ratio": [0.5, 1.5]}, "`gazing_ratio` must lie in 0..1"),
        ({"task_loss_requirement": "low"}, "`task_loss_requirement` must be a number"),
        ({"task_loss_requirement": float("nan")}, "`task_loss_requirement` must be numbers"),
        ({"clip_ratio": 0}, "`clip_ratio` must be above 0"),
        ({"tokens_per_clip": 0.5}, "`tokens_per_clip` must be a whole number"),
        ({"gazing_ratio": 0.5, "clip_ratio": 0.5}, "only one of"),
        ({**QUARTER, "gaze_model": "mine"}, "`gaze_model` of a request must be one of 'features'"),
        ({**QUARTER, "gaze_model": ["features"]}, "`gaze_model` of a request must be one of 'features'"),
        ({"gaze_model": "features"}, "`gaze_model` must be given with one of gazing_ratio"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(requested, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings({}, requested)
    if "of a request" not in message and "given with" not in message:
        with pytest.raises(ValueError, match=re.escape(message)):
            read_settings(requested, {})


def test_a_request_may_name_the_selector_of_the_server():
    folder = str(FEATURES_SELECTOR)
    assert read_settings({"gaze_model": folder}, {**QUARTER, "gaze_model": folder}) == GazeSettings(folder, QUARTER)
    with pytest.raises(ValueError, match="`gaze_model` of a request"):
        read_settings({}, {**QUARTER, "gaze_model": folder})


def test_a_server_of_a_selector_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="`gaze_model` must be a checkpoint's folder"):
        read_settings({"gaze_model": str(tmp_path / "none"), **QUARTER}, {})


def test_a_selector_is_loaded_once():
    selector, processor = load_gaze_model("features")
    assert isinstance(selector, FeatureGazeModel) and not selector.training
    assert load_gaze_model("features")[0] is selector
    assert isinstance(load_gaze_model("greedy")[0], GreedyGazeSelector)
    assert torch.tensor(processor.image_mean).allclose(torch.tensor(selector.config.image_mean))


def test_a_selector_does_not_remember_every_size_that_it_ever_saw():
    selector = GreedyGazeSelector()
    for side in range(2, 42):
        assert selector.for_grid(GazeGrid([(8, 8 * side)], 8)).config.scales == [(8, 8 * side)]
    assert len(selector._for_grid) <= 16
    again = GazeGrid([(8, 16)], 8)
    assert selector.for_grid(again) is selector.for_grid(again)
