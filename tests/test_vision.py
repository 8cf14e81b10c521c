"""The towers of transformers on kept patches."""

import json

import pytest
import torch
from published import checkpoint_folder
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    ViTConfig,
    ViTForImageClassification,
    VJEPA2Config,
)

from transformers_autogaze import GazeGrid, GazeOutput
from transformers_autogaze.integrations import GazeVisionModel
from transformers_autogaze.integrations.vision_adapters import ADAPTERS, VisionAdapter


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
CONFIGS = {
    "siglip": SiglipVisionConfig(**SIZES),
    "clip": CLIPVisionConfig(**SIZES),
    "vit": ViTConfig(**SIZES),
    "deit": DeiTConfig(**SIZES),
    "dinov2": Dinov2Config(**SIZES),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3),
    "dinov3": DINOv3ViTConfig(**SIZES, num_register_tokens=3, pos_embed_rescale=None),
    "videomae": VideoMAEConfig(**SIZES, num_frames=4, use_mean_pooling=False),
    "vjepa2": VJEPA2Config(
        hidden_size=48,
        mlp_ratio=2.0,
        num_hidden_layers=2,
        num_attention_heads=2,
        crop_size=64,
        patch_size=16,
        frames_per_clip=4,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    ),
}
OF_VIDEOS = ("videomae", "vjepa2")
SCALES = [16, 32, 64]
FRAME_CHOICES = ("frame", "block_causal", "canvas")


def tower_of(family: str) -> nn.Module:
    """A tower with random weights, none of which is left at zero or one."""
    torch.manual_seed(0)
    tower = AutoModel.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return tower


@pytest.fixture(scope="module", params=CONFIGS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family) -> GazeVisionModel:
    return GazeVisionModel(tower_of(family), scales=SCALES).eval()


@pytest.fixture(scope="module")
def siglip() -> GazeVisionModel:
    return GazeVisionModel(tower_of("siglip"), scales=SCALES).eval()


def video(batch_size: int = 2, num_frames: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randn(batch_size, num_frames, 3, size, size, generator=torch.Generator().manual_seed(1))


def random_gaze(grid: GazeGrid, batch_size: int = 2, num_frames: int = 4, share: float = 0.4) -> GazeOutput:
    generator = torch.Generator().manual_seed(2)
    masks = [
        torch.rand(batch_size, num_frames, count, generator=generator) < share for count in grid.num_patches_each_scale
    ]
    return GazeOutput.from_masks(masks, grid)


def original(family: str, tower: nn.Module, frames: torch.Tensor) -> torch.Tensor:
    """The tower's own `last_hidden_state`, packed."""
    if family == "vjepa2":
        return tower(frames, skip_predictor=True).last_hidden_state
    return tower(frames if family in OF_VIDEOS else frames.flatten(0, 1)).last_hidden_state


@torch.no_grad()
def test_keeping_everything_gives_the_original_output(family, model):
    attention = "bidirectional" if family in OF_VIDEOS else "frame"
    frames = video()
    expected = original(family, model.vision_model, frames)
    everything = GazeOutput.full(model.grid, batch_size=2, num_frames=4, scale=-1)
    output = model(frames, everything, attention=attention)
    num_prefix = 0 if output.prefix_hidden_state is None else output.prefix_hidden_state.shape[2]
    torch.testing.assert_close(output.last_hidden_state, expected[:, num_prefix:].flatten(0, 1), rtol=0, atol=1e-5)
    if num_prefix:
        torch.testing.assert_close(
            output.prefix_hidden_state.flatten(0, 1), expected[:, :num_prefix], rtol=0, atol=1e-5
        )
    assert torch.equal(model(frames, attention=attention).last_hidden_state, output.last_hidden_state)
    # The tower itself is unchanged.
    assert torch.equal(original(family, model.vision_model, frames), expected)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_one_frame_alone_is_the_same_under_every_attention_of_frames(implementation):
    tower = tower_of("clip")
    tower.set_attn_implementation(implementation)
    model = GazeVisionModel(tower, scales=SCALES)
    gaze = random_gaze(model.grid, num_frames=1)
    outputs = [model(video(2, 1), gaze, attention).last_hidden_state for attention in FRAME_CHOICES]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-6)
    assert tower.config._attn_implementation == implementation


