"""The selectors of the package, and the name of the published one, which is not part of it."""

import torch
from transformers import AutoModel

from transformers_autogaze import AUTOGAZE_SELECTOR, FEATURES_SELECTOR, AutoGazeProcessor, FeatureGazeModel
from transformers_autogaze.video.demo import render_demo_clip


def test_the_published_autogaze_weights_are_on_the_hub_and_not_in_the_package():
    assert AUTOGAZE_SELECTOR == "nvidia/AutoGaze"
    assert sorted(folder.name for folder in FEATURES_SELECTOR.parent.iterdir()) == ["features", "finest", "greedy"]


def test_the_distilled_selector_keeps_changes_within_its_budget():
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
