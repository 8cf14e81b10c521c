"""Comparison of selectors by encoder features: the measure, the comparison, its files and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, BertConfig, BertModel, Dinov2Config, SiglipVisionConfig, VideoMAEConfig

from transformers_autogaze import (
    AutoGazeVideoProcessor,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeGrid,
    GazeOutput,
    write_video,
)
from transformers_autogaze.cli import main
from transformers_autogaze.evaluation.encoder_selector import EncoderClipSelector
from transformers_autogaze.evaluation.feature_clips import FeatureClip, encoder_normalization, read_clips
from transformers_autogaze.evaluation.feature_comparison import (
    FeatureComparison,
    FeatureResults,
    FeatureRow,
    FeatureStatistics,
    finest_grid,
)
from transformers_autogaze.evaluation.feature_report import FeatureTables, write_feature_report
from transformers_autogaze.evaluation.feature_selectors import (
    EVENLY,
    OVER_TIME,
    UP_TO_LOSS,
    EncodedClip,
    PixelClipSelector,
    RandomClipSelector,
    pixel_clip_selectors,
    spread_as_published,
    spread_evenly,
)
from transformers_autogaze.evaluation.features import (
    FeatureMeasure,
    canvas_features,
    dense_features,
    k_means,
    keep_dissimilar,
)
from transformers_autogaze.integrations import GazeVisionModel


PATCH, SIZE, FRAMES = 4, 56, 4
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FINEST = GazeGrid([SIZE], PATCH)
SCALES = GazeGrid([8, 16, 28, SIZE], PATCH)
PROCESSOR = AutoGazeVideoProcessor(rescale_factor=1 / 255, offset=False)


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    tower = AutoModel.from_config(Dinov2Config(**SIZES, image_size=SIZE, patch_size=PATCH)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return tower.requires_grad_(False)


def make_levels(num_frames: int = FRAMES, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    """Blobs that move a little from frame to frame: `(frames, 3, size, size)`."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.rand(1, 3, 10, 10, generator=generator)
    scene = torch.nn.functional.interpolate(scene, size=(size + 4 * num_frames,) * 2, mode="bicubic")[0]
    frames = torch.stack([scene[..., 4 * t : 4 * t + size, 2 * t : 2 * t + size] for t in range(num_frames)])
    return (frames.clamp(0, 1) * 255).round().byte()


def encoded(levels: torch.Tensor) -> EncodedClip:
    return EncodedClip(levels, PROCESSOR.to_pixel_values(levels))


def random_gaze(grid: GazeGrid, share: float, seed: int = 1) -> GazeOutput:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(1, FRAMES, count, generator=generator) < share for count in grid.num_patches_each_scale]
    return GazeOutput.from_masks(masks, grid)


# The measure.


def test_keeping_all_patches_loses_nothing(tower):
    model, values = GazeVisionModel(tower, [SIZE]), encoded(make_levels()).encoder_values
    dense = dense_features(model, values)
    own = tower(values).last_hidden_state[:, 1:]
    torch.testing.assert_close(dense, own, atol=1e-5, rtol=1e-5)
    measure, gaze = FeatureMeasure(dense), GazeOutput.full(FINEST, 1, FRAMES)
    for attention in ("frame", "canvas"):
        kept = model(values[None], gaze, attention=attention).last_hidden_state
        score = measure(canvas_features(kept, gaze, measure.mean))
        assert score.cosine == pytest.approx(1, abs=1e-5) and score.agreement == 1


