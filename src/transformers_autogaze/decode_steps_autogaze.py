"""
How the gaze decoder reads and proposes, step by step.

This module owns what one step does to a [`GazeCache`] and its keys and values; when a frame ends the loop in `generation_autogaze` says.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from .fused_decoder_autogaze import Attend, FusedDecoder


_NEAR_SCORES = 2**20  # numbers of which the caches of a CPU's cores hold some MB


class DecodeSteps:
    """
    Reads new tokens after all that is cached, with keys and values written in place and never copied.

    Clips of a batch are attended to together as long as they are equally long, and one by one, at their own lengths, once
    they are not; those whose frame has ended are left out.

    Args:
        decoder ([`FusedDecoder`]): the decoder.
        cache (`GazeCache`): what it has read of the clips.
        num_tokens (`int`): how many more of each clip to make room for at once.
        positions (`str`): the config's `decoding_positions`.
        temperature (`float`, *optional*): at which patches are sampled; the likeliest are taken if not given.
        generator (`torch.Generator`, *optional*): where random numbers come from.
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
        # On a CPU this is quicker than torch's attention, which is made for many queries.
        self.attends_by_hand = like.device.type == "cpu" and like.dtype.itemsize >= 4 and not decoder.is_eager
        self.scores = like.new_empty(0)
        cache.reserve(num_tokens, self.attends_by_hand)

    def begin_frame(self, vision: torch.Tensor) -> None:
        """Reads the unread patches of the frame before, and a frame's vision tokens `(batch, tokens, hidden)`."""
        cache, num_vision = self.cache, vision.shape[1]
        unread, most = cache.num_unread, max(cache.num_unread)
        tokens = torch.cat([self.decoder.model.embed_tokens(cache.unread_ids[:, :most]), vision], dim=1)
        if min(unread) < most:
            # Clips with fewer unread patches end earlier; what follows their last vision token is not kept.
            for clip, count in enumerate(unread):
                tokens[clip, count : count + num_vision] = vision[clip]
        cache.begin_frame()
        self.active = list(range(len(vision)))
        self.hidden = self._read(tokens, cache.next_positions, [count + num_vision for count in unread])
        self.prompt_ends = list(cache.next_positions)
        # What is added to the logits of each clip: -inf for ids that are taken. The end id is never chosen.
        self.taken = vision.new_zeros(len(vision), self.decoder.model.config.vocab_size)
        self.taken[:, -1] = -torch.inf

    def propose(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Chooses the next patches of every clip that is still active.

        Gives their ids, and the losses predicted before each, both `(active clips, count)`.
        """
        logits, losses = self.decoder.heads(self.hidden)
        self.chosen = self.choose(logits[:, :count], self.taken)
        return self.chosen, losses[:, :count]

    def go_on(self, rows: Sequence[int]) -> None:
        """Reads what was chosen last, for some of the clips that were active; they alone stay active."""
        if len(rows) < len(self.active):
            self.active = [self.active[row] for row in rows]
            self.chosen, self.taken = self.chosen[rows], self.taken[rows]
        size, starts = self.chosen.shape[1], self.cache.next_positions
        if self.positions == "frame_tail":
            starts = [end - size for end in self.prompt_ends]
        tokens = self.decoder.model.embed_tokens(self.chosen)
        self.hidden = self._read(tokens, starts, [size] * self.cache.batch_size)

    def finish(self) -> None:
        """Leaves everything in the cache for the frames that follow."""

    def _read(self, tokens: torch.Tensor, starts: list[int], num_new: list[int]) -> torch.Tensor:
        """
        Reads tokens `(active clips, new, hidden)` and caches them.

        `starts` and `num_new` hold, for every clip of the batch, the position of its first new token and how many of
        them are real. Gives the hidden state of each clip's last real token, `(active clips, hidden)`.
        """
        cache, clips, size = self.cache, self.active, tokens.shape[1]
        cache.reserve(size, self.attends_by_hand)
        clip_states = [(cache.lengths[clip], num_new[clip], starts[clip]) for clip in clips]
        if len(clips) == len(cache.lengths) and len(set(clip_states)) == 1:
            # Equal clips are one group; otherwise each is a group of its own.
            groups = [(slice(None), slice(None), *clip_states[0])]
        else:
            groups = [
                (slice(row, row + 1), slice(clip, clip + 1), *state)
                for row, (clip, state) in enumerate(zip(clips, clip_states, strict=True))
            ]
        attend_in_groups = [
            self._attention(cache.keys[:, :, stored], cache.values[:, :, stored], old, count)
            for _, stored, old, count, _ in groups
        ]

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if len(groups) == 1:
                return attend_in_groups[0](index, query, key, value)
            attended = []
            for (rows, _, _, count, _), attend_in_group in zip(groups, attend_in_groups, strict=True):
                part = attend_in_group(index, *(heads[:, rows, :count] for heads in (query, key, value)))
                if index < self.decoder.last and count < size:
                    part = F.pad(part, (0, 0, 0, size - count))
                attended.append(part)
            return torch.cat(attended)

        def take_last(hidden: torch.Tensor) -> torch.Tensor:
            if len(groups) == 1:
                return hidden[:, groups[0][3] - 1]
            return torch.cat([hidden[rows, count - 1] for rows, _, _, count, _ in groups])

        rotations = self._rotations([start for *_, start in groups], size)
        hidden = self.decoder.read(tokens, rotations, attend, take_last)
        cache.add_tokens(clips, num_new)
        return hidden

    def _attention(self, keys: torch.Tensor, values: torch.Tensor, num_old: int, num_new: int) -> Attend:
        """
        Gives what attends for clips that are equally long, and stores what is new of them.

        `keys` and `values` are what is stored of all layers, `(layers, key/value heads, clips, capacity, head size)`.
        """
        last, seen, mask = self.decoder.last, num_old + num_new, self._causal_mask(num_new)
        # Views of all layers at once: their making, too, takes its microseconds.
        new_keys, new_values = (states[:, :, :, num_old:seen].unbind() for states in (keys, values))
        keys, values = keys[:, :, :, :seen], values[:, :, :, :seen]
        if self.attends_by_hand:
            attend_to = self._attention_by_hand(keys, values, num_new, mask)
            attend_to_last = self._attention_by_hand(keys, values, 1, None)
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

    def _attention_by_hand(
        self, keys: torch.Tensor, values: torch.Tensor, num_queries: int, mask: torch.Tensor | None
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """
        Gives what attends to all that is seen, `(layers, key/value heads, clips, seen, head size)`.

        It takes the number of a layer and queries, and has its scores in memory that is used again. `mask` is
        `(queries, queries)`, of the newest keys alone.
        """
        _, key_heads, clips, seen, size = keys.shape
        num_shared = self.decoder.num_heads // key_heads
        keys, values = keys.flatten(1, 2).mT.unbind(), values.flatten(1, 2).unbind()
        num_heads, rows, scaling = key_heads * clips, num_shared * num_queries, self.decoder.scaling
        # As many heads at once as have scores that stay in the caches of the cores, and one for each core at least.
        num_threads = torch.get_num_threads()
        at_once = min(num_heads, max(num_threads, _NEAR_SCORES // (rows * seen)))
        if len(self.scores) < at_once * rows * seen:
            # Enough for the whole clip at once, as new memory takes the time of its first use.
            capacity = self.cache.keys.shape[3]
            self.scores = keys[0].new_empty(max(_NEAR_SCORES, num_threads * rows * capacity, at_once * rows * seen))
        all_scores = self.scores[: at_once * rows * seen].view(at_once, rows, seen)
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
            if num_shared > 1:  # heads that share keys become rows of one product
                query = query.unflatten(0, (key_heads, num_shared)).transpose(1, 2).flatten(2, 3)
            query = query.flatten(0, 1)
            if at_once == num_heads:
                attended = attend_to_part(query, keys[index], values[index])
            else:
                parts = zip(*(states.split(at_once) for states in (query, keys[index], values[index])), strict=True)
                attended = torch.cat([attend_to_part(*part) for part in parts])
            attended = attended.view(key_heads, clips, num_shared, num_queries, size)
            return attended.permute(1, 3, 0, 2, 4).reshape(clips * num_queries, -1)

        return attend

    def _causal_mask(self, num_new: int) -> torch.Tensor:
        """Lets each new token see the new ones up to itself: `(new, new)`, 0 or -inf."""
        if num_new not in self.causal_masks:
            mask = self.decoder.like.new_full((num_new, num_new), -torch.inf)
            self.causal_masks[num_new] = mask.triu(1)
        return self.causal_masks[num_new]

    def _rotations(self, firsts: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives cosines and sines `(groups, size, head size)` of positions that count from `firsts`."""
        places = [first - self.first_position for first in firsts]
        if min(places) < 0 or max(places) + size > len(self.cos):
            # For all that is read in this call, and none of what was read in earlier ones.
            self.first_position = min(firsts)
            places = [first - self.first_position for first in firsts]
            positions = torch.arange(max(places) + size + self.num_tokens, device=self.decoder.like.device)
            tables = self.decoder.rotations(positions[None] + self.first_position)
            self.cos, self.sin = (table[0] for table in tables)
        tables = (self.cos, self.sin)
        if len(places) == 1:
            return tuple(table[None, places[0] : places[0] + size] for table in tables)
        return tuple(torch.stack([table[place : place + size] for place in places]) for table in tables)


def choose_ids(
    logits: torch.Tensor,
    taken: torch.Tensor,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Picks one id for each row of `(clips, rows, vocabulary)`, none twice; marks them with -inf in `taken`."""
    if temperature is None and logits.device.type == "cpu":
        # The same in numpy, whose calls take a fraction of the time on so few numbers.
        free = logits.float().numpy() + taken.float().numpy()[:, None]
        chosen = free.argmax(-1)
        for scores_of_clip, ids in zip(free, chosen, strict=True):
            if len(set(ids.tolist())) < len(ids):  # rows that choose alike must make way for those before them
                for row, scores in enumerate(scores_of_clip):
                    scores[ids[:row]] = -np.inf
                    ids[row] = scores.argmax()
        chosen = torch.from_numpy(chosen)
        taken.scatter_(1, chosen, -torch.inf)
        return chosen
    chosen = []
    for row in logits.unbind(1):
        row = row + taken
        if temperature is None:
            choice = row.argmax(dim=-1, keepdim=True)
        else:
            choice = torch.multinomial((row.float() / temperature).softmax(-1), 1, generator=generator)
        taken.scatter_(1, choice, -torch.inf)
        chosen.append(choice)
    return torch.cat(chosen, dim=1)
