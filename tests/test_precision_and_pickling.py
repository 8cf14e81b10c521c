"""Models whose weights are quantised, kept elsewhere or made by remote code."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    FeatureGazeConfig,
    FeatureGazeModel,
    GreedyGazeSelector,
    VideoTokenPruningPipeline,
)


VIDEO = torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def autogaze() -> AutoGazeModel:
    torch.manual_seed(0)
    return AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64)).eval()


def features() -> FeatureGazeModel:
    torch.manual_seed(0)
    return FeatureGazeModel(FeatureGazeConfig(hidden_sizes=[64, 64, 128], depths=[1, 1, 1], feature_size=64)).eval()


def in_bits(model, folder, **bits):
    pytest.importorskip("bitsandbytes")
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu").eval()


def offloaded(model, folder):
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def on_disk(model, folder):
    pytest.importorskip("accelerate")
    if transformers.__version__.startswith("5.0."):
        pytest.skip("this release runs no model, Llama included, that lies on the disk as a whole")
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "weights").eval()


WAYS = {
    "bitsandbytes-8": lambda model, folder: in_bits(model, folder, load_in_8bit=True),
    "bitsandbytes-8-all": lambda model, folder: in_bits(model, folder, load_in_8bit=True, llm_int8_skip_modules=[]),
    "bitsandbytes-4": lambda model, folder: in_bits(model, folder, load_in_4bit=True),
    "torch.ao-int8": lambda model, folder: torch.ao.quantization.quantize_dynamic(
        model, {torch.nn.Linear}, dtype=torch.qint8
    ),
    "cpu_offload": offloaded,
    "disk": on_disk,
}


@pytest.mark.parametrize("way", WAYS)
def test_autogaze_gazes_whatever_its_weights_are_held_in(way, tmp_path):
    model = autogaze()
    expected = model.generate(VIDEO, gazing_ratio=0.3)
    changed = WAYS[way](copy.deepcopy(model), tmp_path)
    gaze = changed.generate(VIDEO, gazing_ratio=0.3, use_cache=True, output_scores=False)
    assert gaze.cache.keys.dtype == torch.float32 and gaze.num_real.tolist() == expected.num_real.tolist()
    kept = [torch.cat(one.gazing_mask, dim=-1) for one in (gaze, expected)]
    assert (kept[0] & kept[1]).sum() > (0.8 if way.startswith(("bits", "torch")) else 0.9999) * kept[1].sum()
    streamed = changed.generate(VIDEO[:, :1], gazing_ratio=0.3, task_loss_requirement=0.3, past_key_values=gaze.cache)
    assert streamed.num_frames == 1
    scores = changed(VIDEO, gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame)
    assert scores.log_action_probs.isfinite().all() and scores.log_action_probs.dtype == torch.float32


@pytest.mark.parametrize("way", ["torch.ao-int8", "cpu_offload", "disk", "bitsandbytes-8", "bitsandbytes-4"])
def test_features_gaze_whatever_their_weights_are_held_in(way, tmp_path):
    model = features()
    expected = model.generate(VIDEO, clip_ratio=0.3)
    changed = WAYS[way](copy.deepcopy(model), tmp_path)
    gaze = changed.generate(VIDEO, clip_ratio=0.3)
    kept = [torch.cat(one.gazing_mask, dim=-1) for one in (gaze, expected)]
    assert gaze.num_real.tolist() == expected.num_real.tolist()
    assert (kept[0] & kept[1]).sum() > 0.8 * kept[1].sum()


def test_half_precision_is_kept_beside_quantised_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    autogaze().save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoGazeModel.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=quantised, device_map="cpu"
    )
    gaze = model.eval().generate(VIDEO, gazing_ratio=0.3, use_cache=True)
    assert gaze.cache.keys.dtype == torch.bfloat16 and gaze.num_real.tolist() == [18] * 2


# Runs alone, without the package.
SCRIPT = """
import io, pickle, sys
sys.modules["transformers_autogaze"] = None
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoModel, pipeline


class Gazes(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.model.generate(torch.zeros(1, 2, 3, 64, 64), gazing_ratio=0.2).gazing_pos


if __name__ == "__main__":
    folder = sys.argv[1]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert not model.can_generate() and "GenerationMixin" not in [base.__name__ for base in type(model).__mro__]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is type(model)
    worked = list(DataLoader(Gazes(model), num_workers=1, multiprocessing_context="spawn", batch_size=None))
    assert len(worked) == 2 and worked[0].equal(Gazes(model)[0])
    prune = pipeline(model=folder, trust_remote_code=True, device="cpu")
    pickle.loads(pickle.dumps(prune.model)), pickle.loads(pickle.dumps(prune.processor))
    assert len(prune([np.zeros((2, 40, 60, 3), np.uint8)] * 2, num_workers=2, gazing_ratio=0.2)) == 2
"""


@pytest.mark.parametrize("make", [autogaze, features, GreedyGazeSelector])
def test_models_of_remote_code_are_pickled(make, tmp_path):
    folder = tmp_path / "checkpoint"
    VideoTokenPruningPipeline(make().eval(), AutoGazeProcessor(), device="cpu").save_pretrained(folder)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, str(script), str(folder)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
