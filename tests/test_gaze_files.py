"""Gazes on disk, in batches and on a screen."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from transformers_autogaze import GazeFile, GazeFileWriter, GazeGrid, GazeOutput, GreedyGazeSelector, read_video
from transformers_autogaze.cli import main
from transformers_autogaze.video import write_video


GRID = GazeGrid([32, (64, 96)], patch_size=16)


def random_gaze(batch_size: int = 1, num_frames: int = 3, seed: int = 0, **fields) -> GazeOutput:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(batch_size, num_frames, n, generator=generator) < 0.4 for n in GRID.num_patches_each_scale]
    return GazeOutput.from_masks(masks, GRID, **fields)


def assert_same(gaze: GazeOutput, other: GazeOutput) -> None:
    assert gaze.keys() == other.keys()
    for key, value in gaze.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    frames = np.random.default_rng(0).integers(0, 256, (8, 5, 7, 3), dtype=np.uint8).repeat(13, 1).repeat(13, 2)
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", iter(frames), fps=10)


def test_a_gaze_is_printed_in_one_short_line():
    gaze = random_gaze(batch_size=2, num_frames=64)
    kept = int(gaze.num_real.sum())
    assert repr(gaze) == (
        f"GazeOutput(2 clips of 64 frames, {kept} of {2 * 64 * 28} patches kept ({kept / (2 * 64 * 28):.1%}), "
        "scales=[32, (64, 96)], patch_size=16)"
    )
    assert "1 clip of 3 frames from frame 5 of a stream" in repr(random_gaze(first_frame=5))
    assert repr(GazeOutput()) == "GazeOutput(fields: none)"


def test_a_notebook_shows_a_table_and_a_picture():
    gaze = random_gaze(batch_size=10, num_frames=300)
    html = gaze._repr_html_()
    assert html.count("<tr>") == 9 and "and 2 more clips" in html and len(html) < 120_000
    nothing = GazeOutput.from_masks(
        [torch.zeros(1, 2, n, dtype=torch.bool) for n in GRID.num_patches_each_scale], GRID
    )
    assert "inf" not in nothing._repr_html_() and "<code>" in GazeOutput()._repr_html_()
    frames = np.full((300, 64, 96, 3), 200, np.uint8)
    picture = gaze.plot(frames, clip=3, max_frames=4)
    assert isinstance(picture, Image.Image) and picture.width == 4 + 4 * 100
    with pytest.raises(ValueError, match="`frames` must be 300"):
        gaze.plot(frames[:5])


@pytest.mark.parametrize("rate", [1, 2])
def test_a_saved_gaze_is_the_same_again(tmp_path, rate):
    gaze = random_gaze(batch_size=3, frame_sampling_rate=rate, first_frame=4)
    gaze = gaze.replace(task_loss_prediction=torch.randn(gaze.gazing_pos.shape), cache=object())
    for name, one in {"batch": gaze, "clip": gaze.select(1)}.items():
        one.save(tmp_path / f"{name}.safetensors")
        assert_same(GazeOutput.load(tmp_path / f"{name}.safetensors"), one.replace(cache=None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.safetensors", "clip.safetensors"]


def test_a_failed_save_leaves_the_last_good_file(tmp_path):
    path = tmp_path / "gaze.json"
    for fps in (10.0, float("inf")):
        with GazeFileWriter([0, 1]) as writer:
            writer.add([{"frame": 0, "scale": 32, "id": 1, "box": [0, 0, 1, 1], "order": 0}])
            if fps == 10:
                writer.write(path, GRID, (64, 96), fps=fps)
            else:
                with pytest.raises(ValueError, match="JSON"):
                    writer.write(path, GRID, (64, 96), fps=fps)
    assert GazeFile.read(path).facts["fps"] == 10 and list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_gaze_are_refused(tmp_path):
    for name, text in {
        "a.json": "{",
        "b.json": "[]",
        "c.json": '{"version": 1, "records": []}',
        "d.safetensors": "x",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="`path` must be"):
            GazeOutput.load(tmp_path / name)
    (tmp_path / "new.json").write_text('{"format": "autogaze.gaze", "version": 99}')
    with pytest.raises(ValueError, match="of version 1 or before, got 99"):
        GazeOutput.load(tmp_path / "new.json")
    with pytest.raises(ValueError, match="end in .safetensors"):
        random_gaze().save(tmp_path / "gaze.pt")


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("fps", "x", "number or null"),
        ("width", True, "number or null"),
        ("video", 3, "text or null"),
        ("grid", [1], "object"),
        ("grid.patch_size", "16", "whole number of at least 1"),
        ("grid.frame_sampling_rate", 0, "whole number of at least 1"),
        ("frame_indices", [0, "1"], "list of whole numbers"),
        ("frame_times", "now", "list of numbers or null"),
        ("records", {}, "list"),
        ("records[0].order", 0.5, "whole number"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, field, value, kind):
    with GazeFileWriter([0, 1], [0.0, 0.1]) as writer:
        writer.add([{"frame": 0, "scale": 32, "id": 1, "box": [0, 0, 1, 1], "order": 0}])
        writer.write(tmp_path / "gaze.json", GRID, (64, 96), fps=10.0, width=96)
    facts = json.loads((tmp_path / "gaze.json").read_text())
    holder = facts["records"][0] if field.startswith("records[") else facts["grid"] if "." in field else facts
    holder[field.rpartition(".")[2]] = value
    (tmp_path / "gaze.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=re.escape(f"must be of the type {kind}, got {value!r}")) as error:
        GazeFile.read(tmp_path / "gaze.json")
    assert f"`{field}`" in str(error.value)


@pytest.mark.parametrize("arguments", [["--num-frames", "4"], ["--selector", "greedy", "--tiles", "native"]])
def test_the_package_reads_the_gaze_json_that_it_wrote(clip, tmp_path, arguments):
    assert main(["prune", str(clip), *arguments, "-o", str(tmp_path)]) == 0
    file = GazeFile.read(tmp_path / "gaze.json")
    facts, gaze = file.facts, file.gaze
    assert (facts["format"], facts["version"], facts["video"]) == ("autogaze.gaze", 1, str(clip))
    assert (facts["fps"], facts["width"], facts["height"]) == (10, 91, 65) or facts["width"] == 92
    assert gaze.num_real.tolist() == [facts["statistics"]["num_patches"]]
    assert gaze.statistics()["patches_each_frame"] == facts["statistics"]["patches_each_frame"]
    assert {key.partition(".")[2] for key in facts["units"] if key.startswith("records.")} == set(file.records[0])
    for record in file.records:
        index = facts["frame_indices"][record["frame"]]
        assert record["frame_index"] == index and record["time"] == pytest.approx(index / 10)
        assert file.frame_at(record["time"]) == record["frame"]
    # Boxes come from the grid and what it spans, but for the frame's end.
    boxes, extent = gaze.boxes(*facts["grid"]["extent"])[0], (facts["width"], facts["height"]) * 2
    written = torch.tensor([record["box"] for record in file.records])
    torch.testing.assert_close(boxes.minimum(torch.tensor(extent)), written)
    assert_same(GazeOutput.load(tmp_path / "gaze.json"), gaze)
    assert gaze.plot(read_video(clip, num_frames=len(facts["frame_indices"]))[0], max_frames=2).width > 90


def test_the_order_of_choice_is_read_back(tmp_path):
    video = torch.randn(1, 2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    gaze = GreedyGazeSelector().generate(video, gazing_ratio=0.1)
    from transformers_autogaze import AutoGazeProcessor

    with GazeFileWriter([3, 7]) as writer:
        writer.add(AutoGazeProcessor().post_process_gaze(gaze, (100, 100))[0])
        writer.write(tmp_path / "gaze.json", gaze.grid, (100, 100))
    file = GazeFile.read(tmp_path / "gaze.json")
    assert torch.equal(file.gaze.gazing_pos, gaze.gazing_pos)
    with pytest.raises(ValueError, match="without time stamps"):
        file.frame_at(0.5)


def test_stacking_is_the_inverse_of_selecting():
    gaze = random_gaze(batch_size=3, task_loss_requirement=torch.rand(3, 3))
    gaze = gaze.replace(log_action_probs=torch.randn(gaze.gazing_pos.shape) * ~gaze.if_padded_gazing)
    assert_same(GazeOutput.stack([gaze.select(clip) for clip in range(3)]), gaze)
    assert_same(GazeOutput.stack([gaze.select(0), GazeOutput.stack([gaze.select(1), gaze.select(2)])]), gaze)
    with pytest.raises(ValueError, match=r"`gazes\[1\].num_frames` is 2"):
        GazeOutput.stack([random_gaze(), random_gaze(num_frames=2)])
    with pytest.raises(ValueError, match="at least one gaze"):
        GazeOutput.stack([])


def test_a_data_loader_stacks_the_gazes_of_its_samples():
    gazes = [random_gaze(seed=seed) for seed in range(4)]
    samples = [{"gaze": gaze, "labels": number} for number, gaze in enumerate(gazes)]
    batches = list(DataLoader(samples, batch_size=2))
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert_same(batches[1]["gaze"], GazeOutput.stack(gazes[2:]))


def test_nothing_kept_has_no_infinite_figure():
    nothing = GazeOutput.from_masks(
        [torch.zeros(1, 2, n, dtype=torch.bool) for n in GRID.num_patches_each_scale], GRID
    )
    assert nothing.statistics()["reduction_factor"] is None
    json.dumps(nothing.statistics(), allow_nan=False)
