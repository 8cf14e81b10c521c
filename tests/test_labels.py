import json
import subprocess
import sys

import pytest
import torch
from transformers import set_seed

from transformers_autogaze import (
    CompositeReconstruction,
    FeatureGazeConfig,
    FeatureGazeModel,
    GazeGrid,
    GazeOutput,
    mse_to_task_loss,
    task_loss_to_mse,
)
from transformers_autogaze.composite_autogaze import ReconstructionOutput
from transformers_autogaze.training.label_files import (
    ClipLabels,
    labels_from_table,
    labels_to_table,
    read_file_sizes,
    read_label_settings,
    read_labels,
    write_labels,
)
from transformers_autogaze.training.labels import GreedyLabeller, label_videos, labels_from_gaze
from transformers_autogaze.training.task import GazeTask
from transformers_autogaze.training.videos import VideoCollection
from transformers_autogaze.video import write_video
from transformers_autogaze.video.demo import render_demo_clip


GRID = GazeGrid([16, 32], patch_size=8)  # 2x2 and 4x4
COMPOSITE = CompositeReconstruction(GRID)


class MeanAbsoluteError:
    """The closed-form reconstruction with another loss."""

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
    """Tries every patch at every step, by reconstructing the clip up to the step."""
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


def test_labels_with_the_closed_form_as_reconstruction_equal_the_exact_search():
    pixels = make_pixels(batch=2, num_frames=3, seed=2)
    exact = GreedyLabeller(GRID, gazing_ratio=0.4)(pixels)
    for beam in (1, 20):
        for labels, expected in zip(GreedyLabeller(GRID, COMPOSITE, 0.4, beam=beam)(pixels), exact, strict=True):
            assert_labels_equal(labels, expected)


def test_the_beam_has_the_best_candidates_of_the_closed_form():
    pixels = make_pixels(batch=1, num_frames=2, seed=3)
    reconstruction = MeanAbsoluteError()
    labels = GreedyLabeller(GRID, reconstruction, gazing_ratio=0.3, beam=3)(pixels)[0]
    assert set(reconstruction.batches) == {3}

    def best_three(t, kept):
        before = gaze_of([*labels.gazing_pos[:t], [0]])  # the patches of the last frame do not affect the frame before
        rebuilt = COMPOSITE.reconstruct(pixels[:, : t + 1], before.gazing_mask)
        previous_reconstruction = rebuilt[0, t - 1] if t else torch.full_like(pixels[0, 0], 0.5)
        mask = torch.zeros(1, GRID.num_patches, dtype=torch.bool)
        mask[0, kept] = True
        gains = COMPOSITE.gains(COMPOSITE.cell_errors(pixels[:, t], previous_reconstruction[None]), mask)[0]
        gains[kept] = -torch.inf
        return gains.topk(3).indices.tolist()

    assert_labels_equal(labels, brute_force(pixels, [6, 6], MeanAbsoluteError(), best_three))


@pytest.mark.parametrize("reconstruction", [None, MeanAbsoluteError()])
def test_losses_of_a_frame_never_rise_and_patches_do_not_repeat(reconstruction):
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
    # At least one patch is chosen.
    labels = GreedyLabeller(GRID, MeanAbsoluteError(), gazing_ratio=1, task_loss_requirement=9.0)(pixels)
    assert [len(ids) for ids in labels[0].gazing_pos] == [1, 1, 1]


def test_a_frame_ends_if_no_patch_lowers_the_loss():
    def worse_with_every_patch(pixels, gaze, frames):
        return ReconstructionOutput(pixels[:, frames], gaze.num_real_each_frame[:, frames].double())

    labels = GreedyLabeller(GRID, worse_with_every_patch, gazing_ratio=1)(make_pixels(batch=1))[0]
    assert labels.task_losses == [[1.0]] * 3


def feature_model(seed=0, feature_size=4):
    """A small network with random weights, calibrated at random, of which nothing but its own distances is expected."""
    set_seed(seed)
    settings = {"hidden_sizes": [8, 8, 8], "depths": [1, 1, 1], "scale_factors": [0.5, 1], "initializer_range": 0.5}
    return FeatureGazeModel(
        FeatureGazeConfig(
            GRID.scales,
            GRID.patch_size,
            feature_size=feature_size,
            feature_variance=20.0,
            loss_knots=[(0.0, 0.0), (0.1, 0.3), (4.0, 1.0)],
            **settings,
        )
    ).eval()


