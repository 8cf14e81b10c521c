"""Training: labels and clips, stage 1 on labels (`ntp`), stage 2 on the model's own gazes (`grpo`)."""

from .augmentation import ClipAugmentation
from .data import BudgetSchedule, GazeClipDataset, GazeCollator
from .labels import ClipLabels
from .ntp import AutoGazeTrainer, AutoGazeTrainingArguments


__all__ = [
    "AutoGazeTrainer",
    "AutoGazeTrainingArguments",
    "BudgetSchedule",
    "ClipAugmentation",
    "ClipLabels",
    "GazeClipDataset",
    "GazeCollator",
]