@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip-patch16-21", "siglip-patch14-22"])
@pytest.mark.parametrize("case, attention", [("block_causal", "block_causal"), ("independent", "frame")])
def test_published_tower(name, case, attention):
    folder = checkpoint_folder(name)
    expected = load_file(folder / "expected.safetensors")
    scales = [int(scale) for scale in json.loads((folder / "config.json").read_text())["scales"].split("+")]
    model = GazeVisionModel.from_pretrained(folder, scales=scales, dtype=torch.float64).eval()
    slots = ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")
    gaze = GazeOutput.from_ids(*(expected[f"gaze.{key}"] for key in slots), model.grid)
    output = model(expected["video"].double(), gaze, attention, output_hidden_states=True)
    real = ~gaze.if_padded_gazing
    for key, got in {"embeddings": output.hidden_states[0], "last_hidden_state": output.last_hidden_state}.items():
        torch.testing.assert_close(got, expected[f"{case}.{key}"][real], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["block_causal", "bidirectional", "frame", "causal", "canvas"])
def test_clips_of_a_batch_are_what_they_are_alone(model, attention):
    gaze = random_gaze(model.grid)
    assert gaze.num_real[0] != gaze.num_real[1]
    together = model(video(), gaze, attention, output_hidden_states=True)
    batch, mask = together.padded()
    assert torch.equal(mask.sum(1), together.lengths) and not batch[~mask].any()
    for clip, state in enumerate(together.split()):
        alone = model(video()[clip : clip + 1], gaze.select(clip), attention)
        torch.testing.assert_close(state, alone.last_hidden_state, rtol=0, atol=1e-5)
        assert torch.equal(batch[clip][mask[clip]], state)
        assert torch.equal(together.split(together.ids)[clip], alone.ids)


@torch.no_grad()
def test_dropped_patches_have_no_effect(family, model):
    """Not even NaN: pixels outside all kept patches are never read."""
    frames = video()
    gaze = random_gaze(model.grid, share=0.15)
    # Half the size: bicubic resizing reads one pixel beyond a patch of the middle scale.
    seen = gaze.coverage(64, 64).float()
    seen = nn.functional.max_pool2d(seen, 3, stride=1, padding=1).bool()
    if family in OF_VIDEOS:
        seen = seen.unflatten(1, (2, 2)).any(2).repeat_interleave(2, dim=1)
    unseen = ~seen[:, :, None].expand_as(frames)
    assert unseen.float().mean() > 0.15
    expected = model(frames, gaze, output_hidden_states=True)
    got = model(frames.masked_fill(unseen, torch.nan), gaze, output_hidden_states=True)
    for before, after in zip(expected.hidden_states, got.hidden_states, strict=True):
        assert torch.equal(before, after)
    assert torch.equal(expected.last_hidden_state, got.last_hidden_state)


@torch.no_grad()
def test_a_later_frame_does_not_change_earlier_ones(siglip):
    gaze = random_gaze(siglip.grid)
    frames = video()
    changed = frames.clone()
    changed[:, 2] += 1
    before, after = siglip(frames, gaze), siglip(changed, gaze)
    earlier = before.frame < 2
    assert torch.equal(before.last_hidden_state[earlier], after.last_hidden_state[earlier])
    later = (before.last_hidden_state - after.last_hidden_state)[before.frame > 2]
    assert (later.abs().amax(1) > 1e-6).all()


def test_tokens_are_in_the_order_of_the_slots(siglip):
    ids = torch.tensor([[5, 0, 21 + 7, 21 + 20], [3, 1, 21 + 2, 0]])
    padded = torch.tensor([[False, False, False, False], [False, True, False, True]])
    gaze = GazeOutput.from_ids(ids, padded, torch.tensor([2, 2]), siglip.grid)
    output = siglip(video(2, 2), gaze)
    assert output.lengths.tolist() == [4, 2]
    assert output.ids.tolist() == [5, 0, 7, 20, 3, 2]
    assert output.frame.tolist() == [0, 0, 1, 1, 0, 1]
    assert output.scale.tolist() == [2, 0, 2, 2, 1, 1]
    assert output.boxes[[0, 1, 5]].tolist() == [[0, 0, 0.25, 0.25], [0, 0, 1, 1], [0.5, 0, 1, 0.5]]


