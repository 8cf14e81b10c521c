"""
Decoding steps of fixed shapes, which CUDA replays as graphs.

A decoding step consists of about a hundred operations of a few microseconds, so their launches take most of the time. These
steps compute the same as those of `decode_steps_autogaze`, on memory at fixed addresses: lengths, positions and active
clips are tensors on the device, and all clips attend in one batch, each to its own tokens.
"""

import functools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .cuda_graphs_autogaze import ReplayedCall
from .decode_steps_autogaze import choose_ids
from .fused_decoder_autogaze import FusedDecoder


# Steps attend to a multiple of this number of cached tokens; every multiple has its own graph.
_CAPACITY_STEP = 2048
_MAX_BATCH_SIZES = 4  # batch sizes for which a model keeps memory and graphs


class GraphedSteps:
    """
    The same as [`DecodeSteps`] with fixed shapes, without sampling.

    Its memory for keys and values and its graphs are reused by later calls of `generate`. `attach` copies a cache in, and
    `finish` copies it out if it is used further. Clips whose frame has ended are still computed, but without effect.

    Args:
        decoder ([`FusedDecoder`]): the decoder.
        batch_size (`int`): number of clips.
        positions (`str`): the config's `decoding_positions`.
    """

    def __init__(self, decoder: FusedDecoder, batch_size: int, positions: str):
        self.decoder, self.positions = decoder, positions
        config, weight = decoder.model.config, decoder.like
        device, step_size = weight.device, decoder.decoder.step_size
        self.num_vision = 0
        self.chosen = torch.zeros(batch_size, step_size, dtype=torch.long, device=device)
        self.losses = weight.new_zeros(batch_size, step_size)
        self.taken = weight.new_zeros(batch_size, config.vocab_size)
        # Of every clip: its cached tokens, the position of its next token, its unread patches, and 1 while it is active.
        self.state = torch.zeros(4, batch_size, dtype=torch.long, device=device)
        self.lengths, self.next_positions, self.num_unread, self.is_active = self.state
        self.clips = torch.arange(batch_size, device=device)[:, None]
        size = (config.num_key_value_heads, batch_size, 0, config.head_dim)
        self.keys = [weight.new_zeros(size) for _ in decoder.layers]
        self.values = [weight.new_zeros(size) for _ in decoder.layers]
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.calls: dict[tuple[str, int], ReplayedCall] = {}

    def attach(self, cache: Any, num_tokens: int, is_kept: bool) -> "GraphedSteps":
        """
        Copies a cache in.

        Args:
            cache (`GazeCache`): cached keys and values of the clips.
            num_tokens (`int`): number of further tokens per clip to reserve memory for.
            is_kept (`bool`): whether `finish` copies keys and values back.
        """
        self.cache, self.is_kept = cache, is_kept
        held = max(cache.lengths)
        self._reserve(held + num_tokens, 0)
        if held:
            for own, given in zip((*self.keys, *self.values), (*cache.keys, *cache.values), strict=True):
                own[:, :, :held] = given[:, :, :held]
        return self

    def begin_frame(self, vision: torch.Tensor) -> None:
        """See [`DecodeSteps.begin_frame`]; also chooses the first patches."""
        cache, batch_size = self.cache, len(vision)
        if vision.shape[1] != self.num_vision:
            self.num_vision, self.calls = vision.shape[1], {}
            self.vision = torch.empty_like(vision, memory_format=torch.contiguous_format)
        self.vision.copy_(vision)
        self.chosen.copy_(cache.unread_ids)
        numbers = [cache.lengths, cache.next_positions, cache.num_unread, [1] * batch_size]
        self.state.copy_(torch.tensor(numbers))
        self.active = list(range(batch_size))
        cache.begin_frame()
        self._call("prompt", self.chosen.shape[1] + self.num_vision)
        cache.add_tokens(self.active, [count + self.num_vision for count in cache.num_unread])

    def propose(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`DecodeSteps.propose`]; the next step overwrites the tensors."""
        clips = slice(None) if len(self.active) == len(self.chosen) else self.active
        return self.chosen[clips, :count], self.losses[clips, :count]

    def read_chosen(self, indices: Sequence[int]) -> None:
        """See [`DecodeSteps.read_chosen`]; also chooses the next patches."""
        if len(indices) < len(self.active):
            self.active = [self.active[index] for index in indices]
            is_active = torch.zeros(len(self.chosen), dtype=torch.long)
            is_active[self.active] = 1
            self.is_active.copy_(is_active)
        size = self.chosen.shape[1]
        self._call("step", size)
        self.cache.add_tokens(self.active, [size] * len(self.chosen))

    def finish(self) -> None:
        """Copies keys and values back into the cache if it is used further."""
        if self.is_kept:
            held = max(self.cache.lengths)
            self.cache.keys = torch.stack([states[:, :, :held] for states in self.keys])
            self.cache.values = torch.stack([states[:, :, :held] for states in self.values])
        self.cache = None

    def _call(self, name: str, size: int) -> None:
        """Runs a step that reads `size` tokens, on the part of the cache that it needs."""
        held = max(self.cache.lengths)
        self._reserve(held + size, held)
        capacity = _round_up(held + size)
        if (name, capacity) not in self.calls:
            function = functools.partial(self._prompt if name == "prompt" else self._step, capacity)
            self.calls[name, capacity] = ReplayedCall(function, self.chosen.device, self.pool)
        self.calls[name, capacity]()

    def _reserve(self, num_tokens: int, held: int) -> None:
        """Reserves memory for tokens of every clip and copies the `held` first ones; drops graphs on the old memory."""
        capacity = self.keys[0].shape[2]
        if num_tokens <= capacity:
            return
        self.calls = {}
        for stored in (self.keys, self.values):
            for layer, states in enumerate(stored):
                # Zeros, as masked places are multiplied by an attention weight of 0, which NaN would survive.
                grown = states.new_zeros(
                    *states.shape[:2], _round_up(max(num_tokens, capacity * 3 // 2)), states.shape[3]
                )
                grown[:, :, :held] = states[:, :, :held]
                stored[layer] = grown

    def _prompt(self, capacity: int) -> None:
        """Reads unread patches and vision tokens, and chooses the first patches of the frame."""
        step_size, num_vision, unread = self.chosen.shape[1], self.num_vision, self.num_unread[:, None]
        tokens = torch.cat([self.decoder.model.embed_tokens(self.chosen), self.vision], dim=1)
        # Each clip's unread patches, its vision tokens, and then padding with the last one, which is overwritten later.
        order = torch.arange(step_size + num_vision, device=tokens.device)
        order = torch.where(order < unread, order, (order - unread + step_size).clamp(max=len(order) - 1))
        tokens = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        hidden = self._read(tokens, self.num_unread + (num_vision - 1), capacity)
        num_read = self.num_unread + num_vision
        self.lengths.add_(num_read)
        self.next_positions.add_(num_read - step_size if self.positions == "frame_tail" else num_read)
        self.taken.zero_()
        self.taken[:, -1] = -torch.inf
        self._choose(hidden)

    def _step(self, capacity: int) -> None:
        """Reads the patches chosen last, and chooses the next ones."""
        step_size = self.chosen.shape[1]
        last = torch.full_like(self.lengths, step_size - 1)
        hidden = self._read(self.decoder.model.embed_tokens(self.chosen), last, capacity)
        # An inactive clip keeps its length, so what it writes is overwritten later.
        self.lengths.add_(self.is_active, alpha=step_size)
        if self.positions == "sequential":
            self.next_positions.add_(step_size)
        self._choose(hidden)

    def _choose(self, hidden: torch.Tensor) -> None:
        logits, losses = self.decoder.heads(hidden)
        self.losses.copy_(losses)
        self.chosen.copy_(choose_ids(logits, self.taken))

    def _read(self, tokens: torch.Tensor, last: torch.Tensor, capacity: int) -> torch.Tensor:
        """Reads tokens `(batch, new, hidden)`; returns the hidden states of those at `last`, `(batch, hidden)`."""
        decoder, last = self.decoder, last[:, None, None]
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        places = self.lengths[:, None] + steps
        is_seen = torch.arange(capacity, device=tokens.device) <= places[..., None]
        mask = torch.zeros_like(is_seen, dtype=tokens.dtype).masked_fill_(~is_seen, -torch.inf)
        mask_of_last = mask.gather(1, last.expand(-1, -1, capacity))

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = self.keys[index][:, :, :capacity], self.values[index][:, :, :capacity]
            keys[:, self.clips, places] = key
            values[:, self.clips, places] = value
            if index < decoder.last:
                return decoder.attend(index, query, keys, values, mask[:, None])
            query = query.gather(2, last.expand(len(query), -1, -1, query.shape[3]))
            return decoder.attend(index, query, keys, values, mask_of_last[:, None])

        rotations = decoder.rotations(self.next_positions[:, None] + steps)
        return decoder.read(
            tokens, rotations, attend, lambda hidden: hidden.gather(1, last.expand(-1, -1, hidden.shape[2]))[:, 0]
        )


class _Workspace:
    """The graphed steps that a model keeps, by batch size, and the weights that they belong to."""

    def __init__(self):
        self.lock = threading.Lock()
        self.fingerprint: list[Any] = []
        self.steps: dict[int, GraphedSteps] = {}


_WORKSPACES: "weakref.WeakKeyDictionary[nn.Module, _Workspace]" = weakref.WeakKeyDictionary()


@contextmanager
def graphed_steps(model: Any, batch_size: int) -> Iterator[GraphedSteps | None]:
    """
    Yields the graphed steps of a model; `None` while another thread uses them, or if the weights cannot be fused.

    They are created again after weights have changed, so they do not pay off in training.

    Args:
        model (`AutoGazeModel`): the model.
        batch_size (`int`): number of clips.
    """
    workspace = _WORKSPACES.setdefault(model, _Workspace())
    if not workspace.lock.acquire(blocking=False):
        yield None
        return
    try:
        weights = [
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for weight in model.gaze_decoder.parameters()
        ]
        fingerprint = [model.config._attn_implementation, model.config.decoding_positions, *weights]
        if fingerprint != workspace.fingerprint:
            workspace.fingerprint, workspace.steps = fingerprint, {}
        steps = workspace.steps.pop(batch_size, None)
        if steps is None:
            decoder = FusedDecoder(model.gaze_decoder, model.config._attn_implementation)
            if decoder.is_fused:
                steps = GraphedSteps(decoder, batch_size, model.config.decoding_positions)
        if steps is not None:
            workspace.steps[batch_size] = steps  # the latest comes last
        for oldest in list(workspace.steps)[:-_MAX_BATCH_SIZES]:
            del workspace.steps[oldest]
        yield steps
    finally:
        workspace.lock.release()


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // _CAPACITY_STEP) * _CAPACITY_STEP
