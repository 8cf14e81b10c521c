"""Training: distillation from an encoder (`distill`), and the two stages of AutoGaze: on labels (`ntp`) and on own gazes (`grpo`)."""

from .augmentation import ClipAugmentation
from .data import BudgetSchedule, GazeClipDataset, GazeCollator
from .distill import distill
from .distillation_trainer import CropPairDataset, DistillationArguments, DistillationTrainer
from .grpo import AutoGazeGRPOConfig, AutoGazeGRPOTrainer
from .label_files import ClipLabels, read_labels, write_labels
from .labels import GreedyLabeller, label_videos
from .ntp import AutoGazeTrainer, AutoGazeTrainingArguments
from .task import GazeTask
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
    "GazeTask",
    "GreedyLabeller",
    "VideoCollection",
    "distill",
    "label_videos",
    "read_labels",
    "write_labels",
]
