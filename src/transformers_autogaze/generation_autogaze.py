"""
How the model gazes: its decode loop and the state of a stream.

This module owns the loop and its cache; it knows the model only through its config, `embed_video` and `gaze_decoder`.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import eager_attention_forward

from .gazing_autogaze import GazeOutput
from .selection_autogaze import GazeSelector


class GazeCache:
    """
    What the model remembers of the clips it has gazed at, to go on with their next frames (SPEC, "Streaming").

    It holds the decoder's keys and values, per clip and without padding, the last frames of every causal convolution,
    and the chosen patches that the decoder has not read yet. Pass it as `past_key_values`; every call fills it further.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import AutoGazeConfig, AutoGazeModel, GazeCache

    >>> model = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64)).eval()
    >>> cache = GazeCache()
    >>> stream = torch.randn(1, 3, 3, 64, 64)
    >>> for frame in stream.split(1, dim=1):
    ...     gaze = model.generate(frame, gazing_ratio=0.2, past_key_values=cache, use_cache=True)
    >>> cache.num_frames
    3

    ```
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets everything, to start with new clips."""
        self.keys: list[torch.Tensor] = []
        """Per layer, `(batch, key/value heads, capacity, head size)`; the first `lengths[b]` places of clip b count."""
        self.values: list[torch.Tensor] = []
        self.lengths: list[int] = []
        """Tokens held of each clip."""
        self.next_positions: list[int] = []
        """Position of each clip's next token."""
        self.frame_starts: list[list[int]] = []
        """Per frame and clip, the place of its first vision token."""
        self.convolutions: list[torch.Tensor] = []
        """Per block, the last inputs `(batch, channels, temporal kernel - 1, rows, columns)`."""
        self.unread_ids: torch.Tensor | None = None
        """`(batch, k)`: patches chosen last, in order, that the decoder has not read."""
        self.num_unread: list[int] = []
        """How many of them are real, for each clip."""

    @property
    def num_frames(self) -> int:
        """Frames held."""
        return len(self.frame_starts)

    @property
    def batch_size(self) -> int | None:
        """Clips held; `None` while the cache is empty."""
        return len(self.lengths) or None

    def crop(self, num_frames: int) -> None:
        """
        Forgets the oldest frames, so that an endless stream takes bounded memory.

        Positions count on; the frames that stay are seen at the same distances as before. The convolutions remember
        their last frames either way.

        Args:
            num_frames (`int`): how many of the latest frames to keep, at least 0.

        Raises:
            ValueError: if `num_frames` is negative.
        """
        if num_frames < 0:
            raise ValueError(f"`num_frames` must be at least 0, got {num_frames}")
        if num_frames >= self.num_frames:
            return
        starts = self.frame_starts[-num_frames] if num_frames else self.lengths
        for states in (*self.keys, *self.values):
            for clip, (start, length) in enumerate(zip(starts, self.lengths, strict=True)):
                # A copy first: the places overlap.
                states[clip, :, : length - start] = states[clip, :, start:length].clone()
        self.frame_starts = [
            [place - start for place, start in zip(frame, starts, strict=True)]
            for frame in self.frame_starts[self.num_frames - num_frames :]
        ]
        self.lengths = [length - start for length, start in zip(self.lengths, starts, strict=True)]
        if num_frames == 0:
            self.num_unread = [0] * len(self.lengths)

    def reserve(self, num_tokens: int) -> None:
        """Makes room for further tokens of every clip; grows by half at least, so that copies stay rare."""
        needed, capacity = max(self.lengths) + num_tokens, self.keys[0].shape[2]
        if needed <= capacity:
            return
        held = max(self.lengths)
        for stored in (self.keys, self.values):
            for layer, states in enumerate(stored):
                grown = states.new_empty(*states.shape[:2], max(needed, capacity * 3 // 2), states.shape[3])
                grown[:, :, :held] = states[:, :, :held]
                stored[layer] = grown


class GazeDecoding(GazeSelector):
    """The decode loop of [`AutoGazeModel`], mixed into it."""

    def _gaze(
        self,
        frames: torch.Tensor,
        budget: torch.Tensor,
        threshold: torch.Tensor | None,
        past_key_values: GazeCache | None,
        use_cache: bool,
        do_sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        output_scores: bool = False,
    ) -> GazeOutput:
        if do_sample and not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"`temperature` must be a positive number, got {temperature}")
        if output_scores and past_key_values is not None and past_key_values.num_frames:
            raise ValueError("`output_scores` must be False when `past_key_values` goes on with a stream")
        grid = self.config.grid
        cache = self._prepare_cache(past_key_values, len(frames))
        vision, cache.convolutions = self.embed_video(frames, cache.convolutions)
        num_vision, step_size = vision.shape[2], self.config.decoder_config.num_multi_token_pred
        longest = int(budget.sum()) + len(budget) * num_vision + step_size
        if threshold is None:
            cache.reserve(longest)  # Every patch of the budget will be read; a threshold may end frames long before.
        reader = _DecoderReader(
            self.gaze_decoder, max(cache.next_positions) + longest, self.config._attn_implementation
        )
        choose = functools.partial(_choose, temperature=temperature if do_sample else None, generator=generator)

        ids, is_real, slots = [], [], []
        for frame, num_patches in enumerate(budget.tolist()):
            limit = None if threshold is None else threshold[:, frame]
            at_frame = self._gaze_at_frame(reader, vision[:, frame], num_patches, limit, cache, choose)
            ids.append(at_frame[0] + frame * grid.num_patches)
            is_real.append(at_frame[1])
            slots.append(at_frame[2])
        gaze = GazeOutput.from_ids(
            torch.cat(ids, dim=1),
            ~torch.cat(is_real, dim=1),
            torch.tensor([frame_ids.shape[1] for frame_ids in ids], device=frames.device),
            grid,
            self.config.frame_sampling_rate,
            clip_num_gazing_each_frame=torch.tensor(slots, device=frames.device).T,
            past_key_values=cache if use_cache else None,
        )
        if output_scores:
            scores = self(frames, gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame)
            gaze = gaze.replace(
                log_action_probs=scores.log_action_probs, task_loss_prediction=scores.task_loss_prediction
            )
        return gaze

    def _gaze_at_frame(
        self,
        reader: "_DecoderReader",
        vision: torch.Tensor,
        budget: int,
        threshold: torch.Tensor | None,
        cache: GazeCache,
        choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """
        Chooses patches of one frame, given its vision tokens `(batch, tokens, hidden)`.

        Returns ids `(batch, slots)` counted from the frame, the end id where a slot is padding; `(batch, slots)` true
        where a slot is real; and for each clip the slots that it took itself.
        """
        batch_size, end_id = len(vision), self.config.end_id
        step_size = self.config.decoder_config.num_multi_token_pred
        ids = vision.new_full((batch_size, budget), end_id, dtype=torch.long)
        is_real = torch.zeros_like(ids, dtype=torch.bool)
        num_slots = [0] * batch_size
        # What is added to the logits of each clip: -inf for ids that are taken. The end id is never chosen.
        taken = vision.new_zeros(batch_size, end_id + 1)
        taken[:, end_id] = -torch.inf

        hidden = self._read_prompt(reader, vision, cache)
        prompt_ends = list(cache.next_positions)
        active = list(range(batch_size))
        for start in range(0, budget, step_size):
            stop = min(start + step_size, budget)
            logits, losses = self.gaze_decoder.heads(hidden)
            chosen = choose(logits[:, : stop - start], taken)
            for clip in active:
                num_slots[clip] = stop
            rows = slice(None) if len(active) == batch_size else active
            if threshold is None:
                meets = None
                going_on = list(range(len(active))) if stop < budget else []
                ids[rows, start:stop], is_real[rows, start:stop] = chosen, True
            else:
                # Row i predicts the loss that stands before slot i, so a slot that comes after enough is padding.
                meets = losses[:, : stop - start] <= threshold[rows, None]
                if start == 0:
                    meets[:, 0] = False
                ids[rows, start:stop] = chosen.masked_fill(meets, end_id)
                is_real[rows, start:stop] = ~meets
                num_met = meets.sum(dim=1).tolist()  # the only wait for the device in a step
                going_on = [row for row, met in enumerate(num_met) if not met] if stop < budget else []
            if len(going_on) < len(active):
                self._keep_unread(cache, chosen, meets, active, set(going_on))
            if not going_on:
                return ids[:, :stop], is_real[:, :stop], num_slots
            if len(going_on) < len(active):
                active = [active[row] for row in going_on]
                chosen, taken = chosen[going_on], taken[going_on]
            starts = cache.next_positions
            if self.config.decoding_positions == "frame_tail":
                starts = [end - step_size for end in prompt_ends]
            hidden = reader.read(
                self.gaze_decoder.model.embed_tokens(chosen), active, starts, [step_size] * batch_size, cache
            )

    def _prepare_cache(self, cache: GazeCache | None, batch_size: int) -> GazeCache:
        cache = GazeCache() if cache is None else cache
        if not isinstance(cache, GazeCache):
            raise ValueError(f"`past_key_values` must be a GazeCache, got {type(cache).__name__}")
        if cache.batch_size is None:
            config, weight = self.config.decoder_config, self.gaze_decoder.lm_head.weight
            size = (batch_size, config.num_key_value_heads, 0, config.head_dim)
            cache.keys = [weight.new_empty(size) for _ in range(config.num_hidden_layers)]
            cache.values = [weight.new_empty(size) for _ in range(config.num_hidden_layers)]
            cache.lengths, cache.next_positions, cache.num_unread = ([0] * batch_size for _ in range(3))
            shape = (batch_size, config.num_multi_token_pred)
            cache.unread_ids = torch.full(shape, self.config.end_id, device=weight.device)
        elif cache.batch_size != batch_size:
            raise ValueError(
                f"`past_key_values` holds {cache.batch_size} clips, but {batch_size} are given now (tiles count); "
                "pass the frames of the same clips, or a new GazeCache"
            )
        return cache

    @staticmethod
    def _keep_unread(
        cache: GazeCache, chosen: torch.Tensor, meets: torch.Tensor | None, active: list[int], going_on: set[int]
    ) -> None:
        """Notes the last chosen patches of the clips whose frame ends: they are read together with the next frame."""
        ended = [row for row in range(len(active)) if row not in going_on]
        clips = [active[row] for row in ended]
        ids, counts = chosen[ended], [chosen.shape[1]] * len(ended)
        if meets is not None:
            order = torch.argsort(meets[ended].byte(), dim=1, stable=True)
            ids = ids.gather(1, order)
            counts = (~meets[ended]).sum(dim=1).tolist()
        cache.unread_ids[clips, : ids.shape[1]] = ids
        for clip, count in zip(clips, counts, strict=True):
            cache.num_unread[clip] = count

    def _read_prompt(self, reader: "_DecoderReader", vision: torch.Tensor, cache: GazeCache) -> torch.Tensor:
        """Reads the unread patches of the frame before and the vision tokens; gives the last one's hidden state."""
        num_vision, unread = vision.shape[1], cache.num_unread
        most = max(unread)
        tokens = torch.cat([self.gaze_decoder.model.embed_tokens(cache.unread_ids[:, :most]), vision], dim=1)
        if min(unread) < most:
            # Clips with fewer unread patches end earlier; what follows their last vision token is not kept.
            for clip, count in enumerate(unread):
                tokens[clip, count : count + num_vision] = vision[clip]
        cache.frame_starts.append([length + count for length, count in zip(cache.lengths, unread, strict=True)])
        num_new = [count + num_vision for count in unread]
        return reader.read(tokens, list(range(len(unread))), cache.next_positions, num_new, cache)


def _choose(
    logits: torch.Tensor, taken: torch.Tensor, temperature: float | None, generator: torch.Generator | None
) -> torch.Tensor:
    """Picks one id for each row of `(clips, rows, vocabulary)`, none twice; marks them with -inf in `taken`."""
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


class _DecoderReader:
    """
    Runs the gaze decoder on new tokens after all that is cached, on the decoder's own weights.

    It does what `LlamaModel` does with a cache, made for many short reads: projections that share their input are one
    product, rotations come from a table, keys and values are written in place and never copied, and the last layer is
    computed for the one token whose hidden state is asked for. Clips of a batch are attended to together as long as
    they are equally long, and one by one, at their own lengths, once they are not.
    """

    def __init__(self, decoder: nn.Module, num_positions: int, implementation: str | None):
        model = decoder.model
        self.norm = model.norm
        self.is_eager = implementation == "eager"
        self.layers = [
            (
                layer,
                _joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                _joined(layer.mlp.gate_proj, layer.mlp.up_proj),
            )
            for layer in model.layers
        ]
        weight = model.embed_tokens.weight
        cos, sin = model.rotary_emb(weight, position_ids=torch.arange(num_positions, device=weight.device)[None])
        # Rotating turns (a, b) into (-b, a); the sign is put into the table instead.
        half = sin.shape[-1] // 2
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def read(
        self, tokens: torch.Tensor, clips: list[int], starts: list[int], num_new: list[int], cache: GazeCache
    ) -> torch.Tensor:
        """
        Reads tokens `(clips, new, hidden)` of some clips of the batch and caches them.

        `starts` and `num_new` hold, for every clip of the batch, the position of its first new token and how many of
        them are real. Gives the hidden state of each clip's last real token, `(clips, hidden)`.
        """
        size = tokens.shape[1]
        cache.reserve(size)
        lengths, firsts = [cache.lengths[clip] for clip in clips], [starts[clip] for clip in clips]
        counts = [num_new[clip] for clip in clips]
        is_uniform = len(clips) == len(cache.lengths) and len({*zip(lengths, firsts, counts, strict=True)}) == 1
        # Where clips are equal they are one group; otherwise each is a group of its own.
        groups = [slice(None)] if is_uniform else [slice(row, row + 1) for row in range(len(clips))]
        cos, sin = (
            torch.stack([table[first : first + size] for first in (firsts[:1] if is_uniform else firsts)])[:, :, None]
            for table in (self.cos, self.sin)
        )
        causal = torch.full((size, size), -torch.inf, dtype=tokens.dtype, device=tokens.device).triu(1)

        hidden = tokens
        for index, (layer, project_qkv, project_mlp) in enumerate(self.layers):
            attention, is_last = layer.self_attn, index == len(self.layers) - 1
            projected = project_qkv(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))
            key_heads = cache.keys[index].shape[1]
            rotated, value = projected[:, :, :-key_heads], projected[:, :, -key_heads:]
            rotated = torch.addcmul(rotated * cos, rotated.roll(attention.head_dim // 2, dims=-1), sin)
            query, key = rotated[:, :, :-key_heads].transpose(1, 2), rotated[:, :, -key_heads:].transpose(1, 2)
            value = value.transpose(1, 2)
            attended = []
            for group in groups:
                row = group.start or 0
                old, count = lengths[row], counts[row]
                stored = slice(None) if is_uniform else slice(clips[row], clips[row] + 1)
                keys, values = (
                    cache.keys[index][stored, :, : old + count],
                    cache.values[index][stored, :, : old + count],
                )
                keys[:, :, old:], values[:, :, old:] = key[group, :, :count], value[group, :, :count]
                first = count - 1 if is_last else 0
                mask = None
                if count - first > 1:
                    mask = F.pad(causal[:count, :count], (old, 0))[None, None]
                attended.append(self._attend(attention, query[group, :, first:count], keys, values, mask))
            if is_last:
                attended = torch.cat(attended)[:, 0]
                hidden = torch.cat([hidden[group, counts[group.start or 0] - 1] for group in groups])
            else:
                attended = torch.cat([F.pad(part, (0, 0, 0, size - part.shape[1])) for part in attended])
            hidden = hidden + attention.o_proj(attended)
            gate, up = project_mlp(layer.post_attention_layernorm(hidden)).chunk(2, dim=-1)
            hidden = hidden + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
        for clip in clips:
            cache.lengths[clip] += num_new[clip]
            cache.next_positions[clip] += num_new[clip]
        return self.norm(hidden)

    def _attend(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attends from `(clips, heads, new, head size)`; gives `(clips, new, heads * head size)`."""
        if self.is_eager:
            return eager_attention_forward(attention, query, keys, values, mask, scaling=attention.scaling)[0].flatten(
                2
            )
        attended = F.scaled_dot_product_attention(
            query, keys, values, mask, scale=attention.scaling, enable_gqa=attention.num_key_value_groups > 1
        )
        return attended.transpose(1, 2).flatten(2)


def _joined(*projections: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes one product of several of the same input; adapted or quantised projections are asked one by one."""
    if any(type(projection) is not nn.Linear for projection in projections):
        return lambda hidden: torch.cat([projection(hidden) for projection in projections], dim=-1)
    weight = torch.cat([projection.weight for projection in projections])
    bias = None if projections[0].bias is None else torch.cat([projection.bias for projection in projections])
    return lambda hidden: F.linear(hidden, weight, bias)
