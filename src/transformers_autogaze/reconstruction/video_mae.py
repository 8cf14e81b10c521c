"""
The published learned reconstruction: a masked autoencoder that encodes only the gazed patches of a video.

See docs/specification.md, section 12.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit_mae.modeling_vit_mae import eager_attention_forward
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..composite_autogaze import check_reconstruction_inputs
from ..configuration_autogaze import have_equal_content
from ..gazing_autogaze import GazeOutput
from ..grid_autogaze import GazeGrid
from ..modeling_autogaze import outputs_to_record
from .losses import L1Loss


# Frames that are resized bicubically exceed 0..1 by less than this; normalised values and levels 0..255 by more.
_OVERSHOOT = 0.5


class GazeVideoMAEConfig(PreTrainedConfig):
    """
    Configuration of a [`GazeVideoMAE`]; the defaults are the published size, that of ViT-MAE large.

    The published `config.json` can be loaded. Its `loss_type` and `loss_weights` are kept but not used: the loss is an argument
    of the call.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (`int`, *optional*, default to 1024, 4096,
            24 and 16): the encoder.
        decoder_hidden_size, decoder_intermediate_size, decoder_num_hidden_layers, decoder_num_attention_heads (`int`,
            *optional*, default to 512, 2048, 8 and 16): the decoder.
        scales (`str` or `Sequence[int]`, *optional*, defaults to `"32+64+112+224"`):
            Sizes of the scales in pixels, coarse to fine; the last is the size of frames.
        image_size (`int`, *optional*, defaults to 224): size in pixels of the position embeddings.
        patch_size (`int`, *optional*, defaults to 16): height and width of a patch in pixels, at every scale.
        max_num_frames (`int`, *optional*, defaults to 256): maximum number of frames of a clip.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): activation of the MLPs.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12): epsilon of the layer normalisation.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of new weights.
        rescale_factor (`float`, *optional*, defaults to 1/127.5), offset (`bool`, *optional*, defaults to `True`),
        image_mean, image_std (`list[float]`, *optional*, default to ImageNet's):
            Normalisation of levels 0..255, which the model applies itself: times the factor, minus 1 with `offset`, minus the
            mean, over the standard deviation.

    Raises:
        ValueError: if the scales are not valid, or one of `scale_embed`, `time_embed` and `causal` is false.
    """

    model_type = "autogaze_video_mae"
    __eq__ = have_equal_content

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        decoder_hidden_size: int = 512,
        decoder_intermediate_size: int = 2048,
        decoder_num_hidden_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        scales: str | Sequence[int] = "32+64+112+224",
        image_size: int = 224,
        patch_size: int = 16,
        max_num_frames: int = 256,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        rescale_factor: float = 1 / 127.5,
        offset: bool = True,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ):
        for name in ("scale_embed", "time_embed", "causal"):
            if not kwargs.pop(name, True):
                raise ValueError(f"`{name}` must be True, as in the published model, got False")
        scales = [int(scale) for scale in scales.split("+")] if isinstance(scales, str) else scales
        self.scales = GazeGrid(scales, patch_size).scales
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.decoder_hidden_size = decoder_hidden_size
        self.decoder_intermediate_size = decoder_intermediate_size
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.decoder_num_attention_heads = decoder_num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.max_num_frames = max_num_frames
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.rescale_factor = rescale_factor
        self.offset = offset
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        super().__init__(**kwargs)

    @property
    def grid(self) -> GazeGrid:
        """The patches of one frame."""
        return GazeGrid(self.scales, self.patch_size)


@dataclass
class GazeVideoMAEOutput(ModelOutput):
    """
    Output of [`GazeVideoMAE`], with `F` requested frames.

    Args:
        reconstruction (`torch.FloatTensor` of shape `(batch, F, 3, height, width)`):
            The frames, reconstructed from the kept patches; values can exceed 0..1.
        loss (`torch.FloatTensor` of shape `(batch, F)`):
            Loss of each of these frames.
        hidden_states (`tuple[torch.FloatTensor]` of shape `(batch, 1 + N, hidden)`, returned with
            `output_hidden_states`):
            Hidden states of the encoder at the output of the embeddings and of each layer, the last normalised, with the CLS
            token first.
        attentions (`tuple[torch.FloatTensor]` of shape `(batch, heads, 1 + N, 1 + N)`, returned with
            `output_attentions`):
            Attention weights of each layer of the encoder.
    """

    reconstruction: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class GazeVideoMAELayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer with the published names of the weights."""

    def __init__(self, config: GazeVideoMAEConfig, hidden_size: int, intermediate_size: int, num_heads: int):
        super().__init__()
        self.config, self.num_heads = config, num_heads
        self.scaling, self.is_causal = (hidden_size // num_heads) ** -0.5, False
        self.layernorm_before = nn.LayerNorm(hidden_size, config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(hidden_size, config.layer_norm_eps)
        heads = {name: nn.Linear(hidden_size, hidden_size) for name in ("query", "key", "value")}
        joined = nn.ModuleDict({"dense": nn.Linear(hidden_size, hidden_size)})
        self.attention = nn.ModuleDict({"attention": nn.ModuleDict(heads), "output": joined})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden_size, intermediate_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(intermediate_size, hidden_size)})
        self.activation = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Takes hidden states `(batch, tokens, hidden)` and an additive mask `(batch, 1, tokens, tokens)`; returns hidden states, and
        attentions `(batch, heads, tokens, tokens)` if the implementation returns them.
        """
        normed = self.layernorm_before(hidden_states)
        heads: Any = self.attention["attention"]
        joined: Any = self.attention["output"]
        query, key, value = (
            heads[name](normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        name = self.config._attn_implementation
        attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        attended, attention = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0)
        hidden_states = hidden_states + joined["dense"](attended.flatten(2))
        intermediate = self.activation(self.intermediate["dense"](self.layernorm_after(hidden_states)))
        return hidden_states + self.output["dense"](intermediate), attention


class GazeVideoMAEEmbeddings(nn.Module):
    """Embeds the gazed patches of a clip, after a CLS token."""

    def __init__(self, config: GazeVideoMAEConfig):
        super().__init__()
        self.grid, size = config.grid, config.hidden_size
        self.num_rows = config.image_size // config.patch_size
        projection = nn.Conv2d(3, size, config.patch_size, config.patch_size)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.num_rows**2 + 1, size), requires_grad=False)
        self.scale_embed = nn.Parameter(torch.zeros(len(self.grid.scales), size))
        self.time_embed = nn.Parameter(torch.zeros(config.max_num_frames, size))

    def forward(self, values: torch.Tensor, gaze: GazeOutput) -> torch.Tensor:
        """Takes normalised frames `(batch, frames, 3, height, width)`; returns `(batch, 1 + N, hidden)`."""
        patches = gaze.replace(frame_sampling_rate=1).gather_patches(values)
        tokens = self.patch_embeddings["projection"](patches.flatten(0, 1)).view(*patches.shape[:2], -1)
        tokens = tokens + self._position_embeddings()[_local_ids(gaze)] + self.time_embed[gaze.frame_of_slot]
        cls_token = self.cls_token + self.position_embeddings[:, :1]
        return torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)

    def _position_embeddings(self) -> torch.Tensor:
        """Returns the position and scale embeddings of the patches of a frame and of padding, `(patches + 1, hidden)`."""
        stored = self.position_embeddings[:, 1:].transpose(1, 2).unflatten(2, (self.num_rows, self.num_rows))
        positions = [
            (F.interpolate(stored, size=grid, mode="bicubic") if grid != stored.shape[2:] else stored)[0].flatten(1).T
            for grid in self.grid.grids
        ]
        return _with_scales(positions, self.scale_embed)


class GazeVideoMAEEncoder(nn.Module):
    """Encodes the gazed patches, which attend to those of their own and earlier frames."""

    def __init__(self, config: GazeVideoMAEConfig):
        super().__init__()
        self.embeddings = GazeVideoMAEEmbeddings(config)
        sizes = config.hidden_size, config.intermediate_size, config.num_attention_heads
        layers = [GazeVideoMAELayer(config, *sizes) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        values: torch.Tensor,
        gaze: GazeOutput,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """
        Takes normalised frames `(batch, frames, 3, height, width)`; returns `(batch, 1 + N, hidden)`, all hidden states and
        attentions, the last two as requested.
        """
        hidden_states = self.embeddings(values, gaze)
        attention_mask = _block_causal_mask(gaze.frame_of_slot, gaze.if_padded_gazing, hidden_states.dtype)
        all_hidden_states, attentions = [], []
        layers: Any = self.encoder["layer"]
        for layer in layers:
            all_hidden_states += [hidden_states] if output_hidden_states else []
            hidden_states, attention = layer(hidden_states, attention_mask)
            attentions += [attention] if output_attentions else []
        hidden_states = self.layernorm(hidden_states)
        return (
            hidden_states,
            (*all_hidden_states, hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )


class GazeVideoMAEDecoder(nn.Module):
    """Predicts all patches of the requested frames from the gazed patches of all frames."""

    def __init__(self, config: GazeVideoMAEConfig):
        super().__init__()
        self.grid, size = config.grid, config.decoder_hidden_size
        self.num_rows = config.image_size // config.patch_size
        self.decoder_embed = nn.Linear(config.hidden_size, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.num_rows**2 + 1, size), requires_grad=False)
        self.decoder_scale_embed = nn.Parameter(torch.zeros(len(self.grid.scales), size))
        self.time_embed = nn.Parameter(torch.zeros(config.max_num_frames, size))
        sizes = size, config.decoder_intermediate_size, config.decoder_num_attention_heads
        layers = [GazeVideoMAELayer(config, *sizes) for _ in range(config.decoder_num_hidden_layers)]
        self.decoder_layers = nn.ModuleList(layers)
        self.decoder_norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.decoder_pred = nn.Linear(size, 3 * config.patch_size**2)

    def forward(self, latent: torch.Tensor, gaze: GazeOutput, frames: list[int]) -> torch.Tensor:
        """Takes `(batch, 1 + N, hidden)`; returns normalised frames `(batch, F, 3, height, width)` in ascending order."""
        tokens, num_patches, frame_of_slot = self.decoder_embed(latent), self.grid.num_patches, gaze.frame_of_slot
        cls_token, tokens = tokens[:, :1] + self.decoder_pos_embed[:, :1], tokens[:, 1:]
        requested = torch.tensor(frames, device=tokens.device)
        is_requested = torch.isin(frame_of_slot, requested)
        embeddings, local_ids = self._position_embeddings(), _local_ids(gaze)

        # Padding is written to an extra patch of its frame, which is removed afterwards.
        batch, _, size = tokens.shape
        index = torch.searchsorted(requested, frame_of_slot[is_requested]) * (num_patches + 1)
        index = (index + local_ids[:, is_requested])[..., None].expand(-1, -1, size)
        whole = self.mask_token.expand(batch, len(frames) * (num_patches + 1), -1)
        whole = whole.scatter(1, index, tokens[:, is_requested]).unflatten(1, (len(frames), -1))[:, :, :-1]
        whole = whole + embeddings[:-1] + self.time_embed[requested][:, None]
        gazed = tokens + embeddings[local_ids] + self.time_embed[frame_of_slot]

        hidden_states = torch.cat([cls_token, gazed[:, ~is_requested], whole.flatten(1, 2)], dim=1)
        frame_of_token = torch.cat([frame_of_slot[~is_requested], requested.repeat_interleave(num_patches)])
        is_padding = F.pad(gaze.if_padded_gazing[:, ~is_requested], (0, len(frames) * num_patches))
        attention_mask = _block_causal_mask(frame_of_token, is_padding, hidden_states.dtype)
        for layer in self.decoder_layers:
            hidden_states, _ = layer(hidden_states, attention_mask)

        rows, cols = self.grid.grids[-1]
        finest = hidden_states[:, -len(frames) * num_patches :].unflatten(1, (len(frames), -1))[:, :, -rows * cols :]
        patches = self.decoder_pred(self.decoder_norm(finest))
        patches = patches.view(batch, len(frames), rows, cols, self.grid.patch_size, self.grid.patch_size, 3)
        return patches.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, len(frames), 3, *self.grid.sizes[-1])

    def _position_embeddings(self) -> torch.Tensor:
        """Returns embeddings as in the encoder; the published decoder resizes the positions as one row, not as a square."""
        stored = self.decoder_pos_embed[:, None, 1:].permute(0, 3, 1, 2)
        positions = [
            F.interpolate(stored, size=(1, count), mode="bicubic")[0, :, 0].T
            for count in self.grid.num_patches_each_scale
        ]
        return _with_scales(positions, self.decoder_scale_embed)


class GazeVideoMAE(PreTrainedModel):
    """
    Reconstructs frames from their gazed patches with a masked autoencoder: the published learned reconstruction.

    It is called like [`CompositeReconstruction`], with pixels in 0..1 and a gaze, and returns frames and losses. The encoder
    reads only gazed patches. The decoder reads all patches of the requested frames and the gazed patches of the others. Tokens
    attend to earlier frames, so the set of requested frames has a small effect on the later ones, as in the published model.

    The names of weights are those of the published checkpoint; its feature networks are ignored.

    Args:
        config (`GazeVideoMAEConfig`): the configuration.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import GazeGrid, GazeOutput
    >>> from transformers_autogaze.reconstruction import GazeVideoMAE, GazeVideoMAEConfig

    >>> small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> small |= {f"decoder_{key}": value for key, value in small.items()}
    >>> model = GazeVideoMAE(GazeVideoMAEConfig(**small, scales="16+32", image_size=32)).eval()
    >>> masks = [torch.ones(1, 4, 1, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)]
    >>> output = model(torch.rand(1, 4, 3, 32, 32), GazeOutput.from_masks(masks, model.config.grid), frames=[1, 3])
    >>> output.reconstruction.shape, output.loss.shape
    (torch.Size([1, 2, 3, 32, 32]), torch.Size([1, 2]))

    ```
    """

    config_class = GazeVideoMAEConfig
    main_input_name = "pixels"
    input_modalities = ("video",)  # type: ignore[assignment]  # as the library's own models have it
    supports_gradient_checkpointing = True
    _no_split_modules = ["GazeVideoMAELayer", "GazeVideoMAEEmbeddings"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^dinov2_reg\.", r"^siglip2\."]

    def __init__(self, config: GazeVideoMAEConfig):
        super().__init__(config)
        self.vit = GazeVideoMAEEncoder(config)
        self.decoder = GazeVideoMAEDecoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (GazeVideoMAEEmbeddings, GazeVideoMAEDecoder)):
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("position_embeddings", "decoder_pos_embed"):
                    init.copy_(parameter, _sincos_positions(module.num_rows, parameter.shape[-1])[None])
                else:
                    init.normal_(parameter, std=self.config.initializer_range)

    @can_return_tuple
    def forward(
        self,
        pixels: torch.Tensor,
        gaze: GazeOutput,
        frames: Sequence[int] | None = None,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> GazeVideoMAEOutput:
        """
        Reconstructs frames and measures their loss.

        Args:
            pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
                The clips, one frame per frame of gaze, pixels in 0..1, in the size of the finest scale. The model normalises
                them.
            gaze ([`GazeOutput`]): the kept patches, on the model's scales.
            frames (`Sequence[int]`, *optional*): indices of the frames to reconstruct, all by default.
            loss (`Callable`, *optional*):
                Loss, called as `loss(rebuilt, frames)` with pixels in 0..1 of shape `(batch, F, 3, height, width)`, which returns
                `(batch, F)`. By default the published pixel loss, the mean absolute error of normalised values; see
                [`~losses.published_loss`] for the published sum with features.
            output_hidden_states, output_attentions (`bool`, *optional*, default to those of the configuration):
                Whether to return the hidden states and attentions of the encoder; the latter need eager attention.
            return_dict (`bool`, *optional*, defaults to that of the configuration):
                Whether to return a [`GazeVideoMAEOutput`].

        Returns:
            [`GazeVideoMAEOutput`], or a tuple of its fields that are not `None`.

        Raises:
            ValueError: if pixels or gaze are not as above, a frame does not exist or the clip is too long.
        """
        index = check_reconstruction_inputs(pixels, gaze, frames, self.config.grid)
        if gaze.num_frames > self.config.max_num_frames:
            raise ValueError(
                f"`pixels` must hold at most {self.config.max_num_frames} frames a clip, got {gaze.num_frames}"
            )
        lowest, highest = (float(value) for value in pixels.detach().aminmax())
        if not (lowest >= -_OVERSHOOT and highest <= 1 + _OVERSHOOT):
            raise ValueError(f"`pixels` must lie in 0..1, got {lowest:.4g}..{highest:.4g}: undo the normalisation")
        attention = self.config._attn_implementation
        recorded = outputs_to_record(self.config, attention, output_hidden_states, output_attentions)
        mean, std = (pixels.new_tensor(numbers)[:, None, None] for numbers in self._mean_and_std())
        latent, hidden_states, attentions = self.vit(((pixels - mean) / std).to(self.dtype), gaze, **recorded)
        requested = sorted(set(index))
        rebuilt = self.decoder(latent, gaze, requested)[:, [requested.index(frame) for frame in index]]
        rebuilt = rebuilt.to(pixels.dtype) * std + mean
        loss = L1Loss(self._mean_and_std()[1]) if loss is None else loss
        return GazeVideoMAEOutput(rebuilt, loss(rebuilt, pixels[:, index]), hidden_states, attentions)

    def _mean_and_std(self) -> tuple[list[float], list[float]]:
        """Returns the normalisation as mean and standard deviation of pixels in 0..1, per channel."""
        config, scale = self.config, 1 / (255 * self.config.rescale_factor)
        return [(mean + config.offset) * scale for mean in config.image_mean], [
            std * scale for std in config.image_std
        ]


def _local_ids(gaze: GazeOutput) -> torch.Tensor:
    """Returns ids counted from the first patch of their frame, `(batch, N)`; padding has the id after the last patch."""
    ids = gaze.gazing_pos - gaze.frame_of_slot * gaze.num_vision_tokens_each_frame
    return ids.masked_fill(gaze.if_padded_gazing, gaze.num_vision_tokens_each_frame)


def _with_scales(positions: Sequence[torch.Tensor], scale_embed: torch.Tensor) -> torch.Tensor:
    """Adds the embedding of each scale to its positions `(patches, hidden)`, joins them and appends zeros for padding."""
    joined = torch.cat([part + scale for part, scale in zip(positions, scale_embed, strict=True)])
    return F.pad(joined, (0, 0, 0, 1))


def _block_causal_mask(frame_of_token: torch.Tensor, is_padding: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Makes the attention mask: tokens attend to the CLS token and to their own and earlier frames, the CLS token to itself only.

    Args:
        frame_of_token (`torch.LongTensor` of shape `(tokens,)`): frame of each token except the CLS token.
        is_padding (`torch.BoolTensor` of shape `(batch, tokens)`): tokens that are not attended to.
        dtype (`torch.dtype`): dtype of the mask.

    Returns:
        `torch.FloatTensor` of shape `(batch, 1, 1 + tokens, 1 + tokens)`, to be added to attention scores.
    """
    frame = F.pad(frame_of_token, (1, 0), value=-1)
    is_visible = (frame[:, None] >= frame) & ~F.pad(is_padding, (1, 0))[:, None, None]
    mask = torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device)
    return mask.masked_fill_(~is_visible, torch.finfo(dtype).min)


def _sincos_positions(num_rows: int, size: int) -> torch.Tensor:
    """
    Returns the fixed embeddings of a square of positions, `(1 + num_rows**2, size)`, with zeros for the CLS token first; the
    first half of the channels encodes columns, the second half rows.
    """
    frequency = 10000 ** (-torch.arange(size // 4, dtype=torch.float64) * 4 / size)
    angle = torch.arange(num_rows, dtype=torch.float64)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    square = torch.cat([waves.repeat(num_rows, 1), waves.repeat_interleave(num_rows, dim=0)], dim=1)
    return F.pad(square, (0, 0, 1, 0)).float()
