"""Stage 1 of training: next-token prediction on labels, and prediction of the task loss (docs/specification.md, section 13.1)."""

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
            Share of batches, 0..1, in which the model sees its own choices instead of the labels, so that it learns to continue
            after its own mistakes. Labels are then the next choices of greedy search. Half of these choices are sampled.
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
        default=0.0,
        metadata={"help": "Share of batches in which the model sees its own choices instead of the labels."},
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "The initial learning rate."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns that the model's forward does not accept."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether several processes search for weights that a batch does not use."}
    )

    def __post_init__(self):
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"`on_policy` must lie in 0..1, a share of the batches, got {self.on_policy}")
        super().__post_init__()


class AutoGazeTrainer(GazeClipTrainer):
    """
    Trains an [`AutoGazeModel`] to predict the patches of labels, and the task loss after each.

    Everything else is as in [`~transformers.Trainer`]: mixed precision, accumulation, several processes, resuming, logging
    and the Hub. The loss of a batch is averaged over its labels, including those of other processes and of accumulated batches.
    It logs `next_token_loss` and `task_loss_error` of a label, averaged since the last log.

    Random numbers depend on `seed`, the step and the process only, so a resumed run draws the same numbers as an uninterrupted
    one.

    Args:
        model ([`AutoGazeModel`]): the model to train.
        args ([`AutoGazeTrainingArguments`]): the arguments.
        processing_class (`AutoGazeProcessor` or `AutoGazeVideoProcessor`, *optional*):
            Preprocessing of the clips, the published one by default; it is saved with the model.
        task ([`GazeTask`], *optional*):
            Task of on-policy labels, which should be that of the other labels; that of pixels by default.
        kwargs: the other arguments of [`~transformers.Trainer`]. Datasets have items as in [`GazeClipDataset`].

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
        # A copy, since the task of a dataset stays on the CPU.
        self.task = GazeTask(model.config.grid) if task is None else copy.deepcopy(task).to(args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Computes the loss of a batch.

        Args:
            model (`nn.Module`): the model, as wrapped by the trainer.
            inputs (`Mapping`): a batch of [`GazeCollator`].
            return_outputs (`bool`, *optional*, defaults to `False`): whether to return the scores as well.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of labels of all batches of a step, over all processes; that of this batch by default.

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
        names = ("pixel_values_videos", "gazing_pos", "if_padded_gazing", "num_gazing_each_frame", "labels")
        outputs = model(**{name: inputs[name] for name in (*names, "task_loss_labels")})
        num_labels = (inputs["labels"] != -100).sum()
        # Gradients are averaged over processes, so the loss of each is multiplied by their number.
        scale = 1 / num_labels if num_items_in_batch is None else self.accelerator.num_processes / num_items_in_batch
        loss = 0
        for name, count in (
            ("next_token_loss", num_labels),
            ("task_loss_error", (~inputs["task_loss_labels"].isnan()).sum()),
        ):
            total = outputs[name] * count
            self.add_metric(name, total, count)
            loss = loss + total * scale
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def relabel(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Replaces the gazes of a batch by the model's own, and the labels by the next choices of greedy search.

        Args:
            inputs (`Mapping`): a batch of [`GazeCollator`].

        Returns:
            `dict` with the same keys and shapes; slots without a label still have none.
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
        """Lets the model choose `counts` patches of each frame, sampled in half of the batches."""
        model, generator = self._unwrapped(), self.step_generator()
        sampling_draw, temperature_draw = torch.rand(2, generator=generator).tolist()
        was_training = model.training
        model.eval()
        # Decoding keeps its state in the precision of the weights.
        with torch.autocast(video.device.type, enabled=False):
            gaze = model.generate(
                video,
                counts.double() / model.config.grid.num_patches,
                do_sample=sampling_draw < 0.5,
                temperature=0.5 + 0.5 * temperature_draw,
                generator=generator_on(video.device, generator),
            )
        model.train(was_training)
        return gaze.gazing_pos

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Returns the loss of a batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _unwrapped(self) -> AutoGazeModel:
        return self.accelerator.unwrap_model(self.model)
