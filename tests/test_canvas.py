"""Attention to the canvas: the keys visible to a token, in whole clips and in streams."""

import copy

import pytest
import torch
from test_vision import CONFIGS, OF_VIDEOS, SIZES, gradients, original, random_gaze, tower_of, video
from transformers import AutoModel, SiglipVisionConfig

from transformers_autogaze import GazeGrid, GazeOutput
from transformers_autogaze.integrations import GazeVisionCache, GazeVisionModel
from transformers_autogaze.integrations import vision as vision_module
from transformers_autogaze.integrations.canvas import plan_canvas
from transformers_autogaze.integrations.packed_attention import PackedAttention


# One scale, nested scales, and scales that are not nested.
ALL_SCALES = ([64], [16, 32, 64], [32, 48, 64])


def canvas_model(family: str, scales: list[int], dtype: torch.dtype = torch.float32) -> GazeVisionModel:
    return GazeVisionModel(tower_of(family).to(dtype), scales=scales, attention="canvas").eval()


def uneven_gaze(grid: GazeGrid, batch_size: int, num_frames: int, tubelet: int = 1, seed: int = 0) -> GazeOutput:
    """Frames with few and many patches, and without any, such as the first two of the first clip."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch_size, num_frames, 1, generator=generator) ** 2
    share[0, :2], share[-1, -3 * tubelet : -2 * tubelet] = 0, 0
    masks = [
        torch.rand(batch_size, num_frames, count, generator=generator) < share for count in grid.num_patches_each_scale
    ]
    return GazeOutput.from_masks(masks, grid)


def part_of(gaze: GazeOutput, start: int, stop: int) -> GazeOutput:
    return GazeOutput.from_masks([mask[:, start:stop] for mask in gaze.gazing_mask], gaze.grid)


def covers(grid: GazeGrid, patch: int, place: tuple[int, int]) -> bool:
    """Whether a patch contains the centre of a place of the finest scale."""
    scale, *corner = (int(part) for part in grid.locate(torch.tensor(patch)))
    return all(
        2 * finest * at <= (2 * index + 1) * patches < 2 * finest * (at + 1)
        for at, index, patches, finest in zip(corner, place, grid.grids[scale], grid.grids[-1], strict=True)
    )


def visible_by_definition(gaze: GazeOutput, tubelet: int, num_prefix: int) -> torch.Tensor:
    """The keys visible to each token, computed by loops: `(tokens, tokens)`, in the order of the packed sequence."""
    grid = gaze.grid
    rows, cols = grid.grids[-1]
    tokens, frames = 0, []  # for every clip, frame by frame: all its tokens, and the token of each kept patch
    for clip in range(gaze.batch_size):
        frames.append([])
        by_frame = [ids.tolist() for ids in gaze.ids_each_frame(clip)]
        if tubelet > 1:
            pairs = zip(*(by_frame[start::tubelet] for start in range(tubelet)), strict=True)
            by_frame = [sorted(set().union(*pair)) for pair in pairs]
        for ids in by_frame:
            first = tokens + num_prefix
            tokens = first + len(ids) if ids else tokens
            own = range(first - num_prefix, tokens) if ids else range(0)
            frames[-1].append((own, {patch: first + slot for slot, patch in enumerate(ids)}))
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for clip in frames:
        for time, (own, patches) in enumerate(clip):
            keys = set(own)
            for place in ((row, col) for row in range(rows) for col in range(cols)):
                if any(covers(grid, patch, place) for patch in patches):
                    continue
                for _, earlier in reversed(clip[:time]):
                    there = [patch for patch in earlier if covers(grid, patch, place)]
                    if there:
                        keys.add(earlier[max(there)])  # ids ascend from coarse to fine
                        break
            for query in own:
                visible[query, list(keys)] = True
    return visible


def visible_by_plan(plan: PackedAttention) -> torch.Tensor:
    first, end = plan.key_range
    visible = torch.zeros(len(first), len(first), dtype=torch.bool)
    for query, keys in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
        index = torch.arange(*keys) if plan.key_index is None else plan.key_index[slice(*keys)]
        assert len(index.unique()) == len(index)
        visible[query, index] = True
    return visible


@pytest.fixture
def plans(monkeypatch) -> list[PackedAttention]:
    """The plans of the layers that were called."""
    recorded = []

    def record(layer, plan, extend=None):
        recorded.append(plan)
        return packed_attention(layer, plan, extend)

    packed_attention = vision_module.packed_attention
    monkeypatch.setattr(vision_module, "packed_attention", record)
    return recorded


@torch.no_grad()
@pytest.mark.parametrize("scales", ALL_SCALES, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_visible_keys_are_those_of_the_definition(family, scales, plans):
    model = canvas_model(family, scales)
    tubelet = model.adapter.tubelet_size
    prefix = model.adapter.prefix()
    num_frames = 4 if family == "videomae" else 8
    for seed in range(1 if family == "videomae" else 3):
        gaze = uneven_gaze(model.grid, 2, num_frames, tubelet, seed)
        model(video(2, num_frames), gaze)
        expected = visible_by_definition(gaze, tubelet, 0 if prefix is None else len(prefix))
        assert expected.sum() > len(expected) and not expected.all()
        assert torch.equal(visible_by_plan(plans[-1]), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_layers_follow_the_plan(implementation, plans):
    """Gradients of one layer: a frame depends on the pixels of the visible tokens, and on no others."""
    config = SiglipVisionConfig(**{**SIZES, "num_hidden_layers": 1}, attn_implementation=implementation)
    model = GazeVisionModel(AutoModel.from_config(config)).eval()
    assert model.attention == "canvas"
    gaze = uneven_gaze(model.grid, 2, 6)
    frames = video(2, 6).requires_grad_()
    output = model(frames, gaze)
    visible = visible_by_definition(gaze, 1, 0)
    clip = torch.arange(2).repeat_interleave(output.lengths)
    for query in (output.frame.diff() != 0).nonzero().flatten().tolist():  # the last token of every frame
        (gradient,) = torch.autograd.grad(output.last_hidden_state[query].square().sum(), frames, retain_graph=True)
        patches = gradient.unflatten(-1, (4, 16)).unflatten(-3, (4, 16)).abs().amax((2, 4, 6)).flatten(2)
        expected = torch.zeros_like(patches, dtype=torch.bool)
        expected[clip[visible[query]], output.frame[visible[query]], output.ids[visible[query]]] = True
        assert torch.equal(patches > 0, expected)


@torch.no_grad()
@pytest.mark.parametrize("scale", [None, -1])
@pytest.mark.parametrize("scales", ALL_SCALES, ids=str)
@pytest.mark.parametrize("family", ["siglip", "clip", "dinov3", "vjepa2"])
def test_with_everything_kept_it_is_frame_attention_to_the_bit(family, scales, scale):
    model = canvas_model(family, scales)
    everything = GazeOutput.full(model.grid, batch_size=2, num_frames=4, scale=scale)
    output, expected = (model(video(), everything, attention) for attention in ("canvas", "frame"))
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    if scale == -1 and family not in OF_VIDEOS:
        num_prefix = 0 if output.prefix_hidden_state is None else output.prefix_hidden_state.shape[2]
        own = original(family, model.vision_model, video())[:, num_prefix:].flatten(0, 1)
        torch.testing.assert_close(output.last_hidden_state, own, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scales", ALL_SCALES, ids=str)
def test_eager_and_sdpa_give_the_same(scales):
    model = canvas_model("clip", scales, torch.float64)
    gaze, frames = uneven_gaze(model.grid, 2, 8), video(2, 8).double()
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.vision_model.set_attn_implementation(implementation)
        outputs.append(model(frames, gaze))
    torch.testing.assert_close(outputs[0].last_hidden_state, outputs[1].last_hidden_state, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[0].prefix_hidden_state, outputs[1].prefix_hidden_state, rtol=0, atol=1e-12)


@torch.no_grad()
def test_clips_of_a_batch_are_what_they_are_alone():
    model = canvas_model("clip", [16, 32, 64], torch.float64)
    gaze, frames = uneven_gaze(model.grid, 3, 6), video(3, 6).double()
    for clip, state in enumerate(model(frames, gaze).split()):
        alone = model(frames[clip : clip + 1], gaze.select(clip))
        torch.testing.assert_close(state, alone.last_hidden_state, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("scales", ALL_SCALES, ids=str)
@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "videomae"])
def test_a_stream_gives_what_the_whole_clip_gives(family, scales, implementation):
    model = canvas_model(family, scales, torch.float64)
    model.vision_model.set_attn_implementation(implementation)
    tubelet = model.adapter.tubelet_size
    num_frames = 9 * tubelet
    frames, gaze = video(2, num_frames).double(), uneven_gaze(model.grid, 2, num_frames, tubelet)
    whole = model(frames, gaze, output_hidden_states=True)
    for lengths in ([1] * 9, [2, 1, 4, 2]):
        cache, start, parts = GazeVisionCache(), 0, []
        for length in lengths:
            stop = start + length * tubelet
            output = model(frames[:, start:stop], part_of(gaze, start, stop), output_hidden_states=True, cache=cache)
            parts.append((start // tubelet, output))
            start = stop
            assert cache.num_frames == stop and cache.num_times == stop // tubelet
        for clip in range(2):
            frame = torch.cat([output.split(output.frame)[clip] + first for first, output in parts])
            assert torch.equal(frame, whole.split(whole.frame)[clip])
            for layer, state in enumerate(whole.hidden_states):
                got = torch.cat([output.split(output.hidden_states[layer])[clip] for _, output in parts])
                torch.testing.assert_close(got, whole.split(state)[clip], rtol=0, atol=1e-10)
            got = torch.cat([output.split()[clip] for _, output in parts])
            torch.testing.assert_close(got, whole.split()[clip], rtol=0, atol=1e-10)
        if whole.prefix_hidden_state is not None:
            got = torch.cat([output.prefix_hidden_state for _, output in parts], dim=1)
            torch.testing.assert_close(got, whole.prefix_hidden_state, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_cache_holds_the_visible_tokens_and_no_others():
    model = canvas_model("clip", [16, 32, 64])
    cache = GazeVisionCache()
    gaze = uneven_gaze(model.grid, 2, 40)
    for start in range(0, 40, 2):
        model(video(2, 2), part_of(gaze, start, start + 2), cache=cache)
        finest = gaze.finest_patches(4, 4)[:, : start + 2].flatten(2)
        # The visible patch of every place, with its frame; a coarse patch counts once.
        frame = torch.arange(start + 2)[:, None]
        visible = torch.where(finest < 0, -1, frame * model.grid.num_patches + finest).amax(1)
        assert cache.num_tokens == sum(len(clip[clip >= 0].unique()) for clip in visible) <= 2 * 16
        assert torch.equal(cache.canvas.token_at >= 0, visible >= 0)
        assert len(cache.key_values) == (2 if cache.num_tokens else 0)
        for part in (part for layer in cache.key_values for part in layer):
            assert part.shape == (1, 4, cache.num_tokens, 8)
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


@torch.no_grad()
def test_keys_of_a_frame_stay_bounded_however_long_the_clip(plans):
    for scales in ALL_SCALES:
        model = canvas_model("clip", scales)
        model(video(2, 64), uneven_gaze(model.grid, 2, 64))
        plan = plans[-1]
        assert (plan.end_key - plan.first_key <= plan.num_queries + 16).all()
        assert (plan.end_key - plan.first_key > plan.num_queries).float().mean() > 0.5


def test_groups_have_separate_canvases_and_may_be_interleaved_in_the_sequence():
    """Windows of two videos of unequal length, sorted by time; some tokens of a segment are at no place."""
    times = [[3, 0, 2, 1], [1, 2, 0, 0], [0, 4, 1, 2]]  # tokens of each group and time
    places = 3
    generator = torch.Generator().manual_seed(0)
    num_tokens = torch.tensor(times)
    token_at = torch.full((3, 4, places), -1)
    first_token, start = torch.zeros(3, 4, dtype=torch.long), 0
    for time in range(4):
        for group in (2, 0, 1):
            first_token[group, time] = start
            for place in range(min(places, times[group][time])):
                if torch.rand((), generator=generator) < 0.7:
                    token_at[group, time, place] = start + place
            start += times[group][time]
    expected = torch.zeros(start, start, dtype=torch.bool)
    ends = torch.full((3, places), -1)
    for group in range(3):
        for time in range(4):
            own = range(int(first_token[group, time]), int(first_token[group, time]) + times[group][time])
            keys = set(own)
            for place in range(places):
                there = [int(token) for token in token_at[group, : time + 1, place] if token >= 0]
                ends[group, place] = there[-1] if there else -1
                if there and token_at[group, time, place] < 0:
                    keys.add(there[-1])
            for query in own:
                expected[query, list(keys)] = True
    plan, canvas = plan_canvas(token_at, first_token, num_tokens)
    assert torch.equal(visible_by_plan(plan), expected) and plan.key_index is not None
    assert canvas.tokens.tolist() == sorted(set(ends[ends >= 0].tolist()))
    assert torch.equal(torch.where(canvas.token_at < 0, -1, canvas.tokens[canvas.token_at]), ends)


def test_without_earlier_keys_the_plan_is_that_of_frames():
    counts = torch.tensor([[2, 0, 1]])
    token_at = torch.tensor([[[0, 1], [-1, -1], [2, 2]]])
    plan, _ = plan_canvas(token_at, torch.tensor([[0, 2, 2]]), counts)
    expected = PackedAttention.for_clips(counts, "frame")
    assert plan.key_index is None
    for part in ("num_queries", "first_key", "end_key"):
        assert torch.equal(getattr(plan, part), getattr(expected, part))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["siglip", "clip", "dinov3", "vjepa2"])
def test_gradients_flow_in_training(family, checkpointing):
    tower = tower_of(family)
    tower.set_attn_implementation("eager")
    gaze = random_gaze(GazeGrid([16, 32, 64], 16), share=0.15)
    expected = gradients(GazeVisionModel(tower, [16, 32, 64], "canvas").eval(), gaze)
    tower.set_attn_implementation("sdpa")
    model = GazeVisionModel(tower, [16, 32, 64], "canvas").train()
    if checkpointing:
        tower.gradient_checkpointing_enable()
    runs = []
    next(model.adapter.layers[0].children()).register_forward_hook(lambda *_: runs.append(1))
    got = gradients(model, gaze)
    assert len(runs) == (2 if checkpointing else 1)
    assert sum(gradient is not None for gradient in got.values()) > 20
    for name, gradient in got.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_no_gradient_flows_through_a_cache():
    model = GazeVisionModel(tower_of("siglip").eval())
    cache = GazeVisionCache()
    model(video(2, 2), cache=cache)
    assert not any(part.requires_grad for layer in cache.key_values for part in layer)


@torch.no_grad()
def test_a_copy_of_a_cache_is_independent():
    model = canvas_model("siglip", [64])
    gaze, frames = uneven_gaze(model.grid, 2, 6), video(2, 6)
    cache = GazeVisionCache()
    model(frames[:, :4], part_of(gaze, 0, 4), cache=cache)
    other = copy.deepcopy(cache)
    outputs = []
    for each in (other, cache):
        outputs.append(model(frames[:, 4:], part_of(gaze, 4, 6), cache=each).last_hidden_state)
    assert torch.equal(*outputs) and len(outputs[0])


@torch.no_grad()
def test_a_reset_cache_begins_anew_with_any_tower_and_batch():
    cache = GazeVisionCache()
    canvas_model("siglip", [64])(video(2, 2), cache=cache)
    cache.reset()
    assert cache.num_frames == 0 and cache.num_tokens == 0
    model = canvas_model("clip", [32, 64])
    gaze = uneven_gaze(model.grid, 3, 4)
    expected = model(video(3, 4), gaze)
    assert torch.equal(model(video(3, 4), gaze, cache=cache).last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_a_failed_call_leaves_the_cache_as_it_was():
    model = canvas_model("siglip", [64])
    gaze, frames = uneven_gaze(model.grid, 2, 6), video(2, 6)
    cache = GazeVisionCache()
    model(frames[:, :3], part_of(gaze, 0, 3), cache=cache)
    expected = model(frames[:, 3:], part_of(gaze, 3, 6), cache=copy.deepcopy(cache)).last_hidden_state

    def fail(*_):
        raise MemoryError

    hook = model.adapter.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(frames[:, 3:], part_of(gaze, 3, 6), cache=cache)
    hook.remove()
    assert cache.num_frames == 3
    assert torch.equal(model(frames[:, 3:], part_of(gaze, 3, 6), cache=cache).last_hidden_state, expected)


def test_a_cache_that_does_not_fit_is_refused_before_any_computation(monkeypatch):
    tower = tower_of("siglip")
    model, cache = GazeVisionModel(tower), GazeVisionCache()
    model(video(2, 3), cache=cache)

    def fail_to_embed(*_):
        raise AssertionError("computed before the checks")

    monkeypatch.setattr(GazeVisionModel, "_embed", fail_to_embed)
    for attention in ("frame", "block_causal"):
        with pytest.raises(ValueError, match=f"`attention` must be 'canvas' to use it, got '{attention}'"):
            model(video(2, 1), attention=attention, cache=cache)
    with pytest.raises(ValueError, match="`cache` is of another tower; call `cache.reset"):
        GazeVisionModel(tower_of("siglip"))(video(2, 1), cache=cache)
    with pytest.raises(ValueError, match=r"`cache` is of the scales \[64\], but this tower's are \[32, 64\]"):
        GazeVisionModel(tower, [32, 64], "canvas")(video(2, 1), cache=cache)
    with pytest.raises(ValueError, match="`cache` is of 2 clips, but `gaze` is of 1"):
        model(video(1, 1), cache=cache)
    gaze = GazeOutput.full(model.grid, 2, 1).replace(first_frame=2)
    with pytest.raises(ValueError, match="`gaze` must follow the 3 frames that `cache` has seen, got `first_frame` 2"):
        model(video(2, 1), gaze, cache=cache)
    with pytest.raises(
        ValueError, match="cannot continue a videomae tower, whose positions are for clips of 4 frames"
    ):
        GazeVisionModel(tower_of("videomae"), attention="canvas")(video(), cache=GazeVisionCache())
    tower.train()
    with pytest.raises(ValueError, match="`cache` carries no gradients and cannot be used in training"):
        model(video(2, 1), cache=cache)
    tower.gradient_checkpointing_enable()
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be used in training"):
        model(video(2, 1), cache=cache)
    assert cache.num_frames == 3


def test_consecutive_gazes_are_accepted():
    model, cache = GazeVisionModel(tower_of("siglip")), GazeVisionCache()
    for first in (0, 2, 4):
        model(video(2, 2), GazeOutput.full(model.grid, 2, 2).replace(first_frame=first), cache=cache)
    assert cache.num_frames == 6


@torch.no_grad()
def test_tokens_that_later_frames_replaced_have_no_effect():
    """Pixels that are not kept and, one layer deep, pixels that are no longer visible."""
    model = GazeVisionModel(AutoModel.from_config(SiglipVisionConfig(**{**SIZES, "num_hidden_layers": 1}))).eval()
    masks = torch.zeros(1, 3, 16, dtype=torch.bool)
    masks[0, 0], masks[0, 1, 5], masks[0, 2, 0] = True, True, True
    gaze, frames = GazeOutput.from_masks([masks], model.grid), video(1, 3)
    hidden = ~masks.view(3, 1, 4, 4).repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    hidden[0, 0, 16:32, 16:32] = hidden[0, 0, :16, :16] = True  # places 5 and 0 of the first frame
    outputs = [model(frames + change * hidden, gaze).last_hidden_state[-1] for change in (0, 100)]
    assert torch.equal(*outputs)
    visible = ~hidden.clone()
    assert not torch.equal(model(frames + 100 * visible, gaze).last_hidden_state[-1], outputs[0])
