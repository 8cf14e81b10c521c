import inspect
import re
import runpy
import warnings
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeVideoProcessor,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeGrid,
    GazeOutput,
    GreedyGazeConfig,
    GreedyGazeSelector,
    gaze_video,
)
from transformers_autogaze.integrations import qwen_vl_gazing
from transformers_autogaze.integrations.qwen_vl import GazeQwenVL
from transformers_autogaze.integrations.qwen_vl_gazing import UnitGazer, UnitSizes
from transformers_autogaze.integrations.qwen_vl_tower import encode_units
from transformers_autogaze.integrations.qwen_vl_units import kept_units, locate_units, unfold_units
from transformers_autogaze.video import write_video
from transformers_autogaze.video.demo import render_demo_clip


EXAMPLE = Path(__file__).parents[1] / "examples" / "qwen_vl_video_qa.py"
IMAGE, VIDEO, START, END = 46, 47, 48, 49
GRID = GazeGrid([16, 32], patch_size=8)
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def tiny_mllm(family: str, patch_size: int = 4, tokens: int = 50, seed: int = 0, **vision):
    """A random MLLM of one family; weights are large enough that its answers depend on its inputs."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": tokens,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": patch_size,
        "out_hidden_size": 32,
        **vision,
    }
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    if family == "qwen2_5_vl":
        # Windows of 2x2 units.
        vision = {"window_size": 4 * patch_size, "fullatt_block_indexes": [1], "tokens_per_second": 2, **vision}
        mllm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    else:
        vision = {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 25, **vision}
        mllm = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    for name, parameter in mllm.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 if "embed" in name else 1.5 * parameter[0].numel() ** -0.5)
    nn.init.normal_(mllm.lm_head.weight, std=0.2 * 32**-0.5)  # logits below 1
    return mllm.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def mllm(request):
    """An MLLM that tests must not change."""
    return tiny_mllm(request.param)


def tiny_features(**settings) -> FeatureGazeModel:
    """A small network with random weights, whose vectors depend on its inputs."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "feature_size": 6, "initializer_range": 0.3}
    return FeatureGazeModel(FeatureGazeConfig(**sizes, **settings)).eval()


def write_prompt(family: str, parts: list) -> list[int]:
    """Writes a prompt as the family's processor does: numbers are words, (times, rows, cols) a video, in patches."""
    prompt = []
    for part in parts:
        if isinstance(part, int):
            prompt.append(part)
            continue
        times, rows, cols = part
        units = rows * cols // 4
        if family == "qwen2_5_vl":
            prompt += [START, *[VIDEO] * (times * units), END]
        else:
            for time in range(times):
                prompt += [30 + time, START, *[VIDEO] * units, END]
    return prompt


def make_inputs(mllm, rows: list[list], seed: int = 0, padding_side: str = "left") -> dict:
    """Makes the outputs of a processor for prompts of words and videos."""
    family, generator = mllm.config.model_type, torch.Generator().manual_seed(seed)
    prompts = [write_prompt(family, parts) for parts in rows]
    grids = torch.tensor([part for parts in rows for part in parts if not isinstance(part, int)])
    length = max(map(len, prompts))
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), length) if padding_side == "left" else slice(0, len(prompt))
        input_ids[row, place] = torch.tensor(prompt)
        attention_mask[row, place] = 1
    side = mllm.config.vision_config.patch_size
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values_videos": torch.randn(int(grids.prod(1).sum()), 6 * side * side, generator=generator),
        "video_grid_thw": grids,
        "mm_token_type_ids": (input_ids == IMAGE) + 2 * (input_ids == VIDEO),
    }
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([0.5 + video for video in range(len(grids))])
    return inputs


def as_original(mllm, inputs: dict) -> dict:
    """Leaves out the types of tokens if the MLLM computes them from the tokens, as in its first versions."""
    known = inspect.signature(mllm.model.get_rope_index).parameters
    return {key: value for key, value in inputs.items() if key != "mm_token_type_ids" or key in known}


def full_gaze(inputs: dict) -> list[GazeOutput]:
    return [random_gaze(int(grid[0]) * 2, share=2) for grid in inputs["video_grid_thw"]]


def random_gaze(frames: int, share: float = 0.15, seed: int = 0) -> GazeOutput:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(1, frames, count, generator=generator) < share for count in GRID.num_patches_each_scale]
    masks[0] &= share > 1  # a coarse patch would keep a quarter of the frame
    masks[1][:, :, seed % masks[1].shape[-1]] = True
    return GazeOutput.from_masks(masks, GRID)


def gazes_for(inputs: dict) -> list[GazeOutput]:
    return [random_gaze(2 * int(grid[0]), seed=video + 1) for video, grid in enumerate(inputs["video_grid_thw"])]


def kept_of(inputs: dict, gazes: list[GazeOutput]) -> list[torch.Tensor]:
    grids = inputs["video_grid_thw"].tolist()
    return [
        kept_units(gaze, (times, rows // 2, cols // 2))[0]
        for gaze, (times, rows, cols) in zip(gazes, grids, strict=True)
    ]


TWO_VIDEOS = [[1, 2, (2, 6, 10), 3, 4, (1, 4, 4), 5, 6]]
UNEQUAL = [[1, (2, 6, 10), 3], [4, 5, (1, 8, 4), 6, (3, 4, 6), 7], [1, 2, 3, 4]]


# Kept units


def test_units_are_listed_in_the_order_of_their_tokens():
    places = locate_units(torch.tensor([[1, 4, 2], [2, 2, 4]]), merge_size=2)
    assert torch.stack(places).T.tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 1],
        [1, 1, 0, 0],
        [1, 1, 0, 1],
    ]


