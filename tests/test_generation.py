import pytest
import torch
from test_modeling import small_config

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, GazeCache, GazeOutput
from transformers_autogaze.selection_autogaze import draw_settings
from transformers_autogaze.token_budgets_autogaze import budget_each_frame, threshold_each_frame


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.randn(3, 6, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


def thresholds_that_stop_clips_differently(model, video) -> torch.Tensor:
    """One threshold per clip, so that the clips of a batch end their frames at different steps."""
    losses = model.generate(video, gazing_ratio=1.0, output_scores=True).task_loss_prediction
    return torch.stack([clip.quantile(share) for clip, share in zip(losses, (0.02, 0.1, 0.3), strict=True)])


def assert_same_gaze(first: GazeOutput, second: GazeOutput) -> None:
    for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame", "clip_num_gazing_each_frame"):
        assert torch.equal(first[key], second[key]), key
    assert all(torch.equal(a, b) for a, b in zip(first.gazing_mask, second.gazing_mask, strict=True))


def test_a_batch_gives_each_clip_what_it_gets_alone(tiny_model, video):
    thresholds = thresholds_that_stop_clips_differently(tiny_model, video)
    batch = tiny_model.generate(video, gazing_ratio=0.9, task_loss_requirement=thresholds)
    assert len({tuple(counts) for counts in batch.clip_num_gazing_each_frame.T.tolist()}) > 1
    assert (batch.clip_num_gazing_each_frame.amax(0) != batch.clip_num_gazing_each_frame.amin(0)).any()
    for clip, threshold in enumerate(thresholds):
        alone = tiny_model.generate(video[clip : clip + 1], gazing_ratio=0.9, task_loss_requirement=float(threshold))
        assert_same_gaze(batch.select(clip), alone)


def test_a_batch_of_tiles_gives_each_clip_what_it_gets_alone(tiny, tiny_model):
    video = tiny.video("tiles_2x2")
    call = tiny.call("tiles_2x2_loss")
    batch = tiny_model.generate(video, **call)
    for clip in range(2):
        assert_same_gaze(batch.select(clip), tiny_model.generate(video[clip : clip + 1], **call))


@pytest.mark.parametrize("with_threshold", [False, True])
def test_a_stream_equals_the_whole_clip_also_beyond_the_trained_length(tiny_model, with_threshold):
    video = torch.randn(2, 20, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()
    call = {"gazing_ratio": 0.5, "task_loss_requirement": -0.3 if with_threshold else None}
    whole = tiny_model.generate(video, **call)
    cache = GazeCache()
    parts = [
        tiny_model.generate(part, **call, past_key_values=cache, use_cache=True)
        for part in video.split([1, 1, 5, 13], 1)
    ]
    assert cache.num_frames == 20 and cache.batch_size == 2
    assert_same_gaze(GazeOutput.concatenate(parts), whole)


def test_a_reset_cache_starts_anew(tiny_model, video):
    cache = GazeCache()
    first = tiny_model.generate(video, gazing_ratio=0.3, past_key_values=cache)
    cache.reset()
    assert cache.num_frames == 0 and cache.batch_size is None
    assert_same_gaze(tiny_model.generate(video, gazing_ratio=0.3, past_key_values=cache), first)


def test_a_cropped_cache_keeps_the_latest_frames(tiny_model, video):
    call = {"gazing_ratio": 0.9, "task_loss_requirement": thresholds_that_stop_clips_differently(tiny_model, video)}
    cache, untouched = GazeCache(), GazeCache()
    for stream in (cache, untouched):
        tiny_model.generate(video[:, :5], **call, past_key_values=stream)
    before = [keys.clone() for keys in cache.keys]
    starts, lengths = cache.frame_starts[3], list(cache.lengths)
    cache.crop(9)
    assert cache.num_frames == 5
    cache.crop(2)
    assert cache.num_frames == 2
    for clip, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert cache.lengths[clip] == length - start
        for layer, keys in enumerate(cache.keys):
            assert torch.equal(keys[:, clip, : length - start], before[layer][:, clip, start:length])
    assert cache.next_positions == untouched.next_positions
    gaze = tiny_model.generate(video[:, 5:], **call, past_key_values=cache)
    assert (gaze.num_real_each_frame >= 1).all() and cache.num_frames == 3
    cache.crop(0)
    assert cache.num_frames == 0 and cache.lengths == [0, 0, 0]
    with pytest.raises(ValueError, match="`num_frames` must be at least 0, got -1"):
        cache.crop(-1)


def test_sampling_follows_the_generator_and_never_repeats_a_patch(tiny_model, video):
    def sample(seed: int) -> GazeOutput:
        generator = torch.Generator().manual_seed(seed)
        return tiny_model.generate(video, gazing_ratio=0.9, do_sample=True, temperature=2.0, generator=generator)

    first, again, other = sample(0), sample(0), sample(1)
    assert torch.equal(first.gazing_pos, again.gazing_pos)
    assert not torch.equal(first.gazing_pos, other.gazing_pos)
    assert (first.num_real_each_frame == int(0.9 * 21)).all()
    assert torch.equal(torch.cat(first.gazing_mask, -1).sum(-1), first.num_real_each_frame)


def test_sampling_at_a_low_temperature_is_greedy(tiny_model, video):
    greedy = tiny_model.generate(video, gazing_ratio=0.5)
    cold = tiny_model.generate(video, gazing_ratio=0.5, do_sample=True, temperature=1e-6)
    assert torch.equal(greedy.gazing_pos, cold.gazing_pos)


def test_sampling_frequencies_follow_the_probabilities():
    torch.manual_seed(0)
    model = AutoGazeModel(small_config()).eval()
    video = torch.randn(1, 1, 3, 32, 32).expand(4000, -1, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    gaze = model.generate(video, gazing_ratio=0.2, do_sample=True, temperature=1.0, generator=generator)
    counts = gaze.gazing_pos[:, 0].bincount(minlength=5) / 4000
    with torch.no_grad():
        ids = torch.arange(5)[:, None]
        probabilities = model(video[:5], ids, torch.zeros_like(ids, dtype=torch.bool), torch.tensor([1]))
    probabilities = probabilities.log_action_probs.flatten().exp()
    torch.testing.assert_close(counts, probabilities / probabilities.sum(), rtol=0, atol=0.03)


def test_sequential_positions_decode_as_they_score(tiny):
    """With true positions a greedy gaze takes, at each slot, the likeliest patch that is left."""
    model = tiny.model()
    model.config.decoding_positions = "sequential"
    video = tiny.video("ratio")
    gaze = model.generate(video, gazing_ratio=1.0, output_scores=True)
    start = int(gaze.num_gazing_each_frame[0])
    for slot in (4, 10, 15):
        ids = gaze.gazing_pos.clone()
        left = gaze.gazing_pos[:, slot + 1 : start]
        for other in left.T:
            ids[:, slot] = other
            with torch.no_grad():
                scores = model(video, ids, gaze.if_padded_gazing, gaze.num_gazing_each_frame).log_action_probs
            assert (scores[:, slot] <= gaze.log_action_probs[:, slot] + 1e-9).all()


def test_frames_of_any_size_are_resized(tiny_model, video):
    for size in ((64, 64), (31, 57), (1, 3), (224, 398)):
        gaze = tiny_model.generate(torch.randn(1, 1, 3, *size).double(), gazing_ratio=0.3)
        assert gaze.num_real.tolist() == [6]


def test_one_frame_and_the_smallest_budget_give_one_patch(tiny_model, video):
    for ratio in (0, 1e-9, 0.04):
        assert tiny_model.generate(video[:1, :1], gazing_ratio=ratio).num_real.tolist() == [1]
    strict = tiny_model.generate(video, task_loss_requirement=float("inf"))
    assert (strict.num_real_each_frame == 1).all()


def test_thresholds_per_frame_per_clip_and_for_each_agree(tiny_model, video):
    each = torch.linspace(-1, 1, 18).view(3, 6)
    whole = tiny_model.generate(video, gazing_ratio=0.9, task_loss_requirement=each)
    for clip in range(3):
        alone = tiny_model.generate(
            video[clip : clip + 1], gazing_ratio=0.9, task_loss_requirement=each[clip].tolist()
        )
        assert_same_gaze(whole.select(clip), alone)


@pytest.mark.parametrize(
    ("ratio", "budget"),
    [(0.1, [26] * 2), (26 / 265, [26] * 2), (10 / 265, [10] * 2), (1, [265] * 2), ([0, 0.5], [1, 132])],
)
def test_budgets(ratio, budget):
    assert budget_each_frame(ratio, num_frames=2, num_patches=265).tolist() == budget


def test_threshold_shapes():
    assert threshold_each_frame(0.7, 2, 3).tolist() == [[0.7] * 3] * 2
    assert threshold_each_frame([1, 2, 3], 2, 3).tolist() == [[1, 2, 3]] * 2
    assert threshold_each_frame([1, 2], 2, 3).tolist() == [[1] * 3, [2] * 3]
    assert threshold_each_frame(torch.tensor([[1.0], [2.0]]), 2, 2).tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gazing_ratio": 1.5}, "`gazing_ratio` must lie in 0..1, the share of patches to keep, got 1.5"),
        ({"gazing_ratio": -0.1}, "`gazing_ratio` must lie in 0..1"),
        ({"gazing_ratio": float("nan")}, "`gazing_ratio` must lie in 0..1.*nan"),
        ({"gazing_ratio": [0.5] * 5}, "`gazing_ratio` must be one number or one for each of the 6 frames"),
        ({"gazing_ratio": torch.full((1, 6), 0.5)}, "`gazing_ratio` must be one number"),
        ({"task_loss_requirement": float("nan")}, "`task_loss_requirement` must be numbers, got NaN"),
        ({"task_loss_requirement": [0.5] * 4}, "`task_loss_requirement` must be one number, one for each of the 6"),
        ({"target_scales": [32, 64, 128]}, "`target_scales` and `target_patch_size` must be given together"),
        ({"target_patch_size": 14}, "`target_scales` and `target_patch_size` must be given together"),
        (
            {"target_scales": [64, 128], "target_patch_size": 16},
            "`target_scales`=.64, 128. .* must be 3 to match the tiles', got 2",
        ),
        ({"target_scales": [32, 64, 100], "target_patch_size": 16}, r"`scales\[2\]` must be a positive multiple"),
        (
            {"target_scales": [32, 64, 128], "target_patch_size": 16},
            r"`pixel_values_videos` must be \(128, 128\) pixels, the last of `target_scales`, got \(64, 64\)",
        ),
        ({"do_sample": True, "temperature": 0.0}, "`temperature` must be a positive number, got 0.0"),
        ({"past_key_values": "cache"}, "`past_key_values` must be a GazeCache, got str"),
    ],
)
def test_bad_arguments_are_named(tiny_model, video, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(video, **arguments)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 0, 3, 64, 64), "`pixel_values_videos` must not be empty"),
        (torch.zeros(0, 1, 3, 64, 64), "`pixel_values_videos` must not be empty"),
        (torch.zeros(1, 2, 4, 64, 64), "`pixel_values_videos` must have 3 channels in its third dimension, got 4"),
        (
            torch.zeros(2, 3, 64, 64),
            r"must be a tensor \(batch, frames, channels, height, width\), got \(2, 3, 64, 64\)",
        ),
        (torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8), "must hold normalised floats, got torch.uint8"),
        ([[1]], "must be a tensor .*, got list"),
    ],
)
def test_bad_videos_are_named(tiny_model, bad, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(bad, gazing_ratio=0.5)


def test_a_cache_of_another_batch_size_is_named(tiny_model, video):
    gaze = tiny_model.generate(video, gazing_ratio=0.3, use_cache=True)
    cache = gaze.past_key_values
    assert cache is gaze.cache is gaze["cache"]
    with pytest.raises(ValueError, match="`past_key_values` holds 3 clips, but 1 are given now"):
        tiny_model.generate(video[:1], gazing_ratio=0.3, past_key_values=cache)
    with pytest.raises(ValueError, match="`output_scores` must be False"):
        tiny_model.generate(video, gazing_ratio=0.3, past_key_values=cache, output_scores=True)


def test_the_configuration_decides_when_nothing_is_given(tiny_model, video):
    gaze = tiny_model.generate(video)
    expected = tiny_model.generate(video, gazing_ratio=0.5, task_loss_requirement=0.7)
    assert_same_gaze(gaze, expected)


@pytest.mark.parametrize("strategy", ["fixed", "uniform", "exponential"])
@pytest.mark.parametrize("spread", ["uniform", "dirichlet", "self"])
def test_drawn_settings_keep_to_their_strategy(strategy, spread):
    config = small_config(
        gazing_ratio_config={
            "sample_strategy_during_training": strategy,
            "fixed": {"gazing_ratio": 0.2},
            "uniform": {"gazing_ratio_min": 0.1, "gazing_ratio_max": 0.3},
            "exponential": {"gazing_ratio_min": 0.1, "gazing_ratio_max": 0.9, "lambda": 10},
        },
        gazing_ratio_each_frame_config={
            "sample_strategy_during_training": spread,
            "dirichlet": {"alpha": "10,3,3,3"},
        },
        task_loss_requirement_config={"sample_strategy_during_training": "uniform"},
    )
    generator = torch.Generator().manual_seed(0)
    draws = [draw_settings(config, 4, is_training=True, generator=generator) for _ in range(2000)]
    ratios = torch.stack([ratio for ratio, _ in draws])
    assert (ratios >= 0).all() and (ratios <= 1).all()
    # Cut to 0.1..0.9, an exponential law of rate 10 has the mean 0.1 + 0.1 * (1 - 8 / (e^8 - 1)).
    mean = {"fixed": 0.2, "uniform": 0.2, "exponential": 0.1997}[strategy]
    assert ratios.mean().item() == pytest.approx(mean, abs=0.01)
    if spread == "dirichlet":
        assert ratios[:, 0].mean() > 2 * ratios[:, 1].mean()
    else:
        assert (ratios == ratios[:, :1]).all()
    thresholds = [threshold for _, threshold in draws]
    if spread == "self":
        assert 0.6 <= min(thresholds) < 0.61 and 0.89 < max(thresholds) <= 0.9
    else:
        assert set(thresholds) == {None}


def test_a_dirichlet_of_another_length_is_named():
    config = small_config(
        gazing_ratio_each_frame_config={
            "sample_strategy_during_inference": "dirichlet",
            "dirichlet": {"alpha": [1.0, 2.0]},
        }
    )
    with pytest.raises(ValueError, match="must be one number or one for each of the 4 frames"):
        draw_settings(config, 4, is_training=False)


def test_what_generate_gives_can_be_trained_on():
    model = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64)).eval()
    cache = GazeCache()
    video = torch.randn(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gaze = model.generate(video, gazing_ratio=0.2, past_key_values=cache, use_cache=True)
    assert not any(value.is_inference() for value in (gaze.gazing_pos, gaze.if_padded_gazing, gaze.gazing_mask[0]))
    scores = model(video, gaze.gazing_pos, gaze.if_padded_gazing, gaze.num_gazing_each_frame)
    scores.log_action_probs.sum().backward()
    assert model.gaze_decoder.model.embed_tokens.weight.grad.abs().sum() > 0
    # The cache, too, may be changed and used on outside of `generate`.
    cache.crop(1)
    assert model.generate(video, gazing_ratio=0.2, past_key_values=cache, use_cache=True).num_frames == 2