def test_the_first_frame_is_enough_for_a_still_clip(tower):
    model = GazeVisionModel(tower, [SIZE])
    values = encoded(make_levels(1).expand(FRAMES, -1, -1, -1)).encoder_values
    measure = FeatureMeasure(dense_features(model, values))
    mask = torch.zeros(1, FRAMES, FINEST.num_patches, dtype=torch.bool)
    mask[:, 0] = True
    gaze = GazeOutput.from_masks([mask], FINEST)
    score = measure(canvas_features(model(values[None], gaze).last_hidden_state, gaze, measure.mean))
    assert score.cosine == pytest.approx(1, abs=1e-5) and score.agreement == 1
    mask[:, 0, : FINEST.num_patches // 2] = False
    gaze = GazeOutput.from_masks([mask], FINEST)
    score = measure(canvas_features(model(values[None], gaze).last_hidden_state, gaze, measure.mean))
    assert score.cosine < 0.6  # a place with the mean feature has a cosine of 0


@pytest.mark.parametrize("grid", [FINEST, SCALES, GazeGrid([(12, 8), (20, 28)], PATCH)], ids=repr)
def test_canvas_features_equal_a_plain_loop(grid):
    gaze = random_gaze(grid, share=0.2)
    rows, cols = grid.grids[-1]
    features, start = torch.randn(int(gaze.num_real), 5), torch.randn(5)
    canvas, tokens, expected = start.repeat(rows, cols, 1), iter(features), []
    for ids in gaze.ids_each_frame():
        for patch in ids.tolist():  # ids ascend, so scales are in the order coarse to fine
            left, top, right, bottom = grid.boxes(torch.tensor(patch), rows, cols).tolist()
            feature = next(tokens)
            for row in range(rows):
                for col in range(cols):
                    if top <= row + 0.5 < bottom and left <= col + 0.5 < right:
                        canvas[row, col] = feature
        expected.append(canvas.flatten(0, 1).clone())
    torch.testing.assert_close(canvas_features(features, gaze, start), torch.stack(expected), atol=0, rtol=0)


def test_features_of_other_patches_are_refused():
    gaze = random_gaze(FINEST, share=0.2)
    with pytest.raises(ValueError, match="`features` must be those of the kept patches of one clip"):
        canvas_features(torch.zeros(3, 5), gaze, torch.zeros(5))
    with pytest.raises(ValueError, match="`canvas` must have the shape"):
        FeatureMeasure(torch.randn(2, 9, 5))(torch.zeros(2, 8, 5))


def test_the_cosine_is_relative_to_the_given_mean():
    dense = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)) + 10
    canvas = dense.roll(1, dims=1)
    near, far = FeatureMeasure(dense)(canvas), FeatureMeasure(dense, mean=torch.zeros(5))(canvas)
    assert far.cosine > 0.9 > 0.5 > near.cosine
    expected = torch.cosine_similarity(canvas - dense.mean((0, 1)), dense - dense.mean((0, 1)), dim=-1).mean()
    assert near.cosine == pytest.approx(float(expected), abs=1e-6) and near.agreement == far.agreement < 1


def test_k_means_finds_the_same_clusters_every_time():
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    points = middles.repeat(40, 1) + torch.randn(120, 2, generator=generator)
    centres = k_means(points, 3, seed=5)
    assert torch.equal(centres, k_means(points, 3, seed=5))
    found = torch.cdist(middles, centres)
    assert found.amin(1).max() < 0.7 and found.argmin(1).unique().numel() == 3
    assert k_means(torch.ones(10, 2), 6).eq(1).all()  # fewer places than clusters


@pytest.mark.parametrize("num_tokens", [1, 9, 14, 36])
def test_evs_keeps_the_first_frame_and_the_least_similar_tokens(num_tokens):
    dense = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0))
    kept = keep_dissimilar(dense, num_tokens, GazeGrid([12], PATCH)).gazing_mask[0][0]
    assert kept[0].all() and kept.sum() == max(9, num_tokens)
    similarity = torch.cosine_similarity(dense[1:], dense[:-1], dim=-1)
    if 9 < num_tokens < 36:
        assert similarity[kept[1:]].max() < similarity[~kept[1:]].min()


# Selectors.


def test_all_tokens_are_spread():
    assert spread_evenly(98, 16, 196) == [6] * 7 + [7] + [6] * 7 + [7]
    assert spread_evenly(999, 2, 196) == [196, 196]
    assert spread_as_published(348, 16, 265) == [198] + [10] * 15
    capped = spread_as_published(1568, 16, 265)
    assert capped[0] == 265 and sum(capped) == 1568 and max(capped[1:]) - min(capped[1:]) <= 1
    assert spread_as_published(50, 1, 265) == [50]


