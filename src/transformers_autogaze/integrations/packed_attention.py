"""
Attention inside the clips of one packed sequence, for towers whose layers take no such masks.

A tower's layers look up the attention function that their configuration names, in transformers' attention interface. While a
layer runs on a packed sequence, this name is that of the function registered here. It splits the sequence into pieces and
calls the tower's own implementation on each: sdpa, eager, flex or flash attention.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


_COUNT_BASED = ("block_causal", "causal", "bidirectional", "frame")  # determined by the numbers of tokens of frames
ATTENTION_CHOICES = (*_COUNT_BASED, "canvas")

_NAME = "autogaze_packed"
_MAX_QUERIES = 256  # of segments that share a call with a mask
_MAX_SHARED_QUERIES = 128  # of a segment that shares a call, if keys are gathered
_MAX_KEY_OVERHEAD = 1.25  # keys of a slice for each needed one; up to this the slice is used instead of gathered keys

Extend = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Prepends cached keys and values to those of a layer, both `(1, heads, tokens, head_dim)`."""


@dataclass(eq=False)
class PackedAttention:
    """
    The keys that each token of a packed sequence attends to: a contiguous range of the sequence, or of gathered keys.

    Args:
        num_queries (`torch.LongTensor` of shape `(segments,)`):
            Tokens of each segment; the segments are consecutive and fill the sequence.
        first_key, end_key (`torch.LongTensor` of shape `(segments,)`):
            The range of keys of a segment's tokens, the end exclusive.
        is_causal (`bool`):
            Whether a token attends to its segment's keys up to itself only; a segment's keys are then its own tokens.
        key_index (`torch.LongTensor` of shape `(gathered keys,)`, *optional*):
            Tokens to gather keys from, for segments whose keys are not contiguous. `first_key` and `end_key` then count
            gathered keys. A token may be gathered more than once.
        group (`torch.LongTensor` of shape `(segments,)`, *optional*):
            With `key_index`: group of each segment. Segments of a group have many keys in common and may share a call. By
            default all are in one group.

    Example:

    ```python
    >>> from transformers_autogaze.integrations.packed_attention import PackedAttention

    >>> plan = PackedAttention.for_clips(torch.tensor([[2, 1], [1, 3]]), "block_causal")
    >>> plan.num_queries.tolist(), plan.first_key.tolist(), plan.end_key.tolist()
    ([2, 1, 1, 3], [0, 0, 3, 3], [2, 3, 4, 7])

    ```
    """

    num_queries: torch.Tensor
    first_key: torch.Tensor
    end_key: torch.Tensor
    is_causal: bool = False
    key_index: torch.Tensor | None = None
    group: torch.Tensor | None = None

    @classmethod
    def for_clips(cls, tokens_each_frame: torch.Tensor, attention: str) -> "PackedAttention":
        """
        Plans the attention over consecutive clips, each of consecutive frames.

        Args:
            tokens_each_frame (`torch.LongTensor` of shape `(batch, frames)`): tokens of every frame.
            attention (`str`):
                `"frame"`: a token attends to its own frame; `"block_causal"`: its own frame and earlier ones; `"causal"`:
                itself and earlier tokens; `"bidirectional"`: the whole clip.

        Raises:
            ValueError: if `attention` is none of these. For `"canvas"` see [`plan_canvas`].
        """
        if attention not in _COUNT_BASED:
            raise ValueError(f"`attention` must be one of {', '.join(_COUNT_BASED)}, got {attention!r}")
        tokens_each_clip = tokens_each_frame.sum(1)
        end_of_clip = tokens_each_clip.cumsum(0)
        if attention in ("causal", "bidirectional"):
            plan = cls(tokens_each_clip, end_of_clip - tokens_each_clip, end_of_clip, attention == "causal")
        else:
            tokens = tokens_each_frame.flatten()
            end = tokens.cumsum(0)
            first = end - tokens
            if attention == "block_causal":
                first = (end_of_clip - tokens_each_clip).repeat_interleave(tokens_each_frame.shape[1])
            plan = cls(tokens, first, end)
        full = plan.num_queries > 0
        return cls(plan.num_queries[full], plan.first_key[full], plan.end_key[full], plan.is_causal)

    @cached_property
    def key_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two `torch.LongTensor` of shape `(tokens,)`: the first and the end of the keys of every token."""
        first = self.first_key.repeat_interleave(self.num_queries)
        if self.is_causal:
            return first, torch.arange(1, len(first) + 1, device=first.device)
        return first, self.end_key.repeat_interleave(self.num_queries)

    @cached_property
    def chunks(self) -> list[tuple[slice, slice, bool]]:
        """
        The attention calls: queries, keys, and whether a mask is needed.

        A large segment is a call of its own without a mask; small consecutive segments share a call. So no mask has more
        than a few hundred queries, and frames with few kept patches do not take one call each.
        """
        chunks: list[tuple[slice, slice, bool]] = []
        pending: list[tuple[int, int, int, int]] = []  # start and end of queries, first and end of keys

        def add_pending() -> None:
            if pending:
                keys = slice(min(first for _, _, first, _ in pending), max(end for *_, end in pending))
                chunks.append((slice(pending[0][0], pending[-1][1]), keys, len(pending) > 1))
                pending.clear()

        start = 0
        for size, first, end in zip(
            self.num_queries.tolist(), self.first_key.tolist(), self.end_key.tolist(), strict=True
        ):
            stop = start + size
            if self.is_causal:
                for query in range(start, stop, _MAX_QUERIES):
                    query_end = min(query + _MAX_QUERIES, stop)
                    chunks.append((slice(query, query_end), slice(first, query_end), True))
            else:
                if pending and stop - pending[0][0] > _MAX_QUERIES:
                    add_pending()
                pending.append((start, stop, first, end))
            start = stop
        add_pending()
        return chunks

    @cached_property
    def shared_calls(self) -> tuple[list["_SharedCall"], torch.Tensor | None]:
        """
        The attention calls if keys are gathered. Consecutive segments of a group share a call, in which each key occurs once.

        So the keys of a long clip are not all gathered at once, and no key is copied for each segment that attends to it.

        Returns:
            `tuple`: the calls, and the index of each token of the sequence in the concatenated results of the calls; `None`
            if these are in order.
        """
        order = torch.arange(len(self.num_queries)) if self.group is None else self.group.argsort(stable=True).cpu()
        group = torch.zeros_like(order) if self.group is None else self.group.cpu()[order]
        segments_of_calls: list[list[int]] = []
        num_queries, last_group = 0, None
        for segment, size, segment_group in zip(
            order.tolist(), self.num_queries.cpu()[order].tolist(), group.tolist(), strict=True
        ):
            if segment_group != last_group or num_queries + size > _MAX_QUERIES or size > _MAX_SHARED_QUERIES:
                segments_of_calls.append([])
                num_queries, last_group = 0, segment_group
            segments_of_calls[-1].append(segment)
            num_queries += _MAX_QUERIES if size > _MAX_SHARED_QUERIES else size
        device = self.num_queries.device
        calls = [self._make_call(torch.tensor(segments, device=device)) for segments in segments_of_calls]
        tokens = torch.arange(len(self.key_range[0]), device=device)
        index = torch.cat([tokens[call.queries] for call in calls]).argsort()
        return calls, None if torch.equal(index, tokens) else index

    def _make_call(self, segments: torch.Tensor) -> "_SharedCall":
        """Makes the call of some segments, given in ascending order."""
        num_queries, num_keys = self.num_queries[segments], (self.end_key - self.first_key)[segments]
        queries = _concatenate_ranges(self.num_queries.cumsum(0)[segments] - num_queries, num_queries)
        tokens = self.key_index[_concatenate_ranges(self.first_key[segments], num_keys)]
        keys, key = tokens.unique(return_inverse=True)
        first, end = int(keys[0]), int(keys[-1]) + 1
        if end - first <= _MAX_KEY_OVERHEAD * len(keys):
            keys, key = slice(first, end), tokens - first
        segment = torch.arange(len(segments), device=segments.device).repeat_interleave(num_keys)
        is_visible = torch.zeros(
            len(segments), end - first if isinstance(keys, slice) else len(keys), device=segments.device
        )
        is_visible = is_visible.bool().index_put_((segment, key), torch.tensor(True, device=segments.device))
        whole = slice(int(queries[0]), int(queries[-1]) + 1)
        is_whole = whole.stop - whole.start == len(queries)
        return _SharedCall(whole if is_whole else queries, keys, None if is_visible.all() else is_visible, num_queries)

    def mask(self, queries: slice, keys: slice) -> torch.Tensor:
        """Returns a `torch.BoolTensor` of shape `(1, 1, queries, keys)`, true where a query attends to a key."""
        first, end = (bound[queries, None] for bound in self.key_range)
        key = torch.arange(keys.start, keys.stop, device=first.device)
        return ((key >= first) & (key < end))[None, None]

    @cached_property
    def block_mask(self) -> object:
        """The plan as a `BlockMask` for flex attention, over the keys of the sequence or the gathered keys."""
        from torch.nn.attention.flex_attention import create_block_mask

        first, end = self.key_range

        def is_visible(
            batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            return (key >= first[query]) & (key < end[query])

        num_keys = len(first if self.key_index is None else self.key_index)
        return create_block_mask(is_visible, None, None, len(first), num_keys, device=first.device)

    @cached_property
    def flash_arguments(self) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """
        The plan for flash attention: the keys to gather, segment by segment, and the function's arguments.

        Keys of several segments are gathered once for each; the keys are `None` if those of the sequence can be used.
        """
        num_keys = self.end_key - self.first_key
        index = None
        if self.key_index is not None or not torch.equal(num_keys, self.num_queries):
            index = _concatenate_ranges(self.first_key, num_keys)
            index = index if self.key_index is None else self.key_index[index]
        bounds = [nn.functional.pad(count.cumsum(0), (1, 0)).to(torch.int32) for count in (self.num_queries, num_keys)]
        return index, {
            "cu_seq_lens_q": bounds[0],
            "cu_seq_lens_k": bounds[1],
            "max_length_q": int(self.num_queries.max()),
            "max_length_k": int(num_keys.max()),
            "is_causal": self.is_causal,
        }

    def to(self, device: torch.device) -> "PackedAttention":
        """Moves the plan to a device."""
        if self.num_queries.device == device:
            return self
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {key: part.to(device) for key, part in parts.items() if isinstance(part, torch.Tensor)}
        return replace(self, **moved)


@dataclass(eq=False)
class _SharedCall:
    """Several segments that are computed in one call."""

    queries: slice | torch.Tensor  # tokens of the sequence
    keys: slice | torch.Tensor  # tokens of the sequence, each once
    is_visible: torch.Tensor | None  # (segments, keys); `None` if all segments attend to all keys
    num_queries: torch.Tensor  # (segments,)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """`torch.BoolTensor` of shape `(1, 1, queries, keys)`, true where a query attends to a key."""
        if self.is_visible is None:
            return None
        return self.is_visible.repeat_interleave(self.num_queries, dim=0)[None, None]


def _concatenate_ranges(first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Concatenates ranges of `count` numbers that start at `first`."""
    index = torch.arange(int(count.sum()), device=count.device)
    return index + (first - (count.cumsum(0) - count)).repeat_interleave(count)


