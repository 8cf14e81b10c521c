"""The selector that compares vectors which a network predicts: any grid, streams, thresholds, files and bad input."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, pipeline

from transformers_autogaze import (
    AutoGazeProcessor,
    FeatureGazeCache,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeGrid,
    GazeOutput,
    GreedyGazeCache,
    gaze_video,
    stream_gaze,
)
from transformers_autogaze import feature_network_autogaze as feature_network
from transformers_autogaze.feature_network_autogaze import FeatureGazeNetwork
from transformers_autogaze.feature_search_autogaze import FeatureSearch
from transformers_autogaze.video import streaming


TINY = {"hidden_sizes": [8, 12, 16], "depths": [1, 1, 2], "feature_size": 6, "initializer_range": 0.2}
FOUR = {"scale_factors": [1 / 7, 2 / 7, 1 / 2, 1], **TINY}
ONE_SCALE = {"scales": [64], **TINY}
FOUR_SCALES = {"scales": [32, 64, 112, 224], **FOUR}


def make_model(**settings) -> FeatureGazeModel:
    """A model with random weights whose vectors have the variance that its configuration says."""
    torch.manual_seed(0)
    model = FeatureGazeModel(FeatureGazeConfig(**settings)).eval()
    vectors = model.look(make_video()[:, :, :, : model.config.image_size[0], : model.config.image_size[1]])[:, :, -1]
    mean = vectors.mean((0, 1, 3, 4)) * 8
    with torch.no_grad():
        model.network.head.bias.view(-1, 6).sub_(mean)
    variance = float(((vectors * 8 - mean[:, None, None]) ** 2).sum(2).mean())
    model.config.feature_variance = variance
    return model


@pytest.fixture(scope="module")
def model() -> FeatureGazeModel:
    return make_model(**ONE_SCALE)


@pytest.fixture(scope="module")
def four_scales() -> FeatureGazeModel:
    return make_model(**FOUR_SCALES)


@pytest.fixture(scope="module", params=["one scale", "four scales"])
def any_model(request, model, four_scales) -> FeatureGazeModel:
    return model if request.param == "one scale" else four_scales


def make_video(size: int = 224) -> torch.Tensor:
    """Two clips of 6 frames: a still one with a cut in the middle, and one that moves all the time."""
    generator = torch.Generator().manual_seed(0)
    scenes = F.interpolate(torch.randn(2, 3, 24, 48, generator=generator), (288, 576), mode="bicubic")
    still = scenes[[0, 0, 0, 1, 1, 1], :, :size, :size]
    moving = torch.stack([scenes[0, :, :size, 12 * t : 12 * t + size] for t in range(6)])
    return torch.stack([still, moving]).clamp(-2, 2)


@pytest.fixture(scope="module")
def video(any_model) -> torch.Tensor:
    return make_video(any_model.config.image_size[0])


@pytest.fixture(scope="module")
def small() -> torch.Tensor:
    return make_video(64)


def test_the_network_gives_a_vector_for_every_place_and_scale(four_scales):
    network, config = four_scales.network, four_scales.config
    vectors = network(torch.randn(2, 3, 48, 80))
    assert vectors.shape == (2, 4, config.feature_size, 3, 5)
    torch.testing.assert_close(network(torch.zeros(1, 3, 48, 80), [3]), network(torch.zeros(1, 3, 48, 80))[:, 3:])
    for size in ((48, 40), (0, 16)):
        with pytest.raises(ValueError, match=r"`pixel_values` must be of shape \(frames, 3, 16 \* rows"):
            network(torch.zeros(1, 3, *size))


def test_the_network_learns_and_gives_the_same_with_and_without_gradients(four_scales):
    network, frames = four_scales.network, torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = network(frames)
    vectors = network(frames)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    vectors.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    network.zero_grad()


def test_every_place_sees_the_mean_of_its_frame(model):
    frames = torch.randn(1, 3, 32, 640)
    changed = frames.clone()
    changed[..., :32] += 1
    with torch.no_grad():
        before, after = model.network(frames), model.network(changed)
    assert (before[..., -1] != after[..., -1]).any()


def test_large_frames_are_looked_at_in_strips(model, monkeypatch):
    frames = torch.randn(1, 3, 480, 96)
    with torch.no_grad():
        whole = model.network(frames)
        monkeypatch.setattr(feature_network, "_STRIP_PLACES", 42)
        assert model.network.overlap * 2 + 7 < 30
        torch.testing.assert_close(model.network(frames), whole, rtol=1e-5, atol=1e-6)


def test_new_weights_are_ready_to_learn():
    torch.manual_seed(0)
    network = FeatureGazeNetwork(FeatureGazeConfig(scale_factors=[1 / 7, 2 / 7, 1 / 2, 1]))
    assert 1.5e6 < sum(parameter.numel() for parameter in network.parameters()) < 3e6
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert 0.015 < parameter.std() < 0.025, name
    with torch.no_grad():
        assert 0.05 < network.eval()(torch.randn(1, 3, 224, 224)).std() < 2


def test_a_share_of_the_clip_is_kept_exactly(any_model, video):
    places = any_model.config.grid.num_patches_each_scale[-1]
    gaze = any_model.generate(video, clip_ratio=0.2)
    assert gaze.num_real.tolist() == [int(0.2 * 6 * places)] * 2
    assert (any_model.generate(video, gazing_ratio=0.5).num_real_each_frame == gaze.grid.num_patches // 2).all()


def test_the_first_frame_and_a_cut_get_what_they_need_and_stillness_nothing(model, small):
    gaze = model.generate(small, clip_ratio=1 / 3)
    assert gaze.num_real_each_frame[0].tolist() == [16, 0, 0, 16, 0, 0]
    assert gaze.num_real_each_frame[1, 0] == 16 and (gaze.num_real_each_frame[1] > 0).sum() > 3


def test_one_scale_keeps_the_places_whose_vectors_are_farthest_from_those_kept_before(model, small):
    """By hand: the distance of a place's vector to the one that was kept last; to the mean, 0, at first."""
    gaze = model.generate(small, gazing_ratio=[0.5, 0.25, 0.25, 0.5, 0.25, 0.25])
    vectors = model.look(small)[:, :, 0].flatten(3)
    for clip in range(2):
        kept_vectors = torch.zeros_like(vectors[0, 0])
        for t, count in enumerate([8, 4, 4, 8, 4, 4]):
            kept = gaze.gazing_mask[0][clip, t]
            distances = (vectors[clip, t] - kept_vectors).square().sum(0)
            assert kept.sum() == count and distances[kept].min() >= distances[~kept].max() - 1e-7
            kept_vectors[:, kept] = vectors[clip, t][:, kept]


