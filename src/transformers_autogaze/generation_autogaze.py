"""
How the model gazes: its decode loop and the state of a stream.

This module owns the loop and its cache; it knows the model only through its config, `embed_video` and `gaze_decoder`.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .composite_autogaze import CompositeReconstruction
from .decode_steps_autogaze import DecodeSteps
from .fused_decoder_autogaze import FusedDecoder
from .gazing_autogaze import GazeOutput
from .graphed_steps_autogaze import GraphedSteps, graphed_steps
from .measured_stopping_autogaze import FrameMeter
from .selection_autogaze import GazeSelector, frames_to_pixels, pixel_scale_and_offset, resize_frames


class GazeCache:
    """
    What the model remembers of the clips it has gazed at, to go on with their next frames.

    See docs/specification.md, section 6.

    It holds the decoder's keys and values, per clip and without padding, the last frames of every causal convolution,
    and the chosen patches that the decoder has not read yet. Pass it as `past_key_values`; every call fills it further.
    In float32 and float64 the stream gets the patches of the whole clip; in bfloat16 and float16 nearly all of them, as a
    convolution rounds a clip otherwise than single frames.

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
        self.keys: torch.Tensor | None = None
        """`(layers, key/value heads, batch, capacity, head size)`; the first `lengths[b]` places of clip b count."""
        self.values: torch.Tensor | None = None
        self.frequencies: torch.Tensor | None = None
        """`(head size / 2,)`: by what angle one position turns each pair of a key's features."""
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
        self.reconstruction: torch.Tensor | None = None
        """`(batch, 3, height, width)`: the last frame, rebuilt from what was kept; where losses are measured."""

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
        Forgets the oldest frames, so that an endless stream takes bounded memory and time.

        The frames that stay are seen at the same distances as before; the next call counts positions from the first of
        them, so that what it chooses does not depend on how many went before. The convolutions remember their last frames
        either way.

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
        for layer in (*self.keys, *self.values):
            for clip, (start, length) in enumerate(zip(starts, self.lengths, strict=True)):
                # A copy first: the places overlap.
                layer[:, clip, : length - start] = layer[:, clip, start:length].clone()
        self.frame_starts = [
            [place - start for place, start in zip(frame, starts, strict=True)]
            for frame in self.frame_starts[self.num_frames - num_frames :]
        ]
        self.lengths = [length - start for length, start in zip(self.lengths, starts, strict=True)]
        if num_frames == 0:
            self.num_unread = [0] * len(self.lengths)

    def begin_frame(self) -> None:
        """Notes that a frame's vision tokens follow, after the unread patches of the one before."""
        self.frame_starts.append([length + count for length, count in zip(self.lengths, self.num_unread, strict=True)])

    def add_tokens(self, clips: list[int], num_new: list[int]) -> None:
        """Counts tokens that some clips have read; `num_new` has a number for every clip of the batch."""
        for clip in clips:
            self.lengths[clip] += num_new[clip]
            self.next_positions[clip] += num_new[clip]

    @torch.inference_mode()
    def count_from_first(self) -> None:
        """
        Turns keys so that positions count from the first token held, as they do until something is forgotten.

        In a stream that is cropped, positions would else grow without end, and their angles lose all precision.
        """
        for clip, (position, length) in enumerate(zip(self.next_positions, self.lengths, strict=True)):
            if position > length:
                angles = (position - length) * self.frequencies.cpu().double()
                for keys in self.keys[:, :, clip, :length]:
                    keys.copy_(_turned_back(keys, angles))
                self.next_positions[clip] = length

    def reserve(self, num_tokens: int, is_by_feature: bool) -> None:
        """
        Makes room for further tokens of every clip; grows by half at least, so that copies stay rare.

        `is_by_feature` says how new memory holds keys, which changes nothing but the speed of what reads them: all places
        of a feature after each other, or all features of a place.
        """
        held, capacity = max(self.lengths), self.keys.shape[3]
        if held + num_tokens > capacity:
            capacity = max(held + num_tokens, capacity * 3 // 2)
            *sizes, _, size = self.keys.shape
            keys, values = (self.keys.new_empty(*sizes, capacity, size) for _ in range(2))
            if is_by_feature:
                keys = keys.view(*sizes, size, capacity).mT
            for grown, states in ((keys, self.keys), (values, self.values)):
                grown[:, :, :, :held] = states[:, :, :, :held]
            self.keys, self.values = keys, values


def _turned_back(keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turns keys `(.., head size)` back by angles `(head size / 2,)`; the halves of the features are the pairs."""
    precise = torch.promote_types(keys.dtype, torch.float32)
    cos, sin = (part.to(keys.device, precise) for part in (angles.cos(), angles.sin()))
    first, second = keys.to(precise).chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


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
        is_kept = use_cache or past_key_values is not None
        cache = GazeCache() if past_key_values is None else past_key_values
        self._check_cache(cache, len(frames))
        vision, convolutions = self.embed_video(frames, cache.convolutions)
        # Weights may lie elsewhere, and be held in another precision, than what is computed with them.
        self._prepare_cache(cache, len(frames), like=vision).convolutions = convolutions
        cache.count_from_first()
        # Every patch of the budget will be read; with a threshold, frames may end long before.
        num_tokens = len(budget) * vision.shape[2]
        num_tokens += self.config.decoder_config.num_multi_token_pred
        num_tokens += int(budget.sum() if threshold is None else budget.max())
        meter = self._meter(frames, cache) if is_kept or threshold is not None else None
        sampling = {"temperature": temperature if do_sample else None, "generator": generator}

        ids, is_real, slots = [], [], []
        # Thousands of small operations, a tenth quicker without autograd's notes. What leaves is a copy, free of the mode.
        with torch.inference_mode(), self._decode_steps(cache, num_tokens, is_kept, **sampling) as steps:
            for frame, num_patches in enumerate(budget.tolist()):
                limit = None if threshold is None else threshold[:, frame]
                at_frame = self._gaze_at_frame(steps, vision[:, frame], num_patches, limit, cache, meter)
                ids.append(at_frame[0] + frame * grid.num_patches)
                is_real.append(at_frame[1])
                slots.append(at_frame[2])
            cache.reconstruction = None if meter is None else meter.standing.clone()
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
            given = gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame
            scores = self(frames, *given, return_dict=True)
            gaze = gaze.replace(
                log_action_probs=scores.log_action_probs, task_loss_prediction=scores.task_loss_prediction
            )
        return gaze

    @contextmanager
    def _decode_steps(
        self,
        cache: GazeCache,
        num_tokens: int,
        is_kept: bool,
        temperature: float | None,
        generator: torch.Generator | None,
    ) -> Iterator[DecodeSteps | GraphedSteps]:
        """Lends what decodes a batch: on CUDA steps that are replayed as graphs, where that can be."""
        if temperature is None and self._replays_steps():
            with graphed_steps(self, len(cache.lengths)) as graphed:
                if graphed is not None:
                    yield graphed.attach(cache, num_tokens, is_kept)
                    graphed.finish()
                    return
        decoder = FusedDecoder(self.gaze_decoder, self.config._attn_implementation, like=cache.keys)
        yield DecodeSteps(decoder, cache, num_tokens, self.config.decoding_positions, temperature, generator)

    @functools.cached_property
    def _composite(self) -> CompositeReconstruction:
        return CompositeReconstruction(self.config.grid)

    def _meter(self, frames: torch.Tensor, cache: GazeCache) -> FrameMeter | None:
        """Gives what measures the frames of clips, where measuring is what ends them."""
        if self.config.stopping == "predicted":
            return None
        frames = resize_frames(frames[:, :: self.config.frame_sampling_rate], self.config.grid.sizes[-1])
        pixels = frames_to_pixels(frames, *pixel_scale_and_offset(self.config))
        return FrameMeter(self._composite, pixels, cache.reconstruction)

    def _replays_steps(self) -> bool:
        # In training weights change all the time, and with them the graphs.
        device = self.device.type
        return device == "cuda" and not self.training and not torch.is_autocast_enabled(device)

    def _gaze_at_frame(
        self,
        steps: DecodeSteps | GraphedSteps,
        vision: torch.Tensor,
        budget: int,
        threshold: torch.Tensor | None,
        cache: GazeCache,
        meter: FrameMeter | None,
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

        steps.begin_frame(vision)
        if meter is not None:
            meter.begin_frame()
        active = list(range(batch_size))
        for start in range(0, budget, step_size):
            stop = min(start + step_size, budget)
            chosen, losses = steps.propose(stop - start)
            for clip in active:
                num_slots[clip] = stop
            rows = slice(None) if len(active) == batch_size else active
            if threshold is None:
                meets = None
                going_on = list(range(len(active))) if stop < budget else []
                ids[rows, start:stop], is_real[rows, start:stop] = chosen, True
            else:
                # Row i predicts the loss that stands before slot i, so a slot that comes after enough is padding.
                losses = losses if meter is None else meter.losses(active, chosen)
                meets = losses <= threshold[rows, None]
                if start == 0:
                    meets[:, 0] = False
                ends = meets.any(dim=1).tolist()  # the only wait for the device in a step
                going_on = [row for row, end in enumerate(ends) if not end] if stop < budget else []
                # Measured losses include the one after the last slot, which may end the frame but has no slot.
                meets = meets[:, : stop - start]
                ids[rows, start:stop] = chosen.masked_fill(meets, end_id)
                is_real[rows, start:stop] = ~meets
            if len(going_on) < len(active):
                self._keep_unread(cache, chosen, meets, active, set(going_on))
            if not going_on:
                if meter is not None:
                    meter.end_frame(ids)
                return ids[:, :stop], is_real[:, :stop], num_slots
            steps.go_on(going_on)
            active = [active[row] for row in going_on]

    @staticmethod
    def _check_cache(cache: GazeCache, batch_size: int) -> None:
        if not isinstance(cache, GazeCache):
            raise ValueError(f"`past_key_values` must be a GazeCache, got {type(cache).__name__}")
        if cache.batch_size not in (None, batch_size):
            raise ValueError(
                f"`past_key_values` holds {cache.batch_size} clips, but {batch_size} are given now (tiles count); "
                "pass the frames of the same clips, or a new GazeCache"
            )

    def _prepare_cache(self, cache: GazeCache | None, batch_size: int, like: torch.Tensor | None = None) -> GazeCache:
        """Makes a cache ready for clips of which it holds nothing; keys and values have the device and dtype of `like`."""
        cache = GazeCache() if cache is None else cache
        if cache.batch_size is None:
            config, decoder = self.config.decoder_config, self.gaze_decoder
            like = decoder.lm_head.weight if like is None else like
            size = (config.num_hidden_layers, config.num_key_value_heads, batch_size, 0, config.head_dim)
            cache.keys, cache.values = like.new_empty(size), like.new_empty(size)
            cache.frequencies = decoder.model.rotary_emb.inv_freq
            cache.lengths, cache.next_positions, cache.num_unread = ([0] * batch_size for _ in range(3))
            shape = (batch_size, config.num_multi_token_pred)
            cache.unread_ids = torch.full(shape, self.config.end_id, device=like.device)
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
