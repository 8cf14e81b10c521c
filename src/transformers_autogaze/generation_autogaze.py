"""
The decode loop of AutoGaze and the cache of a stream.

A decoding step has two implementations, which share the arithmetic of the decoder:

    generate -> GazeDecoding._gaze: loop over frames and steps (this module)
     +-- GraphedSteps (`graphed_steps_autogaze`): fixed shapes, replayed as CUDA graphs (`cuda_graphs_autogaze`);
     |     on CUDA, greedy, in evaluation mode, without autocast or adapters, and one thread at a time
     +-- DecodeSteps (`decode_steps_autogaze`): the true lengths of clips; in all other cases
    both -> FusedDecoder (`fused_decoder_autogaze`): layers and heads as fused matrix products
    forward, which scores a given gaze -> LlamaModel (`modeling_autogaze`)
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .composite_autogaze import CompositeReconstruction
from .configuration_autogaze import AutoGazeConfig
from .decode_steps_autogaze import DecodeSteps
from .fused_decoder_autogaze import AutoGazeDecoder, FusedDecoder
from .gazing_autogaze import GazeOutput
from .graphed_steps_autogaze import GraphedSteps, graphed_steps
from .measured_stopping_autogaze import FrameLossTracker
from .selection_autogaze import GazeSelector, check_cache, frames_to_pixels, pixel_scale_and_offset, resize_frames


class GazeCache:
    """
    State of a batch of streams, with which `generate` continues them.

    See docs/specification.md, section 6.

    It holds the decoder's keys and values of each clip without padding, the last inputs of every causal convolution, and the
    chosen patches that the decoder has not read yet. Pass it as `past_key_values`; every call extends it. In float32 and
    float64, a stream gets exactly the patches of the whole clip. In bfloat16 and float16 it gets nearly all of them, as
    convolutions round a clip differently from single frames.

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
        """Empties the cache, to start with new clips."""
        self.keys: torch.Tensor | None = None
        """`(layers, key/value heads, batch, capacity, head size)`; clip `b` has `lengths[b]` tokens."""
        self.values: torch.Tensor | None = None
        self.frequencies: torch.Tensor | None = None
        """`(head size / 2,)`: inverse frequencies of the rotary position embedding."""
        self.lengths: list[int] = []
        """Cached tokens of each clip."""
        self.next_positions: list[int] = []
        """Position of each clip's next token."""
        self.frame_starts: list[list[int]] = []
        """Index of the first vision token, for each frame and clip."""
        self.convolutions: list[torch.Tensor] = []
        """Last inputs of each block, `(batch, channels, temporal kernel - 1, rows, columns)`."""
        self.unread_ids: torch.Tensor | None = None
        """`(batch, k)`: the patches chosen last, in order, which the decoder has not read."""
        self.num_unread: list[int] = []
        """Number of unread patches of each clip."""
        self.reconstruction: torch.Tensor | None = None
        """`(batch, 3, height, width)`: reconstruction of the last frame, if losses are measured."""

    @property
    def num_frames(self) -> int:
        """Number of cached frames."""
        return len(self.frame_starts)

    @property
    def batch_size(self) -> int | None:
        """Number of clips; `None` while the cache is empty."""
        return len(self.lengths) or None

    @torch.inference_mode()
    def crop(self, num_frames: int) -> None:
        """
        Drops the oldest frames, so that memory and time per frame stay bounded in an endless stream.

        The next call counts positions from the first frame that is kept, so its choice does not depend on the number of
        dropped frames. The convolutions keep their last inputs.

        Args:
            num_frames (`int`): number of latest frames to keep, at least 0.

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
                # Cloned first, as source and target overlap.
                layer[:, clip, : length - start] = layer[:, clip, start:length].clone()
        self.frame_starts = [
            [place - start for place, start in zip(frame, starts, strict=True)]
            for frame in self.frame_starts[self.num_frames - num_frames :]
        ]
        self.lengths = [length - start for length, start in zip(self.lengths, starts, strict=True)]
        if num_frames == 0:
            self.num_unread = [0] * len(self.lengths)

    def begin_frame(self) -> None:
        """Records where the vision tokens of a new frame start: after the unread patches of the previous one."""
        self.frame_starts.append([length + count for length, count in zip(self.lengths, self.num_unread, strict=True)])

    def add_tokens(self, clips: list[int], num_new: list[int]) -> None:
        """Counts the tokens that some clips have read; `num_new` has an entry for every clip of the batch."""
        for clip in clips:
            self.lengths[clip] += num_new[clip]
            self.next_positions[clip] += num_new[clip]

    @torch.inference_mode()
    def count_from_first(self) -> None:
        """
        Rotates the cached keys so that positions count from the first cached token.

        Otherwise the positions of a cropped stream would grow without bound, and their angles lose precision.
        """
        for clip, (position, length) in enumerate(zip(self.next_positions, self.lengths, strict=True)):
            if position > length:
                angles = (position - length) * self.frequencies.cpu().double()
                for keys in self.keys[:, :, clip, :length]:
                    keys.copy_(_rotate_back(keys, angles))
                self.next_positions[clip] = length

    def reserve(self, num_tokens: int, is_by_feature: bool) -> None:
        """
        Reserves memory for further tokens of every clip. It grows by at least a half, so that copies stay rare.

        Args:
            num_tokens (`int`): number of further tokens per clip.
            is_by_feature (`bool`):
                Memory layout of new keys: all tokens of a feature are contiguous, or all features of a token. It affects
                speed only.
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