def test_coarse_patches_are_kept_where_their_vectors_are_near_enough():
    """A scene whose coarse vectors are those of the places is kept with the few patches of the coarse scale."""
    grid = GazeGrid([32, 64])
    fine = torch.randn(1, 1, 1, 5, 2, 2, generator=torch.Generator().manual_seed(0)).mul(0.1)
    fine = fine.repeat_interleave(2, 4).repeat_interleave(2, 5)
    found = FeatureSearch(grid).search_frames(torch.cat([fine, fine], dim=2), [20], torch.zeros(1, 1))
    assert found.counts.tolist() == [[4]] and sorted(found.ids[0, 0, :4].tolist()) == [0, 1, 2, 3]
    far = FeatureSearch(grid).search_frames(torch.cat([-fine, fine], dim=2), [20], torch.zeros(1, 1))
    assert far.counts.tolist() == [[16]] and (far.ids[far.ids >= 0] >= 4).all()


def test_a_batch_gives_each_clip_what_it_gets_alone(any_model, video):
    for call in ({"clip_ratio": 0.2}, {"gazing_ratio": 0.3}, {"task_loss_requirement": 0.5}):
        together = any_model.generate(video, **call)
        for clip in range(2):
            alone = any_model.generate(video[clip : clip + 1], **call)
            assert torch.equal(together.select(clip).gazing_pos, alone.gazing_pos), call


@pytest.mark.parametrize(
    "call",
    [
        {"gazing_ratio": 0.3},
        {"task_loss_requirement": 0.4},
        {"tokens_per_second": 40, "frame_rate": 2},
        {"tokens_per_second": 40, "frame_rate": 2, "task_loss_requirement": 0.3},
    ],
)
def test_a_stream_is_the_same_however_it_is_cut(any_model, video, call):
    whole = any_model.generate(video, **call)
    for lengths in ([1, 2, 3], [1] * 6):
        cache, parts = FeatureGazeCache(), []
        for part in video.split(lengths, 1):
            parts.append(any_model.generate(part, **call, past_key_values=cache, use_cache=True))
        assert torch.equal(GazeOutput.concatenate(parts).gazing_pos, whole.gazing_pos)
    assert cache.canvas.image.shape == (2, 6, *any_model.search.cells) and cache.num_frames == 6


