import pytest
import torch

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeVideoProcessor
from transformers_autogaze.demo import render_demo_clip
from transformers_autogaze.training.data import BudgetSchedule, GazeClipDataset
from transformers_autogaze.training.history import teach_history
from transformers_autogaze.training.objectives import AttentionHistory, gain_losses


def small_model(scales=(32, 64)):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "initializer_range": 0.1}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_multi_token_pred": 3, "intermediate_size": 64}
    return AutoGazeModel(
        AutoGazeConfig(
            scales=list(scales),
            image_size=64,
            initializer_range=0.1,
            vision_config={"output_size": 32, **sizes},
            decoder_config={**heads, **sizes},
        )
    )


def block(grid, patch):
    """Top, bottom, left and right of a patch, as shares of the frame."""
    for rows, cols in grid.grids:
        if patch < rows * cols:
            row, col = divmod(patch, cols)
            return row / rows, (row + 1) / rows, col / cols, (col + 1) / cols
        patch -= rows * cols
    raise AssertionError("no such patch")


@pytest.mark.parametrize(("scales", "per_side"), [((32, 64), 1), ((48, 96), 2)])
def test_heads_are_drawn_to_what_was_shown(scales, per_side):
    """Against the attention that the model itself pays, of a batch with padding, place by place."""
    model = small_model(scales)
    model.set_attn_implementation("eager")
    paid_by_all = []
    for layer in model.gaze_decoder.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, outputs: paid_by_all.append(outputs[1]))
    grid, counts = model.config.grid, torch.tensor([5, 3, 4])
    num_patches, starts = grid.num_patches, counts.cumsum(0) - counts
    chosen = torch.stack([torch.cat([torch.randperm(num_patches)[:n] for n in counts.tolist()]) for _ in range(2)])
    is_padding = torch.zeros_like(chosen, dtype=torch.bool)
    is_padding[1, [3, 4, 7]] = True
    frame = torch.arange(3).repeat_interleave(counts)
    video = torch.randn(2, 3, 3, 64, 64)
    outputs = model(video, chosen + frame * num_patches, is_padding, counts, output_hidden_states=True)
    vision, slots = model.token_places(counts)
    loss = AttentionHistory(model.config)(
        model.gaze_decoder.model, outputs.hidden_states, vision, slots, counts, is_padding, chosen
    )

    def covers(clip, slot, row, col):
        top, bottom, left, right = block(grid, int(chosen[clip, slot]))
        return not is_padding[clip, slot] and top < row < bottom and left < col < right

    def looked_at(clip, t, token, row, col):
        """The place of the patch of the latest frame, and there of the finest scale, that shows a point."""
        for earlier in reversed(range(t)):
            there = [s for s in range(len(frame)) if frame[s] == earlier and covers(clip, s, row, col)]
            if there:
                return int(slots[max(there, key=lambda s: int(chosen[clip, s]))])
        return int(vision[t, token])

    points = [(i + 0.5) / (4 * per_side) for i in range(4 * per_side)]
    expected = 0
    for t, count in enumerate(counts.tolist()):
        of_tokens, of_slots = [], []
        for clip in range(2):
            for token in range(t, 16, 4):
                row, col = (part * per_side for part in divmod(token, 4))
                wanted = torch.zeros(paid_by_all[1].shape[-1])
                for y in points[row : row + per_side]:
                    for x in points[col : col + per_side]:
                        wanted[looked_at(clip, t, token, y, x)] += 1
                paid = paid_by_all[1][clip, 0, vision[t, token]]
                of_tokens.append(gain_losses(paid.log(), wanted.masked_fill(paid == 0, -torch.inf)))
            of_clip = []
            for slot in range(int(starts[t]), int(starts[t]) + count):
                if is_padding[clip, slot]:
                    continue
                wanted = torch.zeros(paid_by_all[0].shape[-1])
                for token in range(16):
                    row, col = (part * per_side for part in divmod(token, 4))
                    ys, xs = points[row : row + per_side], points[col : col + per_side]
                    wanted[vision[t, token]] = sum(covers(clip, slot, y, x) for y in ys for x in xs)
                paid = paid_by_all[0][clip, 0, slots[slot]]
                of_clip.append(gain_losses(paid.log(), wanted.masked_fill(paid == 0, -torch.inf)))
            of_slots.append(torch.stack(of_clip).mean())
        expected += (torch.stack(of_tokens).mean() + torch.stack(of_slots).mean()) / len(counts)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_teaching_history_lowers_its_losses_and_leaves_the_second_half_alone(capsys):
    model = small_model()
    schedule = BudgetSchedule("fixed", ratio_min=0.3, dirichlet_share=0, threshold_share=0)
    processor = AutoGazeVideoProcessor(size={"shortest_edge": 64})
    videos = [render_demo_clip(8, 64, 64, seed) for seed in range(3)]
    clips = GazeClipDataset(videos, model.config, num_frames=3, schedule=schedule, processor=processor)
    items, before = [clips[index] for index in range(3)], {n: w.clone() for n, w in model.state_dict().items()}

    def losses():
        counts = torch.tensor([len(ids) for ids in items[0]["gazing_pos"]])
        ids = torch.tensor(sum(items[0]["gazing_pos"], []))[None]
        frame, is_padding = torch.arange(3).repeat_interleave(counts), torch.zeros_like(ids, dtype=torch.bool)
        video = items[0]["pixel_values_videos"][None]
        with torch.no_grad():
            outputs = model(video, ids + 20 * frame, is_padding, counts, output_hidden_states=True)
        vision, slots = model.token_places(counts)
        told = heads(tuple(state[:, vision] for state in outputs.hidden_states), items[0]["cell_losses"][None])
        history = AttentionHistory(model.config)
        looked = history(model.gaze_decoder.model, outputs.hidden_states, vision, slots, counts, is_padding, ids)
        return told.item(), looked.item()

    heads = teach_history(model, items, num_steps=1, learning_rate=0.0)
    told, looked = losses()
    heads = teach_history(model, items, num_steps=150, learning_rate=1e-2)
    assert losses()[0] < 0.5 * told and losses()[1] < 0.8 * looked
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert "gaze_decoder.model.embed_tokens.weight" in changed
    assert all(".layers.0." in name or name == "gaze_decoder.model.embed_tokens.weight" for name in changed)
    assert all(weight.grad is None for weight in model.parameters())
    capsys.readouterr()