@pytest.mark.parametrize("allocation", [EVENLY, OVER_TIME])
@pytest.mark.parametrize("num_tokens", [98, 300, 392])
def test_selectors_keep_the_given_number_of_tokens(tower, allocation, num_tokens):
    clip = encoded(make_levels())
    selectors = pixel_clip_selectors(SIZE, PATCH)
    selectors |= {"finest": EncoderClipSelector(GazeVisionModel(tower, [SIZE]))}
    selectors |= {"scales": EncoderClipSelector(GazeVisionModel(tower, SCALES.scales))}
    assert selectors["greedy"].grid == SCALES and selectors["random"].grid == FINEST
    for name, selector in selectors.items():
        if allocation in selector.allocations:
            gaze = selector.gaze(selector.prepare(clip), num_tokens, allocation)
            assert gaze.grid == selector.grid and gaze.num_real.tolist() == [num_tokens], name
            counts = gaze.num_real_each_frame[0].tolist()
            if allocation == EVENLY:
                assert counts == spread_evenly(num_tokens, FRAMES, selector.grid.num_patches), name
            elif selector.grid == FINEST and num_tokens >= 196:
                assert counts[0] == 196, name  # patches without a kept predecessor have the largest gains
    assert selectors["gain-ranking"].allocations == (EVENLY,)


def test_a_model_allocates_tokens_over_time_as_published(tiny):
    model = tiny.model(torch.float32)
    grid = model.config.grid.for_encoder(16, 4)
    selector = PixelClipSelector(model, grid, published_way=True)
    gaze = selector.gaze(selector.prepare(encoded(make_levels(size=grid.sizes[-1][0]))), 32, OVER_TIME)
    assert gaze.grid == grid
    assert gaze.num_real_each_frame[0].tolist() == spread_as_published(32, FRAMES, grid.num_patches)


def test_the_encoder_selector_keeps_the_largest_changes_of_features(tower):
    """Frame by frame: what is kept is farther from what stood there than what is not."""
    selector = EncoderClipSelector(GazeVisionModel(tower, [SIZE]))
    maps = selector.prepare(encoded(make_levels()))
    assert maps.shape == (1, FRAMES, 1, 32, 14, 14) and maps.abs().amax() == 0.5
    kept = selector.gaze(maps, 80, EVENLY).gazing_mask[0][0]
    features, canvas = maps[0, :, 0].flatten(2).transpose(1, 2), torch.zeros(196, 32)
    for mask, frame in zip(kept, features, strict=True):
        distance = (frame - canvas).square().sum(1)
        assert distance[mask].min() >= distance[~mask].max() - 1e-6
        canvas = torch.where(mask[:, None], frame, canvas)
    kept = selector.gaze(maps, 250, OVER_TIME).gazing_mask[0][0]
    assert kept[0].all() and kept[1:].sum() == 54


def test_random_patches_depend_on_the_seed():
    clip = encoded(make_levels())
    gazes = [RandomClipSelector(FINEST, seed).gaze(clip, 300, OVER_TIME) for seed in (0, 0, 1)]
    masks = [gaze.gazing_mask[0] for gaze in gazes]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert masks[0][0, 0].all() and masks[0].sum() == 300


# Clips.


def test_clips_are_spread_or_consecutive(tmp_path):
    levels = np.repeat(np.arange(10, 250, 20, dtype=np.uint8), 40 * 60 * 3).reshape(12, 40, 60, 3)
    video = write_video(tmp_path / "steps.mp4", levels)
    clips = [clip for kind in ("consecutive", "spread") for clip in read_clips(video, 28, kind, 4, max_clips=2)]
    assert [(clip.name, clip.sampling) for clip in clips] == [
        ("steps.mp4:0", "consecutive"),
        ("steps.mp4:4", "consecutive"),
        ("steps.mp4", "spread"),
    ]
    for clip, frames in zip(clips, ([0, 1, 2, 3], [4, 5, 6, 7], [0, 3, 6, 9]), strict=True):
        assert clip.levels.shape == (4, 3, 28, 28)
        means = clip.levels.float().mean((1, 2, 3))
        torch.testing.assert_close(means, 10.0 + 20 * torch.tensor(frames), atol=3, rtol=0)