def test_a_threshold_alone_ends_a_frame_at_its_predicted_loss(any_model, video):
    gaze = any_model.generate(video, task_loss_requirement=0.3)
    last = (gaze.num_gazing_each_frame.cumsum(0) - 1).tolist()
    losses = gaze.task_loss_prediction
    assert (losses[:, last] <= 0.3 + 1e-6).all()
    counts = gaze.num_real_each_frame
    assert (counts[1] > 1).any() and counts.sum() < 2 * 6 * gaze.grid.num_patches
    # One patch fewer would not have been enough.
    for clip in range(2):
        for t in range(6):
            if counts[clip, t] > 1:
                assert losses[clip, last[t] - int(gaze.num_gazing_each_frame[t]) + int(counts[clip, t]) - 1] > 0.3
    fewer = any_model.generate(video, task_loss_requirement=0.6).num_real
    assert (fewer < gaze.num_real).all()


def test_a_predicted_loss_is_the_distance_over_the_variance(model, small):
    gaze = model.generate(small[:1, :1], gazing_ratio=0.5)
    vectors = model.look(small[:1, :1])[0, 0, 0].flatten(1)
    left = vectors[:, ~gaze.gazing_mask[0][0, 0]]
    expected = left.square().sum() / 16 * 64  # what is left at 16 places, of a variance of 1/64 each
    torch.testing.assert_close(gaze.task_loss_prediction[0, -1], expected, rtol=1e-4, atol=1e-6)


def test_a_loss_is_calibrated(small):
    plain, calibrated = make_model(**ONE_SCALE), make_model(**ONE_SCALE)
    calibrated.config.loss_knots = [[0.0, 0.0], [0.2, 0.5], [1.0, 1.0]]
    gaze = calibrated.generate(small, task_loss_requirement=0.5)
    assert torch.equal(gaze.gazing_pos, plain.generate(small, task_loss_requirement=0.2).gazing_pos)
    losses = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(calibrated.mse_to_loss(calibrated.loss_to_mse(losses)), losses)


def test_with_a_budget_over_time_a_threshold_does_not_count_empty_places_as_errors_without_end():
    """The first frame is kept until its loss is low enough, not whole; the same patches as without the budget."""
    model, small = make_model(**ONE_SCALE), make_video(64)
    alone = model.generate(small, task_loss_requirement=0.4)
    both = model.generate(small, task_loss_requirement=0.4, clip_ratio=1.0)
    assert 0 < both.num_real_each_frame[0, 0] < 16
    assert torch.equal(both.gazing_mask[0][:, 0], alone.gazing_mask[0][:, 0])


def test_errors_left_are_those_of_laying_patch_after_patch(four_scales):
    """What a search under a budget over time says of empty places agrees with counting them."""
    frames = four_scales.look(make_video()[1:, :2])
    search = FeatureSearch(four_scales.config.grid)
    canvas = search.search_frames(frames[:, :1], [30]).canvas
    images = search._render(frames[:, 1])
    errors = search._errors_on(canvas, images)
    ids, _, totals = search._choose(errors, search._tables(images[-1]), 40)
    left = search._errors_left(canvas, images[-1], errors, ids, totals)
    for count in (0, 1, 7, 40):
        after = search._update_canvas(canvas, images, ids[:, :count])
        expected = search._errors_on(after, images, prefers_empty=False)[:, 0].sum((1, 2))
        torch.testing.assert_close(left[:, count], expected, rtol=1e-9, atol=0)


def test_frames_of_a_tubelet_are_kept_together(any_model, video):
    gaze = any_model.generate(video, clip_ratio=0.5, tubelet_size=2)
    assert gaze.num_frames == 3 and gaze.frame_sampling_rate == 2
    assert (gaze.num_real == int(0.5 * 3 * gaze.grid.num_patches_each_scale[-1])).all()
    single, pairs = any_model.look(video), any_model.look(video, 2)
    assert torch.equal(pairs, torch.cat([single[:, ::2], single[:, 1::2]], dim=3))


def test_it_chooses_among_the_patches_of_any_grid(model, four_scales):
    video = make_video()
    units = model.generate(video, clip_ratio=0.2, target_scales=[224], target_patch_size=28, tubelet_size=2)
    assert units.grid == GazeGrid([224], 28) and units.num_real.tolist() == [int(0.2 * 3 * 64)] * 2
    wide = model.generate(video[..., :112, :], gazing_ratio=0.5, target_scales=[(112, 224)], target_patch_size=16)
    assert wide.grid.grids == ((7, 14),)
    coarse = F.interpolate(video.flatten(0, 1), 196, mode="bicubic").view(2, 6, 3, 196, 196)
    gaze = four_scales.generate(coarse, gazing_ratio=0.1, target_scales=[28, 56, 98, 196], target_patch_size=14)
    assert gaze.grid.num_patches == 265 and (gaze.num_real_each_frame == 26).all()
    two = four_scales.for_grid(GazeGrid([(112, 224), (224, 448)]))
    assert two.config.known_scales(two.config.grid) == [2, 3] and two.network is four_scales.network
    assert two.generate(video[..., :112, :], clip_ratio=0.1).num_real.tolist() == [int(0.1 * 6 * 14 * 28)] * 2


