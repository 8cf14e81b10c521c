import json

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_autogaze import (
    AutoGazeVideoProcessor,
    CompositeReconstruction,
    GazeGrid,
    GreedyGazeConfig,
    GreedyGazeSelector,
    mse_to_task_loss,
)
from transformers_autogaze.cli import main
from transformers_autogaze.evaluation import (
    EvaluationClips,
    GazeSetting,
    baseline_selectors,
    compare_scores,
    evaluate_selectors,
    load_clips,
)
from transformers_autogaze.evaluation.plots import Panel, draw_charts
from transformers_autogaze.evaluation.report import calibration, markdown_tables, write_report
from transformers_autogaze.evaluation.selectors import (
    CoarseFirstSelector,
    FrameDifferenceSelector,
    GainRankingSelector,
    RandomSelector,
)
from transformers_autogaze.selection_autogaze import resize_frames
from transformers_autogaze.video import write_video


GRID = GazeGrid([16, 32, 64], 16)
CONFIG = GreedyGazeConfig(GRID.scales, 16)
PROCESSOR = AutoGazeVideoProcessor()
RULES = [GainRankingSelector, FrameDifferenceSelector, CoarseFirstSelector, RandomSelector]
PREDICTED = "measured_over_predicted_loss.png"


def make_levels(count, num_frames=3, seed=0):
    """Blobs that move a little from frame to frame, with some texture: `(count, frames, 3, 64, 64)`."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.rand(count, 3, 8, 8, generator=generator)
    scene = torch.nn.functional.interpolate(scene, size=(58 + 6 * num_frames,) * 2, mode="bicubic").clamp(0, 1)
    scene = (scene + 0.1 * torch.randn(scene.shape, generator=generator)).clamp(0, 1)
    frames = torch.stack([scene[..., 6 * t : 6 * t + 64, 4 * t : 4 * t + 64] for t in range(num_frames)], dim=1)
    return (frames * 255).round().byte()


def make_clips(count=3, num_frames=3, seed=0) -> EvaluationClips:
    values = PROCESSOR.to_pixel_values(make_levels(count, num_frames, seed))
    return EvaluationClips([f"clip{index}:0" for index in range(count)], values)


def pixels_of(clips: EvaluationClips) -> torch.Tensor:
    return PROCESSOR.to_pixels(clips.pixel_values_videos).clamp(0, 1)


# Selectors.


def test_gain_ranking_keeps_the_patches_that_gain_most_alone():
    clips, composite = make_clips(count=1, num_frames=2), CompositeReconstruction(GRID)
    pixels = pixels_of(clips)
    gaze = GainRankingSelector(CONFIG).generate(clips.pixel_values_videos, gazing_ratio=5 / 21)
    previous_reconstruction = torch.full_like(pixels[:, 0], 0.5)
    for t, ids in enumerate(gaze.ids_each_frame()):
        frame, errors = pixels[:, t : t + 1], []
        for patch in range(GRID.num_patches):
            alone = GRID.split_by_scale((torch.arange(GRID.num_patches) == patch)[None, None])
            errors.append((composite.reconstruct(frame, alone, previous_reconstruction) - frame).square().mean())
        assert ids.tolist() == torch.stack(errors).argsort(stable=True)[:5].tolist()
        masks = [mask[:, t : t + 1] for mask in gaze.gazing_mask]
        previous_reconstruction = composite.reconstruct(frame, masks, previous_reconstruction)[:, 0]


def test_frame_difference_keeps_finest_patches_that_differ_from_the_reconstruction():
    pixels = torch.full((1, 3, 3, 64, 64), 0.5)
    pixels[:, 1:, :, :16, :16] = 1.0  # changes most, patch 5
    pixels[:, 1:, :, 16:32, :16] = 0.8  # changes less and is not kept, patch 9
    video = PROCESSOR.to_pixel_values(pixels * 255)
    gaze = FrameDifferenceSelector(CONFIG).generate(video, gazing_ratio=1 / 21)
    assert [ids.tolist() for ids in gaze.ids_each_frame()][1:] == [[5], [9]]
    gaze = FrameDifferenceSelector(CONFIG).generate(video, gazing_ratio=1)
    assert gaze.ids_each_frame()[1][-5:].tolist() == [0, 1, 2, 3, 4]


def test_coarse_first_keeps_ids_in_order():
    gaze = CoarseFirstSelector(CONFIG).generate(make_clips().pixel_values_videos, gazing_ratio=6 / 21)
    assert all(ids.tolist() == [0, 1, 2, 3, 4, 5] for clip in range(3) for ids in gaze.ids_each_frame(clip))


def test_random_patches_depend_on_the_seed_and_the_frame_index():
    video = make_clips().pixel_values_videos
    gazes = [RandomSelector(CONFIG, seed).generate(video, gazing_ratio=6 / 21) for seed in (0, 0, 100)]
    assert torch.equal(gazes[0].gazing_pos, gazes[1].gazing_pos)
    assert not torch.equal(gazes[0].gazing_pos, gazes[2].gazing_pos)
    first, second, _ = gazes[0].ids_each_frame()
    assert len(set(first.tolist())) == 6 and first.tolist() != second.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_a_baseline_uses_its_budget_in_every_frame(rule):
    video = make_clips().pixel_values_videos
    gaze = rule(CONFIG).generate(video, gazing_ratio=[1 / 21, 1, 4 / 21])
    assert gaze.num_real_each_frame.tolist() == [[1, 21, 4]] * 3
    assert gaze.num_gazing_each_frame.tolist() == [1, 21, 4]


@pytest.mark.parametrize("rule", RULES)
def test_a_baseline_stops_at_the_first_patch_that_meets_the_threshold(rule):
    clips, composite = make_clips(), CompositeReconstruction(GRID)
    gaze = rule(CONFIG).generate(clips.pixel_values_videos, gazing_ratio=1, task_loss_requirement=0.9)
    loss = mse_to_task_loss(composite.measure(pixels_of(clips), gaze))
    torch.testing.assert_close(gaze.task_loss_prediction, loss)
    for clip in range(3):
        alone = gaze.select(clip)
        counts = alone.num_real_each_frame[0].tolist()
        assert counts == alone.num_gazing_each_frame.tolist()
        for losses in alone.task_loss_prediction[0].split(counts):
            assert losses[-1] <= 0.9 and (losses[:-1] > 0.9).all()
    assert (gaze.num_real_each_frame < GRID.num_patches).any()


@pytest.mark.parametrize("rule", RULES)
def test_a_baseline_is_equal_for_a_clip_a_stream_and_a_batch(rule):
    video, settings = make_clips().pixel_values_videos, {"gazing_ratio": 8 / 21, "task_loss_requirement": 0.8}
    selector = rule(CONFIG)
    whole = selector.generate(video, **settings)
    for clip in range(3):
        alone = selector.generate(video[clip : clip + 1], **settings)
        assert torch.equal(alone.gazing_pos, whole.select(clip).gazing_pos)
    state, frames = None, []
    for t in range(3):
        gaze = selector.generate(video[:, t : t + 1], **settings, past_key_values=state, use_cache=True)
        state = gaze.past_key_values
        frames.append(gaze)
    masks = [torch.cat(parts, dim=1) for parts in zip(*(gaze.gazing_mask for gaze in frames), strict=True)]
    assert all(torch.equal(*pair) for pair in zip(masks, whole.gazing_mask, strict=True))


def test_a_baseline_refuses_other_caches():
    video, selector = make_clips().pixel_values_videos, CoarseFirstSelector(CONFIG)
    greedy = GreedyGazeSelector(CONFIG).generate(video, gazing_ratio=0.2, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` must be a RankingCache, got GreedyGazeCache"):
        selector.generate(video, gazing_ratio=0.2, past_key_values=greedy)
    state = selector.generate(video, gazing_ratio=0.2, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` holds 3 clips, but 2 are given"):
        selector.generate(video[:2], gazing_ratio=0.2, past_key_values=state)


def test_baselines_undo_the_processors_own_normalisation():
    processor = AutoGazeVideoProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=1 / 255, offset=False)
    levels = make_levels(2)
    for name, selector in baseline_selectors(GRID, processor).items():
        gaze = selector.generate(processor.to_pixel_values(levels), gazing_ratio=0.3)
        expected = baseline_selectors(GRID)[name].generate(PROCESSOR.to_pixel_values(levels), gazing_ratio=0.3)
        assert torch.equal(gaze.gazing_pos, expected.gazing_pos), name


# Comparison.


def test_scores_are_means_over_the_reconstructions():
    clips, composite = make_clips(), CompositeReconstruction(GRID)
    pixels, selectors = pixels_of(clips), baseline_selectors(GRID)
    scores = evaluate_selectors(selectors, clips, [(0.2, None), (0.5, 0.8)], batch_size=2)
    assert [(score.gazing_ratio, score.selector) for score in scores] == [
        (r, s) for r in (0.2, 0.5) for s in selectors
    ]
    for score in scores:
        setting = {"gazing_ratio": score.gazing_ratio, "task_loss_requirement": score.task_loss_requirement}
        gaze = selectors[score.selector].generate(clips.pixel_values_videos, **setting)
        loss = composite(pixels, gaze).loss
        rebuilt = composite(pixels, gaze).reconstruction
        assert score.task_loss == pytest.approx(float(loss.mean()), abs=1e-5)
        assert score.psnr == pytest.approx(float((40 - 20 * loss).mean()), abs=1e-4)
        assert score.l1 == pytest.approx(float((rebuilt - pixels).abs().mean()), abs=1e-6)
        assert score.patches_per_frame == pytest.approx(float(gaze.num_real.sum()) / 9)
        assert score.reduction_factor == pytest.approx(16 / score.patches_per_frame)
        assert [clip["num_patches"] for clip in score.each_clip] == gaze.num_real.tolist()
        torch.testing.assert_close(
            torch.tensor([clip["psnr"] for clip in score.each_clip]), (40 - 20 * loss).mean(1), atol=1e-4, rtol=0
        )
        assert score.predicted_loss_error is None and score.predictions == []
        if score.task_loss_requirement is not None:
            assert score.threshold_share == pytest.approx(float((loss <= 0.8 + 1e-4).float().mean()))


def test_efficiency_and_patches_are_relative_to_greedy_and_random():
    clips = make_clips()
    scores = evaluate_selectors(baseline_selectors(GRID), clips, [(0.3, None), (0.9, 0.9)])
    free, limited = (
        {score.selector: score for score in scores if score.gazing_ratio == ratio} for ratio in (0.3, 0.9)
    )
    assert free["greedy"].efficiency == 1 and free["random"].efficiency == 0
    gained = free["random"].task_loss - free["gain ranking"].task_loss
    expected = gained / (free["random"].task_loss - free["greedy"].task_loss)
    assert free["gain ranking"].efficiency == pytest.approx(expected) and 0.2 < expected < 1
    assert free["greedy"].patches_over_greedy is None and limited["greedy"].efficiency is None
    assert limited["greedy"].patches_over_greedy == 1 and limited["random"].patches_over_greedy > 1
    assert limited["greedy"].threshold_share == 1


def test_scores_of_several_calls_compare_like_those_of_one():
    clips, selectors = make_clips(), baseline_selectors(GRID)
    whole = evaluate_selectors(selectors, clips, [(0.3, None), (0.9, 0.9)])
    parts = [
        score
        for name, selector in selectors.items()
        for score in evaluate_selectors({name: selector}, clips, [(0.3, None), (0.9, 0.9)])
    ]
    assert all(score.efficiency is None or score.selector in ("greedy", "random") for score in parts)
    compare_scores(parts)
    by_name = {(score.selector, score.gazing_ratio): score for score in parts}
    assert all(by_name[score.selector, score.gazing_ratio] == score for score in whole)


def test_predicted_losses_are_compared_after_every_kept_patch(tiny):
    model, clips = tiny.model(torch.float32), make_clips(count=2)
    grid = model.config.grid
    assert grid == GRID
    (score,) = evaluate_selectors({"model": model}, clips, [(0.8, 0.0)], batch_size=1)
    errors = []
    for clip, pixels in zip(clips.pixel_values_videos, pixels_of(clips), strict=True):
        gaze = model.generate(clip[None], gazing_ratio=0.8, task_loss_requirement=0.0, output_scores=True)
        kept = torch.zeros(1, 3, grid.num_patches, dtype=torch.bool)
        for slot in range(gaze.gazing_pos.shape[1]):
            if gaze.if_padded_gazing[0, slot]:
                continue
            frame = int(gaze.frame_of_slot[slot])
            kept[0, frame, int(gaze.gazing_pos[0, slot]) - frame * grid.num_patches] = True
            rebuilt = CompositeReconstruction(grid).reconstruct(pixels[None], grid.split_by_scale(kept))
            mse = (rebuilt[0, frame] - pixels[frame]).square().mean()
            errors.append(float((gaze.task_loss_prediction[0, slot] - mse_to_task_loss(mse)).abs()))
    assert len(score.predictions) == len(errors)
    assert score.predicted_loss_error == pytest.approx(np.mean(errors), abs=1e-4)


def test_clips_are_consecutive_frames_from_the_beginning(tmp_path):
    levels = np.repeat(np.arange(10, 230, 20, dtype=np.uint8), 80 * 96 * 3).reshape(11, 80, 96, 3)
    video = write_video(tmp_path / "steps.mp4", levels)
    clips = load_clips([video, video], size=64, num_frames=4, max_clips=3)
    assert clips.names == ["steps.mp4:0", "steps.mp4:4"] * 2
    assert clips.pixel_values_videos.shape == (4, 4, 3, 64, 64)
    means = pixels_of(clips).mean((2, 3, 4)) * 255
    expected = torch.arange(10, 170, 20).view(2, 4).repeat(2, 1)
    torch.testing.assert_close(means, expected.float(), atol=3, rtol=0)
    one = load_clips([video], size=64, num_frames=4, max_clips=1)
    assert torch.equal(one.pixel_values_videos, clips.pixel_values_videos[:1])
    # Frames are preprocessed and then resized to a square like by selectors.
    values = PROCESSOR(str(video), return_tensors="pt")["pixel_values_videos"][:, :4]
    assert torch.equal(one.pixel_values_videos, resize_frames(values, 64))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"selectors": {}}, "`selectors` must hold at least one selector"),
        ({"settings": []}, "`settings` must hold at least one setting"),
        ({"settings": [(1.5, None)]}, "`gazing_ratio` must lie in 0..1"),
        (
            {"selectors": {"a": CoarseFirstSelector(CONFIG), "b": CoarseFirstSelector(GreedyGazeConfig([32, 64]))}},
            "`selectors` must share one grid",
        ),
        (
            {"clips": EvaluationClips(["a"], torch.zeros(1, 2, 3, 32, 32))},
            r"`clips` must hold 1 clips of shape \(frames, 3, 64, 64\), the selectors' size, got .* 32, 32\)",
        ),
    ],
)
def test_invalid_comparisons_are_refused(options, message):
    arguments = {"selectors": {"a": CoarseFirstSelector(CONFIG)}, "clips": make_clips(), "settings": [(0.1, None)]}
    with pytest.raises(ValueError, match=message):
        evaluate_selectors(**{**arguments, **options})


def test_videos_that_are_too_short_are_refused(tmp_path):
    video = write_video(tmp_path / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"`videos`: .*short.mp4 has 3 frames, a clip needs 16"):
        load_clips([video])
    with pytest.raises(ValueError, match="`max_clips` must be at least 1, got 0"):
        load_clips([video], max_clips=0)
    with pytest.raises(ValueError, match="`videos` must name at least one video"):
        load_clips([])


# Report.


@pytest.fixture(scope="module")
def scores():
    settings = [GazeSetting(0.1), GazeSetting(0.4), GazeSetting(0.9, 0.8)]
    return evaluate_selectors(baseline_selectors(GRID), make_clips(), settings)


def test_a_report_has_every_score_and_a_curve(scores, tmp_path):
    written = write_report(scores, tmp_path / "results", {"videos": ["a.mp4", "b.mp4"]}, model="greedy")
    assert {path.name for path in written} == {"results.json", "results.md", "quality_over_patches.png"}
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["videos"] == ["a.mp4", "b.mp4"] and len(results["scores"]) == 15
    assert [row["task_loss"] for row in results["scores"]] == [score.task_loss for score in scores]
    text = (tmp_path / "results" / "results.md").read_text()
    assert "- videos: a.mp4, b.mp4" in text and markdown_tables(scores, "greedy") in text
    assert "![quality over patches](quality_over_patches.png)" in text
    with Image.open(tmp_path / "results" / "quality_over_patches.png") as chart:
        assert chart.size == (760, 480)


def test_tables_have_only_columns_that_are_defined_at_their_setting(scores):
    text = markdown_tables(scores, model="coarse first")
    first, second, third = text.split("\n## ")[1:]
    assert first.startswith("Ratio 0.1\n") and third.startswith("Ratio 0.9, threshold 0.8\n")
    assert "efficiency" in first and "threshold" not in first and "predicted" not in text
    assert "efficiency" not in third and "patches over greedy's" in third
    row = next(line for line in second.splitlines() if line.startswith("| random |"))
    random = next(score for score in scores if score.selector == "random" and score.gazing_ratio == 0.4)
    assert f"| {random.task_loss:.3f} | {random.psnr:.2f} |" in row and row.endswith("| 0.00 |")
    assert "patches, coarse first" in third and third.count("\n| clip") == 4


def test_calibration_summarises_measured_losses_in_bins_of_predicted_ones():
    generator = torch.Generator().manual_seed(0)
    predicted = 0.5 + 0.1 * torch.rand(200, generator=generator)
    measured = torch.linspace(0, 1, 200)
    few = [(0.95, 0.1)] * 19
    (part,) = calibration([*zip(predicted.tolist(), measured.tolist(), strict=True), *few])
    assert part["count"] == 200 and part["predicted"] == pytest.approx(float(predicted.mean()), abs=1e-4)
    assert (part["low"], part["measured"], part["high"]) == pytest.approx((0.1, 0.5, 0.9), abs=1e-3)
    assert calibration([]) == []


def test_a_chart_is_drawn_for_every_panel(tmp_path):
    panels = [
        Panel({"up": [(1, 0), (10, 10)], "none": []}, "t", "x", "y", {"up": {"color": (1.0, 0.0, 0.0)}}, True)
    ] * 2
    with Image.open(draw_charts(tmp_path / "chart.png", panels)) as chart:
        is_red = (abs(np.asarray(chart.convert("RGB")).astype(int) - (255, 0, 0)) < 60).all(-1)
    assert is_red.shape == (480, 1270)
    left, right = is_red[:, :510].any(0).sum(), is_red[:, 510:1020].any(0).sum()
    assert min(left, right) > 200


def test_missing_points_and_matplotlib_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`panels` must hold at least one point each, got none for 't'"):
        draw_charts(tmp_path / "chart.png", [Panel({"a": []}, "t", "x", "y")])
    monkeypatch.setattr("transformers_autogaze.evaluation.plots.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'transformers-autogaze\[evaluate\]'"):
        draw_charts(tmp_path / "chart.png", [Panel({"a": [(0, 1)]}, "t", "x", "y")])


# Command line.


def test_the_command_evaluates_a_checkpoint(tiny, tmp_path, capsys):
    levels = make_levels(1, num_frames=8)[0].permute(0, 2, 3, 1).numpy()
    video = write_video(tmp_path / "blobs.mp4", np.ascontiguousarray(levels))
    model = tiny.model(torch.float32)
    with torch.no_grad():
        # The random predictions are scaled to a small range, so that bins have enough of them for a curve.
        model.gaze_decoder.task_loss_prediction_head.weight *= 0.1
    model.save_pretrained(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), str(video), "-o", str(tmp_path / "out"), "--num-frames", "4"]
    assert main([*arguments, "--gazing-ratio", "0.3", "1", "--task-loss-requirement", "0.9", "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["clips"] == 2 and results["videos"] == ["blobs.mp4"]
    names = ["model", "greedy", "gain ranking", "frame difference", "coarse first", "random"]
    assert [row["selector"] for row in results["scores"]] == names * 3
    settings = [(row["gazing_ratio"], row["task_loss_requirement"]) for row in results["scores"][::6]]
    assert settings == [(0.3, None), (1, None), (0.75, 0.9)]
    assert results["scores"][0]["predicted_loss_error"] > 0 and results["calibration"]
    assert (tmp_path / "out" / PREDICTED).exists()
    printed = capsys.readouterr().out
    assert "## Ratio 0.75, threshold 0.9" in printed and "results.md" in printed


def test_the_command_names_a_missing_checkpoint(tmp_path, capsys):
    clip = write_video(tmp_path / "clip.mp4", np.zeros((16, 32, 32, 3), np.uint8))
    assert main(["evaluate", str(tmp_path / "none"), str(clip), "-o", str(tmp_path / "out")]) == 2
    assert "`MODEL` must be a checkpoint's folder or Hub repository" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
