"""
The metadata of model cards is valid for `huggingface_hub`.

The check `ModelCard.validate` needs the Hub's API and does not run here.
"""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    FeatureGazeConfig,
    FeatureGazeModel,
    GreedyGazeSelector,
)
from transformers_autogaze.hub.model_cards import make_card
from transformers_autogaze.training import DistillationArguments
from transformers_autogaze.training.distillation_card import make_card as make_distillation_card


FACTS = {
    "encoder": "facebook/dinov2-small",
    "patch_size": 14,
    "videos": 3,
    "pictures": 0,
    "held_out": ["a.mp4", "b.mp4"],
    "crops": [12, 4],
    "explained": 0.97,
    "parameters": 1000,
    "r2": [0.5, 0.25],
    "change_r2": 0.125,
    "knots": [(0, 0), (1, 1)],
    "teacher_seconds": 1.0,
    "train_seconds": 1.0,
    "steps": 2,
}


def card_of(text: str, folder: Path) -> ModelCard:
    """Loads a card as the Hub's library loads that of a checkpoint's folder."""
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return ModelCard.load(path)


def distillation_card(tmp_path: Path, **facts) -> ModelCard:
    args = DistillationArguments(tmp_path / "out", scales=[7, 14], use_cpu=True, report_to="none")
    return card_of(make_distillation_card(args, {**FACTS, **facts}, "Some credits."), tmp_path)


SELECTORS = {
    "autogaze": lambda: AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64)),
    "features": lambda: FeatureGazeModel(FeatureGazeConfig(hidden_sizes=[8, 8, 8], depths=[1, 1, 1], feature_size=4)),
    "greedy": GreedyGazeSelector,
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_the_card_of_a_selector_has_the_hubs_metadata(tmp_path, kind):
    card = card_of(make_card(SELECTORS[kind](), 'Mine: "the first"', {"steps": 3}), tmp_path)
    data = card.data
    assert (data.get("library_name"), data.pipeline_tag, data.model_name) == ("transformers", "other", None)
    assert {"video", "token-pruning", "autogaze", "custom_code"} <= set(data.tags)
    assert data.base_model is None and data.datasets is None and data.metrics is None and data.eval_results is None
    assert card.text.startswith('\n# Mine: "the first"') and "| steps | 3 |" in card.text


def test_the_card_of_a_trained_model_names_the_one_it_started_from(tmp_path):
    card = card_of(make_card(SELECTORS["autogaze"](), base_model="nvidia/AutoGaze"), tmp_path)
    assert card.data.base_model == "nvidia/AutoGaze"


def test_the_card_of_a_distilled_selector_lists_its_results(tmp_path):
    card = distillation_card(tmp_path)
    data = card.data
    assert data.base_model == "facebook/dinov2-small" and "distillation" in data.tags
    assert data.metrics == ["r_squared"] and data.model_name == "A selector distilled from facebook/dinov2-small"
    assert [(result.task_type, result.metric_value) for result in data.eval_results] == [
        ("other", 0.25),
        ("other", 0.125),
    ]
    assert {result.dataset_name for result in data.eval_results} == {"2 files that were not trained on"}
    assert card.text.rstrip().endswith("Some credits.")
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


def test_local_encoders_and_undefined_results_are_left_out(tmp_path):
    data = distillation_card(tmp_path, encoder="dinov2-small", r2=[float("nan")], change_r2=float("nan")).data
    assert data.base_model is None and data.metrics is None and data.eval_results is None