def test_a_selector_for_another_grid_goes_where_the_first_goes():
    model = make_model(**ONE_SCALE)
    other = model.for_grid(GazeGrid([96]))
    model.double()
    assert other.dtype == torch.float64 and other.for_grid(GazeGrid([96])) is other
    assert other.look(torch.zeros(1, 1, 3, 96, 96, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_is_taken(dtype, small):
    model = make_model(**ONE_SCALE)
    expected = model.generate(small, clip_ratio=0.5)
    gaze = model.to(dtype).generate(small.to(dtype), clip_ratio=0.5)
    assert gaze.num_real.tolist() == [48, 48]
    both = gaze.gazing_mask[0] & expected.gazing_mask[0]
    assert both.sum() >= 0.9 * 96


def test_the_configuration_decides_when_nothing_is_given(small):
    model = make_model(**ONE_SCALE, clip_ratio=0.5)
    assert model.generate(small).num_real.tolist() == [48, 48]
    model.config.clip_ratio, model.config.task_loss_requirement = None, 0.4
    expected = model.generate(small, gazing_ratio=1.0, task_loss_requirement=0.4)
    assert torch.equal(model.generate(small).gazing_pos, expected.gazing_pos)


@pytest.mark.parametrize("tiles", ["whole", "grid", "native"])
def test_videos_of_any_size_are_gazed_at(model, tiles):
    blocks = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([np.roll(blocks, 3 * index, axis=1) for index in range(20)])
    gaze = gaze_video(model, frames, tiles=tiles, max_tiles=4 if tiles == "grid" else None, clip_ratio=0.25)
    assert int(gaze.num_real) == 20 * gaze.grid.num_patches // 4
    if tiles == "native":
        assert gaze.grid.sizes == ((80, 96),)
    parts = [
        chunk.gaze
        for chunk in stream_gaze(
            model, frames, tiles=tiles, max_tiles=4 if tiles == "grid" else None, gazing_ratio=0.2, chunk_frames=7
        )
    ]
    whole = gaze_video(model, frames, tiles=tiles, max_tiles=4 if tiles == "grid" else None, gazing_ratio=0.2)
    assert torch.equal(GazeOutput.concatenate(parts).gazing_pos, whole.gazing_pos)


def test_saving_and_loading_keeps_weights_and_settings(four_scales, tmp_path):
    four_scales.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(four_scales.state_dict())
    assert type(AutoConfig.from_pretrained(tmp_path)) is FeatureGazeConfig
    loaded, video = AutoModel.from_pretrained(tmp_path), make_video()
    assert type(loaded) is FeatureGazeModel and loaded.config.feature_variance == four_scales.config.feature_variance
    assert loaded.config.scale_factors == four_scales.config.scale_factors and not loaded.training
    expected = four_scales.generate(video, clip_ratio=0.1)
    assert torch.equal(loaded.generate(video, clip_ratio=0.1).gazing_pos, expected.gazing_pos)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    again = AutoModel.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert again.network.head.weight.dtype == torch.float32


def test_the_pipeline_takes_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    AutoGazeProcessor().save_pretrained(tmp_path)
    prune = pipeline("video-token-pruning", model=str(tmp_path), device="cpu")
    video = np.random.default_rng(0).integers(0, 256, (4, 6, 9, 3), np.uint8).repeat(10, 1).repeat(10, 2)
    assert type(prune.model) is FeatureGazeModel
    assert prune(video, clip_ratio=0.5, return_reconstruction=True)["statistics"]["num_patches"] == 32


def test_a_cache_of_something_else_is_named(model, four_scales, small):
    cache = FeatureGazeCache()
    model.generate(small, gazing_ratio=0.2, past_key_values=cache)
    with pytest.raises(ValueError, match="`past_key_values` holds 2 clips, but 1 are given now"):
        model.generate(small[:1], gazing_ratio=0.2, past_key_values=cache)
    with pytest.raises(ValueError, match="a stream keeps its grid and its `tubelet_size`"):
        model.generate(small, gazing_ratio=0.2, past_key_values=cache, tubelet_size=2)
    with pytest.raises(ValueError, match="a stream keeps its grid and its `tubelet_size`"):
        four_scales.generate(make_video(), gazing_ratio=0.2, past_key_values=cache)
    with pytest.raises(ValueError, match="`past_key_values` must be a FeatureGazeCache, got GreedyGazeCache"):
        model.generate(small, gazing_ratio=0.2, past_key_values=GreedyGazeCache())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"task_loss_requirement": 1.5}, r"`task_loss_requirement` must lie in 0\.\.1, the share .*, got \[1.5\]"),
        ({"task_loss_requirement": [0.5] * 5 + [-0.1]}, r"`task_loss_requirement` must lie in 0\.\.1"),
        ({"gazing_ratio": 2}, r"`gazing_ratio` must lie in 0\.\.1"),
        ({"clip_ratio": 2}, "`clip_ratio` must be above 0"),
        (
            {"gazing_ratio": 0.1, "target_scales": [32, 64], "target_patch_size": 16},
            r"`target_scales`=\[32, 64\].*`scales` must be \[1.0\] of the finest.*`scale_factors`",
        ),
    ],
)
def test_bad_arguments_are_named(model, small, call, message):
    with pytest.raises(ValueError, match=message):
        model.generate(small, **call)


