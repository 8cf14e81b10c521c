"""
Stage 1 of training: the next patches of labels, and the task loss after each (SPEC, "Training").

This module owns the trainer and its arguments. Clips and labels come from `data`, losses from `objectives`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

from ..composite_autogaze import CompositeReconstruction
from ..gazing_autogaze import GazeOutput
from ..modeling_autogaze import AutoGazeModel, AutoGazeModelOutput
from ..output_files import replacing
from ..processing_autogaze import AutoGazeProcessor
from ..selection_autogaze import resize_frames
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .labels import FrameValues, label_gaze, standing_frames
from .objectives import (
    AttentionGains,
    AttentionHistory,
    CellLossHeads,
    PatchNames,
    gain_losses,
    next_token_losses,
    prefix_loss,
    regrets,
    seen_patches,
    task_loss_errors,
)
from .trainer import CAUTION_HELP, GazeClipTrainer, check_caution, generator_on


_HEADS = "cell_loss_heads"
_HEADS_FILE = f"{_HEADS}.safetensors"
_WEIGHTS = (
    "gain_loss_weight",
    "attention_loss_weight",
    "naming_loss_weight",
    "history_loss_weight",
    "cell_loss_weight",
    "prefix_loss_weight",
)


@dataclass
class AutoGazeTrainingArguments(TrainingArguments):
    """
    Arguments of [`AutoGazeTrainer`]: those of [`~transformers.TrainingArguments`] and its own.

    Args:
        on_policy (`float`, *optional*, defaults to 0.0):
            Share of batches, 0..1, in which the model sees its own choices instead of the labels', half of the time
            sampled; labels are then what greedy search would choose next. It learns to go on from its own mistakes.
        task_loss_caution (`float`, *optional*, defaults to 0.5):
            How much more a predicted loss below the measured one counts than one above, in shares of the weight, above 0
            and below 1: the higher, the more frames with a threshold meet it; see [`task_loss_errors`].
        gain_loss_weight (`float`, *optional*, defaults to 2.0):
            Weight of an auxiliary loss, at least 0: patches are to be as likely as they gain, and none to be chosen
            that spoils; see [`gain_losses`] and [`regrets`].
        attention_loss_weight (`float`, *optional*, defaults to 2.0):
            Weight of another, at least 0: the last layer is to look where patches gain; see [`AttentionGains`].
        naming_loss_weight (`float`, *optional*, defaults to 3.0):
            Weight of another, at least 0: what is looked at is to be named; see [`PatchNames`].
        history_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of another, at least 0: the first layers are to follow what has been shown; see [`AttentionHistory`].
        cell_loss_weight (`float`, *optional*, defaults to 2.0):
            Weight of another, at least 0: vision tokens are to tell the task loss of every cell of their frame, as it
            stands and with each scale laid there; see [`CellLossHeads`].
        prefix_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of another, at least 0: every vision token is to tell what the patches before it gain; see
            [`prefix_loss`].
        slow_learning_rate_factor (`float`, *optional*, defaults to 0.1):
            The vision stem and the names of patches (the `lm_head`, values and outputs of the last layer) learn at this
            times the learning rate: what [`initialize_gaze_model`] made of them is lost at higher ones.
        learning_rate (`float`, *optional*, defaults to 5e-4), remove_unused_columns, ddp_find_unused_parameters (`bool`,
            *optional*, default to `False`): as in [`~transformers.TrainingArguments`].

    Raises:
        ValueError: if one of them is out of range.

    Example:

    ```python
    >>> from transformers_autogaze.training.ntp import AutoGazeTrainingArguments

    >>> AutoGazeTrainingArguments(output_dir="gaze", on_policy=2)
    Traceback (most recent call last):
    ValueError: `on_policy` must lie in 0..1, a share of the batches, got 2

    ```
    """

    on_policy: float = field(
        default=0.0, metadata={"help": "Share of batches in which the model goes on from its own choices."}
    )
    task_loss_caution: float = field(default=0.5, metadata={"help": CAUTION_HELP})
    gain_loss_weight: float = field(default=2.0, metadata={"help": "Weight of making patches as likely as they gain."})
    attention_loss_weight: float = field(
        default=2.0, metadata={"help": "Weight of looking where patches gain in the last layer."}
    )
    naming_loss_weight: float = field(
        default=3.0, metadata={"help": "Weight of naming the patches of where the last layer looks."}
    )
    history_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of following what has been shown in the first layers."}
    )
    cell_loss_weight: float = field(
        default=2.0, metadata={"help": "Weight of telling the task loss of every cell from the vision tokens."}
    )
    prefix_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of telling what patches gain from every vision token."}
    )
    slow_learning_rate_factor: float = field(
        default=0.1, metadata={"help": "What the learning rate of vision stem and patch names is multiplied by."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "The initial learning rate."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop what the model's forward does not take."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether several processes look for weights that a batch does not use."}
    )

    def __post_init__(self):
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"`on_policy` must lie in 0..1, a share of the batches, got {self.on_policy}")
        check_caution(self.task_loss_caution)
        for name in (*_WEIGHTS, "slow_learning_rate_factor"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}")
        super().__post_init__()


class AutoGazeTrainer(GazeClipTrainer):
    """
    Trains an [`AutoGazeModel`] on labels: the next patches, and the task loss after each.

    Where clips come with [`FrameValues`], their labels are those of the closed form, which then also teaches what every
    other patch would have gained; with labels from elsewhere the loss is the published one.

    Everything else is [`~transformers.Trainer`]'s: mixed precision, accumulation, several processes, resuming, logging
    and the Hub. The loss of a batch is averaged over all its labels, those of other processes and of accumulated
    batches included. Its parts are logged, averaged since the last time: `next_token_loss` and `task_loss_error` of a
    label, and those that have a weight; `prefix_attention_loss` is that of the attention of vision tokens, at half of its
    weight.

    Random draws follow from `seed`, the step and the process alone, so a resumed run draws what an unbroken one would.

    Args:
        model ([`AutoGazeModel`]): the model to train.
        args ([`AutoGazeTrainingArguments`]): the arguments.
        processing_class (`AutoGazeProcessor` or `AutoGazeVideoProcessor`, *optional*):
            What makes the pixel values; it is saved with the model. The published preprocessing by default.
        kwargs: the other arguments of [`~transformers.Trainer`]. Datasets are [`GazeClipDataset`]s, or others with such
            items; the auxiliary losses are left out where items lack the fields of [`FrameValues`].

    Raises:
        ValueError: if the arguments are not [`AutoGazeTrainingArguments`].

    Example:

    ```python
    >>> from transformers_autogaze import AutoGazeConfig, AutoGazeModel
    >>> from transformers_autogaze.training import AutoGazeTrainer, AutoGazeTrainingArguments, BudgetSchedule, GazeClipDataset

    >>> config = AutoGazeConfig(scales=[32, 64], image_size=64)
    >>> videos = [np.zeros((9, 64, 64, 3), dtype=np.uint8)]
    >>> clips = GazeClipDataset(videos, config, num_frames=2, schedule=BudgetSchedule())
    >>> args = AutoGazeTrainingArguments("gaze", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    >>> AutoGazeTrainer(AutoGazeModel(config), args, train_dataset=clips).train().global_step  # doctest: +ELLIPSIS
    {...}
    1

    ```
    """

    args: AutoGazeTrainingArguments

    def __init__(
        self,
        model: AutoGazeModel,
        args: AutoGazeTrainingArguments,
        processing_class: AutoGazeProcessor | AutoGazeVideoProcessor | None = None,
        **kwargs,
    ):
        if not isinstance(args, AutoGazeTrainingArguments):
            raise ValueError(f"`args` must be AutoGazeTrainingArguments, got {type(args).__name__}")
        super().__init__(model, args, processing_class, **kwargs)
        self.composite = CompositeReconstruction(model.config.grid)
        self.cell_loss_heads = CellLossHeads(model.config).to(args.device)
        self.attention_gains = AttentionGains(model.config).to(args.device)
        self.patch_names = PatchNames(model.config).to(args.device)
        self.attention_history = AttentionHistory(model.config).to(args.device)
        self._seen = seen_patches(model.config.grid, self.cell_loss_heads.tokens).to(args.device)

    def train(self, *args, **kwargs) -> Any:
        """Trains; see [`~transformers.Trainer.train`]."""
        # As a part of the model the heads are optimised, and kept equal over processes, like everything else.
        self.model.add_module(_HEADS, self.cell_loss_heads)
        self.model._keys_to_ignore_on_save = [f"{_HEADS}.{name}" for name in self.cell_loss_heads.state_dict()]
        self.cell_loss_heads.requires_grad_(self.args.cell_loss_weight > 0)
        try:
            return super().train(*args, **kwargs)
        finally:
            delattr(self.model, _HEADS)
            del self.model._keys_to_ignore_on_save

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Gives the loss of a batch.

        Args:
            model (`nn.Module`): the model, as the trainer has wrapped it.
            inputs (`Mapping`): what a [`GazeCollator`] gives.
            return_outputs (`bool`, *optional*, defaults to `False`): whether to return the scores as well.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Labels of all batches that make one step, over all processes; those of this batch by default.

        Returns:
            `torch.FloatTensor` of shape `()`, or a `tuple` of it and an [`AutoGazeModelOutput`].
        """
        if "labels" not in inputs:
            raise ValueError(
                "`train_dataset` and `eval_dataset` must have items with labels, such as those of a GazeClipDataset with "
                f"`schedule` or `labels`, got items with {', '.join(inputs)} alone"
            )
        args = self.args
        is_on_policy = (
            model.training
            and args.on_policy
            and float(torch.rand((), generator=self.step_generator())) < args.on_policy
        )
        has_values = FrameValues._fields[0] in inputs
        if is_on_policy or has_values:
            inputs = self.relabel(inputs, is_on_policy)
        called = ("pixel_values_videos", "gazing_pos", "if_padded_gazing", "num_gazing_each_frame")
        outputs = model(**{name: inputs[name] for name in called}, output_logits=True, output_hidden_states=has_values)
        config, counts = self._unwrapped().config, inputs["num_gazing_each_frame"]
        frame = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        is_label = inputs["labels"] != -100
        labels = (inputs["labels"] - frame * config.grid.num_patches).masked_fill(~is_label, -100)
        gains = inputs.get("gains")
        next_token = next_token_losses(outputs.logits, labels, gains)
        is_measured = ~inputs["task_loss_labels"].isnan()
        measured = inputs["task_loss_labels"].nan_to_num()
        errors = task_loss_errors(outputs.task_loss_prediction.float(), measured, args.task_loss_caution)
        of_labels = {
            "next_token_loss": (1.0, next_token, is_label),
            "task_loss_error": (1.0, errors, is_measured),
        }
        of_batch = {}
        if has_values:
            auxiliary = self._auxiliary_losses(outputs, inputs)
            of_batch = {name: auxiliary[name] for name in auxiliary if auxiliary[name][1].ndim == 0}
            of_labels |= {name: (*auxiliary[name], is_label) for name in auxiliary if name not in of_batch}

        num_labels, num_processes, num_batches = is_label.sum(), 1, 1
        if num_items_in_batch is not None:
            # Processes average their gradients, so each gives its part of the whole times their number.
            num_labels, num_processes = num_items_in_batch, self.accelerator.num_processes
            num_batches = self.current_gradient_accumulation_steps
        loss = 0
        for name, (weight, losses, counted) in of_labels.items():
            total = losses.masked_fill(~counted, 0).sum()
            self.note(name, total, counted.sum())
            loss = loss + weight * total / num_labels * num_processes
        for name, (weight, average) in of_batch.items():
            self.note(name, average)
            loss = loss + weight * average / num_batches
        return (loss, outputs) if return_outputs else loss

    def _auxiliary_losses(
        self, outputs: AutoGazeModelOutput, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Gives those that have a weight, and the weight: of every slot `(batch, N)`, or of the batch `()`."""
        args, decoder, states = self.args, self._unwrapped().gaze_decoder, outputs.hidden_states
        config = self._unwrapped().config
        counts, gains, patch_gains = (inputs[name] for name in ("num_gazing_each_frame", "gains", "patch_gains"))
        vision_places, slot_places = self._unwrapped().token_places(counts)
        losses = {}
        if weight := args.gain_loss_weight:
            logits = outputs.logits[..., :-1]
            losses["gain_loss"] = weight, gain_losses(logits, gains) + regrets(logits, gains)
        if weight := args.attention_loss_weight:
            places, is_padding = (vision_places, slot_places, counts), inputs["if_padded_gazing"]
            of_slots, of_tokens = self.attention_gains(
                decoder.model, states[-2], *places, is_padding, patch_gains, gains
            )
            losses |= {"attention_loss": (weight, of_slots), "prefix_attention_loss": (weight / 2, of_tokens)}
        if weight := args.naming_loss_weight:
            of_vision = states[-2][:, vision_places]
            losses["naming_loss"] = weight, self.patch_names(decoder.model, decoder.lm_head.weight, of_vision)
        if weight := args.history_loss_weight:
            frame = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
            ids = inputs["gazing_pos"] - frame * config.grid.num_patches
            losses["history_loss"] = (
                weight,
                self.attention_history(
                    decoder.model, states, vision_places, slot_places, counts, inputs["if_padded_gazing"], ids
                ),
            )
        if weight := args.cell_loss_weight:
            of_vision = tuple(state[:, vision_places] for state in states)
            losses["cell_loss"] = weight, self.cell_loss_heads(of_vision, inputs["cell_losses"])
        if weight := args.prefix_loss_weight:
            last = states[-1][:, vision_places]
            losses["prefix_loss"] = weight, prefix_loss(last, decoder.lm_head.weight, patch_gains, self._seen)
        return losses

    @torch.no_grad()
    def relabel(self, inputs: Mapping[str, torch.Tensor], on_policy: bool = True) -> dict[str, torch.Tensor]:
        """
        Labels a batch with what the search of the closed form would choose next, and measures what patches gain.

        Args:
            inputs (`Mapping`): what a [`GazeCollator`] gives.
            on_policy (`bool`, *optional*, defaults to `True`):
                Whether what was chosen is replaced by what the model itself chooses.

        Returns:
            `dict` with the same keys and shapes, slots that had no label having none, and with `gains`, a
            `torch.FloatTensor` of shape `(batch, N, patches)`: see [`CompositeReconstruction.continuations`].
        """
        config = self._unwrapped().config
        grid, rate = config.grid, config.frame_sampling_rate
        video, ids, counts, is_padding = (
            inputs[name] for name in ("pixel_values_videos", "gazing_pos", "num_gazing_each_frame", "if_padded_gazing")
        )
        if on_policy:
            ids = self._gaze(video, counts)
        gaze = GazeOutput.from_ids(ids, is_padding, counts, grid, rate)
        frames = resize_frames(video[:, ::rate].float(), grid.sizes[-1])
        pixels = self.processing_class.to_pixels(frames).clamp(0, 1)
        labels, losses, gains = label_gaze(self.composite, pixels, gaze, config.decoder_config.num_multi_token_pred)
        replaced = {
            "gazing_pos": gaze.gazing_pos,
            "labels": labels.masked_fill(inputs["labels"] == -100, -100),
            "task_loss_labels": losses.masked_fill(inputs["task_loss_labels"].isnan(), torch.nan),
            "gains": gains,
        }
        if on_policy and FrameValues._fields[0] in inputs:
            standing = standing_frames(self.composite, pixels, gaze.gazing_mask)
            replaced |= FrameValues.measure(self.composite, pixels, standing)._asdict()
        return {**inputs, **replaced}

    def _gaze(self, video: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Lets the model choose as many patches of each frame as `counts` says, half of the time at random."""
        model, generator = self._unwrapped(), self.step_generator()
        sampling, warmth = torch.rand(2, generator=generator).tolist()
        was_training = model.training
        model.eval()
        # The decode loop keeps its state in the weights' own precision.
        with torch.autocast(video.device.type, enabled=False):
            gaze = model.generate(
                video,
                counts.double() / model.config.grid.num_patches,
                do_sample=sampling < 0.5,
                temperature=0.5 + 0.5 * warmth,
                generator=generator_on(video.device, generator),
            )
        model.train(was_training)
        return gaze.gazing_pos

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Makes the optimiser; see [`~transformers.Trainer.create_optimizer`]."""
        optimizer = super().create_optimizer(*args, **kwargs)
        model, factor = self._unwrapped(), self.args.slow_learning_rate_factor
        decoder = model.gaze_decoder
        naming = decoder.model.layers[-1].self_attn
        slow_modules = (model.vision_model, decoder.lm_head, naming.v_proj, naming.o_proj)
        are_slow = {weight for module in slow_modules for weight in module.parameters()}
        for group in optimizer.param_groups[:]:
            slow = [weight for weight in group["params"] if weight in are_slow]
            group["params"] = [weight for weight in group["params"] if weight not in are_slow]
            optimizer.add_param_group({**group, "params": slow, "lr": factor * group["lr"]})
        return optimizer

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Gives the loss of a batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _unwrapped(self) -> AutoGazeModel:
        return self.accelerator.unwrap_model(self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            with replacing(os.path.join(output_dir, _HEADS_FILE)) as unfinished:
                save_file(self.cell_loss_heads.state_dict(), unfinished)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_heads(checkpoint)

    def load_heads(self, checkpoint: str | os.PathLike) -> None:
        """
        Takes up the heads of the cell loss where a run left them; without them their first steps disturb the model.

        Args:
            checkpoint (`str` or `os.PathLike`): folder of a checkpoint of this trainer; of any other, nothing is taken.
        """
        file = Path(checkpoint) / _HEADS_FILE
        if file.exists():
            self.cell_loss_heads.load_state_dict(load_file(file))
