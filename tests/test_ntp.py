import os
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments, set_seed

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    AutoGazeVideoProcessor,
    CompositeReconstruction,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeOutput,
)
from transformers_autogaze.training.augmentation import ClipAugmentation
from transformers_autogaze.training.data import BudgetSchedule, GazeClipDataset, GazeCollator
from transformers_autogaze.training.ntp import AutoGazeTrainer, AutoGazeTrainingArguments
from transformers_autogaze.training.task import GazeTask
from transformers_autogaze.video.demo import render_demo_clip


pytest.importorskip("accelerate", reason="Trainer needs accelerate")

SCHEDULE = BudgetSchedule(ratio_max=0.8, dirichlet_share=0.5, threshold_share=0.5, threshold_max=2.0)


def small_model(seed=0):
    set_seed(seed)
    sizes = {"hidden_size": 32, "initializer_range": 0.1}
    return AutoGazeModel(
        AutoGazeConfig(
            scales=[32, 64],
            image_size=64,
            initializer_range=0.1,
            vision_config={"output_size": 32, **sizes},
            decoder_config={
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_multi_token_pred": 3,
                **sizes,
            },
        )
    )


def clips(config, num_videos=4, **kwargs):
    videos = [render_demo_clip(8, 64, 64, seed) for seed in range(num_videos)]
    processor = AutoGazeVideoProcessor(size={"shortest_edge": 64})
    settings = {"num_frames": 2, "schedule": SCHEDULE, "augmentation": ClipAugmentation(), "processor": processor}
    return GazeClipDataset(videos, config, **{**settings, **kwargs})


def make_trainer(
    folder, model=None, train_dataset=None, processing_class=None, eval_dataset=None, task=None, **arguments
):
    model = model or small_model()
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = AutoGazeTrainingArguments(str(folder), **{**defaults, **arguments})
    datasets = {"train_dataset": train_dataset or clips(model.config), "eval_dataset": eval_dataset}
    return AutoGazeTrainer(model, args, processing_class, task, **datasets)


def assert_weights_equal(model, expected, **tolerance):
    for (name, weight), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(
            weight, other, **{"rtol": 0, "atol": 0, **tolerance}, msg=lambda m, n=name: f"{n}: {m}"
        )


def feature_task(config):
    """A task of features that are predicted with random weights."""
    set_seed(5)
    settings = {"hidden_sizes": [8, 8, 8], "depths": [1, 1, 1], "scale_factors": [0.5, 1], "feature_size": 4}
    return GazeTask(config.grid, FeatureGazeModel(FeatureGazeConfig(**settings, initializer_range=0.5)))


def test_training_learns_the_labels(tmp_path):
    """One clip, so it can be learned by heart: the model's own gaze comes to rebuild it about as well as greedy search."""
    model = small_model()
    train = clips(model.config, num_videos=1, augmentation=None, schedule=BudgetSchedule("fixed", ratio_min=0.3))
    item = train[0]
    settings = {"max_steps": 60, "learning_rate": 3e-3, "logging_steps": 10}
    trainer = make_trainer(tmp_path, model, [item] * 4, **settings)
    video = item["pixel_values_videos"][None]
    composite, pixels = (
        CompositeReconstruction(model.config.grid),
        AutoGazeVideoProcessor().to_pixels(video).clamp(0, 1),
    )

    def loss(gaze):
        return float(composite(pixels, gaze).loss.mean())

    before = loss(model.eval().generate(video, gazing_ratio=0.3))
    trainer.train()
    after = loss(model.eval().generate(video, gazing_ratio=0.3))
    budgets = [6, 6]
    greedy = composite.search(pixels, budgets)
    masks = torch.zeros(1, 2, 20, dtype=torch.bool).scatter_(2, greedy.ids, True)
    best = loss(GazeOutput.from_masks(model.config.grid.split_by_scale(masks), model.config.grid))
    assert after - best < 0.25 * (before - best)
    history = [entry for entry in trainer.state.log_history if "next_token_loss" in entry]
    for name in ("loss", "task_loss_error", "next_token_loss"):
        assert history[-1][name] < 0.7 * history[0][name], name


