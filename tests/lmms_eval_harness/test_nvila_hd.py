"""NVILA-HD-Video in lmms-eval, with stand-ins for its processor and its MLLM, which are published as remote code."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import BatchFeature

from transformers_autogaze import GREEDY_SELECTOR


pytest.importorskip("lmms_eval")
from lmms_eval.api.instance import Instance  # noqa: E402

from transformers_autogaze.lmms_harness import nvila_hd  # noqa: E402


VIDEO = "<vila/video>"


class Processor:
    """Takes as many tokens for a video as are gazed at, after the published settings unless others are given."""

    def __init__(self, **settings):
        self._autogaze_model, self.calls = None, []
        self.gazing_ratio_tile, self.task_loss_requirement_tile = [0.2] + [0.06] * 15, 0.6
        self.gazing_ratio_thumbnail, self.task_loss_requirement_thumbnail = 1, None
        self.tokenizer = SimpleNamespace(video_token=VIDEO)
        self.__dict__.update(settings)

    def _get_gazing_info_from_videos(self, videos_inputs):
        return {"gazing_pos_tiles": [torch.zeros(2, 7)]}

    def __call__(self, text, videos, return_tensors):
        self.calls.append((text, videos))
        frames = torch.rand(1, 4, 3, 392, 392, generator=torch.Generator().manual_seed(0))
        info = self._get_gazing_info_from_videos(
            {"pixel_values_videos_tiles_autogaze": [frames], "pixel_values_videos_thumbnails_autogaze": [frames[:1]]}
        )
        tokens = info["gazing_pos_tiles"][0].shape[1]
        return BatchFeature({"input_ids": torch.zeros(1, tokens, dtype=torch.long), "gazing_info": info})

    def batch_decode(self, tokens, skip_special_tokens):
        return [" B " for _ in tokens]


class Model(torch.nn.Module):
    device = torch.device("cpu")

    def generate(self, input_ids, gazing_info, max_new_tokens, do_sample):
        return torch.cat([input_ids, input_ids.new_zeros(1, max_new_tokens)], dim=1)


@pytest.fixture
def load(monkeypatch):
    def call(**arguments):
        parts = {"AutoProcessor": lambda name, trust_remote_code, **settings: Processor(**settings)}
        parts["AutoModel"] = lambda name, **settings: Model()
        for part, from_pretrained in parts.items():
            monkeypatch.setattr(nvila_hd, part, SimpleNamespace(from_pretrained=from_pretrained))
        return nvila_hd.GazeNvilaHD(**arguments)

    return call


def ask(model, *content):
    model.task_dict = {"hlvid": {"test": [{}]}}
    messages = [{"role": "user", "content": list(content)}]
    arguments = ("", lambda doc: messages, {"max_new_tokens": 3}, 0, "hlvid", "test")
    metadata = {"task": "hlvid", "doc_id": 0, "repeats": 1}
    return model.generate_until([Instance("generate_until", arguments, 0, metadata)])


VIDEO_PART, TEXT_PART = {"type": "video", "url": "clip.mp4"}, {"type": "text", "text": "What?"}


def test_it_is_asked_as_its_card_says_and_says_what_that_took(load):
    model = load()
    assert model.processor.task_loss_requirement_tile == 0.6
    [result] = ask(model, VIDEO_PART, TEXT_PART)
    assert model.processor.calls == [(f"{VIDEO}\n\nWhat?", "clip.mp4")] and result.text == "B"
    costs = result.token_counts.to_dict()
    assert (costs["input_tokens"], costs["output_tokens"]) == (7, 3)
    assert costs["choosing_seconds"] > 0 and costs["answering_seconds"] > 0 and "encoding_seconds" not in costs


def test_a_selector_of_this_package_takes_the_place_of_the_one_inside(load):
    model = load(selector=str(GREEDY_SELECTOR), gazing_ratio=0.02, max_batch_size_autogaze=2)
    assert model.processor.gazing_ratio_tile == 0.02 and model.processor.task_loss_requirement_tile is None
    [result] = ask(model, VIDEO_PART, TEXT_PART)
    assert result.token_counts.input_tokens == 4 * int(0.02 * 1060)


def test_without_a_selector_everything_is_kept(load):
    processor = load(selector="none").processor
    assert (processor.gazing_ratio_tile, processor.task_loss_requirement_tile) == (1, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gazing_ratio": 2}, "`gazing_ratio` must lie in 0..1"),
        ({"selector": "nowhere"}, "`selector`.*'nowhere'"),
        ({"selector": "none", "gazing_ratio": 0.5}, "`gazing_ratio` must not be given with `selector` 'none'"),
        ({"batch_size": 2}, "`batch_size` must be 1"),
    ],
)
def test_wrong_settings_are_refused(load, monkeypatch, arguments, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_a_task_of_pictures_is_refused(load):
    with pytest.raises(ValueError, match="'hlvid' shows 0 videos and 1 pictures"):
        ask(load(), {"type": "image", "url": "picture"}, TEXT_PART)
