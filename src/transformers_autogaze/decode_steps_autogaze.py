"""
How the gaze decoder reads and proposes, step by step.

This module owns what one step does to a [`GazeCache`] and its keys and values; when a frame ends the loop in `generation_autogaze` says.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from .fused_decoder_autogaze import FusedDecoder


class DecodeSteps:
    """
    Reads new tokens after all that is cached, with keys and values written in place and never copied.

    Clips of a batch are attended to together as long as they are equally long, and one by one, at their own lengths, once
    they are not; those whose frame has ended are left out.

    Args:
        decoder ([`FusedDecoder`]): the decoder.
        cache (`GazeCache`): what it has read of the clips.
        positions (`str`): the config's `decoding_positions`.
        temperature (`float`, *optional*): at which patches are sampled; the likeliest are taken if not given.
        generator (`torch.Generator`, *optional*): where random numbers come from.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        cache,
        positions: str,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ):
        self.decoder, self.cache, self.positions = decoder, cache, positions
        self.choose = functools.partial(choose_ids, temperature=temperature, generator=generator)
        self.causal_masks: dict[int, torch.Tensor] = {}
        self.cos = self.sin = decoder.weight.new_empty(0, 0)

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
        cache.reserve(size)
        clip_states = [(cache.lengths[clip], num_new[clip], starts[clip]) for clip in clips]
        if len(clips) == len(cache.lengths) and len(set(clip_states)) == 1:
            # Equal clips are one group; otherwise each is a group of its own.
            groups = [(slice(None), slice(None), *clip_states[0])]
        else:
            groups = [
                (slice(row, row + 1), slice(clip, clip + 1), *state)
                for row, (clip, state) in enumerate(zip(clips, clip_states, strict=True))
            ]
        masks = [self._causal_mask(old, count) for *_, old, count, _ in groups]

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            attended = []
            for (rows, stored, old, count, _), mask in zip(groups, masks, strict=True):
                keys, values = (
                    cache.keys[index][stored, :, : old + count],
                    cache.values[index][stored, :, : old + count],
                )
                keys[:, :, old:], values[:, :, old:] = key[rows, :, :count], value[rows, :, :count]
                if index == self.decoder.last:
                    query_of_part, mask = query[rows, :, count - 1 : count], None
                else:
                    query_of_part = query[rows, :, :count]
                if self.decoder.prefers_few(query_of_part, keys):
                    mask = None if mask is None else mask[0, 0, :, old:]
                    part = self.decoder.attend_few(index, query_of_part, keys, values, mask)
                else:
                    part = self.decoder.attend(index, query_of_part, keys, values, mask)
                if index < self.decoder.last and count < size:
                    part = F.pad(part, (0, 0, 0, size - count))
                attended.append(part)
            return attended[0] if len(attended) == 1 else torch.cat(attended)

        def take_last(hidden: torch.Tensor) -> torch.Tensor:
            lasts = [hidden[rows, count - 1 : count] for rows, _, _, count, _ in groups]
            return lasts[0] if len(lasts) == 1 else torch.cat(lasts)

        rotations = self._rotations([start for *_, start in groups], size)
        hidden = self.decoder.read(tokens, rotations, attend, take_last)
        cache.add_tokens(clips, num_new)
        return hidden

    def _causal_mask(self, num_old: int, num_new: int) -> torch.Tensor:
        """Lets each new token see all old ones and the new ones up to itself: `(1, 1, new, old + new)`, 0 or -inf."""
        mask, length = self.causal_masks.get(num_new), num_old + num_new
        if mask is None or mask.shape[-1] < length:
            weight = self.decoder.weight
            mask = torch.full((num_new, num_new), -torch.inf, dtype=weight.dtype, device=weight.device).triu(1)
            mask = self.causal_masks[num_new] = F.pad(mask, (2 * length, 0))
        return mask[None, None, :, mask.shape[-1] - length :]

    def _rotations(self, firsts: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives cosines and sines `(groups, size, head size)` of positions that count from `firsts`."""
        if max(firsts) + size > len(self.cos):
            positions = torch.arange(2 * (max(firsts) + size), device=self.decoder.weight.device)
            self.cos, self.sin = (table[0] for table in self.decoder.rotations(positions[None]))
        return tuple(torch.stack([table[first : first + size] for first in firsts]) for table in (self.cos, self.sin))


def choose_ids(
    logits: torch.Tensor,
    taken: torch.Tensor,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Picks one id for each row of `(clips, rows, vocabulary)`, none twice; marks them with -inf in `taken`."""
    if temperature is None and logits.device.type == "cpu":
        # The same in numpy, whose calls take a fraction of the time on so few numbers.
        rows, free, clips = logits.float().numpy(), taken.float().numpy().copy(), np.arange(len(logits))
        chosen = np.empty(rows.shape[:2], dtype=np.int64)
        for row in range(chosen.shape[1]):
            chosen[:, row] = choice = (rows[:, row] + free).argmax(-1)
            free[clips, choice] = -np.inf
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
