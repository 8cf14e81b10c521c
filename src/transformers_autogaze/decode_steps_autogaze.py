"""
Decoding steps on a key-value cache: reading tokens, attention, and choosing patch ids.

The loop over frames is in `generation_autogaze`, which also shows when these steps run.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from .fused_decoder_autogaze import Attend, FusedDecoder


_MAX_CACHED_SCORES = 2**20  # attention scores that fit into the caches of a CPU


class DecodeSteps:
    """
    Decoding steps that write keys and values into the cache in place.

    Clips of equal length attend in one batch. Otherwise every clip attends by itself, so that nothing is padded. Clips
    whose frame has ended are not computed.

    Args:
        decoder ([`FusedDecoder`]): the decoder.
        cache (`GazeCache`): cached keys and values of the clips.
        num_tokens (`int`): number of further tokens per clip to reserve memory for.
        positions (`str`): the config's `decoding_positions`.
        temperature (`float`, *optional*): temperature of sampling; without it, decoding is greedy.
        generator (`torch.Generator`, *optional*): source of random numbers.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        cache,
        num_tokens: int,
        positions: str,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ):
        self.decoder, self.cache, self.positions = decoder, cache, positions
        self.choose = functools.partial(choose_ids, temperature=temperature, generator=generator)
        self.causal_masks: dict[int, torch.Tensor] = {}
        like = decoder.like
        self.cos = self.sin = like.new_empty(0, 0)
        self.first_position, self.num_tokens = 0, num_tokens
        # With few queries on a CPU, this is faster than torch's fused attention.
        self.uses_matmul_attention = like.device.type == "cpu" and like.dtype.itemsize >= 4 and not decoder.is_eager
        self.scores = like.new_empty(0)
        cache.reserve(num_tokens, self.uses_matmul_attention)

    def begin_frame(self, vision: torch.Tensor) -> None:
        """Reads the unread patches of the previous frame, then a frame's vision tokens `(batch, tokens, hidden)`."""
        cache, num_vision = self.cache, vision.shape[1]
        unread, max_unread = cache.num_unread, max(cache.num_unread)
        tokens = torch.cat([self.decoder.model.embed_tokens(cache.unread_ids[:, :max_unread]), vision], dim=1)
        if min(unread) < max_unread:
            # Clips with fewer unread patches end earlier; tokens after their last vision token are dropped.
            for clip, count in enumerate(unread):
                tokens[clip, count : count + num_vision] = vision[clip]
        cache.begin_frame()
        self.active = list(range(len(vision)))
        self.hidden = self._read(tokens, cache.next_positions, [count + num_vision for count in unread])
        self.prompt_ends = list(cache.next_positions)
        # Added to the logits: -inf for ids that were chosen already, and for the end id, which is never chosen.
        self.taken = vision.new_zeros(len(vision), self.decoder.model.config.vocab_size)
        self.taken[:, -1] = -torch.inf

    def propose(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Chooses the next `count` patches of every active clip.

        Returns:
            `tuple`: patch ids and the losses predicted before each of them, both of shape `(active clips, count)`.
        """
        logits, losses = self.decoder.heads(self.hidden)
        self.chosen = self.choose(logits[:, :count], self.taken)
        return self.chosen, losses[:, :count]

    def read_chosen(self, indices: Sequence[int]) -> None:
        """Reads the patches chosen last. Only the active clips at `indices` stay active."""
        if len(indices) < len(self.active):
            self.active = [self.active[index] for index in indices]
            self.chosen, self.taken = self.chosen[indices], self.taken[indices]
        size, starts = self.chosen.shape[1], self.cache.next_positions
        if self.positions == "frame_tail":
            starts = [end - size for end in self.prompt_ends]
        tokens = self.decoder.model.embed_tokens(self.chosen)
        self.hidden = self._read(tokens, starts, [size] * self.cache.batch_size)

    def finish(self) -> None:
        """Does nothing: keys and values are in the cache already."""

    def _read(self, tokens: torch.Tensor, starts: list[int], num_new: list[int]) -> torch.Tensor:
        """
        Reads tokens `(active clips, new, hidden)` and caches their keys and values.

        `starts` and `num_new` hold, for every clip of the batch, the position of its first new token and the number of
        its real tokens. Returns the hidden state of each clip's last real token, `(active clips, hidden)`.
        """
        cache, clips, size = self.cache, self.active, tokens.shape[1]
        cache.reserve(size, self.uses_matmul_attention)
        clip_states = [(cache.lengths[clip], num_new[clip], starts[clip]) for clip in clips]
        if len(clips) == len(cache.lengths) and len(set(clip_states)) == 1:
            # Clips of equal length and position are one group; otherwise every clip is a group.
            groups = [(slice(None), slice(None), *clip_states[0])]
        else:
            groups = [
                (slice(index, index + 1), slice(clip, clip + 1), *state)
                for index, (clip, state) in enumerate(zip(clips, clip_states, strict=True))
            ]
        attend_in_groups = [
            self._attention(cache.keys[:, :, stored], cache.values[:, :, stored], old, count)
            for _, stored, old, count, _ in groups
        ]

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if len(groups) == 1:
                return attend_in_groups[0](index, query, key, value)
            attended = []
            for (part_of_batch, _, _, count, _), attend_in_group in zip(groups, attend_in_groups, strict=True):
                part = attend_in_group(index, *(heads[:, part_of_batch, :count] for heads in (query, key, value)))
                if index < self.decoder.last and count < size:
                    part = F.pad(part, (0, 0, 0, size - count))
                attended.append(part)
            return torch.cat(attended)

        def take_last(hidden: torch.Tensor) -> torch.Tensor:
            if len(groups) == 1:
                return hidden[:, groups[0][3] - 1]
            return torch.cat([hidden[part_of_batch, count - 1] for part_of_batch, _, _, count, _ in groups])

        rotations = self._rotations([start for *_, start in groups], size)
        hidden = self.decoder.read(tokens, rotations, attend, take_last)
        cache.add_tokens(clips, num_new)
        return hidden

    def _attention(self, keys: torch.Tensor, values: torch.Tensor, num_old: int, num_new: int) -> Attend:
        """
        Returns the attention function of clips of equal length; it also stores their new keys and values.

        `keys` and `values` are the cached ones of all layers, `(layers, key/value heads, clips, capacity, head size)`.
        """
        last, seen, mask = self.decoder.last, num_old + num_new, self._causal_mask(num_new)
        # Creating views costs microseconds as well, so those of all layers are created at once.
        new_keys, new_values = (states[:, :, :, num_old:seen].unbind() for states in (keys, values))
        keys, values = keys[:, :, :, :seen], values[:, :, :, :seen]
        if self.uses_matmul_attention:
            attend_to = self._matmul_attention(keys, values, num_new, mask)
            attend_to_last = self._matmul_attention(keys, values, 1, None)
        else:
            mask = F.pad(mask, (num_old, 0))[None, None]

            def attend_to(index: int, query: torch.Tensor) -> torch.Tensor:
                return self.decoder.attend(index, query, keys[index], values[index], mask)

            def attend_to_last(index: int, query: torch.Tensor) -> torch.Tensor:
                return self.decoder.attend(index, query, keys[index], values[index], None)

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            new_keys[index].copy_(key)
            new_values[index].copy_(value)
            return attend_to_last(index, query[:, :, -1:]) if index == last else attend_to(index, query)

        return attend

    def _matmul_attention(
        self, keys: torch.Tensor, values: torch.Tensor, num_queries: int, mask: torch.Tensor | None
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """
        Returns a function that attends from queries of a layer, by matrix products on scores in reused memory.

        `keys` and `values` have the shape `(layers, key/value heads, clips, seen, head size)`. `mask` has the shape
        `(queries, queries)` and applies to the newest keys.
        """
        _, key_heads, clips, seen, size = keys.shape
        num_shared = self.decoder.num_heads // key_heads
        layer_keys, layer_values = keys.flatten(1, 2).mT.unbind(), values.flatten(1, 2).unbind()
        num_heads, head_queries, scaling = key_heads * clips, num_shared * num_queries, self.decoder.scaling
        # As many heads at once as have scores that fit into the CPU's caches, and at least one per core.
        num_threads, head_scores = torch.get_num_threads(), head_queries * seen
        at_once = min(num_heads, max(num_threads, _MAX_CACHED_SCORES // head_scores))
        if len(self.scores) < at_once * head_scores:
            # Enough for the whole clip, as the first use of new memory is slow.
            capacity = num_threads * head_queries * self.cache.keys.shape[3]
            self.scores = layer_keys[0].new_empty(max(_MAX_CACHED_SCORES, capacity, at_once * head_scores))
        all_scores = self.scores[: at_once * head_scores].view(at_once, head_queries, seen)
        all_masked = all_scores.view(-1, num_queries, seen)[:, :, seen - num_queries :]

        def attend_to_part(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            scores, masked = all_scores, all_masked
            if len(query) < at_once:
                scores, masked = all_scores[: len(query)], all_masked[: len(query) * num_shared]
            torch.baddbmm(scores, query, keys, beta=0, alpha=scaling, out=scores)
            if mask is not None:
                masked.add_(mask)
            torch.softmax(scores, dim=-1, out=scores)
            return torch.bmm(scores, values)

        def attend(index: int, query: torch.Tensor) -> torch.Tensor:
            if num_shared > 1:  # query heads that share keys are computed in one product
                query = query.unflatten(0, (key_heads, num_shared)).transpose(1, 2).flatten(2, 3)
            query = query.flatten(0, 1)
            if at_once == num_heads:
                attended = attend_to_part(query, layer_keys[index], layer_values[index])
            else:
                inputs = (query, layer_keys[index], layer_values[index])
                parts = zip(*(states.split(at_once) for states in inputs), strict=True)
                attended = torch.cat([attend_to_part(*part) for part in parts])
            attended = attended.view(key_heads, clips, num_shared, num_queries, size)
            return attended.permute(1, 3, 0, 2, 4).reshape(clips * num_queries, -1)

        return attend

    def _causal_mask(self, num_new: int) -> torch.Tensor:
        """Returns the causal mask of the new tokens, `(new, new)`, 0 or -inf."""
        if num_new not in self.causal_masks:
            mask = self.decoder.like.new_full((num_new, num_new), -torch.inf)
            self.causal_masks[num_new] = mask.triu(1)
        return self.causal_masks[num_new]

    def _rotations(self, firsts: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines `(groups, size, head size)` of the positions from each of `firsts` on."""
        offsets = [first - self.first_position for first in firsts]
        if min(offsets) < 0 or max(offsets) + size > len(self.cos):
            # The tables cover the positions of this call of `generate`, not those of earlier ones.
            self.first_position = min(firsts)
            offsets = [first - self.first_position for first in firsts]
            positions = torch.arange(max(offsets) + size + self.num_tokens, device=self.decoder.like.device)
            tables = self.decoder.rotations(positions[None] + self.first_position)
            self.cos, self.sin = (table[0] for table in tables)
        if len(offsets) == 1:
            part = slice(offsets[0], offsets[0] + size)
            return self.cos[None, part], self.sin[None, part]
        cos, sin = (
            torch.stack([table[offset : offset + size] for offset in offsets]) for table in (self.cos, self.sin)
        )
        return cos, sin


def choose_ids(
    logits: torch.Tensor,
    taken: torch.Tensor,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Chooses one id for each of the `k` proposals of a step, none twice.

    Args:
        logits (`torch.FloatTensor` of shape `(clips, k, vocabulary)`): logits of the proposals.
        taken (`torch.FloatTensor` of shape `(clips, vocabulary)`):
            Added to the logits: -inf for ids that must not be chosen. The chosen ids are set to -inf in place.
        temperature (`float`, *optional*): temperature of sampling; without it, the likeliest ids are chosen.
        generator (`torch.Generator`, *optional*): source of random numbers.

    Returns:
        `torch.LongTensor` of shape `(clips, k)`.
    """
    if temperature is None and logits.device.type == "cpu":
        # NumPy has less overhead per call than torch, which dominates on so few numbers.
        free = logits.float().numpy() + taken.float().numpy()[:, None]
        chosen = free.argmax(-1)
        for scores_of_clip, ids in zip(free, chosen, strict=True):
            if len(set(ids.tolist())) < len(ids):  # earlier proposals keep an id that several prefer
                for proposal, scores in enumerate(scores_of_clip):
                    scores[ids[:proposal]] = -np.inf
                    ids[proposal] = scores.argmax()
        chosen = torch.from_numpy(chosen)
        taken.scatter_(1, chosen, -torch.inf)
        return chosen
    chosen = []
    for scores in logits.unbind(1):
        scores = scores + taken
        if temperature is None:
            choice = scores.argmax(dim=-1, keepdim=True)
        else:
            choice = torch.multinomial((scores.float() / temperature).softmax(-1), 1, generator=generator)
        taken.scatter_(1, choice, -torch.inf)
        chosen.append(choice)
    return torch.cat(chosen, dim=1)
