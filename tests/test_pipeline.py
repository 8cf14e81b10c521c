import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import pipeline

from transformers_autogaze import (
    GREEDY_SELECTOR,
    AutoGazeConfig,
    AutoGazeModel,
    AutoGazeProcessor,
    FeatureGazeModel,
    GazeGrid,
    GazeOutput,
    GreedyGazeConfig,
    GreedyGazeSelector,
    VideoTokenPruningPipeline,
    write_video,
)
from transformers_autogaze.pipeline_autogaze import gaze_clip_by_clip


@pytest.fixture(scope="module")
def prune() -> VideoTokenPruningPipeline:
    return pipeline("video-token-pruning", device="cpu")


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 9, 3), dtype=np.uint8)
    return coarse.repeat(10, axis=1).repeat(10, axis=2)


@pytest.fixture(scope="module")
def greedy() -> VideoTokenPruningPipeline:
    return pipeline("video-token-pruning", model=str(GREEDY_SELECTOR), device="cpu")


def test_the_default_keeps_a_quarter_of_the_tokens_of_a_clip_on_the_finest_scale(prune, video):
    assert type(prune.model) is FeatureGazeModel and type(prune.processor) is AutoGazeProcessor
    gaze = prune(video)["gaze"]
    assert gaze.scales == [224] and gaze.num_real.tolist() == [196]
    assert torch.equal(prune(video, clip_ratio=0.25)["gaze"].gazing_pos, gaze.gazing_pos)
    assert prune(video, tokens_per_clip=250)["gaze"].num_real.tolist() == [250]


def test_a_checkpoint_of_autogaze_is_named_by_its_folder(video, tmp_path):
    torch.manual_seed(0)
    expected = AutoGazeModel(AutoGazeConfig(scales=[32, 64], image_size=64))
    expected.save_pretrained(tmp_path)
    AutoGazeProcessor().save_pretrained(tmp_path)
    prune = pipeline("video-token-pruning", model=str(tmp_path), device="cpu")
    assert type(prune.model) is AutoGazeModel and not prune.model.training
    assert all(torch.equal(a, b) for a, b in zip(prune.model.parameters(), expected.parameters(), strict=True))
    with pytest.raises(ValueError, match="need a selector that knows what patches gain"):
        prune(video, clip_ratio=0.1)


def test_without_settings_the_four_scales_keep_what_26_db_need(greedy, video):
    expected = greedy(video, gazing_ratio=0.75, task_loss_requirement=0.7)["gaze"]
    assert torch.equal(greedy(video)["gaze"].gazing_pos, expected.gazing_pos)


def test_one_video_gives_its_gaze_records_and_statistics(prune, video):
    result = prune(video, gazing_ratio=0.1)
    gaze = result["gaze"]
    assert type(gaze) is GazeOutput and gaze.batch_size == 1 and gaze.num_frames == 4
    assert result["statistics"]["patches_each_frame"] == [19] * 4
    assert len(result["records"]) == 76
    assert result["records"][19]["frame"] == 1 and result["records"][19]["order"] == 0
    boxes = torch.tensor([record["box"] for record in result["records"]])
    torch.testing.assert_close(boxes, gaze.boxes(60, 90)[0])
    json.dumps([result["records"], result["statistics"]])
    assert set(result) == {"gaze", "records", "statistics"}


def test_the_gaze_is_what_processor_and_selector_give(greedy, video):
    inputs = AutoGazeProcessor()(videos=video, return_tensors="pt")
    expected = GreedyGazeSelector().generate(**inputs, gazing_ratio=0.5, task_loss_requirement=0.7)
    assert torch.equal(
        greedy(video, gazing_ratio=0.5, task_loss_requirement=0.7)["gaze"].gazing_pos, expected.gazing_pos
    )
    assert torch.equal(greedy(video)["gaze"].gazing_pos, GreedyGazeSelector().generate(**inputs).gazing_pos)


def test_patches_and_reconstruction_come_on_request(greedy, video):
    result = greedy(video, gazing_ratio=1.0, return_patches=True, return_reconstruction=True)
    assert result["patches"].shape == (4 * 265, 3, 16, 16)
    assert result["reconstruction"].shape == (4, 3, 224, 224)
    assert result["statistics"]["psnr"] == pytest.approx(100)  # all finest patches: exact
    first = result["patches"][result["gaze"].ids_each_frame()[0].tolist().index(69)]
    torch.testing.assert_close(first, result["reconstruction"][0, :, :16, :16], rtol=0, atol=1e-5)
    loose = greedy(video, gazing_ratio=0.01, return_reconstruction=True)
    assert loose["statistics"]["psnr"] < 30 and "patches" not in loose


def test_everything_that_the_processor_takes_is_taken(prune, video, tmp_path):
    path = write_video(tmp_path / "clip.mp4", iter(video), fps=10)
    from_file = prune(str(path), gazing_ratio=0.1)
    assert from_file["records"] == prune(path.read_bytes(), gazing_ratio=0.1)["records"]
    assert prune(path, num_frames=2)["gaze"].num_frames == 2
    assert prune(path, fps=5)["gaze"].num_frames == 2
    expected = prune(video, gazing_ratio=0.1)["records"]
    assert prune([Image.fromarray(frame) for frame in video], gazing_ratio=0.1)["records"] == expected
    assert prune(list(video), gazing_ratio=0.1)["records"] == expected
    assert prune(torch.from_numpy(video), gazing_ratio=0.1)["records"] == expected
    assert prune(torch.from_numpy(video).permute(0, 3, 1, 2) / 255, gazing_ratio=0.1)["records"] == expected


class Videos(Dataset):
    def __init__(self, videos):
        self.videos = videos

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        return self.videos[index]


