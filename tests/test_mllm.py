"""The LLaVA family on kept patches, compared with the original models."""

import copy
import inspect

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    AutoGazeVideoProcessor,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeGrid,
    GazeOutput,
    GreedyGazeConfig,
    GreedyGazeSelector,
)
from transformers_autogaze.integrations.mllm import GazeVideoLM
from transformers_autogaze.integrations.video_tokens import SinusoidalTimeEmbedding


# The normalisation of the towers' frames.
TOWER_PIXELS = AutoGazeVideoProcessor(offset=False, rescale_factor=1 / 255, image_mean=[0.5] * 3, image_std=[0.25] * 3)
VIDEO, IMAGE, HIDDEN = 60, 61, 32
SCALES = [16, 32]  # of patches of 8 pixels: 4 and 16 a frame
WORDS = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**WORDS, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": None}
TOWER = {**WORDS, "num_hidden_layers": 4, "hidden_size": 24, "image_size": 32, "patch_size": 8}
# Its names before and after transformers renamed it.
VIP_LAYERS = "vision_feature_layer" if hasattr(VipLlavaConfig(), "vision_feature_layer") else "vision_feature_layers"


def build(name: str, pools: bool = False, **changes):
    """A tiny MLLM, with or without its pooling."""
    torch.manual_seed(0)
    parts = {"vision_config": CLIPVisionConfig(**TOWER), "text_config": LlamaConfig(**TEXT), **changes}
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    if name == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=IMAGE))
    elif name == "vipllava":
        config = VipLlavaConfig(**parts, image_token_index=IMAGE, **{VIP_LAYERS: [-1, -2, 1]})
        model = VipLlavaForConditionalGeneration(config)
    elif name == "llava_next_video":
        pooling = {"spatial_pool_mode": "average", "spatial_pool_stride": 2 if pools else 1}
        model = LlavaNextVideoForConditionalGeneration(LlavaNextVideoConfig(**parts, **tokens, **pooling))
    elif name == "llava_onevision":
        parts = {"vision_config": SiglipVisionConfig(**TOWER), "text_config": Qwen2Config(**TEXT), **changes}
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**parts, **tokens))
        if not pools:
            model.model.apply_pooling = lambda features: features
    else:
        model = VideoLlavaForConditionalGeneration(VideoLlavaConfig(**parts, **tokens))
    # With the default initialisation logits would hardly differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


