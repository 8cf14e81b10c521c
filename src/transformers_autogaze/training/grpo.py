"""
Stage 2 of training: reinforcement learning on the model's own gazes, with group-relative advantages.

See docs/specification.md, section 13.2.

This module owns the rollouts, their advantages and the trainer. What a gaze is worth it asks of a reconstruction, any
callable like [`CompositeReconstruction`]; where clips come from is the dataset's affair.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainingArguments

from ..gazing_autogaze import GazeOutput
from ..modeling_autogaze import AutoGazeModel, AutoGazeModelOutput
from ..processing_autogaze import AutoGazeProcessor
from ..selection_autogaze import resize_frames
from ..video_processing_autogaze import AutoGazeVideoProcessor
from .data import BudgetSchedule
from .task import GazeTask
from .trainer import GazeClipTrainer, generator_on


@dataclass
class AutoGazeGRPOConfig(TrainingArguments):
    """
    Arguments of [`AutoGazeGRPOTrainer`]: those of [`~transformers.TrainingArguments`] and its own. The defaults are the
    published settings, for one pass over the clips.

    Args:
        group_size (`int`, *optional*, defaults to 12):
            Gazes sampled for every clip, at least 2.
        discount (`float`, *optional*, defaults to 0.995):
            What a reward loses with every further patch between a choice and it, above 0 and up to 1.
        temperature_start, temperature_end (`float`, *optional*, default to 3.0 and 0.3):
            Sampling temperature at the first and the last step, above 0; exponential in between.
        ratio_min, ratio_max (`float`, *optional*, both default to 1.0):
            Bounds of the share of a frame's patches that may be kept at most, 0..1, drawn for each batch, uniformly.
        threshold_share (`float`, *optional*, defaults to 1.0):
            Share of batches with a threshold, 0..1: a frame ends as soon as the model itself predicts a loss below it.
            In the others every frame keeps as many patches as it may.
        threshold_min, threshold_max (`float`, *optional*, default to 0.5 and 1.0):
            Bounds of the threshold, drawn for each batch, uniformly.
        rewarded_share (`float`, *optional*, defaults to 0.125):
            Share of the frames of a clip that are reconstructed and rewarded, drawn for each batch, above 0 and up to 1;
            one frame at least.
        learning_rate (`float`, *optional*, defaults to 5e-4), num_train_epochs (`float`, *optional*, defaults to 1.0):
            As in [`~transformers.TrainingArguments`].

    Raises:
        ValueError: if one of them is out of range; the message names it.

    Example:

    ```python
    >>> from transformers_autogaze.training.grpo import AutoGazeGRPOConfig

    >>> AutoGazeGRPOConfig(output_dir="gaze", group_size=1)
    Traceback (most recent call last):
    ValueError: `group_size` must be a whole number of at least 2, a gaze has no advantage over itself, got 1

    ```
    """

    group_size: int = field(default=12, metadata={"help": "Gazes sampled for every clip."})
    discount: float = field(
        default=0.995, metadata={"help": "What a reward loses with every further patch between a choice and it."}
    )
    temperature_start: float = field(default=3.0, metadata={"help": "Sampling temperature at the first step."})
    temperature_end: float = field(default=0.3, metadata={"help": "Sampling temperature at the last step."})
    ratio_min: float = field(default=1.0, metadata={"help": "Lowest share of a frame's patches that may be kept."})
    ratio_max: float = field(default=1.0, metadata={"help": "Highest share of a frame's patches that may be kept."})
    threshold_share: float = field(
        default=1.0, metadata={"help": "Share of batches in which a threshold ends frames."}
    )
    threshold_min: float = field(default=0.5, metadata={"help": "Lowest threshold drawn for a batch."})
    threshold_max: float = field(default=1.0, metadata={"help": "Highest threshold drawn for a batch."})
    rewarded_share: float = field(
        default=0.125, metadata={"help": "Share of a clip's frames that are reconstructed and rewarded."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "The initial learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training clips."})

    def __post_init__(self):
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ValueError(
                "`group_size` must be a whole number of at least 2, a gaze has no advantage over itself, got "
                f"{self.group_size}"
            )
        for name in ("discount", "rewarded_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie above 0 and not above 1, got {getattr(self, name)}")
        for name in ("temperature_start", "temperature_end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}")
        self.schedule  # noqa: B018 (checks its numbers)
        super().__post_init__()

    @property
    def schedule(self) -> BudgetSchedule:
        """Draws how many patches the frames of a batch may keep, and its threshold."""
        return BudgetSchedule(
            "uniform",
            self.ratio_min,
            self.ratio_max,
            dirichlet_share=0,
            threshold_share=self.threshold_share,
            threshold_min=self.threshold_min,
            threshold_max=self.threshold_max,
        )


class Rollout(NamedTuple):
    """
    Groups of gazes that the model sampled, and how well they reconstruct; the gazes of a clip stand side by side.

    Args:
        pixel_values_videos (`torch.FloatTensor` of shape `(clips * group, frames, channels, height, width)`):
            What was gazed at: every clip up to the last rewarded frame, once for each gaze.
        gaze (`GazeOutput`):
            The gazes, a batch of `clips * group`.
        rewarded (`list[int]`):
            The rewarded frames of gaze, ascending.
        loss (`torch.FloatTensor` of shape `(clips * group, rewarded frames)`):
            Reconstruction loss of these frames; the reward is minus it.
    """

    pixel_values_videos: torch.FloatTensor
    gaze: GazeOutput
    rewarded: list[int]
    loss: torch.FloatTensor


def slot_advantages(
    rewards: torch.Tensor, rewarded: Sequence[int], gaze: GazeOutput, group_size: int, discount: float
) -> torch.Tensor:
    """
    Credits every choice with what came of it, compared with the other gazes of its group.

    See docs/specification.md, section 13.2.

    A reward's advantage is what it is above the mean of its group. It goes to every patch chosen up to the end of its
    frame, times `discount` for each real slot in between; the last one before it gets it whole. Advantages of several
    rewards add up. Padding gets nothing and does not count.

    Args:
        rewards (`torch.FloatTensor` of shape `(clips * group_size, rewarded frames)`):
            One reward after each rewarded frame.
        rewarded (`Sequence[int]`): these frames, counted from the gaze's first.
        gaze (`GazeOutput`): the choices, a batch of `clips * group_size`; gazes of one clip stand side by side.
        group_size (`int`): gazes of a clip.
        discount (`float`): above 0 and up to 1.

    Returns:
        `torch.FloatTensor` of shape `(clips * group_size, N)`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import GazeGrid, GazeOutput
    >>> from transformers_autogaze.training.grpo import slot_advantages

    >>> ids, padding = torch.tensor([[0, 3, 4], [1, 2, 5]]), torch.tensor([[False, False, False], [False, True, False]])
    >>> gaze = GazeOutput.from_ids(ids, padding, torch.tensor([2, 1]), GazeGrid([32], patch_size=16))
    >>> slot_advantages(torch.tensor([[3.0], [1.0]]), [1], gaze, group_size=2, discount=0.5)
    tensor([[ 0.2500,  0.5000,  1.0000],
            [-0.5000,  0.0000, -1.0000]])

    ```
    """
    groups = rewards.unflatten(0, (-1, group_size))
    advantages = (groups - groups.mean(1, keepdim=True)).flatten(0, 1)
    is_real = ~gaze.if_padded_gazing
    rank = is_real.cumsum(-1)
    distance = rank.gather(1, _last_real_slots(gaze, rewarded))[:, :, None] - rank[:, None]
    credit = torch.where((distance >= 0) & is_real[:, None], discount ** distance.clamp(min=0).to(rewards.dtype), 0)
    return (advantages[..., None] * credit).sum(1)


def _last_real_slots(gaze: GazeOutput, frames: Sequence[int]) -> torch.Tensor:
    """Gives the last real slot of each of some frames, `(batch, len(frames))`; every frame has one."""
    frames = torch.tensor(frames, device=gaze.gazing_pos.device)
    slots = torch.arange(gaze.gazing_pos.shape[1], device=frames.device)
    is_candidate = ~gaze.if_padded_gazing[:, None] & (gaze.frame_of_slot == frames[:, None])
    return (slots * is_candidate).amax(-1)


class AutoGazeGRPOTrainer(GazeClipTrainer):
    """
    Trains an [`AutoGazeModel`] on gazes that it samples itself (docs/specification.md, section 13.2).

    For every clip a group of gazes is sampled at a temperature that falls from step to step. A few frames of each are
    reconstructed; gazes that reconstruct better than the rest of their group become likelier, the others less likely,
    and the predicted losses are trained to match the measured ones.

    It logs, averaged over the batches since the last time: `reward` (minus the reconstruction loss of a rewarded frame),
    `length` (kept patches of a frame), `entropy` (of the model's distribution over patches at temperature 1, in nats a
    slot), `task_loss_prediction_error` (absolute difference between the predicted and the measured loss), and the
    `temperature`. `evaluate` measures the reconstruction loss, over all frames, of the gazes that the model makes when
    it does not sample, at the middle of the ratios and of the thresholds, if there are any, as `eval_loss`.

    Random draws follow from `seed`, the step and the process alone, so a resumed run draws what an unbroken one would.

    Args:
        model (`AutoGazeModel`): the model to train, after stage 1 as a rule.
        args (`AutoGazeGRPOConfig`): the arguments.
        reconstruction (`Callable`, *optional*):
            What rewards come from: called as `reconstruction(pixels, gaze, frames)` with pixels in 0..1 of shape
            `(batch, frames, 3, height, width)` in the size of the model's finest scale, a [`GazeOutput`] and the frames
            to reconstruct, a list of `int`; what it returns has a `loss` of shape `(batch, len(frames))`. A [`GazeTask`]
            will do, of pixels or of features; that of pixels by default.
        processing_class (`AutoGazeProcessor` or `AutoGazeVideoProcessor`, *optional*):
            What made the pixel values, to undo their normalisation; it is saved with the model. The published
            preprocessing if not given.
        kwargs: the other arguments of [`~transformers.Trainer`]. Datasets hold items with `pixel_values_videos` of shape
            `(frames, channels, height, width)`.

    Raises:
        ValueError: if the arguments are not an [`AutoGazeGRPOConfig`] or `reconstruction` cannot be called.

    Example:

    ```python
    >>> from transformers_autogaze import AutoGazeConfig, AutoGazeModel
    >>> from transformers_autogaze.training.grpo import AutoGazeGRPOConfig, AutoGazeGRPOTrainer

    >>> model = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64))
    >>> args = AutoGazeGRPOConfig("gaze", group_size=4, ratio_min=0.1, ratio_max=0.2, use_cpu=True, report_to="none")
    >>> trainer = AutoGazeGRPOTrainer(model, args)
    >>> rollout = trainer.roll_out(torch.randn(2, 8, 3, 64, 64))
    >>> rollout.gaze.batch_size, len(rollout.rewarded), rollout.loss.shape
    (8, 1, torch.Size([8, 1]))

    ```
    """

    args: AutoGazeGRPOConfig

    def __init__(
        self,
        model: AutoGazeModel,
        args: AutoGazeGRPOConfig,
        reconstruction: Callable[..., Any] | None = None,
        processing_class: AutoGazeProcessor | AutoGazeVideoProcessor | None = None,
        **kwargs,
    ):
        if not isinstance(args, AutoGazeGRPOConfig):
            raise ValueError(f"`args` must be an AutoGazeGRPOConfig, got {type(args).__name__}")
        if reconstruction is not None and not callable(reconstruction):
            raise ValueError(f"`reconstruction` must be callable, got {type(reconstruction).__name__}")
        super().__init__(model, args, processing_class, **kwargs)
        # The loss is a mean over the batch, whatever further arguments the model's forward takes.
        self.model_accepts_loss_kwargs = False
        self.reconstruction = GazeTask(model.config.grid) if reconstruction is None else reconstruction
        if isinstance(self.reconstruction, nn.Module):
            self.reconstruction.to(args.device).eval()

    @property
    def temperature(self) -> float:
        """Sampling temperature of the step that is due."""
        start, end = self.args.temperature_start, self.args.temperature_end
        return start * (end / start) ** (self.state.global_step / max(1, self.state.max_steps - 1))

    @torch.no_grad()
    def roll_out(self, pixel_values_videos: torch.Tensor, generator: torch.Generator | None = None) -> Rollout:
        """
        Samples a group of gazes for every clip and measures how well they reconstruct some of its frames.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(clips, frames, channels, height, width)`):
                Normalised frames.
            generator (`torch.Generator`, *optional*): where random numbers come from, on the CPU.

        Returns:
            [`Rollout`]
        """
        args, rate = self.args, self.model.config.frame_sampling_rate
        num_frames = pixel_values_videos.shape[1] // rate
        order = torch.randperm(num_frames, generator=generator)
        rewarded = sorted(order[: max(1, round(num_frames * args.rewarded_share))].tolist())
        # No reward can depend on what comes after the last of them.
        num_frames = rewarded[-1] + 1
        clips = pixel_values_videos[:, : num_frames * rate]
        groups = clips.repeat_interleave(args.group_size, dim=0)
        ratios, threshold = args.schedule.draw(num_frames, generator)
        # The decode loop keeps its state in the weights' own precision.
        with torch.autocast(groups.device.type, enabled=False):
            gaze = self.model.generate(
                groups,
                ratios,
                threshold,
                do_sample=True,
                temperature=self.temperature,
                generator=generator_on(groups.device, generator),
            )
        return Rollout(groups, gaze, rewarded, self._measure(clips, gaze, rewarded))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Rolls out a batch of clips and gives the loss of the policy plus the error of the predicted losses.

        Args:
            model (`nn.Module`): the model, as the trainer has wrapped it.
            inputs (`dict`): a batch with `pixel_values_videos` of shape `(clips, frames, channels, height, width)`.
            return_outputs (`bool`, *optional*, defaults to `False`): whether to return the scores as well.
            num_items_in_batch (*optional*): not used.

        Returns:
            `torch.FloatTensor` of shape `()`, or a `tuple` of it and an [`AutoGazeModelOutput`].
        """
        rollout = self.roll_out(inputs["pixel_values_videos"], self.step_generator())
        gaze, rewarded = rollout.gaze, rollout.rewarded
        scores = model(
            rollout.pixel_values_videos,
            gaze.gazing_pos,
            gaze.if_padded_gazing,
            gaze.num_gazing_each_frame,
            output_logits=True,
        )
        advantages = slot_advantages(-rollout.loss, rewarded, gaze, self.args.group_size, self.args.discount)
        # p is the plain probability of scoring, as published, not the one sampled from: no temperature, and patches that
        # are taken keep their share. Both give the same direction where the gazes of a group still agree, since their
        # advantages cancel there but for what was chosen; this one does not grow as the temperature falls.
        ratio = (scores.log_action_probs - scores.log_action_probs.detach()).exp()
        policy_loss = -(ratio * advantages).sum(-1).mean()
        predicted = scores.task_loss_prediction.gather(1, _last_real_slots(gaze, rewarded)).to(rollout.loss.dtype)
        self._note_rollout(rollout, scores, (predicted - rollout.loss).detach())
        loss = policy_loss + (predicted - rollout.loss).square().mean()
        return (loss, scores) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Gives the mean reconstruction loss of the gazes that the model makes of a batch when it does not sample."""
        clips = self._prepare_inputs(inputs)["pixel_values_videos"]
        args = self.args
        threshold = (args.threshold_min + args.threshold_max) / 2 if args.threshold_share else None
        with torch.no_grad():
            gaze = self.model.generate(clips, (args.ratio_min + args.ratio_max) / 2, threshold)
            return self._measure(clips, gaze, list(range(gaze.num_frames))).mean(), None, None

    def _note_rollout(self, rollout: Rollout, scores: AutoGazeModelOutput, error: torch.Tensor) -> None:
        """Keeps what is to be logged of a batch."""
        is_real = ~rollout.gaze.if_padded_gazing
        log_probs = scores.logits.detach().float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        self.note("reward", -rollout.loss.mean())
        self.note("length", rollout.gaze.num_real_each_frame.float().mean())
        self.note("entropy", entropy[is_real].mean())
        self.note("task_loss_prediction_error", error.abs().mean())
        self.note("temperature", error.new_tensor(self.temperature))

    def _measure(self, clips: torch.Tensor, gaze: GazeOutput, frames: list[int]) -> torch.Tensor:
        """Gives the reconstruction loss of some frames, `(batch, len(frames))`, of the gazes of clips or groups of them."""
        clips = resize_frames(clips[:, :: gaze.frame_sampling_rate].float(), gaze.grid.sizes[-1])
        pixels = self.processing_class.to_pixels(clips).clamp(0, 1)
        if not isinstance(self.reconstruction, GazeTask):  # which looks at a clip once for all of its gazes
            pixels = pixels.repeat_interleave(gaze.batch_size // len(clips), dim=0)
        return self.reconstruction(pixels, gaze, frames).loss.float()
