import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed

from transformers_autogaze import (
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    AutoGazeVideoProcessor,
    CompositeReconstruction,
    GazeGrid,
    GazeOutput,
)
from transformers_autogaze.demo import render_demo_clip
from transformers_autogaze.training.augmentation import ClipAugmentation
from transformers_autogaze.training.data import BudgetSchedule, GazeClipDataset, GazeCollator
from transformers_autogaze.training.labels import label_gaze
from transformers_autogaze.training.ntp import AutoGazeTrainer, AutoGazeTrainingArguments
from transformers_autogaze.training.objectives import (
    AttentionGains,
    CellLossHeads,
    PatchNames,
    gain_losses,
    next_token_losses,
    prefix_loss,
    seen_patches,
    task_loss_errors,
)


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


def make_trainer(folder, model=None, train_dataset=None, processing_class=None, eval_dataset=None, **arguments):
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
    return AutoGazeTrainer(model, args, processing_class, **datasets)


def assert_weights_equal(model, expected, **tolerance):
    for (name, weight), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(
            weight, other, **{"rtol": 0, "atol": 0, **tolerance}, msg=lambda m, n=name: f"{n}: {m}"
        )


def batch_with_gains(model, num_clips=3):
    """A batch as the trainer labels it, ids counted from their frame, and what the model makes of it."""
    batch = GazeCollator(model.config)([clips(model.config)[index] for index in range(num_clips)])
    counts, is_padding = batch["num_gazing_each_frame"], batch["if_padded_gazing"]
    gaze = GazeOutput.from_ids(batch["gazing_pos"], is_padding, counts, model.config.grid)
    pixels = AutoGazeVideoProcessor().to_pixels(batch["pixel_values_videos"]).clamp(0, 1)
    labels, _, batch["gains"] = label_gaze(CompositeReconstruction(model.config.grid), pixels, gaze, step_size=3)
    batch["labels"] = labels.masked_fill(is_padding, -100)
    called = ("pixel_values_videos", "gazing_pos", "if_padded_gazing", "num_gazing_each_frame", "labels")
    outputs = model(
        **{key: batch[key] for key in called},
        output_logits=True,
        output_hidden_states=True,
    )
    batch["labels"] = (labels - gaze.frame_of_slot * 20).masked_fill(is_padding, -100)
    return batch, outputs


def test_without_gains_the_loss_is_that_of_the_model_itself():
    model = small_model()
    batch, outputs = batch_with_gains(model)
    losses, is_label = next_token_losses(outputs.logits, batch["labels"]), batch["labels"] != -100
    assert not bool(is_label.all()) and bool((losses[~is_label] == 0).all())
    torch.testing.assert_close(losses.sum() / is_label.sum(), outputs.next_token_loss)


def test_with_gains_a_slot_chooses_out_of_what_is_left():
    model = small_model()
    batch, outputs = batch_with_gains(model)
    losses = next_token_losses(outputs.logits, batch["labels"], batch["gains"])
    assert bool(losses.isfinite().all())
    start = 0
    for count in batch["num_gazing_each_frame"].tolist():
        for slot in range(start, start + count):
            first = slot - (slot - start) % 3
            for clip in range(3):
                label = int(batch["labels"][clip, slot])
                if label == -100:
                    continue
                # Kept in earlier steps, or named by earlier slots of this one.
                frame = batch["gazing_pos"][clip, start:first] % 20
                taken = {*frame.tolist(), *batch["labels"][clip, first:slot].tolist()}
                left = [patch for patch in range(20) if patch not in taken]
                expected = -outputs.logits[clip, slot, left].log_softmax(-1)[left.index(label)]
                torch.testing.assert_close(losses[clip, slot], expected)
        start += count


def test_gain_losses_are_least_at_the_shares_of_the_gains():
    generator = torch.Generator().manual_seed(0)
    gains = torch.rand(5, 8, generator=generator) * torch.tensor([1e-4, 1.0, 1e4, 1.0, 0.0])[:, None] - 1e-9
    gains[3, 2:] = -torch.inf
    best = gains.clamp(min=1e-30).log()
    assert float(gain_losses(best, gains).abs().max()) < 1e-5
    logits = (best + torch.randn(5, 8, generator=generator)).requires_grad_()
    losses = gain_losses(logits, gains)
    assert bool((losses[:4] > 0.001).all()) and float(losses[4].detach()) == 0  # nothing gains, nothing to learn
    for row in range(4):
        shares = gains[row].clamp(min=0) / gains[row].clamp(min=0).sum()
        log_probs = logits[row].masked_fill(gains[row] == -torch.inf, -torch.inf).log_softmax(-1)
        expected = sum(float(p * (p.log() - log_probs[i])) for i, p in enumerate(shares) if p > 0)
        assert float(losses[row].detach()) == pytest.approx(expected, abs=1e-5)
    losses.sum().backward()
    assert bool(logits.grad.isfinite().all()) and bool((logits.grad[3, 2:] == 0).all())


