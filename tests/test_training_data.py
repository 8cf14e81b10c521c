import io
import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image
from published import FIXTURES
from torch.utils.data import DataLoader

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, AutoGazeVideoProcessor
from transformers_autogaze.frame_decoding_autogaze import read_video
from transformers_autogaze.selection_autogaze import resize_frames
from transformers_autogaze.training.augmentation import ClipAugmentation, pan_and_zoom
from transformers_autogaze.training.data import BudgetSchedule, ClipSampler, GazeClipDataset, GazeCollator
from transformers_autogaze.training.label_files import ClipLabels, read_labels
from transformers_autogaze.training.labels import GreedyLabeller, label_videos
from transformers_autogaze.training.videos import VideoCollection
from transformers_autogaze.video import write_video
from transformers_autogaze.video.demo import render_demo_clip


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
CONFIG = AutoGazeConfig(
    scales=[32, 64],
    image_size=64,
    vision_config={"hidden_size": 16, "output_size": 16},
    decoder_config={"num_multi_token_pred": 4, **SIZES},
)

PROCESSOR = AutoGazeVideoProcessor(size={"shortest_edge": 64})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(num_frames, height=40, width=48):
    """Frames that are all of one level, their number times ten, so that it shows where a clip came from."""
    return np.broadcast_to(
        np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * 10, (num_frames, height, width, 3)
    )


def dataset(videos=None, **kwargs):
    videos = [numbered(20), render_demo_clip(12, 40, 48), numbered(2)] if videos is None else videos
    return GazeClipDataset(videos, CONFIG, **{"num_frames": 4, "processor": PROCESSOR, **kwargs})


def assert_items_equal(item, expected):
    assert item.keys() == expected.keys()
    for key, value in item.items():
        assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key], key


def frame_numbers(item):
    """The numbers of the frames of a clip of `numbered`."""
    pixels = AutoGazeVideoProcessor().to_pixels(item["pixel_values_videos"])
    return (pixels.mean((1, 2, 3)) * 25.5).round().long().tolist()


def test_items_depend_on_seed_and_index_only():
    settings = {"augmentation": ClipAugmentation(), "schedule": BudgetSchedule()}
    clips, again = dataset(**settings), dataset(**settings)
    items = [clips[index] for index in range(9)]
    for index in (8, 3, 0):
        assert_items_equal(again[index], items[index])
    for loaded, item in zip(DataLoader(clips, None, sampler=[4, 1], num_workers=1), (items[4], items[1]), strict=True):
        assert_items_equal(loaded, item)
    assert not torch.equal(items[1]["pixel_values_videos"], items[4]["pixel_values_videos"])  # one video, other clips
    other = dataset(seed=1, **settings)[1]
    assert not torch.equal(other["pixel_values_videos"], items[1]["pixel_values_videos"])


def test_clips_start_anywhere_and_have_a_constant_stride():
    clips = dataset([numbered(20)], max_stride=4)
    clip_frames = [frame_numbers(clips[index]) for index in range(400)]
    steps = [{b - a for a, b in zip(frames, frames[1:], strict=False)} for frames in clip_frames]
    assert all(len(step) == 1 for step in steps)
    assert {step.pop() for step in steps} == {1, 2, 3, 4}
    starts, ends = ({frames[place] for frames in clip_frames} for place in (0, -1))
    assert len(starts) > 12 and {0, 16} <= starts and min(ends) == 3 and max(ends) == 19


def test_strides_are_limited_by_the_video_and_short_videos_repeat_the_last_frame():
    clips = dataset([numbered(8)], max_stride=9)
    steps = {frames[1] - frames[0] for frames in (frame_numbers(clips[index]) for index in range(60))}
    assert steps == {1, 2}
    assert frame_numbers(dataset([numbered(2)])[0]) == [0, 1, 1, 1]
    assert frame_numbers(dataset([numbered(1)])[0]) == [0, 0, 0, 0]


def test_files_are_decoded_to_the_requested_frames(tmp_path):
    levels = numbered(20, 64, 64)
    write_video(tmp_path / "clip.mp4", levels, fps=10)
    from_file, from_array = dataset(tmp_path), dataset([levels])
    contents = dataset([(tmp_path / "clip.mp4").read_bytes()])
    held = dataset(VideoCollection(tmp_path, in_memory=True))
    for index in range(5):
        expected = frame_numbers(from_array[index])
        for clips in (from_file, contents, held):
            assert frame_numbers(clips[index]) == expected


