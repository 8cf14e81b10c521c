"""
[`GazeVisionModel`]: vision towers of transformers on the kept patches of videos.

It embeds the kept patches as one packed sequence and runs the tower's own layers on it. `vision_adapters` finds the modules of
each tower; `packed_attention` and `canvas` plan the attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import ModelOutput

from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from .canvas import Canvas, plan_canvas, tokens_at_places
from .packed_attention import ATTENTION_CHOICES, Extend, PackedAttention, packed_attention, run_checkpointed
from .vision_adapters import ADAPTERS, VisionAdapter, find_tower
from .vision_cache import GazeVisionCache
from .vision_sequence import KeptTokens, PackedSequence
from .wrapping import ModelWrapper, hub_arguments, read_wrapper_file


@dataclass
class GazeVisionOutput(ModelOutput):
    """
    Features of the kept patches of all clips, concatenated without padding.

    A clip's patches are in the order of the gaze's slots. For a tower with tubelets, whose frames have a common gaze, they
    are sorted by tubelet and id.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(tokens, hidden)`):
            The tower's own `last_hidden_state`, of patches only.
        lengths (`torch.LongTensor` of shape `(batch,)`):
            Number of tokens of each clip.
        frame (`torch.LongTensor` of shape `(tokens,)`):
            Index of the token's frame in the gaze, or of its tubelet for a tower with tubelets.
        scale (`torch.LongTensor` of shape `(tokens,)`):
            Index of its scale, coarse to fine.
        ids (`torch.LongTensor` of shape `(tokens,)`):
            Its patch id, counted from the first patch of the frame.
        boxes (`torch.FloatTensor` of shape `(tokens, 4)`):
            Left, top, right and bottom as shares of the frame, 0..1.
        hidden_states (`tuple[torch.FloatTensor]` of shape `(tokens, hidden)`, *optional*):
            With `output_hidden_states`: the input of the first layer and the output of every layer, before the final
            norm.
        prefix_hidden_state (`torch.FloatTensor` of shape `(batch, frames, prefix, hidden)`, *optional*):
            For towers with prefix tokens: the last hidden states of each frame's CLS, distillation and register tokens, in
            the tower's order; zeros for frames without kept patches.
        prefix_hidden_states (`tuple[torch.FloatTensor]` of that shape, *optional*):
            With `output_hidden_states`: the prefix tokens of `hidden_states`.
    """

    last_hidden_state: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    frame: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    prefix_hidden_state: torch.Tensor | None = None
    prefix_hidden_states: tuple[torch.Tensor, ...] | None = None

    def split(self, packed: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Splits a packed tensor, by default `last_hidden_state`, into one tensor per clip."""
        packed = self.last_hidden_state if packed is None else packed
        return list(packed.split(self.lengths.tolist()))

    def padded(self, packed: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Pads a packed tensor to a batch.

        Args:
            packed (`torch.Tensor` of shape `(tokens, ..)`, *optional*): by default `last_hidden_state`.

        Returns:
            `tuple`: the batch, `(batch, max length, ..)`, padded by zeros on the right, and a mask, a `torch.BoolTensor` of
            shape `(batch, max length)`, true for tokens.
        """
        batch = pad_sequence(self.split(packed), batch_first=True)
        index = torch.arange(batch.shape[1], device=batch.device)
        return batch, index < self.lengths.to(batch.device)[:, None]


class GazeVisionModel(ModelWrapper):
    """
    Wraps a vision tower, which then encodes only the kept patches of videos.

    The layers and weights of the tower are unchanged. Each kept patch is cut out of its frame, resized to the patch's
    scale, and embedded by the tower's own patch embedding. It gets the tower's positions, resized to that scale or, for
    rotary positions, computed at its centre. The tokens of all clips are concatenated, and no padding is computed
    (docs/specification.md, section 10). A tower's prefix tokens (CLS, registers) precede every frame with a kept patch.

    The tower itself is not modified: called directly, it works as before, and saving it writes the same files.

    Args:
        vision_model (`nn.Module`):
            A loaded model of transformers of one of the families SigLIP, SigLIP 2 (fixed resolution), CLIP, ViT, DeiT,
            DINOv2, DINOv2 with registers, DINOv3 ViT, VideoMAE or V-JEPA 2, or a model that contains one.
        scales (`Sequence[int | tuple[int, int]]`, *optional*):
            Sizes in pixels to resize frames to, coarse to fine, multiples of the tower's patch size. By default one scale,
            with the rows and columns of patches of the tower's images.
        attention (`str`, *optional*):
            The tokens of its clip that a token attends to: `"frame"`: those of its frame; `"canvas"`: those of its frame
            and, for every place where its frame kept nothing, the latest token that an earlier frame kept there, of several
            the finest, without prefix tokens; `"block_causal"`: those of its frame and of earlier ones; `"causal"`: itself
            and those before it; `"bidirectional"`: all. By default `"canvas"` for towers of images at one scale,
            `"block_causal"` for towers with tubelets or at several scales.

    Raises:
        ValueError: if the family is not supported, a scale is not a multiple of the patch size, the tower's patches are not
            square, or `attention` is none of these.

    Example:

    ```python
    >>> from transformers import SiglipVisionConfig, SiglipVisionModel
    >>> from transformers_autogaze import GazeOutput
    >>> from transformers_autogaze.integrations import GazeVisionModel

    >>> config = SiglipVisionConfig(
    ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16
    ... )
    >>> model = GazeVisionModel(SiglipVisionModel(config), scales=[16, 32, 64]).eval()
    >>> masks = [torch.zeros(1, 2, count, dtype=torch.bool) for count in model.grid.num_patches_each_scale]
    >>> masks[0][:, 0], masks[2][:, 1, 5] = True, True
    >>> gaze = GazeOutput.from_masks(masks, model.grid)
    >>> output = model(torch.randn(1, 2, 3, 64, 64), gaze)
    >>> output.last_hidden_state.shape, output.frame.tolist(), output.boxes[1].tolist()
    (torch.Size([2, 32]), [0, 1], [0.25, 0.25, 0.5, 0.5])

    ```
    """

    wrapped_name = "vision_model"
    main_input_name = "pixel_values_videos"

    def __init__(
        self,
        vision_model: nn.Module,
        scales: Sequence[int | tuple[int, int]] | None = None,
        attention: str | None = None,
    ):
        super().__init__()
        if attention is not None:
            _check_attention(attention)
        self._tower_name = find_tower(vision_model)
        self.vision_model = vision_model
        patch_size, other = self.adapter.patch_convolution.kernel_size[-2:]
        if patch_size != other:
            raise ValueError(f"`vision_model` must have square patches, got {patch_size}x{other} pixels")
        if scales is None:
            rows, cols = self.adapter.native_grid
            scales = [(rows * patch_size, cols * patch_size)]
        self.grid = GazeGrid(scales, patch_size)
        if attention is None:
            is_canvas = self.adapter.tubelet_size == 1 and len(self.grid.grids) == 1
            attention = "canvas" if is_canvas else "block_causal"
        self.attention = attention

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        scales: Sequence[int | tuple[int, int]] | None = None,
        attention: str | None = None,
        **kwargs: Any,
    ) -> "GazeVisionModel":
        """
        Loads a tower from the Hub or a folder; of a model for images and text, only its vision tower.

        From the files of [`~ModelWrapper.save_pretrained`] it loads the whole model, with its head and PEFT adapter if any.

        Args:
            pretrained_model_name_or_path (`str`): as for `AutoModel.from_pretrained`.
            scales, attention (*optional*): see [`GazeVisionModel`]; by default those that were saved.
            kwargs: further arguments of `AutoModel.from_pretrained`, such as `dtype`, `device_map` or
                `attn_implementation`.
        """
        name = pretrained_model_name_or_path
        wrapper_config = read_wrapper_file(name, cls, kwargs)
        if wrapper_config is not None:
            saved = wrapper_config["settings"]
            scales = saved["scales"] if scales is None else scales
            attention = saved["attention"] if attention is None else attention
            return cls(cls._load_wrapped(name, wrapper_config, kwargs), scales, attention).eval()
        config = kwargs.pop("config", None)
        if config is None:
            config = AutoConfig.from_pretrained(name, **hub_arguments(kwargs, "subfolder"))
        vision_config = getattr(config, "vision_config", None)
        if getattr(vision_config, "model_type", None) in ADAPTERS:
            config = vision_config
        return cls(AutoModel.from_pretrained(name, config=config, **kwargs), scales, attention)

    def _save_parts(self, folder: Path) -> dict[str, Any]:
        return {"settings": {"scales": self.grid.scales, "attention": self.attention}}

    @property
    def adapter(self) -> VisionAdapter:
        """The adapter that finds the tower's modules."""
        tower: Any = self.vision_model.get_submodule(self._tower_name)
        return ADAPTERS[tower.config.model_type](tower)

    @property
    def config(self) -> PreTrainedConfig:
        """The tower's own configuration."""
        return self.adapter.config

    @property
    def hidden_size(self) -> int:
        """Number of channels of the features."""
        return self.config.hidden_size

    def forward(
        self,
        pixel_values_videos: torch.Tensor,
        gaze: GazeOutput | Sequence[GazeOutput] | None = None,
        attention: str | None = None,
        output_hidden_states: bool = False,
        cache: GazeVisionCache | None = None,
    ) -> GazeVisionOutput:
        """
        Encodes the kept patches.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`):
                Frames with the tower's normalisation, of any size; they are resized to every scale bicubically, without
                antialiasing.
            gaze ([`GazeOutput`] or a sequence of them, *optional*):
                The kept patches: one batch for all clips, or one gaze per clip, on `self.grid`. By default all patches of
                the finest scale.
            attention (`str`, *optional*): as in [`GazeVisionModel`], for this call.
            output_hidden_states (`bool`, *optional*, defaults to `False`): whether to return the states of all layers.
            cache ([`GazeVisionCache`], *optional*):
                With `"canvas"` attention: the cache of earlier frames of the same clips, which is updated. Encoded frame by
                frame or in chunks, tokens get the same features as in the whole clip.

        Returns:
            [`GazeVisionOutput`]; its `frame` counts from the first of these frames.

        Raises:
            ValueError: if the frames are no such tensor, the gaze is for another grid or other numbers of clips or frames,
                the frames do not fill the tower's tubelets, or the cache does not fit the tower, the attention, the clips or
                the gaze, or is used in training.
        """
        adapter = self.adapter
        attention = self.attention if attention is None else attention
        _check_attention(attention)
        gaze = self._check(pixel_values_videos, gaze)
        if cache is not None and not isinstance(cache, GazeVisionCache):
            raise ValueError(f"`cache` must be a GazeVisionCache, got {type(cache).__name__}")
        if cache is not None:
            cache.check(adapter, self.grid, gaze, attention)
        tokens = self._list_tokens(gaze)
        hidden_states, sequence = self._embed_sequence(pixel_values_videos, gaze, tokens)
        rotary = self._rotary(tokens, sequence, hidden_states, 0 if cache is None else cache.num_times)
        canvas = None
        if attention == "canvas":
            plan, canvas = self._plan_canvas(tokens, sequence, None if cache is None else cache.canvas)
        else:
            plan = PackedAttention.for_clips(sequence.num_tokens, attention)
        states = [hidden_states]
        for index, layer in enumerate(adapter.layers):
            extend = None if cache is None else partial(cache.extend, index, canvas.tokens)
            hidden_states = self._run_layer(layer, hidden_states, plan, rotary, extend)
            if output_hidden_states:
                states.append(hidden_states)
        if adapter.final_norm is not None:
            hidden_states = adapter.final_norm(hidden_states)
        if cache is not None:
            cache.commit(adapter, self.grid, gaze, canvas, num_times=sequence.num_tokens.shape[1])
        return self._make_output(tokens, sequence, hidden_states, states if output_hidden_states else None)

    def _check(self, video: torch.Tensor, gaze: GazeOutput | Sequence[GazeOutput] | None) -> GazeOutput:
        """Checks frames and gaze before any computation, and returns the gaze on the frames' device."""
        if not isinstance(video, torch.Tensor) or video.ndim != 5 or not video.is_floating_point():
            got = f"{video.dtype} {tuple(video.shape)}" if isinstance(video, torch.Tensor) else type(video).__name__
            raise ValueError(
                "`pixel_values_videos` must be normalised floats (batch, frames, channels, height, width), got " + got
            )
        batch_size, num_frames, channels = video.shape[:3]
        if channels != (in_channels := self.adapter.patch_convolution.in_channels):
            raise ValueError(
                f"`pixel_values_videos` must have {in_channels} channels, got the shape {tuple(video.shape)}"
            )
        tubelet = self.adapter.tubelet_size
        if self.adapter.num_frames not in (None, num_frames):
            raise ValueError(
                f"`pixel_values_videos` must hold {self.adapter.num_frames} frames, which the tower has positions for, "
                f"got {num_frames}"
            )
        if num_frames % tubelet:
            raise ValueError(
                f"`pixel_values_videos` must hold a multiple of {tubelet} frames, which one token of the tower covers, "
                f"got {num_frames}"
            )
        if gaze is None:
            gaze = GazeOutput.full(self.grid, batch_size, num_frames, scale=-1)
        if not isinstance(gaze, GazeOutput):
            gaze = GazeOutput.stack(gaze)
        if gaze.grid != self.grid:
            raise ValueError(
                f"`gaze` must be for the scales {self.grid.scales} and patch size {self.grid.patch_size} of the tower, "
                f"got {gaze.grid.scales} and {gaze.grid.patch_size}; give those to `generate` as `target_scales` and "
                "`target_patch_size`, or these scales to GazeVisionModel"
            )
        covered = gaze.num_frames * gaze.frame_sampling_rate
        if (gaze.batch_size, covered) != (batch_size, num_frames):
            raise ValueError(
                f"`gaze` must be for {batch_size} clips of {num_frames} frames as `pixel_values_videos` is, got "
                f"{gaze.batch_size} of {covered}"
            )
        return gaze.to(video.device)

    def _list_tokens(self, gaze: GazeOutput) -> KeptTokens:
        """Lists the kept patches, clip by clip and frame by frame."""
        tubelet = self.adapter.tubelet_size
        if tubelet == 1:
            clip, slot = (~gaze.if_padded_gazing).nonzero(as_tuple=True)
            frame = gaze.frame_of_slot[slot]
            ids = gaze.gazing_pos[clip, slot] - frame * self.grid.num_patches
            return KeptTokens(clip, frame, ids, gaze.num_real_each_frame)
        mask = torch.cat(gaze.gazing_mask, dim=-1).repeat_interleave(gaze.frame_sampling_rate, dim=1)
        mask = mask.unflatten(1, (-1, tubelet)).any(2)
        clip, frame, ids = mask.nonzero(as_tuple=True)
        return KeptTokens(clip, frame, ids, mask.sum(-1))

    def _rotary(
        self, tokens: KeptTokens, sequence: PackedSequence, hidden_states: torch.Tensor, first_time: int
    ) -> Any:
        """Computes the rotary positions, with frames counted from `first_time`; see [`VisionAdapter.rotary`]."""
        ids = torch.full((hidden_states.shape[1],), -1, device=tokens.ids.device)
        time = torch.zeros_like(ids)
        ids[sequence.patch_index], time[sequence.patch_index] = tokens.ids, tokens.frame + first_time
        return self.adapter.rotary(self.grid, ids, time, hidden_states.dtype)

    def _plan_canvas(
        self, tokens: KeptTokens, sequence: PackedSequence, canvas: Canvas | None
    ) -> tuple[PackedAttention, Canvas]:
        """Plans attention to the canvas, and returns the canvas after the last frame."""
        num_tokens, device = sequence.num_tokens, tokens.ids.device
        token_of_patch = torch.full((*num_tokens.shape, self.grid.num_patches), -1, device=device)
        token_of_patch[tokens.clip, tokens.frame, tokens.ids] = sequence.patch_index
        patch_at = self.grid.patches_at(*self.grid.grids[-1], device=device).flatten(1)
        first_token = (num_tokens.flatten().cumsum(0) - num_tokens.flatten()).view_as(num_tokens)
        return plan_canvas(tokens_at_places(token_of_patch, patch_at), first_token, num_tokens, canvas)

    def _make_output(
        self, tokens: KeptTokens, sequence: PackedSequence, last_state: torch.Tensor, states: list[torch.Tensor] | None
    ) -> GazeVisionOutput:
        """Selects the hidden states of patches and prefix tokens on the device of the frames."""
        has_prefix = sequence.prefix_index.shape[1] > 0
        return GazeVisionOutput(
            last_hidden_state=sequence.select_patches(last_state),
            lengths=tokens.num_each_frame.sum(1),
            frame=tokens.frame,
            scale=self.grid.locate(tokens.ids)[0],
            ids=tokens.ids,
            boxes=self.grid.boxes(tokens.ids, height=1, width=1),
            hidden_states=None if states is None else tuple(map(sequence.select_patches, states)),
            prefix_hidden_state=sequence.select_prefix(last_state) if has_prefix else None,
            prefix_hidden_states=tuple(map(sequence.select_prefix, states))
            if has_prefix and states is not None
            else None,
        )

    def _select_frames(self, video: torch.Tensor, gaze: GazeOutput) -> torch.Tensor:
        """Returns the frames to encode, `(batch, encoded, tubelet, channels, height, width)`."""
        tubelet = self.adapter.tubelet_size
        return video[:, :: gaze.frame_sampling_rate, None] if tubelet == 1 else video.unflatten(1, (-1, tubelet))

    def _embed_sequence(
        self, video: torch.Tensor, gaze: GazeOutput, tokens: KeptTokens
    ) -> tuple[torch.Tensor, PackedSequence]:
        """Computes the input of the first layer, `(1, tokens, hidden)`, and the indices of its tokens."""
        adapter = self.adapter
        with _offloaded_weights(adapter.embeddings):
            patches = self._embed(self._select_frames(video, gaze), tokens)
            prefix = adapter.prefix()
            num_prefix = 0 if prefix is None else len(prefix)
            sequence = tokens.pack(num_prefix)
            hidden_states = patches
            if num_prefix:
                prefix = prefix.to(video.device, patches.dtype).repeat(len(sequence.prefix_index), 1)
                order = torch.cat([sequence.patch_index, sequence.prefix_index.flatten()]).argsort()
                hidden_states = torch.cat([patches, prefix])[order]
            return adapter.finish_embedding(hidden_states[None]), sequence

    def _embed(self, frames: torch.Tensor, tokens: KeptTokens) -> torch.Tensor:
        """Embeds the kept patches, `(patches, hidden)`, with learned positions."""
        adapter = self.adapter
        num_encoded, tubelet = frames.shape[1:3]
        image = ((tokens.clip * num_encoded + tokens.frame) * tubelet)[:, None]
        image = image + torch.arange(tubelet, device=image.device)
        ids = tokens.ids[:, None].expand_as(image)
        patches = self.grid.cut_patches(frames.flatten(0, 2), image.flatten(), ids.flatten())
        patches = patches.to(adapter.patch_convolution.weight.dtype)
        if isinstance(adapter.patch_convolution, nn.Conv3d):
            patches = patches.unflatten(0, tuple(image.shape)).transpose(1, 2)
        embedded = adapter.patch_embedding(patches).flatten(1).to(tokens.ids.device)
        positions = adapter.positions(self.grid)
        if positions is None:
            return embedded
        positions = positions.to(embedded.device, embedded.dtype)
        return embedded + positions[tokens.frame if len(positions) > 1 else 0, tokens.ids]

    def _run_layer(
        self,
        layer: nn.Module,
        hidden_states: torch.Tensor,
        plan: PackedAttention,
        rotary: Any,
        extend: Extend | None,
    ) -> torch.Tensor:
        adapter = self.adapter
        if not hidden_states.shape[1]:  # Layers take no empty sequences.
            return hidden_states

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            with packed_attention(layer, plan, extend):
                return adapter.run_layer(layer, hidden_states, rotary)

        return run_checkpointed(layer, run, hidden_states)


def _check_attention(attention: str) -> None:
    if attention not in ATTENTION_CHOICES:
        raise ValueError(f"`attention` must be one of {', '.join(ATTENTION_CHOICES)}, got {attention!r}")


@contextmanager
def _offloaded_weights(module: nn.Module) -> Iterator[None]:
    """Loads weights that accelerate has offloaded, for a module whose weights are used outside its `forward`."""
    hooked = [part for part in module.modules() if hasattr(part, "_hf_hook")]
    if not hooked:
        yield
        return
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for part in hooked:
            stack.enter_context(align_module_device(part))
        yield