_active_plan: ContextVar[tuple[PackedAttention, str, Extend | None]] = ContextVar("active plan of packed attention")


@contextmanager
def packed_attention(module: nn.Module, plan: PackedAttention, extend: Extend | None = None) -> Iterator[None]:
    """
    Makes the attention inside a module follow a plan, for calls in this context.

    Args:
        module (`nn.Module`): a layer of a tower, or the tower; called on one sequence, `(1, tokens, hidden)`.
        plan ([`PackedAttention`]): the plan.
        extend (*optional*): prepends cached keys and values to those of the layer; the plan's keys include these.
    """
    configs = {id(config): config for part in module.modules() if (config := _config_of(part)) is not None}
    implementations = {key: config._attn_implementation for key, config in configs.items()}
    token = _active_plan.set((plan, next(iter(implementations.values()), None) or "eager", extend))
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = implementations[key]
        _active_plan.reset(token)


def run_checkpointed(
    layer: Any, run: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor
) -> torch.Tensor:
    """
    Calls a layer inside [`packed_attention`], with the layer's own gradient checkpointing if it is on.

    A checkpointed layer is computed again in the backward pass, where it needs the plan as well. Therefore the function with
    the plan is checkpointed here, and not the layer itself.

    Args:
        layer (`nn.Module`): the layer.
        run (`Callable`): calls the layer on hidden states inside [`packed_attention`].
        hidden_states (`torch.FloatTensor` of shape `(1, tokens, hidden)` or `(tokens, hidden)`): input of the layer.
    """
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return run(hidden_states)

    def run_again(hidden_states: torch.Tensor) -> torch.Tensor:
        layer.gradient_checkpointing = False
        try:
            return run(hidden_states)
        finally:
            layer.gradient_checkpointing = True

    return layer._gradient_checkpointing_func(run_again, hidden_states)


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def _packed_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention of `(1, heads, tokens, head_dim)` by the active plan; returns `(1, tokens, heads, head_dim)`."""
    plan, implementation, extend = _active_plan.get()
    if extend is not None:
        key, value = extend(key, value)
    return attend(module, query, key, value, plan.to(query.device), implementation, scaling, dropout), None


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: PackedAttention,
    implementation: str = "sdpa",
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    Computes the attention of one packed sequence.

    Args:
        module (`nn.Module`): the attention layer.
        query (`torch.FloatTensor` of shape `(1, heads, tokens, head_dim)`): queries of the sequence.
        key, value (`torch.FloatTensor` of shape `(1, heads, keys, head_dim)`): keys and values, in the order of the plan's keys.
        plan ([`PackedAttention`]): the plan, on the same device.
        implementation (`str`, *optional*, defaults to `"sdpa"`): name of the attention implementation in transformers.
        scaling (`float`, *optional*): factor of the attention scores; by default `head_dim**-0.5`.
        dropout (`float`, *optional*, defaults to 0.0): dropout probability of the attention weights.

    Returns:
        `torch.FloatTensor` of shape `(1, tokens, heads, head_dim)`
    """
    options: dict[str, Any] = {"scaling": query.shape[-1] ** -0.5 if scaling is None else scaling, "dropout": dropout}
    if implementation == "flex_attention":
        attend_piece = ALL_ATTENTION_FUNCTIONS[implementation]
        if plan.key_index is not None:
            key, value = key[:, :, plan.key_index], value[:, :, plan.key_index]
        return attend_piece(module, query, key, value, plan.block_mask, **options)[0]
    if "flash" in implementation:
        index, arguments = plan.flash_arguments
        if index is not None:
            key, value = key[:, :, index], value[:, :, index]
        # The function reads the name of the kernel from the configuration.
        module.config._attn_implementation = implementation
        try:
            attend_piece = ALL_ATTENTION_FUNCTIONS[implementation]
            return attend_piece(module, query, key, value, None, **options, **arguments)[0]
        finally:
            module.config._attn_implementation = _NAME
    attend_piece = _eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    outputs = []
    if plan.key_index is not None:
        calls, index = plan.shared_calls
        for call in calls:
            parts = query[:, :, call.queries], key[:, :, call.keys], value[:, :, call.keys]
            outputs.append(attend_piece(module, *parts, call.mask, is_causal=False, **options)[0])
        output = torch.cat(outputs, dim=1)
        return output if index is None else output[:, index]
    for queries, keys, has_mask in plan.chunks:
        parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        mask = plan.mask(queries, keys) if has_mask else None
        outputs.append(attend_piece(module, *parts, mask, is_causal=False, **options)[0])
    return torch.cat(outputs, dim=1) if outputs else query.transpose(1, 2)


def _eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register(_NAME, _packed_attention_forward)
