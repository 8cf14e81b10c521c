"""
Attention inside the clips of one packed sequence, for towers that know neither masks nor clips.

A tower's layers ask transformers' attention interface for the function named in their configuration. While a layer runs on
a packed sequence, that name is the one registered here; it cuts the sequence into pieces and hands each to the
implementation that the tower was loaded with: sdpa, eager, flex or flash. This module knows nothing of patches or towers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


_OF_COUNTS = ("block_causal", "causal", "bidirectional", "frame")  # follow from how many tokens frames have
ATTENTION_CHOICES = (*_OF_COUNTS, "canvas")

_NAME = "autogaze_packed"
_ROWS = 256  # fewer queries than this share a call, behind a mask
_ALONE = 128  # a segment with more queries than this shares no call where keys are laid out
_SPARE = 1.25  # a stretch with as many keys as this for each one needed is taken as it is, behind a mask

Extend = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Puts keys and values from elsewhere before a layer's own, both `(1, heads, tokens, head_dim)`."""


@dataclass(eq=False)
class PackedAttention:
    """
    Which keys each token of a packed sequence attends to: always one contiguous stretch, of the sequence or of a layout.

    Args:
        num_queries (`torch.LongTensor` of shape `(segments,)`):
            Tokens of each segment; the segments lie one behind the other and fill the sequence.
        first_key, end_key (`torch.LongTensor` of shape `(segments,)`):
            The stretch of keys of a segment's tokens, the end not included.
        is_causal (`bool`):
            Whether a token sees its segment's keys up to itself only; then a segment's keys are its own tokens.
        key_index (`torch.LongTensor` of shape `(laid keys,)`, *optional*):
            A layout of keys for segments that see scattered ones: which token each laid key is. `first_key` and `end_key`
            then count laid keys. A token may be laid more than once.
        group (`torch.LongTensor` of shape `(segments,)`, *optional*):
            With `key_index`: segments of one group see much the same keys, so that they may share a call. By default all
            are of one.

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
        Plans the attention over clips that lie one behind the other, each frame by frame.

        Args:
            tokens_each_frame (`torch.LongTensor` of shape `(batch, frames)`): tokens of every frame.
            attention (`str`):
                `"frame"`: a token sees its own frame; `"block_causal"`: its own frame and earlier ones; `"causal"`:
                itself and earlier tokens; `"bidirectional"`: the whole clip.

        Raises:
            ValueError: if `attention` is none of these. `"canvas"` takes more than counts: see [`plan_canvas`].
        """
        if attention not in _OF_COUNTS:
            raise ValueError(f"`attention` must be one of {', '.join(_OF_COUNTS)}, got {attention!r}")
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
        """Two `torch.LongTensor` of shape `(tokens,)`: first key and end of the keys of every token."""
        first = self.first_key.repeat_interleave(self.num_queries)
        if self.is_causal:
            return first, torch.arange(1, len(first) + 1, device=first.device)
        return first, self.end_key.repeat_interleave(self.num_queries)

    @cached_property
    def chunks(self) -> list[tuple[slice, slice, bool]]:
        """
        The calls that compute it: queries, keys, and whether a mask is needed.

        A large segment is a call of its own without a mask; small neighbours share one. So a mask never has more than
        a few hundred rows, and a clip's few patches do not cost one call for every frame.
        """
        chunks, pending = [], []

        def share() -> None:
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
                for row in range(start, stop, _ROWS):
                    chunks.append((slice(row, min(row + _ROWS, stop)), slice(first, min(row + _ROWS, stop)), True))
            else:
                if pending and stop - pending[0][0] > _ROWS:
                    share()
                pending.append((start, stop, first, end))
            start = stop
        share()
        return chunks

    @cached_property
    def shared_calls(self) -> tuple[list["_SharedCall"], torch.Tensor | None]:
        """
        The calls that compute it where keys are laid out: neighbours of a group share one, and each of its keys.

        So neither are the keys of a long clip laid out at once, nor is a key copied for each segment that sees it.

        Returns:
            `tuple`: the calls, and for each token of the sequence the row of its result in those of all calls, one behind
            the other; `None` where they are in order.
        """
        order = torch.arange(len(self.num_queries)) if self.group is None else self.group.argsort(stable=True).cpu()
        group = torch.zeros_like(order) if self.group is None else self.group.cpu()[order]
        members: list[list[int]] = []
        rows, last = 0, None
        for segment, size, number in zip(
            order.tolist(), self.num_queries.cpu()[order].tolist(), group.tolist(), strict=True
        ):
            if number != last or rows + size > _ROWS or size > _ALONE:
                members.append([])
                rows, last = 0, number
            members[-1].append(segment)
            rows += _ROWS if size > _ALONE else size
        device = self.num_queries.device
        calls = [self._share(torch.tensor(segments, device=device)) for segments in members]
        tokens = torch.arange(len(self.key_range[0]), device=device)
        rows = torch.cat([tokens[call.queries] for call in calls]).argsort()
        return calls, None if torch.equal(rows, tokens) else rows

    def _share(self, segments: torch.Tensor) -> "_SharedCall":
        """Makes the call of some segments, in ascending order."""
        num_queries, num_keys = self.num_queries[segments], (self.end_key - self.first_key)[segments]
        queries = _stretches(self.num_queries.cumsum(0)[segments] - num_queries, num_queries)
        laid = self.key_index[_stretches(self.first_key[segments], num_keys)]
        keys, place = laid.unique(return_inverse=True)
        first, end = int(keys[0]), int(keys[-1]) + 1
        if end - first <= _SPARE * len(keys):
            keys, place = slice(first, end), laid - first
        row = torch.arange(len(segments), device=segments.device).repeat_interleave(num_keys)
        sees = torch.zeros(
            len(segments), end - first if isinstance(keys, slice) else len(keys), device=segments.device
        )
        sees = sees.bool().index_put_((row, place), torch.tensor(True, device=segments.device))
        if int(queries[-1]) - int(queries[0]) + 1 == len(queries):
            queries = slice(int(queries[0]), int(queries[-1]) + 1)
        return _SharedCall(queries, keys, None if sees.all() else sees, num_queries)

    def mask(self, queries: slice, keys: slice) -> torch.Tensor:
        """Gives a `torch.BoolTensor` of shape `(1, 1, queries, keys)`, true where a query sees a key, laid if they are."""
        first, end = (bound[queries, None] for bound in self.key_range)
        key = torch.arange(keys.start, keys.stop, device=first.device)
        return ((key >= first) & (key < end))[None, None]

    @cached_property
    def block_mask(self) -> object:
        """The same as flex attention wants it, a `BlockMask` over the sequence or the laid keys."""
        from torch.nn.attention.flex_attention import create_block_mask

        first, end = self.key_range

        def sees(batch, head, query, key):
            return (key >= first[query]) & (key < end[query])

        num_keys = len(first if self.key_index is None else self.key_index)
        return create_block_mask(sees, None, None, len(first), num_keys, device=first.device)

    @cached_property
    def flash_arguments(self) -> tuple[torch.Tensor | None, dict[str, object]]:
        """
        The same for flash attention: which keys to lay out, one segment's behind the other's, and its arguments.

        Keys that several frames see are laid out once for each; `None` where the sequence can stay as it is.
        """
        num_keys = self.end_key - self.first_key
        index = None
        if self.key_index is not None or not torch.equal(num_keys, self.num_queries):
            index = _stretches(self.first_key, num_keys)
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
        return replace(self, **{key: part.to(device) for key, part in parts.items() if isinstance(part, torch.Tensor)})