@pytest.mark.parametrize("frames", [3, 4])
def test_a_unit_is_kept_if_a_patch_of_any_of_its_frames_is_kept(frames):
    masks = [torch.zeros(1, frames, 4, dtype=torch.bool), torch.zeros(1, frames, 16, dtype=torch.bool)]
    masks[0][0, 1, 3] = True  # the bottom right quarter, in the second frame
    masks[1][0, 2, 0] = True  # the top left sixteenth, in the third
    kept = kept_units(GazeOutput.from_masks(masks, GRID), units=(2, 3, 5))
    assert kept[0, 0].int().tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert kept[0, 1].int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_a_gaze_at_every_second_frame_is_for_both_frames():
    masks = [torch.zeros(1, 2, 4, dtype=torch.bool), torch.zeros(1, 2, 16, dtype=torch.bool)]
    masks[0][0, 1, 0] = True
    kept = kept_units(GazeOutput.from_masks(masks, GRID, frame_sampling_rate=3), units=(3, 2, 2))
    assert kept[0].flatten(1).int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


# Keeping everything changes nothing


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rows", [TWO_VIDEOS, UNEQUAL], ids=["two-videos", "unequal-rows"])
def test_keeping_every_unit_gives_the_original_logits(mllm, rows, padding_side):
    inputs = make_inputs(mllm, rows, padding_side=padding_side)
    with torch.no_grad():
        expected = mllm(**as_original(mllm, inputs)).logits
        logits = GazeQwenVL(mllm)(**inputs, gaze=full_gaze(inputs)).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=0)


def test_all_units_of_images_beside_a_video_are_kept(mllm):
    inputs = make_inputs(mllm, [[1, (2, 4, 6), 2]])
    picture = torch.tensor([[3, START, *[IMAGE] * 4, END, 4]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], picture], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE) + 2 * (inputs["input_ids"] == VIDEO)
    inputs["pixel_values"] = torch.randn(16, inputs["pixel_values_videos"].shape[1])
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    inputs.pop("second_per_grid_ts", None)  # some versions of transformers need one for an image as well
    model = GazeQwenVL(mllm)
    with torch.no_grad():
        expected = mllm(**as_original(mllm, inputs)).logits
        logits = model(**inputs, gaze=full_gaze(inputs)).logits
        prompt = model.prepare_inputs(**inputs, gaze=gazes_for(inputs))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert int((prompt.input_ids == IMAGE).sum()) == 4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_keeping_every_unit_generates_the_original_tokens(mllm, options):
    inputs = make_inputs(mllm, UNEQUAL)
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    generated = GazeQwenVL(mllm).generate(**inputs, gaze=full_gaze(inputs), **options)
    assert torch.equal(generated, mllm.generate(**as_original(mllm, inputs), **options))
    other = {**inputs, "pixel_values_videos": -inputs["pixel_values_videos"]}
    assert not torch.equal(generated, GazeQwenVL(mllm).generate(**other, gaze=full_gaze(inputs), **options))