def test_heads_are_drawn_to_where_patches_of_their_scale_gain():
    """Against the attention that the model itself pays, of a batch with padding."""
    model = small_model()
    model.set_attn_implementation("eager")
    paid_by_all = []
    attention = model.gaze_decoder.model.layers[-1].self_attn
    attention.register_forward_hook(lambda module, args, outputs: paid_by_all.append(outputs[1]))
    batch, outputs = batch_with_gains(model)
    counts, is_padding = batch["num_gazing_each_frame"], batch["if_padded_gazing"]
    vision, slots = model.token_places(counts)
    losses = AttentionGains(model.config)
    assert losses.scale_of_head == [1, 1]
    of_slots, of_tokens = losses(
        model.gaze_decoder.model,
        outputs.hidden_states[-2],
        vision,
        slots,
        counts,
        is_padding,
        batch["patch_gains"],
        batch["gains"],
    )
    attention, by_hand, start = paid_by_all[-1], [], 0
    for t, count in enumerate(counts.tolist()):
        for slot in range(start, start + count):
            first = slot - (slot - start) % 3
            for clip in (~is_padding[:, first]).nonzero()[:, 0].tolist():
                wanted = batch["gains"][clip, first, 4:].clamp(min=0)
                wanted = (wanted / wanted.max()).square()
                paid = attention[clip, :, slots[first] - 1][:, vision[t]]
                expected = gain_losses(paid.log(), wanted).mean() - paid.sum(-1).log().mean()
                torch.testing.assert_close(of_slots[clip, slot], expected, rtol=1e-4, atol=1e-5)
        for token in range(2, 16):
            wanted = batch["patch_gains"][:, t, 4:].clamp(min=0)
            wanted = (wanted / wanted.amax(-1, keepdim=True)).square()[:, None, : token + 1].expand(-1, 2, -1)
            paid = attention[:, :, vision[t, token]][..., vision[t, : token + 1]]
            by_hand.append(gain_losses(paid.log(), wanted).mean())
        start += count
    torch.testing.assert_close(of_tokens, sum(by_hand) / len(by_hand), rtol=1e-4, atol=1e-5)


def test_every_coarser_scale_but_the_last_has_a_head():
    assert AttentionGains(AutoGazeConfig()).scale_of_head == [3, 3, 3, 3, 2, 1]


@torch.no_grad()
def test_tokens_that_name_their_patches_and_no_others_have_no_naming_loss():
    model = small_model()
    decoder, losses = model.gaze_decoder, PatchNames(model.config)
    attention = decoder.model.layers[-1].self_attn
    for weight in (attention.v_proj.weight, attention.o_proj.weight):
        torch.nn.init.eye_(weight)
    names = torch.zeros(21, 32)
    names[:20, :16] = losses.belongs.T + 3.0
    tokens = torch.eye(16, 32).expand(1, 2, -1, -1)
    assert float(losses(decoder.model, names.repeat(3, 1), tokens)) == pytest.approx(0, abs=1e-5)
    names[:20] = names[:20].roll(1, dims=1)
    assert float(losses(decoder.model, names.repeat(3, 1), tokens)) > 0.5


