"""The wrappers of towers and MLLMs behave like models of transformers: Trainer, PEFT, saving and loading."""

import copy
import importlib
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_mllm import SCALES, TEXT, TOWER_PIXELS, build, clip
from test_qwen_vl import make_inputs, tiny_mllm
from test_vision import tower_of, video
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaForConditionalGeneration,
    SiglipForImageClassification,
    Trainer,
    TrainingArguments,
)

from transformers_autogaze import AutoGazeVideoProcessor, GazeOutput, GreedyGazeConfig, GreedyGazeSelector
from transformers_autogaze.integrations import GazeQwenVL, GazeVideoLM, GazeVisionModel, SinusoidalTimeEmbedding


SELECTOR = GreedyGazeConfig(scales=SCALES, patch_size=8)


def video_lm(tied: bool = False, **options) -> GazeVideoLM:
    mllm = build("llava", text_config=LlamaConfig(**TEXT, tie_word_embeddings=tied), tie_word_embeddings=tied)
    return GazeVideoLM(mllm, GreedyGazeSelector(SELECTOR), TOWER_PIXELS, scales=SCALES, **options).eval()


def qwen() -> GazeQwenVL:
    return GazeQwenVL(tiny_mllm("qwen2_5_vl"), GreedyGazeSelector(), TOWER_PIXELS, attention="frame").eval()


WRAPPERS = {
    "vision": lambda: GazeVisionModel(tower_of("siglip"), scales=[(16, 32), 64], attention="causal").eval(),
    "llava": video_lm,
    "qwen": qwen,
}