def test_folders_are_searched_recursively(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "sub/a.MKV", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert VideoCollection(tmp_path).names == ["b.mp4", "sub/a.MKV"]


def test_a_datasets_column_can_have_videos_of_any_kind():
    datasets = pytest.importorskip("datasets")
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        output = container.add_stream("libx264", rate=10)
        output.width, output.height, output.pix_fmt = 48, 48, "yuv420p"
        for frame in numbered(6, 48, 48):
            container.mux(output.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(output.encode())
    table = datasets.Dataset.from_dict({"clip": [{"bytes": stream.getvalue(), "path": None}]})
    assert frame_numbers(dataset(VideoCollection(table, column="clip"), max_stride=1)[0]) in (
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
    )
    pictures = datasets.Dataset.from_dict({"image": [Image.new("RGB", (48, 40), (90, 90, 90))]})
    pictures = pictures.cast_column("image", datasets.Image())
    assert frame_numbers(dataset(VideoCollection(pictures, column="image"))[0]) == [9, 9, 9, 9]


def test_an_unreadable_video_is_skipped_with_one_warning(tmp_path):
    for name in ("broken1.mp4", "broken2.mp4"):
        (tmp_path / name).write_bytes(b"nothing")
    write_video(tmp_path / "clip.mp4", numbered(6, 64, 64), fps=10)
    clips = dataset(tmp_path)
    with pytest.warns(UserWarning, match="left out") as warned:
        items = [clips[index] for index in range(6)]
    assert [str(warning.message).split(" cannot")[0] for warning in warned] == [
        "the video broken1.mp4",
        "the video broken2.mp4",
    ]
    assert clips.num_skipped == 2 and all(max(frame_numbers(item)) <= 5 for item in items)
    with pytest.warns(UserWarning, match="broken2.mp4 cannot be read and is left out"):
        assert VideoCollection(tmp_path, in_memory=True).num_skipped == 2
    (tmp_path / "clip.mp4").write_bytes(b"nothing")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="a video that can be read, but all 3 failed"):
        dataset(tmp_path)[0]


@pytest.mark.filterwarnings("ignore:.*is damaged or cut off")
def test_clips_of_a_damaged_video_have_the_decodable_frames(tmp_path):
    clips = dataset([FIXTURES / "videos" / "ftrunc_25.mp4"], max_stride=3)
    decoded = read_video(FIXTURES / "videos" / "ftrunc_25.mp4")[0]
    assert len(decoded) == 12
    expected = dataset([decoded], max_stride=3)
    for index in range(5):
        assert_items_equal(clips[index], expected[index])
    assert clips.num_skipped == 0


def test_a_video_with_fewer_frames_than_declared_is_not_skipped(tmp_path, monkeypatch):
    """As a long one does whose damage lies in the middle, which is not decoded beforehand."""
    write_video(tmp_path / "clip.mp4", numbered(8, 64, 64), fps=10)
    videos = VideoCollection(tmp_path)
    videos._lengths[0] = 30
    assert videos.read_clip(0, lambda total: range(total - 3, total)).shape == (3, 3, 64, 64)
    assert videos.read_clip(0, lambda total: range(0, 4, 2)).shape == (2, 3, 64, 64)
    assert videos.num_skipped == 0


def test_videos_skipped_by_workers_are_counted(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    write_video(tmp_path / "clip.mp4", numbered(6, 64, 64), fps=10)
    clips = dataset(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(list(DataLoader(clips, None, num_workers=2))) == 2
    assert clips.num_skipped == 1


def test_items_have_the_greedy_search_of_the_models_pixels():
    schedule = BudgetSchedule("uniform", ratio_max=0.6, threshold_share=0)
    item = dataset(augmentation=ClipAugmentation(), schedule=schedule)[1]
    pixels = AutoGazeVideoProcessor().to_pixels(item["pixel_values_videos"]).clamp(0, 1)
    counts = [len(ids) for ids in item["gazing_pos"]]
    labels = GreedyLabeller(CONFIG.grid, gazing_ratio=[count / 20 for count in counts])(pixels[None])[0]
    assert item["gazing_pos"][0][:4] == labels.gazing_pos[0][:4]
    for losses, expected in zip(item["task_losses"], labels.task_losses, strict=True):
        assert losses[0] == pytest.approx(expected[0], abs=1e-2)


def test_whole_frames_are_preprocessed_like_by_the_model():
    video = render_demo_clip(4, 90, 120)
    item = GazeClipDataset([video], CONFIG, num_frames=4)[0]
    seen = resize_frames(AutoGazeVideoProcessor()(video, return_tensors="pt")["pixel_values_videos"], 64)
    to_pixels = AutoGazeVideoProcessor().to_pixels
    expected = to_pixels(seen[0]).clamp(0, 1)  # upscaling exceeds 0..1
    torch.testing.assert_close(to_pixels(item["pixel_values_videos"]), expected, rtol=0, atol=1e-5)


def test_without_a_schedule_there_are_no_labels():
    assert dataset()[0].keys() == {"pixel_values_videos"}


def test_budgets_are_drawn_as_the_schedule_says():
    def draws(*arguments, frames=4, **kwargs):
        schedule, generator = BudgetSchedule(*arguments, **kwargs), seeded()
        return [schedule.draw(frames, generator) for _ in range(1000)]

    drawn = draws("fixed", ratio_min=0.3, dirichlet_share=0, threshold_share=0)
    assert all(ratios.tolist() == pytest.approx([0.3] * 4) and threshold is None for ratios, threshold in drawn)

    drawn = draws("uniform", ratio_min=0.1, ratio_max=0.5, dirichlet_share=0, threshold_share=1, threshold_min=0.4)
    means = torch.stack([ratios for ratios, _ in drawn])
    assert bool((means == means[:, :1]).all())
    assert 0.1 <= means.min() < 0.11 and 0.49 < means.max() <= 0.5 and abs(means.mean() - 0.3) < 0.02
    thresholds = torch.tensor([threshold for _, threshold in drawn])
    assert 0.4 <= thresholds.min() < 0.41 and 0.99 < thresholds.max() <= 1 and abs(thresholds.mean() - 0.7) < 0.02

    means = torch.stack([ratios.mean() for ratios, _ in draws("exponential", ratio_max=1, dirichlet_share=0)])
    assert 0.15 < means.mean() < 0.21 and means.median() < means.mean()  # the mean is about 1/6 + 0.02

    ratios = torch.stack([ratios for ratios, _ in draws("fixed", ratio_min=0.2, dirichlet_share=1)])
    assert ratios[:, 0].mean() / ratios[:, 1].mean() == pytest.approx(10 / 3, rel=0.1)
    assert abs(ratios.mean() - 0.2) < 0.01

    drawn = draws(dirichlet_share=0.5, threshold_share=0.3)
    assert abs(np.mean([threshold is not None for _, threshold in drawn]) - 0.3) < 0.05
    assert abs(np.mean([len(set(ratios.tolist())) > 1 for ratios, _ in drawn]) - 0.5) < 0.05


def test_labels_fill_whole_steps_without_a_threshold():
    settings = {"dirichlet_share": 1, "ratio_max": 1}
    clips = dataset([render_demo_clip(12, 64, 64)], schedule=BudgetSchedule(threshold_share=0, **settings))
    counts = {len(ids) for index in range(20) for ids in clips[index]["gazing_pos"]}
    assert len(counts) > 2 and all(count % 4 == 0 for count in counts) and max(counts) <= 20
    schedule = BudgetSchedule("fixed", ratio_min=1, threshold_share=1, threshold_min=1.0, threshold_max=1.0)
    for losses in dataset([render_demo_clip(12, 64, 64)], schedule=schedule)[0]["task_losses"]:
        assert losses[-1] <= 1.0 and all(loss > 1.0 for loss in losses[:-1])


def test_labels_from_a_file_have_the_frames_they_were_made_for(tmp_path):
    videos = [numbered(9, 64, 64), render_demo_clip(7, 64, 64), render_demo_clip(7, 64, 64, 3)]
    labeller = GreedyLabeller(CONFIG.grid, gazing_ratio=0.4)
    labels = read_labels(label_videos(VideoCollection(videos), labeller, tmp_path / "labels.json", num_frames=3))
    del labels["1"]
    clips = GazeClipDataset(videos, CONFIG, labels=labels)
    assert len(clips) == 2 and frame_numbers(clips[0]) == [0, 3, 6]
    item = clips[1]
    assert item["gazing_pos"] == labels["2"].gazing_pos and item["task_losses"] == labels["2"].task_losses
    pixels = AutoGazeVideoProcessor().to_pixels(item["pixel_values_videos"]).clamp(0, 1)
    for losses, expected in zip(labeller(pixels[None])[0].task_losses, item["task_losses"], strict=True):
        assert losses == pytest.approx(expected, abs=1e-2)
    assert clips.max_num_labels(1) == 24


def test_an_epoch_has_every_clip_once_and_the_next_has_new_clips():
    clips = dataset(schedule=BudgetSchedule(), clips_per_video=20)
    orders = [list(ClipSampler(clips, 4, seed=0, epoch=lambda epoch=epoch: epoch)) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != sorted(orders[0]) and sorted(orders[0]) == list(range(60))
    assert sorted(orders[2]) == list(range(60, 120))
    assert list(ClipSampler(clips, 4, seed=1, epoch=lambda: 0)) != orders[0]


def test_batches_have_clips_with_similar_numbers_of_labels():
    clips = dataset(schedule=BudgetSchedule(), clips_per_video=40)
    order = list(ClipSampler(clips, 4, seed=0, epoch=lambda: 0))

    def padding_share(order):
        lengths = torch.tensor([clips.max_num_labels(index) for index in order]).view(-1, 4)
        return float((lengths.amax(1, keepdim=True) - lengths).sum() / lengths.sum())

    assert padding_share(order) < 0.3 * padding_share(torch.randperm(120, generator=seeded()).tolist())
    lengths = [len(ids) for item in [clips[order[0]]] for ids in item["gazing_pos"]]
    assert sum(lengths) <= clips.max_num_labels(order[0])


def test_padding_in_a_batch_changes_no_score():
    torch.manual_seed(0)
    model = AutoGazeModel(CONFIG).double()
    clips = dataset(schedule=BudgetSchedule(dirichlet_share=1))
    items = [clips[index] for index in (0, 1, 4)]
    for item in items:
        item["pixel_values_videos"] = item["pixel_values_videos"].double()
    collate, called = (
        GazeCollator(CONFIG),
        ("pixel_values_videos", "gazing_pos", "if_padded_gazing", "num_gazing_each_frame"),
    )
    batch = collate(items)
    assert batch["num_gazing_each_frame"].tolist() == [
        max(map(len, ids)) for ids in zip(*(i["gazing_pos"] for i in items), strict=True)
    ]
    scores = model(**{key: batch[key] for key in called})
    for number, item in enumerate(items):
        alone = collate([item])
        assert not alone["if_padded_gazing"].any()
        real = ~batch["if_padded_gazing"][number]
        expected = model(**{key: alone[key] for key in called})
        torch.testing.assert_close(scores.log_action_probs[number, real], expected.log_action_probs[0])
        assert torch.equal(batch["labels"][number, real], alone["gazing_pos"][0])
        assert bool((batch["labels"][number, ~real] == -100).all())
        assert torch.equal(batch["task_loss_labels"][number, real], alone["task_loss_labels"][0])
        assert bool(batch["task_loss_labels"][number, ~real].isnan().all())


def test_all_frames_of_a_clip_are_augmented_alike():
    still = torch.from_numpy(render_demo_clip(2, 60, 80)[:1]).permute(0, 3, 1, 2).expand(3, -1, -1, -1)
    augmentation, varied = ClipAugmentation(still=0), set()
    for seed in range(20):
        pixels = augmentation(still, (32, 32), seeded(seed))
        assert pixels.shape == (3, 3, 32, 32) and 0 <= pixels.min() <= pixels.max() <= 1
        assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
        varied.add(float(pixels.mean()))
    assert len(varied) == 20


def test_crops_keep_their_share_at_any_position():
    rows, cols = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    levels = torch.stack([rows, cols, cols])[None].byte()
    augmentation = ClipAugmentation(min_crop=0.25, flip=0, colour=0, still=0)
    areas, tops = [], []
    for seed in range(200):
        pixels = augmentation(levels, (50, 50), seeded(seed)) * 255
        height, width = (float(x.max() - x.min()) + 2 for x in pixels[0, :2])
        areas.append(height * width / 200**2)
        tops.append(float(pixels[0, 0].min()))
        assert 0.5 < height / width < 2
    assert 0.2 < min(areas) < 0.35 and 0.85 < max(areas) < 1.1
    assert min(tops) < 5 and max(tops) > 50
    uncropped = ClipAugmentation(min_crop=1, flip=0, colour=0, still=0)(levels, (200, 200), seeded())
    assert float((uncropped[0, 0] * 255 - rows).abs().mean()) < 30  # only the aspect ratio varies


def test_flips_and_colours_stay_in_range():
    levels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    levels[..., :16] = 200
    shares = [ClipAugmentation(min_crop=1, colour=0, still=0, flip=flip) for flip in (0.0, 1.0)]
    pixels = [augmentation(levels, (32, 32), seeded()) for augmentation in shares]
    torch.testing.assert_close(pixels[0].flip(-1), pixels[1])
    assert float((pixels[0] - pixels[1]).abs().mean()) > 0.1
    bright = ClipAugmentation(min_crop=1, flip=0, still=0, colour=1.0)
    means = [float(bright(levels, (32, 32), seeded(seed)).mean()) for seed in range(30)]
    assert min(means) < 0.2 and max(means) > 0.5


def test_camera_motion_over_a_still_image_is_constant():
    picture = torch.from_numpy(render_demo_clip(2, 240, 320)[0]).permute(2, 0, 1)
    changes = []
    for seed in range(10):
        clip = pan_and_zoom(picture, 6, (64, 64), seeded(seed))
        assert clip.shape == (6, 3, 64, 64) and 0 <= clip.min() <= clip.max() <= 1
        changes.append((clip[1:] - clip[:-1]).abs().mean((1, 2, 3)))
    changes = torch.stack(changes)
    assert bool((changes > 0).all()) and float(changes.max()) < 0.15
    assert bool((changes.amax(1) < 3 * changes.amin(1)).all())
    flat = pan_and_zoom(torch.full((3, 50, 50), 90, dtype=torch.uint8), 3, (32, 32), seeded())
    torch.testing.assert_close(flat, torch.full_like(flat, 90 / 255))
    one = ClipAugmentation(still=1, flip=0, colour=0)(picture[None].expand(4, -1, -1, -1), (64, 64), seeded())
    assert not torch.equal(one[0], one[3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataset(num_frames=0), "`num_frames` must be a positive multiple of 1, got 0"),
        (lambda: dataset(max_stride=0), "`max_stride` must be a whole number of at least 1, got 0"),
        (lambda: dataset(clips_per_video=0.5), "`clips_per_video` must be a whole number of at least 1, got 0.5"),
        (lambda: dataset([]), "`videos` must hold at least one video, got none"),
        (lambda: dataset("no/such/folder"), "there is no folder 'no/such/folder'"),
        (lambda: dataset([np.zeros((2, 3, 4), np.uint8)])[0], "all 1 failed"),
        (
            lambda: dataset(labels={"x": ClipLabels([[0]], [[0.1]])}),
            "`labels` must name videos .* such as '0', got labels of 'x'",
        ),
        (lambda: dataset(labels={}, schedule=BudgetSchedule()), "`augmentation` and `schedule` must be None"),
        (lambda: BudgetSchedule("linear"), "`ratio_strategy` must be one of .* got 'linear'"),
        (
            lambda: BudgetSchedule(ratio_min=0.5, ratio_max=0.1),
            "`ratio_min` and `ratio_max` must lie in 0..1 in this order",
        ),
        (lambda: BudgetSchedule(ratio_decay=0), "`ratio_decay` must be above 0, got 0"),
        (lambda: BudgetSchedule(threshold_share=2), "`threshold_share` must lie in 0..1, a share of the clips, got 2"),
        (
            lambda: BudgetSchedule(threshold_min=2),
            "`threshold_min` and `threshold_max` must be two numbers in this order",
        ),
        (lambda: ClipAugmentation(min_crop=0), "`min_crop` must lie above 0 and not above 1"),
        (lambda: ClipAugmentation(colour=-1), "`colour` must lie in 0..1, got -1"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_invalid_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold videos .* found none"):
        VideoCollection(tmp_path)
