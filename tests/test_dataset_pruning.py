"""Pruning of datasets without Ray: listing and reading videos, rows, shards and tars, and one worker."""

import io
import json
import os
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import torch

from transformers_autogaze import GreedyGazeConfig, GreedyGazeSelector, prune_video, write_video
from transformers_autogaze.dataset_pruning import PruneSettings, gaze_of_row, prune_to_row, read_rows
from transformers_autogaze_cli import main


pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
fsspec = pytest.importorskip("fsspec")
inputs = pytest.importorskip("transformers_autogaze.dataset_pruning.inputs")
reading = pytest.importorskip("transformers_autogaze.dataset_pruning.reading")
shards = pytest.importorskip("transformers_autogaze.dataset_pruning.shards")
worker = pytest.importorskip("transformers_autogaze.dataset_pruning.worker")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of three videos, one of them in a subfolder, and a text file."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "more").mkdir()
    for number, name in enumerate(["b.mp4", "a.mp4", "more/c.MP4"]):
        frames = np.random.default_rng(number).integers(0, 256, (6, 8, 13, 3), np.uint8).repeat(5, 1).repeat(5, 2)
        frames[3:] = frames[3]
        write_video(folder / "clip.mp4", frames, fps=10)
        (folder / "clip.mp4").rename(folder / name)
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def selector():
    return GreedyGazeSelector(GreedyGazeConfig([16, 32], 8))


def names_of(plan):
    return plan["identity"].to_pylist()


def ids_of(gaze):
    return [ids.tolist() for ids in gaze.ids_each_frame()]


def columns_of(clips, kind):
    paths = [clips / "a.mp4", clips / "more" / "c.MP4"]
    return {
        "paths": ["a.mp4", "more/c.MP4"],
        "bytes": [path.read_bytes() for path in paths],
        "both": [{"bytes": paths[0].read_bytes(), "path": None}, {"bytes": None, "path": "more/c.MP4"}],
    }[kind]


def test_folders_and_patterns_name_videos_by_their_paths(clips):
    assert names_of(inputs.plan_videos(str(clips))) == ["a.mp4", "b.mp4", "more/c.MP4"]
    assert names_of(inputs.plan_videos(f"file://{clips}")) == ["a.mp4", "b.mp4", "more/c.MP4"]
    assert names_of(inputs.plan_videos(str(clips / "*.mp4"))) == ["a.mp4", "b.mp4"]
    assert names_of(inputs.plan_videos(str(clips / "**" / "c.*"))) == ["more/c.MP4"]
    plan = inputs.plan_videos(str(clips / "b.mp4"))
    assert names_of(plan) == ["b.mp4"] and plan["address"].to_pylist() == [str(clips / "b.mp4")]


def test_a_folder_may_be_a_url_that_fsspec_opens(clips):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/videos/{name}": (clips / name).read_bytes() for name in ("a.mp4", "b.mp4")})
    plan = inputs.plan_videos("memory://videos")
    assert names_of(plan) == ["a.mp4", "b.mp4"]
    contents = [video.contents for video in reading.read_plan(plan)]
    assert contents == [(clips / name).read_bytes() for name in ("a.mp4", "b.mp4")]


def test_relative_paths_in_a_list_start_from_its_folder(clips):
    (clips / "list.txt").write_text(f"a.mp4\n\n{clips}/b.mp4\na.mp4\nhttps://example.com/c.mp4\n")
    plan = inputs.plan_videos(str(clips / "list.txt"))
    assert names_of(plan) == ["a.mp4", f"{clips}/b.mp4", "https://example.com/c.mp4"]
    assert plan["address"].to_pylist() == [f"{clips}/a.mp4", f"{clips}/b.mp4", "https://example.com/c.mp4"]


