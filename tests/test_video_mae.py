import json
import re

import pytest
import torch
from published import checkpoint_folder
from safetensors.torch import load_file, save_file

from transformers_autogaze import GazeGrid, GazeOutput
from transformers_autogaze.reconstruction import GazeVideoMAE, GazeVideoMAEConfig, L1Loss


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_hidden_size": 12,
    "decoder_intermediate_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "scales": [16, 32],
    "image_size": 32,
    "max_num_frames": 4,
    "initializer_range": 0.3,  # large enough to detect wrong connections
}
GRID = GazeGrid([16, 32], 16)


class Fixture:
    """The published code's recorded reconstructions; its values are normalised frames."""

    def __init__(self):
        self.folder = checkpoint_folder("videomae-21")
        self.expected = load_file(self.folder / "expected.safetensors")
        self.gaze = GazeOutput.from_ids(
            self.expected["gaze.gazing_pos"],
            self.expected["gaze.if_padded_gazing"],
            self.expected["gaze.num_gazing_each_frame"],
            GazeGrid([16, 32, 64], 16),
        )
        # The inverse of the processor's normalisation.
        self.std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None] / 2
        self.mean = (torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None] + 1) / 2
        self.pixels = self.expected["video"].double() * self.std + self.mean


@pytest.fixture(scope="module")
def published() -> Fixture:
    return Fixture()


@pytest.fixture(scope="module")
def published_model(published) -> GazeVideoMAE:
    return GazeVideoMAE.from_pretrained(published.folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def model() -> GazeVideoMAE:
    torch.manual_seed(0)
    return GazeVideoMAE(GazeVideoMAEConfig(**SMALL)).double().eval()


def make_gaze(batch=2, num_frames=4, seed=0, share=0.5) -> GazeOutput:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(batch, num_frames, n, generator=generator) < share for n in GRID.num_patches_each_scale]
    masks[0][:, :, 0] = True
    return GazeOutput.from_masks(masks, GRID)


