"""The scripts in examples/ run, with tiny random weights and drawn clips, and stay short."""

import runpy
import sys
from pathlib import Path

import pytest
import transformers
from transformers.utils import is_accelerate_available

import transformers_autogaze


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"), key=lambda path: path.name)
# What a script is called with beside --tiny, and what it prints.
ARGUMENTS = {"encode_with_siglip.py": ["--num-frames", "4"], "finetune_tower.py": ["--num-frames", "4"]}
NEED_TRAINER = {"distill.py", "finetune.py", "finetune_tower.py", "grpo.py"}
PRINTS = {
    "encode_with_siglip.py": "features: (",
    "finetune_tower.py": "train_loss",
    "llava_onevision_video_qa.py": "GreedyGazeSelector: 99 tokens for the video, 785 without gazing",
    "qwen_vl_video_qa.py": "GreedyGazeSelector: 360 of 1440 merge units, 364 of 1444 tokens",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    if path.name in NEED_TRAINER and not is_accelerate_available():
        pytest.skip("Trainer needs accelerate")
    if getattr(transformers.SiglipImageProcessor, "is_dummy", False):
        pytest.skip("this version's image processors need torchvision")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--tiny", *ARGUMENTS.get(path.name, [])])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed and PRINTS.get(path.name, "") in printed
    if path.name == "finetune_tower.py":
        assert isinstance(transformers.AutoModel.from_pretrained("classifier"), transformers.SiglipVisionModel)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_a_card_says_what_the_checkpoint_tells_and_no_more(tmp_path, monkeypatch):
    transformers_autogaze.AutoGazeModel(
        transformers_autogaze.AutoGazeConfig(scales=[32, 64], image_size=64)
    ).save_pretrained(tmp_path / "mine")
    transformers_autogaze.AutoGazeProcessor().save_pretrained(tmp_path / "mine")
    command = [
        str(EXAMPLES[0].parent / "push_to_hub.py"),
        str(tmp_path / "mine"),
        "--only-write",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(command[0], run_name="__main__")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| AutoGazeModel |" in card and "2x2, 4x4" in card and "Not recorded in the checkpoint." in card
    assert not {"{", "}"} & {*card} and "greedy" not in card

    (tmp_path / "mine" / "README.md").write_text("its own card")
    runpy.run_path(command[0], run_name="__main__")
    assert (tmp_path / "out" / "README.md").read_text() == "its own card"
