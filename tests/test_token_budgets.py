"""Budgets over time: tokens of a clip, or of a second of a stream, go where they gain most."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from transformers_autogaze import (
    AutoGazeModel,
    GazeOutput,
    GreedyGazeCache,
    GreedyGazeConfig,
    GreedyGazeSelector,
    gaze_video,
    stream_gaze,
)
from transformers_autogaze.clip_schedule_autogaze import ClipSchedule
from transformers_autogaze.token_budgets_autogaze import RateControl, StreamBudget


ONE_SCALE = GreedyGazeConfig(scales=[64])
THREE_SCALES = GreedyGazeConfig(scales=[16, 32, 64])


@pytest.fixture(scope="module", params=[ONE_SCALE, THREE_SCALES], ids=["one scale", "three scales"])
def selector(request) -> GreedyGazeSelector:
    return GreedyGazeSelector(request.param)


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    """Two clips of 6 frames: a still one with a cut in the middle, and one that moves all the time."""
    generator = torch.Generator().manual_seed(0)
    scenes = F.interpolate(torch.randn(2, 3, 12, 24, generator=generator), (96, 192), mode="bicubic")
    still = scenes[[0, 0, 0, 1, 1, 1], :, :64, :64]
    moving = torch.stack([scenes[0, :, :64, 4 * t : 4 * t + 64] for t in range(6)])
    return torch.stack([still, moving]).clamp(-2, 2)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_a_share_of_the_clip_is_kept_exactly(selector, video, share):
    gaze = selector.generate(video, clip_ratio=share)
    assert gaze.num_real.tolist() == [int(share * 6 * 16)] * 2
    number = selector.generate(video, tokens_per_clip=int(share * 6 * 16))
    assert torch.equal(number.gazing_pos, gaze.gazing_pos)
    assert sum(int(mask.sum()) for mask in gaze.gazing_mask) == int(gaze.num_real.sum())  # none twice


def test_the_first_frame_and_a_cut_get_what_they_need_and_stillness_nothing(video):
    gaze = GreedyGazeSelector(ONE_SCALE).generate(video[:1], clip_ratio=32 / 96)
    assert gaze.num_real_each_frame.tolist() == [[16, 0, 0, 16, 0, 0]]
    coarse = GreedyGazeSelector(THREE_SCALES).generate(video[:1], clip_ratio=32 / 96)
    counts = coarse.num_real_each_frame[0]
    assert counts[[1, 2, 4, 5]].sum() == 0 and counts[0] > 8 and counts[3] > 8
    assert coarse.coverage(64, 64)[0, 0].all()  # no place of the first frame is left without a token


def schedule_of(places: torch.Tensor, extra: float = 0.0) -> ClipSchedule:
    """Schedules places `(places, 1 + frames, values)`, the first of which lies there before."""
    shown, *frames = places.unbind(1)
    extra = torch.full((1, len(places)), extra, dtype=torch.float64)
    return ClipSchedule([frame[None] for frame in frames], shown[None], extra, unit=2.0**-28)


@pytest.mark.parametrize("extra", [0.0, 5.0 * 2**28])
@pytest.mark.parametrize("price", [0.1, 0.7, 3.0])
def test_a_schedule_is_the_cheapest_of_all(price, extra):
    places = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(3)).cumsum(1) * 0.5
    gains = schedule_of(places, extra).gains(torch.tensor([price * 2.0**28], dtype=torch.float64))[0]
    assert gains.shape == (7, 6)

    def error_of(place: torch.Tensor, kept: tuple[bool, ...]) -> float:
        shown, error, empty = place[0], 0.0, extra / 2**28
        for frame, is_kept in zip(place[1:], kept, strict=True):
            shown, empty = (frame, 0.0) if is_kept else (shown, empty)
            error += float((frame - shown).square().sum()) + empty
        return error

    for place, found in zip(places.double(), gains.T, strict=True):
        kept = tuple((found > -torch.inf).tolist())
        costs = {way: error_of(place, way) + price * sum(way) for way in product([False, True], repeat=7)}
        assert costs[kept] == pytest.approx(min(costs.values()), abs=1e-6)
        for frame in (frame for frame in range(7) if kept[frame]):
            without = (*kept[:frame], False, *kept[frame + 1 :])
            gain = float(found[frame]) / 2**28
            assert gain == pytest.approx(error_of(place, without) - error_of(place, kept), abs=1e-6) and gain >= price


def test_a_long_clip_is_scheduled_in_windows_that_go_on_with_each_other(monkeypatch):
    """What the last window kept still lies there in the next one."""
    places = torch.zeros(1, 10, 1)
    places[:, 3:] = 1.0  # changes in the third frame, for good
    price = torch.tensor([0.5 * 2.0**28], dtype=torch.float64)
    whole = schedule_of(places).gains(price) > -torch.inf
    monkeypatch.setattr("transformers_autogaze.clip_schedule_autogaze._WINDOW", 2)
    in_windows = schedule_of(places).gains(price) > -torch.inf
    assert whole[0, :, 0].nonzero().tolist() == [[2]] and torch.equal(whole, in_windows)


def test_a_change_that_lasts_is_worth_more_than_one_that_is_gone_again():
    frames = torch.zeros(1, 8, 3, 32, 32)
    frames[:, 2:, :, :16, :16] = 0.8  # a place changes a little, and stays so
    frames[:, 4, :, 16:, 16:] = 1.5  # another one a lot, for one frame
    gaze = GreedyGazeSelector(GreedyGazeConfig(scales=[32])).generate(frames, tokens_per_clip=5)
    assert gaze.gazing_mask[0][0].nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [2, 0]]


def test_more_of_a_frame_is_spent_where_more_changes(selector, video):
    counts = selector.generate(video, clip_ratio=0.6).num_real_each_frame
    assert (counts[1, 1:] > 0).all() and counts[0, 3] > 0
    assert counts[0, [1, 2, 4, 5]].sum() < counts[1, [1, 2, 4, 5]].sum()


def test_a_batch_gives_each_clip_what_it_gets_alone(selector, video):
    together = selector.generate(video, clip_ratio=0.3)
    for clip in range(2):
        alone = selector.generate(video[clip : clip + 1], clip_ratio=0.3)
        assert torch.equal(together.select(clip).gazing_pos, alone.gazing_pos)


@pytest.mark.parametrize("budget", [4, 12, 40])
def test_a_stream_is_the_same_in_any_batch(selector, video, budget):
    """Beside a clip that is grey all the time, and needs nothing, as well as alone."""
    clips = torch.cat([torch.zeros_like(video[:1]), video]).repeat(1, 3, 1, 1, 1)
    settings = {"tokens_per_second": budget, "frame_rate": 2}
    together = selector.generate(clips, **settings)
    for clip in range(3):
        alone = selector.generate(clips[clip : clip + 1], **settings)
        assert torch.equal(together.select(clip).gazing_pos, alone.gazing_pos)


def test_a_threshold_ends_frames_before_the_budget_does(video):
    selector = GreedyGazeSelector(ONE_SCALE)
    gaze = selector.generate(video, clip_ratio=1.0, task_loss_requirement=0.9)
    losses = selector.composite(selector.to_pixels(video), gaze).loss
    assert (losses <= 0.9 + 1e-4).all() and (gaze.num_real < 96).all()
    alone = selector.generate(video, task_loss_requirement=0.9)
    assert gaze.num_real_each_frame[0, 0] == alone.num_real_each_frame[0, 0] < 16  # of the first frame as well


def test_what_a_threshold_leaves_out_is_not_booked(video):
    selector, cache = GreedyGazeSelector(ONE_SCALE), GreedyGazeCache()
    settings = {"tokens_per_second": 20, "frame_rate": 2, "task_loss_requirement": 0.9}
    gaze = selector.generate(video, **settings, past_key_values=cache, use_cache=True)
    assert cache.rate_control.total.tolist() == gaze.num_real.tolist()
    before = cache.rate_control.total.clone()
    with pytest.raises(ValueError, match="`pixel_values_videos` must not hold NaN"):
        selector.generate(video * float("nan"), **settings, past_key_values=cache, use_cache=True)
    assert torch.equal(cache.rate_control.total, before) and cache.rate_control.num_frames == cache.num_frames == 6


def test_frames_of_a_tubelet_are_kept_together(selector, video):
    gaze = selector.generate(video, clip_ratio=0.5, tubelet_size=2)
    assert gaze.num_frames == 3 and gaze.frame_sampling_rate == 2 and gaze.num_real.tolist() == [24, 24]
    # The pair over the cut differs from the first in its second frame, and from the last in its first.
    assert (selector.generate(video, clip_ratio=0.9, tubelet_size=2).num_real_each_frame > 0).all()
    even = selector.generate(video, gazing_ratio=0.25, tubelet_size=2)
    assert (even.num_real_each_frame == selector.config.grid.num_patches // 4).all()


def test_a_later_call_goes_on_with_what_was_kept(video):
    selector, cache = GreedyGazeSelector(ONE_SCALE), GreedyGazeCache()
    call = {"past_key_values": cache, "use_cache": True}
    first = selector.generate(video[:, :3], tokens_per_clip=20, **call)
    second = selector.generate(video[:, 3:], tokens_per_clip=20, **call)
    assert (first.first_frame, second.first_frame, cache.num_frames) == (0, 3, 6)
    assert second.num_real_each_frame[0, 0] == 16  # the cut
    joined = GazeOutput.concatenate([first, second])
    assert joined.num_real.tolist() == [40, 40] and joined.first_frame == 0
    rebuilt = selector.composite.reconstruct(selector.to_pixels(video), joined)[:, -1]
    assert torch.equal(rebuilt, cache.reconstruction)
    with pytest.raises(ValueError, match=r"`gazes\[1\]` must start at frame 6 of its stream.* starts at frame 0"):
        GazeOutput.concatenate([second, first])
    with pytest.raises(ValueError, match="a stream keeps its grid and its `tubelet_size`"):
        selector.generate(video[:, :2], gazing_ratio=0.1, tubelet_size=2, **call)


def still_and_moving(seconds: int, rate: int) -> torch.Tensor:
    """A clip, half of it still but for noise, half moving: `(frames, 3, 32, 32)`."""
    generator = torch.Generator().manual_seed(0)
    scene = F.interpolate(torch.randn(1, 3, 12, 24, generator=generator), (48, 96), mode="bicubic")[0].clamp(-2, 2)
    frames = []
    for t in range(seconds * rate):
        x, y = (0, 0) if t < seconds * rate // 2 else (int(24 + 20 * np.sin(t / 9)), int(8 + 7 * np.cos(t / 7)))
        frames.append(scene[:, y : y + 32, x : x + 32])
    frames = torch.stack(frames)
    return frames + 0.02 * torch.randn(frames.shape, generator=generator)


@pytest.mark.parametrize(("scales", "seconds"), [([32], 180), ([16, 32], 60)], ids=["one scale", "two scales"])
@pytest.mark.parametrize("starts_still", [True, False], ids=["still first", "moving first"])
def test_a_stream_keeps_to_its_budget_and_spends_more_where_more_moves(scales, seconds, starts_still):
    rate, budget = 3, 9.0
    frames = still_and_moving(seconds, rate)
    frames = frames if starts_still else frames.flip(0)
    selector, cache, counts = GreedyGazeSelector(GreedyGazeConfig(scales=scales, patch_size=8)), GreedyGazeCache(), []
    for chunk in frames.split(60):
        gaze = selector.generate(
            chunk[None], tokens_per_second=budget, frame_rate=rate, past_key_values=cache, use_cache=True
        )
        counts += gaze.num_real_each_frame[0].tolist()
    total = np.cumsum([0, *counts])
    each_ten_seconds = (total[10 * rate :] - total[: -10 * rate]) / 10
    assert each_ten_seconds.min() >= 0.9 * budget and each_ten_seconds.max() <= 1.1 * budget
    halves = np.split(np.array(counts), 2)
    still, moving = halves if starts_still else halves[::-1]
    assert moving.sum() > still.sum()


def test_a_stream_is_the_same_however_it_is_cut(selector, video):
    budget = {"tokens_per_second": 12, "frame_rate": 2}
    whole = selector.generate(video, **budget)
    cache = GreedyGazeCache()
    parts = [
        selector.generate(part, **budget, past_key_values=cache, use_cache=True) for part in video.split([1, 2, 3], 1)
    ]
    assert torch.equal(GazeOutput.concatenate(parts).gazing_pos, whole.gazing_pos)


def test_an_account_does_not_save_for_ever():
    """However long nothing changed, a stretch never takes more than its share."""
    control = RateControl(StreamBudget(tokens_per_frame=4, window=10), batch_size=1, device="cpu")
    none, much = torch.zeros(1, 50, dtype=torch.float64), torch.full((1, 50), 100.0, dtype=torch.float64)
    counts = []
    for gains in [none] * 40 + [much] * 40:
        counts.append(control.count(gains, torch.tensor([0])))
        control.update(counts[-1])
    counts = list(map(int, counts))
    stretches = [sum(counts[t : t + 10]) for t in range(len(counts) - 9)]
    assert 36 <= min(stretches) and max(stretches) <= 44


def moving_frames(count: int) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(blocks, 3 * index, axis=1) for index in range(count)])


@pytest.mark.parametrize("tiles", ["whole", "grid", "native"])
def test_a_short_video_is_searched_as_a_whole_and_a_long_one_as_a_stream(tiles):
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=[32], patch_size=16))
    short = gaze_video(
        selector, moving_frames(40), tiles=tiles, max_tiles=6 if tiles == "grid" else None, clip_ratio=0.25
    )
    dense = 40 * short.grid.num_patches
    assert int(short.num_real) == dense // 4
    long = gaze_video(
        selector, moving_frames(70), tiles=tiles, max_tiles=6 if tiles == "grid" else None, clip_ratio=0.25
    )
    assert 0.24 < int(long.num_real) / (70 * long.grid.num_patches) <= 0.25
    assert long.num_frames == 70 and short.first_frame == 0
    if tiles == "native":
        assert short.grid.sizes == ((64, 96),)


def test_the_configuration_names_the_share_where_nothing_is_given(video):
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=[64], clip_ratio=0.25))
    assert selector.generate(video).num_real.tolist() == [24, 24]
    assert int(gaze_video(selector, moving_frames(8)).num_real) == 32
    assert (selector.generate(video, gazing_ratio=0.5).num_real_each_frame == 8).all()
    with pytest.raises(ValueError, match="`clip_ratio` must be above 0 and at most 1.* got 2"):
        GreedyGazeConfig(clip_ratio=2)


@pytest.mark.parametrize("rate", [1e4, 1e18, 1e300])
def test_a_rate_beyond_all_patches_keeps_them_all(video, rate):
    gaze = GreedyGazeSelector(ONE_SCALE).generate(video, tokens_per_second=rate, frame_rate=3)
    assert (gaze.num_real_each_frame == gaze.grid.num_patches).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"clip_ratio": 0}, "`clip_ratio` must be above 0 and at most 1"),
        ({"clip_ratio": 1.5}, "`clip_ratio` must be above 0 and at most 1"),
        ({"clip_ratio": float("nan")}, "`clip_ratio` must be above 0 and at most 1"),
        ({"clip_ratio": True}, "`clip_ratio` must be above 0 and at most 1"),
        ({"tokens_per_second": 4, "frame_rate": "b"}, "`frame_rate` must be a number above 0"),
        ({"clip_ratio": "0.1"}, "`clip_ratio` must be above 0 and at most 1"),
        ({"tokens_per_clip": 0}, r"`tokens_per_clip` must be a whole number in 1\.\.96"),
        ({"tokens_per_clip": 97}, r"`tokens_per_clip` must be a whole number in 1\.\.96"),
        ({"tokens_per_clip": 2.5}, r"`tokens_per_clip` must be a whole number in 1\.\.96"),
        ({"tokens_per_second": 3}, "`tokens_per_second` and `frame_rate` must be given together"),
        ({"frame_rate": 3}, "`tokens_per_second` and `frame_rate` must be given together"),
        ({"tokens_per_second": -1, "frame_rate": 3}, "`tokens_per_second` must be a number above 0"),
        ({"tokens_per_second": 1, "frame_rate": float("inf")}, "`frame_rate` must be a number above 0"),
        ({"tokens_per_second": 1, "frame_rate": 1e9}, "`frame_rate` must be at most 1000000 .* got 1000000000.0"),
        ({"gazing_ratio": True}, "`gazing_ratio` must be a number such as 0.25"),
        ({"task_loss_requirement": False}, "`task_loss_requirement` must be a number such as 0.25"),
        ({"clip_ratio": 0.5, "gazing_ratio": 0.5}, "only one of .* can be given, got .'gazing_ratio', 'clip_ratio'"),
        ({"clip_ratio": 0.5, "tokens_per_clip": 5}, "only one of .* can be given"),
        ({"clip_ratio": 0.5, "tubelet_size": 4}, "must hold a multiple of 4 frames, got 6"),
        ({"clip_ratio": 0.5, "tubelet_size": 0}, "`tubelet_size` must be a whole number of at least 1"),
    ],
)
def test_bad_budgets_are_named(video, call, message):
    with pytest.raises(ValueError, match=message):
        GreedyGazeSelector(ONE_SCALE).generate(video, **call)


def test_numbers_of_any_kind_are_taken(video):
    selector = GreedyGazeSelector(ONE_SCALE)
    expected = selector.generate(video, tokens_per_clip=48).gazing_pos
    for call in (
        {"clip_ratio": np.float32(0.5)},
        {"clip_ratio": torch.tensor(0.5)},
        {"tokens_per_clip": torch.tensor(48)},
    ):
        assert torch.equal(selector.generate(video, **call).gazing_pos, expected)
    tubelets = selector.generate(video, tokens_per_clip=np.int64(24), tubelet_size=np.int64(2))
    assert tubelets.num_real.tolist() == [24, 24]


def test_a_selector_that_knows_no_gains_says_so(tiny_model):
    assert isinstance(tiny_model, AutoGazeModel)
    frames = torch.zeros(1, 2, 3, 64, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="`clip_ratio`.* need a selector that knows what patches gain"):
        tiny_model.generate(frames, clip_ratio=0.1)
    with pytest.raises(ValueError, match="`tubelet_size` must be 1 for AutoGazeModel"):
        tiny_model.generate(frames, gazing_ratio=0.1, tubelet_size=2)


def test_stream_gaze_checks_budgets_before_it_decodes():
    selector, frames = GreedyGazeSelector(ONE_SCALE), iter([None])
    for call, message in (
        ({"clip_ratio": 2}, "`clip_ratio` must be above 0"),
        ({"clip_ratio": 0.1, "gazing_ratio": 0.1}, "only one of"),
        ({"tokens_per_second": 9}, "`frame_rate` must be given with `tokens_per_second`"),
        ({"tokens_per_second": 9, "frame_rate": 0}, "`frame_rate` must be a number above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            stream_gaze(selector, frames, **call)


def test_tokens_of_a_second_are_those_of_all_tiles():
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=[16, 32], patch_size=16))
    gaze = gaze_video(selector, moving_frames(60), tiles="grid", max_tiles=4, tokens_per_second=60, frame_rate=10)
    assert 0.8 * 360 <= int(gaze.num_real) <= 1.1 * 360


def test_a_threshold_for_every_frame_goes_with_a_share_of_the_clip():
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=[32], patch_size=16))
    frames, thresholds = moving_frames(20), [0.5] * 10 + [-2.0] * 10
    gaze = gaze_video(selector, frames, clip_ratio=0.9, task_loss_requirement=thresholds)
    assert gaze.num_frames == 20 and int(gaze.num_real) <= 0.9 * 20 * 4
    with pytest.raises(ValueError, match="or 20 of them, one for each frame of a chunk"):
        stream_gaze(selector, frames, clip_ratio=0.9, task_loss_requirement=thresholds[:16])