@torch.no_grad()
def test_the_naming_loss_reads_what_the_last_layer_makes_of_one_token():
    """Against logits of a last layer that looks at a single token."""
    set_seed(0)
    model = AutoGazeModel(AutoGazeConfig())
    decoder, losses = model.gaze_decoder, PatchNames(model.config)
    layer, hidden = decoder.model.layers[-1], torch.randn(1, 1, 196, 192)
    decoder.model.norm.weight.uniform_(0.5, 2.0)
    told = torch.zeros(196, 265)
    for heads, first, end in (([0, 1, 2, 3], 69, 265), ([4], 20, 69), ([5], 0, 20)):
        for token in range(196):
            value = layer.self_attn.v_proj(layer.input_layernorm(hidden[0, 0, token])).view(6, 32)
            others = [head for head in range(6) if head not in heads]
            value[others] = 0
            carried = layer.self_attn.o_proj(value.flatten()) * decoder.model.norm.weight
            told[token, first:end] = decoder.lm_head(carried).view(10, 266).mean(0)[first:end]
    expected, at = 0, torch.arange(196)
    for first, end, sides in ((69, 265, [14]), (20, 69, [7]), (0, 20, [2, 4])):
        wanted, start = torch.zeros(196, end - first), 0
        for side in sides:
            wanted[at, start + at // 14 * side // 14 * side + at % 14 * side // 14] = 1
            start += side * side
        parts = [part - part.mean(-1, keepdim=True) for part in (told[:, first:end], wanted)]
        expected += (1 - float((parts[0] * parts[1]).sum() / (parts[0].norm() * parts[1].norm()))) / 3
    assert float(losses(decoder.model, decoder.lm_head.weight, hidden)) == pytest.approx(expected, abs=1e-5)


def test_a_token_has_seen_the_patches_that_end_before_it():
    seen = seen_patches(GazeGrid([32, 48, 64]), (4, 4))
    assert seen.shape == (16, 4 + 9 + 16)
    assert seen[:, 13:].int().tolist() == torch.ones(16, 16).tril().int().tolist()
    assert [int(patch.int().argmax()) for patch in seen[:, :4].T] == [5, 7, 13, 15]
    # The middle of three patches reaches from token 1.33 to token 2.67.
    assert [int(patch.int().argmax()) for patch in seen[:, 4:13].T] == [5, 6, 7, 9, 10, 11, 13, 14, 15]


def test_the_prefix_loss_asks_tokens_what_the_patches_gain_that_they_have_seen():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 2, 16, 8, generator=generator), torch.randn(3 * 21, 8, generator=generator)
    gains, seen = torch.randn(1, 2, 20, generator=generator), seen_patches(GazeGrid([32, 64]), (4, 4))
    expected = []
    for t in range(2):
        for token in range(16):
            ids = seen[token].nonzero()[:, 0]
            if len(ids) >= 3:
                expected.append(gain_losses(weight[ids] @ hidden[0, t, token], gains[0, t, ids]))
    assert float(prefix_loss(hidden, weight, gains, seen)) == pytest.approx(float(sum(expected) / len(expected)))


def test_cells_are_told_by_the_tokens_they_lie_in():
    config = AutoGazeConfig(scales=[32, 64, 112, 224])
    heads = CellLossHeads(config)
    cells = torch.randn(2, 3, 4, 28, 28)
    # Tokens that know the losses of their own cells, and heads that say what they know.
    known = cells.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 1, 3, 4, 2, 5, 6).reshape(2, 3, 196, 16)
    tokens = torch.cat([known, torch.randn(2, 3, 196, 176)], dim=-1)
    tokens = tokens / tokens.square().mean(-1, keepdim=True).sqrt()  # as the heads see them
    scale = (known / tokens[..., :16]).mean(-1, keepdim=True)
    for head in heads.heads:
        head.weight.data = torch.eye(16, 192)
        head.bias.data.zero_()
    told = tokens[..., :16]
    error = (told - told * scale).square().mean()
    states = (tokens, torch.zeros_like(tokens), tokens, None, None)
    torch.testing.assert_close(heads(states, cells), 2 * error)


def test_cells_that_tokens_do_not_divide_are_told_by_the_nearest():
    heads = CellLossHeads(AutoGazeConfig(scales=[48, 96], image_size=64))
    assert heads.tokens == (4, 4) and heads.cells_in_token == (2, 2)
    states = tuple(torch.randn(1, 1, 16, 192) for _ in range(5))
    assert bool(heads(states, torch.zeros(1, 1, 2, 6, 6)).isfinite())


def test_training_teaches_what_to_keep(tmp_path):
    """One clip, so it can be learned by heart: the model's own gaze comes to rebuild it about as well as greedy search."""
    model = small_model()
    train = clips(model.config, num_videos=1, augmentation=None, schedule=BudgetSchedule("fixed", ratio_min=0.3))
    item = train[0]
    # From random weights, of which nothing can be lost, everything may learn at the same rate.
    settings = {"max_steps": 60, "learning_rate": 3e-3, "logging_steps": 10, "slow_learning_rate_factor": 1.0}
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
    for name in ("loss", "task_loss_error", "gain_loss", "cell_loss", "prefix_loss"):
        assert history[-1][name] < 0.7 * history[0][name], name


