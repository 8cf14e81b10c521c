"""A checkpoint carries its own code: it loads where this package cannot be imported."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published import FIXTURES
from test_modeling import small_config

import transformers_autogaze
from transformers_autogaze import (
    AutoGazeModel,
    AutoGazeProcessor,
    FeatureGazeConfig,
    FeatureGazeModel,
    GreedyGazeSelector,
)
from transformers_autogaze.configuration_autogaze import CODE_FILES
from transformers_autogaze.pipeline_autogaze import VideoTokenPruningPipeline


PACKAGE = Path(transformers_autogaze.__file__).parent
# Runs alone: the first lines make any import of this package fail.
SCRIPT = """
import sys
sys.modules["transformers_autogaze"] = None
import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

folder, output = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)

video = np.load(folder + "/video.npy")
inputs = processor(videos=video, return_tensors="pt")
gaze = model.generate(inputs["pixel_values_videos"], gazing_ratio=0.5, task_loss_requirement=0.3)
records = processor.post_process_gaze(gaze, video.shape[1:3])[0]

prune = pipeline(model=folder, trust_remote_code=True, device="cpu")
result = prune(video, gazing_ratio=0.5, task_loss_requirement=0.3, return_reconstruction=True)
assert result["records"] == records
np.savez(output, ids=gaze.gazing_pos, padding=gaze.if_padded_gazing, reconstruction=result["reconstruction"])

model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
again = pipeline(model=folder + "/again", trust_remote_code=True, device="cpu")
assert again(video, gazing_ratio=0.5, task_loss_requirement=0.3)["records"] == records
"""


def run_without_the_package(folder: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    output = tmp_path / "output.npz"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(output)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return np.load(output)


@pytest.mark.parametrize("kind", ["model", "published", "greedy", "features", "pipeline"])
def test_a_saved_folder_gazes_alike_without_the_package(tmp_path, kind):
    folder = tmp_path / "checkpoint"
    torch.manual_seed(0)
    model = {
        "model": lambda: AutoGazeModel(small_config()),
        "published": lambda: AutoGazeModel.from_pretrained(FIXTURES / "tiny-1"),
        "greedy": GreedyGazeSelector,
        "features": lambda: FeatureGazeModel(FeatureGazeConfig(depths=[1, 1, 1], feature_variance=8.0)),
        "pipeline": lambda: AutoGazeModel(small_config()),
    }[kind]().eval()
    processor = AutoGazeProcessor()
    if kind == "pipeline":
        VideoTokenPruningPipeline(model, processor, device="cpu").save_pretrained(folder)
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    video = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    np.save(folder / "video.npy", video)

    found = run_without_the_package(folder, tmp_path)

    inputs = processor(videos=video, return_tensors="pt")["pixel_values_videos"]
    gaze = model.generate(inputs, gazing_ratio=0.5, task_loss_requirement=0.3)
    assert np.array_equal(found["ids"], gaze.gazing_pos)
    assert np.array_equal(found["padding"], gaze.if_padded_gazing)
    assert found["reconstruction"].shape == (3, 3, *gaze.grid.sizes[-1])


def imported_modules(name: str) -> set[str]:
    """The modules beside it that a module imports itself."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


@pytest.mark.parametrize(
    "name",
    [
        "feature_gaze_autogaze",
        "greedy_autogaze",
        "modeling_autogaze",
        "pipeline_autogaze",
        "processing_autogaze",
        "video_processing_autogaze",
    ],
)
def test_what_the_library_loads_imports_all_that_it_needs_itself(name):
    """Older releases fetch only what the loaded module names, not what those modules import in turn."""
    direct = imported_modules(name)
    needed, pending = set(), set(direct)
    while pending:
        module = pending.pop()
        needed.add(module)
        pending |= imported_modules(module) - needed
    assert needed - {name} <= direct
    assert {f"{module}.py" for module in needed} <= set(CODE_FILES)
