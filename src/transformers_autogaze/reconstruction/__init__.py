"""
Rebuilding videos from their kept patches.

The closed form lives in `composite_autogaze`, among the modules that travel with a checkpoint, because the pipeline needs
it there; here it is at hand under the name of its topic.
"""

from ..composite_autogaze import (
    CompositeReconstruction,
    ReconstructionOutput,
    mse_to_task_loss,
    task_loss_to_mse,
)
from .losses import FeatureLoss, L1Loss, WeightedLoss, published_loss
from .video_mae import GazeVideoMAE, GazeVideoMAEConfig


__all__ = [
    "CompositeReconstruction",
    "FeatureLoss",
    "GazeVideoMAE",
    "GazeVideoMAEConfig",
    "L1Loss",
    "ReconstructionOutput",
    "WeightedLoss",
    "mse_to_task_loss",
    "published_loss",
    "task_loss_to_mse",
]