@torch.no_grad()
def test_frames_of_a_tubelet_share_the_union_of_their_gaze():
    model = GazeVisionModel(tower_of("videomae"), scales=SCALES)
    masks = [torch.zeros(1, 4, count, dtype=torch.bool) for count in model.grid.num_patches_each_scale]
    masks[2][0, 0, 3], masks[2][0, 1, 9], masks[1][0, 3, 0] = True, True, True
    output = model(video(1), GazeOutput.from_masks(masks, model.grid))
    assert output.ids.tolist() == [5 + 3, 5 + 9, 1] and output.frame.tolist() == [0, 0, 1]
    # A gaze of one frame per tubelet is equivalent.
    shared = [mask.unflatten(1, (2, 2)).any(2) for mask in masks]
    again = model(video(1), GazeOutput.from_masks(shared, model.grid, frame_sampling_rate=2))
    assert torch.equal(again.last_hidden_state, output.last_hidden_state)


@torch.no_grad()
def test_a_gaze_of_every_second_frame_encodes_those_frames(siglip):
    gaze = random_gaze(siglip.grid, num_frames=2)
    expected = siglip(video()[:, ::2], gaze)
    assert torch.equal(siglip(video(), gaze.replace(frame_sampling_rate=2))[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "dinov3", "vjepa2"])
def test_clips_and_frames_without_patches_are_empty(family):
    model = GazeVisionModel(tower_of(family), scales=SCALES)
    masks = [torch.zeros(2, 4, count, dtype=torch.bool) for count in model.grid.num_patches_each_scale]
    nothing = model(video(), GazeOutput.from_masks(masks, model.grid))
    assert nothing.last_hidden_state.shape == (0, model.hidden_size) and nothing.lengths.tolist() == [0, 0]
    masks[1][1, 2, :2] = True
    output = model(video(), GazeOutput.from_masks(masks, model.grid))
    assert output.lengths.tolist() == [0, 2]
    if output.prefix_hidden_state is not None:
        assert output.prefix_hidden_state.any(-1).any(-1).nonzero().tolist() == [[1, 2]]


def test_coarse_positions_are_between_the_towers_own_ones():
    """The centre of the coarsest scale's only patch is the middle of the 4x4 grid."""
    model = GazeVisionModel(tower_of("siglip"), scales=SCALES)
    table = torch.linspace(-1, 1, 4)
    with torch.no_grad():
        model.adapter.position_table.copy_(table.repeat(4)[:, None].expand(16, 32))
    positions = model.adapter.positions(model.grid)[0, :, 0]
    torch.testing.assert_close(positions[5:].view(4, 4), table.expand(4, 4))
    torch.testing.assert_close(positions[0], torch.tensor(0.0), atol=1e-6, rtol=0)


def test_rotary_positions_are_those_of_the_centres():
    """The centre of a patch is the middle of its four quarters."""
    ids = torch.tensor([0, 4, 5, 8, 9])  # one of 2x2 patches, and its quarters in 4x4
    whole = torch.zeros(5, dtype=torch.long)
    model = GazeVisionModel(tower_of("vjepa2"), scales=[32, 64])
    _, row, col = model.adapter.rotary(model.grid, ids, whole, torch.float32)
    assert torch.stack([row, col], dim=1).tolist() == [[0.5, 0.5], [0, 0], [0, 1], [1, 0], [1, 1]]

    model = GazeVisionModel(tower_of("dinov3"), scales=[32, 64])
    cos, sin = model.adapter.rotary(model.grid, ids, whole, torch.float32)
    # The slower frequency of both axes stays below one rotation (a tenth of one per unit), so angles are unique.
    places = torch.atan2(sin, cos)[:, [1, 3]] * 10 / (2 * torch.pi)
    expected = torch.tensor([[-0.5, -0.5], [-0.75, -0.75], [-0.75, -0.25], [-0.25, -0.75], [-0.25, -0.25]])
    torch.testing.assert_close(places, expected, rtol=0, atol=1e-5)


def test_dinov3_draws_its_random_positions_of_training_once_for_all_scales():
    tower = AutoModel.from_config(DINOv3ViTConfig(**SIZES, pos_embed_rescale=2.0)).train()
    model = GazeVisionModel(tower, scales=[32, 64])
    ids = torch.tensor([0, 4, 9])

    def places() -> torch.Tensor:
        cos, sin = model.adapter.rotary(model.grid, ids, torch.zeros(3), torch.float64)
        return torch.atan2(sin, cos)[:, [1, 3]]

    training, evaluation = places(), (tower.eval(), places())[1]
    ratio = training / evaluation
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    assert (ratio - 1).abs().min() > 1e-3