def outputs_of(model) -> torch.Tensor:
    """The outputs of a wrapper, or of a PeftModel of one, for fixed inputs."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        if isinstance(base, GazeVisionModel):
            return model(video()).last_hidden_state
        if isinstance(base, GazeQwenVL):
            inputs = make_inputs(base.mllm, [[1, (2, 4, 6), 2]])
            return model(**inputs, gazing_ratio=0.5).logits
        return model(input_ids=torch.tensor([[5, 61, 6]]), pixel_values_videos=[clip(3)], gazing_ratio=0.3).logits


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_has_the_attributes_of_its_model(name):
    model = WRAPPERS[name]()
    inner = model.wrapped
    assert model.config is inner.config and model.device == inner.device == torch.device("cpu")
    assert model.dtype == torch.float32 and model.to(torch.bfloat16).dtype == torch.bfloat16
    assert model.main_input_name == ("pixel_values_videos" if name == "vision" else "input_ids")
    assert model.supports_gradient_checkpointing
    if name != "vision":
        assert model.generation_config is inner.generation_config and model.can_generate()
        model.generation_config = new = copy.deepcopy(inner.generation_config)
        assert inner.generation_config is new
        assert model.get_input_embeddings() is inner.get_input_embeddings()
    model.gradient_checkpointing_enable()
    assert inner.is_gradient_checkpointing and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not inner.is_gradient_checkpointing
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018
    assert torch.equal(outputs_of(pickle.loads(pickle.dumps(WRAPPERS[name]()))), outputs_of(WRAPPERS[name]()))


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_misspelt_argument_is_refused(name):
    model = WRAPPERS[name]()
    message = (
        f"{type(model).__name__}.forward knows no argument gazing_rato; it takes .* gazing_ratio, .* logits_to_keep"
    )
    if name == "llava":
        inputs = {"input_ids": torch.tensor([[5, 61, 6]]), "pixel_values_videos": [clip(3)]}
    else:
        inputs = make_inputs(model.mllm, [[1, (2, 4, 6), 2]])
    for given in (inputs, {"input_ids": torch.tensor([[5, 6]])}):
        with pytest.raises(TypeError, match=message):
            model(**given, gazing_rato=0.5)
    output = model(**inputs, gazing_ratio=0.5, logits_to_keep=1, use_cache=False, output_hidden_states=True)
    assert output.logits.shape[1] == 1 and output.hidden_states is not None


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_loaded_wrapper_equals_the_saved_one(name, tmp_path):
    model = WRAPPERS[name]()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not again.training and torch.equal(outputs_of(again), outputs_of(model))
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.bin"))
    other = {"vision": GazeQwenVL, "llava": GazeVisionModel, "qwen": GazeVideoLM}[name]
    with pytest.raises(ValueError, match=f"must be a {other.__name__} of version 1"):
        other.from_pretrained(tmp_path)


def test_the_mllm_loads_without_the_package(tmp_path):
    model = video_lm()
    model.save_pretrained(tmp_path)
    alone = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(alone, LlavaForConditionalGeneration)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.mllm.parameters(), strict=True))
    wrapped = GazeVideoLM.from_pretrained(tmp_path, processor=TOWER_PIXELS, dtype=torch.float64)
    assert wrapped.dtype == torch.float64 and wrapped.layout == model.layout


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_an_mllm_that_was_saved_without_a_wrapper_is_wrapped(name, tmp_path):
    mllm, kind = WRAPPERS[name]().mllm, type(WRAPPERS[name]())
    mllm.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, GreedyGazeSelector(), TOWER_PIXELS)
    assert not loaded.training
    assert torch.equal(outputs_of(loaded), outputs_of(kind(mllm, GreedyGazeSelector(), TOWER_PIXELS).eval()))
    GreedyGazeSelector(SELECTOR).save_pretrained(tmp_path / "selector")
    with pytest.raises(ValueError, match="must be a model of transformers, got .*GreedyGazeSelector"):
        kind.from_pretrained(tmp_path / "selector")


def test_layout_selector_and_time_embedding_are_saved(tmp_path):
    options = {"order": "tile", "separator": [3, 4], "thumbnail_interval": 2, "chunk_frames": 2, "max_batch_size": 3}
    gaze_processor = AutoGazeVideoProcessor(image_mean=[0.4] * 3)
    model = video_lm(time_embedding=SinusoidalTimeEmbedding(32, 0.1), gaze_processor=gaze_processor, **options)
    model.save_pretrained(tmp_path / "a")
    again = GazeVideoLM.from_pretrained(tmp_path / "a")
    assert (again.layout, again.separator) == (model.layout, [3, 4]) and list(again.gaze_processor.image_mean) == [
        0.4
    ] * 3
    assert torch.equal(outputs_of(again), outputs_of(model))

    model = video_lm(time_embedding=torch.nn.Embedding(5, 32))
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="`time_embedding` must be given: a Embedding"):
        GazeVideoLM.from_pretrained(tmp_path / "b")
    again = GazeVideoLM.from_pretrained(tmp_path / "b", time_embedding=torch.nn.Embedding(5, 32))
    assert torch.equal(outputs_of(again), outputs_of(model))


def test_a_head_on_the_tower_is_saved_and_loaded(tmp_path):
    model = GazeVisionModel(SiglipForImageClassification(_siglip_config()))
    model.save_pretrained(tmp_path)
    again = GazeVisionModel.from_pretrained(tmp_path)
    assert isinstance(again.vision_model, SiglipForImageClassification)
    assert torch.equal(again.vision_model.classifier.weight, model.vision_model.classifier.weight)


def _siglip_config():
    from transformers import SiglipConfig

    return SiglipConfig(vision_config=tower_of("siglip").config.to_dict(), num_labels=3)


def test_an_upload_has_the_files_of_a_save(tmp_path, monkeypatch):
    """Without the Hub: the files that would be uploaded are compared."""
    uploaded = {}
    hub = "transformers.utils.hub"
    fakes = {
        "create_repo": lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id),
        "create_commit": lambda repo_id, operations, **kwargs: uploaded.update(
            (op.path_in_repo, repo_id) for op in operations
        ),
    }
    if hasattr(importlib.import_module(hub), "hf_api"):
        monkeypatch.setattr(f"{hub}.hf_api", lambda: SimpleNamespace(**fakes))
    else:
        for name, fake in fakes.items():
            monkeypatch.setattr(f"{hub}.{name}", fake)
    model = video_lm()
    model.push_to_hub("me/gazing")
    model.save_pretrained(tmp_path)
    saved = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"gaze_wrapper.json", "model.safetensors", "config.json"} <= saved
    assert saved <= set(uploaded)


# PEFT


def lora(**changes):
    peft = pytest.importorskip("peft")
    return peft, peft.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
    )


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_or_its_model_may_have_an_adapter(name):
    torch.manual_seed(0)
    targets = {"target_modules": ["qkv", "q_proj"]} if name == "qwen" else {}
    peft, config = lora(**targets)
    plain = outputs_of(WRAPPERS[name]())
    outside = peft.get_peft_model(WRAPPERS[name](), config)
    assert (outputs_of(outside) - plain).abs().max() > 1e-3
    model = WRAPPERS[name]()
    setattr(model, model.wrapped_name, peft.get_peft_model(model.wrapped, config))
    inside = type(model)(model.wrapped, **_parts_of(model)).eval()
    inside.load_state_dict({key.replace("base_model.model.", "", 1): value for key, value in _moved(outside, inside)})
    torch.testing.assert_close(outputs_of(inside), outputs_of(outside))
    with outside.disable_adapter():
        torch.testing.assert_close(outputs_of(outside), plain)


def _parts_of(model) -> dict:
    if isinstance(model, GazeVisionModel):
        return {"scales": model.grid.scales, "attention": model.attention}
    parts = {"gaze_model": model.gaze_model, "processor": TOWER_PIXELS}
    return parts | ({"attention": "frame"} if isinstance(model, GazeQwenVL) else {"scales": SCALES})


def _moved(outside, inside) -> list:
    """The weights of an adapted wrapper under the names of a wrapper of an adapted model."""
    name = inside.wrapped_name
    return [
        (key.replace(f"base_model.model.{name}.", f"base_model.model.{name}.base_model.model.", 1), value)
        for key, value in outside.state_dict().items()
    ]


@pytest.mark.parametrize("target", ["patch_embedding", "position_embedding"])
def test_an_adapter_of_the_embeddings_is_used(target):
    peft, config = lora(target_modules=[target])
    tower = peft.get_peft_model(tower_of("siglip"), config)
    model = GazeVisionModel(tower, attention="frame").eval()
    frames = video(size=model.config.image_size)
    with torch.no_grad():
        expected = tower(frames.flatten(0, 1)).last_hidden_state
        found = model(frames).last_hidden_state.view_as(expected)
        assert (tower.get_base_model()(frames.flatten(0, 1)).last_hidden_state - expected).abs().max() < 1e-5
        with tower.disable_adapter():
            assert (model(frames).last_hidden_state.view_as(expected) - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_the_adapter_is_saved_and_it_is_loaded_again(tmp_path):
    peft, config = lora()
    build("llava").save_pretrained(tmp_path / "base")
    mllm = peft.get_peft_model(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"), config)
    model = GazeVideoLM(mllm, GreedyGazeSelector(SELECTOR), TOWER_PIXELS, scales=SCALES).eval()
    answer = model.generate(torch.tensor([[5, 61, 6]]), [clip(3)], gazing_ratio=0.3, max_new_tokens=2, do_sample=False)
    assert answer.shape == (1, 5)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert torch.equal(outputs_of(GazeVideoLM.from_pretrained(tmp_path / "adapter")), outputs_of(model))


# Trainer


def training_data(count: int = 4, **more) -> Dataset:
    rows = [{"input_ids": [5, 61, 6, 7], "labels": [-100, -100, 6, 7 + row], **more} for row in range(count)]
    return Dataset.from_list([{**row, "pixel_values_videos": clip(2, seed=n).tolist()} for n, row in enumerate(rows)])


@pytest.mark.parametrize("adapted", [False, True])
def test_trainer_trains_saves_and_resumes_with_tied_embeddings(tmp_path, adapted):
    def trainer() -> Trainer:
        torch.manual_seed(0)
        model = video_lm(tied=True)
        if adapted:
            peft, config = lora(init_lora_weights=True)
            model = peft.get_peft_model(model, config)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=2,
            save_steps=1,
            optim="sgd",
            gradient_checkpointing=True,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=training_data().with_format("torch"))

    first = trainer()
    first.train()
    ended = first.model.state_dict()
    if not adapted:
        saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
        assert "mllm.lm_head.weight" not in saved and len(saved) == len(ended)
        fresh = video_lm(tied=True)
        result = fresh.load_state_dict(saved)
        assert not result.missing_keys and fresh.mllm.lm_head.weight is fresh.mllm.get_input_embeddings().weight
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for key, value in second.model.state_dict().items():
        torch.testing.assert_close(value, ended[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_trainer_predicts_and_evaluates(tmp_path, family):
    seen = {}

    def measure(prediction):
        (logits, labels), given = prediction.predictions, prediction.label_ids
        assert logits.shape[:2] == labels.shape and (given != -100).sum() == (labels != -100).sum()
        seen["hits"] = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
        return {"accuracy": float(seen["hits"].mean())}

    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    if family == "llava":
        model, data = video_lm(), training_data(2).with_format("torch")
    else:
        model = qwen()
        inputs = {
            key: value[0] if key in ("input_ids", "attention_mask") else value
            for key, value in make_inputs(model.mllm, [[1, (2, 4, 6), 2, 3]]).items()
        }
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][0]
        inputs["labels"] = inputs["input_ids"].clone().masked_fill(inputs["input_ids"] > 40, -100)
        data = [inputs] * 2
    collator = (
        None
        if family == "llava"
        else lambda rows: {
            key: value[None] if key in ("input_ids", "attention_mask", "labels", "mm_token_type_ids") else value
            for key, value in rows[0].items()
        }
    )
    trainer = Trainer(model, arguments, compute_metrics=measure, data_collator=collator)
    output = trainer.predict(data)
    assert 0 <= output.metrics["test_accuracy"] <= 1 and np.isfinite(output.metrics["test_loss"])
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(output.metrics["test_loss"], rel=1e-4)


def test_trainer_keeps_the_columns_of_a_processor():
    model = qwen()
    trainer = Trainer(model, TrainingArguments("unused", report_to="none", use_cpu=True))
    data = Dataset.from_list(
        [{key: value.tolist() for key, value in make_inputs(model.mllm, [[1, (2, 4, 6), 2]]).items()}]
    )
    kept = trainer._remove_unused_columns(data, "training").column_names
    assert set(kept) == set(data.column_names)


# Gazes of several clips


def test_a_list_of_gazes_equals_a_batch():
    model = WRAPPERS["vision"]()
    frames = torch.cat([video(), video().flip(1)])
    masks = [torch.rand(len(frames), frames.shape[1], count) < 0.4 for count in model.grid.num_patches_each_scale]
    batch = GazeOutput.from_masks(masks, model.grid)
    one_by_one = [batch.select(number) for number in range(len(frames))]
    assert torch.equal(model(frames, one_by_one).last_hidden_state, model(frames, batch).last_hidden_state)

    lm, prompt = video_lm(), torch.tensor([[5, 61, 6], [7, 61, 8], [9, 61, 10]])
    masks = [torch.rand(3, 2, count) < 0.4 for count in lm.grid.num_patches_each_scale]
    batch, clips = GazeOutput.from_masks(masks, lm.grid), [clip(2, seed=seed) for seed in range(3)]
    mixed = [batch.select(0), GazeOutput.stack([batch.select(1), batch.select(2)])]
    with torch.no_grad():
        assert torch.equal(lm(prompt, clips, gaze=mixed).logits, lm(prompt, clips, gaze=batch).logits)


def test_the_wrappers_file_is_plain_json(tmp_path):
    video_lm().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "gaze_wrapper.json").read_text())
    assert (facts["wrapper"], facts["model"], facts["version"]) == ("GazeVideoLM", "LlavaForConditionalGeneration", 1)
    assert facts["normalization"]["image_mean"] == [0.5] * 3 and facts["settings"]["scales"] == SCALES
