"""
Stage 1 of training: the next patches of labels, and the task loss after each (SPEC, "Training").

This module owns the losses and the trainer. Clips and labels come from `data`.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from ..composite_autogaze import CompositeReconstruction
from ..modeling_autogaze import AutoGazeModel
from ..processing_autogaze import AutoGazeProcessor
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .data import ClipSampler, GazeClipDataset, GazeCollator


_HEAD = "cell_loss_head"
_HEAD_FILE = "cell_loss_head.safetensors"


@dataclass
class AutoGazeTrainingArguments(TrainingArguments):
    """
    Arguments of [`AutoGazeTrainer`]: those of [`~transformers.TrainingArguments`] and its own.

    Args:
        label_decay (`float`, *optional*, defaults to 0.8):
            A step proposes `num_multi_token_pred` patches at once. What a slot is to predict is spread over the labels
            from it to the end of its step; each weighs this times the one before, 0..1. With 0 it is the next label
            alone, as published; with 1 all that are left in the step, alike.
        cell_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of an auxiliary loss, at least 0: from the decoder's hidden states of the vision tokens, a linear
            head (of the trainer, not the model) is to tell the task loss of every cell of the frame, as it stands and
            with each scale laid there. It teaches the model early where patches are needed.
        learning_rate (`float`, *optional*, defaults to 5e-4), remove_unused_columns (`bool`, *optional*, defaults to
            `False`): as in [`~transformers.TrainingArguments`].

    Raises:
        ValueError: if one of them is out of range.

    Example:

    ```python
    >>> from transformers_autogaze.training.ntp import AutoGazeTrainingArguments

    >>> AutoGazeTrainingArguments(output_dir="gaze", label_decay=2)
    Traceback (most recent call last):
    ValueError: `label_decay` must lie in 0..1, got 2

    ```
    """

    label_decay: float = field(
        default=0.8, metadata={"help": "Weight of each further label of a step in what a slot is to predict, 0..1."}
    )
    cell_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of telling the task loss of every cell from the vision tokens."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "The initial learning rate."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop what the model's forward does not take."}
    )

    def __post_init__(self):
        if not 0 <= self.label_decay <= 1:
            raise ValueError(f"`label_decay` must lie in 0..1, got {self.label_decay}")
        if not 0 <= self.cell_loss_weight < float("inf"):
            raise ValueError(f"`cell_loss_weight` must be a number of at least 0, got {self.cell_loss_weight}")
        super().__post_init__()


def step_label_loss(
    logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, num_rows: int, decay: float
) -> torch.Tensor:
    """
    Cross-entropy of every slot with the labels that are left in its step.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, N, vocabulary)`): of each slot.
        labels (`torch.LongTensor` of shape `(batch, N)`): ids counted from their frame, -100 where there is none.
        counts (`torch.LongTensor` of shape `(frames,)`): slots of each frame; their sum is `N`.
        num_rows (`int`): slots of a step; steps begin anew with every frame.
        decay (`float`): weight of each further label, 0..1.

    Returns:
        `torch.FloatTensor` of shape `(batch, N)`; zeros where a slot has no label.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze.training.ntp import step_label_loss

    >>> logits, labels = torch.zeros(1, 3, 5), torch.tensor([[0, 3, -100]])
    >>> step_label_loss(logits, labels, torch.tensor([3]), num_rows=2, decay=0.5).tolist()  # log 5, twice
    [[1.6094379425048828, 1.6094379425048828, 0.0]]

    ```
    """
    device = labels.device
    counts = counts.to(device)
    ends = counts.cumsum(0).repeat_interleave(counts)
    slot = torch.arange(len(ends), device=device)
    row = (slot - (ends - counts.repeat_interleave(counts))) % num_rows
    further = torch.arange(num_rows, device=device)
    places = slot[:, None] + further
    is_left = (further < num_rows - row[:, None]) & (places < ends[:, None])
    left = labels[:, places.clamp(max=len(slot) - 1)].masked_fill(~is_left, -100)
    weights = (left != -100) * torch.as_tensor(decay, dtype=logits.dtype, device=device) ** further
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
    log_probs = logits.log_softmax(-1).gather(-1, left.clamp(min=0))
    return -(weights * log_probs).sum(-1) * (labels != -100)


class AutoGazeTrainer(Trainer):
    """
    Trains an [`AutoGazeModel`] on labels: the next patches, and the task loss after each.

    Everything else is [`~transformers.Trainer`]'s: mixed precision, accumulation, several processes, resuming, logging
    and the Hub. Beside the loss it logs its parts, averaged since the last time: `next_token_loss` and
    `task_loss_error` of a label, and `cell_loss`.

    The loss of a batch is averaged over all its labels, those of other processes and of accumulated batches included.

    Args:
        model ([`AutoGazeModel`]): the model to train.
        args ([`AutoGazeTrainingArguments`]): the arguments.
        train_dataset, eval_dataset (*optional*): [`GazeClipDataset`]s, or others with such items.
        processing_class (`AutoGazeProcessor` or `AutoGazeVideoProcessor`, *optional*):
            What makes the pixel values; it is saved with the model. The published preprocessing by default.
        kwargs: the other arguments of [`~transformers.Trainer`].

    Raises:
        ValueError: if the arguments are not [`AutoGazeTrainingArguments`].
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
        # The trainer takes a whole processor for one with a tokenizer.
        processing_class = getattr(processing_class, "video_processor", processing_class) or AutoGazeVideoProcessor()
        kwargs.setdefault("data_collator", GazeCollator(model.config))
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self._measured: dict[str, list[torch.Tensor]] = defaultdict(list)
        rows, cols = CompositeReconstruction(model.config.grid).cells
        tokens = model.config.image_size // model.config.vision_config.patch_size
        # Cells are told by the token that they lie in, as if there were a whole number of them in each.
        self._cells_in_token = -(-rows // tokens), -(-cols // tokens)
        num_values = len(model.config.scales) * self._cells_in_token[0] * self._cells_in_token[1]
        self.cell_loss_head = nn.Linear(model.config.decoder_config.hidden_size, num_values).to(args.device)

    def train(self, *args, **kwargs) -> Any:
        """Trains; see [`~transformers.Trainer.train`]."""
        if self.args.cell_loss_weight:
            # As a part of the model it is optimised, and kept equal over processes, with everything else.
            self.model.add_module(_HEAD, self.cell_loss_head)
            self.model._keys_to_ignore_on_save = [f"{_HEAD}.{name}" for name in self.cell_loss_head.state_dict()]
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.args.cell_loss_weight:
                delattr(self.model, _HEAD)
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
        has_cells = self.args.cell_loss_weight > 0 and "cell_losses" in inputs
        called = ("pixel_values_videos", "gazing_pos", "if_padded_gazing", "num_gazing_each_frame")
        outputs = model(
            **{name: inputs[name] for name in called}, output_logits=True, output_vision_hidden_states=has_cells
        )
        config, counts = self._unwrapped().config, inputs["num_gazing_each_frame"]
        frame = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        is_label = inputs["labels"] != -100
        labels = (inputs["labels"] - frame * config.grid.num_patches).masked_fill(~is_label, -100)
        num_rows = config.decoder_config.num_multi_token_pred
        next_token = step_label_loss(outputs.logits, labels, counts, num_rows, self.args.label_decay)
        is_measured = ~inputs["task_loss_labels"].isnan()
        measured = inputs["task_loss_labels"].nan_to_num()
        error = (outputs.task_loss_prediction.float() - measured).square() * is_measured

        share, scale = is_label.sum(), 1
        if num_items_in_batch is not None:
            # Processes average their gradients, so each gives its part of the whole times their number.
            share, scale = num_items_in_batch, self.accelerator.num_processes
        loss = (next_token.sum() + error.sum()) / share * scale
        self._note("next_token_loss", next_token.sum(), is_label.sum())
        self._note("task_loss_error", error.sum(), is_measured.sum())
        if has_cells:
            cell_loss = self._cell_loss(outputs.vision_hidden_states, inputs["cell_losses"])
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.args.cell_loss_weight * cell_loss / steps
            self._note("cell_loss", cell_loss, cell_loss.new_ones(()))
        return (loss, outputs) if return_outputs else loss

    def _cell_loss(self, hidden: torch.Tensor, cell_losses: torch.Tensor) -> torch.Tensor:
        """Gives the squared error of the cells' losses `(batch, frames, scales, *cells)` as told by vision tokens."""
        rows, cols = cell_losses.shape[-2:]
        side = round(hidden.shape[2] ** 0.5)
        told = self.cell_loss_head(hidden).unflatten(-1, (cell_losses.shape[2], *self._cells_in_token))
        told = told.unflatten(2, (side, side)).permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        told = nn.functional.interpolate(told.flatten(0, 1), (rows, cols)) if told.shape[-2:] != (rows, cols) else told
        return (told.float().view_as(cell_losses) - cell_losses).square().mean()

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss since the last time to the logs of training."""
        if "loss" in logs and self._measured:
            sums = torch.stack([torch.stack(values).sum(0) for values in self._measured.values()])
            sums = self.accelerator.reduce(sums, reduction="sum")
            logs = {**logs, **dict(zip(self._measured, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))}
        self._measured.clear()
        super().log(logs, start_time)

    def _note(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        self._measured[name].append(torch.stack([total.detach().float(), count.float()]))

    def _unwrapped(self) -> AutoGazeModel:
        return self.accelerator.unwrap_model(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, GazeClipDataset):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return ClipSampler(len(dataset), seed, lambda: int(self.state.epoch or 0))
        return super()._get_train_sampler(dataset)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.args.cell_loss_weight:
            weights = {name: value.contiguous() for name, value in self.cell_loss_head.state_dict().items()}
            save_file(weights, os.path.join(output_dir, _HEAD_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / _HEAD_FILE).exists():
            self.cell_loss_head.load_state_dict(load_file(Path(checkpoint) / _HEAD_FILE))