FAMILIES = ["llava", "vipllava", "llava_next_video", "llava_onevision", "video_llava"]
CASES = [
    *((name, {}) for name in FAMILIES),
    ("llava", {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"}),
    ("llava_next_video", {"vision_feature_layer": [-1, 2]}),
    ("llava_onevision", {"vision_feature_layer": -2}),
    ("video_llava", {"vision_feature_layer": [-1, 0]}),
]


def random_gaze(grid: GazeGrid, num_frames: int, seed: int = 0) -> GazeOutput:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(1, num_frames, count, generator=generator) < 0.3 for count in grid.num_patches_each_scale]
    masks[0][:, 0] = True
    return GazeOutput.from_masks(masks, grid)


def clip(num_frames: int, seed: int = 0, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(num_frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def onevision() -> GazeVideoLM:
    """An MLLM on patches of two scales, 4 and 16 of a frame, which a greedy selector chooses."""
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=SCALES, patch_size=8))
    return GazeVideoLM(build("llava_onevision"), selector, TOWER_PIXELS, scales=SCALES).eval()


def original_inputs(
    model: GazeVideoLM, prompt: list[int], videos: list[torch.Tensor], with_cls: bool, places: int = 16
) -> dict:
    """Writes a prompt as the MLLM's own processor does, with all tokens of a video."""
    newline = model.mllm.config.model_type == "llava_onevision"
    ids, left = [], list(videos)
    for token in prompt:
        ids += [token] * (len(left.pop(0)) * (places + with_cls) + newline if token == model.placeholder_id else 1)
    pixels = {"pixel_values_videos": torch.stack(videos)}
    if model.placeholder_id == IMAGE:
        pixels = {"pixel_values": torch.cat(videos)}
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **pixels}


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_full_gaze_gives_the_original_logits(name, changes):
    mllm = build(name, **changes)
    model = GazeVideoLM(mllm, scales=SCALES, attention="frame", chunk_frames=2, max_batch_size=2)
    videos, gaze = [clip(3, seed=1), clip(3, seed=2)], [GazeOutput.full(model.grid, 1, 3, scale=-1)] * 2
    prompt = [5, 6, model.placeholder_id, 7, 8, model.placeholder_id, 9]
    with_cls = name == "video_llava" or changes.get("vision_feature_select_strategy") == "full"
    original = original_inputs(model, prompt, videos, with_cls)
    with torch.no_grad():
        expected = mllm(**original).logits
        as_processor_writes = model(original["input_ids"], torch.stack(videos), gaze=gaze).logits
        one_placeholder = model(torch.tensor([prompt]), videos, gaze=gaze).logits
    assert expected.std() > 0.1
    assert (as_processor_writes - expected).abs().max() < 1e-4
    assert torch.equal(one_placeholder, as_processor_writes)


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_by_default_gives_the_mllms_own_embeddings(name):
    # 44 pixels are five patches of 8, and four pixels that the tower crops; pooling makes three places of five.
    side = 36 if name == "llava_next_video" else 44
    tower = {**TOWER, "image_size": side}
    vision = SiglipVisionConfig(**tower) if name == "llava_onevision" else CLIPVisionConfig(**tower)
    mllm = build(name, pools=True, vision_config=vision)
    model = GazeVideoLM(mllm, GreedyGazeSelector(), TOWER_PIXELS, chunk_frames=2).eval()
    places = {"llava_onevision": GazeGrid([39], 13), "llava_next_video": GazeGrid([32], 16)}
    assert model.grid == places.get(name, GazeGrid([40], 8)) and model.vision.attention == "canvas"
    video, prompt = clip(3, height=side, width=side), torch.tensor([[5, 6, model.placeholder_id, 7]])
    count = model.grid.num_patches
    original = original_inputs(model, prompt[0].tolist(), [video], with_cls=name == "video_llava", places=count)
    with torch.no_grad():
        expected = mllm(**original).logits
        logits = model(prompt, [video], gazing_ratio=1.0).logits
        assert (logits - expected).abs().max() < 1e-4
        video[..., side - 4 :, :] = video[..., side - 4 :] = 9.0
        assert torch.equal(model(prompt, [video], clip_ratio=1.0).logits, logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(prompt, [video], gazing_ratio=1.0, **options)[:, 4:]
    assert torch.equal(answer, mllm.generate(**original, **options)[:, original["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_a_kept_place_depends_only_on_its_patches(name):
    mllm = build(name, pools=True)
    model = GazeVideoLM(mllm, attention="frame").eval()
    assert model.grid == GazeGrid([32], 16)
    video, gaze = (
        clip(3),
        GazeOutput.from_masks([torch.tensor([[[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]]).bool()], model.grid),
    )
    patches = gaze.covered_cells(4, 4).flatten(2)  # of 16, those of the kept quarters
    with torch.no_grad():
        tokens = model.embed_videos([video], [gaze])[0][:3]
        # The MLLM's pooling of a frame whose other patches are arbitrary and no keys.
        output = model.vision(
            video[None], GazeOutput.from_masks([patches], model.vision.grid), output_hidden_states=True
        )
        states = torch.full((3, 16, TOWER["hidden_size"]), 9.0)
        states[patches[0]] = torch.cat([output.hidden_states[layer] for layer in model.adapter.feature_layers], dim=-1)
        if name == "llava_next_video":
            expected = mllm.model.multi_modal_projector(mllm.model.vision_resampler(states))
        else:
            expected = mllm.model.apply_pooling(mllm.model.multi_modal_projector(states))
    torch.testing.assert_close(tokens, expected[gaze.gazing_mask[0][0]], rtol=1e-4, atol=1e-5)


def test_without_mean_pooling_patches_are_kept_and_not_places():
    mllm = build("llava_next_video")
    mllm.config.spatial_pool_mode = "max"
    assert (
        GazeVideoLM(mllm).grid
        == GazeVideoLM(build("llava_onevision", pools=True), scales=[32]).grid
        == GazeGrid([32], 8)
    )


def test_scales_are_those_of_a_selector_of_fixed_scales():
    selector = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64, max_num_frames=2)).eval()
    model = GazeVideoLM(build("llava"), selector, TOWER_PIXELS)
    assert model.grid == GazeGrid(SCALES, 8) and model.vision.attention == "block_causal"
    assert GazeVideoLM(build("llava"), attention="frame").vision.attention == "frame"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_gaze_gives_the_original_answer(name):
    mllm = build(name)
    model = GazeVideoLM(mllm, scales=SCALES, attention="frame")
    videos, gaze = [clip(2, seed=1)], [GazeOutput.full(model.grid, 1, 2, scale=-1)]
    prompt = [5, 6, model.placeholder_id, 7]
    original = original_inputs(model, prompt, videos, with_cls=name == "video_llava")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = mllm.generate(**original, **options)[:, original["input_ids"].shape[1] :]
    answer = model.generate(torch.tensor([prompt]), videos, gaze=gaze, **options)
    assert answer[:, :4].tolist() == [prompt]
    assert torch.equal(answer[:, 4:], expected)
    drop_in = model.generate(original["input_ids"], videos, gaze=gaze, **options)
    assert torch.equal(drop_in, torch.cat([original["input_ids"], expected], dim=1))


def test_generate_returns_the_outputs_of_its_options(onevision):
    prompts = torch.tensor([[5, VIDEO, 6], [7, 8, 9]])
    options = {"gazing_ratio": 0.1, "max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2}
    output = onevision.generate(prompts, [clip(2)], return_dict_in_generate=True, output_scores=True, **options)
    assert output.sequences.shape == (4, 6) and len(output.scores) == 3
    assert torch.equal(output.sequences[:, :3], prompts.repeat_interleave(2, dim=0))
    assert torch.equal(onevision.generate(prompts, [clip(2)], **options), output.sequences)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_is_one_token_for_each_kept_patch(name):
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=SCALES, patch_size=8))
    model = GazeVideoLM(build(name), selector, TOWER_PIXELS, scales=SCALES)
    videos = [clip(3, seed=1), clip(5, seed=2)]
    kept = [int(gaze.num_real) for gaze in model.gaze(videos, task_loss_requirement=1.0)]
    prompt = torch.tensor([[5, model.placeholder_id, 6, 7, model.placeholder_id]])
    inputs = model.prepare_inputs(prompt, videos, task_loss_requirement=1.0)
    # LLaVA-OneVision ends a video with a new line, Video-LLaVA reads the CLS token of every frame.
    first, second = (
        count + (name == "llava_onevision") + frames * (name == "video_llava")
        for count, frames in zip(kept, (3, 5), strict=True)
    )
    one = model.placeholder_id
    assert inputs["input_ids"].tolist() == [[5] + [one] * first + [6, 7] + [one] * second]
    words = model.mllm.get_input_embeddings().weight
    embeds = inputs["inputs_embeds"][0]
    assert torch.equal(embeds[[0, first + 1, first + 2]], words[[5, 6, 7]])
    assert torch.equal(
        torch.cat([embeds[1 : first + 1], embeds[first + 3 :]]),
        torch.cat(model.embed_videos(videos, model.gaze(videos, task_loss_requirement=1.0))),
    )


def test_gaze_uses_the_gaze_model():
    torch.manual_seed(0)
    selector = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64, max_num_frames=2)).eval()
    # The tower has 4x4 patches in 32 pixels, a tile of the selector's 4x4 of 16 in 64.
    model = GazeVideoLM(build("llava"), selector, TOWER_PIXELS)
    video = clip(3)
    gaze = model.gaze([video], gazing_ratio=[0.5, 0.1])[0]
    assert gaze.grid == GazeGrid(SCALES, 8) and gaze.num_real_each_frame.tolist() == [[10, 2, 10]]
    ids = model.prepare_inputs(torch.tensor([[5, IMAGE]]), [video], gazing_ratio=[0.5, 0.1])["input_ids"]
    assert ids.shape == (1, 23)