def test_the_loss_equals_the_models_and_its_parts_are_logged(tmp_path):
    items = [clips(small_model().config)[index] for index in range(2)]
    trainer = make_trainer(tmp_path, max_steps=1, train_dataset=items)
    batch = GazeCollator(trainer.model.config)(items)
    with torch.no_grad():
        outputs = small_model().train()(**batch)
    trainer.train()
    entry = trainer.state.log_history[0]
    # Missing labels are ignored in both parts; their sum is averaged over the labels of patches.
    assert entry["next_token_loss"] == pytest.approx(float(outputs.next_token_loss), rel=1e-4)
    assert entry["task_loss_error"] == pytest.approx(float(outputs.task_loss_error), rel=1e-4)
    assert entry["loss"] == pytest.approx(float(outputs.loss), rel=1e-4)


def test_accumulated_batches_equal_one_batch(tmp_path):
    items = [clips(small_model().config)[index] for index in range(4)]
    assert len({sum(map(len, item["gazing_pos"])) for item in items}) > 1
    settings = {"max_steps": 1, "train_dataset": items, "optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 0.1}
    at_once = make_trainer(tmp_path, per_device_train_batch_size=4, **settings)
    at_once.train()
    accumulated = make_trainer(tmp_path, gradient_accumulation_steps=2, **settings)
    accumulated.train()
    assert_weights_equal(accumulated.model, at_once.model, atol=2e-6)
    assert accumulated.state.log_history[0]["loss"] == pytest.approx(at_once.state.log_history[0]["loss"], rel=1e-5)


def test_a_resumed_run_is_bit_equal(tmp_path):
    settings = {"on_policy": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    uninterrupted = make_trainer(tmp_path, **settings)
    uninterrupted.train()  # three epochs of four clips, with the checkpoint in the middle of the second
    checkpoint = tmp_path / "checkpoint-3"
    resumed = make_trainer(tmp_path / "resumed", small_model(seed=1), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_weights_equal(resumed.model, uninterrupted.model)
    ends = [[entry for entry in run.state.log_history if entry["step"] > 3] for run in (resumed, uninterrupted)]
    for entry, expected in zip(ends[0][:3], ends[1][:3], strict=True):
        assert entry == expected


def test_every_epoch_has_new_clips(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, max_steps=4)
    dataset = trainer.train_dataset
    read = dataset._read
    dataset._read = lambda place, generator: seen.append(generator.initial_seed()) or read(place, generator)
    trainer.train()
    assert len(seen) == len(set(seen)) == 8  # two epochs of four


def test_only_the_model_and_its_processor_are_saved(tmp_path):
    processor = AutoGazeVideoProcessor(image_std=(0.5, 0.25, 0.125))
    trainer = make_trainer(tmp_path, processing_class=processor, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        model, info = AutoGazeModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert list(AutoGazeVideoProcessor.from_pretrained(folder).image_std) == [0.5, 0.25, 0.125]
    assert_weights_equal(AutoGazeModel.from_pretrained(tmp_path), trainer.model)


def test_a_complete_processor_is_accepted(tmp_path):
    model = small_model()
    args = AutoGazeTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = AutoGazeTrainer(model, args, processing_class=AutoGazeProcessor())
    assert isinstance(trainer.processing_class, AutoGazeVideoProcessor)


@pytest.mark.parametrize("make_task", [lambda config: GazeTask(config.grid), feature_task], ids=["pixels", "features"])
def test_on_policy_batches_have_the_models_own_choices(tmp_path, make_task):
    config = small_model().config
    task = make_task(config)
    schedule = BudgetSchedule(ratio_max=0.8, threshold_share=0.5)
    trainer = make_trainer(tmp_path, train_dataset=clips(config, task=task, schedule=schedule), task=task)
    model = trainer.model
    batch = GazeCollator(config)([trainer.train_dataset[index] for index in range(4)])
    relabelled = trainer.relabel(batch)
    assert model.training and relabelled.keys() == batch.keys()
    same = ("pixel_values_videos", "if_padded_gazing", "num_gazing_each_frame")
    assert all(torch.equal(relabelled[key], batch[key]) for key in same)
    is_padding, counts = batch["if_padded_gazing"], batch["num_gazing_each_frame"]
    assert bool(is_padding.any())
    assert torch.equal(relabelled["labels"] == -100, is_padding)
    assert torch.equal(relabelled["task_loss_labels"].isnan(), is_padding)
    assert not torch.equal(relabelled["gazing_pos"], batch["gazing_pos"])

    gaze = GazeOutput.from_ids(relabelled["gazing_pos"], is_padding, counts, config.grid)
    pixels = AutoGazeVideoProcessor().to_pixels(batch["pixel_values_videos"]).clamp(0, 1)
    labels, losses = task.continuations(pixels, gaze, step_size=3), task.measure(pixels, gaze)
    assert torch.equal(relabelled["labels"][~is_padding], labels[~is_padding])
    torch.testing.assert_close(relabelled["task_loss_labels"][~is_padding], losses[~is_padding])
    if make_task is feature_task:
        assert 0 <= float(losses.min()) and float(losses.max()) <= 1


def test_training_by_features_runs_and_evaluates(tmp_path):
    config = small_model().config
    dataset = clips(config, task=feature_task(config), schedule=BudgetSchedule(threshold_share=0.5))
    trainer = make_trainer(
        tmp_path, train_dataset=dataset, eval_dataset=dataset, task=dataset.task, on_policy=1.0, max_steps=2
    )
    trainer.train()
    assert 0 < trainer.evaluate()["eval_loss"] < 50
    with pytest.raises(
        ValueError, match="`threshold_min` and `threshold_max` must be losses of the task, got 0.3 and 2.0"
    ):
        clips(config, task=dataset.task)
    assert trainer.task is not dataset.task and trainer.task.settings == dataset.task.settings


def test_the_share_of_on_policy_batches_is_as_configured(tmp_path):
    counted, items = [], [clips(small_model().config)[index] for index in range(2)]
    for share, steps in ((0.0, 2), (0.5, 16), (1.0, 2)):
        trainer = make_trainer(tmp_path, train_dataset=items, on_policy=share, max_steps=steps, logging_steps=99)
        calls = []
        gaze = trainer._gaze
        trainer._gaze = lambda *args, calls=calls, gaze=gaze: calls.append(1) or gaze(*args)
        trainer.train()
        counted.append(len(calls))
    assert counted[0] == 0 and 3 < counted[1] < 13 and counted[2] == 2


def test_evaluation_returns_the_loss_of_labels(tmp_path):
    model = small_model()
    trainer = make_trainer(tmp_path, model, eval_dataset=clips(model.config, augmentation=None), on_policy=1.0)
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < 50 and metrics == {
        **metrics,
        **trainer.evaluate(),
        **{key: metrics[key] for key in metrics if "runtime" in key or "per_second" in key},
    }


def test_evaluation_does_not_change_the_training_logs(tmp_path):
    items = [clips(small_model().config)[index] for index in range(4)]
    histories = []
    for strategy in ("no", "steps"):
        datasets = {"train_dataset": items, "eval_dataset": items}
        trainer = make_trainer(tmp_path, **datasets, logging_steps=2, eval_strategy=strategy, eval_steps=1)
        trainer.train()
        histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert histories[0] == histories[1] and len(histories[0]) == 2


def test_workers_and_gradient_checkpointing_change_nothing(tmp_path):
    plain, other = (
        make_trainer(tmp_path),
        make_trainer(tmp_path, gradient_checkpointing=True, dataloader_num_workers=2),
    )
    plain.train()
    other.train()
    assert_weights_equal(other.model, plain.model, atol=1e-5)


def test_half_precision_trains(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, bf16=True, on_policy=1.0)
    trainer.train()
    assert all(
        weight.dtype == torch.float32 and bool(weight.isfinite().all()) for weight in trainer.model.parameters()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_policy": -0.1}, "`on_policy` must lie in 0..1, a share of the batches, got -0.1"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoGazeTrainingArguments(str(tmp_path), **arguments)


def test_other_classes_of_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`args` must be AutoGazeTrainingArguments, got TrainingArguments"):
        AutoGazeTrainer(small_model(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from test_ntp import make_trainer
trainer = make_trainer(sys.argv[1], per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, optim="sgd")
assert trainer.args.world_size == 2
trainer.train()
trainer.save_model()
"""


@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path):
    one = make_trainer(tmp_path, per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, optim="sgd")
    one.train()
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=os.path.dirname(__file__)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, str(tmp_path / "two")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = AutoGazeModel.from_pretrained(tmp_path / "two")
    assert_weights_equal(two, one.model, atol=1e-6)
    moved = max(
        float((a - b).detach().abs().max()) for a, b in zip(two.parameters(), small_model().parameters(), strict=True)
    )
    assert moved > 1e-3
