"""
Extensions of lmms-eval: MLLMs with a selector as its models, and the benchmark HLVid as a task.

lmms-eval finds the models by the entry point `lmms_eval.models`, and the task by `--include_path`; see `docs/benchmarks.md`.
"""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

TASKS = Path(__file__).parent / "tasks"
"""Folder of the tasks, for `--include_path`."""


def model_manifests() -> list["ModelManifest"]:
    """
    Lists the models for lmms-eval, which imports the module of a model when it is selected.

    Returns:
        `list[ModelManifest]`: names of the models and import paths of their classes.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    models, nvila_hd, vllm = (f"{__name__}.{module}" for module in ("models", "nvila_hd", "through_vllm"))
    return [
        ModelManifest("gaze_qwen2_5_vl", chat_class_path=f"{models}.GazeQwen2_5_VL"),
        ModelManifest("gaze_qwen3_vl", chat_class_path=f"{models}.GazeQwen3_VL"),
        ModelManifest("gaze_nvila_hd", chat_class_path=f"{nvila_hd}.GazeNvilaHD"),
        ModelManifest("gaze_vllm", chat_class_path=f"{vllm}.GazeVLLM"),
        ModelManifest("gaze_llava_onevision", simple_class_path=f"{models}.GazeLlavaOnevision"),
    ]
