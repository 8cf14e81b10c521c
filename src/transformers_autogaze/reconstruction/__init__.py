"""
Reconstruction of videos from their kept patches.

The closed-form reconstruction is defined in `composite_autogaze`, since it is part of the remote code of checkpoints.
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