def test_the_logged_parts_add_up_to_the_loss(tmp_path):
    weights = {
        "gain_loss": 0.75,
        "attention_loss": 0.3,
        "naming_loss": 0.6,
        "history_loss": 0.4,
        "cell_loss": 0.5,
        "prefix_loss": 0.25,
    }
    trainer = make_trainer(tmp_path, max_steps=2, **{f"{name}_weight": weight for name, weight in weights.items()})
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        total = entry["next_token_loss"] + entry["task_loss_error"]
        total += sum(weight * entry[name] for name, weight in weights.items()) + 0.15 * entry["prefix_attention_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_accumulated_batches_count_like_one_batch(tmp_path):
    items = [clips(small_model().config)[index] for index in range(4)]
    assert len({sum(map(len, item["gazing_pos"])) for item in items}) > 1
    settings = {"max_steps": 1, "train_dataset": items, "optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 0.1}
    at_once = make_trainer(tmp_path, per_device_train_batch_size=4, **settings)
    at_once.train()
    accumulated = make_trainer(tmp_path, gradient_accumulation_steps=2, **settings)
    accumulated.train()
    assert_weights_equal(accumulated.model, at_once.model, atol=2e-6)
    assert accumulated.state.log_history[0]["loss"] == pytest.approx(at_once.state.log_history[0]["loss"], rel=1e-5)


def test_a_resumed_run_goes_on_bit_equal(tmp_path):
    settings = {"on_policy": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    unbroken = make_trainer(tmp_path, **settings)
    unbroken.train()  # three epochs of four clips; the checkpoint lies in the middle of the second
    checkpoint = tmp_path / "checkpoint-3"
    resumed = make_trainer(tmp_path / "resumed", small_model(seed=1), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_weights_equal(resumed.model, unbroken.model)
    assert_weights_equal(resumed.cell_loss_heads, unbroken.cell_loss_heads)
    ends = [[entry for entry in run.state.log_history if entry["step"] > 3] for run in (resumed, unbroken)]
    for entry, expected in zip(ends[0][:3], ends[1][:3], strict=True):
        assert entry == expected


def test_every_epoch_takes_new_clips(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, max_steps=4)
    dataset = trainer.train_dataset
    read = dataset._read
    dataset._read = lambda place, generator: seen.append(generator.initial_seed()) or read(place, generator)
    trainer.train()
    assert len(seen) == len(set(seen)) == 8  # two epochs of four


def test_the_stem_and_the_names_of_patches_learn_at_their_own_rate(tmp_path):
    start, moved = small_model(), {}
    for factor in (1.0, 0.25, 0.0):
        settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 1e9}
        trainer = make_trainer(tmp_path, slow_learning_rate_factor=factor, **settings)
        trainer.train()
        moved[factor] = [
            weight.detach() - before.detach()
            for part in (
                "vision_model.out_proj.weight",
                "gaze_decoder.lm_head.weight",
                "gaze_decoder.model.layers.1.self_attn.v_proj.weight",
                "gaze_decoder.model.layers.1.self_attn.o_proj.weight",
                "gaze_decoder.model.embed_tokens.weight",
                "gaze_decoder.model.layers.0.self_attn.v_proj.weight",
            )
            for weight, before in [(trainer.model.get_parameter(part), start.get_parameter(part))]
        ]
    for slow in range(4):
        assert float(moved[1.0][slow].abs().max()) > 0 and not bool(moved[0.0][slow].any())
        torch.testing.assert_close(moved[0.25][slow], 0.25 * moved[1.0][slow], rtol=1e-3, atol=1e-6)
    for quick in (4, 5):
        torch.testing.assert_close(moved[0.25][quick], moved[1.0][quick])


def test_what_is_saved_is_the_model_and_its_processor_alone(tmp_path):
    processor = AutoGazeVideoProcessor(image_std=(0.5, 0.25, 0.125))
    trainer = make_trainer(tmp_path, processing_class=processor, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        model, info = AutoGazeModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert list(AutoGazeVideoProcessor.from_pretrained(folder).image_std) == [0.5, 0.25, 0.125]
    assert_weights_equal(AutoGazeModel.from_pretrained(tmp_path), trainer.model)
    assert load_file(tmp_path / "checkpoint-1" / "cell_loss_heads.safetensors").keys() == {
        f"heads.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")
    }
    assert not hasattr(trainer.model, "cell_loss_heads")


def test_a_whole_processor_is_taken_as_well(tmp_path):
    model = small_model()
    args = AutoGazeTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = AutoGazeTrainer(model, args, processing_class=AutoGazeProcessor())
    assert isinstance(trainer.processing_class, AutoGazeVideoProcessor)


def test_on_policy_batches_go_on_from_the_models_own_choices(tmp_path):
    trainer = make_trainer(tmp_path)
    model, config = trainer.model, trainer.model.config
    batch = GazeCollator(config)([clips(config)[index] for index in range(4)])
    relabelled = trainer.relabel(batch)
    assert model.training and relabelled.keys() == {*batch, "gains"}
    same = ("pixel_values_videos", "if_padded_gazing", "num_gazing_each_frame")
    assert all(torch.equal(relabelled[key], batch[key]) for key in same)
    is_padding, counts = batch["if_padded_gazing"], batch["num_gazing_each_frame"]
    assert bool(is_padding.any())
    assert torch.equal(relabelled["labels"] == -100, is_padding)
    assert torch.equal(relabelled["task_loss_labels"].isnan(), is_padding)
    assert not torch.equal(relabelled["gazing_pos"], batch["gazing_pos"])

    gaze = GazeOutput.from_ids(relabelled["gazing_pos"], is_padding, counts, config.grid)
    pixels = AutoGazeVideoProcessor().to_pixels(batch["pixel_values_videos"]).clamp(0, 1)
    labels, losses, gains = label_gaze(trainer.composite, pixels, gaze, step_size=3)
    assert torch.equal(relabelled["gains"], gains)
    assert torch.equal(relabelled["labels"][~is_padding], labels[~is_padding])
    torch.testing.assert_close(relabelled["task_loss_labels"][~is_padding], losses[~is_padding])
    # The second frame stands on what the model kept of the first.
    changed = ((relabelled["cell_losses"] - batch["cell_losses"]).abs() > 0.01).flatten(2).any(-1)
    assert not bool(changed[:, 0].any()) and bool(changed[:, 1].any())


def test_on_policy_batches_are_as_many_as_asked_for(tmp_path):
    counted, items = [], [clips(small_model().config)[index] for index in range(2)]
    for share, steps in ((0.0, 2), (0.5, 16), (1.0, 2)):
        trainer = make_trainer(tmp_path, train_dataset=items, on_policy=share, max_steps=steps, logging_steps=99)
        calls = []
        gaze = trainer._gaze
        trainer._gaze = lambda *args, calls=calls, gaze=gaze: calls.append(1) or gaze(*args)
        trainer.train()
        counted.append(len(calls))
    assert counted[0] == 0 and 3 < counted[1] < 13 and counted[2] == 2


def test_evaluation_gives_the_loss_of_labels(tmp_path):
    model = small_model()
    trainer = make_trainer(tmp_path, model, eval_dataset=clips(model.config, augmentation=None), on_policy=1.0)
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < 50 and metrics == {
        **metrics,
        **trainer.evaluate(),
        **{key: metrics[key] for key in metrics if "runtime" in key or "per_second" in key},
    }


def test_evaluation_between_steps_leaves_no_trace_in_the_logs(tmp_path):
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


def test_items_without_values_have_the_published_loss(tmp_path):
    items = [clips(small_model().config)[index] for index in range(4)]
    items = [{key: item[key] for key in ("pixel_values_videos", "gazing_pos", "task_losses")} for item in items]
    trainer = make_trainer(tmp_path, train_dataset=items, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["next_token_loss"] + entry["task_loss_error"], rel=1e-4)


def test_cautious_predictions_stay_above_most_of_what_is_measured():
    """Of noise around a loss, the best prediction lies the higher the more those that are too low count."""
    measured = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    tried = torch.linspace(-2, 2, 401)
    best = [
        float(tried[task_loss_errors(tried[:, None], measured, caution).mean(1).argmin()])
        for caution in (0.2, 0.5, 0.8)
    ]
    assert best[0] == pytest.approx(-best[2], abs=0.1) and best[1] == pytest.approx(float(measured.mean()), abs=0.01)
    assert 0.6 < float((measured < best[2]).float().mean()) < 0.8
    assert torch.equal(task_loss_errors(tried, measured[:401]), (tried - measured[:401]).square())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_policy": -0.1}, "`on_policy` must lie in 0..1, a share of the batches, got -0.1"),
        ({"task_loss_caution": 1.0}, "`task_loss_caution` must lie above 0 and below 1, got 1.0"),
        ({"cell_loss_weight": -1}, "`cell_loss_weight` must be a number of at least 0, got -1"),
        (
            {"slow_learning_rate_factor": -1},
            "`slow_learning_rate_factor` must be a number of at least 0, got -1",
        ),
        ({"prefix_loss_weight": float("nan")}, "`prefix_loss_weight` must be a number of at least 0, got nan"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoGazeTrainingArguments(str(tmp_path), **arguments)


def test_other_arguments_than_its_own_are_refused(tmp_path):
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
def test_two_processes_give_what_one_gives_on_the_same_global_batch(tmp_path):
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