def test_streaming_checks_thresholds_before_it_decodes(model):
    with pytest.raises(ValueError, match=r"`task_loss_requirement` must lie in 0\.\.1"):
        stream_gaze(model, iter([None]), task_loss_requirement=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scales": [112, 224]},
            r"`scales` must be \[1.0\] of the finest, or some of them, which are the `scale_factors`.*got a scale of \(112, 112\)",
        ),
        ({"scale_factors": [0.5]}, "`scale_factors` must ascend from above 0 to 1"),
        ({"scale_factors": [1, 0.5]}, "`scale_factors` must ascend from above 0 to 1"),
        ({"hidden_sizes": [8, 8]}, "`hidden_sizes` must be three positive whole numbers"),
        ({"depths": [1, 0, 1]}, "`depths` must be three positive whole numbers"),
        ({"feature_size": 0}, "`feature_size` must be a positive whole number, got 0"),
        ({"feature_variance": 0}, "`feature_variance` must be a number above 0"),
        ({"feature_variance": float("nan")}, "`feature_variance` must be a finite number, got nan"),
        ({"task_loss_requirement": 1.1}, r"`task_loss_requirement` must lie in 0\.\.1, got 1.1"),
        ({"task_loss_requirement": None}, "`task_loss_requirement` must be a finite number, got None"),
        ({"gazing_ratio": "0.5"}, "`gazing_ratio` must be a finite number, got '0.5'"),
        ({"feature_variance": "1"}, "`feature_variance` must be a finite number, got '1'"),
        ({"clip_ratio": 0}, "`clip_ratio` must be above 0 and at most 1.* got 0"),
        ({"loss_knots": [(0, 0)]}, "`loss_knots` must be two or more pairs"),
        ({"loss_knots": [(0, 0.5), (1, 0.2)]}, "`loss_knots` must be two or more pairs"),
        ({"loss_knots": [(0, 0), (1, float("nan"))]}, "`loss_knots` must be two or more pairs"),
        ({"loss_knots": [(0,), (1,)]}, "`loss_knots` must be two or more pairs"),
        ({"image_std": [1, 0, 1]}, "three values of `image_std` must be positive"),
    ],
)
def test_bad_configurations_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureGazeConfig(**arguments)


@pytest.mark.parametrize(("most", "lengths"), [(2**27, [50, 50]), (20 * 64 * 64, [20] * 5)])
def test_a_long_video_is_cut_into_clips_that_keep_their_share(model, monkeypatch, most, lengths):
    monkeypatch.setattr(streaming, "_MAX_CLIP_PIXELS", most)
    frames = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), np.uint8)
    frames[1:20] = frames[0]
    chunks = list(stream_gaze(model, frames, clip_ratio=0.25))
    assert [chunk.gaze.num_frames for chunk in chunks] == lengths
    places = model.config.grid.num_patches
    assert [int(chunk.gaze.num_real) for chunk in chunks] == [int(0.25 * length * places) for length in lengths]
    if lengths[0] == 50:  # a still frame keeps nothing as long as others of its clip change
        counts = chunks[0].gaze.num_real_each_frame[0]
        assert counts[0] == places and not counts[1:20].any() and counts[20:].any()
    assert len(list(stream_gaze(model, frames, clip_ratio=0.25, chunk_frames=16))) == 7
