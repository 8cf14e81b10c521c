"""
Stage 2 of training: reinforcement learning on the model's own gazes, with group-relative advantages.

See docs/specification.md, section 13.2. The reward is minus the loss of a reconstruction, any callable like
[`CompositeReconstruction`].
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
            Factor of a reward for every patch between a choice and the reward, above 0 and up to 1.
        temperature_start, temperature_end (`float`, *optional*, default to 3.0 and 0.3):
            Sampling temperature at the first and the last step, above 0; exponential in between.
        ratio_min, ratio_max (`float`, *optional*, both default to 1.0):
            Bounds of the budget of a frame as a share of its patches, 0..1, drawn uniformly for each batch.
        threshold_share (`float`, *optional*, defaults to 1.0):
            Share of batches with a threshold, 0..1: a frame ends as soon as the model predicts a loss below it. In the other
            batches every frame uses its whole budget.
        threshold_min, threshold_max (`float`, *optional*, default to 0.5 and 1.0):
            Bounds of the threshold, drawn uniformly for each batch.
        rewarded_share (`float`, *optional*, defaults to 0.125):
            Share of the frames of a clip that are reconstructed and rewarded, above 0 and up to 1, at least one frame; they are
            drawn for each batch.
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
        default=0.995, metadata={"help": "Factor of a reward for every patch between a choice and the reward."}
    )
    temperature_start: float = field(default=3.0, metadata={"help": "Sampling temperature at the first step."})
    temperature_end: float = field(default=0.3, metadata={"help": "Sampling temperature at the last step."})
    ratio_min: float = field(default=1.0, metadata={"help": "Lowest budget, as a share of a frame's patches."})
    ratio_max: float = field(default=1.0, metadata={"help": "Highest budget, as a share of a frame's patches."})
    threshold_share: float = field(default=1.0, metadata={"help": "Share of batches with a threshold."})
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
        self.schedule  # noqa: B018 (its constructor checks the bounds)
        super().__post_init__()

    @property
    def schedule(self) -> BudgetSchedule:
        """Draws the budgets and the threshold of a batch."""
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
    Groups of gazes that the model sampled, and their reconstruction losses; the gazes of a clip are consecutive.

    Args:
        pixel_values_videos (`torch.FloatTensor` of shape `(clips * group, frames, channels, height, width)`):
            The clips up to the last rewarded frame, repeated for each gaze.
        gaze (`GazeOutput`):
            The gazes, a batch of `clips * group`.
        rewarded (`list[int]`):
            Indices of the rewarded frames of gaze, ascending.
        loss (`torch.FloatTensor` of shape `(clips * group, rewarded frames)`):
            Reconstruction losses of these frames, the negative rewards.
    """

    pixel_values_videos: torch.Tensor
    gaze: GazeOutput
    rewarded: list[int]
    loss: torch.Tensor


