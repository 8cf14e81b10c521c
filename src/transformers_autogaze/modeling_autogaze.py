"""
The AutoGaze model: vision stem, connector and gaze decoder (docs/specification.md, section 2).

This module owns the network and scoring a given gaze (`forward`); how patches are chosen is in `generation_autogaze`.

Remote code: older versions of transformers fetch only the modules that an entry point imports itself, so the entry points
(configuration, modeling, feature_network, feature_gaze, greedy, processing, video_processing, pipeline) import all that they
need, some for that alone.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .canvas_measures_autogaze import MeasuringSearch  # noqa: F401
from .canvas_search_autogaze import Canvas  # noqa: F401
from .cells_autogaze import CellTables  # noqa: F401
from .clip_schedule_autogaze import ClipSchedule  # noqa: F401
from .composite_autogaze import CompositeReconstruction  # noqa: F401
from .configuration_autogaze import AutoGazeConfig, AutoGazeDecoderConfig, AutoGazeVisionConfig
from .cuda_graphs_autogaze import ReplayedCall  # noqa: F401
from .decode_steps_autogaze import DecodeSteps  # noqa: F401
from .fused_decoder_autogaze import FusedDecoder  # noqa: F401
from .gaze_batches_autogaze import stack_gazes  # noqa: F401
from .gaze_files_autogaze import save_gaze  # noqa: F401
from .gaze_pictures_autogaze import paint_gaze  # noqa: F401
from .gazing_autogaze import GazeOutput  # noqa: F401
from .generation_autogaze import GazeDecoding
from .graphed_steps_autogaze import GraphedSteps  # noqa: F401
from .grid_autogaze import GazeGrid  # noqa: F401
from .measured_stopping_autogaze import FrameMeter  # noqa: F401
from .selection_autogaze import GazeGenerationMixin, check_names, check_pixels, draw_settings, resize_frames
from .token_budgets_autogaze import ClipBudget  # noqa: F401


@dataclass
class AutoGazeModelOutput(ModelOutput):
    """
    Scores of a given gaze.

    Args:
        loss (`torch.FloatTensor` of shape `()`, returned with labels):
            Sum of the two losses below, of those whose labels were given.
        next_token_loss (`torch.FloatTensor` of shape `()`, returned with `labels`):
            Negative log-probability of the labels, averaged over those that are not ignored.
        task_loss_error (`torch.FloatTensor` of shape `()`, returned with `task_loss_labels`):
            Squared error of the predicted reconstruction losses, averaged over those that are not ignored.
        log_action_probs (`torch.FloatTensor` of shape `(batch, N)`):
            `log(p + 1e-8)` of each slot's patch.
        task_loss_prediction (`torch.FloatTensor` of shape `(batch, N)`):
            Predicted reconstruction loss after each slot.
        logits (`torch.FloatTensor` of shape `(batch, N, vocabulary)`, returned with `output_logits`):
            What each slot's patch was chosen by: a number for every patch of a frame, and one for the end id.
        hidden_states (`tuple[torch.FloatTensor]` of shape `(batch, sequence, hidden)`, returned with
            `output_hidden_states`):
            The tokens as the decoder reads them, and what each of its layers makes of them, the last normalised.
            [`~AutoGazeModel.token_places`] tells which is which.
        attentions (`tuple[torch.FloatTensor]` of shape `(batch, heads, sequence, sequence)`, returned with
            `output_attentions`):
            For each layer, how much each token of that sequence attends to each other.
    """

    loss: torch.FloatTensor | None = None
    next_token_loss: torch.FloatTensor | None = None
    task_loss_error: torch.FloatTensor | None = None
    log_action_probs: torch.FloatTensor | None = None
    task_loss_prediction: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class AutoGazeCausalConv3d(nn.Module):
    """A 3-D convolution and ReLU that sees no later frame."""

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
        """Takes `(batch, channels, frames, rows, columns)` and the inputs before it, zeros if there are none."""
        if past is None:
            past = hidden.new_zeros(*hidden.shape[:2], self.num_past, *hidden.shape[3:])
        hidden = torch.cat([past, hidden], dim=2)
        return F.relu(self.conv3d(hidden)), hidden[:, :, hidden.shape[2] - self.num_past :]


class AutoGazeVisionModel(nn.Module):
    """Turns frames into vision tokens."""

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
        """Takes `(batch, frames, channels, height, width)`; gives `(batch, frames, tokens, output_size)` and a state."""
        hidden = self.temporal_conv(frames.transpose(1, 2))
        hidden = self.norm(hidden.movedim(1, -1)).movedim(-1, 1)
        state = []
        for block, before in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            hidden, latest = block(hidden, before)
            state.append(latest)
        hidden = self.out_proj(hidden)
        return hidden.flatten(3).permute(0, 2, 3, 1), state


class AutoGazeConnector(nn.Module):
    """Adds one learned embedding per token position, the same for every frame."""

    def __init__(self, config: AutoGazeConfig):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(config.num_vision_tokens, config.vision_config.output_size))

    def forward(self, vision: torch.Tensor) -> torch.Tensor:
        return vision + self.pos_embed


class AutoGazeDecoder(nn.Module):
    """A Llama with one row of logits and one predicted loss for each of the `k` patches that a step proposes."""

    def __init__(self, config: AutoGazeDecoderConfig):
        super().__init__()
        self.num_rows = config.num_multi_token_pred
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size * self.num_rows, bias=False)
        self.task_loss_prediction_head = nn.Linear(config.hidden_size, self.num_rows, bias=False)

    def heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives logits `(.., k, vocabulary)` and predicted losses `(.., k)` of hidden states `(.., hidden)`."""
        return self.lm_head(hidden).unflatten(-1, (self.num_rows, -1)), self.task_loss_prediction_head(hidden)


