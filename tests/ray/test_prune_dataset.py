"""Pruning of datasets on Ray, which is started once for all tests."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from transformers_autogaze import prune_video, write_video
from transformers_autogaze.dataset_pruning import PruneSettings, gaze_of_row, prune_dataset, read_rows
from transformers_autogaze_cli import main


pytest.importorskip("ray.data")  # As "ray" alone, this folder would be found.
ray = pytest.importorskip("ray")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SETTINGS = PruneSettings(selector="finest", clip_ratio=0.2)


@pytest.fixture(scope="module", autouse=True)
def running_ray():
    """A Ray of three CPUs: one on this machine, or the one that RAY_ADDRESS names."""
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"address": "local", "num_cpus": 3, "object_store_memory": 200 * 2**20, "include_dashboard": False}
    ray.init(**options)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder of ten videos and two broken ones."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(10):
        frames = np.random.default_rng(number).integers(0, 256, (8, 10, 12, 3), np.uint8).repeat(16, 1).repeat(16, 2)
        frames[1 + number % 5 :] = frames[number % 5]
        write_video(folder / f"{number:02}.mp4", frames, fps=10)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((folder / "00.mp4").read_bytes()[:500])
    return folder


@pytest.fixture(scope="module")
def pruned(clips, tmp_path_factory):
    """The folder that two workers made, with kept patches, in shards of five."""
    output = tmp_path_factory.mktemp("pruned")
    summary = prune_dataset(str(clips), output, replace(SETTINGS, keeps_patches=True), workers=2, rows_per_shard=5)
    return output, summary


def test_every_good_video_has_the_gaze_of_prune_video_and_every_bad_one_a_reason(clips, pruned):
    output, summary = pruned
    rows = read_rows(output).to_pylist()
    assert [row["identity"] for row in rows] == [*(f"{number:02}.mp4" for number in range(10)), "cut.mp4", "empty.mp4"]
    selector, processor = SETTINGS.load()
    for row in rows[:10]:
        gaze = prune_video(clips / row["identity"], selector, processor, clip_ratio=0.2).gaze
        found = gaze_of_row(row)
        assert [ids.tolist() for ids in found.ids_each_frame()] == [ids.tolist() for ids in gaze.ids_each_frame()]
    assert all("is not a video" in row["error"] for row in rows[10:])
    assert (summary.num_videos, summary.num_failed, summary.num_done) == (12, 2, 12)
    assert "12, 2 of them with an error; 12 done in this run" in str(summary)


def test_another_number_of_workers_writes_the_same_shards(clips, pruned, tmp_path):
    prune_dataset(str(clips), tmp_path, replace(SETTINGS, keeps_patches=True), workers=1, rows_per_shard=5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in pruned[0].iterdir())
    # The third shard has only the two broken videos, and so no patches.
    tars = [f"shard-0000{number}.tar" for number in range(2)]
    assert names == sorted([f"shard-0000{number}.parquet" for number in range(3)] + tars + ["settings.json"])
    for name in names:
        assert (tmp_path / name).read_bytes() == (pruned[0] / name).read_bytes()


def test_finished_videos_are_not_opened_again(clips, pruned, tmp_path):
    (tmp_path / "clips").mkdir()
    for number in range(4):
        (tmp_path / "clips" / f"{number}.mp4").write_bytes((clips / "03.mp4").read_bytes())
    listing = tmp_path / "list.txt"
    listing.write_text("clips/0.mp4\nclips/1.mp4\nclips/2.mp4\n")
    prune_dataset(str(listing), tmp_path / "out", SETTINGS, workers=1, rows_per_shard=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    for number in range(3):  # The run would fail on any of these that it opens again.
        (tmp_path / "clips" / f"{number}.mp4").unlink()
    listing.write_text(listing.read_text() + "clips/3.mp4\n")
    summary = prune_dataset(str(listing), tmp_path / "out", SETTINGS, workers=1, rows_per_shard=2)
    assert (summary.num_videos, summary.num_failed, summary.num_done) == (4, 0, 1)
    assert len(before) == 2 and {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("format", ["parquet", "lance"])
def test_contents_in_a_table_are_read_ahead(clips, pruned, tmp_path, format):
    paths = sorted(clips.iterdir())
    table = pa.table({"video": [path.read_bytes() for path in paths], "name": [path.name for path in paths]})
    path = str(tmp_path / f"table.{format}")
    if format == "lance":
        pytest.importorskip("lance").write_dataset(table, path)
    else:
        pq.write_table(table, path, row_group_size=5)
    prune_dataset(path, tmp_path / "out", SETTINGS, id_column="name", workers=2)
    found, expected = read_rows(tmp_path / "out"), read_rows(pruned[0])
    assert found.drop_columns("error") == expected.drop_columns("error")
    assert found["error"].is_null() == expected["error"].is_null()


def test_the_command_prunes_contents_in_a_parquet_table(clips, pruned, tmp_path, capsys):
    paths = sorted(clips.iterdir())
    table = pa.table({"clip": [path.read_bytes() for path in paths], "name": [path.name for path in paths]})
    pq.write_table(table, tmp_path / "table.parquet", row_group_size=5)
    arguments = "--video-column clip --id-column name --selector finest --clip-ratio 0.2 --patches --rows-per-shard 5"
    assert main(["prune-dataset", f"{tmp_path}/table.parquet", f"{tmp_path}/out", *arguments.split()]) == 0
    assert "12, 2 of them with an error; 12 done in this run" in capsys.readouterr().out
    found, expected = read_rows(tmp_path / "out"), read_rows(pruned[0])
    assert found.drop_columns("error") == expected.drop_columns("error")
    assert all("of 0 bytes" in row["error"] or "of 500 bytes" in row["error"] for row in found.to_pylist()[10:])
    for number in range(2):
        name = f"shard-0000{number}.tar"
        assert (tmp_path / "out" / name).read_bytes() == (pruned[0] / name).read_bytes()


def test_sigterm_ends_the_command_with_one_line_and_keeps_rows(clips, tmp_path):
    (tmp_path / "clips").mkdir()
    for number in range(40):
        (tmp_path / "clips" / f"{number}.mp4").write_bytes((clips / "03.mp4").read_bytes())
    arguments = [
        f"{tmp_path}/clips",
        f"{tmp_path}/out",
        "--selector",
        "finest",
        "--clip-ratio",
        "0.2",
        "--workers",
        "1",
    ]
    command = subprocess.Popen(
        [sys.executable, "-m", "transformers_autogaze_cli", "prune-dataset", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    while command.poll() is None and not list((tmp_path / "out").glob("unfinished/*.parquet")):
        time.sleep(0.01)
    command.terminate()
    _, error = command.communicate(timeout=60)
    assert command.returncode == 128 + signal.SIGTERM
    assert "autogaze: error: stopped by SIGTERM; written rows are kept" in error.rstrip().splitlines()[-1]
    assert "Traceback" not in error and "received at time" not in error
    assert 1 <= len(list((tmp_path / "out").glob("unfinished/*.parquet"))) < 40


def test_a_worker_that_is_killed_costs_no_row(clips, pruned, tmp_path):
    """A worker process is killed while it prunes a video, as the system does when it runs out of memory."""
    stopped, killed = threading.Event(), []

    def kill_one():
        while not stopped.wait(0.05):
            for tries in (tmp_path / "out" / "unfinished").glob("*.tries"):
                if not tries.with_suffix(".parquet").exists() and (workers := pids_of("PruneWorker")):
                    os.kill(workers[0], signal.SIGKILL)
                    killed.append(workers[0])
                    return

    killer = threading.Thread(target=kill_one)
    killer.start()
    prune_dataset(str(clips), tmp_path / "out", SETTINGS, workers=2, rows_per_shard=5)
    stopped.set()
    killer.join()
    assert killed
    assert read_rows(tmp_path / "out") == read_rows(pruned[0])


def pids_of(name: str) -> list[int]:
    """Gives the ids of Ray's worker processes whose titles contain a name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and name.encode() in title:
            found.append(int(folder.name))
    return found


def test_too_many_workers_are_refused(clips, tmp_path):
    with pytest.raises(ValueError, match="`--workers` must be 1 to 2, got 3: Ray has 3 CPUs and 0 GPUs"):
        prune_dataset(str(clips), tmp_path, SETTINGS, workers=3)
    with pytest.raises(ValueError, match="`--gpus-per-worker` must leave room for a worker.*, got 0.5"):
        prune_dataset(str(clips), tmp_path, SETTINGS, gpus_per_worker=0.5)