def test_normalisation_is_the_encoders_own(tmp_path):
    levels = make_levels()
    own = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 255, "do_resize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**own, "size": {"height": 224, "width": 224}}))
    values = encoder_normalization(tmp_path, "siglip_vision_model").to_pixel_values(levels)
    torch.testing.assert_close(values, (levels / 255 - 0.5) / 0.25)
    (tmp_path / "none").mkdir()
    values = encoder_normalization(tmp_path / "none", "dinov2").to_pixel_values(levels)
    torch.testing.assert_close(values, PROCESSOR.to_pixel_values(levels))
    with pytest.raises(ValueError, match="must have a preprocessor_config.json with the normalisation"):
        encoder_normalization(tmp_path / "none", "siglip_vision_model")


# Comparison.


def test_a_comparison_measures_every_combination_once(tower):
    selectors = {"a": RandomClipSelector(FINEST), "b": pixel_clip_selectors(SIZE, PATCH)["gain-ranking"]}
    comparison = FeatureComparison(tower, PROCESSOR, selectors, SIZE, [0.125, 1], ["frame", "canvas"])
    clip = FeatureClip("clip", "spread", make_levels())
    statistics = comparison.feature_statistics([clip])["spread"]
    mean = torch.tensor(statistics.mean)
    rows = list(comparison.measure(clip, statistics))
    assert [row.key for row in rows] == comparison.row_keys(clip) and len(rows) == 3 * 2 * 2 + 2
    found = {row.key[2:]: row for row in rows}
    assert found["evs", OVER_TIME, 0.125, "whole tower"].tokens == 196  # the first frame
    assert found["a", EVENLY, 0.125, "frame"].tokens == 98
    assert found["a", OVER_TIME, 1, "frame"].cosine == pytest.approx(1, abs=1e-5)
    assert found["a", OVER_TIME, 1, "frame"].agreement == 1 == found["evs", OVER_TIME, 1, "whole tower"].agreement
    assert all(row.tower_seconds > 0 for row in rows)
    gaze = selectors["a"].gaze(encoded(clip.levels), 98, EVENLY)
    model = GazeVisionModel(tower, [SIZE])
    kept = model(encoded(clip.levels).encoder_values[None], gaze, attention="canvas").last_hidden_state
    dense = dense_features(model, encoded(clip.levels).encoder_values)
    assert statistics.variance == pytest.approx(float((dense - mean).square().sum(-1).mean()), rel=1e-4)
    score = FeatureMeasure(dense, mean)(canvas_features(kept, gaze, mean))
    assert found["a", EVENLY, 0.125, "canvas"][7:10] == pytest.approx(score, abs=1e-4)
    assert found["a", OVER_TIME, 1, "frame"].loss == pytest.approx(0, abs=1e-5)
    again = list(comparison.measure(clip, statistics, {row.key for row in rows[:-1]}))
    assert [row[:10] for row in again] == [rows[-1][:10]]


