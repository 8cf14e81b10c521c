"""
Stage 1 of training: the next patches of labels, and the task loss after each (docs/specification.md, section 13.1).

This module owns the trainer and its arguments. Clips and labels come from `data`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..gazing_autogaze import GazeOutput
from ..modeling_autogaze import AutoGazeModel
from ..processing_autogaze import AutoGazeProcessor
from ..selection_autogaze import resize_frames
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .task import GazeTask
from .trainer import GazeClipTrainer, generator_on


@dataclass
class AutoGazeTrainingArguments(TrainingArguments):
    """
    Arguments of [`AutoGazeTrainer`]: those of [`~transformers.TrainingArguments`] and its own.

    Args:
        on_policy (`float`, *optional*, defaults to 0.0):
            Share of batches, 0..1, in which the model sees its own choices instead of the labels', half of the time
            sampled; labels are then what greedy search would choose next. It learns to go on from its own mistakes.
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
        super().__post_init__()


class AutoGazeTrainer(GazeClipTrainer):
    """
    Trains an [`AutoGazeModel`] on labels: the next patches, and the task loss after each.

    Everything else is [`~transformers.Trainer`]'s: mixed precision, accumulation, several processes, resuming, logging
    and the Hub. The loss of a batch is averaged over all its labels, those of other processes and of accumulated
    batches included. Its two parts are logged, averaged since the last time: `next_token_loss` and `task_loss_error` of a
    label.

    Random draws follow from `seed`, the step and the process alone, so a resumed run draws what an unbroken one would.

    Args:
        model ([`AutoGazeModel`]): the model to train.
        args ([`AutoGazeTrainingArguments`]): the arguments.
        processing_class (`AutoGazeProcessor` or `AutoGazeVideoProcessor`, *optional*):
            What makes the pixel values; it is saved with the model. The published preprocessing by default.
        task ([`GazeTask`], *optional*):
            What labels on policy serve, the task of the other labels; that of pixels by default.
        kwargs: the other arguments of [`~transformers.Trainer`]. Datasets are [`GazeClipDataset`]s, or others with such
            items.

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
        task: GazeTask | None = None,
        **kwargs,
    ):
        if not isinstance(args, AutoGazeTrainingArguments):
            raise ValueError(f"`args` must be AutoGazeTrainingArguments, got {type(args).__name__}")
        super().__init__(model, args, processing_class, **kwargs)
        # A copy, as that of a dataset stays on the CPU.
        self.task = GazeTask(model.config.grid) if task is None else copy.deepcopy(task).to(args.device)

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
        on_policy = self.args.on_policy if model.training else 0
        if on_policy and float(torch.rand((), generator=self.step_generator())) < on_policy:
            inputs = self.relabel(inputs)
        called = ("pixel_values_videos", "gazing_pos", "if_padded_gazing", "num_gazing_each_frame", "labels")
        outputs = model(**{name: inputs[name] for name in (*called, "task_loss_labels")})
        num_labels = (inputs["labels"] != -100).sum()
        # Processes average their gradients, so each gives its part of the whole times their number.
        share = 1 / num_labels if num_items_in_batch is None else self.accelerator.num_processes / num_items_in_batch
        loss = 0
        for name, count in (
            ("next_token_loss", num_labels),
            ("task_loss_error", (~inputs["task_loss_labels"].isnan()).sum()),
        ):
            total = outputs[name] * count
            self.note(name, total, count)
            loss = loss + total * share
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def relabel(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Lets the model choose for itself, and labels a batch with what greedy search would choose next at each step.

        Args:
            inputs (`Mapping`): what a [`GazeCollator`] gives.

        Returns:
            `dict` with the same keys and shapes, slots that had no label having none.
        """
        config = self._unwrapped().config
        grid, rate = config.grid, config.frame_sampling_rate
        video, counts, is_padding = (
            inputs[name] for name in ("pixel_values_videos", "num_gazing_each_frame", "if_padded_gazing")
        )
        gaze = GazeOutput.from_ids(self._gaze(video, counts), is_padding, counts, grid, rate)
        frames = resize_frames(video[:, ::rate].float(), grid.sizes[-1])
        pixels = self.processing_class.to_pixels(frames).clamp(0, 1)
        labels = self.task.continuations(pixels, gaze, config.decoder_config.num_multi_token_pred)
        losses = self.task.measure(pixels, gaze)
        return {
            **inputs,
            "gazing_pos": gaze.gazing_pos,
            "labels": labels.masked_fill(inputs["labels"] == -100, -100),
            "task_loss_labels": losses.masked_fill(inputs["task_loss_labels"].isnan(), torch.nan),
        }

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