def test_the_outputs_of_generate_start_with_the_prompts_of_the_caller(mllm):
    inputs = make_inputs(mllm, UNEQUAL)
    options = {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    output = GazeQwenVL(mllm).generate(**inputs, gaze=gazes_for(inputs), **options)
    length = inputs["input_ids"].shape[1]
    assert output.sequences.shape == (6, length + 2)
    assert torch.equal(output.sequences[::2, :length], inputs["input_ids"])


def test_without_videos_the_mllm_is_called_with_unchanged_inputs(mllm):
    words = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(GazeQwenVL(mllm)(words).logits, mllm(words).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(GazeQwenVL(mllm).generate(words, **options), mllm.generate(words, **options))


# Dropping


def test_a_dropped_unit_has_no_effect(mllm):
    inputs = make_inputs(mllm, UNEQUAL)
    gazes = gazes_for(inputs)
    is_kept = torch.cat([kept.flatten() for kept in kept_of(inputs, gazes)]).repeat_interleave(4)
    assert 0 < is_kept.sum() < len(is_kept)
    changed = inputs["pixel_values_videos"].clone()
    changed[~is_kept] = torch.randn_like(changed[~is_kept]) * 100
    model = GazeQwenVL(mllm)
    with torch.no_grad():
        logits = model(**inputs, gaze=gazes).logits
        assert torch.equal(model(**{**inputs, "pixel_values_videos": changed}, gaze=gazes).logits, logits)
        changed[is_kept] += 0.1
        assert not torch.allclose(model(**{**inputs, "pixel_values_videos": changed}, gaze=gazes).logits, logits)


def test_the_language_model_reads_exactly_the_words_and_the_kept_units(mllm):
    inputs = make_inputs(mllm, UNEQUAL)
    gazes = gazes_for(inputs)
    kept = kept_of(inputs, gazes)
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs)

    handle = mllm.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        GazeQwenVL(mllm)(**inputs, gaze=gazes)
    handle.remove()
    words = (inputs["attention_mask"].bool() & (inputs["input_ids"] != VIDEO)).sum(1)
    units = torch.tensor([int(kept[0].sum()), int(kept[1].sum() + kept[2].sum()), 0])
    assert seen[0]["attention_mask"].sum(1).tolist() == (words + units).tolist()
    assert seen[0]["inputs_embeds"].shape[1] == int((words + units).max())

    prompt = GazeQwenVL(mllm).prepare_inputs(**inputs, gaze=gazes)
    assert torch.equal((prompt.input_ids == VIDEO) & prompt.attention_mask.bool(), prompt.visual_index >= 0)
    with torch.no_grad():
        is_kept = torch.cat([part.flatten() for part in kept])
        features, deepstack = encode_units(
            mllm.model.visual, inputs["pixel_values_videos"], inputs["video_grid_thw"], is_kept
        )
    torch.testing.assert_close(prompt.inputs_embeds[prompt.visual_index >= 0], features)
    assert len(deepstack) == (2 if mllm.config.model_type == "qwen3_vl" else 0)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_kept_tokens_have_their_positions_in_the_whole_prompt(mllm, padding_side):
    inputs = make_inputs(mllm, UNEQUAL, padding_side=padding_side)
    gazes = gazes_for(inputs)
    model = GazeQwenVL(mllm)
    prompt = model.prepare_inputs(**inputs, gaze=gazes, padding_side=padding_side)
    is_kept = torch.cat([kept.flatten() for kept in kept_of(inputs, gazes)])
    is_left = inputs["attention_mask"].bool().masked_scatter(inputs["input_ids"] == VIDEO, is_kept)
    whole = {key: value for key, value in as_original(mllm, inputs).items() if key != "pixel_values_videos"}
    expected, _ = mllm.model.get_rope_index(**whole)
    assert expected[:, is_left].unique(dim=1).shape[1] > 20
    assert torch.equal(prompt.position_ids[:, prompt.attention_mask.bool()], expected[:, is_left])


def rotated_positions(mllm, call) -> list[torch.Tensor]:
    """The positions that the language model's rotary embedding is called with in `call`."""
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs.get("position_ids", args[-1])[-3:].clone())

    handle = mllm.model.language_model.rotary_emb.register_forward_pre_hook(look, with_kwargs=True)
    call()
    handle.remove()
    return seen


def test_an_answer_starts_at_the_position_after_the_whole_prompt(mllm):
    inputs = make_inputs(mllm, UNEQUAL)
    options = {"max_new_tokens": 4, "do_sample": False}
    original = rotated_positions(mllm, lambda: mllm.generate(**as_original(mllm, inputs), **options))
    gazed = rotated_positions(mllm, lambda: GazeQwenVL(mllm).generate(**inputs, gaze=gazes_for(inputs), **options))
    assert len(original) == len(gazed) == 4
    assert gazed[0].shape[-1] < original[0].shape[-1]
    for step in range(1, 4):
        assert torch.equal(gazed[step], original[step])


def test_generating_step_by_step_equals_reading_the_whole_answer(mllm):
    inputs = make_inputs(mllm, TWO_VIDEOS)
    gazes, model = gazes_for(inputs), GazeQwenVL(mllm)
    words = {"suppress_tokens": [IMAGE, VIDEO, START, END]}
    generated = model.generate(**inputs, gaze=gazes, max_new_tokens=5, do_sample=False, **words)
    inputs["input_ids"] = generated
    inputs["attention_mask"] = torch.ones_like(generated)
    inputs["mm_token_type_ids"] = 2 * (generated == VIDEO)
    with torch.no_grad():
        logits = model(**inputs, gaze=gazes).logits
    assert logits[0, -6:-1, :IMAGE].argmax(-1).tolist() == generated[0, -5:].tolist()