# Weights without effect on tokens: heads, those of pre-training, the norm of CLIP's pooled output.
UNUSED = ("pooler", "vision_model.head", "predictor", "mask_token", "post_layernorm")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_weight_that_is_used(family, checkpointing):
    tower = tower_of(family)
    model = GazeVisionModel(tower, scales=SCALES)
    gaze = random_gaze(model.grid)
    expected = gradients(model.eval(), gaze)
    model.train()
    if checkpointing:
        tower.gradient_checkpointing_enable()
    runs = []
    first_layer = model.adapter.layers[0]
    next(first_layer.children()).register_forward_hook(lambda *_: runs.append(1))
    got = gradients(model, gaze)
    assert len(runs) == (2 if checkpointing else 1)
    for name, gradient in got.items():
        if gradient is None:
            assert any(part in name for part in UNUSED), name
        else:
            torch.testing.assert_close(gradient, expected[name], msg=name)
    assert sum(gradient is not None for gradient in got.values()) > 20
    assert not any(getattr(layer, "gradient_checkpointing", False) != checkpointing for layer in model.adapter.layers)


def gradients(model: GazeVisionModel, gaze: GazeOutput) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    output = model(video(), gaze)
    loss = output.last_hidden_state.square().mean()
    if output.prefix_hidden_state is not None:
        loss = loss + output.prefix_hidden_state.square().mean()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_a_tower_can_be_trained_on_kept_tokens():
    model = GazeVisionModel(tower_of("siglip"), scales=SCALES)
    gaze, target = random_gaze(model.grid), torch.randn(32, generator=torch.Generator().manual_seed(3))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model(video(), gaze).last_hidden_state.mean(0) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("family", ["siglip", "clip", "dinov3", "vjepa2"])
def test_weights_that_accelerate_offloads_are_found(family):
    accelerate = pytest.importorskip("accelerate")
    tower = tower_of(family)
    gaze = random_gaze(GazeGrid(SCALES, 16))
    expected = GazeVisionModel(tower, scales=SCALES)(video(), gaze)
    accelerate.cpu_offload(tower, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in tower.parameters())
    output = GazeVisionModel(tower, scales=SCALES)(video(), gaze)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert all(parameter.is_meta for parameter in tower.parameters())


@torch.no_grad()
def test_device_map(tmp_path, siglip):
    pytest.importorskip("accelerate")
    siglip.vision_model.save_pretrained(tmp_path)
    spread = {"": "cpu"}
    model = GazeVisionModel.from_pretrained(tmp_path, scales=SCALES, device_map=spread)
    gaze = random_gaze(model.grid)
    assert torch.equal(model(video(), gaze).last_hidden_state, siglip(video(), gaze).last_hidden_state)


@torch.no_grad()
def test_towers_inside_other_models_are_found(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    both = SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 16}, vision_config=SIZES)).eval()
    both.save_pretrained(tmp_path)
    gaze = random_gaze(GazeGrid(SCALES, 16))
    inside = GazeVisionModel(both, scales=SCALES)(video(), gaze).last_hidden_state
    loaded = GazeVisionModel.from_pretrained(tmp_path, scales=SCALES).eval()
    assert torch.equal(loaded(video(), gaze).last_hidden_state, inside)
    assert not any("text" in name for name, _ in loaded.named_parameters())

    classifier = ViTForImageClassification(CONFIGS["vit"]).eval()
    assert GazeVisionModel(classifier).config is classifier.vit.config
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CONFIGS["clip"],
            text_config={"model_type": "llama", **text, "vocab_size": 16},
            vision_feature_layer=-2,
        )
    )
    assert GazeVisionModel(llava).config.model_type == "clip_vision_model"


def test_saving_the_tower_gives_the_same_weights(tmp_path, siglip):
    siglip(video())
    siglip.vision_model.save_pretrained(tmp_path)
    tower_of("siglip").save_pretrained(tmp_path / "untouched")
    saved = [load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "untouched")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert "autogaze" not in (tmp_path / "config.json").read_text()