@pytest.mark.parametrize("kind", ["paths", "bytes", "both"])
@pytest.mark.parametrize("format", ["parquet", "lance"])
def test_tables_hold_paths_contents_or_both(clips, kind, format):
    table = pa.table({"clip": columns_of(clips, kind), "number": [7, 8]})
    path = str(clips / f"{kind}.{format}")
    if format == "lance":
        pytest.importorskip("lance").write_dataset(table, path)
    else:
        pq.write_table(table, path, row_group_size=1)
    plan = inputs.plan_videos(path, "clip")
    assert names_of(plan) == (
        ["a.mp4", "more/c.MP4"] if kind == "paths" else [f"{kind}.{format}#0", f"{kind}.{format}#1"]
    )
    assert names_of(inputs.plan_videos(path, "clip", "number")) == ["7", "8"]
    for video, name in zip(reading.read_plan(plan, "clip"), ("a.mp4", "more/c.MP4"), strict=True):
        with reading.video_source(video) as source:
            found = source if isinstance(source, bytes) else open(source, "rb").read()
        assert found == (clips / name).read_bytes()


def test_some_rows_of_a_table_are_read(clips, tmp_path):
    values = [f"contents of {number}".encode() for number in range(9)]
    values[4] = None
    pq.write_table(pa.table({"video": values}), tmp_path / "table.parquet", row_group_size=4)
    plan = inputs.plan_videos(str(tmp_path / "table.parquet"))
    assert list(inputs.split_plan(plan, 2)) == [(0, 4), (4, 8), (8, 9)]
    some = plan.take([2, 3, 4, 8])
    assert [video.contents for video in reading.read_plan(some)] == [values[number] for number in (2, 3, 4, 8)]
    assert [video.identity for video in reading.read_plan(some)][-1] == "table.parquet#8"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "there is no 'nowhere'"),
        ("{clips}/*.avi", {}, "no file is like"),
        ("{empty}", {}, "which holds no video"),
        ("{empty}/list.txt", {}, "which names no video"),
        ("{empty}/data.csv", {}, "INPUT must be a folder of videos, a pattern"),
        ("{empty}/table.parquet", {}, "`--video-column` must be one of the columns name, twice, gap of"),
        ("{empty}/table.parquet", {"video_column": "twice"}, "has the type int64"),
        ("{empty}/table.parquet", {"video_column": "name", "id_column": "who"}, "`--id-column` must be one of"),
        (
            "{empty}/table.parquet",
            {"video_column": "name", "id_column": "twice"},
            "a different value for each video, but 'twice' has '1'",
        ),
        ("{empty}/table.parquet", {"video_column": "name", "id_column": "gap"}, "has rows without a value"),
        ("{empty}/bad.parquet", {}, "must be a Parquet table"),
    ],
)
def test_a_source_without_videos_is_refused(clips, tmp_path, source, options, message):
    (tmp_path / "list.txt").write_text("\n")
    (tmp_path / "data.csv").write_text("a,b\n")
    table = pa.table({"name": ["a", "b"], "twice": [1, 1], "gap": ["x", None]})
    if source.endswith("parquet"):
        pq.write_table(table, tmp_path / "table.parquet")
        (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises((ValueError, FileNotFoundError), match=".*") as caught:
        inputs.plan_videos(source.format(clips=clips, empty=tmp_path), **options)
    assert message in str(caught.value)


class FlakyFiles(fsspec.AbstractFileSystem):
    """Files whose reads fail as often as their names say."""

    protocol = "flaky"
    opens: dict[str, int] = {}

    def _open(self, path, mode="rb", **kwargs):
        self.opens[path] = self.opens.get(path, 0) + 1
        if "missing" in path:
            raise FileNotFoundError(2, "no such file", path)
        if self.opens[path] <= int(path[-1]):
            raise TimeoutError("no answer")
        return io.BytesIO(b"contents")


def test_reads_are_tried_again_after_transient_errors(monkeypatch):
    fsspec.register_implementation("flaky", FlakyFiles, clobber=True)
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: None)
    FlakyFiles.opens.clear()
    addresses = ["flaky://twice2", "flaky://always9", "flaky://missing0"]
    plan = pa.table([addresses, addresses, [-1] * 3, [-1] * 3], inputs.PLAN)
    twice, always, missing = reading.read_plan(plan)
    assert twice.contents == b"contents" and twice.error is None
    assert always.error == "TimeoutError: no answer"
    assert missing.error.startswith("FileNotFoundError")
    assert list(FlakyFiles.opens.values()) == [3, 4, 1]


