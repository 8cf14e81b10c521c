"""Attention over packed clips: the visible keys of each choice, with every implementation."""

import pytest
import torch
from torch import nn

from transformers_autogaze.integrations import packed_attention as module
from transformers_autogaze.integrations.packed_attention import PackedAttention


ATTENTION_CHOICES = ("block_causal", "causal", "bidirectional", "frame")
# Two clips; a frame without tokens, one that is larger than a shared call, many tiny ones.
TOKENS = torch.tensor([[3, 0, 5, 1, 40, 2], [7, 300, 1, 1, 2, 1]])


def visible_keys(attention: str) -> torch.Tensor:
    """Which keys are visible to each token, as the choices are described."""
    clip = torch.arange(2).repeat_interleave(TOKENS.sum(1))
    frame = torch.arange(TOKENS.numel()).repeat_interleave(TOKENS.flatten())
    place = torch.arange(len(clip))
    same_clip = clip[:, None] == clip
    return {
        "frame": frame[:, None] == frame,
        "block_causal": same_clip & (frame <= frame[:, None]),
        "causal": same_clip & (place <= place[:, None]),
        "bidirectional": same_clip,
    }[attention]


@pytest.mark.parametrize("attention", ATTENTION_CHOICES)
def test_key_ranges_are_those_of_the_choice(attention):
    plan = PackedAttention.for_clips(TOKENS, attention)
    everything = slice(0, int(TOKENS.sum()))
    assert torch.equal(plan.mask(everything, everything)[0, 0], visible_keys(attention))


@pytest.mark.parametrize("attention", ATTENTION_CHOICES)
def test_chunks_cover_every_query_once_and_need_no_large_mask(attention):
    plan = PackedAttention.for_clips(TOKENS, attention)
    visible, covered = visible_keys(attention), []
    for queries, keys, has_mask in plan.chunks:
        covered += range(queries.start, queries.stop)
        assert not visible[queries, : keys.start].any() and not visible[queries, keys.stop :].any()
        if has_mask:
            assert queries.stop - queries.start <= module._MAX_QUERIES
        else:
            assert visible[queries, keys].all()
    assert covered == list(range(int(TOKENS.sum())))


@pytest.mark.parametrize("attention", ATTENTION_CHOICES)
def test_flash_arguments_describe_the_same_attention(attention):
    plan = PackedAttention.for_clips(TOKENS, attention)
    index, arguments = plan.flash_arguments
    keys = torch.arange(int(TOKENS.sum())) if index is None else index
    expected = visible_keys(attention)
    got = torch.zeros_like(expected)
    bounds_q, bounds_k = arguments["cu_seq_lens_q"].tolist(), arguments["cu_seq_lens_k"].tolist()
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        assert q1 - q0 <= arguments["max_length_q"] and k1 - k0 <= arguments["max_length_k"]
        block = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        got[q0:q1, keys[k0:k1]] = block.tril() if arguments["is_causal"] else block
    assert torch.equal(got, expected)


class Layer(nn.Module):
    """A layer that looks up transformers' attention interface, like those of every tower."""

    def __init__(self, implementation: str):
        super().__init__()
        from transformers import SiglipVisionConfig

        self.config = SiglipVisionConfig(attn_implementation=implementation)

    def forward(self, query, key, value):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return attend(self, query, key, value, None, scaling=0.3, dropout=0.0)[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attention", ATTENTION_CHOICES)
def test_attention_is_that_of_the_full_mask(attention, implementation):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, int(TOKENS.sum()), 8, dtype=torch.float64)
    layer = Layer(implementation)
    with module.packed_attention(layer, PackedAttention.for_clips(TOKENS, attention)):
        output = layer(query, key, value)
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~visible_keys(attention), -torch.inf)
    torch.testing.assert_close(output, (scores.softmax(-1) @ value).transpose(1, 2), rtol=0, atol=1e-12)
    assert layer.config._attn_implementation == implementation


