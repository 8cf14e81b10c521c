"""
How the model gazes: its decode loop and the state of a stream.

This module owns the loop and its cache; it knows the model only through its config, `embed_video` and `gaze_decoder`.
"""

import math

import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

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
        self.lengths: torch.Tensor | None = None
        """`(batch,)`: tokens held of each clip."""
        self.next_positions: torch.Tensor | None = None
        """`(batch,)`: position of each clip's next token."""
        self.frame_starts: list[torch.Tensor] = []
        """Per frame, `(batch,)`: the place of its first vision token."""
        self.convolutions: list[torch.Tensor] = []
        """Per block, the last inputs `(batch, channels, temporal kernel - 1, rows, columns)`."""
        self.unread_ids: torch.Tensor | None = None
        """`(batch, k)`: patches chosen last, in order, that the decoder has not read."""
        self.num_unread: torch.Tensor | None = None
        """`(batch,)`: how many of them are real."""

    @property
    def num_frames(self) -> int:
        """Frames held."""
        return len(self.frame_starts)

    @property
    def batch_size(self) -> int | None:
        """Clips held; `None` while the cache is empty."""
        return None if self.lengths is None else len(self.lengths)

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
        start = self.frame_starts[-num_frames] if num_frames else self.lengths
        keep = int((self.lengths - start).max())
        place = (start[:, None] + torch.arange(keep, device=start.device)).clamp(max=self.keys[0].shape[2] - 1)
        for stored in (self.keys, self.values):
            for layer, states in enumerate(stored):
                index = place[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                stored[layer] = states.gather(2, index)
        self.frame_starts = [at - start for at in self.frame_starts[len(self.frame_starts) - num_frames :]]
        self.lengths = self.lengths - start
        if num_frames == 0:
            self.num_unread = torch.zeros_like(self.num_unread)

    def reserve(self, num_tokens: int) -> None:
        """Makes room for further tokens of every clip; grows by half at least, so that copies stay rare."""
        needed = int(self.lengths.max()) + num_tokens
        capacity = self.keys[0].shape[2]
        if needed > capacity:
            grown = max(needed, capacity * 3 // 2)
            for stored in (self.keys, self.values):
                for layer, states in enumerate(stored):
                    stored[layer] = F.pad(states, (0, 0, 0, grown - capacity))


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

        ids, padding, slots = [], [], []
        for frame, num_patches in enumerate(budget.tolist()):
            limit = None if threshold is None else threshold[:, frame]
            frame_ids, is_real, num_slots = self._gaze_at_frame(
                vision[:, frame], num_patches, limit, cache, temperature if do_sample else None, generator
            )
            ids.append(frame_ids + frame * grid.num_patches)
            padding.append(~is_real)
            slots.append(num_slots)
        gaze = GazeOutput.from_ids(
            torch.cat(ids, dim=1),
            torch.cat(padding, dim=1),
            torch.tensor([frame_ids.shape[1] for frame_ids in ids], device=frames.device),
            grid,
            self.config.frame_sampling_rate,
            clip_num_gazing_each_frame=torch.stack(slots, dim=1),
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
        vision: torch.Tensor,
        budget: int,
        threshold: torch.Tensor | None,
        cache: GazeCache,
        temperature: float | None,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Chooses patches of one frame, given its vision tokens `(batch, tokens, hidden)`.

        Returns ids `(batch, slots)` counted from the frame, the end id where a slot is padding; `(batch, slots)` true
        where a slot is real; and `(batch,)` slots that each clip took itself.
        """
        batch_size, device = len(vision), vision.device
        end_id, step_size = self.config.end_id, self.config.decoder_config.num_multi_token_pred
        ids = torch.full((batch_size, budget), end_id, device=device)
        is_real = torch.zeros(batch_size, budget, dtype=torch.bool, device=device)
        num_slots = torch.zeros(batch_size, dtype=torch.long, device=device)
        is_active = torch.ones(batch_size, dtype=torch.bool, device=device)
        # The end id is never chosen; padding is what the threshold leaves.
        is_taken = torch.zeros(batch_size, end_id + 1, dtype=torch.bool, device=device)
        is_taken[:, end_id] = True

        hidden = self._read_prompt(vision, cache)
        prompt_end = cache.next_positions.clone()
        for start in range(0, budget, step_size):
            size = min(step_size, budget - start)
            logits, losses = self.gaze_decoder.heads(hidden)
            chosen = self._choose(logits[:, :size], is_taken, temperature, generator)
            chosen_is_real = is_active[:, None].expand(-1, size)
            is_last = torch.full_like(is_active, start + size == budget)
            if threshold is not None:
                # Row i predicts the loss that stands before slot i, so a slot that comes after enough is padding.
                meets = losses[:, :size] <= threshold[:, None]
                if start == 0:
                    meets[:, 0] = False
                is_last |= meets.any(dim=1)
                chosen_is_real = chosen_is_real & ~meets
            ids[:, start : start + size] = chosen.masked_fill(~chosen_is_real, end_id)
            is_real[:, start : start + size] = chosen_is_real
            num_slots += is_active * size

            ends_now = is_active & is_last
            self._keep_unread(cache, chosen, chosen_is_real, ends_now)
            is_active = is_active & ~is_last
            if start + size == budget or (threshold is not None and not is_active.any()):
                return ids[:, : start + size], is_real[:, : start + size], num_slots
            offset = torch.arange(step_size, device=device)
            if self.config.decoding_positions == "frame_tail":
                positions = prompt_end[:, None] - step_size + offset
            else:
                positions = cache.next_positions[:, None] + offset
            hidden = self._read(self.gaze_decoder.model.embed_tokens(chosen), positions, is_active * step_size, cache)[
                :, -1
            ]

    def _choose(
        self,
        logits: torch.Tensor,
        is_taken: torch.Tensor,
        temperature: float | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Picks one id per row of `(batch, rows, vocabulary)`, none twice; marks them in `is_taken`."""
        chosen = []
        for row in logits.unbind(1):
            row = row.masked_fill(is_taken, -torch.inf)
            if temperature is None:
                choice = row.argmax(dim=-1, keepdim=True)
            else:
                choice = torch.multinomial((row.float() / temperature).softmax(-1), 1, generator=generator)
            is_taken.scatter_(1, choice, True)
            chosen.append(choice)
        return torch.cat(chosen, dim=1)

    def _prepare_cache(self, cache: GazeCache | None, batch_size: int) -> GazeCache:
        cache = GazeCache() if cache is None else cache
        if not isinstance(cache, GazeCache):
            raise ValueError(f"`past_key_values` must be a GazeCache, got {type(cache).__name__}")
        if cache.lengths is None:
            config, weight = self.config.decoder_config, self.gaze_decoder.lm_head.weight
            size = (batch_size, config.num_key_value_heads, 0, config.head_dim)
            cache.keys = [weight.new_empty(size) for _ in range(config.num_hidden_layers)]
            cache.values = [weight.new_empty(size) for _ in range(config.num_hidden_layers)]
            cache.lengths = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
            cache.next_positions = cache.lengths.clone()
            cache.num_unread = cache.lengths.clone()
            cache.unread_ids = cache.lengths.new_full((batch_size, config.num_multi_token_pred), self.config.end_id)
        elif cache.batch_size != batch_size:
            raise ValueError(
                f"`past_key_values` holds {cache.batch_size} clips, but {batch_size} are given now (tiles count); "
                "pass the frames of the same clips, or a new GazeCache"
            )
        return cache

    def _keep_unread(
        self, cache: GazeCache, chosen: torch.Tensor, is_real: torch.Tensor, ends_now: torch.Tensor
    ) -> None:
        """Notes a frame's last chosen patches: they are read together with the next frame."""
        order = torch.argsort(is_real, dim=1, descending=True, stable=True)
        ids = F.pad(chosen.gather(1, order), (0, cache.unread_ids.shape[1] - chosen.shape[1]))
        cache.unread_ids = torch.where(ends_now[:, None], ids, cache.unread_ids)
        cache.num_unread = torch.where(ends_now, is_real.sum(dim=1), cache.num_unread)

    def _read_prompt(self, vision: torch.Tensor, cache: GazeCache) -> torch.Tensor:
        """Reads the unread patches of the frame before and the vision tokens; gives the last one's hidden state."""
        batch_size, num_vision = vision.shape[:2]
        unread = cache.num_unread[:, None]
        most_unread = int(unread.max())
        tokens = torch.cat([self.gaze_decoder.model.embed_tokens(cache.unread_ids[:, :most_unread]), vision], dim=1)
        # Clips with fewer unread patches than others end earlier; what follows their last vision token is not kept.
        place = torch.arange(most_unread + num_vision, device=vision.device)
        source = torch.where(place < unread, place, place - unread + most_unread).clamp(max=tokens.shape[1] - 1)
        tokens = tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[-1]))
        cache.frame_starts.append(cache.lengths + cache.num_unread)
        num_new = cache.num_unread + num_vision
        hidden = self._read(tokens, cache.next_positions[:, None] + place, num_new, cache)
        return hidden[torch.arange(batch_size, device=vision.device), num_new - 1]

    def _read(
        self, tokens: torch.Tensor, positions: torch.Tensor, num_new: torch.Tensor, cache: GazeCache
    ) -> torch.Tensor:
        """
        Runs the decoder on new tokens `(batch, new, hidden)` after all that is cached; of clip b the first `num_new[b]`
        are kept. Their keys and values are written behind the clip's last, so none is ever padding.
        """
        batch_size, num_tokens = tokens.shape[:2]
        cache.reserve(num_tokens)
        model = self.gaze_decoder.model
        is_eager = self.config._attn_implementation == "eager"
        place = cache.lengths[:, None] + torch.arange(num_tokens, device=tokens.device)
        clip = torch.arange(batch_size, device=tokens.device)[:, None]
        seen = int(cache.lengths.max()) + num_tokens
        mask = (torch.arange(seen, device=tokens.device) <= place[..., None])[:, None]
        if is_eager:
            mask = torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, torch.finfo(tokens.dtype).min)
        cos, sin = model.rotary_emb(tokens, position_ids=positions)

        hidden = tokens
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            query, key, value = (
                projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            cache.keys[index][clip, :, place] = key.transpose(1, 2)
            cache.values[index][clip, :, place] = value.transpose(1, 2)
            key, value = cache.keys[index][:, :, :seen], cache.values[index][:, :, :seen]
            if is_eager:
                attended, _ = eager_attention_forward(attention, query, key, value, mask, scaling=attention.scaling)
            else:
                attended = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, scale=attention.scaling, enable_gqa=True
                ).transpose(1, 2)
            hidden = hidden + attention.o_proj(attended.flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        cache.lengths = cache.lengths + num_new
        cache.next_positions = cache.next_positions + num_new
        return model.norm(hidden)
