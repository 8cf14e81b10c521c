import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeVideoProcessor, CompositeReconstruction
from transformers_autogaze.demo import render_demo_clip
from transformers_autogaze.training import initialize_gaze_model
from transformers_autogaze.training.initialization import position_waves


CONFIG = {"scales": [32, 64, 128], "image_size": 128}


def demo_clips(seeds):
    processor = AutoGazeVideoProcessor(size={"shortest_edge": 128})
    clips = [processor(render_demo_clip(4, 128, 128, seed), return_tensors="pt") for seed in seeds]
    return torch.cat([clip["pixel_values_videos"] for clip in clips])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = AutoGazeModel(AutoGazeConfig(**CONFIG))
    initialize_gaze_model(model, demo_clips(range(8)))
    return model.eval()


def test_vision_tokens_tell_where_detail_would_be_lost(model):
    """On clips that the readout was not fitted to."""
    video = demo_clips(range(20, 24))
    with torch.no_grad():
        tokens = model.embed_video(video)[0].flatten(0, 1)
    frames = AutoGazeVideoProcessor().to_pixels(video).clamp(0, 1).flatten(0, 1)
    composite = CompositeReconstruction(model.config.grid)
    errors = composite.cell_errors(frames, torch.full_like(frames, 0.5))[:, 2]  # with the scale of 64 laid
    gains = F.adaptive_avg_pool2d(errors, 8).flatten(1)
    told = tokens[..., 8:12].mean(-1)  # of four quarters each: mid-grey first, then the scales
    best, found = gains.topk(8).values.sum(1), gains.gather(1, told.topk(8).indices).sum(1)
    at_random = gains.mean(1) * 8
    assert float((found / best).mean()) > 0.75 > 2 * float((at_random / best).mean())


def test_a_token_that_looks_at_a_place_names_the_patch_there(model):
    attention = model.gaze_decoder.model.layers[-1].self_attn
    tokens = model.connector.pos_embed  # of which `v_proj` reads positions
    looked_at = attention.o_proj(attention.v_proj(tokens))
    names = model.gaze_decoder.lm_head.weight.view(10, -1, 192)
    for row in (0, 9):
        logits = looked_at @ names[row].T
        assert torch.equal(logits[:, 20:84].argmax(-1), torch.arange(64))  # the finest scale
        coarser = torch.arange(8).view(-1, 1) // 2 * 4 + torch.arange(8) // 2
        assert float((logits[:, 4:20].argmax(-1) == coarser.flatten()).float().mean()) > 0.9


def test_position_codes_are_orthogonal_waves_that_blur_places_little():
    waves = position_waves(14, 108)
    torch.testing.assert_close(waves.T @ waves / 196, torch.eye(108), rtol=0, atol=1e-5)
    alike = waves @ waves.T
    assert torch.equal(alike.argmax(-1), torch.arange(196))
    far = (torch.arange(196) // 14 - 7).abs() + (torch.arange(196) % 14 - 7).abs() > 4
    assert float(alike[7 * 14 + 7][far].abs().max()) < 0.15 * float(alike[7 * 14 + 7].max())


def test_the_same_seed_gives_the_same_weights():
    video, models = demo_clips(range(2)), [AutoGazeModel(AutoGazeConfig(**CONFIG)) for _ in range(2)]
    for model in models:
        initialize_gaze_model(model, video, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_models_that_are_too_small_are_refused():
    small = AutoGazeModel(AutoGazeConfig(vision_config={"hidden_size": 32}))
    with pytest.raises(ValueError, match="`model` must have 3 colour channels, .* got 3, 16, 32 and 192"):
        initialize_gaze_model(small, torch.zeros(1, 2, 3, 224, 224))


@torch.no_grad()
def test_heads_of_the_first_layers_look_at_their_own_place(model):
    """Among the tokens of a frame, half of the heads: which is where history is learned from."""
    tokens = model.connector.pos_embed[None]
    positions = torch.arange(64)[None]
    rotary = model.gaze_decoder.model.rotary_emb(tokens, positions)
    for layer in model.gaze_decoder.model.layers[:2]:
        attention = layer.self_attn
        queries, keys = (
            projection(tokens).unflatten(-1, (6, 32)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
        paid = (queries @ keys.mT * attention.scaling).softmax(-1)[0].diagonal(dim1=1, dim2=2).mean(1)
        assert float(paid[:3].min()) > 0.5 > 10 * float(paid[3:].max())
