import pytest
import torch
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from transformers_autogaze.reconstruction.losses import FeatureLoss, L1Loss, WeightedLoss, published_loss


SIZES = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def dinov2() -> Dinov2WithRegistersModel:
    torch.manual_seed(0)
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, image_size=28, patch_size=14)).double()


@pytest.fixture(scope="module")
def siglip2() -> SiglipVisionModel:
    # The fixed-size SigLIP 2 checkpoints are SigLIP vision towers.
    torch.manual_seed(1)
    return SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=32, image_size=28, patch_size=14)).double()


def make_frames(size=28, batch=2, frames=3):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, frames, 3, size, size)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def layer_outputs(model, layers, images):
    """Returns the hidden states after each layer, recorded by hooks."""
    outputs = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def transformer_layers(model):
    return max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)


@pytest.mark.parametrize("name, mean, std, first", [("dinov2", 0.4, 0.2, 5), ("siglip2", 0.5, 0.5, 0)])
def test_feature_loss_is_the_mean_over_patch_tokens_of_the_last_four_hidden_states(name, mean, std, first, request):
    model = request.getfixturevalue(name)
    rebuilt, frames = make_frames()
    loss = FeatureLoss(model, [mean] * 3, [std] * 3)(rebuilt, frames)
    assert loss.shape == (2, 3)
    states = [
        layer_outputs(model, transformer_layers(model), ((x - mean) / std).flatten(0, 1)) for x in (rebuilt, frames)
    ]
    # DINOv2 has a CLS token and four registers before its patches, SigLIP has none.
    got, wanted = (torch.cat([state[:, first:] for state in part[-4:]], dim=-1) for part in states)
    assert got.shape == (6, 4, 64)
    expected = (got - wanted).square().mean((1, 2)).view(2, 3)
    torch.testing.assert_close(loss, expected)


def test_feature_loss_works_on_frames_larger_than_the_model_was_made_for(siglip2):
    rebuilt, frames = make_frames(size=42)
    loss = FeatureLoss(siglip2, [0.5] * 3, [0.5] * 3)(rebuilt, frames)
    assert loss.shape == (2, 3) and (loss > 0).all()


def test_gradients_of_a_feature_loss_reach_the_frames_but_not_the_weights(dinov2):
    loss = FeatureLoss(dinov2, [0.5] * 3, [0.5] * 3).train()
    rebuilt, frames = make_frames(batch=1, frames=1)
    rebuilt.requires_grad_(True)
    loss(rebuilt, frames).sum().backward()
    assert rebuilt.grad.abs().sum() > 0
    assert not loss.model.training and all(weight.grad is None for weight in loss.model.parameters())


def test_the_published_loss_is_the_weighted_sum_of_its_three_parts(dinov2, siglip2):
    rebuilt, frames = make_frames()
    std = [0.1145, 0.112, 0.1125]
    imagenet = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    parts = [L1Loss(std), FeatureLoss(dinov2, *imagenet), FeatureLoss(siglip2, [0.5] * 3, [0.5] * 3)]
    expected = sum(weight * part(rebuilt, frames) for weight, part in zip((1, 0.3, 0.3), parts, strict=True))
    torch.testing.assert_close(published_loss(dinov2, siglip2, std)(rebuilt, frames), expected)


def test_l1_is_that_of_normalised_values():
    rebuilt, frames = make_frames(size=8)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in ([0.3, 0.4, 0.5], [0.1, 0.2, 0.4]))
    expected = ((rebuilt - mean) / std - (frames - mean) / std).abs().mean((2, 3, 4))
    torch.testing.assert_close(L1Loss([0.1, 0.2, 0.4])(rebuilt, frames), expected)


def test_invalid_arguments_of_losses_are_refused():
    with pytest.raises(ValueError, match=r"`weights` must be one for each of the 2 losses, got \[1.0\]"):
        WeightedLoss([L1Loss(), L1Loss()], [1.0])
    language = LlamaModel(LlamaConfig(**SIZES, intermediate_size=16, vocab_size=8))
    with pytest.raises(ValueError, match=r"`model` must be a vision model .* got LlamaModel"):
        FeatureLoss(language, [0.5] * 3, [0.5] * 3)