def _rotate_back(keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates keys `(.., head size)` by negative angles `(head size / 2,)`, in the layout of `rotate_half`."""
    precise = torch.promote_types(keys.dtype, torch.float32)
    cos, sin = (part.to(keys.device, precise) for part in (angles.cos(), angles.sin()))
    first, second = keys.to(precise).chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class GazeDecoding(GazeSelector):
    """Mixin of [`AutoGazeModel`] with its decode loop."""

    config: AutoGazeConfig
    gaze_decoder: AutoGazeDecoder
    training: bool

    if TYPE_CHECKING:  # defined by [`AutoGazeModel`]

        @property
        def dtype(self) -> torch.dtype: ...

        def embed_video(
            self, frames: torch.Tensor, past: list[torch.Tensor] | None = None
        ) -> tuple[torch.Tensor, list[torch.Tensor]]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

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
            raise ValueError("`output_scores` must be False when `past_key_values` continues a stream")
        grid = self.config.grid
        is_kept = use_cache or past_key_values is not None
        cache = GazeCache() if past_key_values is None else past_key_values
        check_cache(cache, GazeCache, len(frames))
        vision, convolutions = self.embed_video(frames, cache.convolutions)
        # The cache is like the vision tokens, as weights may be offloaded or have another dtype.
        self._prepare_cache(cache, len(frames), like=vision).convolutions = convolutions
        cache.count_from_first()
        # Without a threshold, all patches of the budget will be read; with one, frames usually end much earlier.
        num_tokens = len(budget) * vision.shape[2]
        num_tokens += self.config.decoder_config.num_multi_token_pred
        num_tokens += int(budget.sum() if threshold is None else budget.max())
        tracker = self._loss_tracker(frames, cache) if is_kept or threshold is not None else None
        sampling: dict[str, Any] = {"temperature": temperature if do_sample else None, "generator": generator}

        ids, is_real, slots = [], [], []
        # Inference mode makes thousands of small operations a tenth faster. The tensors of the gaze are created outside it.
        with torch.inference_mode(), self._decode_steps(cache, num_tokens, is_kept, **sampling) as steps:
            for frame, num_patches in enumerate(budget.tolist()):
                limit = None if threshold is None else threshold[:, frame]
                chosen = self._gaze_at_frame(steps, vision[:, frame], num_patches, limit, cache, tracker)
                ids.append(chosen[0] + frame * grid.num_patches)
                is_real.append(chosen[1])
                slots.append(chosen[2])
            cache.reconstruction = None if tracker is None else tracker.reconstruction.clone()
        gaze = GazeOutput.from_ids(
            torch.cat(ids, dim=1),
            ~torch.cat(is_real, dim=1),
            torch.tensor([frame_ids.shape[1] for frame_ids in ids], device=frames.device),
            grid,
            self.config.frame_sampling_rate,
            clip_num_gazing_each_frame=torch.tensor(slots, device=frames.device).T,
            cache=cache if use_cache else None,
        )
        return self._with_scores(gaze, frames) if output_scores else gaze

    def _with_scores(self, gaze: GazeOutput, frames: torch.Tensor) -> GazeOutput:
        scores = self(frames, gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame, return_dict=True)
        return gaze.replace(log_action_probs=scores.log_action_probs, task_loss_prediction=scores.task_loss_prediction)

    @contextmanager
    def _decode_steps(
        self,
        cache: GazeCache,
        num_tokens: int,
        is_kept: bool,
        temperature: float | None,
        generator: torch.Generator | None,
    ) -> Iterator[DecodeSteps | GraphedSteps]:
        """Yields the decoding steps of a batch: graphed ones where possible, as the figure at the top of this module shows."""
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

    def _loss_tracker(self, frames: torch.Tensor, cache: GazeCache) -> FrameLossTracker | None:
        """Returns the tracker of measured losses; `None` if predicted losses end frames."""
        if self.config.stopping == "predicted":
            return None
        frames = resize_frames(frames[:, :: self.config.frame_sampling_rate], self.config.grid.sizes[-1])
        pixels = frames_to_pixels(frames, *pixel_scale_and_offset(self.config))
        return FrameLossTracker(self._composite, pixels, cache.reconstruction)

    def _replays_steps(self) -> bool:
        # In training, weights change with every step, and graphs would have to be captured again.
        device = self.device.type
        return device == "cuda" and not self.training and not torch.is_autocast_enabled(device)

    def _gaze_at_frame(
        self,
        steps: DecodeSteps | GraphedSteps,
        vision: torch.Tensor,
        budget: int,
        threshold: torch.Tensor | None,
        cache: GazeCache,
        tracker: FrameLossTracker | None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """
        Chooses patches of one frame, given its vision tokens `(batch, tokens, hidden)`.

        Returns ids `(batch, slots)`, counted from the first patch of the frame and the end id where a slot is padding; a
        mask `(batch, slots)` that is true where a slot is real; and the number of slots that each clip took.
        """
        batch_size, end_id = len(vision), self.config.end_id
        step_size = self.config.decoder_config.num_multi_token_pred
        ids = vision.new_full((batch_size, budget), end_id, dtype=torch.long)
        is_real = torch.zeros_like(ids, dtype=torch.bool)
        num_slots = [0] * batch_size

        steps.begin_frame(vision)
        if tracker is not None:
            tracker.begin_frame()
        active, start = list(range(batch_size)), 0
        while True:
            stop = min(start + step_size, budget)
            chosen, losses = steps.propose(stop - start)
            for clip in active:
                num_slots[clip] = stop
            clips = slice(None) if len(active) == batch_size else active
            if threshold is None:
                is_padding = None
                continuing = list(range(len(active))) if stop < budget else []
                ids[clips, start:stop], is_real[clips, start:stop] = chosen, True
            else:
                # Entry i is the loss before slot i, which is padding if that loss meets the threshold already.
                losses = losses if tracker is None else tracker.add_patches(active, chosen)
                is_padding = losses <= threshold[clips, None]
                if start == 0:
                    is_padding[:, 0] = False
                has_ended = is_padding.any(dim=1).tolist()  # the only synchronisation with the device in a step
                continuing = [index for index, ended in enumerate(has_ended) if not ended] if stop < budget else []
                # Measured losses include that after the last slot, which may end the frame but has no slot.
                is_padding = is_padding[:, : stop - start]
                ids[clips, start:stop] = chosen.masked_fill(is_padding, end_id)
                is_real[clips, start:stop] = ~is_padding
            if len(continuing) < len(active):
                self._store_unread(cache, chosen, is_padding, active, set(continuing))
            if not continuing:
                if tracker is not None:
                    tracker.end_frame(ids)
                return ids[:, :stop], is_real[:, :stop], num_slots
            steps.read_chosen(continuing)
            active = [active[index] for index in continuing]
            start = stop

    def _prepare_cache(self, cache: GazeCache | None, batch_size: int, like: torch.Tensor | None = None) -> GazeCache:
        """Allocates an empty cache for a batch; keys and values have the device and dtype of `like`."""
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
    def _store_unread(
        cache: GazeCache,
        chosen: torch.Tensor,
        is_padding: torch.Tensor | None,
        active: list[int],
        continuing: set[int],
    ) -> None:
        """Stores the last patches of the clips whose frame ends; they are read together with the next frame."""
        ended = [index for index in range(len(active)) if index not in continuing]
        clips = [active[index] for index in ended]
        # Slices where all end together, as without a threshold: indexing by a list would synchronise with the device.
        source = slice(None) if len(ended) == len(active) else ended
        target = slice(None) if len(clips) == len(cache.num_unread) else clips
        ids, counts = chosen[source], [chosen.shape[1]] * len(ended)
        if is_padding is not None:
            order = torch.argsort(is_padding[source].byte(), dim=1, stable=True)
            ids = ids.gather(1, order)
            counts = (~is_padding[source]).sum(dim=1).tolist()
        cache.unread_ids[target, : ids.shape[1]] = ids
        for clip, count in zip(clips, counts, strict=True):
            cache.num_unread[clip] = count
