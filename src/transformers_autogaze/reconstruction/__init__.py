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


__all__ = ["CompositeReconstruction", "ReconstructionOutput", "mse_to_task_loss", "task_loss_to_mse"]