class AutoGazePreTrainedModel(PreTrainedModel):
    config_class = AutoGazeConfig
    # The published checkpoint keeps all weights under this name; loading strips it.
    base_model_prefix = "gazing_model"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
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
    AutoGaze: looks at a video frame by frame and picks the smallest set of patches that still reconstructs it
    (arXiv 2603.12254).

    [`~AutoGazeModel.generate`] gazes; calling the model scores a given gaze. Published checkpoints and this package's
    load alike with `from_pretrained`.

    Gazing runs on sdpa attention, or eager if that is asked for; scoring on any implementation that the library offers
    for Llama, flash and flex attention included.

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

    def __init__(self, config: AutoGazeConfig):
        super().__init__(config)
        self.vision_model = AutoGazeVisionModel(config.vision_config)
        self.connector = AutoGazeConnector(config)
        self.gaze_decoder = AutoGazeDecoder(config.decoder_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embeddings of the patch ids."""
        return self.gaze_decoder.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.gaze_decoder.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """What patch ids are chosen by; quantisation leaves it as it is."""
        return self.gaze_decoder.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.gaze_decoder.lm_head = value

    def embed_video(
        self, frames: torch.Tensor, past: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Gives the vision tokens that the decoder reads.

        Args:
            frames (`torch.FloatTensor` of shape `(batch, frames, channels, image_size, image_size)`):
                Normalised frames of the model's own size.
            past (`list[torch.FloatTensor]`, *optional*):
                The state that the call on the frames before returned.

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
        Scores a given gaze: how likely each of its patches is, and what loss is predicted after it.

        See docs/specification.md, section 5.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch, frames, channels, height, width)`):
                Normalised frames, of any size: they are resized to the model's own.
            gazing_pos (`torch.LongTensor` of shape `(batch, N)`):
                Patch ids in order of choice, counted from the first patch of the first frame.
            if_padded_gazing (`torch.BoolTensor` of shape `(batch, N)`):
                True where a slot is padding: later tokens do not see it.
            num_gazing_each_frame (`torch.LongTensor` of shape `(frames,)`):
                Slots of each frame, padding included; their sum is `N`.
            labels (`torch.LongTensor` of shape `(batch, N)`, *optional*):
                Ids like `gazing_pos` that the next-token loss asks for, -100 where a slot is to be ignored.
            task_loss_labels (`torch.FloatTensor` of shape `(batch, N)`, *optional*):
                Measured reconstruction losses after each slot, NaN where a slot is to be ignored.
            output_logits (`bool`, *optional*, defaults to `False`):
                Whether to return the logits of every slot.
            output_hidden_states (`bool`, *optional*, defaults to that of the configuration):
                Whether to return the hidden states of the decoder.
            output_attentions (`bool`, *optional*, defaults to that of the configuration):
                Whether to return its attentions, which needs eager attention.
            kwargs: `return_dict` (`bool`) says whether to return an [`AutoGazeModelOutput`], as the configuration does by
                default; all others are passed on to the decoder's [`~transformers.LlamaModel`].

        Returns:
            [`AutoGazeModelOutput`], or a tuple of what is not `None` in it.

        Raises:
            ValueError: if an argument does not fit the others; the message names it.
            TypeError: if there is no such argument.
        """
        counts, num_slots = num_gazing_each_frame, gazing_pos.shape[-1]
        self._check_video(pixel_values_videos)
        self._check_gaze(
            self._num_gaze_frames(pixel_values_videos),
            counts,
            (len(pixel_values_videos), num_slots),
            gazing_pos=gazing_pos,
            if_padded_gazing=if_padded_gazing,
            labels=labels,
            task_loss_labels=task_loss_labels,
        )
        attention = self.gaze_decoder.model.config._attn_implementation
        recorded = outputs_to_record(self.config, attention, output_hidden_states, output_attentions)
        frames = resize_frames(pixel_values_videos, self.config.image_size)
        if not torch.compiler.is_compiling():
            name = f"{type(self).__name__}.forward"
            check_names(name, kwargs, [self.forward], TransformersKwargs.__annotations__)
            check_pixels(frames)

        device = gazing_pos.device
        counts = counts.to(device)
        vision_places, slot_place, frame = self._token_places(counts, num_slots)
        ids = self._local_ids("gazing_pos", gazing_pos, ~if_padded_gazing, frame)
        vision, _ = self.embed_video(frames)
        tokens = torch.cat([vision.flatten(1, 2), self.gaze_decoder.model.embed_tokens(ids)], dim=1)
        order = torch.cat([vision_places.flatten(), slot_place]).argsort()
        attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=device)
        attention_mask[:, slot_place] = (~if_padded_gazing).long()
        decoded = self.gaze_decoder.model(
            inputs_embeds=tokens.index_select(1, order),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            **recorded,
            **kwargs,
        )
        hidden = decoded.last_hidden_state
        starts = counts.cumsum(0) - counts
        slot = torch.arange(num_slots, device=device) - starts[frame]
        row = slot % self.gaze_decoder.num_rows
        # A step's k slots are all predicted by the token before its first.
        source = slot_place - row - 1
        logits = self._logits(hidden, source, row)
        log_probs = logits.log_softmax(-1)

        def log_prob_of(labels: torch.Tensor) -> torch.Tensor:
            return log_probs.gather(-1, labels[..., None]).squeeze(-1)

        next_row = (row + 1) % self.gaze_decoder.num_rows
        loss_source = torch.where(next_row == 0, slot_place, source)
        losses = self.gaze_decoder.task_loss_prediction_head(hidden[:, loss_source])
        predicted = losses.gather(-1, next_row.expand(len(losses), -1)[..., None]).squeeze(-1)

        next_token_loss = task_loss_error = None
        if labels is not None:
            counted = labels != -100
            target = self._local_ids("labels", labels, counted, frame)
            next_token_loss = -(log_prob_of(target) * counted).sum() / counted.sum().clamp(min=1)
        if task_loss_labels is not None:
            counted = ~task_loss_labels.isnan()
            error = predicted - task_loss_labels.nan_to_num().to(predicted.dtype)
            task_loss_error = (error.square() * counted).sum() / counted.sum().clamp(min=1)
        losses = [loss for loss in (next_token_loss, task_loss_error) if loss is not None]
        return AutoGazeModelOutput(
            loss=sum(losses) if losses else None,
            next_token_loss=next_token_loss,
            task_loss_error=task_loss_error,
            log_action_probs=(log_prob_of(ids).exp() + 1e-8).log(),
            task_loss_prediction=predicted,
            logits=logits if output_logits else None,
            hidden_states=decoded.hidden_states if recorded["output_hidden_states"] else None,
            attentions=decoded.attentions if recorded["output_attentions"] else None,
        )

    @staticmethod
    def _check_gaze(num_frames: int, counts: torch.Tensor, expected: tuple[int, int], **named: torch.Tensor) -> None:
        """Checks how many slots each frame has, and that all that is said of slots has the shape `(batch, slots)`."""
        if len(counts) != num_frames or not _may_be_so((counts.sum() == expected[1]) & (counts >= 1).all()):
            raise ValueError(
                f"`num_gazing_each_frame` must hold {num_frames} positive counts, one for each frame, that add up to "
                f"the {expected[1]} slots of `gazing_pos`, got {counts.tolist()}"
            )
        for name, value in named.items():
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(f"`{name}` must have the shape {expected}, got {tuple(value.shape)}")

    def _logits(self, hidden: torch.Tensor, source: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Gives the logits `(batch, N, vocabulary)` of rows, `(N,)`, of what tokens at some places propose, `(N,)`."""
        which = torch.arange(len(source), device=source.device)
        if not torch.compiler.is_compiling():  # to an exported program, how many are equal is unknown
            source, which = source.unique(return_inverse=True)
        logits, _ = self.gaze_decoder.heads(hidden[:, source])
        return logits[:, which, row].to(torch.promote_types(logits.dtype, torch.float32))

    def token_places(self, num_gazing_each_frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Tells where tokens stand in the sequence that the decoder reads: of each frame the vision tokens, then the slots.

        Args:
            num_gazing_each_frame (`torch.LongTensor` of shape `(frames,)`): slots of each frame.

        Returns:
            `tuple`: the places of vision tokens, `(frames, tokens)`, and those of slots, `(N,)`.
        """
        return self._token_places(num_gazing_each_frame, int(num_gazing_each_frame.sum()))[:2]

    def _token_places(self, counts: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `token_places`; also gives the frame of each slot, `(N,)`."""
        num_vision, device = self.config.num_vision_tokens, counts.device
        frames = torch.arange(len(counts), device=device)
        vision = (frames * num_vision + counts.cumsum(0) - counts)[:, None] + torch.arange(num_vision, device=device)
        frame = frames.repeat_interleave(counts, output_size=num_slots)
        # Every frame's vision tokens stand before its gaze, so slot n comes after all vision tokens up to its frame.
        return vision, torch.arange(num_slots, device=device) + (frame + 1) * num_vision, frame

    def _local_ids(self, name: str, ids: torch.Tensor, is_real: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
        """Counts ids from their own frame, with the end id where they are not real; checks that they lie in it."""
        num_patches = self.config.grid.num_patches
        local = (ids - frame * num_patches).masked_fill(~is_real, self.config.end_id)
        outside = is_real & ((local < 0) | (local >= num_patches))
        if not _may_be_so(~outside.any()):
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
    Says what to return of the inside of a model.

    Args:
        config (`PreTrainedConfig`): its configuration, which decides what a call leaves open.
        attention (`str`): the implementation of its attention.
        output_hidden_states, output_attentions (`bool`, *optional*): what the call asks for.

    Returns:
        `dict` with `output_hidden_states` and `output_attentions`.

    Raises:
        ValueError: if attentions are asked for of an implementation that keeps none.
    """
    flags = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
    flags = {name: getattr(config, name) if flag is None else flag for name, flag in flags.items()}
    if flags["output_attentions"] and attention != "eager":
        raise ValueError(
            f"`output_attentions` must be False with {attention} attention, which keeps none; load the model with "
            "`attn_implementation='eager'`"
        )
    return flags


def _may_be_so(condition: torch.Tensor) -> bool:
    """Tells whether a condition on the content of tensors holds; `True` where they have none, in a program that is exported."""
    return torch.compiler.is_compiling() or bool(condition)


AutoGazeModel.register_for_auto_class("AutoModel")
