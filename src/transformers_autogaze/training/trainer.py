"""
What the trainers share.

This module owns random numbers that survive a restart and averages in the logs, for every trainer, and for those on clips
their processor and new ones in every epoch. It knows nothing of losses.
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


class NotingTrainer(Trainer):
    """
    A [`~transformers.Trainer`] with random numbers that survive a restart, averages in the logs, and models whose files
    replace older ones once they are whole.

    Args:
        args, kwargs: the arguments of [`~transformers.Trainer`].
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._measured: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._generator_step: int | None = None

    def step_generator(self) -> torch.Generator:
        """
        Gives the source of this step's random numbers, on the CPU.

        They follow from `seed`, the step and the process alone, so a resumed run draws what an unbroken one would.
        """
        step = self.state.global_step
        if step != self._generator_step:
            place = np.random.SeedSequence([self.args.seed, step, self.args.process_index])
            self._generator = torch.Generator().manual_seed(int(place.generate_state(1)[0]))
            self._generator_step = step
        return self._generator

    def note(self, name: str, total: torch.Tensor, count: torch.Tensor | None = None) -> None:
        """
        Keeps a number for the logs of training, where its average since the last time appears, over all processes.

        What is noted while the model is evaluated does not count.

        Args:
            name (`str`): what it is called there.
            total (`torch.Tensor` of shape `()`): a number, or the sum of several.
            count (`torch.Tensor` of shape `()`, *optional*): how many; one if not given.
        """
        if self.model.training:
            total = total.detach().float()
            count = torch.ones_like(total) if count is None else count.float()
            self._measured[name].append(torch.stack([total, count]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was noted since the last time to the logs of training; see [`~transformers.Trainer.log`]."""
        if "loss" in logs and self._measured:
            sums = torch.stack([torch.stack(values).sum(0) for values in self._measured.values()])
            sums = self.accelerator.reduce(sums, reduction="sum")
            logs = {**logs, **dict(zip(self._measured, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))}
            self._measured.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if not self.args.should_save:
            super()._save(output_dir, state_dict)  # Other processes may have to hand in their part.
            return
        with replacing_files(output_dir) as unfinished:
            super()._save(str(unfinished), state_dict)


class GazeClipTrainer(NotingTrainer):
    """
    A [`~transformers.Trainer`] for an [`AutoGazeModel`] and clips; what it learns from them, subclasses say.

    Args:
        model ([`AutoGazeModel`]): the model to train.
        args ([`~transformers.TrainingArguments`]): the arguments.
        processing_class (`AutoGazeProcessor` or `AutoGazeVideoProcessor`, *optional*):
            What makes the pixel values; saved with the model as an [`AutoGazeProcessor`]. The published preprocessing by
            default.
        kwargs: the other arguments of [`~transformers.Trainer`].
    """

    def __init__(
        self,
        model: AutoGazeModel,
        args: TrainingArguments,
        processing_class: AutoGazeProcessor | AutoGazeVideoProcessor | None = None,
        **kwargs,
    ):
        # The trainer takes a whole processor for one with a tokenizer.
        processing_class = getattr(processing_class, "video_processor", processing_class) or AutoGazeVideoProcessor()
        kwargs.setdefault("data_collator", GazeCollator(model.config))
        super().__init__(model, args, processing_class=processing_class, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        video_processor = self.processing_class
        # `AutoProcessor` is to find the whole processor beside the model.
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
    """Makes a source of random numbers on some device, seeded by one on the CPU."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
