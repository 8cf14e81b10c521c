"""The model computes what the published code computes, on random weights; `cases.json` names each recorded call."""

import pytest
import torch
from published import Checkpoint, checkpoint_folder

from transformers_autogaze.selection_autogaze import resize_frames


CHECKPOINTS = ("tiny-1", "tiny-2", "full-3")
GENERATED = (
    "ratio",
    "ratio_per_frame",
    "ratio_full",
    "generate_only",
    "ratio_and_loss.clip0",
    "ratio_and_loss.clip1",
    "loss_only.clip0",
    "loss_only.clip1",
    "tiles_2x2",
    "tiles_2x2_loss",
    "tiles_padded_patch14",
)
STREAMED = ("stream_ratio", "stream_ratio_and_loss")
_loaded = {}


@pytest.fixture(params=CHECKPOINTS)
def published(request):
    if request.param not in _loaded:
        checkpoint = Checkpoint(checkpoint_folder(request.param))
        _loaded[request.param] = (checkpoint, checkpoint.model())
    return _loaded[request.param]


def test_every_recorded_case_is_checked(published):
    checkpoint, _ = published
    assert set(checkpoint.cases) == {*GENERATED, *STREAMED, "given"}


def test_vision_tokens_equal_the_recorded_ones(published):
    checkpoint, model = published
    frames = resize_frames(checkpoint.video("ratio"), model.config.image_size)
    with torch.no_grad():
        vision, _ = model.embed_video(frames)
    torch.testing.assert_close(vision, checkpoint.expected["stages.vision_embeds"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", GENERATED)
def test_generated_gaze_equals_the_recorded_one(published, case):
    checkpoint, model = published
    expected = checkpoint.expected
    video = checkpoint.video(case)
    gaze = model.generate(video, **checkpoint.call(case))
    for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame"):
        assert torch.equal(gaze[key], expected[f"{case}.{key}"]), key
    for index, mask in enumerate(gaze.gazing_mask):
        assert torch.equal(mask, expected[f"{case}.gazing_mask.{index}"]), f"mask of scale {index}"
    assert gaze.num_real.tolist() == checkpoint.cases[case]["real_tokens"]
    assert gaze.num_vision_tokens_each_frame == checkpoint.cases[case]["num_vision_tokens_each_frame"]
    if f"{case}.log_action_probs" in expected:
        scored = model.generate(video, **checkpoint.call(case), output_scores=True)
        for key in ("log_action_probs", "task_loss_prediction"):
            torch.testing.assert_close(scored[key], expected[f"{case}.{key}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", STREAMED)
def test_streamed_gaze_equals_the_recorded_one(published, case):
    checkpoint, model = published
    cache = None
    for index, frame in enumerate(checkpoint.video(case).split(1, dim=1)):
        gaze = model.generate(frame, **checkpoint.call(case), past_key_values=cache, use_cache=True)
        cache = gaze.past_key_values
        assert torch.equal(gaze.gazing_pos, checkpoint.expected[f"{case}.{index}.gazing_pos"])
        assert torch.equal(gaze.if_padded_gazing, checkpoint.expected[f"{case}.{index}.if_padded_gazing"])


def test_scores_of_a_given_gaze_equal_the_recorded_ones(published):
    checkpoint, model = published
    given = [
        checkpoint.expected[f"given.in.{key}"] for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")
    ]
    with torch.no_grad():
        scores = model(checkpoint.video("given"), *given)
    for key in ("log_action_probs", "task_loss_prediction"):
        torch.testing.assert_close(scores[key], checkpoint.expected[f"given.{key}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float32_gives_almost_all_of_the_same_ids(name):
    checkpoint = Checkpoint(checkpoint_folder(name))
    model = checkpoint.model(torch.float32)
    same = total = 0
    for case in ("ratio", "ratio_per_frame", "ratio_full"):
        gaze = model.generate(checkpoint.video(case).float(), **checkpoint.call(case))
        same += int((gaze.gazing_pos == checkpoint.expected[f"{case}.gazing_pos"]).sum())
        total += gaze.gazing_pos.numel()
    assert same >= 0.999 * total