def test_a_comparison_measures_thresholds_of_selectors_that_predict_a_loss(tower):
    torch.manual_seed(0)
    config = FeatureGazeConfig(hidden_sizes=[8, 12, 16], depths=[1, 1, 1], feature_size=6, initializer_range=0.5)
    predicting = PixelClipSelector(FeatureGazeModel(config).eval(), FINEST)
    assert predicting.takes_threshold and not RandomClipSelector(FINEST).takes_threshold
    selectors = {"a": RandomClipSelector(FINEST), "features": predicting}
    comparison = FeatureComparison(tower, PROCESSOR, selectors, SIZE, [], ["canvas"], [0, 0.2, 0.9])
    clip = FeatureClip("clip", "spread", make_levels())
    rows = list(comparison.measure(clip))
    assert [(row.selector, row.allocation, row.budget) for row in rows] == [
        ("features", UP_TO_LOSS, threshold) for threshold in (0, 0.2, 0.9)
    ]
    assert rows[0].tokens == 784 and rows[0].loss == pytest.approx(0, abs=1e-5)
    assert rows[0].tokens > rows[1].tokens > rows[2].tokens and rows[1].loss < rows[2].loss
    tables = FeatureTables(rows, "spread", dense_tokens=784)
    assert "| predicted features, finest scale | canvas | 0 | 0.000 | 1.000 | 1.000 | 1.000 |" in tables.thresholds()
    assert not tables.rows and "Thresholds" in tables.markdown()
    with pytest.raises(ValueError, match="`thresholds` must lie in 0..1, shares of the variance of features, got 1.5"):
        FeatureComparison(tower, PROCESSOR, selectors, SIZE, thresholds=[1.5])


def test_invalid_towers_and_sizes_are_refused(tower):
    assert finest_grid(tower) == GazeGrid([14 * PATCH], PATCH)
    with pytest.raises(ValueError, match="`size` must be a positive multiple of the encoder's patch size 4, got 30"):
        finest_grid(tower, 30)
    of_videos = VideoMAEConfig(**SIZES, image_size=32, patch_size=16, num_frames=4)
    with pytest.raises(ValueError, match="`encoder` must be an image tower"):
        finest_grid(AutoModel.from_config(of_videos))
    for budget in (0, 1.5):
        with pytest.raises(ValueError, match="`budgets` must be above 0 and at most 1"):
            FeatureComparison(tower, PROCESSOR, {}, SIZE, [budget])


# Report.


def make_rows() -> list[FeatureRow]:
    def row(clip, selector, budget, attention, tokens, cosine, seconds=1.0):
        return FeatureRow(
            clip, "spread", selector, OVER_TIME, budget, attention, tokens, cosine, 0.5, 0.5, 0.5, seconds
        )

    return [
        row("a.mp4", "greedy", 0.125, "frame", 98, 0.2),
        row("a.mp4", "greedy", 0.125, "canvas", 98, 0.4),
        row("b.mp4", "greedy", 0.125, "frame", 98, 0.3),
        row("b.mp4", "greedy", 0.125, "canvas", 98, 0.8, seconds=3.0),
        row("a.mp4", "evs", 0.125, "whole tower", 196, 0.7, seconds=4.0),
        row("b.mp4", "evs", 0.125, "whole tower", 196, 0.9, seconds=6.0),
    ]


def test_tables_show_means_at_the_best_attention(tmp_path):
    tables, method = FeatureTables(make_rows(), "spread", dense_tokens=784), ("greedy", OVER_TIME)
    assert tables.best_attentions[method] == "canvas" and tables.mean(method, 0.125, "cosine") == pytest.approx(0.6)
    assert tables.seconds(method, 0.125) == 2.5 and tables.dense_seconds() == 5
    over_budgets = tables.over_budgets("cosine")
    assert "| greedy, four scales, over time | canvas | 0.600 |" in over_budgets
    assert "| EVS, over time | whole tower | 0.800* |" in over_budgets
    assert "| greedy, four scales, over time | 0.250 | 0.600 |" in tables.attentions()
    assert "| b.mp4 | 0.800 | 0.900 |" in tables.clip_by_clip(0.125)
    written = write_feature_report(make_rows(), tmp_path, {"encoder": "tiny"}, 784)
    assert [path.name for path in written] == ["results.md", "spread.png"]
    text = (tmp_path / "results.md").read_text()
    assert "- encoder: tiny" in text and tables.markdown() in text and "Consecutive" not in text
    assert Image.open(tmp_path / "spread.png").width > 1000


