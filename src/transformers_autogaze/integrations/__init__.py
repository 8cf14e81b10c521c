"""Vision towers and video MLLMs of transformers on the kept patches of videos."""

from .mllm import GazeVideoLM
from .nvila import attach, gaze_to_nvila, nvila_to_gaze
from .qwen_vl import GazeQwenVL
from .video_tokens import SinusoidalTimeEmbedding
from .vision import GazeVisionModel, GazeVisionOutput
from .vision_cache import GazeVisionCache


__all__ = [
    "GazeQwenVL",
    "GazeVideoLM",
    "GazeVisionCache",
    "GazeVisionModel",
    "GazeVisionOutput",
    "SinusoidalTimeEmbedding",
    "attach",
    "gaze_to_nvila",
    "nvila_to_gaze",
]
