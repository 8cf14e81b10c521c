import json

import pytest
import torch

from transformers_autogaze import CompositeReconstruction, GazeGrid, GazeOutput, mse_to_task_loss, task_loss_to_mse
from transformers_autogaze.composite_autogaze import ReconstructionOutput
from transformers_autogaze.demo import render_demo_clip
from transformers_autogaze.training.labels import (
    ClipLabels,
    FrameValues,
    GreedyLabeller,
    label_clip,
    label_gaze,
    label_videos,
    labels_from_table,
    labels_to_table,
    read_labels,
    standing_frames,
    write_labels,
)
from transformers_autogaze.training.videos import VideoCollection


GRID = GazeGrid([16, 32], patch_size=8)  # 2x2 and 4x4
COMPOSITE = CompositeReconstruction(GRID)


class MeanAbsoluteError:
    """A reconstruction that is not the closed form's own: its pixels, but judged by another measure."""

    def __init__(self):
        self.batches = []

    def __call__(self, pixels, gaze, frames=None):
        self.batches.append(len(pixels))
        rebuilt = COMPOSITE(pixels, gaze, frames).reconstruction
        frames = list(range(pixels.shape[1])) if frames is None else frames
        return ReconstructionOutput(rebuilt, (rebuilt - pixels[:, frames]).abs().mean((2, 3, 4)))


def make_pixels(batch=2, num_frames=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, num_frames, 3, 32, 32, generator=generator, dtype=dtype)


def gaze_of(ids):
    """The gaze of one clip with some patches in each frame, counted from their frame."""
    counts = torch.tensor([len(frame) for frame in ids])
    pos = torch.tensor([[id + t * GRID.num_patches for t, frame in enumerate(ids) for id in frame]])
    return GazeOutput.from_ids(pos, torch.zeros_like(pos, dtype=torch.bool), counts, GRID)


def brute_force(pixels, budgets, reconstruction, candidates_of=lambda t, kept: range(GRID.num_patches)):
    """Tries every patch at every step, by rebuilding the whole clip up to there."""
    labels = ClipLabels([], [])
    for t, budget in enumerate(budgets):
        ids, losses = [], []
        for _ in range(budget):
            tried = {}
            for candidate in candidates_of(t, ids):
                if candidate not in ids:
                    gaze = gaze_of([*labels.gazing_pos, [*ids, candidate]])
                    tried[candidate] = float(reconstruction(pixels[:, : t + 1], gaze).loss[0, t])
            best = min(tried, key=tried.get)
            if losses and tried[best] > losses[-1]:
                break
            ids.append(best)
            losses.append(tried[best])
        labels.gazing_pos.append(ids)
        labels.task_losses.append(losses)
    return labels


def assert_labels_equal(labels, expected):
    assert labels.gazing_pos == expected.gazing_pos
    for frame, frame_expected in zip(labels.task_losses, expected.task_losses, strict=True):
        assert frame == pytest.approx(frame_expected, abs=1e-6)


def test_labels_equal_a_brute_force_search():
    pixels = make_pixels(batch=2, num_frames=2)
    for clip, labels in zip(pixels, GreedyLabeller(GRID, gazing_ratio=[0.5, 0.25])(pixels), strict=True):
        assert_labels_equal(labels, brute_force(clip[None], [10, 5], COMPOSITE))


def test_labels_on_another_reconstruction_equal_a_brute_force_search():
    pixels = make_pixels(batch=1, num_frames=2, seed=1)
    labeller = GreedyLabeller(GRID, MeanAbsoluteError(), gazing_ratio=0.3, beam=GRID.num_patches)
    assert_labels_equal(labeller(pixels)[0], brute_force(pixels, [6, 6], MeanAbsoluteError()))


def test_the_closed_form_as_any_other_reconstruction_gives_the_exact_search():
    pixels = make_pixels(batch=2, num_frames=3, seed=2)
    exact = GreedyLabeller(GRID, gazing_ratio=0.4)(pixels)
    for beam in (1, 20):
        for labels, expected in zip(GreedyLabeller(GRID, COMPOSITE, 0.4, beam=beam)(pixels), exact, strict=True):
            assert_labels_equal(labels, expected)