def slot_advantages(
    rewards: torch.Tensor, rewarded: Sequence[int], gaze: GazeOutput, group_size: int, discount: float
) -> torch.Tensor:
    """
    Computes the advantage of every choice over the other gazes of its group.

    See docs/specification.md, section 13.2.

    The advantage of a reward is its difference from the mean of the group. It is added to every patch chosen up to the end of the
    rewarded frame, multiplied by `discount` for each later real slot of these. Padding has no advantage and is not counted.

    Args:
        rewards (`torch.FloatTensor` of shape `(clips * group_size, rewarded frames)`):
            One reward after each rewarded frame.
        rewarded (`Sequence[int]`): indices of the rewarded frames.
        gaze (`GazeOutput`): a batch of `clips * group_size` gazes; the gazes of a clip are consecutive.
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
    """Returns the last real slot of each of some frames, `(batch, len(frames))`; every frame has one."""
    wanted = torch.tensor(frames, device=gaze.gazing_pos.device)
    slots = torch.arange(gaze.gazing_pos.shape[1], device=wanted.device)
    is_candidate = ~gaze.if_padded_gazing[:, None] & (gaze.frame_of_slot == wanted[:, None])
    return (slots * is_candidate).amax(-1)


class AutoGazeGRPOTrainer(GazeClipTrainer):
    """
    Trains an [`AutoGazeModel`] on gazes that it samples itself (docs/specification.md, section 13.2).

    For every clip a group of gazes is sampled, at a temperature that falls from step to step. Some frames of each are
    reconstructed. Gazes that reconstruct better than the mean of their group become likelier and the others less likely, and the
    predicted losses are trained to match the measured ones.

    It logs, averaged since the last log: `reward` (minus the reconstruction loss of a rewarded frame), `length` (kept patches of a
    frame), `entropy` (of the model's distribution over patches at temperature 1, in nats per slot),
    `task_loss_prediction_error` (absolute difference between the predicted and the measured loss), and `temperature`. The
    `eval_loss` of `evaluate` is the mean reconstruction loss over all frames of gazes that are not sampled, at the midpoints of
    the ratios and of the thresholds, if there are any.

    Random numbers depend on `seed`, the step and the process only, so a resumed run draws the same numbers as an uninterrupted
    one.

    Args:
        model (`AutoGazeModel`): the model to train, usually after stage 1.
        args (`AutoGazeGRPOConfig`): the arguments.
        reconstruction (`Callable`, *optional*):
            Source of the rewards, called as `reconstruction(pixels, gaze, frames)` with pixels in 0..1 of shape
            `(batch, frames, 3, height, width)` in the size of the model's finest scale, a [`GazeOutput`] and the indices of the
            frames to reconstruct. Its output has a `loss` of shape `(batch, len(frames))`. It can be a [`GazeTask`], of pixels or
            of features; that of pixels by default.
        processing_class (`AutoGazeProcessor` or `AutoGazeVideoProcessor`, *optional*):
            Preprocessing of the clips, which is undone for the reconstruction; the published one by default. It is saved with the
            model.
        kwargs: the other arguments of [`~transformers.Trainer`]. Datasets have items with `pixel_values_videos` of shape
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
        # The loss is a mean over the batch, so `Trainer` has to average it over accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.reconstruction = GazeTask(model.config.grid) if reconstruction is None else reconstruction
        if isinstance(self.reconstruction, nn.Module):
            self.reconstruction.to(args.device).eval()

    @property
    def temperature(self) -> float:
        """Sampling temperature of the current step."""
        start, end = self.args.temperature_start, self.args.temperature_end
        return start * (end / start) ** (self.state.global_step / max(1, self.state.max_steps - 1))

    @torch.no_grad()
    def roll_out(self, pixel_values_videos: torch.Tensor, generator: torch.Generator | None = None) -> Rollout:
        """
        Samples a group of gazes for every clip and measures the reconstruction loss of some frames.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(clips, frames, channels, height, width)`):
                Normalised frames.
            generator (`torch.Generator`, *optional*): source of random numbers, on the CPU.

        Returns:
            [`Rollout`]
        """
        args, rate = self.args, self.model.config.frame_sampling_rate
        num_frames = pixel_values_videos.shape[1] // rate
        order = torch.randperm(num_frames, generator=generator)
        rewarded = sorted(order[: max(1, round(num_frames * args.rewarded_share))].tolist())
        # Rewards do not depend on later frames.
        num_frames = rewarded[-1] + 1
        clips = pixel_values_videos[:, : num_frames * rate]
        groups = clips.repeat_interleave(args.group_size, dim=0)
        ratios, threshold = args.schedule.draw(num_frames, generator)
        # Decoding keeps its state in the precision of the weights.
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
        Rolls out a batch of clips and computes the policy loss plus the squared error of the predicted losses.

        Args:
            model (`nn.Module`): the model, as wrapped by the trainer.
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
        # The ratio uses the model's own probabilities, as published, and not those that were sampled from, which have a
        # temperature and exclude patches that were already chosen. While the gazes of a group agree, both give gradients of the
        # same direction, since advantages cancel except at the choice; these do not grow as the temperature falls.
        ratio = (scores.log_action_probs - scores.log_action_probs.detach()).exp()
        policy_loss = -(ratio * advantages).sum(-1).mean()
        predicted = scores.task_loss_prediction.gather(1, _last_real_slots(gaze, rewarded)).to(rollout.loss.dtype)
        self._add_rollout_metrics(rollout, scores, (predicted - rollout.loss).detach())
        loss = policy_loss + (predicted - rollout.loss).square().mean()
        return (loss, scores) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Returns the mean reconstruction loss of a batch for gazes that are not sampled."""
        clips = self._prepare_inputs(inputs)["pixel_values_videos"]
        args = self.args
        threshold = (args.threshold_min + args.threshold_max) / 2 if args.threshold_share else None
        with torch.no_grad():
            gaze = self.model.generate(clips, (args.ratio_min + args.ratio_max) / 2, threshold)
            return self._measure(clips, gaze, list(range(gaze.num_frames))).mean(), None, None

    def _add_rollout_metrics(self, rollout: Rollout, scores: AutoGazeModelOutput, error: torch.Tensor) -> None:
        """Adds the metrics of a batch."""
        is_real = ~rollout.gaze.if_padded_gazing
        log_probs = scores.logits.detach().float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        self.add_metric("reward", -rollout.loss.mean())
        self.add_metric("length", rollout.gaze.num_real_each_frame.float().mean())
        self.add_metric("entropy", entropy[is_real].mean())
        self.add_metric("task_loss_prediction_error", error.abs().mean())
        self.add_metric("temperature", error.new_tensor(self.temperature))

    def _measure(self, clips: torch.Tensor, gaze: GazeOutput, frames: list[int]) -> torch.Tensor:
        """Returns the reconstruction losses of some frames, `(batch, len(frames))`, of one or more gazes of each clip."""
        clips = resize_frames(clips[:, :: gaze.frame_sampling_rate].float(), gaze.grid.sizes[-1])
        pixels = self.processing_class.to_pixels(clips).clamp(0, 1)
        if not isinstance(self.reconstruction, GazeTask):  # which processes a clip once for all of its gazes
            pixels = pixels.repeat_interleave(gaze.batch_size // len(clips), dim=0)
        return self.reconstruction(pixels, gaze, frames).loss.float()