@dataclass(eq=False)
class _SharedCall:
    """Segments that are computed in one call."""

    queries: slice | torch.Tensor  # tokens of the sequence
    keys: slice | torch.Tensor  # as well, each once
    sees: torch.Tensor | None  # (segments, keys); `None` where all see all
    num_queries: torch.Tensor  # (segments,)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """`torch.BoolTensor` of shape `(1, 1, queries, keys)`, true where a query sees a key."""
        return None if self.sees is None else self.sees.repeat_interleave(self.num_queries, dim=0)[None, None]


def _stretches(first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Numbers the places of stretches, one behind the other."""
    place = torch.arange(int(count.sum()), device=count.device)
    return place + (first - (count.cumsum(0) - count)).repeat_interleave(count)


_running: ContextVar[tuple[PackedAttention, str, Extend | None]] = ContextVar(
    "packed attention of the layer that runs"
)


@contextmanager
def packed_attention(module: nn.Module, plan: PackedAttention, extend: Extend | None = None) -> Iterator[None]:
    """
    Lets the attention inside a module follow a plan, for as long as the context lasts.

    Args:
        module (`nn.Module`): a layer of a tower, or the whole; run on one sequence, `(1, tokens, hidden)`.
        plan (`PackedAttention`): which tokens see which, on the device that the layer computes on.
        extend (*optional*): puts keys and values from elsewhere before the layer's own; the plan counts them as well.
    """
    configs = {id(part.config): part.config for part in module.modules() if _has_config(part)}
    implementations = {key: config._attn_implementation for key, config in configs.items()}
    token = _running.set((plan, next(iter(implementations.values()), None) or "eager", extend))
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = implementations[key]
        _running.reset(token)


def run_checkpointed(
    layer: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor
) -> torch.Tensor:
    """
    Runs a layer by a function that has a plan around it, with the layer's own gradient checkpointing if it is on.

    A checkpointed layer is computed again in the backward pass, and the plan must hold then as well: so the layer is
    checkpointed here, around the plan, and not inside itself.

    Args:
        layer (`nn.Module`): the layer.
        run (`Callable`): calls it on hidden states, inside [`packed_attention`].
        hidden_states (`torch.FloatTensor`): what it gets.
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


def _has_config(module: nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


def _packed_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Computes attention of `(1, heads, tokens, head_dim)` by the running plan; gives `(1, tokens, heads, head_dim)`."""
    plan, implementation, extend = _running.get()
    if extend is not None:
        key, value = extend(key, value)
    return attend(module, query, key, value, plan.to(query.device), implementation, scaling, dropout), None


def attend(
    module: nn.Module,
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
        module (`nn.Module`): the layer that attends.
        query (`torch.FloatTensor` of shape `(1, heads, tokens, head_dim)`): queries of the sequence.
        key, value (`torch.FloatTensor` of shape `(1, heads, keys, head_dim)`): keys and values, in the order of the plan's keys.
        plan (`PackedAttention`): which tokens see which, on the same device.
        implementation (`str`, *optional*, defaults to `"sdpa"`): attention implementation, as transformers names it.
        scaling (`float`, *optional*): factor of the attention scores; `head_dim**-0.5` by default.
        dropout (`float`, *optional*, defaults to 0.0): dropout probability of the attention weights.

    Returns:
        `torch.FloatTensor` of shape `(1, tokens, heads, head_dim)`
    """
    options = {"scaling": query.shape[-1] ** -0.5 if scaling is None else scaling, "dropout": dropout}
    if implementation == "flex_attention":
        attend_piece = ALL_ATTENTION_FUNCTIONS[implementation]
        if plan.key_index is not None:
            key, value = key[:, :, plan.key_index], value[:, :, plan.key_index]
        return attend_piece(module, query, key, value, plan.block_mask, **options)[0]
    if "flash" in implementation:
        index, arguments = plan.flash_arguments
        if index is not None:
            key, value = key[:, :, index], value[:, :, index]
        # Which kernel it is, transformers reads off the configuration.
        module.config._attn_implementation = implementation
        try:
            attend_piece = ALL_ATTENTION_FUNCTIONS[implementation]
            return attend_piece(module, query, key, value, None, **options, **arguments)[0]
        finally:
            module.config._attn_implementation = _NAME
    attend_piece = _eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    outputs = []
    if plan.key_index is not None:
        calls, rows = plan.shared_calls
        for call in calls:
            parts = query[:, :, call.queries], key[:, :, call.keys], value[:, :, call.keys]
            outputs.append(attend_piece(module, *parts, call.mask, is_causal=False, **options)[0])
        output = torch.cat(outputs, dim=1)
        return output if rows is None else output[:, rows]
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