def gathered_plan(num_groups: int = 1) -> tuple[PackedAttention, torch.Tensor]:
    """A plan with scattered keys, of the sequence and of eight tokens before it, and the keys visible to each token."""
    generator = torch.Generator().manual_seed(0)
    num_queries = torch.randint(1, 20, (40,), generator=generator)
    num_queries[::7] *= 6
    visible = torch.rand(40, 8 + int(num_queries.sum()), generator=generator) < 0.1
    visible[:, 0] = True
    visible[:5, 40:80] = True  # keys close together
    end = visible.sum(1).cumsum(0)
    plan = PackedAttention(num_queries, end - visible.sum(1), end, key_index=visible.nonzero()[:, 1])
    plan.group = None if num_groups == 1 else torch.arange(40) % num_groups
    return plan, visible.repeat_interleave(num_queries, dim=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("max_queries", [1, 30, 256])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_attention_to_gathered_keys_is_that_of_the_full_mask(num_groups, max_queries, implementation, monkeypatch):
    monkeypatch.setattr(module, "_MAX_QUERIES", max_queries)
    plan, visible = gathered_plan(num_groups)
    query, *keys = torch.randn(3, 1, 2, visible.shape[1], 8, dtype=torch.float64).unbind()
    query = query[:, :, 8:]
    layer = Layer(implementation)

    def extend(key, value):
        return (torch.cat([part[:, :, :8], own], dim=2) for part, own in zip(keys, (key, value), strict=True))

    with module.packed_attention(layer, plan, extend):
        output = layer(query, keys[0][:, :, 8:], keys[1][:, :, 8:])
    scores = (query @ keys[0].transpose(-1, -2) * 0.3).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(output, (scores.softmax(-1) @ keys[1]).transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_queries", [1, 30, 256])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_shared_calls_have_every_query_once_and_every_key_once(num_groups, max_queries, monkeypatch):
    monkeypatch.setattr(module, "_MAX_QUERIES", max_queries)
    plan, visible = gathered_plan(num_groups)
    calls, order = plan.shared_calls
    queries = torch.cat([torch.arange(len(visible))[call.queries] for call in calls])
    assert torch.equal(queries if order is None else queries[order], torch.arange(len(visible)))
    segment = torch.arange(40).repeat_interleave(plan.num_queries)
    for call in calls:
        segments = segment[call.queries].unique()
        assert plan.num_queries[segments].sum() <= max_queries or len(segments) == 1
        assert plan.group is None or len(plan.group[segments].unique()) == 1
        keys = torch.arange(visible.shape[1])[call.keys]
        got = torch.zeros_like(visible[call.queries])
        got[:, keys] = True if call.mask is None else call.mask[0, 0]
        assert torch.equal(got, visible[call.queries]) and len(keys.unique()) == len(keys)
        assert len(keys) <= module._MAX_KEY_OVERHEAD * visible[call.queries].any(0).sum()
    # Consecutive segments share calls if they may.
    assert len(calls) == 40 if max_queries == 1 else len(calls) < 40
    assert max_queries == 256 or any(isinstance(call.keys, torch.Tensor) for call in calls)


def test_flash_arguments_gather_scattered_keys():
    plan, visible = gathered_plan()
    index, arguments = plan.flash_arguments
    assert torch.equal(index, plan.key_index) and not arguments["is_causal"]
    got = torch.zeros_like(visible)
    bounds_q, bounds_k = arguments["cu_seq_lens_q"].tolist(), arguments["cu_seq_lens_k"].tolist()
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        assert q1 - q0 <= arguments["max_length_q"] and k1 - k0 <= arguments["max_length_k"]
        got[q0:q1, index[k0:k1]] = True
    assert torch.equal(got, visible)


def test_flex_mask_counts_gathered_keys():
    plan, visible = gathered_plan()
    assert plan.block_mask.seq_lengths == (len(visible), len(plan.key_index))
    queries, keys = torch.arange(len(visible))[:, None], torch.arange(len(plan.key_index))
    is_visible = plan.block_mask.mask_mod(0, 0, queries, keys)
    got = torch.zeros_like(visible)
    query, key = is_visible.nonzero(as_tuple=True)
    got[query, plan.key_index[key]] = True
    assert torch.equal(got, visible)


def test_the_implementation_is_restored_after_an_error():
    layer = Layer("sdpa")
    with pytest.raises(RuntimeError):
        with module.packed_attention(layer, PackedAttention.for_clips(TOKENS, "frame")):
            assert layer.config._attn_implementation != "sdpa"
            raise RuntimeError
    assert layer.config._attn_implementation == "sdpa"


def test_the_error_of_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`attention` must be one of block_causal, .*got 'full'"):
        PackedAttention.for_clips(TOKENS, "full")
    with pytest.raises(ValueError, match="got 'canvas'"):
        PackedAttention.for_clips(TOKENS, "canvas")


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA; flex attention takes a minute to compile on a CPU"
)
@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("attention", ATTENTION_CHOICES)
def test_attention_on_cuda_is_that_of_the_full_mask(attention, implementation):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, int(TOKENS.sum()), 64, dtype=torch.bfloat16, device="cuda")
    layer = Layer("sdpa")
    layer.config._attn_implementation = implementation
    with module.packed_attention(layer, PackedAttention.for_clips(TOKENS.cuda(), attention)):
        output = layer(query, key, value)
    scores = (query.float() @ key.float().transpose(-1, -2) * 0.3).masked_fill(
        ~visible_keys(attention).cuda(), -torch.inf
    )
    expected = (scores.softmax(-1) @ value.float()).transpose(1, 2)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=2e-2)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA; flex attention takes a minute to compile on a CPU"
)
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_attention_to_gathered_keys_on_cuda_is_that_of_the_full_mask(implementation):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    plan, visible = gathered_plan()
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, visible.shape[1], 64, dtype=torch.bfloat16, device="cuda")
    query = query[:, :, 8:]
    layer = Layer("sdpa")
    layer.config._attn_implementation = implementation
    with module.packed_attention(layer, plan.to(query.device), lambda *_: (key, value)):
        output = layer(query, key[:, :, 8:], value[:, :, 8:])
    scores = (query.float() @ key.float().transpose(-1, -2) * 0.3).masked_fill(~visible.cuda(), -torch.inf)
    expected = (scores.softmax(-1) @ value.float()).transpose(1, 2)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=2e-2)
