"""
The AutoGaze model: vision stem, connector and gaze decoder (docs/specification.md, section 2).

`forward` scores a given gaze; `generate`, which chooses patches, is in `generation_autogaze`.

Remote code: older versions of transformers fetch only the modules that an entry point imports itself. So the entry points
(configuration, modeling, feature_network, feature_gaze, greedy, processing, video_processing, pipeline) import every module
that is needed, some for this reason alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .canvas_measures_autogaze import MeasuringSearch  # noqa: F401
from .canvas_search_autogaze import Canvas  # noqa: F401
from .cells_autogaze import CellTables  # noqa: F401
from .clip_schedule_autogaze import ClipSchedule  # noqa: F401
from .composite_autogaze import CompositeReconstruction  # noqa: F401
from .configuration_autogaze import AutoGazeConfig, AutoGazeVisionConfig
from .cuda_graphs_autogaze import ReplayedCall  # noqa: F401
from .decode_steps_autogaze import DecodeSteps  # noqa: F401
from .fused_decoder_autogaze import AutoGazeDecoder
from .gaze_batches_autogaze import stack_gazes  # noqa: F401
from .gaze_files_autogaze import save_gaze  # noqa: F401
from .gaze_pictures_autogaze import paint_gaze  # noqa: F401
from .gazing_autogaze import GazeOutput  # noqa: F401
from .generation_autogaze import GazeDecoding
from .graphed_steps_autogaze import GraphedSteps  # noqa: F401
from .grid_autogaze import GazeGrid  # noqa: F401
from .measured_stopping_autogaze import FrameLossTracker  # noqa: F401
from .selection_autogaze import GazeGenerationMixin, check_names, check_pixels, draw_settings, resize_frames
from .token_budgets_autogaze import ClipBudget  # noqa: F401


@dataclass
class AutoGazeModelOutput(ModelOutput):
    """
    Scores of a given gaze.

    Args:
        loss (`torch.FloatTensor` of shape `()`, returned with labels):
            Sum of those of the two losses below whose labels were given.
        next_token_loss (`torch.FloatTensor` of shape `()`, returned with `labels`):
            Mean negative log-probability of the labels that are not ignored.
        task_loss_error (`torch.FloatTensor` of shape `()`, returned with `task_loss_labels`):
            Mean squared error of the predicted reconstruction losses whose labels are not ignored.
        log_action_probs (`torch.FloatTensor` of shape `(batch, N)`):
            `log(p + 1e-8)` of each slot's patch.
        task_loss_prediction (`torch.FloatTensor` of shape `(batch, N)`):
            Predicted reconstruction loss after each slot.
        logits (`torch.FloatTensor` of shape `(batch, N, vocabulary)`, returned with `output_logits`):
            Logits of every patch of a frame and of the end id.
        hidden_states (`tuple[torch.FloatTensor]` of shape `(batch, sequence, hidden)`, returned with
            `output_hidden_states`):
            Input of the decoder and output of each layer, the last after the final norm.
            [`~AutoGazeModel.token_places`] returns the places of vision tokens and slots in the sequence.
        attentions (`tuple[torch.FloatTensor]` of shape `(batch, heads, sequence, sequence)`, returned with
            `output_attentions`):
            Attention weights of each layer.
    """

    loss: torch.Tensor | None = None
    next_token_loss: torch.Tensor | None = None
    task_loss_error: torch.Tensor | None = None
    log_action_probs: torch.Tensor | None = None
    task_loss_prediction: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class _SlotLayout(NamedTuple):
    """Where the `N` slots of a gaze are in the sequence that the decoder reads."""

    vision_places: torch.Tensor  # (frames, tokens): place of each vision token in the sequence
    places: torch.Tensor  # (N,): place of each slot in the sequence
    frames: torch.Tensor  # (N,): frame of each slot
    offsets: torch.Tensor  # (N,): place of each slot in its decoding step, 0..k - 1


class AutoGazeCausalConv3d(nn.Module):
    """A 3-D convolution that is causal in time, and ReLU."""

    def __init__(self, config: AutoGazeVisionConfig):
        super().__init__()
        self.num_past = config.temporal_kernel_size - 1
        self.conv3d = nn.Conv3d(
            config.hidden_size,
            config.hidden_size,
            (config.temporal_kernel_size, config.spatial_kernel_size, config.spatial_kernel_size),
            padding=(0, config.spatial_kernel_size // 2, config.spatial_kernel_size // 2),
        )

    def forward(self, hidden: torch.Tensor, past: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden (`torch.FloatTensor` of shape `(batch, channels, frames, rows, columns)`): hidden states.
            past (`torch.FloatTensor`, *optional*): last inputs of the previous call; zeros if not given.

        Returns:
            `tuple`: hidden states of the same shape, and the last inputs.
        """
        if past is None:
            past = hidden.new_zeros(*hidden.shape[:2], self.num_past, *hidden.shape[3:])
        hidden = torch.cat([past, hidden], dim=2)
        return F.relu(self.conv3d(hidden)), hidden[:, :, hidden.shape[2] - self.num_past :]


