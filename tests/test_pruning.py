import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_autogaze import (
    AutoGazeProcessor,
    GazeFile,
    GreedyGazeConfig,
    GreedyGazeSelector,
    OpenedVideo,
    gaze_video,
    prune_video,
    read_video,
    stream_gaze,
    write_video,
)
from transformers_autogaze.video.demo import render_demo_clip


SETTINGS = {"gazing_ratio": 0.4, "task_loss_requirement": 0.5}


@pytest.fixture(scope="module")
def selector():
    return GreedyGazeSelector(GreedyGazeConfig([16, 32], 8))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (8, 13, 3), np.uint8)
    still = blocks.repeat(5, 0).repeat(5, 1)[:36, :64]
    return np.stack([np.roll(still, 2 * index, axis=1) for index in range(22)])


@pytest.fixture(scope="module")
def path(frames, tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, fps=10)


def ids_of(gaze) -> list[list[int]]:
    return [ids.tolist() for ids in gaze.ids_each_frame()]


@pytest.mark.parametrize("tiles", [{"tiles": "whole"}, {"tiles": "grid", "max_tiles": 2}, {"tiles": "native"}])
def test_pruning_keeps_what_the_selector_chooses(selector, path, tiles):
    pruning = prune_video(path, selector, num_frames=20, **tiles, **SETTINGS)
    gaze = gaze_video(selector, path, num_frames=20, **tiles, **SETTINGS)
    assert ids_of(pruning.gaze) == ids_of(gaze) and pruning.gaze.scales == gaze.scales
    for key, value in gaze.statistics().items():
        assert pruning.statistics[key] == (pytest.approx(value) if isinstance(value, float) else value)
    assert pruning.frame_indices == OpenedVideo(path, num_frames=20).metadata.frames_indices
    assert pruning.frame_times == [index / 10 for index in pruning.frame_indices]
    assert len(pruning.psnr_each_frame) == 20 and min(pruning.psnr_each_frame) < pruning.statistics["psnr"]


@pytest.mark.parametrize("tiles", [{"tiles": "whole"}, {"tiles": "grid", "max_tiles": 2}, {"tiles": "native"}])
def test_results_do_not_depend_on_the_order_in_which_they_are_used(selector, path, tiles):
    def pruning():
        return prune_video(path, selector, num_frames=17, **tiles, **SETTINGS)

    def answers(pruning):
        yield "gaze", lambda: ids_of(pruning.gaze)
        yield "overlay", lambda: np.stack(list(pruning.overlay())).tobytes()
        yield "sheet", lambda: np.asarray(pruning.contact_sheet()).tobytes()
        yield "statistics", lambda: pruning.statistics
        yield "patches", lambda: [(kept.pixels.tolist(), kept.ids.tolist()) for kept in pruning.kept_patches()]

    one = pruning()
    together = {name: answer() for name, answer in answers(one)}
    for name, _ in answers(one):
        assert dict(answers(pruning()))[name]() == together[name]


def test_an_unfinished_iteration_is_started_again(selector, path):
    pruning = prune_video(path, selector, **SETTINGS)
    next(pruning.overlay())
    next(pruning.chunks())
    assert ids_of(pruning.gaze) == ids_of(gaze_video(selector, path, **SETTINGS))


def test_saved_files_agree_with_the_pruning(selector, path, tmp_path):
    pruning = prune_video(path, selector, title="a clip", selector_name="greedy", **SETTINGS)
    pruning.save(tmp_path)
    file = GazeFile.read(tmp_path / "gaze.json")
    assert ids_of(file.gaze) == ids_of(pruning.gaze)
    assert file.facts["frame_indices"] == pruning.frame_indices and file.facts["settings"] == SETTINGS
    assert file.facts["video"] == "a clip" and file.facts["selector"] == "greedy"
    # JSON changes only keys and tuples.
    assert file.facts["statistics"] == json.loads(json.dumps(pruning.statistics))
    records = [{key: record[key] for key in ("frame", "scale", "id", "box", "order")} for record in file.records]
    assert records == list(pruning.records())
    overlay, metadata = read_video(tmp_path / "overlay.mp4")
    assert len(overlay) == 22 and metadata.fps == 10
    assert np.array_equal(Image.open(tmp_path / "contact_sheet.png"), pruning.contact_sheet())


def test_kept_patches_are_those_of_an_encoder(selector, frames):
    pruning = prune_video(frames, selector, **SETTINGS)
    kept = list(pruning.kept_patches())
    assert [patches.ids.tolist() for patches in kept] == ids_of(pruning.gaze)
    assert [patches.frame for patches in kept] == list(range(22))
    inputs = AutoGazeProcessor()(videos=frames, return_tensors="pt")["pixel_values_videos"]
    pixels = AutoGazeProcessor().video_processor.to_pixels(inputs)
    small = torch.nn.functional.interpolate(pixels[0], size=(32, 32), mode="bicubic").clamp(0, 1)
    expected = pruning.gaze.gather_patches(small[None])[0].clamp(0, 1) * 255
    assert (torch.cat([patches.pixels for patches in kept]) - expected).abs().max() <= 0.51