def test_a_beam_holds_the_best_candidates_of_the_closed_form():
    pixels = make_pixels(batch=1, num_frames=2, seed=3)
    reconstruction = MeanAbsoluteError()
    labels = GreedyLabeller(GRID, reconstruction, gazing_ratio=0.3, beam=3)(pixels)[0]
    assert set(reconstruction.batches) == {3}

    def best_three(t, kept):
        before = gaze_of([*labels.gazing_pos[:t], [0]])  # the last frame's patches play no part in what it stands on
        standing = standing_frames(COMPOSITE, pixels[:, : t + 1], before.gazing_mask)[0, t]
        mask = torch.zeros(1, GRID.num_patches, dtype=torch.bool)
        mask[0, kept] = True
        gains = COMPOSITE.gains(COMPOSITE.cell_errors(pixels[:, t], standing[None]), mask)[0]
        gains[kept] = -torch.inf
        return gains.topk(3).indices.tolist()

    assert_labels_equal(labels, brute_force(pixels, [6, 6], MeanAbsoluteError(), best_three))


@pytest.mark.parametrize("reconstruction", [None, MeanAbsoluteError()])
def test_losses_never_rise_along_a_frame_and_no_patch_comes_twice(reconstruction):
    labels = GreedyLabeller(GRID, reconstruction, gazing_ratio=1.0, beam=4)(make_pixels(dtype=torch.float32))
    for clip in labels:
        for ids, losses in zip(*clip, strict=True):
            assert losses == sorted(losses, reverse=True)
            assert len(set(ids)) == len(ids)


def test_frames_end_at_the_threshold():
    pixels = make_pixels()
    for reconstruction, threshold in ((None, 1.2), (MeanAbsoluteError(), 0.1)):
        labels = GreedyLabeller(GRID, reconstruction, gazing_ratio=1, task_loss_requirement=threshold)(pixels)
        for losses in (losses for clip in labels for losses in clip.task_losses):
            assert losses[-1] <= threshold and all(loss > threshold for loss in losses[:-1])
    # A first patch is always chosen.
    labels = GreedyLabeller(GRID, MeanAbsoluteError(), gazing_ratio=1, task_loss_requirement=9.0)(pixels)
    assert [len(ids) for ids in labels[0].gazing_pos] == [1, 1, 1]


def test_a_frame_ends_where_no_patch_lowers_the_loss():
    def worse_with_every_patch(pixels, gaze, frames):
        return ReconstructionOutput(pixels[:, frames], gaze.num_real_each_frame[:, frames].double())

    labels = GreedyLabeller(GRID, worse_with_every_patch, gazing_ratio=1)(make_pixels(batch=1))[0]
    assert labels.task_losses == [[1.0]] * 3


def test_one_clip_with_its_own_lengths_is_labelled_like_a_batch():
    pixels = make_pixels()
    limit = task_loss_to_mse(torch.tensor([1.5, 1.3, -9.0]))
    labels, standing = label_clip(COMPOSITE, pixels[0], torch.tensor([20, 20, 4]), limit)
    found = COMPOSITE.search(pixels[:1], [20, 20, 4], limit[None])
    assert [len(ids) for ids in labels.gazing_pos] == found.counts[0].tolist()
    assert labels.gazing_pos[2] == found.ids[0, 2, :4].tolist()
    assert labels.task_losses[0] == mse_to_task_loss(found.mse[0, 0, : found.counts[0, 0]]).tolist()
    torch.testing.assert_close(standing, standing_frames(COMPOSITE, pixels[:1], gaze_of(labels[0]).gazing_mask)[0])
    assert bool((standing[0] == 0.5).all())


def test_frame_values_are_what_cells_and_patches_cost_in_pixels():
    pixels, standing = make_pixels(batch=2), make_pixels(batch=2, seed=5)
    values = FrameValues.measure(COMPOSITE, pixels, standing)
    assert values.cell_losses.shape == (2, 3, 2, 4, 4) and values.patch_gains.shape == (2, 3, 20)
    squares = (pixels - standing).square().mean(2).unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2))
    losses = mse_to_task_loss(squares + 2e-5)  # what is good enough need not be told apart
    torch.testing.assert_close(values.cell_losses[:, :, 0], losses, rtol=0, atol=1e-6)
    # The finest patch of a cell takes its whole error away; a coarse one that of its four, less what it leaves.
    torch.testing.assert_close(values.patch_gains[..., 4:], squares.flatten(2) * 3 * 64, rtol=0, atol=1e-4)
    left = (task_loss_to_mse(values.cell_losses[:, :, 1]) - 2e-5) * 3 * 64
    drop = squares * 3 * 64 - left
    coarse = torch.nn.functional.avg_pool2d(drop, 2, divisor_override=1).flatten(2)
    torch.testing.assert_close(values.patch_gains[..., :4], coarse, rtol=0, atol=1e-4)


