"""
AutoGaze for Hugging Face Transformers: chooses the patches of a video that a vision encoder needs.

Importing this package registers its models and processors with the Auto classes, and its pipeline,
`pipeline("video-token-pruning")`.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_autogaze import PIPELINE_TASK, AutoGazeConfig
from .feature_gaze_autogaze import FeatureGazeCache, FeatureGazeModel
from .feature_network_autogaze import FeatureGazeConfig
from .gazing_autogaze import GazeOutput
from .generation_autogaze import GazeCache
from .greedy_autogaze import GreedyGazeCache, GreedyGazeConfig, GreedyGazeSelector
from .grid_autogaze import GazeGrid
from .modeling_autogaze import AutoGazeModel
from .pipeline_autogaze import VideoTokenPruningPipeline
from .processing_autogaze import AutoGazeProcessor
from .selection_autogaze import GazeSelector
from .video_processing_autogaze import AutoGazeVideoProcessor


__version__ = "0.1.0"

_PRETRAINED = Path(__file__).parent / "pretrained"
DEFAULT_SELECTOR = FEATURES_SELECTOR = _PRETRAINED / "features"
"""
Folder of the default selector, a [`FeatureGazeModel`] distilled from DINOv2 (small). It keeps a quarter of a clip's tokens, on
the finest scale.
"""
FINEST_SELECTOR = _PRETRAINED / "finest"
"""Folder of the greedy selector on the finest scale, which needs no weights."""
GREEDY_SELECTOR = _PRETRAINED / "greedy"
"""Folder of the greedy selector on the four scales of the published model."""
AUTOGAZE_SELECTOR = "nvidia/AutoGaze"
"""Hub repository of the published AutoGaze weights. Their licence forbids commercial use."""

for _config, _model in (
    (AutoGazeConfig, AutoGazeModel),
    (FeatureGazeConfig, FeatureGazeModel),
    (GreedyGazeConfig, GreedyGazeSelector),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, AutoGazeProcessor, exist_ok=True)
    AutoVideoProcessor.register(_config, AutoGazeVideoProcessor, exist_ok=True)
if PIPELINE_TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        PIPELINE_TASK,
        pipeline_class=VideoTokenPruningPipeline,
        pt_model=AutoModel,
        default={"model": (str(DEFAULT_SELECTOR), None)},
        type="multimodal",
    )

# Imported on first use, to keep the import of this package fast.
_LAZY = {
    "AutoGazeGRPOConfig": "training",
    "AutoGazeGRPOTrainer": "training",
    "AutoGazeTrainer": "training",
    "AutoGazeTrainingArguments": "training",
    "CompositeReconstruction": "reconstruction",
    "GazeVideoMAE": "reconstruction",
    "GazeQwenVL": "integrations",
    "GazeVideoLM": "integrations",
    "GazeVisionCache": "integrations",
    "GazeVisionModel": "integrations",
    "GazeVisionOutput": "integrations",
    "mse_to_task_loss": "reconstruction",
    "task_loss_to_mse": "reconstruction",
    "GazeFile": "gaze_files_autogaze",
    "GazeFileWriter": "gaze_files_autogaze",
    "contact_sheet": "gaze_pictures_autogaze",
    "paint_gaze": "gaze_pictures_autogaze",
    "side_by_side": "video",
    "KeptPatches": "pruning",
    "OpenedVideo": "pruning",
    "VideoPruning": "pruning",
    "prune_video": "pruning",
    "GazeChunk": "video",
    "gaze_video": "video",
    "stream_gaze": "video",
    "read_video": "frame_decoding_autogaze",
    "stream_video": "frame_decoding_autogaze",
    "write_video": "video",
}

__all__ = [
    "AUTOGAZE_SELECTOR",
    "DEFAULT_SELECTOR",
    "FEATURES_SELECTOR",
    "FINEST_SELECTOR",
    "GREEDY_SELECTOR",
    "AutoGazeConfig",
    "AutoGazeModel",
    "AutoGazeProcessor",
    "AutoGazeVideoProcessor",
    "FeatureGazeCache",
    "FeatureGazeConfig",
    "FeatureGazeModel",
    "GazeCache",
    "GazeGrid",
    "GazeOutput",
    "GazeSelector",
    "GreedyGazeCache",
    "GreedyGazeConfig",
    "GreedyGazeSelector",
    "VideoTokenPruningPipeline",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