def test_a_batch_of_unequal_videos_equals_each_alone(mllm):
    batch = make_inputs(mllm, UNEQUAL)
    gazes, model, options = gazes_for(batch), GazeQwenVL(mllm), {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        logits = model(**batch, gaze=gazes).logits
    generated = model.generate(**batch, gaze=gazes, **options)
    pixels, videos = batch["pixel_values_videos"].split(batch["video_grid_thw"].prod(1).tolist()), [[0], [1, 2]]
    for row, own in enumerate(videos):
        alone = make_inputs(mllm, UNEQUAL[row : row + 1])
        alone["pixel_values_videos"] = torch.cat([pixels[video] for video in own])
        if "second_per_grid_ts" in alone:
            alone["second_per_grid_ts"] = batch["second_per_grid_ts"][own]
        with torch.no_grad():
            expected = model(**alone, gaze=[gazes[video] for video in own]).logits[0]
        torch.testing.assert_close(logits[row, -len(expected) :], expected, atol=1e-5, rtol=0)
        answers = model.generate(**alone, gaze=[gazes[video] for video in own], **options)
        assert torch.equal(generated[row, -4:], answers[0, -4:])


# The tower on some of its units


def whole_tower(mllm, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        output = mllm.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    return output.pooler_output


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_pairs_of_frames_are_encoded_as_in_the_whole_video(family):
    mllm = tiny_mllm(family)
    inputs = make_inputs(mllm, [[(3, 6, 10), (2, 4, 4)]])
    places = locate_units(inputs["video_grid_thw"], 2)
    is_kept = places.time % 2 == 1
    features, _ = encode_units(mllm.model.visual, inputs["pixel_values_videos"], inputs["video_grid_thw"], is_kept)
    torch.testing.assert_close(features, whole_tower(mllm, inputs)[is_kept], atol=1e-5, rtol=0)


def test_whole_windows_are_encoded_as_in_the_whole_video():
    mllm = tiny_mllm("qwen2_5_vl", fullatt_block_indexes=[])
    inputs = make_inputs(mllm, [[(3, 6, 10), (2, 4, 4)]])
    places = locate_units(inputs["video_grid_thw"], 2)
    is_kept = (places.row // 2 + places.col // 2 + places.time) % 2 == 0
    features, _ = encode_units(mllm.model.visual, inputs["pixel_values_videos"], inputs["video_grid_thw"], is_kept)
    torch.testing.assert_close(features, whole_tower(mllm, inputs)[is_kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_units_is_masking_their_patches_in_the_whole_tower(family):
    # One window for each frame, so that the tower attends frame by frame in the order of the patches.
    mllm = tiny_mllm(family, **({"window_size": 400} if family == "qwen2_5_vl" else {}))
    inputs = make_inputs(mllm, [[(2, 6, 10), (1, 4, 8)]])
    is_kept = torch.cat([kept.flatten() for kept in kept_of(inputs, gazes_for(inputs))])
    grids = inputs["video_grid_thw"]
    lengths = (grids[:, 1] * grids[:, 2]).repeat_interleave(grids[:, 0]).tolist()
    masks = is_kept.repeat_interleave(4).split(lengths)
    calls = []

    def attend_to_kept(module, query, key, value, attention_mask, **kwargs):
        mask = masks[len(calls) % len(masks)].view(1, 1, 1, -1)
        calls.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask.expand(1, 1, query.shape[2], -1), **kwargs)

    AttentionInterface.register("attend_to_kept", attend_to_kept)
    features, _ = encode_units(mllm.model.visual, inputs["pixel_values_videos"], grids, is_kept, "frame")
    mllm.model.visual.config._attn_implementation = "attend_to_kept"
    masked = whole_tower(mllm, inputs)[is_kept]
    assert len(calls) == 3 * len(masks)
    torch.testing.assert_close(features, masked, atol=1e-5, rtol=0)


def canvas_mask(units: list[tuple], side: int | None) -> torch.Tensor:
    """Mask `(units, units)`: whether a unit (video, time, row, col) attends to another, inside windows of `side` or anywhere."""
    mask = torch.zeros(len(units), len(units), dtype=torch.bool)
    for number, (video, time, row, col) in enumerate(units):
        latest = {}
        for other in sorted(units):  # later units replace earlier ones
            in_window = side is None or (other[2] // side, other[3] // side) == (row // side, col // side)
            if other[0] == video and other[1] <= time and in_window:
                latest[other[2:]] = other
        for other in latest.values():
            mask[number, units.index(other)] = True
    return mask


def flash_by_hand(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q, cu_seq_lens_k, is_causal, **kwargs
):
    """Attention with the arguments of flash kernels, `(1, heads, tokens, head_dim)`, segment by segment."""
    sizes = (ends.diff().tolist() for ends in (cu_seq_lens_q, cu_seq_lens_k, cu_seq_lens_k))
    pieces = zip(
        *(part.split(size, dim=2) for part, size in zip((query, key, value), sizes, strict=True)), strict=True
    )
    outputs = [nn.functional.scaled_dot_product_attention(*piece, scale=scaling) for piece in pieces]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_by_hand"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_attends_to_its_frame_and_the_latest_units_kept_elsewhere(family, attention):
    mllm = tiny_mllm(family)
    AttentionInterface.register("flash_by_hand", flash_by_hand)
    mllm.model.visual.config._attn_implementation = attention
    tower, inputs = mllm.model.visual, make_inputs(mllm, [[(4, 6, 10), (1, 4, 4), (3, 4, 8)]])
    places = [tuple(place) for place in torch.stack(locate_units(inputs["video_grid_thw"], 2)).T.tolist()]
    is_kept = torch.rand(len(places), generator=torch.Generator().manual_seed(0)) < 0.4
    call, seen = (inputs["pixel_values_videos"], inputs["video_grid_thw"]), []
    features, deepstack = encode_units(tower, *call, is_kept)
    handle = tower.blocks[0].register_forward_pre_hook(lambda *call: seen.append(call[1:]), with_kwargs=True)
    with torch.no_grad():
        tower(*call)
    handle.remove()

    # The patches of the kept units in the tower's own order, window by window if it has any.
    order, side = list(range(len(places))), None
    if family == "qwen2_5_vl":
        side = 2
        order.sort(key=lambda unit: (*places[unit][:2], *(place // side for place in places[unit][2:]), unit))
    rows = is_kept[order].repeat_interleave(4)
    order = [unit for unit in order if is_kept[unit]]
    (hidden_states, *_), options = seen[0]
    hidden_states = hidden_states[rows]
    positions = tuple(part[rows] for part in options["position_embeddings"])
    masks = {
        is_full: canvas_mask([places[unit] for unit in order], None if is_full else side)
        .repeat_interleave(4, dim=0)
        .repeat_interleave(4, dim=1)
        for is_full in (True, False)
    }
    is_full, expected = True, []

    def attend(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, masks[is_full][None, None], **kwargs)

    AttentionInterface.register("attend_to_canvas", attend)
    tower.config._attn_implementation = "attend_to_canvas"
    with torch.no_grad():
        for number, block in enumerate(tower.blocks):
            is_full = side is None or number in tower.fullatt_block_indexes
            one_piece = torch.tensor([0, len(rows.nonzero())], dtype=torch.int32)
            hidden_states = block(hidden_states, cu_seqlens=one_piece, position_embeddings=positions)
            if number in getattr(tower, "deepstack_visual_indexes", ()):
                expected.append(tower.deepstack_merger_list[len(expected)](hidden_states))
        expected.insert(0, tower.merger(hidden_states))
    for ours, theirs in zip([features, *deepstack], expected, strict=True):
        torch.testing.assert_close(ours, theirs[torch.tensor(order).argsort()], atol=1e-5, rtol=0)


def test_with_every_unit_kept_the_canvas_changes_no_bit(mllm):
    inputs = make_inputs(mllm, [[1, (3, 6, 10), 2, (2, 4, 4)]])
    with torch.no_grad():
        canvas, frame = (
            GazeQwenVL(mllm, attention=attention)(**inputs, gaze=full_gaze(inputs)).logits
            for attention in ("canvas", "frame")
        )
        assert torch.equal(canvas, frame)
        canvas, frame = (
            GazeQwenVL(mllm, attention=attention)(**inputs, gaze=gazes_for(inputs)).logits
            for attention in ("canvas", "frame")
        )
        assert not torch.allclose(canvas, frame, atol=1e-3)


# Training


def test_labels_of_kept_tokens_give_a_loss_and_gradients(mllm):
    mllm = tiny_mllm(mllm.config.model_type)
    inputs = make_inputs(mllm, UNEQUAL)
    gazes, model = gazes_for(inputs), GazeQwenVL(mllm)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == VIDEO), -100)
    output = model(**inputs, gaze=gazes, labels=labels)
    prompt = model.prepare_inputs(**inputs, gaze=gazes, labels=labels, padding_side="left")
    assert int((prompt.labels >= 0).sum()) == int((labels >= 0).sum())
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), prompt.labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in mllm.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(bool(gradient.any()) for name, gradient in gradients.items() if "patch_embed" in name)

    model.zero_grad()
    mllm.gradient_checkpointing_enable()
    mllm.train()
    model(**inputs, gaze=gazes, labels=labels, use_cache=False).loss.backward()
    for name, parameter in mllm.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_may_be_offloaded(family):
    accelerate = pytest.importorskip("accelerate")
    mllm = tiny_mllm(family)
    inputs = make_inputs(mllm, TWO_VIDEOS)
    call = {**inputs, "gaze": gazes_for(inputs)}
    with torch.no_grad():
        expected = GazeQwenVL(mllm)(**call).logits
        generated = GazeQwenVL(mllm).generate(**call, max_new_tokens=3, do_sample=False)
        accelerate.cpu_offload(mllm, torch.device("cpu"))
        assert mllm.model.visual.patch_embed.proj.weight.is_meta
        assert torch.equal(GazeQwenVL(mllm)(**call).logits, expected)
        assert torch.equal(GazeQwenVL(mllm).generate(**call, max_new_tokens=3, do_sample=False), generated)


def test_eager_attention_gives_the_same(mllm):
    inputs = make_inputs(mllm, UNEQUAL)
    call = {**inputs, "gaze": gazes_for(inputs)}
    other = tiny_mllm(mllm.config.model_type)
    other.set_attn_implementation("eager")
    with torch.no_grad():
        logits, expected = GazeQwenVL(other)(**call).logits, GazeQwenVL(mllm)(**call).logits
    real = GazeQwenVL(mllm).prepare_inputs(**call, padding_side="left").attention_mask.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=0)


def test_the_mllm_is_unchanged_after_a_call(mllm):
    inputs = make_inputs(mllm, TWO_VIDEOS)
    state = {name: value.clone() for name, value in mllm.state_dict().items()}
    with torch.no_grad():
        expected = mllm(**as_original(mllm, inputs)).logits
        model = GazeQwenVL(mllm)
        model(**inputs, gaze=gazes_for(inputs))
        model.generate(**inputs, gaze=gazes_for(inputs), max_new_tokens=2)
        with pytest.raises(TypeError):
            model.generate(**inputs, gaze=gazes_for(inputs), max_new_tokens="two")
        assert torch.equal(mllm(**as_original(mllm, inputs)).logits, expected)
    assert not mllm.model.language_model._forward_pre_hooks
    assert all(torch.equal(value, state[name]) for name, value in mllm.state_dict().items())


# Gazing at the frames of the MLLM's processor


def fold_units(frames: torch.Tensor, side: int) -> torch.Tensor:
    """Cuts frames `(frames, height, width, 3)` into the patches of merge units, pair by pair."""
    patches = []
    for pair in frames.split(2):
        for rows in pair.split(2 * side, dim=1):
            for unit in rows.split(2 * side, dim=2):
                for half in unit.split(side, dim=1):
                    patches += [patch.permute(3, 0, 1, 2).flatten() for patch in half.split(side, dim=2)]
    return torch.stack(patches)


def test_unfolding_units_restores_the_frames():
    frames = torch.rand(4, 8, 24, 3)
    assert torch.equal(unfold_units(fold_units(frames, 4), (2, 2, 6), merge_size=2, patch_size=4), frames)


def frames_and_inputs(
    mllm, rows: list[list], seed: int = 0
) -> tuple[list[torch.Tensor], AutoGazeVideoProcessor, dict]:
    """Makes videos `(frames, height, width, 3)` of levels, a processor and its outputs for prompts with them."""
    generator = torch.Generator().manual_seed(seed)
    processor = AutoGazeVideoProcessor(rescale_factor=1 / 255, offset=False)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    inputs = make_inputs(mllm, rows)
    videos = [
        torch.randint(0, 256, (2 * times, 4 * height, 4 * width, 3), generator=generator).float()
        for times, height, width in inputs["video_grid_thw"].tolist()
    ]
    inputs["pixel_values_videos"] = torch.cat([fold_units((levels / 255 - mean) / std, 4) for levels in videos])
    return videos, processor, inputs


def test_the_selector_gazes_at_the_merge_units_of_the_mllms_frames(mllm):
    videos, processor, inputs = frames_and_inputs(mllm, [[1, (3, 4, 6), 2]])
    model = GazeQwenVL(mllm, GreedyGazeSelector(), processor)
    gaze = model.gaze(inputs["pixel_values_videos"], inputs["video_grid_thw"], tokens_per_clip=7)[0]
    assert gaze.grid == GazeGrid([(16, 24)], 8) and gaze.frame_sampling_rate == 2
    frames = AutoGazeVideoProcessor().to_pixel_values(videos[0].permute(0, 3, 1, 2))[None]
    expected = GreedyGazeSelector().for_grid(gaze.grid).generate(frames, tokens_per_clip=7, tubelet_size=2)
    assert torch.equal(gaze.gazing_pos, expected.gazing_pos)
    kept = kept_units(gaze, (3, 2, 3))
    assert torch.equal(kept.flatten(2), gaze.gazing_mask[0]) and kept.sum() == 7
    with torch.no_grad():
        logits = model(**inputs, tokens_per_clip=7).logits
        assert torch.equal(logits, model(**inputs, gaze=gaze).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"gazing_ratio": [0.5, 0.2, 0.9, 0.1, 0.3]},
        {"gazing_ratio": 0.4},
        {"task_loss_requirement": 1.2},
        {"tokens_per_clip": 20, "task_loss_requirement": -1.0},  # a threshold that is never met
    ],
)
def test_a_long_video_is_gazed_at_in_parts(settings, monkeypatch):
    videos, processor, inputs = frames_and_inputs(tiny_mllm("qwen3_vl"), [[1, (5, 6, 10), 2]])
    gazer = UnitGazer(GreedyGazeSelector(), processor, None, UnitSizes(merge_size=2, patch_size=4, frames=2))
    call = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    whole = gazer.gaze(*call, **settings)[0]
    monkeypatch.setattr(qwen_vl_gazing, "_MAX_PIXELS", 2 * 2 * 24 * 40)  # two pairs of frames
    parts = gazer.gaze(*call, **settings)[0]
    assert torch.equal(parts.gazing_mask[0], whole.gazing_mask[0])
    assert int(parts.num_real) == settings.get("tokens_per_clip", int(parts.num_real))
    with pytest.raises(ValueError, match="`gazing_ratio` must be one number or one for each of"):
        gazer.gaze(*call, gazing_ratio=[0.5] * 6)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"gazing_ratio": 0.25}, [2 * 3, 3 * 2]),  # of 15 and 8 units in each of 2 and 3 pairs of frames
        ({"gazing_ratio": [0.1, 1.0]}, None),
        ({"clip_ratio": 0.25}, [7, 6]),
        ({"tokens_per_clip": 10}, [10, 10]),
        ({}, [3, 2]),
    ],
)
@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_the_language_model_reads_as_many_units_as_the_budget(mllm, kind, settings, kept):
    rows = [[1, (2, 6, 10), 3, 4, (3, 4, 8), 5]] if kept else [[1, (2, 6, 10), 3, 4, 5]]
    kept = [1 + 15] if kept is None else kept
    _, processor, inputs = frames_and_inputs(mllm, rows)
    pixels = GreedyGazeSelector(GreedyGazeConfig([16, 32], 8, clip_ratio=0.1))
    model = GazeQwenVL(mllm, pixels if kind == "pixels" else tiny_features(clip_ratio=0.1), processor)
    prompt = model.prepare_inputs(**inputs, **settings)
    words = int((inputs["input_ids"] != VIDEO).sum())
    assert prompt.attention_mask.sum().item() == prompt.input_ids.shape[1] == words + sum(kept)
    gaze = model.gaze(inputs["pixel_values_videos"], inputs["video_grid_thw"], **settings)
    units = (inputs["video_grid_thw"].prod(1) // 4).tolist()
    assert model.count_units(gaze, inputs["video_grid_thw"]) == list(zip(kept, units, strict=True))
    with torch.no_grad():
        assert model(**inputs, **settings).logits.shape[1] == words + sum(kept)


def test_a_threshold_of_features_keeps_the_units_that_every_pair_of_frames_needs(mllm):
    _, processor, inputs = frames_and_inputs(mllm, [[1, (3, 6, 10), 3, 4]])
    model = GazeQwenVL(mllm, tiny_features(), processor)
    call, counts = (inputs["pixel_values_videos"], inputs["video_grid_thw"]), []
    for threshold in (0.0, 0.3, 0.8):
        gaze = model.gaze(*call, task_loss_requirement=threshold)
        for time in range(3):
            is_here = (gaze[0].frame_of_slot == time) & ~gaze[0].if_padded_gazing[0]
            assert not is_here.any() or float(gaze[0].task_loss_prediction[0, is_here][-1]) <= threshold + 1e-5
        prompt = model.prepare_inputs(**inputs, task_loss_requirement=threshold)
        counts.append(model.count_units(gaze, inputs["video_grid_thw"])[0][0])
        assert prompt.input_ids.shape[1] == int((inputs["input_ids"] != VIDEO).sum()) + counts[-1]
    assert counts[0] == 45 > counts[1] > counts[2] > 0


def test_a_ratio_of_one_gives_the_original_logits_and_answers(mllm):
    _, processor, inputs = frames_and_inputs(mllm, UNEQUAL)
    model, options = GazeQwenVL(mllm, GreedyGazeSelector(), processor), {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        expected = mllm(**as_original(mllm, inputs)).logits
        real = inputs["attention_mask"].bool()
        for settings in ({"gazing_ratio": 1.0}, {"clip_ratio": 1.0}):
            logits = model(**inputs, **settings).logits
            torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=0)
    generated = model.generate(**inputs, clip_ratio=1.0, **options)
    assert torch.equal(generated, mllm.generate(**as_original(mllm, inputs), **options))


def test_a_selector_of_fixed_scales_warns_once_of_its_share(mllm):
    torch.manual_seed(0)
    selector = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64, max_num_frames=4)).eval()
    videos, processor, inputs = frames_and_inputs(mllm, [[1, (2, 6, 10), 3, (3, 4, 8)]])
    model = GazeQwenVL(mllm, selector, processor)
    call = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    with pytest.warns(
        UserWarning, match=r"AutoGazeModel has fixed scales: it kept 10.0% of .* of 54 merge units"
    ) as seen:
        gaze = model.gaze(*call, gazing_ratio=0.1)
    kept = sum(count for count, _ in model.count_units(gaze, inputs["video_grid_thw"]))
    assert f"lie on {kept} of 54 merge units ({kept / 54:.1%})" in str(seen[0].message) and kept > 0.2 * 54
    expected = [gaze_video(selector, levels.byte(), gazing_ratio=0.1) for levels in videos]
    assert all(torch.equal(ours.gazing_pos, theirs.gazing_pos) for ours, theirs in zip(gaze, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.gaze(*call, gazing_ratio=0.1)
        GazeQwenVL(mllm, GreedyGazeSelector(), processor).gaze(*call, gazing_ratio=0.1)
    for name in ("clip_ratio", "tokens_per_clip"):
        with pytest.raises(
            ValueError, match=f"`{name}` must not be given to AutoGazeModel, which has fixed scales, got 1"
        ):
            model.generate(**inputs, **{name: 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_ratio": 1.5}, "`clip_ratio` must be above 0 and at most 1"),
        ({"clip_ratio": 0}, "`clip_ratio` must be above 0 and at most 1"),
        ({"tokens_per_clip": 31}, r"`tokens_per_clip` must be a whole number in 1\.\.30"),
        ({"tokens_per_clip": 10, "clip_ratio": 0.1}, "only one of `gazing_ratio`, `clip_ratio`"),
        ({"gazing_ratio": 0.1, "clip_ratio": 0.1}, "only one of `gazing_ratio`, `clip_ratio`"),
        ({"gazing_ratio": -0.1}, "`gazing_ratio` must lie in 0..1"),
    ],
)
def test_wrong_budgets_are_refused_before_the_tower_runs(mllm, settings, message):
    _, processor, inputs = frames_and_inputs(mllm, [[1, (2, 6, 10), 3]])
    model = GazeQwenVL(mllm, GreedyGazeSelector(), processor)
    handle = mllm.model.visual.patch_embed.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    try:
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**inputs, **settings)
    finally:
        handle.remove()
    with pytest.raises(
        ValueError, match="`tiles` must not be given to GreedyGazeSelector, which gazes at merge units"
    ):
        model.gaze(inputs["pixel_values_videos"], inputs["video_grid_thw"], tiles="grid")


def make_processor(family: str):
    """The family's own processor with 46 words, for videos of any size."""
    pytest.importorskip("torchvision")
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    vocabulary = {word: index for index, word in enumerate([f"w{index}" for index in range(46)] + names)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w0", "pad_token": "w1", "additional_special_tokens": names}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special, padding_side="left")
    template = "<|vision_start|><|video_pad|><|vision_end|> {{ messages[0]['content'][1]['text'] }}"
    if family == "qwen2_5_vl":
        video_processor = transformers.Qwen2VLVideoProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 12544})
        pictures = transformers.Qwen2VLImageProcessor()
        return transformers.Qwen2_5_VLProcessor(pictures, tokenizer, video_processor, chat_template=template)
    video_processor = transformers.Qwen3VLVideoProcessor(size={"shortest_edge": 64 * 64, "longest_edge": 32768})
    pictures = transformers.Qwen2VLImageProcessor(patch_size=16)
    return transformers.Qwen3VLProcessor(pictures, tokenizer, video_processor, chat_template=template)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_the_original_processor_can_be_passed_on(family):
    processor = make_processor(family)
    side = processor.video_processor.patch_size
    mllm = tiny_mllm(family, patch_size=side)
    mark = "<|vision_start|><|video_pad|><|vision_end|>"
    videos = [torch.randint(0, 256, (count, 3, 4 * side, 6 * side), dtype=torch.uint8) for count in (4, 3)]
    inputs = processor(
        text=[f"w5 {mark} w6", f"w7 w8 {mark} w9 w10"],
        videos=videos,
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6], [2, 4, 6]]
    model = GazeQwenVL(mllm, GreedyGazeSelector(), processor)
    gazer = UnitGazer(model.gaze_model, model.processor, None, UnitSizes(2, side, 2))
    frames = list(gazer.frames(inputs["pixel_values_videos"], inputs["video_grid_thw"]))
    assert torch.equal(torch.from_numpy(frames[0]), videos[0].permute(0, 2, 3, 1))

    options = {"max_new_tokens": 4, "do_sample": False}
    # Three frames are two pairs: the processor has repeated the last.
    generated = model.generate(**inputs, gaze=[random_gaze(count, share=2) for count in (4, 3)], **options)
    assert torch.equal(generated, mllm.generate(**as_original(mllm, inputs), **options))
    gazed = model.generate(**inputs, gazing_ratio=0.05, **options)
    assert gazed.shape == generated.shape and torch.equal(gazed[:, :-4], inputs["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_example_runs_on_a_checkpoint_and_a_file(family, tmp_path, monkeypatch, capsys):
    processor = make_processor(family)
    processor.save_pretrained(tmp_path)
    tiny_mllm(family, patch_size=processor.video_processor.patch_size).save_pretrained(tmp_path)
    clip = write_video(tmp_path / "clip.mp4", render_demo_clip(20), fps=10)
    arguments = [str(clip), "w4 w5", "--mllm", str(tmp_path), "--num-frames", "6"]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    units, answer = capsys.readouterr().out.splitlines()
    pattern = r"GreedyGazeSelector: (\d+) of (\d+) merge units, (\d+) of (\d+) tokens"
    kept, total, length, whole = map(int, re.fullmatch(pattern, units).groups())
    assert kept == total // 4 and whole - length == total - kept and answer.split()[0].startswith("w")


# Errors


def test_errors_name_the_argument_that_does_not_fit(mllm):
    inputs = make_inputs(mllm, [[1, (2, 4, 6), 2]])
    gaze, model = gazes_for(inputs), GazeQwenVL(mllm)
    with pytest.raises(ValueError, match="`gaze` does not fit video 0: it must be of 4 frames, 2 for each .* got 6"):
        model(**inputs, gaze=[random_gaze(6)])
    with pytest.raises(ValueError, match="`gaze` must be one for each of the 1 videos, got 2"):
        model(**inputs, gaze=gaze * 2)
    with pytest.raises(ValueError, match="`gaze` must be one for each of the 1 videos, got 2"):
        model(**inputs, gaze=[GazeOutput.stack([random_gaze(4), random_gaze(4)])])
    with pytest.raises(ValueError, match="`gaze` must be given where the model was made without"):
        model(**inputs)
    nothing = GazeOutput.from_masks([torch.zeros_like(mask) for mask in gaze[0].gazing_mask], GRID)
    with pytest.raises(ValueError, match="`gaze` must keep at least one patch"):
        model(**inputs, gaze=nothing)
    words = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == VIDEO, 3)}
    with pytest.raises(ValueError, match=r"one video placeholder, the token 47, for each of the 12 .* got no video"):
        model(**words, gaze=gaze)
    single = {**inputs, "input_ids": torch.tensor([[1, START, VIDEO, END]]), "attention_mask": None}
    with pytest.raises(ValueError, match=r"one video placeholder, the token 47, for each of the 12 .* got 1"):
        model.generate(**single, gaze=gaze)
    with pytest.raises(ValueError, match=r"`pixel_values_videos` must have the 48 patches .* got \(40, 96\)"):
        model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:40]}, gaze=gaze)
    with pytest.raises(ValueError, match="`padding_side` must be 'left' or 'right', got 'both'"):
        model.prepare_inputs(**inputs, gaze=gaze, padding_side="both")
    with pytest.raises(ValueError, match="`pixel_values_videos` must be given for prompts with a video placeholder"):
        model(inputs["input_ids"])


def test_models_and_processors_of_other_types_are_refused():
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tiny, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    text = {**tiny, "model_type": "llama", "vocab_size": 50}
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49))
    with pytest.raises(
        ValueError, match="`mllm` must be a Qwen2_5_VL.* or Qwen3VL.*, got LlavaForConditionalGeneration"
    ):
        GazeQwenVL(llava)
    with pytest.raises(ValueError, match="`attention` must be one of 'canvas', 'frame', got 'block_causal'"):
        GazeQwenVL(tiny_mllm("qwen3_vl"), attention="block_causal")
    with pytest.raises(ValueError, match="`processor` must be the processor, .* got object"):
        GazeQwenVL(tiny_mllm("qwen3_vl"), GreedyGazeSelector(), object())