def test_without_quality_nothing_is_measured(selector, path, tmp_path):
    pruning = prune_video(path, selector, measures_quality=False, **SETTINGS)
    pruning.save(tmp_path, overlay=False)
    assert "psnr" not in pruning.statistics
    with pytest.raises(ValueError, match="`measures_quality` must be True"):
        _ = pruning.psnr_each_frame


def test_progress_is_reported_and_its_errors_end_the_pruning(selector, path, tmp_path):
    reported = []
    prune_video(path, selector, progress=lambda *done: reported.append(done), **SETTINGS).save(tmp_path / "whole")
    assert reported == [(16, 22), (22, 22)]

    def stop(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        prune_video(path, selector, progress=stop, **SETTINGS).save(tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()


def test_a_source_that_is_read_once_is_pruned_and_drawn(selector, path):
    class Pipe:
        def __init__(self):
            self.file = open(path, "rb")  # noqa: SIM115

        def read(self, size=-1):
            return self.file.read(size)

    pruning = prune_video(Pipe(), selector, **SETTINGS)
    assert ids_of(pruning.gaze) == ids_of(gaze_video(selector, path, **SETTINGS))
    assert len(list(pruning.overlay())) == 22


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("missing.mp4", {}, "there is no 'missing.mp4'"),
        (iter([np.zeros((8, 8, 3), np.uint8)]), {}, "frames whose number is known"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"gazing_ratio": 2}, "`gazing_ratio` must lie in 0..1"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"tiles": "half"}, "`tiles` must be one of"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"num_frames": 4}, "`num_frames` must be at most 3"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"tokens_per_second": 9.0}, "`frame_rate` must be given"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"frame_rate": 0}, "`frame_rate` must be a number above 0"),
    ],
)
def test_wrong_arguments_are_reported_at_once(selector, source, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prune_video(source, selector, **options)


@pytest.mark.parametrize(
    "options",
    [{"num_frames": np.int64(4)}, {"frame_rate": np.float32(5)}, {"tiles": "grid", "max_tiles": np.int64(2)}],
)
def test_numbers_of_numpy_give_what_plain_numbers_give(selector, path, tmp_path, options):
    given = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    for folder, values in {"numpy": options, "plain": given}.items():
        pruning = prune_video(path, selector, title="clip", **values, **SETTINGS)
        pruning.save(tmp_path / folder)
        assert {type(index) for index in pruning.frame_indices} == {int}
    texts = [(tmp_path / folder / "gaze.json").read_text() for folder in ("numpy", "plain")]
    assert texts[0] == texts[1]
    (chunk,) = stream_gaze(selector, path, start_frame=np.int64(20), **SETTINGS)
    assert (type(chunk.start), type(chunk.stop)) == (int, int)


def test_an_overlay_of_frames_has_the_given_rate(selector, frames, tmp_path):
    prune_video(frames, selector, frame_rate=5, **SETTINGS).save(tmp_path)
    assert read_video(tmp_path / "overlay.mp4")[1].fps == 5


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {"gazing_ratio": 0.75, "task_loss_requirement": 0.7}),
        ({"gazing_ratio": 0.5, "task_loss_requirement": 0.3}, {"gazing_ratio": 0.5, "task_loss_requirement": 0.3}),
        ({"gazing_ratio": 0.5, "clip_ratio": 0.2}, {"clip_ratio": 0.2}),
    ],
)
def test_without_settings_those_of_the_configuration_are_used(frames, config, settings):
    selector = GreedyGazeSelector(GreedyGazeConfig([16, 32], 8, **config))
    assert prune_video(frames, selector).settings == settings


def test_an_opened_video_determines_the_frames_taken(selector, path):
    with pytest.raises(ValueError, match="`num_frames` and `fps` must be those of the OpenedVideo"):
        prune_video(OpenedVideo(path), selector, num_frames=3)


def test_the_examples_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("video.mp4", render_demo_clip(num_frames=32, height=96, width=128), fps=16)
    guide = (Path(__file__).parents[1] / "docs" / "pruning.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "pruning.md", "exec"), names)
    assert names["pruning"].frame_indices == [0, 8, 16, 24]
    assert names["patches"].pixels.shape[1:] == (3, 16, 16) and Path("pruned", "gaze.json").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("selector", GreedyGazeSelector),
        ("selector", "greedy"),
        ("processor", "published"),
        ("progress", 5),
        ("title", 5),
        ("task_loss_requirement", float("inf")),
        ("clip_ratio", [0.5, 0.5]),
    ],
)
def test_arguments_of_wrong_types_are_refused_at_once(name, value):
    arguments = {"source": np.zeros((2, 32, 32, 3), np.uint8), "selector": GreedyGazeSelector(), name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        prune_video(**arguments)


@pytest.mark.parametrize(
    "number", [np.float32(0.5), torch.tensor(0.5), np.array(0.5)], ids=["scalar", "tensor", "array"]
)
def test_numbers_and_names_of_any_kind_are_written(number, tmp_path):
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    pruning = prune_video(frames, GreedyGazeSelector(), clip_ratio=number, title=tmp_path, selector_name=tmp_path)
    pruning.save(tmp_path / "saved", overlay=False)
    assert pruning.settings == {"clip_ratio": 0.5}
    written = json.loads((tmp_path / "saved" / "gaze.json").read_text())
    assert written["video"] == written["selector"] == str(tmp_path)