def test_a_gaze_at_the_processors_frames_is_accepted():
    if getattr(CLIPImageProcessor, "is_dummy", False):
        pytest.skip("this version's image processors need torchvision")
    mllm, selector = build("llava"), GreedyGazeSelector()
    square = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    processor = AutoGazeProcessor(encoder_processor=CLIPImageProcessor(**square))
    processor.match_encoder(mllm.config)
    inputs = processor(videos=np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8), return_tensors="pt")
    gaze = selector.generate(inputs["pixel_values_videos"], gazing_ratio=0.1, **processor.gaze_kwargs)
    model = GazeVideoLM(mllm, scales=gaze.scales)
    assert model.grid == gaze.grid == GazeGrid([16, 32, 56, 112], 8)
    filled = model.prepare_inputs(torch.tensor([[5, IMAGE]]), inputs["encoder_pixel_values"], gaze=gaze)
    assert filled["inputs_embeds"].shape == (1, 1 + 2 * 26, HIDDEN)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unequal_videos_equals_each_alone(onevision, side):
    prompts = [[5, 6, VIDEO, 7], [8, VIDEO, VIDEO, 9, 10, VIDEO, 11, 12], [13, 14, 15]]
    videos = [clip(5, seed=1), clip(2, seed=2), clip(3, seed=3, height=48)]
    gaze = [random_gaze(onevision.grid, len(video), seed) for seed, video in enumerate(videos)]
    of_prompt = [slice(0, 1), slice(1, 3), None]
    ids, mask = torch.zeros(2, 3, 8, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(8 - len(prompt), 8) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        logits = onevision(ids, videos, mask, gaze=gaze).logits
        answers = onevision.generate(ids, videos, mask, gaze=gaze, **options)[:, 8:]
        for row, (prompt, own) in enumerate(zip(prompts, of_prompt, strict=True)):
            alone = {} if own is None else {"pixel_values_videos": videos[own], "gaze": gaze[own]}
            prompt = torch.tensor([prompt])
            expected = onevision(prompt, **alone).logits[0]
            got = logits[row, -len(expected) :] if side == "left" else logits[row, : len(expected)]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            answer = onevision.generate(prompt, **alone, **options)[:, prompt.shape[1] :]
            assert torch.equal(answers[row], answer[0])


@pytest.mark.parametrize("tiles", [(1, 1), (2, 3)])
@pytest.mark.parametrize("settings", [{"clip_ratio": 0.2}, {"tokens_per_clip": 19}, {}])
@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_a_budget_for_the_clip_is_kept_over_the_whole_video(kind, settings, tiles):
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=[32], patch_size=8, clip_ratio=0.1))
    if kind == "features":
        torch.manual_seed(0)
        sizes = {"hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "feature_size": 6, "initializer_range": 0.3}
        selector = FeatureGazeModel(FeatureGazeConfig([32], 8, **sizes, clip_ratio=0.1)).eval()
    videos = [clip(7, seed=1, height=64, width=96), clip(4, seed=2, height=64, width=96), clip(5, seed=3)]
    videos = videos if tiles == (1, 1) else videos[:2]
    masks = []
    for chunk_frames in (2, 16):
        model = GazeVideoLM(build("llava"), selector, TOWER_PIXELS, chunk_frames=chunk_frames).eval()
        gazes = model.gaze(videos, tiles=tiles, **settings)
        places = 16 * tiles[0] * tiles[1]
        expected = [
            settings.get("tokens_per_clip", int(settings.get("clip_ratio", 0.1) * len(video) * places + 1e-6))
            for video in videos
        ]
        assert [int(gaze.num_real) for gaze in gazes] == expected
        masks.append([gaze.gazing_mask[0] for gaze in gazes])
        prompt = torch.tensor([[5, *[IMAGE, 6] * len(videos)]])
        inputs = model.prepare_inputs(prompt, videos, tiles=tiles, **settings)
        assert inputs["inputs_embeds"].shape[1] == sum(expected) + len(videos) + 1
    assert all(torch.equal(*pair) for pair in zip(*masks, strict=True))


@pytest.mark.parametrize("name", ["llava_onevision", "video_llava"])
def test_with_canvas_attention_chunks_do_not_change_the_result(name):
    mllm = build(name, pools=True)
    whole = GazeVideoLM(mllm, chunk_frames=16).eval()
    (side, _), (cells, _) = whole.grid.sizes[0], whole.grid.grids[0]
    generator = torch.Generator().manual_seed(0)
    videos = [clip(7, seed=1, width=64), clip(7, seed=2, width=64), clip(4, seed=3)]
    tiles = [video.shape[-1] // 32 for video in videos]
    masks = [
        torch.rand(1, len(video), cells, count * cells, generator=generator) < 0.4
        for video, count in zip(videos, tiles, strict=True)
    ]
    masks[0][:, 2:5, :, cells:] = False  # whole chunks of a tile without kept patches
    masks[1][..., :cells] = False  # a tile without kept patches
    gazes = [
        GazeOutput.from_masks([mask.flatten(2)], GazeGrid([(side, count * side)], whole.grid.patch_size))
        for mask, count in zip(masks, tiles, strict=True)
    ]
    expected = whole.embed_videos(videos, gazes)
    frame = GazeVideoLM(mllm, attention="frame").eval().embed_videos(videos, gazes)
    assert not torch.allclose(expected[0], frame[0], atol=1e-3)
    for chunk_frames, max_batch_size in [(1, 16), (2, 1), (3, 2), (16, 2)]:
        model = GazeVideoLM(mllm, chunk_frames=chunk_frames, max_batch_size=max_batch_size).eval()
        seen = []
        model.vision.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[:2]))
        with torch.no_grad():
            streamed = model.embed_videos(videos, gazes)
        assert max(clips for clips, _ in seen) <= max_batch_size
        assert max(frames for _, frames in seen) == min(chunk_frames, 7)
        for tokens in (streamed, model.embed_videos(videos, gazes)):
            for ours, theirs in zip(tokens, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    tokens = GazeVideoLM(mllm, chunk_frames=2).train().embed_videos(videos, gazes)
    with torch.no_grad():
        assert len(GazeVideoLM(mllm, chunk_frames=2).train().embed_videos(videos, gazes)[0]) == len(tokens[0])
    tokens[0].sum().backward()
    mllm.eval()


@pytest.mark.parametrize("order", ["time", "tile"])
@pytest.mark.parametrize("name", FAMILIES)
def test_counted_tokens_are_those_that_the_language_model_reads(name, order):
    mllm = build(name, pools=True)
    layout = {"separator": [3, 4], "thumbnail_interval": 2, "order": order}
    for options in ({}, layout):
        model = GazeVideoLM(mllm, chunk_frames=2, **options).eval()
        gazes = [random_gaze(GazeGrid([(32, 64)], model.grid.patch_size), 5), random_gaze(model.grid, 3, seed=1)]
        gazes[0].gazing_mask[0][:, 2:4] = False
        gazes[0] = GazeOutput.from_masks(gazes[0].gazing_mask, gazes[0].grid)
        videos = [clip(5, width=64), clip(3)]
        with torch.no_grad():
            tokens = model.embed_videos(videos, gazes)
        assert [read for read, _ in model.count_tokens(gazes)] == [len(part) for part in tokens]


@pytest.mark.parametrize("scales", [None, [32]])
def test_the_tokens_of_the_whole_video_are_those_after_the_mllms_own_pooling(scales):
    counts = {"llava": 16, "vipllava": 16, "video_llava": 17, "llava_next_video": 4, "llava_onevision": 4}
    for name, of_frame in counts.items():
        model = GazeVideoLM(build(name, pools=True), scales=scales)
        gaze, newline = GazeOutput.full(model.grid, batch_size=2, num_frames=3), name == "llava_onevision"
        kept = of_frame if scales is None else 16 + (name == "video_llava")
        assert model.count_tokens(gaze) == [(3 * kept + newline, 3 * of_frame + newline)] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_ratio": 1.5}, "`clip_ratio` must be above 0 and at most 1"),
        ({"tokens_per_clip": 0}, "`tokens_per_clip` must be a whole number in 1"),
        ({"tokens_per_clip": 5, "gazing_ratio": 0.1}, "only one of `gazing_ratio`, .*`tokens_per_clip`"),
    ],
)
def test_the_error_of_a_wrong_budget_names_it(onevision, settings, message):
    for call in (onevision, onevision.generate):
        with pytest.raises(ValueError, match=message):
            call(torch.tensor([[5, VIDEO]]), [clip(2)], **settings)