def test_results_are_resumed_with_the_same_settings_only(tmp_path):
    path = tmp_path / "out" / "results.json"
    results = FeatureResults(path, {"encoder": "a", "size": 196})
    results.add(make_rows()[:2], {"spread": FeatureStatistics([0.5, 0.25], 2.0)})
    results.add(make_rows()[2:])
    again = FeatureResults(path, {"encoder": "a", "size": 196})
    assert again.rows == make_rows() and again.statistics == {"spread": FeatureStatistics([0.5, 0.25], 2.0)}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="holds results with size=196, but it is 392 now; choose another folder"):
        FeatureResults(path, {"encoder": "a", "size": 392})
    path.write_text('{"scores": []}')
    with pytest.raises(ValueError, match="must hold results of such a comparison"):
        FeatureResults(path, {"encoder": "a"})


# Command line.


@pytest.fixture(scope="module")
def encoder(tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "tiny-dinov2"
    tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    frames = make_levels(8, size=64).permute(0, 2, 3, 1).contiguous().numpy()
    return write_video(tmp_path_factory.mktemp("video") / "blobs.mp4", frames)


def test_the_command_measures_preserved_features(encoder, clip, tmp_path, capsys):
    arguments = ["evaluate", "--encoder", str(encoder), str(clip), "-o", str(tmp_path), "--num-frames", "4"]
    arguments += ["--device", "cpu", "--clip-ratio", "1/8", "0.5"]
    few = [*arguments, "--selector", "random", "greedy", "evs", "--attention", "canvas", "--sampling", "spread"]
    assert main(few) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert len(first["rows"]) == 2 * 2 * 2 + 2
    assert main([*arguments, "--selector", "random", "greedy-finest", "encoder-finest", "evs"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["videos"] == ["blobs.mp4"] and results["settings"]["size"] == 56
    assert results["rows"][:10] == first["rows"] and results["statistics"]["spread"] == first["statistics"]["spread"]
    rows = [dict(zip(results["columns"], row, strict=True)) for row in results["rows"]]
    assert {row["clip"] for row in rows} == {"blobs.mp4", "blobs.mp4:0", "blobs.mp4:4"}
    keys = [tuple(row)[:6] for row in results["rows"]]
    assert len(set(keys)) == len(keys) == 3 * (3 * 2 * 2 * 3 + 2) + 2 * 2
    assert {"results.md", "spread.png", "consecutive.png"} <= {path.name for path in tmp_path.iterdir()}
    assert main(few) == 0  # nothing left to measure
    assert json.loads((tmp_path / "results.json").read_text()) == results
    printed = capsys.readouterr().out
    assert "## Frames spread over the video: 1 clips" in printed and "1/8" in printed and "EVS" in printed


def test_an_interrupted_run_has_the_same_rows(encoder, clip, tmp_path):
    arguments = ["--num-frames", "4", "--device", "cpu", "--clip-ratio", "1/4", "--selector", "greedy-finest", "evs"]
    command = ["evaluate", "--encoder", str(encoder), str(clip), *arguments]
    assert main([*command, "-o", str(tmp_path / "whole")]) == 0
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "results.json").write_text(json.dumps({**results, "rows": results["rows"][:9]}))
    assert main([*command, "-o", str(tmp_path / "part")]) == 0
    again = json.loads((tmp_path / "part" / "results.json").read_text())
    assert [row[:10] for row in again["rows"]] == [row[:10] for row in results["rows"]]


def test_the_command_compares_a_model_with_the_baselines(encoder, clip, tiny, tmp_path):
    """The small model's finest scale has 4 patches a side, so the encoder sees 16 pixels."""
    arguments = ["--num-frames", "4", "--device", "cpu", "--clip-ratio", "1/2", "--attention", "frame", "--size", "16"]
    command = ["evaluate", "--encoder", str(encoder), str(tiny.folder), str(clip), "-o", str(tmp_path)]
    assert main([*command, *arguments, "--sampling", "spread"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    methods = {tuple(row[2:4]) for row in results["rows"]}
    assert {("model", EVENLY), ("model", OVER_TIME), ("greedy-finest", OVER_TIME), ("evs", OVER_TIME)} <= methods
    # Their scales need 14 patches a side.
    assert not {name for name, _ in methods} & {"autogaze", "greedy", "encoder"}


def test_a_model_for_any_grid_is_measured_on_the_finest_scale_and_its_own(encoder, clip, tmp_path):
    sizes = {"hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "feature_size": 6}
    arguments = ["--num-frames", "4", "--device", "cpu", "--clip-ratio", "1/4", "--attention", "frame"]
    arguments += ["--task-loss-requirement", "0.2"]
    for factors, expected in (([1], {"model"}), ([1 / 7, 2 / 7, 1 / 2, 1], {"model", "model-scales"})):
        folder = tmp_path / f"{len(factors)}"
        FeatureGazeModel(FeatureGazeConfig(scale_factors=factors, **sizes)).save_pretrained(folder)
        command = [
            "evaluate",
            "--encoder",
            str(encoder),
            str(folder),
            str(clip),
            "-o",
            str(tmp_path / f"{folder}-out"),
        ]
        selectors = ["--selector", "model", "model-scales", "--sampling", "spread"]
        assert main([*command, *arguments, *selectors]) == 0
        rows = json.loads((tmp_path / f"{folder}-out" / "results.json").read_text())["rows"]
        methods = {(name, method) for name in expected for method in (EVENLY, OVER_TIME, UP_TO_LOSS)}
        assert {tuple(row[2:4]) for row in rows} == methods
        assert all(row[6] == 4 * 196 // 4 for row in rows if row[3] != UP_TO_LOSS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--encoder", "{missing}", "{clip}", "--num-frames", "4"],
            "`--encoder` must be a checkpoint's folder or Hub repository, but",
        ),
        (
            ["--encoder", "{bert}", "{clip}", "--num-frames", "4"],
            "`--encoder` must be an encoder of one of the families",
        ),
        (["--encoder", "{siglip}", "{clip}", "--num-frames", "4"], "must have a preprocessor_config.json"),
        (["--encoder", "{encoder}", "{clip}"], "has 8 frames, a clip needs 16"),
        (["--encoder", "{encoder}", "{clip}", "{clip}"], "`videos` must have different names"),
        (["--encoder", "{encoder}", "{encoder}"], "at least one VIDEO must be given, got only the MODEL"),
        (["--encoder", "{encoder}", "{clip}", "--num-frames", "4", "--size", "30"], "multiple of the encoder's patch"),
        (
            ["--encoder", "{encoder}", "{clip}", "--num-frames", "4", "--clip-ratio", "1.5"],
            "`clip_ratio` must be above 0",
        ),
        (
            ["--encoder", "{encoder}", "{clip}", "--gazing-ratio", "0.5"],
            "`--gazing-ratio` does not go with `--encoder`",
        ),
        (["{encoder}", "{clip}", "--clip-ratio", "0.5"], "`--clip-ratio` needs `--encoder`"),
        (["{clip}"], "a MODEL and at least one VIDEO must be given"),
    ],
)
def test_invalid_input_is_an_error_before_any_work(encoder, clip, tmp_path, capsys, arguments, message):
    BertModel(
        BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "bert")
    AutoModel.from_config(SiglipVisionConfig(**SIZES, image_size=32, patch_size=16)).save_pretrained(
        tmp_path / "siglip"
    )
    names = {name: tmp_path / name for name in ("missing", "bert", "siglip")}
    arguments = [argument.format(encoder=encoder, clip=clip, **names) for argument in arguments]
    assert main(["evaluate", *arguments, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "autogaze: error:" in error and message in error
    assert not (tmp_path / "out").exists()


def test_budgets_must_be_numbers(capsys):
    assert main(["evaluate", "--encoder", "e", "clip.mp4", "-o", "out", "--clip-ratio", "half"]) == 2
    assert "must be a share such as 1/8 or 0.125, got 'half'" in capsys.readouterr().err