def test_defaults_are_the_towers_own_patches_and_canvas_attention_for_image_towers():
    config = SiglipVisionConfig(**{**SIZES, "image_size": 384, "patch_size": 14})
    model = GazeVisionModel(SiglipVisionModel(config))
    assert model.grid == GazeGrid([378], patch_size=14) and model.attention == "canvas"
    oblong = GazeVisionModel(AutoModel.from_config(ViTConfig(**{**SIZES, "image_size": (32, 48)})))
    assert oblong.grid == GazeGrid([(32, 48)], patch_size=16)
    video_tower = GazeVisionModel(tower_of("vjepa2"))
    assert video_tower.grid == GazeGrid([64], patch_size=16) and video_tower.attention == "block_causal"
    assert GazeVisionModel(tower_of("siglip"), scales=SCALES).attention == "block_causal"
    assert GazeVisionModel(tower_of("siglip"), attention="frame").attention == "frame"


@torch.no_grad()
def test_half_precision_tower(siglip):
    gaze = random_gaze(siglip.grid)
    half = GazeVisionModel(tower_of("siglip").to(torch.bfloat16), scales=SCALES)
    output = half(video(), gaze).last_hidden_state
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), siglip(video(), gaze).last_hidden_state, rtol=0.1, atol=0.1)


def test_frames_and_gaze_must_fit(siglip):
    other = GazeOutput.full(GazeGrid([32, 64], patch_size=16), 2, 4)
    with pytest.raises(
        ValueError, match=r"`gaze` must be for the scales \[16, 32, 64\].*got \[32, 64\].*`target_scales`"
    ):
        siglip(video(), other)
    with pytest.raises(ValueError, match=r"patch size 16.*and 8"):
        siglip(video(), GazeOutput.full(GazeGrid(SCALES, patch_size=8), 2, 4))
    with pytest.raises(ValueError, match=r"`gaze` must be for 2 clips of 4 frames.*got 2 of 3"):
        siglip(video(), random_gaze(siglip.grid, num_frames=3))
    with pytest.raises(ValueError, match=r"`gaze` must be for 2 clips.*got 1 of 4"):
        siglip(video(), random_gaze(siglip.grid, batch_size=1))
    with pytest.raises(ValueError, match=r"`pixel_values_videos` must be normalised floats.*got torch.uint8"):
        siglip((video() * 0).to(torch.uint8))
    with pytest.raises(ValueError, match=r"`pixel_values_videos` must be normalised floats.*got torch.float32 \(4, 3"):
        siglip(video()[0])
    with pytest.raises(ValueError, match=r"must have 3 channels, got the shape \(2, 4, 1"):
        siglip(video()[:, :, :1])
    with pytest.raises(ValueError, match=r"`attention` must be one of .*got 'full'"):
        siglip(video(), attention="full")
    with pytest.raises(ValueError, match=r"`attention` must be one of .*got 'full'"):
        GazeVisionModel(siglip.vision_model, attention="full")
    with pytest.raises(ValueError, match=r"`scales\[0\]` must be a positive multiple of the patch size 16, got 20"):
        GazeVisionModel(siglip.vision_model, scales=[20, 64])


def test_frames_must_fill_tubelets():
    with pytest.raises(ValueError, match="multiple of 2 frames.*got 3"):
        GazeVisionModel(tower_of("vjepa2"), scales=SCALES)(video(1, 3))
    with pytest.raises(ValueError, match="must hold 4 frames.*got 6"):
        GazeVisionModel(tower_of("videomae"), scales=SCALES)(video(1, 6))


def test_the_error_of_an_unknown_family_lists_the_known_ones():
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError) as error:
        GazeVisionModel(bert)
    message = str(error.value)
    assert all(family in message for family in ADAPTERS)
    assert "BertModel (bert)" in message and "docs/integrations.md" in message


@torch.no_grad()
def test_a_new_family_is_one_class(monkeypatch):
    """The steps of docs/integrations.md."""

    class BlankConfig(ViTConfig):
        model_type = "blank_vit"

    class BlankAdapter(VisionAdapter):
        model_type = "blank_vit"

    tower = AutoModel.from_config(CONFIGS["vit"]).eval()
    with pytest.raises(ValueError, match="blank_vit"):
        tower.config = BlankConfig(**SIZES)
        GazeVisionModel(tower)
    monkeypatch.setitem(ADAPTERS, "blank_vit", BlankAdapter)
    model = GazeVisionModel(tower, scales=SCALES)
    expected = tower(video().flatten(0, 1)).last_hidden_state[:, 1:].flatten(0, 1)
    torch.testing.assert_close(model(video(), attention="frame").last_hidden_state, expected, rtol=0, atol=1e-5)