def feature_losses(model, pixels, gaze):
    """The share of variance that each frame of one clip loses, place by place, in plain words."""
    frames = torch.nn.functional.interpolate(pixels[0], (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    vectors = model.network(model.network.normalize(frames))
    vectors = (vectors / 20**0.5).clamp(-4, 4).double()
    canvas, losses = torch.full((4, 4, 4), torch.nan, dtype=torch.float64), []
    for t, ids in enumerate(gaze.ids_each_frame(0)):
        for id in sorted(ids.tolist()):  # coarse to fine
            rows, cols = (slice(2 * (id // 2), 2 * (id // 2) + 2), slice(2 * (id % 2), 2 * (id % 2) + 2))
            if id >= 4:
                rows, cols = (slice(place, place + 1) for place in divmod(id - 4, 4))
            canvas[:, rows, cols] = vectors[t, int(id >= 4), :, rows, cols]
        lost = (canvas.nan_to_num() - vectors[t, 1]).square().sum(0)
        share = float(lost.mean())
        losses.append(share * 3 if share < 0.1 else min(1, 0.3 + (share - 0.1) * 0.7 / 3.9))
    return losses


@torch.no_grad()
def test_the_loss_of_features_is_the_share_of_lost_variance():
    model, pixels = feature_model(), make_pixels(batch=1, num_frames=3, dtype=torch.float32)
    model.config.image_mean = [0.1, 0.2, 0.3]  # a task takes pixels, independently of the model's normalisation
    task = GazeTask(GRID, model)
    for ids in ([[4, 5, 3], [9], [0, 1, 2, 3]], [[0], [1], [4]]):
        gaze = gaze_of(ids)
        expected = feature_losses(model, pixels, gaze)
        assert task(pixels, gaze).loss[0].tolist() == pytest.approx(expected, abs=1e-4)
        assert task(pixels, gaze, frames=[2, 0]).loss[0].tolist() == pytest.approx(expected[::-2], abs=1e-4)
        so_far = [feature_losses(model, pixels, gaze_of([ids[0][:n]]))[0] for n in range(1, len(ids[0]) + 1)]
        assert task.measure(pixels, gaze)[0, : len(so_far)].tolist() == pytest.approx(so_far, abs=1e-4)


def test_labels_by_features_equal_a_brute_force_search():
    pixels = make_pixels(batch=2, num_frames=2, dtype=torch.float32)
    task = GazeTask(GRID, feature_model())
    for clip, labels in zip(pixels, GreedyLabeller(GRID, task, gazing_ratio=[0.4, 0.2])(pixels), strict=True):
        expected = brute_force(clip[None], [8, 4], task)
        for losses, best in zip(labels.task_losses, expected.task_losses, strict=True):
            assert losses == pytest.approx(best, abs=1e-5)
        assert labels.gazing_pos[0][0] == expected.gazing_pos[0][0]


def test_the_task_of_pixels_equals_the_closed_form():
    pixels = make_pixels()
    gaze = gaze_of([[5, 1], [0], [19, 4, 7]])
    task = GazeTask(GRID)
    torch.testing.assert_close(task(pixels[:1], gaze).loss, COMPOSITE(pixels[:1], gaze).loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(task.measure(pixels[:1], gaze), mse_to_task_loss(COMPOSITE.measure(pixels[:1], gaze)))
    labels = labels_from_gaze(task.search(pixels, [1.0, 1.0, 0.2], 1.4))
    found = COMPOSITE.search(pixels, [20, 20, 4], task_loss_to_mse(torch.full((2, 3), 1.4)))
    for clip, counts, ids in zip(labels, found.counts.tolist(), found.ids, strict=True):
        assert clip.gazing_pos == [row[:count].tolist() for row, count in zip(ids, counts, strict=True)]


@pytest.mark.parametrize("model", [None, feature_model()], ids=["pixels", "features"])
def test_gazes_of_a_clip_share_its_preprocessing(model):
    task, pixels = GazeTask(GRID, model), make_pixels(batch=2, dtype=torch.float32)
    ids = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:3] for seed in range(6)])
    gaze = GazeOutput.from_ids(ids, torch.zeros(6, 3, dtype=torch.bool), torch.tensor([3]), GRID)
    repeated = task(pixels[:, :1].repeat_interleave(3, dim=0), gaze).loss
    assert torch.equal(task(pixels[:, :1], gaze).loss, repeated) and len(repeated.unique()) == 6


def test_a_task_refuses_other_models():
    with pytest.raises(ValueError, match="`model` must be a FeatureGazeModel, got Linear"):
        GazeTask(GRID, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="`grid` must be that of the task"):
        GreedyLabeller(GazeGrid([32], patch_size=8), GazeTask(GRID))
    with pytest.raises(ValueError, match=r"`task_loss_requirement` must lie in 0\.\.1"):
        GreedyLabeller(GRID, GazeTask(GRID, feature_model()), task_loss_requirement=1.5)
    with pytest.raises(ValueError, match="`task_loss_requirement` must be numbers, got NaN"):
        GreedyLabeller(GRID, task_loss_requirement=float("nan"))


def test_gains_are_reductions_of_the_error():
    pixels = make_pixels(batch=1, num_frames=1)
    previous_reconstruction = torch.full_like(pixels[:, 0], 0.5)
    errors = COMPOSITE.cell_errors(pixels[:, 0], previous_reconstruction)
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


@pytest.mark.parametrize("model", [None, feature_model()], ids=["pixels", "features"])
def test_continuations_are_the_next_choices_of_greedy_search(model):
    task, pixels = GazeTask(GRID, model), make_pixels(batch=1, dtype=torch.float32)
    own = GreedyLabeller(GRID, task, gazing_ratio=0.4)(pixels)[0]
    labels = task.continuations(pixels, gaze_of(own.gazing_pos), step_size=3)
    frames = labels.view(3, 8) - torch.arange(3)[:, None] * 20
    assert frames.tolist() == own.gazing_pos
    losses = task.measure(pixels, gaze_of(own.gazing_pos))
    assert losses[0].tolist() == pytest.approx(sum(own.task_losses, []), abs=1e-9)

    generator = torch.Generator().manual_seed(0)
    other = [torch.randperm(20, generator=generator)[:8].tolist() for _ in range(3)]
    labels = task.continuations(pixels, gaze_of(other), step_size=4)
    frames = (labels.view(3, 8) - torch.arange(3)[:, None] * 20).tolist()
    for t in range(3):
        for step in (0, 4):
            kept = [*other[:t], other[t][:step]]
            for slot in range(4):  # the choices of greedy search, by trying all patches
                tried = [
                    float(task(pixels[:, : t + 1], gaze_of([*kept[:-1], [*kept[-1], id]])).loss[0, t])
                    for id in range(20)
                ]
                assert tried[frames[t][step + slot]] == pytest.approx(min(tried), abs=1e-5)
                kept[-1] = [*kept[-1], frames[t][step + slot]]


LABELS = {"a/b.mp4": ClipLabels([[3, 0]], [[0.1 + 0.2, -1 / 3]]), "c": ClipLabels([[1]], [[2.0]])}


def test_a_label_file_has_the_published_format_and_reads_back_equal(tmp_path):
    write_labels(tmp_path / "labels.json", LABELS)
    assert read_labels(tmp_path / "labels.json", grid=GRID) == LABELS
    published = json.loads((tmp_path / "labels.json").read_text())
    assert (
        published["c"] == {"gazing_pos": [[1]], "task_losses": [[2.0]]}
        and read_label_settings(tmp_path / "labels.json") == {}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


def test_ids_are_checked_against_the_grid_in_the_file(tmp_path):
    settings = {"scales": [[16, 16], [32, 32]], "patch_size": 8}
    write_labels(tmp_path / "labels.json", {"v": ClipLabels([[20]], [[0.5]])}, settings)
    with pytest.raises(ValueError, match=r"'v' must hold ids in 0\.\.19, got 20"):
        read_labels(tmp_path / "labels.json")


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
        ('{"v": {"gazing_pos": [[1]]}}', "got an object with the keys gazing_pos for 'v'"),
        ("[1]", "must hold"),
        (
            '{"v": {"gazing_pos": [[1, 2]], "task_losses": [[0.5]]}}',
            r"'v' must hold .* got \[2\] patches and \[1\] losses",
        ),
        ('{"v": {"gazing_pos": [[]], "task_losses": [[]]}}', "at least one patch for each frame"),
        ('{"v": {"gazing_pos": [[20]], "task_losses": [[0.5]]}}', r"ids in 0\.\.19, got 20"),
        ('{"v": {"gazing_pos": [[-1]], "task_losses": [[0.5]]}}', r"ids in 0\.\.19, got -1"),
        ('{"v": {"gazing_pos": [["3"]], "task_losses": [[0.5]]}}', r"ids in 0\.\.19, got '3'"),
        ('{"v": {"gazing_pos": [[1.5]], "task_losses": [[0.5]]}}', r"ids in 0\.\.19, got 1.5"),
        ('{"v": {"gazing_pos": [[true]], "task_losses": [[0.5]]}}', r"ids in 0\.\.19, got True"),
        ('{"v": {"gazing_pos": [[null]], "task_losses": [[0.5]]}}', r"ids in 0\.\.19, got None"),
        ('{"v": {"gazing_pos": [[[1]]], "task_losses": [[0.5]]}}', r"ids in 0\.\.19, got \[1\]"),
        ('{"v": {"gazing_pos": [[1, 1]], "task_losses": [[0.5, 0.5]]}}', r"no patch twice in a frame, got \[1, 1\]"),
        ('{"v": {"gazing_pos": [1], "task_losses": [0.5]}}', "a list of patches and one of losses for each frame"),
        ('{"v": {"gazing_pos": "1", "task_losses": "2"}}', "a list of patches and one of losses for each frame"),
        ('{"v": {"gazing_pos": [[1]], "task_losses": [[NaN]]}}', "numbers as losses, got nan"),
        ('{"v": {"gazing_pos": [[1]], "task_losses": [["a"]]}}', "numbers as losses, got 'a'"),
        (
            '{"v": {"gazing_pos": [[1]], "task_losses": [[1]]}, "w": {"gazing_pos": [[1], [1]], "task_losses": [[1], [1]]}}',
            "equal numbers of frames, got 1 of 'v' and 2 of 'w'",
        ),
        ('{"settings": 3}', "must hold"),
        ("{}", "must hold labels, got none"),
        ('{"v": 3}', "must hold"),
        ("3", "must hold"),
    ],
)
def test_files_of_other_formats_are_refused(tmp_path, content, message):
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


def test_interrupted_labelling_is_resumed(videos, tmp_path):
    expected = read_labels(label_videos(videos, Stopping(9), tmp_path / "whole.json", num_frames=3, batch_size=2))
    assert list(expected) == ["0", "1", "2", "3", "4"]
    assert all(len(clip.gazing_pos) == 3 and len(clip.gazing_pos[0]) == 4 for clip in expected.values())

    output = tmp_path / "labels" / "broken.json"
    with pytest.raises(KeyboardInterrupt):
        label_videos(videos, Stopping(1), output, num_frames=3, batch_size=2)
    assert not output.exists()
    with (tmp_path / "labels" / "broken.partial.jsonl").open("a") as file:
        file.write('["2", {"gazing_')  # cut off in the middle of a line
    labeller = Stopping(9)
    assert label_videos(videos, labeller, output, num_frames=3, batch_size=2) == output
    assert labeller.labelled == 3 and read_labels(output) == expected
    assert [path.name for path in output.parent.iterdir()] == ["broken.json"]
    assert label_videos(videos, Stopping(0), output, num_frames=3) == output  # all videos are labelled


def test_a_finished_file_is_extended_by_new_videos(tmp_path):
    clips = [render_demo_clip(4, 40, 48, seed) for seed in range(3)]
    labeller, output = Stopping(9), tmp_path / "labels.json"
    first = read_labels(label_videos(VideoCollection(clips[:2]), labeller, output, num_frames=2))
    labels = read_labels(label_videos(VideoCollection(clips), labeller, output, num_frames=2))
    assert list(labels) == ["0", "1", "2"] and labeller.labelled == 3
    assert {name: labels[name] for name in first} == first
    label_videos(VideoCollection(clips[2:]), Stopping(0), output, num_frames=2)  # fewer videos; all labels are kept
    assert read_labels(output) == labels
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


def test_labels_of_other_videos_with_the_same_names_are_detected(tmp_path):
    for folder, height in (("one", 32), ("other", 48)):
        (tmp_path / folder).mkdir()
        for seed in range(3):
            write_video(tmp_path / folder / f"{seed}.mp4", render_demo_clip(4, height, 48, seed))
    one, other = (VideoCollection(tmp_path / folder) for folder in ("one", "other"))
    output, message = (
        tmp_path / "labels.json",
        r"labels of '0.mp4' in .* of a video of \d+ bytes, but it has \d+ bytes",
    )
    with pytest.raises(KeyboardInterrupt):
        label_videos(one, Stopping(1), output, num_frames=2, batch_size=2)
    for _ in range(2):  # an unfinished file, then a finished one
        with pytest.raises(ValueError, match=message):
            label_videos(other, Stopping(0), output, num_frames=2)
        label_videos(one, Stopping(9), output, num_frames=2)
    assert read_file_sizes(output) == one.file_sizes and read_label_settings(output)["num_frames"] == 2
    with pytest.raises(ValueError, match=message):
        read_labels(output, file_sizes=other.file_sizes)
    assert len(read_labels(output, file_sizes=one.file_sizes)) == 3
    write_labels(output, read_labels(output))  # as published
    assert len(read_labels(output, file_sizes=other.file_sizes)) == 3


def test_labels_of_other_settings_do_not_mix(videos, tmp_path):
    def labeller(task=None, **kwargs):
        return GreedyLabeller(GRID, task, **{"gazing_ratio": 0.2, **kwargs})

    def other_settings(output):
        features = GazeTask(GRID, feature_model())
        for make, name, values in (
            (lambda: label_videos(videos, labeller(), output, num_frames=2), "num_frames", "3, but it is 2"),
            (
                lambda: label_videos(videos, labeller(gazing_ratio=0.3), output, 3),
                "gazing_ratio",
                "0.2, but it is 0.3",
            ),
            (
                lambda: label_videos(videos, labeller(task_loss_requirement=0.5), output, 3),
                "task_loss_requirement",
                "None, but it is 0.5",
            ),
            (lambda: label_videos(videos, labeller(features), output, 3), "task", "pixels, but it is features"),
            (
                lambda: label_videos(videos, GreedyLabeller(GazeGrid([32, 64], 8), gazing_ratio=0.2), output, 3),
                "scales",
                r"\[\[16, 16\], \[32, 32\]\], but it is \[\[32, 32\], \[64, 64\]\]",
            ),
        ):
            with pytest.raises(ValueError, match=f"were made with `{name}` {values} now"):
                make()

    with pytest.raises(KeyboardInterrupt):
        label_videos(videos, Stopping(1), tmp_path / "labels.json", num_frames=3, batch_size=2)
    other_settings(tmp_path / "labels.json")  # resuming from an unfinished file
    label_videos(videos, labeller(), tmp_path / "labels.json", num_frames=3)
    other_settings(tmp_path / "labels.json")  # using a finished one

    settings = read_label_settings(tmp_path / "labels.json")
    assert settings == {"num_frames": 3, "gazing_ratio": 0.2, "task_loss_requirement": None, **GazeTask(GRID).settings}
    assert len(read_labels(tmp_path / "labels.json", settings={"num_frames": 3})) == 5
    with pytest.raises(ValueError, match="`num_frames` 3, but it is 16 now"):
        read_labels(tmp_path / "labels.json", settings={"num_frames": 16})
    label_videos(videos, labeller(gazing_ratio=0.5), tmp_path / "other.json", num_frames=3)
    with pytest.raises(
        ValueError, match="other.json' were made with `gazing_ratio` 0.5, but it is 0.2 in .*labels.json"
    ):
        read_labels(tmp_path / "labels.json", tmp_path / "other.json")
    write_labels(tmp_path / "published.json", LABELS)
    with pytest.raises(ValueError, match="holds labels without the settings that they were made with"):
        label_videos(videos, labeller(), tmp_path / "published.json", num_frames=3)


def test_labels_of_other_feature_weights_do_not_mix():
    one, same, other, calibrated = (GazeTask(GRID, feature_model(seed)).settings for seed in (0, 0, 1, 0))
    model = feature_model()
    model.config.loss_knots = [[0.0, 0.0], [1.0, 1.0]]
    calibrated = GazeTask(GRID, model).settings
    assert one == same and len({one["weights"], other["weights"], calibrated["weights"]}) == 3


def test_two_processes_at_once_get_a_clear_error(videos, tmp_path):
    output = tmp_path / "labels.json"

    class Meddled(GreedyLabeller):
        def __call__(self, pixels):
            script = (
                "import sys, fcntl\n"
                "from transformers_autogaze.training.label_files import UnfinishedLabels\n"
                "from pathlib import Path\n"
                "try:\n    UnfinishedLabels(Path(sys.argv[1]), {}, {})\n"
                "except ValueError as error:\n    print(error)\n"
            )
            done = subprocess.run([sys.executable, "-c", script, str(output)], capture_output=True, text=True)
            assert "is being labelled by another process" in done.stdout, done
            return super().__call__(pixels)

    pytest.importorskip("fcntl")
    label_videos(videos, Meddled(GRID, gazing_ratio=0.2), output, num_frames=3)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


def test_labels_that_another_process_finished_are_used(videos, tmp_path, monkeypatch):
    """As when another one came to its end after this one looked, and before it began."""
    from transformers_autogaze.training import labels

    labeller, output = GreedyLabeller(GRID, gazing_ratio=0.2), tmp_path / "labels.json"
    make = labels.UnfinishedLabels

    def after_another_process(*arguments):
        monkeypatch.setattr(labels, "UnfinishedLabels", make)
        label_videos(videos, labeller, output, num_frames=3)
        return make(*arguments)

    monkeypatch.setattr(labels, "UnfinishedLabels", after_another_process)
    assert label_videos(videos, Stopping(0), output, num_frames=3) == output
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


def test_shards_together_equal_the_whole_collection(videos, tmp_path):
    labeller = GreedyLabeller(GRID, gazing_ratio=0.2)
    expected = read_labels(label_videos(videos, labeller, tmp_path / "labels.json", num_frames=2))
    paths = [label_videos(videos, labeller, tmp_path / "labels.json", num_frames=2, shard=(n, 2)) for n in (1, 2)]
    assert [path.name for path in paths] == ["labels-00001-of-00002.json", "labels-00002-of-00002.json"]
    assert [len(read_labels(path)) for path in paths] == [3, 2]
    assert read_labels(*paths) == expected


def test_videos_that_cannot_be_labelled_are_skipped_and_counted(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    short, good = render_demo_clip(2, 40, 48), render_demo_clip(4, 40, 48)
    videos = VideoCollection([short, tmp_path / "broken.mp4", good])
    with pytest.warns(UserWarning, match="left out") as warned:
        path = label_videos(videos, GreedyLabeller(GRID), tmp_path / "labels.json", num_frames=4)
    assert list(read_labels(path)) == ["2"] and videos.num_skipped == 2
    assert [str(w.message).split()[2] for w in warned if "left out" in str(w.message)] == [
        "0",
        str(tmp_path / "broken.mp4"),
    ]


def test_no_readable_video_is_an_error_and_leaves_no_file(videos, tmp_path):
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="videos of 99 frames"):
        label_videos(videos, GreedyLabeller(GRID), tmp_path / "labels.json", num_frames=99)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard": (3, 2)}, r"`shard` must be a number in 1\.\.2"),
        ({"shard": (0, 2)}, "`shard`"),
        ({"output": "labels.txt"}, "`output` must end in .json, got 'labels.txt'"),
        ({"num_frames": 0}, "`num_frames` must be a whole number of at least 1, got 0"),
        ({"num_frames": 2.5}, "`num_frames` must be a whole number of at least 1, got 2.5"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be a whole number of at least 0, got -1"),
    ],
)
def test_invalid_arguments_are_refused_before_labelling(videos, arguments, message):
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


def test_as_many_ratios_as_frames_are_required():
    with pytest.raises(ValueError, match="`gazing_ratio` must be one number or one for each of the 3 frames"):
        GreedyLabeller(GRID, gazing_ratio=[0.1, 0.2])(make_pixels())