def test_gains_are_by_how_much_the_error_falls():
    pixels = make_pixels(batch=1, num_frames=1)
    standing = torch.full_like(pixels[:, 0], 0.5)
    errors = COMPOSITE.cell_errors(pixels[:, 0], standing)
    for kept in ([], [1], [0, 9], [7, 3, 12]):
        mask = torch.zeros(1, 20, dtype=torch.bool)
        mask[0, kept] = True
        gains = COMPOSITE.gains(errors, mask)[0]

        def error(ids):
            masks = torch.zeros(1, 1, 20, dtype=torch.bool)
            masks[..., ids] = True
            return (COMPOSITE.reconstruct(pixels, GRID.split_by_scale(masks)) - pixels).square().sum()

        for id in range(20):
            assert float(gains[id]) == pytest.approx(float(error(kept) - error([*kept, id])), abs=1e-6)


def test_a_gaze_is_labelled_by_what_greedy_search_would_choose_next():
    pixels = make_pixels(batch=1)
    own = GreedyLabeller(GRID, gazing_ratio=0.4)(pixels)[0]
    labels, losses, _ = label_gaze(COMPOSITE, pixels, gaze_of(own.gazing_pos), step_size=3)
    frames = labels.view(3, 8) - torch.arange(3)[:, None] * 20
    assert frames.tolist() == own.gazing_pos
    assert losses[0].tolist() == pytest.approx(sum(own.task_losses, []), abs=1e-9)

    generator = torch.Generator().manual_seed(0)
    other = [torch.randperm(20, generator=generator)[:8].tolist() for _ in range(3)]
    labels, losses, gains = label_gaze(COMPOSITE, pixels, gaze_of(other), step_size=4)
    frames = (labels.view(3, 8) - torch.arange(3)[:, None] * 20).tolist()
    for t in range(3):
        for step in (0, 4):
            kept = [*other[:t], other[t][:step]]
            for slot in range(4):  # what greedy search adds, tried one by one
                tried = [
                    float(COMPOSITE(pixels[:, : t + 1], gaze_of([*kept[:-1], [*kept[-1], id]])).loss[0, t])
                    for id in range(20)
                ]
                assert tried[frames[t][step + slot]] == pytest.approx(min(tried), abs=1e-9)
                assert int(gains[0, 8 * t + step + slot].argmax()) == frames[t][step + slot]
                kept[-1] = [*kept[-1], frames[t][step + slot]]
        so_far = [COMPOSITE(pixels[:, : t + 1], gaze_of([*other[:t], other[t][:n]])).loss[0, t] for n in range(1, 9)]
        assert losses.view(3, 8)[t].tolist() == pytest.approx([float(loss) for loss in so_far], abs=1e-6)


LABELS = {"a/b.mp4": ClipLabels([[3, 0], [19]], [[0.1 + 0.2, -1 / 3], [1e-17]]), "c": ClipLabels([[1]], [[2.0]])}


def test_a_label_file_reads_back_equal_and_has_the_published_shape(tmp_path):
    write_labels(tmp_path / "labels.json", LABELS)
    assert read_labels(tmp_path / "labels.json", grid=GRID) == LABELS
    published = json.loads((tmp_path / "labels.json").read_text())
    assert published["c"] == {"gazing_pos": [[1]], "task_losses": [[2.0]]}
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


def test_a_table_reads_back_equal(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = labels_to_table(LABELS)
    assert table.column_names == ["video", "gazing_pos", "task_losses"]
    table.save_to_disk(tmp_path / "table")
    assert labels_from_table(datasets.load_from_disk(tmp_path / "table")) == LABELS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "labels.json' must hold"),
        ('{"v": {"gazing_pos": [[1]]}}', "KeyError: 'task_losses'"),
        ("[1]", "must hold"),
        (
            '{"v": {"gazing_pos": [[1, 2]], "task_losses": [[0.5]]}}',
            r"'v' must hold .* got \[2\] patches and \[1\] losses",
        ),
        ('{"v": {"gazing_pos": [[]], "task_losses": [[]]}}', "at least one patch for each frame"),
        ('{"v": {"gazing_pos": [[20]], "task_losses": [[0.5]]}}', r"ids in 0\.\.19, got 20"),
    ],
)
def test_a_file_that_is_no_label_file_is_refused(tmp_path, content, message):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels.json", grid=GRID)


