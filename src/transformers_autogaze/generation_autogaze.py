"""
How the model gazes: its decode loop and the state of a stream.

This module owns the loop and its cache; it knows the model only through its config, `embed_video` and `gaze_decoder`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
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

    @torch.inference_mode()
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
        if threshold is None:
            # Every patch of the budget will be read; with a threshold, frames may end long before.
            cache.reserve(int(budget.sum()) + len(budget) * num_vision + step_size)
        reader = _DecoderReader(self.gaze_decoder, self.config._attn_implementation)
        choose = functools.partial(_choose, temperature=temperature if do_sample else None, generator=generator)

        ids, is_real, slots = [], [], []
        # Thousands of small operations, a tenth quicker without autograd's notes. What leaves is a copy, free of the mode.
        with torch.inference_mode():
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
            cache=cache if use_cache else None,
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
        # Slices where all end together, as they do without a threshold: a list of rows would have to wait for a device.
        rows = slice(None) if len(ended) == len(active) else ended
        places = slice(None) if len(clips) == len(cache.num_unread) else clips
        ids, counts = chosen[rows], [chosen.shape[1]] * len(ended)
        if meets is not None:
            order = torch.argsort(meets[rows].byte(), dim=1, stable=True)
            ids = ids.gather(1, order)
            counts = (~meets[rows]).sum(dim=1).tolist()
        cache.unread_ids[places, : ids.shape[1]] = ids
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


class _DecoderReader:
    """
    Runs the gaze decoder on new tokens after all that is cached, on the decoder's own weights.

    It does what `LlamaModel` does with a cache, made for many short reads: projections that share their input are one
    product, with weights laid out for few rows; rotations come from a table; keys and values are written in place and
    never copied; and the last layer is computed for the one token whose hidden state is asked for. Clips of a batch are
    attended to together as long as they are equally long, and one by one, at their own lengths, once they are not.
    """

    def __init__(self, decoder: nn.Module, implementation: str | None):
        self.model = decoder.model
        self.is_eager = implementation == "eager"
        self.layers = [
            (
                layer,
                _product_of_normed(
                    layer.input_layernorm, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
                ),
                _sum_with_product(layer.self_attn.o_proj),
                _product_of_normed(layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj),
                _sum_with_product(layer.mlp.down_proj),
            )
            for layer in self.model.layers
        ]
        self.causal_masks: dict[int, torch.Tensor] = {}
        self.cos = self.sin = self.model.embed_tokens.weight.new_empty(0, 0)

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
        clip_states = [(cache.lengths[clip], num_new[clip], starts[clip]) for clip in clips]
        if len(clips) == len(cache.lengths) and len(set(clip_states)) == 1:
            # Equal clips are one group; otherwise each is a group of its own.
            groups = [(slice(None), slice(None), *clip_states[0])]
        else:
            groups = [
                (slice(row, row + 1), slice(clip, clip + 1), *state)
                for row, (clip, state) in enumerate(zip(clips, clip_states, strict=True))
            ]
        cos, sin = self._rotations([group[-1] for group in groups], size)
        masks = [self._causal_mask(old, count) for *_, old, count, _ in groups]

        hidden = tokens
        for index, (layer, project_qkv, add_attended, project_gate_up, add_projected) in enumerate(self.layers):
            attention, is_last = layer.self_attn, index == len(self.layers) - 1
            projected = project_qkv(hidden).unflatten(-1, (-1, attention.head_dim))
            key_heads = cache.keys[index].shape[1]
            rotated, value = projected[:, :, :-key_heads], projected[:, :, -key_heads:].transpose(1, 2)
            rotated = torch.addcmul(rotated * cos, rotated.roll(attention.head_dim // 2, dims=-1), sin)
            query, key = rotated[:, :, :-key_heads].transpose(1, 2), rotated[:, :, -key_heads:].transpose(1, 2)
            attended = []
            for (rows, stored, old, count, _), mask in zip(groups, masks, strict=True):
                keys, values = (
                    cache.keys[index][stored, :, : old + count],
                    cache.values[index][stored, :, : old + count],
                )
                keys[:, :, old:], values[:, :, old:] = key[rows, :, :count], value[rows, :, :count]
                if is_last:
                    part = self._attend(attention, query[rows, :, count - 1 : count], keys, values, None)
                else:
                    part = self._attend(attention, query[rows, :, :count], keys, values, mask)
                    part = part if count == size else F.pad(part, (0, 0, 0, size - count))
                attended.append(part)
            attended = attended[0] if len(attended) == 1 else torch.cat(attended)
            if is_last:
                lasts = [hidden[rows, count - 1 : count] for rows, _, _, count, _ in groups]
                hidden = lasts[0] if len(lasts) == 1 else torch.cat(lasts)
            hidden = add_attended(hidden, attended)
            gate, up = project_gate_up(hidden).chunk(2, dim=-1)
            hidden = add_projected(hidden, layer.mlp.act_fn(gate) * up)
        for clip in clips:
            cache.lengths[clip] += num_new[clip]
            cache.next_positions[clip] += num_new[clip]
        return self.model.norm(hidden[:, 0])

    def _causal_mask(self, num_old: int, num_new: int) -> torch.Tensor:
        """Lets each new token see all old ones and the new ones up to itself: `(1, 1, new, old + new)`, 0 or -inf."""
        mask, length = self.causal_masks.get(num_new), num_old + num_new
        if mask is None or mask.shape[-1] < length:
            weight = self.model.embed_tokens.weight
            mask = torch.full((num_new, num_new), -torch.inf, dtype=weight.dtype, device=weight.device).triu(1)
            mask = self.causal_masks[num_new] = F.pad(mask, (2 * length, 0))
        return mask[None, None, :, mask.shape[-1] - length :]

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

    def _rotations(self, firsts: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives cosines and sines `(groups, size, 1, head size)` of positions that count from `firsts`."""
        if max(firsts) + size > len(self.cos):
            weight = self.model.embed_tokens.weight
            positions = torch.arange(2 * (max(firsts) + size), device=weight.device)
            cos, sin = (table[0] for table in self.model.rotary_emb(weight, position_ids=positions[None]))
            # Rotating turns (a, b) into (-b, a); the sign is put into the table instead.
            half = sin.shape[-1] // 2
            self.cos, self.sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        return tuple(
            torch.stack([table[first : first + size] for first in firsts])[:, :, None]
            for table in (self.cos, self.sin)
        )