@pytest.mark.parametrize("tiles", ["whole", "native"])
def test_a_row_holds_the_gaze_of_prune_video(clips, selector, tiles):
    settings = PruneSettings(tiles=tiles, gazing_ratio=0.4, task_loss_requirement=0.5, measures_quality=True)
    row = prune_to_row("a", clips / "a.mp4", selector, settings=settings)
    pruning = prune_video(clips / "a.mp4", selector, tiles=tiles, gazing_ratio=0.4, task_loss_requirement=0.5)
    assert ids_of(gaze_of_row(row)) == ids_of(pruning.gaze) and gaze_of_row(row).scales == pruning.gaze.scales
    statistics = pruning.statistics
    scales = statistics.pop("patches_each_scale")
    assert row["patches_each_scale"] == list(scales.values())
    assert {name: row[name] for name in statistics} == statistics
    assert tuple(row["extent"]) == next(prune_video(clips / "a.mp4", selector, tiles=tiles).chunks()).extent
    assert row["frame_indices"] == list(range(6)) and row["frame_times"] == pruning.frame_times
    assert set(row) == set(shards.ROWS.names)


@pytest.mark.parametrize("source", [b"", b"no video", "missing.mp4", None, 3])
def test_a_bad_video_is_a_row_with_its_error(selector, source):
    row = prune_to_row("bad", source, selector)
    assert row["error"] and "\n" not in row["error"] and row["ids"] is None and set(row) == set(shards.ROWS.names)
    with pytest.raises(ValueError, match="'bad' has an error"):
        gaze_of_row(row)


def folder_of(path, **settings):
    return shards.PrunedFolder(path, asdict(PruneSettings(**settings)))


def test_a_resumed_run_numbers_shards_as_one_run_would_have(clips, selector, tmp_path):
    rows = [prune_to_row(name, clips / "a.mp4", selector) for name in "abc"]
    with folder_of(tmp_path) as folder:
        for row in rows:
            shards.write_row(folder.unfinished, row)
        shards.write_shard(folder.folder, 1, ["b"])
    (tmp_path / "unfinished" / f"{shards.key_of('x')}.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "unfinished" / ".unfinished-1").mkdir()
    shards.write_row(tmp_path / "unfinished", rows[1])  # as if the run had ended before it was removed
    with folder_of(tmp_path) as folder:
        numbers = folder.free_numbers()
        assert folder.finished() == {"b"} and [next(numbers), next(numbers)] == [0, 2]
        assert folder.waiting() == {shards.key_of("a"), shards.key_of("c")}
        shards.write_shard(folder.folder, 0, ["c", "a"])
        folder.remove_unfinished()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "settings.json",
        "shard-00000.parquet",
        "shard-00001.parquet",
    ]
    found = read_rows(tmp_path)
    assert found["identity"].to_pylist() == ["a", "b", "c"] and found.schema == shards.ROWS
    assert ids_of(gaze_of_row(found.to_pylist()[0])) == ids_of(gaze_of_row(rows[0]))
    assert read_rows(tmp_path, ["num_frames"]).to_pydict() == {"num_frames": [6, 6, 6]}


def test_a_folder_takes_rows_of_one_run_with_one_set_of_settings(clips, selector, tmp_path):
    with folder_of(tmp_path, clip_ratio=0.5):
        pass  # It wrote no row, so that other settings may follow.
    with folder_of(tmp_path, clip_ratio=0.2) as folder:
        shards.write_row(folder.unfinished, prune_to_row("a", clips / "a.mp4", selector))
        with pytest.raises(ValueError, match="is being written to by another process"):
            folder_of(tmp_path, clip_ratio=0.2)
    with pytest.raises(ValueError, match="`clip_ratio` 0.2, but it is 0.3 now"):
        folder_of(tmp_path, clip_ratio=0.3)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold the settings of an earlier run, got an empty object"):
        folder_of(tmp_path)


def arrays_of(tar, key):
    return [np.load(io.BytesIO(tar.extractfile(f"{key}.{name}.npy").read())) for name in ("pixels", "ids", "frames")]


