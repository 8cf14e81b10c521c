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
from ..modeling_autogaze import AutoGazeModel
from ..processing_autogaze import AutoGazeProcessor
from ..selection_autogaze import resize_frames
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .labels import FrameValues, label_gaze, standing_frames
from .objectives import CellLossHeads, prefix_loss, seen_patches, slot_losses
from .trainer import GazeClipTrainer, generator_on


_HEADS = "cell_loss_heads"
_HEADS_FILE = f"{_HEADS}.safetensors"


@dataclass
class AutoGazeTrainingArguments(TrainingArguments):
    """
    Arguments of [`AutoGazeTrainer`]: those of [`~transformers.TrainingArguments`] and its own.

    Args:
        whole_steps (`bool`, *optional*, defaults to `True`):
            Whether all slots of a step are to predict all the labels of that step alike, as the set that they are
            decoded as, or each its own label, as published.
        on_policy (`float`, *optional*, defaults to 0.0):
            Share of batches, 0..1, in which the model sees its own choices instead of the labels', half of the time
            sampled; labels are then what greedy search would choose next. It learns to go on from its own mistakes.
        cell_loss_weight (`float`, *optional*, defaults to 2.0):
            Weight of an auxiliary loss, at least 0: vision tokens are to tell the task loss of every cell of their
            frame, as it stands and with each scale laid there; see [`CellLossHeads`].
        prefix_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of another, at least 0: every vision token is to tell the best patches among those before it; see
            [`prefix_loss`].
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

    whole_steps: bool = field(
        default=True, metadata={"help": "Whether all slots of a step predict all its labels alike, or each its own."}
    )
    on_policy: float = field(
        default=0.0, metadata={"help": "Share of batches in which the model goes on from its own choices."}
    )
    cell_loss_weight: float = field(
        default=2.0, metadata={"help": "Weight of telling the task loss of every cell from the vision tokens."}
    )
    prefix_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of telling the best patches so far from every vision token."}
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
        for name in ("cell_loss_weight", "prefix_loss_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}")
        super().__post_init__()


class AutoGazeTrainer(GazeClipTrainer):
    """
    Trains an [`AutoGazeModel`] on labels: the next patches, and the task loss after each.

    Everything else is [`~transformers.Trainer`]'s: mixed precision, accumulation, several processes, resuming, logging
    and the Hub. The loss of a batch is averaged over all its labels, those of other processes and of accumulated
    batches included. Its parts are logged, averaged since the last time: `next_token_loss` and `task_loss_error` of a
    label, `cell_loss` and `prefix_loss`.

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
        args = self.args
        if (
            model.training
            and args.on_policy
            and float(torch.rand((), generator=self.step_generator())) < args.on_policy
        ):
            inputs = self.relabel(inputs)
        called = ("pixel_values_videos", "gazing_pos", "if_padded_gazing", "num_gazing_each_frame")
        has_values = FrameValues._fields[0] in inputs
        outputs = model(
            **{name: inputs[name] for name in called}, output_logits=True, output_vision_hidden_states=has_values
        )
        config, counts = self._unwrapped().config, inputs["num_gazing_each_frame"]
        frame = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        first = frame * config.grid.num_patches
        is_label = inputs["labels"] != -100
        next_token = slot_losses(
            outputs.logits,
            (inputs["labels"] - first).masked_fill(~is_label, -100),
            (inputs["gazing_pos"] - first).masked_fill(inputs["if_padded_gazing"], config.end_id),
            counts,
            config.decoder_config.num_multi_token_pred,
            args.whole_steps,
        )
        is_measured = ~inputs["task_loss_labels"].isnan()
        error = outputs.task_loss_prediction.float() - inputs["task_loss_labels"].nan_to_num()
        error = error.square().masked_fill(~is_measured, 0)
        self.note("next_token_loss", next_token.sum(), is_label.sum())
        self.note("task_loss_error", error.sum(), is_measured.sum())

        num_labels, num_processes, num_batches = is_label.sum(), 1, 1
        if num_items_in_batch is not None:
            # Processes average their gradients, so each gives its part of the whole times their number.
            num_labels, num_processes = num_items_in_batch, self.accelerator.num_processes
            num_batches = self.current_gradient_accumulation_steps
        loss = (next_token.sum() + error.sum()) / num_labels * num_processes
        if has_values and args.cell_loss_weight:
            cell_loss = self.cell_loss_heads(outputs.vision_hidden_states, inputs["cell_losses"])
            self.note("cell_loss", cell_loss)
            loss = loss + args.cell_loss_weight * cell_loss / num_batches
        if has_values and args.prefix_loss_weight:
            weight = self._unwrapped().gaze_decoder.lm_head.weight
            prefix = prefix_loss(outputs.vision_hidden_states[-1], weight, inputs["patch_gains"], self._seen)
            self.note("prefix_loss", prefix)
            loss = loss + args.prefix_loss_weight * prefix / num_batches
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def relabel(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Replaces what a batch has chosen by what the model itself chooses, and labels that.

        Args:
            inputs (`Mapping`): what a [`GazeCollator`] gives.

        Returns:
            `dict` with the same keys and shapes; slots that had no label have none.
        """
        model = self._unwrapped()
        grid, rate = model.config.grid, model.config.frame_sampling_rate
        video, counts, is_padding = (
            inputs[name] for name in ("pixel_values_videos", "num_gazing_each_frame", "if_padded_gazing")
        )
        generator = self.step_generator()
        sampling, warmth = torch.rand(2, generator=generator).tolist()
        was_training = model.training
        model.eval()
        # The decode loop keeps its state in the weights' own precision.
        with torch.autocast(video.device.type, enabled=False):
            gaze = model.generate(
                video,
                counts.double() / grid.num_patches,
                do_sample=sampling < 0.5,
                temperature=0.5 + 0.5 * warmth,
                generator=generator_on(video.device, generator),
            )
        model.train(was_training)
        gaze = type(gaze).from_ids(gaze.gazing_pos, is_padding, counts, grid, rate)
        frames = resize_frames(video[:, ::rate].float(), grid.sizes[-1])
        pixels = self.processing_class.to_pixels(frames).clamp(0, 1)
        labels, losses = label_gaze(self.composite, pixels, gaze, model.config.decoder_config.num_multi_token_pred)
        replaced = {
            "gazing_pos": gaze.gazing_pos,
            "labels": labels.masked_fill(inputs["labels"] == -100, -100),
            "task_loss_labels": losses.masked_fill(inputs["task_loss_labels"].isnan(), torch.nan),
        }
        if FrameValues._fields[0] in inputs:
            standing = standing_frames(self.composite, pixels, gaze.gazing_mask)
            replaced |= FrameValues.measure(self.composite, pixels, standing)._asdict()
        return {**inputs, **replaced}

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
            save_file(self.cell_loss_heads.state_dict(), os.path.join(output_dir, _HEADS_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / _HEADS_FILE).exists():
            self.cell_loss_heads.load_state_dict(load_file(Path(checkpoint) / _HEADS_FILE))
