"""
The task that AutoGaze learns: a low loss of the kept patches, in pixels or in the features of an encoder.

Labels, on-policy targets and rewards share this loss. A selector with a canvas search computes it, so labels are what this
selector would choose.
"""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..composite_autogaze import check_reconstruction_inputs
from ..feature_gaze_autogaze import FeatureGazeModel
from ..gazing_autogaze import GazeOutput
from ..greedy_autogaze import GreedyGazeConfig, GreedyGazeSelector
from ..grid_autogaze import GazeGrid


# With this normalisation, a selector takes pixels in 0..1.
_PIXELS: dict[str, Any] = {"rescale_factor": 1 / 255, "offset": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


class FrameLosses(NamedTuple):
    """
    Output of [`GazeTask`].

    Args:
        loss (`torch.FloatTensor` of shape `(batch, frames)`): task loss of each requested frame.
    """

    loss: torch.Tensor


class GazeTask(nn.Module):
    """
    Measures the task loss of kept patches, and searches greedily for the patches that minimise it.

    The loss of pixels is `(40 - PSNR) / 20` of the closed-form reconstruction. The loss of features is the share of the encoder's
    feature variance that a frame loses, 0..1, as predicted by a [`FeatureGazeModel`].

    Args:
        grid ([`GazeGrid`]): the patches.
        model ([`FeatureGazeModel`], *optional*): a selector distilled from the encoder; the task is that of pixels without one.

    Raises:
        ValueError: if `model` is no [`FeatureGazeModel`] or does not support a scale of the grid.

    Example:

    ```python
    >>> import torch
    >>> from transformers_autogaze import GazeGrid
    >>> from transformers_autogaze.training import GazeTask

    >>> pixels = torch.full((1, 2, 3, 32, 32), 0.5)
    >>> pixels[..., 16:, 16:] = 1.0  # a white patch in the last corner of both frames
    >>> task = GazeTask(GazeGrid([16, 32]))
    >>> gaze = task.search(pixels, gazing_ratio=0.4, task_loss_requirement=0.0)
    >>> gaze.gazing_pos.tolist(), task(pixels, gaze, frames=[1]).loss
    ([[4, 6]], tensor([[-3.]]))

    ```
    """

    def __init__(self, grid: GazeGrid, model: FeatureGazeModel | None = None):
        super().__init__()
        self.grid = grid
        self.selector: GreedyGazeSelector | FeatureGazeModel
        if model is None:
            self.selector = GreedyGazeSelector(GreedyGazeConfig(grid.scales, grid.patch_size, **_PIXELS))
        elif isinstance(model, FeatureGazeModel):
            # A shallow copy shares the weights with the model.
            self.selector = copy.copy(cast(FeatureGazeModel, model.for_grid(grid)))
            self.selector.config = type(model.config)(**{**self.selector.config.to_diff_dict(), **_PIXELS})
        else:
            raise ValueError(f"`model` must be a FeatureGazeModel, got {type(model).__name__}")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that identify the task of labels, for JSON."""
        is_of_pixels = isinstance(self.selector, GreedyGazeSelector)
        return {
            "task": "pixels" if is_of_pixels else "features",
            "weights": None if is_of_pixels else fingerprint(self.selector, self.selector.config.loss_knots),
            "scales": [list(size) for size in self.grid.sizes],
            "patch_size": self.grid.patch_size,
        }

    def check_thresholds(self, lowest: float, highest: float) -> None:
        """
        Checks the bounds of random thresholds against the range of losses.

        Raises:
            ValueError: if a bound is out of range.
        """
        try:
            self.selector.check_task_loss_requirement(torch.tensor([lowest, highest]))
        except ValueError as error:
            raise ValueError(
                f"`threshold_min` and `threshold_max` must be losses of the task, got {lowest} and {highest}: {error}"
            ) from error

    def search(
        self,
        pixels: torch.Tensor,
        gazing_ratio: float | Sequence[float] | torch.Tensor,
        task_loss_requirement: float | None = None,
    ) -> GazeOutput:
        """
        Chooses patches greedily: each next patch lowers the error of its frame most.

        Args:
            pixels (`torch.FloatTensor` of shape `(batch, frames, 3, height, width)`):
                Pixels in 0..1, one frame per frame of gaze, of the finest scale's size.
            gazing_ratio (`float`, sequence of `float` or `torch.Tensor` of shape `(frames,)`):
                Largest share of the patches of a frame to choose.
            task_loss_requirement (`float`, *optional*): task loss at which a frame ends.

        Returns:
            [`GazeOutput`], whose `task_loss_prediction` is the measured loss after each choice.
        """
        return self.selector.generate(pixels, gazing_ratio, task_loss_requirement)

    @torch.no_grad()
    def measure(self, pixels: torch.Tensor, gaze: GazeOutput) -> torch.Tensor:
        """
        Measures the task loss after each choice of any gaze.

        Args:
            pixels (`torch.FloatTensor`): as in [`~GazeTask.search`]; each clip belongs to `n` consecutive gazes.
            gaze ([`GazeOutput`]): the kept patches, in the order of choice.

        Returns:
            `torch.FloatTensor` of shape `(batch, N)`: loss of the frame after each slot.
        """
        frames = self._look(pixels, gaze)
        errors = self.selector.search.measure_choices(frames, gaze)
        num_values = self.selector.search.start_canvas(frames[:1]).image.numel()
        return self.selector.mse_to_loss((errors / num_values).to(frames.dtype))

    @torch.no_grad()
    def continuations(self, pixels: torch.Tensor, gaze: GazeOutput, step_size: int) -> torch.Tensor:
        """
        Returns the patches that greedy search would choose next at each step of any gaze.

        Args:
            pixels, gaze: as in [`~GazeTask.measure`].
            step_size (`int`): patches of a decoding step; every frame begins with a new step.

        Returns:
            `torch.LongTensor` of shape `(batch, N)`: ids, counted from the first patch of the first frame.
        """
        ids = self.selector.search.continuations(self._look(pixels, gaze), gaze, step_size)
        return ids + gaze.frame_of_slot * self.grid.num_patches

    def forward(self, pixels: torch.Tensor, gaze: GazeOutput, frames: Sequence[int] | None = None) -> FrameLosses:
        """
        Measures the task loss of whole frames, with the same call as a reconstruction.

        Args:
            pixels, gaze: as in [`~GazeTask.measure`].
            frames (`Sequence[int]`, *optional*): indices of the frames to measure, all by default.

        Returns:
            [`FrameLosses`]
        """
        frames = list(range(gaze.num_frames) if frames is None else frames)
        last_slots = gaze.num_gazing_each_frame.cumsum(0) - 1
        return FrameLosses(self.measure(pixels, gaze)[:, last_slots[frames]])

    def _look(self, pixels: torch.Tensor, gaze: GazeOutput) -> torch.Tensor:
        """Returns the pixels or features that the search works on, one clip for each gaze."""
        count = gaze.batch_size // max(1, len(pixels))
        check_reconstruction_inputs(pixels.repeat_interleave(count, dim=0), gaze, None, self.grid)
        # The selector processes each clip once, even if it has several gazes.
        return self.selector.look(pixels, 1).repeat_interleave(count, dim=0)


def fingerprint(module: nn.Module, *others: Any) -> str:
    """
    Returns a hash of the weights of a module.

    Args:
        module (`nn.Module`): the module.
        others: other values to include, such as its calibration.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(others).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
