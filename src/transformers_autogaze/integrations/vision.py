"""
Gazed patches into any Hugging Face ViT.

This module turns frames and a gaze into the sequence of tokens that a tower would have made of the kept patches alone, and
runs the tower's own layers on it. Where a tower keeps its parts is a matter of `vision_adapters`, who attends to whom one
of `packed_attention`.
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
from .wrapping import ModelWrapper, hub_arguments, read_wrapper_file


@dataclass
class GazeVisionOutput(ModelOutput):
    """
    Features of the kept patches: all clips one behind the other, without padding.

    A clip's patches stand in the order of the gaze's slots; for a tower with tubelets, whose frames share one gaze, tubelet
    by tubelet and by id.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(tokens, hidden)`):
            What the tower gives as its own `last_hidden_state`; of the patches only.
        lengths (`torch.LongTensor` of shape `(batch,)`):
            Tokens of each clip.
        frame (`torch.LongTensor` of shape `(tokens,)`):
            Frame of the gaze that a token belongs to, or its tubelet for a tower that has them.
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
            For towers that have prefix tokens: the last state of each frame's own CLS, distillation and register tokens,
            in the tower's order; zeros for a frame that kept nothing.
        prefix_hidden_states (`tuple[torch.FloatTensor]` of that shape, *optional*):
            With `output_hidden_states`: the same beside `hidden_states`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    lengths: torch.LongTensor | None = None
    frame: torch.LongTensor | None = None
    scale: torch.LongTensor | None = None
    ids: torch.LongTensor | None = None
    boxes: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    prefix_hidden_state: torch.FloatTensor | None = None
    prefix_hidden_states: tuple[torch.FloatTensor, ...] | None = None

    def split(self, packed: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Cuts what is packed, `last_hidden_state` unless given, into one tensor per clip."""
        packed = self.last_hidden_state if packed is None else packed
        return list(packed.split(self.lengths.tolist()))

    def padded(self, packed: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Makes a batch of what is packed.

        Args:
            packed (`torch.Tensor` of shape `(tokens, ..)`, *optional*): `last_hidden_state` unless given.

        Returns:
            `tuple`: the batch, `(batch, longest, ..)` with zeros behind each clip, and a mask, a `torch.BoolTensor` of
            shape `(batch, longest)`, true where tokens are.
        """
        batch = pad_sequence(self.split(packed), batch_first=True)
        place = torch.arange(batch.shape[1], device=batch.device)
        return batch, place < self.lengths.to(batch.device)[:, None]


@dataclass
class _Tokens:
    """The kept patches of a batch and where they lie in the sequence; frames are tubelets where a tower has those."""

    clip: torch.Tensor
    frame: torch.Tensor
    ids: torch.Tensor
    num_each_frame: torch.Tensor  # (batch, frames)

    def places(self, num_prefix: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gives the places of patches and of prefix tokens, `(shown frames, prefix)`, and all tokens each frame."""
        shown = self.num_each_frame.flatten() > 0
        num_tokens = (self.num_each_frame.flatten() + num_prefix) * shown
        starts = num_tokens.cumsum(0) - num_tokens
        device = self.ids.device
        prefix = starts[shown, None] + torch.arange(num_prefix, device=device)
        is_patch = torch.ones(int(num_tokens.sum()), dtype=torch.bool, device=device)
        is_patch[prefix.flatten()] = False
        return is_patch.nonzero().squeeze(1), prefix, num_tokens.view_as(self.num_each_frame)


class GazeVisionModel(ModelWrapper):
    """
    A vision tower that sees the kept patches of a video and nothing else.

    It uses the layers and weights of the tower as they are. Each kept patch is cut out of its frame, resized to the patch's
    scale, and embedded by the tower's own patch embedding; it gets the tower's positions, resized to that scale or, for
    rotary ones, taken at its true centre. Tokens of one clip form one sequence, clips of a batch lie one behind the other,
    and no padding is ever computed (docs/specification.md, section 10). A tower's prefix tokens (CLS, registers) stand
    before every frame that kept a patch.

    The tower itself stays what it is: called directly, it works as before, and saving it gives the same files.

    Args:
        vision_model (`nn.Module`):
            A loaded model of transformers of one of the families SigLIP, SigLIP 2 (fixed resolution), CLIP, ViT, DeiT,
            DINOv2, DINOv2 with registers, DINOv3 ViT, VideoMAE or V-JEPA 2, or a model that holds one.
        scales (`Sequence[int | tuple[int, int]]`, *optional*):
            Sizes in pixels that frames are seen at, coarse to fine, multiples of the tower's patch size. By default one
            scale: the rows and columns of patches that the tower was made for.
        attention (`str`, *optional*):
            Which tokens of its clip a token sees: `"frame"` those of its frame; `"canvas"` those of its frame and, for
            every place where its frame kept nothing, the latest token that an earlier frame kept there, the finest over
            the place, prefix tokens left out; `"block_causal"` those of its frame and of earlier ones; `"causal"` itself
            and those before it; `"bidirectional"` all. By default `"canvas"` for towers of images at one scale,
            `"block_causal"` for towers with tubelets or at several scales.

    Raises:
        ValueError: if the family is not known, a scale is no multiple of the patch size, the tower's patches are not
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
            is_alike = self.adapter.tubelet_size == 1 and len(self.grid.grids) == 1
            attention = "canvas" if is_alike else "block_causal"
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
        Loads a tower from the Hub or a folder; of a model for pictures and text, only its vision part.

        What [`~ModelWrapper.save_pretrained`] wrote comes back as it was, a head on the tower and an adapter included.

        Args:
            pretrained_model_name_or_path (`str`): as for `AutoModel.from_pretrained`.
            scales, attention (*optional*): see [`GazeVisionModel`]; those that were saved by default.
            kwargs: further arguments of `AutoModel.from_pretrained`, such as `dtype`, `device_map` or
                `attn_implementation`.
        """
        name = pretrained_model_name_or_path
        facts = read_wrapper_file(name, cls, kwargs)
        if facts is not None:
            saved = facts["settings"]
            scales = saved["scales"] if scales is None else scales
            attention = saved["attention"] if attention is None else attention
            return cls(cls._load_wrapped(name, facts, kwargs), scales, attention).eval()
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
        """What knows the tower's parts."""
        tower = self.vision_model.get_submodule(self._tower_name)
        return ADAPTERS[tower.config.model_type](tower)

    @property
    def config(self) -> PreTrainedConfig:
        """The tower's own configuration."""
        return self.adapter.config

    @property
    def hidden_size(self) -> int:
        """Channels of the features."""
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
                Frames as the tower wants them normalised, of any size: they are resized to every scale bicubically,
                without antialiasing.
            gaze ([`GazeOutput`] or a sequence of them, *optional*):
                Which patches to keep, of all clips or one gaze per clip, made for the scales and the patch size of
                `self.grid`. All of the finest scale by default.
            attention (`str`, *optional*): as in [`GazeVisionModel`], for this call.
            output_hidden_states (`bool`, *optional*, defaults to `False`): whether to return the states of all layers.
            cache ([`GazeVisionCache`], *optional*):
                With `"canvas"` attention: what earlier frames of the same clips left, which these frames follow. It is
                brought up to date. Frame by frame or in chunks, tokens get what they get in the whole clip.

        Returns:
            [`GazeVisionOutput`]; its `frame` counts from the first of these frames.

        Raises:
            ValueError: if the frames are no such tensor, the gaze is for other scales, another patch size or other
                numbers of clips or frames, frames do not fill the tower's tubelets, or the cache does not fit the tower,
                the attention, the clips, the gaze or training.
        """
        adapter = self.adapter
        attention = self.attention if attention is None else attention
        _check_attention(attention)
        gaze = self._check(pixel_values_videos, gaze)
        if cache is not None and not isinstance(cache, GazeVisionCache):
            raise ValueError(f"`cache` must be a GazeVisionCache, got {type(cache).__name__}")
        if cache is not None:
            cache.check(adapter, self.grid, gaze, attention)
        tokens = self._tokens(gaze)
        device = pixel_values_videos.device
        hidden_states, patch_places, prefix_places, num_tokens = self._embed_sequence(
            pixel_values_videos, gaze, tokens
        )
        num_prefix = prefix_places.shape[1]

        ids = torch.full((hidden_states.shape[1],), -1, device=device)
        time = torch.zeros_like(ids)
        ids[patch_places], time[patch_places] = tokens.ids, tokens.frame + (0 if cache is None else cache.num_times)
        rotary = adapter.rotary(self.grid, ids, time, hidden_states.dtype)
        canvas = None
        if attention == "canvas":
            plan, canvas = self._plan_canvas(tokens, patch_places, num_tokens, None if cache is None else cache.canvas)
        else:
            plan = PackedAttention.for_clips(num_tokens, attention)
        states = [hidden_states]
        for number, layer in enumerate(adapter.layers):
            extend = None if cache is None else partial(cache.extend, number, canvas.tokens)
            hidden_states = self._run_layer(layer, hidden_states, plan, rotary, extend)
            if output_hidden_states:
                states.append(hidden_states)
        if adapter.final_norm is not None:
            hidden_states = adapter.final_norm(hidden_states)
        if cache is not None:
            cache.commit(adapter, self.grid, gaze, canvas, num_times=num_tokens.shape[1])

        def of_patches(state: torch.Tensor) -> torch.Tensor:
            return state[0].to(device)[patch_places]

        def of_prefix(state: torch.Tensor) -> torch.Tensor:
            by_frame = state.new_zeros(num_tokens.numel(), num_prefix, state.shape[-1], device=device)
            by_frame[num_tokens.flatten() > 0] = state[0].to(device)[prefix_places]
            return by_frame.unflatten(0, tuple(num_tokens.shape))

        return GazeVisionOutput(
            last_hidden_state=of_patches(hidden_states),
            lengths=tokens.num_each_frame.sum(1),
            frame=tokens.frame,
            scale=self.grid.locate(tokens.ids)[0],
            ids=tokens.ids,
            boxes=self.grid.boxes(tokens.ids, height=1, width=1),
            hidden_states=tuple(map(of_patches, states)) if output_hidden_states else None,
            prefix_hidden_state=of_prefix(hidden_states) if num_prefix else None,
            prefix_hidden_states=tuple(map(of_prefix, states)) if num_prefix and output_hidden_states else None,
        )

    def _check(self, video: torch.Tensor, gaze: GazeOutput | Sequence[GazeOutput] | None) -> GazeOutput:
        """Checks frames and gaze before any work, and gives the gaze on the frames' device."""
        if not isinstance(video, torch.Tensor) or video.ndim != 5 or not video.is_floating_point():
            got = f"{video.dtype} {tuple(video.shape)}" if isinstance(video, torch.Tensor) else type(video).__name__
            raise ValueError(
                "`pixel_values_videos` must be normalised floats (batch, frames, channels, height, width), got " + got
            )
        batch_size, num_frames, channels = video.shape[:3]
        if channels != (wanted := self.adapter.patch_convolution.in_channels):
            raise ValueError(f"`pixel_values_videos` must have {wanted} channels, got the shape {tuple(video.shape)}")
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

    def _tokens(self, gaze: GazeOutput) -> _Tokens:
        """Lists the kept patches, clip by clip and frame by frame."""
        tubelet = self.adapter.tubelet_size
        if tubelet == 1:
            clip, slot = (~gaze.if_padded_gazing).nonzero(as_tuple=True)
            frame = gaze.frame_of_slot[slot]
            ids = gaze.gazing_pos[clip, slot] - frame * self.grid.num_patches
            return _Tokens(clip, frame, ids, gaze.num_real_each_frame)
        mask = torch.cat(gaze.gazing_mask, dim=-1).repeat_interleave(gaze.frame_sampling_rate, dim=1)
        mask = mask.unflatten(1, (-1, tubelet)).any(2)
        return _Tokens(*mask.nonzero(as_tuple=True), mask.sum(-1))

    def _plan_canvas(
        self, tokens: _Tokens, patch_places: torch.Tensor, num_tokens: torch.Tensor, canvas: Canvas | None
    ) -> tuple[PackedAttention, Canvas]:
        """Plans attention to the canvas, and gives the canvas at the end."""
        device = patch_places.device
        token_of_patch = torch.full((*num_tokens.shape, self.grid.num_patches), -1, device=device)
        token_of_patch[tokens.clip, tokens.frame, tokens.ids] = patch_places
        patch_at = self.grid.patches_at(*self.grid.grids[-1], device=device).flatten(1)
        first_token = (num_tokens.flatten().cumsum(0) - num_tokens.flatten()).view_as(num_tokens)
        return plan_canvas(tokens_at_places(token_of_patch, patch_at), first_token, num_tokens, canvas)

    def _encoded_frames(self, video: torch.Tensor, gaze: GazeOutput) -> torch.Tensor:
        """Gives the frames that tokens are made of, `(batch, encoded, tubelet, channels, height, width)`."""
        tubelet = self.adapter.tubelet_size
        return video[:, :: gaze.frame_sampling_rate, None] if tubelet == 1 else video.unflatten(1, (-1, tubelet))

    def _embed_sequence(
        self, video: torch.Tensor, gaze: GazeOutput, tokens: _Tokens
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Makes what enters the first layer, `(1, tokens, hidden)`; then as `_Tokens.places` has it."""
        adapter = self.adapter
        with _weights_at_hand(adapter.embeddings):
            patches = self._embed(self._encoded_frames(video, gaze), tokens)
            prefix = adapter.prefix()
            num_prefix = 0 if prefix is None else len(prefix)
            patch_places, prefix_places, num_tokens = tokens.places(num_prefix)
            hidden_states = patches
            if num_prefix:
                prefix = prefix.to(video.device, patches.dtype).repeat(len(prefix_places), 1)
                order = torch.cat([patch_places, prefix_places.flatten()]).argsort()
                hidden_states = torch.cat([patches, prefix])[order]
            return adapter.finish_embedding(hidden_states[None]), patch_places, prefix_places, num_tokens

    def _embed(self, frames: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
        """Embeds the kept patches, `(tokens, hidden)`, with learned positions."""
        adapter = self.adapter
        num_encoded, tubelet = frames.shape[1:3]
        sheet = ((tokens.clip * num_encoded + tokens.frame) * tubelet)[:, None]
        sheet = sheet + torch.arange(tubelet, device=sheet.device)
        ids = tokens.ids[:, None].expand_as(sheet)
        patches = self.grid.cut_patches(frames.flatten(0, 2), sheet.flatten(), ids.flatten())
        patches = patches.to(adapter.patch_convolution.weight.dtype)
        if isinstance(adapter.patch_convolution, nn.Conv3d):
            patches = patches.unflatten(0, tuple(sheet.shape)).transpose(1, 2)
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
        rotary: object | None,
        extend: Extend | None,
    ) -> torch.Tensor:
        adapter = self.adapter
        if not hidden_states.shape[1]:  # Nothing was kept of any clip, and layers take no empty sequences.
            return hidden_states

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            with packed_attention(layer, plan, extend):
                return adapter.run_layer(layer, hidden_states, rotary)

        return run_checkpointed(layer, run, hidden_states)


def _check_attention(attention: str) -> None:
    if attention not in ATTENTION_CHOICES:
        raise ValueError(f"`attention` must be one of {', '.join(ATTENTION_CHOICES)}, got {attention!r}")


@contextmanager
def _weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Brings in the weights that accelerate keeps elsewhere, for a module whose weights are read and not only run."""
    hooked = [part for part in module.modules() if hasattr(part, "_hf_hook")]
    if not hooked:
        yield
        return
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for part in hooked:
            stack.enter_context(align_module_device(part))
        yield