def test_many_videos_give_what_each_gives_alone(prune, video):
    videos = [video, video[::-1].copy(), video[:3], video[:, :40]]
    alone = [prune(one)["records"] for one in videos]
    assert alone[0] != alone[1]
    for batch_size in (1, 3):
        assert [result["records"] for result in prune(videos, batch_size=batch_size)] == alone
    assert [result["records"] for result in prune(np.stack(videos[:2]), batch_size=2)] == alone[:2]
    assert [result["records"] for result in prune(iter(videos), batch_size=2)] == alone
    assert [result["records"] for result in prune(Videos(videos), batch_size=2, num_workers=1)] == alone
    assert [result["records"] for result in prune([video])] == alone[:1]


def test_defaults_of_the_pipeline_hold_until_a_call_changes_them(video):
    prune = pipeline("video-token-pruning", device="cpu", gazing_ratio=0.1, num_frames=2)
    assert prune(video)["statistics"]["patches_each_frame"] == [19, 19]
    assert prune(video, gazing_ratio=0.2)["statistics"]["patches_each_frame"] == [39, 39]


def test_a_gaze_for_another_encoder(prune, video):
    result = prune(
        video, gazing_ratio=0.1, target_scales=[56, 112, 196, 392], target_patch_size=14, return_patches=True
    )
    assert result["gaze"].grid == GazeGrid([56, 112, 196, 392], 14)
    assert result["patches"].shape[1:] == (3, 14, 14)


def test_a_published_checkpoint_and_a_loaded_model_work_as_well(tiny, tiny_model, video):
    from_folder = pipeline("video-token-pruning", model=str(tiny.folder), device="cpu", dtype=torch.float64)
    from_model = pipeline("video-token-pruning", model=tiny_model, device="cpu")
    inputs = AutoGazeProcessor()(videos=video, return_tensors="pt")["pixel_values_videos"].double()
    expected = tiny_model.generate(inputs, gazing_ratio=0.3).gazing_pos
    for prune in (from_folder, from_model):
        assert torch.equal(prune(video, gazing_ratio=0.3)["gaze"].gazing_pos, expected)


def test_long_videos_are_gazed_at_clip_by_clip(tiny_model):
    video = torch.randn(2, 37, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    schedule = [0.5] + [0.2] * 15
    gaze = gaze_clip_by_clip(tiny_model, video, gazing_ratio=schedule)
    assert gaze.num_gazing_each_frame.tolist() == [10, *[4] * 15] * 2 + [10, *[4] * 4]
    second = tiny_model.generate(video[:, 16:32], gazing_ratio=schedule)
    ids = gaze.gazing_pos[:, 70:140] - 16 * 21
    assert torch.equal(ids, second.gazing_pos)
    message = (
        r"`gazing_ratio` must be one number or 16 of them, one for each frame of a clip \(the video of 37 frames is gazed at "
        r"in clips of 16, and every clip takes the same numbers\), got 37"
    )
    with pytest.raises(ValueError, match=message):
        gaze_clip_by_clip(tiny_model, video, gazing_ratio=[0.5] * 37)
    with pytest.raises(ValueError, match="or 8 of them, one for each frame of the video, got 37"):
        gaze_clip_by_clip(tiny_model, video[:, :8], gazing_ratio=[0.5] * 37)


def test_the_greedy_selector_takes_a_long_video_as_one():
    selector = GreedyGazeSelector(GreedyGazeConfig(scales=[16, 32]))
    video = torch.zeros(1, 20, 3, 32, 32)
    gaze = gaze_clip_by_clip(selector, video, task_loss_requirement=0.5)
    assert gaze.num_real_each_frame.tolist() == [[1] * 20]


@pytest.mark.parametrize(
    ("bad", "arguments", "message"),
    [
        ([], {}, "at least one video"),
        ("missing.mp4", {}, "missing.mp4"),
        (b"no video at all", {}, "is not a video"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "at least one frame"),
        (np.zeros((2, 8, 8, 5), np.uint8), {}, "channels"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"gazing_ratio": 1.5}, "`gazing_ratio` must lie in 0..1"),
        (
            np.zeros((2, 8, 8, 3), np.uint8),
            {"gazing_ratio": [0.5] * 3},
            "`gazing_ratio` must be one number or 2 of them",
        ),
        (np.zeros((2, 8, 8, 3), np.uint8), {"num_frames": 3}, "`num_frames` must be at most 2"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"target_scales": [32, 64, 112, 224]}, "must be given together"),
    ],
)
def test_bad_input_is_named(prune, bad, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prune(bad, **arguments)


def test_a_bad_video_does_not_end_the_others(prune, video):
    with pytest.warns(UserWarning, match="a video is left out: .*none.mp4"):
        first, bad, last = prune([video, "none.mp4", video], batch_size=2)
    assert sorted(bad) == ["error"] and "none.mp4" in bad["error"]
    assert torch.equal(first["gaze"].gazing_pos, last["gaze"].gazing_pos)
    with pytest.warns(UserWarning):
        assert ["error" in item for item in prune(iter([b"", video]))] == [True, False]
    with pytest.raises(ValueError, match="give one of `num_frames` and `fps`"):
        prune([video, video], num_frames=2, fps=2)


def test_unknown_arguments_are_refused(prune, video):
    message = r'pipeline\("video-token-pruning"\) knows no argument gazing_rate; it takes gazing_ratio, .* batch_size'
    with pytest.raises(TypeError, match=message):
        prune(video, gazing_rate=0.1)
    with pytest.raises(TypeError, match=message):
        pipeline("video-token-pruning", device="cpu", gazing_rate=0.1)
