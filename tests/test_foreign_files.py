"""Files that this package did not write, or that are damaged: errors name the file, what it holds and what is expected."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from transformers_autogaze import GazeFile, GazeFileWriter, GazeGrid, GazeOutput
from transformers_autogaze.evaluation.feature_comparison import FeatureResults, FeatureRow
from transformers_autogaze.training.label_files import ClipLabels, UnfinishedLabels, read_labels, write_labels


CONTENTS = [
    ("no JSON", "it is no JSON"),
    ("[1, 2]", "got a list of 2 entries"),
    ("3", "got a number, 3"),
    ("null", "got null, null"),
    ("[" * 100_000, "it is no JSON"),
]


def read_results(path):
    return FeatureResults(path, {"encoder": "dinov2"})


@pytest.mark.parametrize(("content", "found"), CONTENTS)
@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (read_labels, 'labels, {video: {"gazing_pos": .., "task_losses": ..}}'),
        (read_results, "results of such a comparison"),
    ],
)
def test_json_of_another_kind_is_named(tmp_path, read, expected, content, found):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert all(text in str(error.value) for text in (str(path), expected, found))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"a": 1}, "got a number, 1 for 'a'"),
        ({"a.mp4": {"boxes": []}}, "got an object with the keys boxes for 'a.mp4'"),
        ({"settings": 3}, 'must hold an object as "settings", got a number, 3'),
        ({"a.mp4": {"gazing_pos": 1, "task_losses": [[0.5]]}}, "must hold a list of patches and one of losses"),
    ],
)
def test_labels_of_another_format_are_described(tmp_path, content, found):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        read_labels(path)
    assert str(path) in str(error.value) and "Error" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"no JSON\n", "it is no JSON"),
        (b"\xff\xfe\n", "it is no text"),
        (b"[1]\n", "got a list of 1 entries on the first line"),
        (b'{"settings": {}}\n3\n', "got a number, 3"),
        (b'{"settings": {}}\n["a.mp4", {}]\n', "got an empty object for 'a.mp4'"),
    ],
)
def test_a_file_in_the_place_of_unfinished_labels_is_kept(tmp_path, content, found):
    path = tmp_path / "labels.partial.jsonl"
    path.write_bytes(content + b"cut off")
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        UnfinishedLabels(tmp_path / "labels.json", {}, {})
    assert str(path) in str(error.value) and path.read_bytes() == content + b"cut off"


def test_unfinished_labels_are_resumed_without_a_line_that_was_cut_off(tmp_path):
    with UnfinishedLabels(tmp_path / "labels.json", {"num_frames": 1}, {}) as labels:
        labels.add({"a.mp4": ClipLabels([[0]], [[0.5]])})
    with labels.path.open("a") as file:
        file.write('["b.mp4", {"gaz')
    with UnfinishedLabels(tmp_path / "labels.json", {"num_frames": 1}, {}) as labels:
        labels.add({"c.mp4": ClipLabels([[1]], [[0.5]])})
    with UnfinishedLabels(tmp_path / "labels.json", {"num_frames": 1}, {}) as labels:
        assert list(labels.done) == ["a.mp4", "c.mp4"]
        write_labels(tmp_path / "labels.json", labels.done)
    assert read_labels(tmp_path / "labels.json") == labels.done


def test_results_of_another_format_are_described(tmp_path):
    path = tmp_path / "results.json"
    row = FeatureRow("a.mp4", "spread", "random", "evenly", 0.25, "frame", 784, 0.5, 0.4, 0.6, 0.0, 0.3)
    read_results(path).add([row])
    good = json.loads(path.read_text())
    for change, found in (
        ({"settings": []}, "got a list of 0 entries as 'settings'"),
        ({"statistics": [1]}, "got a list of 1 entries as 'statistics'"),
        ({"columns": ["clip"]}, "got ['clip']"),
        ({"rows": [[1, 2]]}, "12 values in each row"),
        ({"rows": [3]}, "12 values in each row"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=re.escape(found)) as error:
            read_results(path)
        assert str(path) in str(error.value)


@pytest.fixture
def gaze_json(tmp_path):
    with GazeFileWriter(frame_indices=[0, 30], frame_times=[0.0, 1.0]) as writer:
        writer.add([{"frame": 1, "scale": 32, "id": 3, "box": [50, 50, 100, 100], "order": 0}])
        writer.write(tmp_path / "gaze.json", GazeGrid([32], patch_size=16), extent=(100, 100))
    return tmp_path / "gaze.json"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[1]", "with a list"),
        ('{"a": 1}', "with the version None instead of a whole number"),
        ('{"version": 1, "format": "other"}', "with the format 'other' instead of 'autogaze.gaze'"),
        ('{"version": 1}', "without `grid`, `frame_indices`, `records`"),
        ('{"version": 1, "grid": {}, "frame_indices": [], "records": []}', "without `grid.scales`, `grid.patch_size`"),
    ],
)
def test_json_that_is_no_gaze_is_described(tmp_path, content, found):
    path = tmp_path / "gaze.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        GazeFile.read(path)
    assert str(path) in str(error.value)


def test_a_damaged_gaze_json_is_described(gaze_json):
    good = json.loads(gaze_json.read_text())
    for change, found in (
        ({"records": [{"frame": 0, "id": 1}]}, "without `records[0].order`"),
        ({"records": [{"frame": 7, "id": 1, "order": 0}]}, "`records` must be of 2 frames of 4 patches"),
        ({"grid": good["grid"] | {"scales": [{}]}}, "must be a whole gaze.json"),
    ):
        gaze_json.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=re.escape(found)) as error:
            GazeFile.read(gaze_json)
        assert str(gaze_json) in str(error.value)
    gaze_json.write_text(json.dumps({key: value for key, value in good.items() if key != "frame_times"}))
    with pytest.raises(ValueError, match="without time stamps"):
        GazeFile.read(gaze_json).frame_at(1.0)


def test_safetensors_that_are_no_gaze_are_described(tmp_path):
    path = tmp_path / "gaze.safetensors"
    facts_of_a_gaze = {"version": 1, "scales": [32], "patch_size": 16, "frame_sampling_rate": 1}
    facts_of_a_gaze |= {"num_vision_tokens_each_frame": 4, "first_frame": 0}
    for metadata, found in (
        ({}, "with no facts about a gaze"),
        ({"version": 1}, "without scales, patch_size"),
        (facts_of_a_gaze, "with the tensors weight"),
    ):
        facts = {"autogaze.gaze": json.dumps(metadata)} if metadata else None
        save_file({"weight": torch.zeros(2)}, path, metadata=facts)
        with pytest.raises(ValueError, match=found) as error:
            GazeOutput.load(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("settings.json", b"[]", "got a list of 0 entries"),
        ("settings.json", b'{"version": 1}', "got an object with the keys version"),
        ("settings.json", b'{"version": 1, "settings": []}', "got a list of 0 entries as 'settings'"),
        ("shard-00000.parquet", b"no table", "must be a whole Parquet table"),
    ],
)
def test_files_of_a_pruned_folder_are_described(tmp_path, name, content, found):
    pytest.importorskip("pyarrow")
    from transformers_autogaze.dataset_pruning.shards import PrunedFolder

    (tmp_path / "settings.json").write_text('{"version": 1, "settings": {}}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        PrunedFolder(tmp_path, {}).finished()
    assert str(tmp_path / name) in str(error.value)


def test_a_table_that_is_no_shard_is_described(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    from transformers_autogaze.dataset_pruning import read_rows

    pq.write_table(pa.table({"names": ["a"]}), tmp_path / "shard-00000.parquet")
    with pytest.raises(ValueError, match="but identity, error, .* are missing; it has names") as error:
        read_rows(tmp_path)
    assert str(tmp_path / "shard-00000.parquet") in str(error.value)
    with pytest.raises(ValueError, match="but ids, identity are missing"):
        read_rows(tmp_path, ["ids"])


def write_array(path: Path) -> None:
    np.save(path, np.zeros(3))


@pytest.mark.parametrize(
    ("name", "damage", "found"),
    [
        ("settings.json", lambda path: path.write_text("[]"), "got a list of 0 entries"),
        ("features.npy", lambda path: path.write_text("no array"), "must hold an array"),
        ("features.npy", lambda path: path.unlink(), "must hold an array"),
        ("features.npy", write_array, "got float64 of the shape (3,)"),
        ("components.safetensors", lambda path: path.write_text("no tensors"), "must hold components"),
        ("components.safetensors", lambda path: save_file({"a": torch.zeros(2)}, path), "got {'a': (2,)}"),
    ],
)
def test_files_of_a_cache_of_features_are_described(tmp_path, name, damage, found):
    pytest.importorskip("accelerate")
    from transformers import Dinov2Config, Dinov2Model

    from transformers_autogaze import write_video
    from transformers_autogaze.training.crops import find_sources
    from transformers_autogaze.training.teacher_features import TeacherFeatures
    from transformers_autogaze.training.teachers import load_teacher

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    Dinov2Model(config).save_pretrained(tmp_path / "encoder")
    frames = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    sources = find_sources([write_video(tmp_path / "a.mp4", iter(frames), fps=5)])

    def fill() -> None:
        TeacherFeatures(load_teacher(tmp_path / "encoder", [2]), sources, [1], 4, tmp_path / "cache").fill()

    fill()
    damage(tmp_path / "cache" / name)
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        fill()
    assert str(tmp_path / "cache" / name) in str(error.value)