def make_pixels(batch=2, num_frames=4, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, num_frames, 3, 32, 32, generator=generator, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("frames", [[0, 1, 2, 3, 4], [0, 3], [4]], ids=str)
def test_reconstructions_and_losses_equal_the_published_ones(published, published_model, frames):
    output = published_model(published.pixels, published.gaze, frames)
    name = "frames_" + "_".join(map(str, frames))
    rebuilt = (output.reconstruction - published.mean) / published.std
    torch.testing.assert_close(rebuilt, published.expected[f"{name}.reconstruction"], atol=1e-6, rtol=0)
    torch.testing.assert_close(output.loss, published.expected[f"{name}.loss_each_frame"], atol=1e-6, rtol=0)


def test_a_published_folder_loads_without_missing_or_unexpected_weights(published, tmp_path):
    weights = load_file(published.folder / "model.safetensors")
    _, info = GazeVideoMAE.from_pretrained(published.folder, output_loading_info=True)
    assert not any(info.values())
    # The published file may have the feature networks of the loss, which this model ignores.
    save_file({**weights, "dinov2_reg.layernorm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((published.folder / "config.json").read_text())
    _, info = GazeVideoMAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def published_names_of_full_size() -> dict[str, tuple[int, ...]]:
    """The published names and shapes, from the sizes of ViT-MAE large and the published scales."""
    shapes = {
        "vit.embeddings.cls_token": (1, 1, 1024),
        "vit.embeddings.position_embeddings": (1, 197, 1024),
        "vit.embeddings.scale_embed": (4, 1024),
        "vit.embeddings.time_embed": (256, 1024),
        "vit.embeddings.patch_embeddings.projection.weight": (1024, 3, 16, 16),
        "vit.embeddings.patch_embeddings.projection.bias": (1024,),
        "vit.layernorm.weight": (1024,),
        "vit.layernorm.bias": (1024,),
        "decoder.decoder_embed.weight": (512, 1024),
        "decoder.decoder_embed.bias": (512,),
        "decoder.mask_token": (1, 1, 512),
        "decoder.decoder_pos_embed": (1, 197, 512),
        "decoder.decoder_scale_embed": (4, 512),
        "decoder.time_embed": (256, 512),
        "decoder.decoder_norm.weight": (512,),
        "decoder.decoder_norm.bias": (512,),
        "decoder.decoder_pred.weight": (768, 512),
        "decoder.decoder_pred.bias": (768,),
    }
    for prefix, layers, size, inner in (
        ("vit.encoder.layer", 24, 1024, 4096),
        ("decoder.decoder_layers", 8, 512, 2048),
    ):
        for layer in range(layers):
            for name, out_size, in_size in (
                ("attention.attention.query", size, size),
                ("attention.attention.key", size, size),
                ("attention.attention.value", size, size),
                ("attention.output.dense", size, size),
                ("intermediate.dense", inner, size),
                ("output.dense", size, inner),
            ):
                shapes[f"{prefix}.{layer}.{name}.weight"] = (out_size, in_size)
                shapes[f"{prefix}.{layer}.{name}.bias"] = (out_size,)
            for name in ("layernorm_before", "layernorm_after"):
                shapes[f"{prefix}.{layer}.{name}.weight"] = shapes[f"{prefix}.{layer}.{name}.bias"] = (size,)
    return shapes


def test_full_size_weights_have_the_published_names_and_shapes():
    with torch.device("meta"):
        model = GazeVideoMAE(GazeVideoMAEConfig())
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published_names_of_full_size()


def test_the_fixture_has_the_names_of_full_size(published):
    def without_layer(names):
        return {re.sub(r"\.\d+\.", ".N.", name) for name in names}

    weights = load_file(published.folder / "model.safetensors")
    assert without_layer(weights) == without_layer(published_names_of_full_size())


def test_full_width_weights_under_published_names_load(tmp_path):
    # Encoder and decoder have one layer each at full width; the other layers have the same names and shapes.
    layers = re.compile(r"(layer|decoder_layers)\.(?!0\.)\d+\.")
    names = {key: shape for key, shape in published_names_of_full_size().items() if not layers.search(key)}
    generator = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(shape, generator=generator).half() for key, shape in names.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"scales": "32+64+112+224", "num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    config |= {"loss_type": "l1+dinov2_reg+siglip2", "loss_weights": "1+0.3+0.3", "causal": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = GazeVideoMAE.from_pretrained(tmp_path, dtype=torch.float16, output_loading_info=True)
    assert not any(info.values())
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


@torch.no_grad()
def test_saving_and_loading_changes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = GazeVideoMAE.from_pretrained(tmp_path, dtype=torch.float64).eval()
    pixels, gaze = make_pixels(), make_gaze()
    expected = model(pixels, gaze).reconstruction
    torch.testing.assert_close(again(pixels, gaze).reconstruction, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(model):
    pixels, gaze = make_pixels(), make_gaze()
    assert gaze.if_padded_gazing.any()
    whole = model(pixels, gaze, frames=[1, 3])
    for clip in range(2):
        alone = model(pixels[clip : clip + 1], gaze.select(clip), frames=[1, 3])
        torch.testing.assert_close(alone.reconstruction[0], whole.reconstruction[clip], atol=1e-12, rtol=0)
        torch.testing.assert_close(alone.loss[0], whole.loss[clip], atol=1e-12, rtol=0)


@torch.no_grad()
def test_tokens_attend_only_to_gazed_patches_of_no_later_frames(model):
    pixels = make_pixels(batch=1)
    masks = [torch.zeros(1, 4, n, dtype=torch.bool) for n in GRID.num_patches_each_scale]
    masks[1][:, :, 0] = True  # the upper left corner of every frame
    gaze = GazeOutput.from_masks(masks, GRID)
    rebuilt = model(pixels, gaze, frames=[1]).reconstruction
    unseen = pixels.clone()
    unseen[..., 16:, :] = 0.5
    unseen[:, 2:] = 0.5
    assert torch.equal(model(unseen, gaze, frames=[1]).reconstruction, rebuilt)
    seen = pixels.clone()
    seen[:, 0, :, :16, :16] = 0.5
    assert not torch.allclose(model(seen, gaze, frames=[1]).reconstruction, rebuilt)


@torch.no_grad()
def test_frames_have_the_requested_order(model):
    pixels, gaze = make_pixels(), make_gaze()
    one = model(pixels, gaze, frames=[1, 3])
    other = model(pixels, gaze, frames=[3, 1, 3])
    assert torch.equal(other.reconstruction, one.reconstruction[:, [1, 0, 1]])
    assert torch.equal(other.loss, one.loss[:, [1, 0, 1]])


@torch.no_grad()
def test_eager_attention_equals_sdpa(model):
    eager = GazeVideoMAE._from_config(GazeVideoMAEConfig(**SMALL), attn_implementation="eager").double().eval()
    eager.load_state_dict(model.state_dict())
    pixels, gaze = make_pixels(), make_gaze()
    assert (model.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    # The eager attention of transformers computes its softmax in float32.
    expected = model(pixels, gaze).reconstruction
    torch.testing.assert_close(eager(pixels, gaze).reconstruction, expected, atol=1e-5, rtol=0)


def test_the_loss_is_that_of_the_call_and_gradients_reach_every_weight(model):
    pixels, gaze = make_pixels(), make_gaze()
    output = model(pixels, gaze, loss=L1Loss())
    expected = (output.reconstruction - pixels).abs().mean((2, 3, 4))
    torch.testing.assert_close(output.loss, expected)
    model.zero_grad()
    model(pixels, gaze, frames=[0, 2]).loss.mean().backward()
    without = {name for name, value in model.named_parameters() if value.requires_grad and value.grad is None}
    assert without == set()
    model.zero_grad()


def test_new_weights_have_sincos_positions():
    torch.manual_seed(0)
    model = GazeVideoMAE(GazeVideoMAEConfig(**SMALL))
    positions = model.vit.embeddings.position_embeddings
    assert not positions.requires_grad and (positions[0, 0] == 0).all()
    # Patch 1 is at column 1 and row 0; the lowest of the four frequencies is 1/1000.
    wave = torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    expected = torch.cat([wave.sin(), wave.cos(), torch.zeros(4), torch.ones(4)]).float()
    torch.testing.assert_close(positions[0, 2].detach(), expected)
    assert 0.2 < model.vit.embeddings.time_embed.std() < 0.4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"causal": False}, r"`causal` must be True"),
        ({"time_embed": False}, r"`time_embed` must be True"),
        ({"scales": "16+40"}, r"`scales\[1\]` must be a positive multiple of the patch size 16, got 40"),
    ],
)
def test_unsupported_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GazeVideoMAEConfig(**{**SMALL, **options})


@pytest.mark.parametrize(
    "pixels, gaze, options, message",
    [
        (make_pixels(), make_gaze(), {"frames": [4]}, r"`frames` must name .* each in 0..3, got \[4\]"),
        (make_pixels(num_frames=3), make_gaze(), {}, r"`pixels` must be of shape \(2, 4, 3, 32, 32\)"),
        (make_pixels() * 4 - 2, make_gaze(), {}, r"`pixels` must lie in 0..1, got -2..2: undo the normalisation"),
        (make_pixels(num_frames=5), make_gaze(num_frames=5), {}, r"`pixels` must hold at most 4 frames a clip, got 5"),
    ],
)
def test_invalid_arguments_are_refused(model, pixels, gaze, options, message):
    with pytest.raises(ValueError, match=message):
        model(pixels, gaze, **options)
