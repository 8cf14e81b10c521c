"""
Base classes of the trainers.

[`MetricsTrainer`] adds reproducible random numbers and averaged metrics; [`GazeClipTrainer`] adds a video processor and a sampler
that draws new clips in every epoch.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from ..modeling_autogaze import AutoGazeModel
from ..processing_autogaze import AutoGazeProcessor
from ..utils.output_files import replacing_files
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .data import ClipSampler, GazeClipDataset, GazeCollator


class MetricsTrainer(Trainer):
    """
    A [`~transformers.Trainer`] that logs averaged metrics, draws the same random numbers in a resumed run, and saves models so
    that an interrupted save keeps the old files.

    Args:
        args, kwargs: the arguments of [`~transformers.Trainer`].
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._generator_step: int | None = None

    def step_generator(self) -> torch.Generator:
        """
        Returns the source of this step's random numbers, on the CPU.

        They depend on `seed`, the step and the process only, so a resumed run draws the same numbers as an uninterrupted one.
        """
        step = self.state.global_step
        if step != self._generator_step:
            sequence = np.random.SeedSequence([self.args.seed, step, self.args.process_index])
            self._generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
            self._generator_step = step
        return self._generator

    def add_metric(self, name: str, total: torch.Tensor, count: torch.Tensor | None = None) -> None:
        """
        Adds a value to a metric of the training logs, which average it since the last log, over all processes.

        Values of an evaluation are ignored.

        Args:
            name (`str`): name of the metric.
            total (`torch.Tensor` of shape `()`): a value, or the sum of several.
            count (`torch.Tensor` of shape `()`, *optional*): number of values, one if not given.
        """
        if self.model.training:
            total = total.detach().float()
            count = torch.ones_like(total) if count is None else count.float()
            self._metrics[name].append(torch.stack([total, count]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averaged metrics to the training logs; see [`~transformers.Trainer.log`]."""
        if "loss" in logs and self._metrics:
            sums = torch.stack([torch.stack(values).sum(0) for values in self._metrics.values()])
            sums = self.accelerator.reduce(sums, reduction="sum")
            logs = {**logs, **dict(zip(self._metrics, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))}
            self._metrics.clear()
        super().log(logs, start_time)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """
        Returns the batches of the next step, none if all steps are made; see [`~transformers.Trainer`].

        `Trainer` looks for the end only after a step, so a resumed run that was finished would make another one.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if not self.args.should_save:
            super()._save(output_dir, state_dict)  # Other processes may have to contribute their shards.
            return
        with replacing_files(output_dir) as unfinished:
            super()._save(str(unfinished), state_dict)


class GazeClipTrainer(MetricsTrainer):
    """
    A [`~transformers.Trainer`] for an [`AutoGazeModel`] and clips; subclasses define the loss.

    Args:
        model ([`AutoGazeModel`]): the model to train.
        args ([`~transformers.TrainingArguments`]): the arguments.
        processing_class (`AutoGazeProcessor` or `AutoGazeVideoProcessor`, *optional*):
            Preprocessing of the clips, the published one by default; it is saved with the model as an [`AutoGazeProcessor`].
        kwargs: the other arguments of [`~transformers.Trainer`].
    """

    model: AutoGazeModel
    processing_class: Any  # an `AutoGazeVideoProcessor`, except while it is saved

    def __init__(
        self,
        model: AutoGazeModel,
        args: TrainingArguments,
        processing_class: AutoGazeProcessor | AutoGazeVideoProcessor | None = None,
        **kwargs,
    ):
        # `Trainer` expects a tokenizer in an `AutoGazeProcessor`, but not in a video processor.
        processing_class = getattr(processing_class, "video_processor", processing_class) or AutoGazeVideoProcessor()
        kwargs.setdefault("data_collator", GazeCollator(model.config))
        super().__init__(model, args, processing_class=processing_class, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        video_processor = self.processing_class
        # A complete processor is saved, so that `AutoProcessor` loads it.
        self.processing_class = AutoGazeProcessor(video_processor)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = video_processor

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, GazeClipDataset):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            batch_size = self.args.train_batch_size * self.args.world_size
            return ClipSampler(dataset, batch_size, seed, epoch=lambda: int(self.state.epoch or 0))
        return super()._get_train_sampler(dataset)


def generator_on(device: torch.device, generator: torch.Generator | None) -> torch.Generator:
    """Makes a source of random numbers on a device, seeded by one on the CPU."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