def test_a_selector_without_gains_refuses_a_budget_for_the_clip():
    selector = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64, max_num_frames=2)).eval()
    model = GazeVideoLM(build("llava"), selector, TOWER_PIXELS)
    with pytest.raises(ValueError, match="need a selector that knows what patches gain.* AutoGazeModel takes"):
        model(torch.tensor([[5, IMAGE]]), [clip(2)], clip_ratio=0.1)


def test_labels_give_the_loss_of_the_words_and_gradients_to_all_parts():
    model = GazeVideoLM(build("llava_onevision"), scales=SCALES)
    prompt = torch.tensor([[5, VIDEO, 6, 7], [8, 9, VIDEO, 0]])
    mask, labels = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([[-100, 3, 6, 7], [8, 9, 3, 0]])
    videos = [clip(2, seed=1), clip(3, seed=2)]
    gaze = [random_gaze(model.grid, 2), random_gaze(model.grid, 3)]
    counts = [int(one.num_real) + 1 for one in gaze]
    output = model(prompt, videos, mask, labels, gaze=gaze)
    log_probs = output.logits.log_softmax(-1)
    # Words are predicted from the tokens before them; a video's tokens have no labels.
    first, second = counts
    terms = [log_probs[0, first, 6], log_probs[0, first + 1, 7], log_probs[1, 0, 9]]
    torch.testing.assert_close(output.loss, -torch.stack(terms).mean())
    output.loss.backward()
    mllm = model.mllm.model
    tower = mllm.vision_tower
    for weight in (
        mllm.multi_modal_projector.linear_1.weight,
        mllm.image_newline,
        mllm.language_model.embed_tokens.weight,
        next(parameter for name, parameter in tower.named_parameters() if "patch_embedding.weight" in name),
        next(parameter for name, parameter in tower.named_parameters() if "layers.0.mlp.fc1.weight" in name),
    ):
        assert weight.grad.abs().max() > 0