class AutoGazeVisionModel(nn.Module):
    """The vision stem: patch embedding and causal convolutions."""

    def __init__(self, config: AutoGazeVisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.temporal_conv = nn.Conv3d(config.num_channels, config.hidden_size, kernel, stride=kernel)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.blocks = nn.ModuleList([AutoGazeCausalConv3d(config) for _ in range(config.num_blocks)])
        self.out_proj = nn.Conv3d(config.hidden_size, config.output_size, 1)

    def forward(
        self, frames: torch.Tensor, past: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`): normalised frames.
            past (`list[torch.FloatTensor]`, *optional*): state returned by the call on the previous frames.

        Returns:
            `tuple`: vision tokens `(batch, frames, tokens, output_size)`, and the state for the frames that follow.
        """
        hidden = self.temporal_conv(frames.transpose(1, 2))
        hidden = self.norm(hidden.movedim(1, -1)).movedim(-1, 1)
        state = []
        for block, before in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            hidden, latest = block(hidden, before)
            state.append(latest)
        hidden = self.out_proj(hidden)
        return hidden.flatten(3).permute(0, 2, 3, 1), state


class AutoGazeConnector(nn.Module):
    """Adds a learned position embedding to the vision tokens, the same for every frame."""

    def __init__(self, config: AutoGazeConfig):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(config.num_vision_tokens, config.vision_config.output_size))

    def forward(self, vision: torch.Tensor) -> torch.Tensor:
        return vision + self.pos_embed


class AutoGazePreTrainedModel(PreTrainedModel):
    config: AutoGazeConfig
    config_class = AutoGazeConfig
    # The published checkpoint keeps all weights under this name; loading strips it.
    base_model_prefix = "gazing_model"
    main_input_name = "pixel_values_videos"
    input_modalities = ["video"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "AutoGazeVisionModel"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AutoGazeConnector):
            init.normal_(module.pos_embed, std=self.config.decoder_config.initializer_range)


class AutoGazeModel(GazeDecoding, GazeGenerationMixin, AutoGazePreTrainedModel):
    """
    AutoGaze: chooses, frame by frame, the smallest set of patches that still reconstructs a video (arXiv 2603.12254).

    [`~AutoGazeModel.generate`] chooses patches; calling the model scores a given gaze. `from_pretrained` loads published
    checkpoints and those of this package.

    `generate` uses sdpa or eager attention. Scoring uses any implementation that transformers has for Llama, including
    flash and flex attention.

    Args:
        config (`AutoGazeConfig`): the configuration.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import AutoGazeConfig, AutoGazeModel

    >>> model = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64)).eval()
    >>> video = torch.randn(1, 4, 3, 64, 64)
    >>> gaze = model.generate(video, gazing_ratio=[0.5, 0.1, 0.1, 0.1])
    >>> gaze.num_gazing_each_frame.tolist()
    [10, 2, 2, 2]
    >>> model(video, gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame).log_action_probs.shape
    torch.Size([1, 16])

    ```
    """

    config: AutoGazeConfig

    def __init__(self, config: AutoGazeConfig):
        super().__init__(config)
        self.vision_model = AutoGazeVisionModel(config.vision_config)
        self.connector = AutoGazeConnector(config)
        self.gaze_decoder = AutoGazeDecoder(config.decoder_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embeddings of the patch ids."""
        return self.gaze_decoder.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]  # no other module
        self.gaze_decoder.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head that predicts patch ids; quantisation does not change it."""
        return self.gaze_decoder.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.gaze_decoder.lm_head = value

    def embed_video(
        self, frames: torch.Tensor, past: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Computes the vision tokens that the decoder reads.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, channels, image_size, image_size)`):
                Normalised frames of the size `config.image_size`.
            past (`list[torch.FloatTensor]`, *optional*):
                State returned by the call on the previous frames.

        Returns:
            `tuple`: tokens `(batch, frames of gaze, tokens, hidden_size)`, and the state for the frames that follow.
        """
        vision, state = self.vision_model(frames.to(self.dtype), past)
        return self.connector(vision), state

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: torch.Tensor,
        gazing_pos: torch.Tensor,
        if_padded_gazing: torch.Tensor,
        num_gazing_each_frame: torch.Tensor,
        labels: torch.Tensor | None = None,
        task_loss_labels: torch.Tensor | None = None,
        output_logits: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> AutoGazeModelOutput:
        """
        Scores a given gaze: the probability of each of its patches, and the loss predicted after it.

        See docs/specification.md, section 5.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`):
                Normalised frames of any size; they are resized to `config.image_size`.
            gazing_pos (`torch.LongTensor` of shape `(batch, N)`):
                Patch ids in order of choice, counted from the first patch of the first frame.
            if_padded_gazing (`torch.BoolTensor` of shape `(batch, N)`):
                True where a slot is padding; later tokens do not attend to it.
            num_gazing_each_frame (`torch.LongTensor` of shape `(frames,)`):
                Number of slots of each frame, padding included; their sum is `N`.
            labels (`torch.LongTensor` of shape `(batch, N)`, *optional*):
                Target ids of the next-token loss, counted like `gazing_pos`; -100 where a slot is ignored.
            task_loss_labels (`torch.FloatTensor` of shape `(batch, N)`, *optional*):
                Measured reconstruction losses after each slot; NaN where a slot is ignored.
            output_logits (`bool`, *optional*, defaults to `False`):
                Whether to return the logits of every slot.
            output_hidden_states (`bool`, *optional*, defaults to that of the configuration):
                Whether to return the hidden states of the decoder.
            output_attentions (`bool`, *optional*, defaults to that of the configuration):
                Whether to return the attention weights of the decoder, which needs eager attention.
            kwargs: `return_dict` (`bool`), whether to return an [`AutoGazeModelOutput`] or a tuple; other arguments are passed
                to the decoder's [`~transformers.LlamaModel`].

        Returns:
            [`AutoGazeModelOutput`], or a tuple of what is not `None` in it.

        Raises:
            ValueError: if an argument does not fit the others; the message names it.
            TypeError: if there is no such argument.
        """
        num_slots = gazing_pos.shape[-1]
        self._check_video(pixel_values_videos)
        self._check_gaze(
            self._num_gaze_frames(pixel_values_videos),
            num_gazing_each_frame,
            (len(pixel_values_videos), num_slots),
            gazing_pos=gazing_pos,
            if_padded_gazing=if_padded_gazing,
            labels=labels,
            task_loss_labels=task_loss_labels,
        )
        attention = self.gaze_decoder.model.config._attn_implementation
        flags = outputs_to_record(self.config, attention, output_hidden_states, output_attentions)
        frames = resize_frames(pixel_values_videos, self.config.image_size)
        if not torch.compiler.is_compiling():
            name = f"{type(self).__name__}.forward"
            check_names(name, kwargs, [self.forward], TransformersKwargs.__annotations__)
            check_pixels(frames)

        slots = self._slot_layout(num_gazing_each_frame.to(gazing_pos.device), num_slots)
        ids = self._local_ids("gazing_pos", gazing_pos, ~if_padded_gazing, slots.frames)
        decoded = self._decode(frames, ids, if_padded_gazing, slots, **flags, **kwargs)
        logits, predicted_losses = self._predict(decoded.last_hidden_state, slots)
        log_probs = logits.log_softmax(-1)

        next_token_loss = task_loss_error = None
        if labels is not None:
            is_counted = labels != -100
            targets = self._local_ids("labels", labels, is_counted, slots.frames)
            next_token_loss = -_masked_mean(_select_last(log_probs, targets), is_counted)
        if task_loss_labels is not None:
            is_counted = ~task_loss_labels.isnan()
            errors = predicted_losses - task_loss_labels.nan_to_num().to(predicted_losses.dtype)
            task_loss_error = _masked_mean(errors.square(), is_counted)
        losses = [loss for loss in (next_token_loss, task_loss_error) if loss is not None]
        return AutoGazeModelOutput(
            loss=sum(losses) if losses else None,  # type: ignore[arg-type]  # never the 0 of an empty sum
            next_token_loss=next_token_loss,
            task_loss_error=task_loss_error,
            log_action_probs=(_select_last(log_probs, ids).exp() + 1e-8).log(),
            task_loss_prediction=predicted_losses,
            logits=logits if output_logits else None,
            hidden_states=decoded.hidden_states if flags["output_hidden_states"] else None,
            attentions=decoded.attentions if flags["output_attentions"] else None,
        )

    def _decode(
        self, frames: torch.Tensor, ids: torch.Tensor, is_padding: torch.Tensor, slots: _SlotLayout, **kwargs
    ) -> BaseModelOutputWithPast:
        """Runs the decoder on the vision tokens of frames and the patch ids `(batch, N)` of a gaze."""
        vision, _ = self.embed_video(frames)
        tokens = torch.cat([vision.flatten(1, 2), self.gaze_decoder.model.embed_tokens(ids)], dim=1)
        order = torch.cat([slots.vision_places.flatten(), slots.places]).argsort()
        attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=ids.device)
        attention_mask[:, slots.places] = (~is_padding).long()
        return self.gaze_decoder.model(
            inputs_embeds=tokens.index_select(1, order),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            **kwargs,
        )

    def _predict(self, hidden: torch.Tensor, slots: _SlotLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the logits `(batch, N, vocabulary)` of slots and the losses `(batch, N)` predicted after them."""
        step_size = self.gaze_decoder.step_size
        # The k slots of a step are all predicted by the token before its first slot.
        source = slots.places - slots.offsets - 1
        logits = self._logits(hidden, source, slots.offsets)
        # The loss after a slot is that before the next one, which may belong to the next step.
        next_offsets = (slots.offsets + 1) % step_size
        loss_source = torch.where(next_offsets == 0, slots.places, source)
        losses = self.gaze_decoder.task_loss_prediction_head(hidden[:, loss_source])
        return logits, _select_last(losses, next_offsets.expand(len(losses), -1))

    @staticmethod
    def _check_gaze(num_frames: int, counts: torch.Tensor, expected: tuple[int, int], **named: torch.Tensor) -> None:
        """Checks the numbers of slots, and that all other tensors have the expected shape `(batch, slots)`."""
        if len(counts) != num_frames or not _may_hold((counts.sum() == expected[1]) & (counts >= 1).all()):
            raise ValueError(
                f"`num_gazing_each_frame` must hold {num_frames} positive counts, one for each frame, that add up to "
                f"the {expected[1]} slots of `gazing_pos`, got {counts.tolist()}"
            )
        for name, value in named.items():
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(f"`{name}` must have the shape {expected}, got {tuple(value.shape)}")

    def _logits(self, hidden: torch.Tensor, source: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Returns the logits `(batch, N, vocabulary)` at `offsets` of the steps that the tokens at `source` predict."""
        index = torch.arange(len(source), device=source.device)
        if not torch.compiler.is_compiling():  # the number of different sources is unknown in an exported program
            source, index = source.unique(return_inverse=True)
        logits, _ = self.gaze_decoder.heads(hidden[:, source])
        return logits[:, index, offsets].to(torch.promote_types(logits.dtype, torch.float32))

    def token_places(self, num_gazing_each_frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns the places of tokens in the sequence that the decoder reads: the vision tokens of each frame, then its slots.

        Args:
            num_gazing_each_frame (`torch.LongTensor` of shape `(frames,)`): number of slots of each frame.

        Returns:
            `tuple`: the places of vision tokens, `(frames, tokens)`, and those of slots, `(N,)`.
        """
        slots = self._slot_layout(num_gazing_each_frame, int(num_gazing_each_frame.sum()))
        return slots.vision_places, slots.places

    def _slot_layout(self, counts: torch.Tensor, num_slots: int) -> _SlotLayout:
        num_vision, device = self.config.num_vision_tokens, counts.device
        frames, starts = torch.arange(len(counts), device=device), counts.cumsum(0) - counts
        vision_places = (frames * num_vision + starts)[:, None] + torch.arange(num_vision, device=device)
        frame_of_slot = frames.repeat_interleave(counts, output_size=num_slots)
        slots = torch.arange(num_slots, device=device)
        # A slot comes after the vision tokens of its own frame and of all earlier ones.
        places = slots + (frame_of_slot + 1) * num_vision
        offsets = (slots - starts[frame_of_slot]) % self.gaze_decoder.step_size
        return _SlotLayout(vision_places, places, frame_of_slot, offsets)

    def _local_ids(self, name: str, ids: torch.Tensor, is_real: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
        """Counts ids from the first patch of their frame and checks them; the end id where they are not real."""
        num_patches = self.config.grid.num_patches
        local = (ids - frame * num_patches).masked_fill(~is_real, self.config.end_id)
        outside = is_real & ((local < 0) | (local >= num_patches))
        if not _may_hold(~outside.any()):
            at = int(outside.any(0).nonzero()[0])
            raise ValueError(
                f"`{name}` must hold ids of frame t in t * {num_patches} .. t * {num_patches} + {num_patches - 1}, got "
                f"{ids[:, at].tolist()} in slot {at}, which belongs to frame {int(frame[at])}"
            )
        return local

    def _draw_settings(self, num_frames, generator):
        return draw_settings(self.config, num_frames, self.training, generator)


def outputs_to_record(
    config: PreTrainedConfig, attention: str, output_hidden_states: bool | None, output_attentions: bool | None
) -> dict[str, bool]:
    """
    Fills in the flags for optional outputs of a model.

    Args:
        config (`PreTrainedConfig`): configuration of the model, with the defaults.
        attention (`str`): its attention implementation.
        output_hidden_states, output_attentions (`bool`, *optional*): arguments of the call.

    Returns:
        `dict` with `output_hidden_states` and `output_attentions`.

    Raises:
        ValueError: if attentions are requested of an implementation that does not return them.
    """
    flags = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
    flags = {name: getattr(config, name) if flag is None else flag for name, flag in flags.items()}
    if flags["output_attentions"] and attention != "eager":
        raise ValueError(
            f"`output_attentions` must be False with {attention} attention, which returns none; load the model with "
            "`attn_implementation='eager'`"
        )
    return flags


def _may_hold(condition: torch.Tensor) -> bool:
    """Returns whether a condition on tensor values holds; `True` while compiling, where values are unknown."""
    return torch.compiler.is_compiling() or bool(condition)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _select_last(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Selects one entry of the last dimension, by an index without it."""
    return values.gather(-1, index[..., None]).squeeze(-1)


AutoGazeModel.register_for_auto_class("AutoModel")