def _product_of_normed(norm: nn.Module, *projections: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes one product of projections of the same input, normalised first."""
    weight = _fused_weight(*projections)
    if weight is None:
        return lambda hidden: _each(norm(hidden), projections)
    if weight.dtype not in (torch.float32, torch.float64):
        return lambda hidden: norm(hidden) @ weight
    # With n numbers in a row x, x / sqrt(|x|^2 / n + eps) is x / hypot(|x|, sqrt(n * eps)) times sqrt(n). That and the
    # norm's own weights go into the product's, which leaves three quick operations of the norm.
    size = len(weight)
    floor = weight.new_tensor(math.sqrt(size * norm.variance_epsilon))
    weight = norm.weight[:, None] * weight * math.sqrt(size)
    return lambda hidden: (
        (hidden / torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), floor)) @ weight
    )


def _sum_with_product(projection: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Makes one operation of a projection and of adding it to something."""
    weight = _fused_weight(projection)
    if weight is None:
        return lambda hidden, inputs: hidden + projection(inputs)
    return lambda hidden, inputs: torch.addmm(hidden.flatten(0, 1), inputs.flatten(0, 1), weight).view_as(hidden)


def _each(inputs: torch.Tensor, projections: Sequence[nn.Module]) -> torch.Tensor:
    return torch.cat([projection(inputs) for projection in projections], dim=-1)


def _fused_weight(*projections: nn.Module) -> torch.Tensor | None:
    """Joins the weights of projections of the same input; `None` where adapted or quantised ones must be asked."""
    if any(type(projection) is not nn.Linear or projection.bias is not None for projection in projections):
        return None
    # On a CPU, a product of few rows is up to twice as fast with the weight laid out this way round.
    return torch.cat([projection.weight for projection in projections]).T.contiguous()
