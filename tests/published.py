"""Published checkpoints with their recorded outputs, and where they lie."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from transformers_autogaze import AutoGazeModel


FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[2] / "shared"


class Checkpoint:
    """A published checkpoint with its recorded calls and outputs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cases = json.loads((folder / "cases.json").read_text())
        self.expected = load_file(folder / "expected.safetensors")

    def model(self, dtype: torch.dtype = torch.float64, **kwargs) -> AutoGazeModel:
        return AutoGazeModel.from_pretrained(self.folder, dtype=dtype, **kwargs).eval()

    def call(self, case: str) -> dict:
        return {key: value for key, value in self.cases[case]["call"].items() if key not in NOT_OURS}

    def video(self, case: str) -> torch.Tensor:
        """The clip of a case: its own, or the slice of another one's that the case names."""
        if case == "generate_only":
            case = "ratio"
        name, _, clips = self.cases[case].get("video", f"{case}.video").partition("[")
        video = self.expected[name if name.endswith(".video") else f"{name}.video"].double()
        if clips:
            start, stop = clips.rstrip("]").split(":")
            video = video[int(start) : int(stop)]
        return video


# Arguments of the published call that this package has other verbs for.
NOT_OURS = ("generate_only", "gazing_info")


def checkpoint_folder(name: str) -> Path:
    folder = FIXTURES / name if (FIXTURES / name).exists() else SHARED / "fixtures" / name
    if not folder.exists():
        pytest.skip(f"fixture {name} is not here")
    return folder
