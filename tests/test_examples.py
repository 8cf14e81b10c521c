"""The scripts in examples/ run with tiny random weights and rendered clips, and stay short."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import is_accelerate_available

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeProcessor
from transformers_autogaze.video.demo import render_demo_clip


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"), key=lambda path: path.name)
# Arguments of the scripts beside --tiny, and their output.
ARGUMENTS = {"encode_with_siglip.py": ["--num-frames", "4"], "finetune_tower.py": ["--num-frames", "4"]}
NEED_TRAINER = {"distill.py", "finetune.py", "finetune_tower.py", "grpo.py"}
PRINTS = {
    "encode_with_siglip.py": "FeatureGazeModel: 196 patches, 4.0 times fewer",
    "distill.py": "FeatureGazeModel: kept ",
    "finetune_tower.py": "FeatureGazeModel; tower, head and processor in classifier",
    "llava_onevision_video_qa.py": "FeatureGazeModel: 99 tokens for the video, 785 without gazing",
    "prune_with_datasets.py": "3 videos, 1 with an error: pruned.parquet",
    "qwen_vl_video_qa.py": "FeatureGazeModel: 360 of 1440 merge units, 364 of 1444 tokens",
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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 80


def run(name, monkeypatch, *arguments):
    path = next(path for path in EXAMPLES if path.name == name)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return runpy.run_path(str(path), run_name="__main__")


def test_a_finetuned_tower_is_saved_whole(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    trained, train = [], transformers.Trainer.train
    monkeypatch.setattr(transformers.Trainer, "train", lambda self: trained.append(self.model) or train(self))
    names = run("finetune_tower.py", monkeypatch, "--tiny", "--num-frames", 4)
    tower = transformers.AutoModel.from_pretrained("classifier")
    assert tower.config.id2label == {0: "upright", 1: "upside down"}
    processor = AutoGazeProcessor.from_pretrained("classifier")
    model = names["GazedClassifier"](tower, processor).eval()
    model.head.load_state_dict(load_file("classifier/head.safetensors"))
    inputs = processor(videos=render_demo_clip(4, 64, 64), return_tensors="pt")
    with torch.no_grad():
        expected = trained[0].eval()(**inputs, labels=torch.tensor([0]))["logits"]
        torch.testing.assert_close(model(**inputs, labels=torch.tensor([0]))["logits"], expected)


@pytest.mark.parametrize(
    ("name", "model_class", "around"),
    [
        ("llava_onevision_video_qa.py", "Qwen2Model", 6),  # words of the prompt
        ("qwen_vl_video_qa.py", "Qwen2_5_VLTextModel", 0),
    ],
)
def test_the_language_model_sees_the_printed_numbers_of_tokens(
    tmp_path, monkeypatch, capsys, name, model_class, around
):
    if getattr(transformers.SiglipImageProcessor, "is_dummy", False):
        pytest.skip("this version's image processors need torchvision")
    model_class, lengths = getattr(transformers, model_class), []
    forward = model_class.forward

    def counting(self, *args, inputs_embeds=None, **kwargs):
        lengths.append(inputs_embeds.shape[1])
        return forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(model_class, "forward", counting)
    run(name, monkeypatch, "--tiny")
    tokens = int(re.search(r"(\d+)(?: of \d+)? tokens", capsys.readouterr().out)[1])
    assert lengths[0] == tokens + around


def test_a_card_describes_only_its_own_checkpoint(tmp_path, monkeypatch, capsys):
    model = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64))
    model.save_pretrained(tmp_path / "mine")
    AutoGazeProcessor().save_pretrained(tmp_path / "mine")
    run("push_to_hub.py", monkeypatch, tmp_path / "mine", "--only-write", tmp_path / "written")
    card = (tmp_path / "written" / "README.md").read_text()
    assert f"| parameters | {model.num_parameters():,}, in float32 |" in card and "| scales | 32, 64 pixels |" in card
    assert "Nothing was measured" in card and "No facts of the training are recorded" in card
    assert not re.search(r"\d dB|PSNR", card)

    (tmp_path / "mine" / "README.md").write_text("My own card.")
    run("push_to_hub.py", monkeypatch, tmp_path / "mine", "--only-write", tmp_path / "written")
    assert (tmp_path / "written" / "README.md").read_text() == "My own card."
    output = capsys.readouterr().out
    assert "AutoGazeModel, card made from the checkpoint" in output and "card of " in output
