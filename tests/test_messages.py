"""Errors of arguments name the argument, what was given and what would be right."""

import numpy as np
import pytest
import torch

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    FeatureGazeConfig,
    FeatureGazeModel,
    GreedyGazeSelector,
    VideoTokenPruningPipeline,
    prune_video,
    stream_gaze,
    write_video,
)
from transformers_autogaze.training import AutoGazeTrainer, AutoGazeTrainingArguments, GazeClipDataset


FRAMES = np.zeros((4, 32, 32, 3), np.uint8)
VIDEO = torch.zeros(1, 2, 3, 224, 224)


def small_config():
    decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoGazeConfig(
        scales=[32], image_size=32, vision_config={"hidden_size": 32, "output_size": 32}, decoder_config=decoder
    )


SELECTORS = {
    "greedy": GreedyGazeSelector,
    "features": lambda: FeatureGazeModel(FeatureGazeConfig(hidden_sizes=[8, 8, 8], depths=[1, 1, 1], feature_size=8)),
    "autogaze": lambda: AutoGazeModel(small_config()),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gazing_ratio": 2}, "`gazing_ratio` must lie in 0..1, .* got 2"),
        ({"clip_ratio": 2}, "`clip_ratio` must be above 0 and at most 1, .* got 2"),
        ({"tokens_per_second": -1}, "`tokens_per_second` must be a number above 0, got -1"),
        ({"gazing_ratio": 0.5, "clip_ratio": 0.5}, "only one of .* can be given"),
    ],
)
@pytest.mark.parametrize("prune", [stream_gaze, prune_video])
def test_budgets_are_checked_before_the_video_is_opened(prune, options, message):
    with pytest.raises(ValueError, match=message):
        prune(*([GreedyGazeSelector(), "missing.mp4"][:: 1 if prune is stream_gaze else -1]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_ratio": 2}, "`clip_ratio` must be above 0"),
        ({"tokens_per_clip": 0.5}, "`tokens_per_clip` must be a whole"),
    ],
)
def test_the_pipeline_checks_budgets_before_a_video_is_opened(options, message):
    prune = VideoTokenPruningPipeline(GreedyGazeSelector(), device="cpu")
    with pytest.raises(ValueError, match=message):
        prune("missing.mp4", **options)
    with pytest.raises(ValueError, match=message):
        VideoTokenPruningPipeline(GreedyGazeSelector(), device="cpu", **options)


@pytest.mark.parametrize("kind", SELECTORS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gazing_ratio": "0.1"}, "`gazing_ratio` must be a number such as 0.25, .* got '0.1'"),
        ({"gazing_ratio": [0.1, None]}, "`gazing_ratio` must be a number such as 0.25"),
        ({"task_loss_requirement": "0.1"}, "`task_loss_requirement` must be a number such as 0.25, .* got '0.1'"),
        ({"nonsense": 1}, "`nonsense` must be an argument of `.*generate`, got nonsense=1; .* it takes "),
        ({"token_budget": 1}, "`token_budget` must be an argument of"),
    ],
)
def test_generate_names_what_is_wrong(kind, options, message):
    with pytest.raises(ValueError, match=message):
        SELECTORS[kind]().eval().generate(VIDEO, **options)


def test_scoring_names_an_argument_that_nobody_knows():
    model = AutoGazeModel(small_config()).eval()
    gaze = model.generate(VIDEO, gazing_ratio=1)
    given = VIDEO, gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame
    with pytest.raises(TypeError, match="AutoGazeModel.forward knows no argument label; it takes .* labels,"):
        model(*given, label=gaze.gazing_pos)
    assert model(*given, num_items_in_batch=1).log_action_probs.shape == gaze.gazing_pos.shape


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("greedy", FRAMES),
            {},
            "`selector` must be a loaded selector such as GreedyGazeSelector\\(\\), got 'greedy'",
        ),
        ((None, FRAMES, AutoGazeProcessor()), {}, "got AutoGazeProcessor; give its `video_processor`"),
        ((None, FRAMES, 3), {}, "`processor` must be an AutoGazeVideoProcessor, got int"),
        ((None, FRAMES), {"gazing_ratio": "0.1"}, "`gazing_ratio` must be a number such as 0.25"),
    ],
)
def test_stream_gaze_names_what_is_wrong(arguments, options, message):
    selector = GreedyGazeSelector() if arguments[0] is None else arguments[0]
    with pytest.raises(ValueError, match=message):
        stream_gaze(selector, *arguments[1:], **options)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (3, {}, "`frames` must be an array or an iterable of frames, got 3"),
        (FRAMES, {"fps": "30"}, "`fps` must be above 0 frames per second, got '30'"),
    ],
)
def test_write_video_names_what_is_wrong(tmp_path, frames, options, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "clip.mp4", frames, **options)


@pytest.mark.parametrize("on_policy", [0, 1])
def test_clips_without_labels_are_told_how_to_get_some(tmp_path, on_policy):
    pytest.importorskip("accelerate")
    model = AutoGazeModel(small_config())
    clips = GazeClipDataset([FRAMES], model.config, num_frames=2)
    args = AutoGazeTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", on_policy=on_policy)
    with pytest.raises(ValueError, match="items with labels, such as those of a GazeClipDataset with `schedule`"):
        AutoGazeTrainer(model, args, train_dataset=clips).train()