def test_a_worker_writes_rows_and_kept_patches(clips, tmp_path):
    settings = PruneSettings(selector="greedy", gazing_ratio=0.1, task_loss_requirement=0.5, keeps_patches=True)
    with folder_of(tmp_path) as folder:
        work = worker.PruneWorker(settings, folder.unfinished, "cpu")
        videos = [
            reading.Video("a", str(clips / "a.mp4")),
            reading.Video("b", contents=(clips / "b.mp4").read_bytes()),
            reading.Video("c", error="TimeoutError: no answer"),
            reading.Video("d"),
            reading.Video("e", contents=b"text"),
        ]
        names = work(pa.Table.from_pylist([video._asdict() for video in videos], worker.VIDEOS))
        shards.write_shard(tmp_path, 0, names["identity"].to_pylist())
    rows = read_rows(tmp_path).to_pylist()
    assert [row["error"] and row["error"][:30] for row in rows] == [
        None,
        None,
        "TimeoutError: no answer",
        "ValueError: the row names no v",
        "ValueError: `source` of 4 byte",
    ]
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert len(tar.getnames()) == 8 and {member.mtime for member in tar} == {0}
        for name in "ab":
            key = shards.key_of(name)
            pruning = prune_video(clips / f"{name}.mp4", work.selector, gazing_ratio=0.1, task_loss_requirement=0.5)
            kept = list(pruning.kept_patches())
            pixels, ids, frames = arrays_of(tar, key)
            assert np.array_equal(pixels, torch.cat([own.pixels for own in kept]))
            assert np.array_equal(ids, torch.cat([own.ids for own in kept]))
            assert frames.tolist() == [own.frame for own in kept for _ in own.ids]
            assert json.load(tar.extractfile(f"{key}.json"))["identity"] == name
    assert rows[0]["ids"] == torch.cat(pruning_ids(clips / "a.mp4", work)).tolist()


def pruning_ids(path, work):
    return prune_video(path, work.selector, gazing_ratio=0.1, task_loss_requirement=0.5).gaze.ids_each_frame()


def test_a_video_that_crashes_its_process_three_times_gets_a_row(clips, tmp_path):
    work = worker.PruneWorker(PruneSettings(selector="greedy"), tmp_path, "cpu")
    for _ in range(3):
        shards.count_try(tmp_path, "a")
    work.prune(reading.Video("a", str(clips / "a.mp4")))
    row = pq.read_table(tmp_path / f"{shards.key_of('a')}.parquet").to_pylist()[0]
    assert row["error"] == "the process that pruned it ended 3 times without an answer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{clips}", "{out}", "--workers", "0"], "--workers: must be a whole number of at least 1, got '0'"),
        (["{clips}", "{clips}/out"], "OUTPUT must lie outside INPUT"),
        (["{clips}", "s3://bucket/out"], "OUTPUT must be a folder that all machines see"),
        (["{clips}", "{out}", "--gpus-per-worker", "-1"], "`--gpus-per-worker` must be a share of a GPU"),
        (["{clips}", "{out}", "--clip-ratio", "2"], "`clip_ratio` must be above 0 and at most 1"),
        (["{clips}", "{out}", "--fps", "-1"], "`fps` must be above 0"),
        (["{clips}", "{out}", "--model", "{clips}"], "`--model`"),
        (["{clips}", "{out}", "--max-tiles", "2"], "`--max-tiles` needs `--tiles grid`"),
        (["nowhere", "{out}"], "there is no 'nowhere'"),
        (["{clips}"], "the following arguments are required: OUTPUT"),
    ],
)
def test_bad_arguments_end_with_a_message_before_any_work(clips, tmp_path, capsys, arguments, message):
    if message not in ("the following arguments are required: OUTPUT", "`--max-tiles` needs `--tiles grid`"):
        pytest.importorskip("ray.data")
    filled = [argument.format(clips=clips, out=tmp_path / "out") for argument in arguments]
    assert main(["prune-dataset", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not os.path.exists(tmp_path / "out")
