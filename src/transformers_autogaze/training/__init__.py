"""Training: distillation from an encoder (`distill`); labels and clips, stage 1 on labels (`ntp`), stage 2 on own gazes (`grpo`)."""

from .augmentation import ClipAugmentation
from .data import BudgetSchedule, GazeClipDataset, GazeCollator
from .distill import distill
from .distillation import CropPairDataset, DistillationArguments, DistillationTrainer
from .grpo import AutoGazeGRPOConfig, AutoGazeGRPOTrainer
from .history import teach_history
from .initialization import initialize_gaze_model
from .labels import ClipLabels, GreedyLabeller, label_videos, read_labels, write_labels
from .ntp import AutoGazeTrainer, AutoGazeTrainingArguments
from .videos import VideoCollection


__all__ = [
    "AutoGazeGRPOConfig",
    "AutoGazeGRPOTrainer",
    "AutoGazeTrainer",
    "AutoGazeTrainingArguments",
    "BudgetSchedule",
    "ClipAugmentation",
    "ClipLabels",
    "CropPairDataset",
    "DistillationArguments",
    "DistillationTrainer",
    "GazeClipDataset",
    "GazeCollator",
    "GreedyLabeller",
    "VideoCollection",
    "distill",
    "initialize_gaze_model",
    "label_videos",
    "read_labels",
    "teach_history",
    "write_labels",
]