def test_the_state_dict_has_each_weight_of_the_mllm_once(onevision):
    names = set(onevision.state_dict())
    assert names == {f"mllm.{name}" for name in onevision.mllm.state_dict()}
    assert copy.deepcopy(onevision).vision.vision_model is not onevision.mllm.model.vision_tower


def test_batches_of_the_tower_are_at_most_the_batch_size():
    mllm, videos = build("video_llava"), [clip(7, seed=1, height=64), clip(3, seed=2)]
    gazes = [random_gaze(GazeGrid([(32, 16), (64, 32)], 8), 7), random_gaze(GazeGrid(SCALES, 8), 3)]
    embedded = []
    for max_batch_size in (1, 3):
        model = GazeVideoLM(mllm, scales=SCALES, chunk_frames=2, max_batch_size=max_batch_size)
        seen = []
        model.vision.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[:2]))
        with torch.no_grad():
            embedded.append(model.embed_videos(videos, gazes))
        assert max(clips for clips, _ in seen) == max_batch_size and max(frames for _, frames in seen) == 2
        assert sum(clips * frames for clips, frames in seen) == 7 * 2 + 3
    torch.testing.assert_close(*embedded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_weights_may_be_offloaded(name):
    accelerate = pytest.importorskip("accelerate")
    model = GazeVideoLM(build(name), scales=SCALES)
    prompt, gaze = torch.tensor([[5, model.placeholder_id, 6]]), [random_gaze(model.grid, 3)]
    with torch.no_grad():
        expected = model(prompt, [clip(3)], gaze=gaze).logits
        accelerate.cpu_offload(model.mllm, torch.device("cpu"))
        assert model.mllm.model.multi_modal_projector.linear_1.weight.is_meta
        assert torch.equal(model(prompt, [clip(3)], gaze=gaze).logits, expected)


@pytest.mark.parametrize("order", ["time", "tile"])
def test_tiles_and_thumbnails_are_in_the_requested_order(order):
    mllm = build("llava_onevision")
    model = GazeVideoLM(mllm, scales=SCALES, attention="frame", order=order, thumbnail_interval=2)
    video, grid = clip(3, height=32, width=64), GazeGrid([(16, 32), (32, 64)], 8)
    gaze = random_gaze(grid, 3)
    with torch.no_grad():
        tokens = model.embed_videos([video], [gaze])[0]
        plain = GazeVideoLM(mllm, scales=SCALES, attention="frame")
        newline = mllm.model.image_newline[None]

        def of(frames: torch.Tensor, gaze: GazeOutput) -> list[torch.Tensor]:
            """The tokens of each frame."""
            return [
                plain.embed_videos(
                    [frame[None]], [GazeOutput.from_masks([m[:, t : t + 1] for m in gaze.gazing_mask], gaze.grid)]
                )[0][:-1]
                for t, frame in enumerate(frames)
            ]

        tiles = [
            of(
                video[..., 32 * col : 32 * col + 32],
                GazeOutput.from_masks([m[col : col + 1] for m in masks], model.grid),
            )
            for masks in [grid.split_tiles(gaze.gazing_mask, model.grid)]
            for col in range(2)
        ]
        whole = of(video[::2], GazeOutput.full(model.grid, 1, 2, scale=-1))
    if order == "time":
        expected = [whole[0], tiles[0][0], tiles[1][0], tiles[0][1], tiles[1][1], whole[1], tiles[0][2], tiles[1][2]]
    else:
        expected = [*whole, *tiles[0], *tiles[1]]
    torch.testing.assert_close(tokens, torch.cat([*expected, newline]), rtol=1e-4, atol=1e-4)


def test_tiles_are_gazed_at_as_one_frame(onevision):
    video = clip(3, height=64, width=96)
    gaze = onevision.gaze([video], gazing_ratio=0.2, tiles=(2, 3))[0]
    assert gaze.scales == [(32, 48), (64, 96)] and gaze.num_real_each_frame.tolist() == [[24] * 3]
    pixels = onevision._gazer.to_gaze_values(video)[None]
    expected = onevision.gaze_model.for_grid(gaze.grid).generate(pixels, gazing_ratio=0.2)
    assert all(torch.equal(*pair) for pair in zip(gaze.gazing_mask, expected.gazing_mask, strict=True))
    assert len(onevision.embed_videos([video], [gaze])[0]) == 24 * 3 + 1


@pytest.mark.parametrize("separator", [3, [3, 4], "image_newline"])
def test_separators_are_between_chunks(separator):
    mllm = build("llava_onevision")
    model = GazeVideoLM(mllm, scales=SCALES, chunk_frames=2, separator=separator)
    plain = GazeVideoLM(mllm, scales=SCALES, chunk_frames=2)
    video = clip(5)
    gaze = random_gaze(model.grid, 5)
    counts = [int(part.sum()) for part in gaze.num_real_each_frame[0].split(2)]
    newline = mllm.model.image_newline[None]
    ids = torch.tensor([separator] if separator == 3 else separator) if separator != "image_newline" else None
    between = newline if ids is None else mllm.get_input_embeddings()(ids)
    with torch.no_grad():
        first, second, third = plain.embed_videos([video], [gaze])[0][:-1].split(counts)
        expected = torch.cat([first, between, second, between, third, newline])
        assert torch.equal(model.embed_videos([video], [gaze])[0], expected)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_a_time_embedding_is_added_to_the_tokens_of_its_frame(kind):
    mllm, video = build("llava"), clip(5)
    time = SinusoidalTimeEmbedding(HIDDEN, amplitude=0.5) if kind == "sinusoidal" else torch.nn.Embedding(5, HIDDEN)
    model = GazeVideoLM(mllm, scales=SCALES, chunk_frames=2, time_embedding=time)
    gaze = random_gaze(model.grid, 5)
    tokens = model.embed_videos([video], [gaze])[0]
    plain = GazeVideoLM(mllm, scales=SCALES, chunk_frames=2).embed_videos([video], [gaze])[0]
    frames = torch.arange(5).repeat_interleave(gaze.num_real_each_frame[0])
    torch.testing.assert_close(tokens - plain, time(frames), rtol=1e-4, atol=1e-4)
    if kind == "learned":
        tokens.sum().backward()
        assert (time.weight.grad > 0).all()
        with pytest.raises(ValueError, match="each of the 6 frames of video 0, got 5"):
            model.embed_videos([clip(6)], [random_gaze(model.grid, 6)])


def test_a_prompt_may_have_images_and_videos():
    mllm = build("video_llava")
    model = GazeVideoLM(mllm, scales=SCALES, attention="frame")
    prompt = torch.tensor([[5, *[IMAGE] * 16, 6, *[VIDEO] * 34, 7]])
    video, picture = clip(2), torch.randn(1, 3, 32, 32)
    has_new_name = "pixel_values" in inspect.signature(mllm.forward).parameters
    pictures = {"pixel_values" if has_new_name else "pixel_values_images": picture}
    options = {"max_new_tokens": 4, "do_sample": False}
    gaze = GazeOutput.full(model.grid, 1, 2, scale=-1)
    with torch.no_grad():
        expected = mllm(prompt, pixel_values_videos=video[None], **pictures).logits
        assert (model(prompt, [video], gaze=gaze, **pictures).logits - expected).abs().max() < 1e-4
    expected = mllm.generate(input_ids=prompt, pixel_values_videos=video[None], **pictures, **options)
    assert torch.equal(model.generate(prompt, [video], gaze=gaze, **pictures, **options), expected)


def test_a_video_given_as_images_is_recognised_by_its_shape():
    model = GazeVideoLM(build("llava"))
    ids = torch.tensor([[1, model.placeholder_id, 2]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"`pixel_values` must be images .* got the shape \(1, 2, 3, 28, 28\)"):
            call(input_ids=ids, pixel_values=torch.zeros(1, 2, 3, 28, 28))


def test_without_a_video_the_mllm_is_called_with_unchanged_inputs():
    mllm = build("llava")
    model = GazeVideoLM(mllm, scales=SCALES)
    picture, words = torch.tensor([[5, *[IMAGE] * 16, 6]]), torch.tensor([[5, 6, 7]])
    pixels = {"pixel_values": clip(1)}
    options = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model(picture, **pixels).logits, mllm(picture, **pixels).logits)
        assert torch.equal(model(words, labels=words).loss, mllm(words, labels=words).loss)
        # The next word, with cached keys and values.
        cached = model(words, use_cache=True).past_key_values
        after = model(torch.tensor([[8]]), past_key_values=cached).logits[:, -1]
    torch.testing.assert_close(after, mllm(torch.tensor([[5, 6, 7, 8]])).logits[:, -1])
    assert torch.equal(model.generate(words, **options), mllm.generate(words, **options))


@pytest.mark.parametrize("count", [0, 2, 3])
def test_every_video_needs_its_placeholder(onevision, count):
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    prompt[:, 1 : 2 * count : 2] = VIDEO
    videos = [clip(2)] * (1 if count == 0 else 5 - count)
    for call in (onevision, onevision.generate):
        with pytest.raises(
            ValueError, match=rf"each of the {len(videos)} videos .*token {VIDEO}.* {count or 'no'} video pl"
        ):
            call(prompt, videos, gazing_ratio=0.1)


def test_every_placeholder_needs_a_video(onevision):
    with pytest.raises(ValueError, match=f"`pixel_values_videos` must be given .* {VIDEO}, got None"):
        onevision(torch.tensor([[5, VIDEO]]))
    llava = GazeVideoLM(build("llava"), scales=SCALES)
    with pytest.raises(ValueError, match="`pixel_values` cannot go with `pixel_values_videos`"):
        llava.generate(torch.tensor([[5, IMAGE]]), [clip(1)], pixel_values=clip(1))


def test_a_gaze_must_fit_the_tower_and_the_frames(onevision):
    prompt, video = torch.tensor([[5, VIDEO]]), clip(2)
    grids = [GazeGrid([8, 32], 8), GazeGrid([32], 8), GazeGrid([32, 64], 16), GazeGrid([(16, 16), (32, 64)], 8)]
    for grid in grids:
        with pytest.raises(
            ValueError, match=r"`gaze` of video 0 must be made for the tower's GazeGrid\(scales=\[16, 32"
        ):
            onevision(prompt, [video], gaze=[random_gaze(grid, 2)])
    with pytest.raises(ValueError, match="`gaze` of video 0 must be of its 2 frames alone, got 1 clips of 3"):
        onevision(prompt, [video], gaze=[random_gaze(onevision.grid, 3)])
    with pytest.raises(ValueError, match="`gaze` must be one for each of the 1 videos, got 2"):
        onevision(prompt, [video], gaze=[random_gaze(onevision.grid, 2)] * 2)
    with pytest.raises(ValueError, match="for 1x3 tiles, which frames of .32, 32. pixels"):
        onevision(prompt, [video], gaze=[random_gaze(GazeGrid([(16, 48), (32, 96)], 8), 2)])
    rare = random_gaze(onevision.grid, 2).replace(frame_sampling_rate=3)
    with pytest.raises(ValueError, match="`chunk_frames` must be a multiple of 3"):
        onevision(prompt, [clip(6)], gaze=[rare])


def test_without_a_selector_or_a_processor_a_gaze_is_needed():
    mllm, selector = build("llava"), GreedyGazeSelector(GreedyGazeConfig(scales=SCALES, patch_size=8))
    for parts in ({"gaze_model": selector}, {"processor": TOWER_PIXELS}):
        model = GazeVideoLM(mllm, **parts, scales=SCALES)
        with pytest.raises(ValueError, match="`gaze` must be given where .* without `gaze_model` and `processor`"):
            model(torch.tensor([[5, IMAGE]]), [clip(2)])


def test_frames_must_be_normalised_floats(onevision):
    for video in (clip(2)[0], clip(2).to(torch.uint8), "video.mp4"):
        with pytest.raises(ValueError, match="`pixel_values_videos` must be normalised floats"):
            onevision(torch.tensor([[5, VIDEO]]), [video])


def test_other_models_are_refused():
    mllm = build("llava")
    for other in (mllm.model, mllm.model.language_model, torch.nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match="`mllm` must be .* llava, llava_next_video, .*, got .*docs/integrations.md"
        ):
            GazeVideoLM(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "space"}, "`order` must be one of 'time', 'tile', got 'space'"),
        ({"chunk_frames": 0}, "`chunk_frames` must be a whole number of at least 1, got 0"),
        ({"max_batch_size": 1.5}, "`max_batch_size` must be .*, got 1.5"),
        ({"thumbnail_interval": True}, "`thumbnail_interval` must be .*, got True"),
        ({"separator": "newline"}, "`separator` must be ids of tokens in 0..63 or 'image_newline', got 'newline'"),
        ({"separator": [64]}, r"`separator` must be ids of tokens in 0..63 or 'image_newline', got \[64\]"),
        ({"separator": "image_newline"}, "a LlavaForConditionalGeneration has none"),
        ({"attention": "full"}, "`attention` must be one of"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        GazeVideoLM(build("llava"), scales=SCALES, **options)


def real_processor(name: str):
    """A processor of transformers for a tiny MLLM, with a small vocabulary."""
    words = {"<unk>": 0, "<pad>": 1, "what": 2, "is": 3, "this": 4, "and": 5, "<image>": IMAGE, "<video>": VIDEO}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"],
        padding_side="left",
    )
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    tokenizer.image_token_id, tokenizer.video_token_id = IMAGE, VIDEO
    size = {"height": 32, "width": 32}
    if name == "llava_onevision":
        return transformers.LlavaOnevisionProcessor(
            transformers.LlavaOnevisionImageProcessor(size=size),
            tokenizer,
            transformers.LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
        )
    return transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(size=size, crop_size=size, do_sample_frames=False),
        transformers.LlavaNextImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video"])
def test_outputs_of_the_mllms_own_processor_are_accepted(name):
    pytest.importorskip("torchvision")
    model = build(name)
    processor = real_processor(name)
    videos = torch.randint(0, 256, (2, 4, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = processor(
        text=["what is <video> and this <video>", "what is this"],
        videos=list(videos),
        padding=True,
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == VIDEO).sum() > 2 and inputs["pixel_values_videos"].shape == (2, 4, 3, 32, 32)
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=SCALES, patch_size=8))
    lm = GazeVideoLM(model, selector, processor, scales=SCALES)
    gaze = lm.gaze(inputs["pixel_values_videos"], gazing_ratio=0.2)
    with torch.no_grad():
        output = lm(**inputs, gazing_ratio=0.2)
        expected = lm(**inputs, gaze=gaze)
    assert torch.equal(output.logits, expected.logits)
    newlines = 2 * (name == "llava_onevision")
    assert output.logits.shape[1] == 4 + sum(int(one.num_real) for one in gaze) + newlines
    answer = lm.generate(**inputs, gazing_ratio=0.2, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer[:, :-3], inputs["input_ids"])