@pytest.fixture
def videos():
    return VideoCollection([render_demo_clip(6, 40, 48, seed) for seed in range(5)])


class Stopping(GreedyLabeller):
    """Labels some batches, then breaks off."""

    def __init__(self, batches):
        super().__init__(GRID, gazing_ratio=0.2)
        self.batches = batches
        self.labelled = 0

    def __call__(self, pixels):
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.labelled += len(pixels)
        return super().__call__(pixels)


def test_labelling_goes_on_where_it_broke_off(videos, tmp_path):
    whole = read_labels(label_videos(videos, Stopping(9), tmp_path / "whole.json", num_frames=3, batch_size=2))
    assert list(whole) == ["0", "1", "2", "3", "4"]
    assert all(len(clip.gazing_pos) == 3 and len(clip.gazing_pos[0]) == 4 for clip in whole.values())

    output = tmp_path / "labels" / "broken.json"
    with pytest.raises(KeyboardInterrupt):
        label_videos(videos, Stopping(1), output, num_frames=3, batch_size=2)
    assert not output.exists()
    with (tmp_path / "labels" / "broken.partial.jsonl").open("a") as file:
        file.write('["2", {"gazing_')  # cut off in the middle of a line
    labeller = Stopping(9)
    assert label_videos(videos, labeller, output, num_frames=3, batch_size=2) == output
    assert labeller.labelled == 3 and read_labels(output) == whole
    assert [path.name for path in output.parent.iterdir()] == ["broken.json"]
    assert label_videos(videos, Stopping(0), output, num_frames=3) == output  # nothing left to do


def test_shards_make_up_the_whole(videos, tmp_path):
    labeller = GreedyLabeller(GRID, gazing_ratio=0.2)
    whole = read_labels(label_videos(videos, labeller, tmp_path / "labels.json", num_frames=2))
    paths = [label_videos(videos, labeller, tmp_path / "labels.json", num_frames=2, shard=(n, 2)) for n in (1, 2)]
    assert [path.name for path in paths] == ["labels-00001-of-00002.json", "labels-00002-of-00002.json"]
    assert [len(read_labels(path)) for path in paths] == [3, 2]
    assert read_labels(*paths) == whole


def test_videos_that_cannot_be_labelled_are_skipped_and_counted(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    short, good = render_demo_clip(2, 40, 48), render_demo_clip(4, 40, 48)
    videos = VideoCollection([short, tmp_path / "broken.mp4", good])
    with pytest.warns(UserWarning, match="a video is skipped") as warned:
        path = label_videos(videos, GreedyLabeller(GRID), tmp_path / "labels.json", num_frames=4)
    assert list(read_labels(path)) == ["2"] and videos.num_skipped == 2
    assert len([warning for warning in warned if "skipped" in str(warning.message)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard": (3, 2)}, r"`shard` must be one of 1\.\.2"),
        ({"shard": (0, 2)}, "`shard`"),
        ({"output": "labels.txt"}, "`output` must end in .json, got 'labels.txt'"),
    ],
)
def test_impossible_labelling_is_refused_before_any_work(videos, arguments, message):
    with pytest.raises(ValueError, match=message):
        label_videos(videos, Stopping(0), **{"output": "labels.json", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam": 0}, "`beam` must be a whole number of at least 1, got 0"),
        ({"reconstruction": 3}, "`reconstruction` must be callable, got int"),
        ({"gazing_ratio": 1.5}, r"`gazing_ratio` must lie in 0\.\.1"),
        ({"gazing_ratio": [0.1, -1]}, r"`gazing_ratio` must lie in 0\.\.1"),
    ],
)
def test_a_labeller_checks_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GreedyLabeller(GRID, **arguments)


def test_frames_without_a_ratio_of_their_own_are_refused():
    with pytest.raises(ValueError, match="`gazing_ratio` must be one number or one for each of the 3 frames"):
        GreedyLabeller(GRID, gazing_ratio=[0.1, 0.2])(make_pixels())
