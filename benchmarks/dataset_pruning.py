"""
Measures time and memory of `autogaze prune-dataset` on 500 videos, some of them broken, and checks its rows.

It cuts short clips of the videos in a folder and breaks some of them. It then runs the command on all of them with two workers and
with one; on 100 of them with two, to compare the memory; and on all with two, in a run that is killed halfway and resumed after the
videos that have rows were moved away. It checks that the rows of these runs are equal, that each valid video has the gaze of
`prune_video` and each broken one an error. It prints the results and writes them as JSON; exit status 1 if a check failed.

    python benchmarks/dataset_pruning.py videos/ -o dataset_pruning.json

Each run starts Ray, unless RAY_ADDRESS names a Ray on this machine, which needs three CPUs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from measurement import machine

from transformers_autogaze import prune_video, stream_video, write_video
from transformers_autogaze.dataset_pruning import PruneSettings, gaze_of_row, read_rows


FIRST = 100  # videos of the small run
SIZES = (160, 176, 192, 208, 224)
BREAKS = ("empty", "text", "cut", "noise", "missing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="folder of videos to cut clips of")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--broken", type=int, default=20)
    parser.add_argument("--selector", default="features")
    parser.add_argument("--work", type=Path, help="working folder, which is kept (default: a temporary one)")
    parser.add_argument("--check", type=int, help="number of valid rows to compare with prune_video (default: all)")
    parser.add_argument("-o", "--output", type=Path, default=Path("dataset_pruning.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        listing = make_videos(options.videos, folder, options.count, options.broken)
        results = measure(listing, folder, options.selector)
        faults = check(listing, folder, options)
    results["faults"] = faults
    results["machine"] = machine(1)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(faults) or "all checks passed")
    sys.exit(bool(faults))


def make_videos(source: Path, folder: Path, count: int, broken: int) -> Path:
    """Writes the clips, `list.txt` with all of them and `first.txt` with the first 100."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    originals = sorted(source.rglob("*.mp4"))
    generator = random.Random(0)
    is_broken = set(generator.sample(range(count), broken))
    for number in range(count):
        path = folder / "clips" / f"{number:05}.mp4"
        original, start, length = originals[number % len(originals)], generator.randrange(30), generator.randint(8, 16)
        height, width = generator.choice(SIZES), generator.choice(SIZES)
        if not path.exists():
            frames = islice(stream_video(original, start_frame=start)[1], length)
            write_video(path, (frame[:height, :width] for frame in frames), fps=10)
            if number in is_broken:
                break_video(path, BREAKS[number % len(BREAKS)], generator.randbytes(4000))
    for name, some in (("list.txt", range(count)), ("first.txt", range(min(count, FIRST)))):
        (folder / name).write_text("".join(f"clips/{number:05}.mp4\n" for number in some))
    return folder / "list.txt"


def break_video(path: Path, how: str, noise: bytes) -> None:
    content = path.read_bytes()
    contents = {"empty": b"", "text": b"no video\n", "cut": content[: len(content) // 3], "noise": noise}
    path.with_suffix(".broken").write_text(how)
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(contents[how])


def measure(listing: Path, folder: Path, selector: str) -> dict[str, Any]:
    """Runs the command with two workers, with one, on fewer videos, and in a run that is killed and resumed."""
    results: dict[str, Any] = {}
    for name, source, workers in (
        ("two workers", listing, 2),
        ("one worker", listing, 1),
        ("two workers, 100 videos", listing.with_name("first.txt"), 2),
    ):
        results[name] = run(source, folder / name.replace(" ", "_"), workers, selector)
        print(f"{name:<28}{results[name]}", flush=True)
    output, count = folder / "interrupted", len(listing.read_text().splitlines())
    results["killed"] = run(listing, output, 2, selector, kill_at=count // 2)
    finished = {row["identity"] for path in rows_in(output) for row in read(path)}
    # The resumed run would fail on any of these that it opens again.
    for name in finished:
        path = folder / name
        if path.exists():
            path.rename(path.with_suffix(".away"))
    results["resumed"] = run(listing, output, 2, selector)
    for path in (folder / "clips").glob("*.away"):
        path.rename(path.with_suffix(".mp4"))
    results["killed"]["finished"] = len(finished)
    print(f"{'killed':<28}{results['killed']}\n{'resumed':<28}{results['resumed']}", flush=True)
    return results


def run(source: Path, output: Path, workers: int, selector: str, kill_at: int | None = None) -> dict[str, Any]:
    """Runs the command; returns its seconds, the rate in the middle of the run and the peak memory of its processes."""
    command = [sys.executable, "-m", "transformers_autogaze_cli", "prune-dataset", str(source), str(output)]
    command += ["--workers", str(workers), "--selector", selector]
    start, peaks, progress = time.perf_counter(), {"all": 0, "worker": 0, "driver": 0}, []
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        count = len(rows_in(output))
        progress.append((time.perf_counter() - start, count))
        for kind, size in memory_of(process.pid).items():
            peaks[kind] = max(peaks[kind], size)
        if kill_at is not None and count >= kill_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            while len(rows_in(output)) > count:  # Workers end some time after the driver.
                count = len(rows_in(output))
                time.sleep(10)
        time.sleep(0.5)
    seconds = time.perf_counter() - start
    if kill_at is None and process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "seconds": round(seconds, 1),
        "videos_per_second": middle_rate(progress),
        "MiB": {kind: round(size / 2**20) for kind, size in peaks.items()},
        "table": process.stdout.read().splitlines(),
    }


def middle_rate(progress: list[tuple[float, int]]) -> float | None:
    """Returns the videos per second between 10 % and 90 % of the rows, without the start of Ray and of the workers."""
    total = max(count for _, count in progress)
    # After the last row, the files of rows are joined to shards.
    progress = progress[: 1 + next(index for index, (_, count) in enumerate(progress) if count == total)]
    middle = [(seconds, count) for seconds, count in progress if 0.1 * total <= count <= 0.9 * total]
    if len(middle) < 2 or middle[-1][0] == middle[0][0]:
        return None
    return round((middle[-1][1] - middle[0][1]) / (middle[-1][0] - middle[0][0]), 2)


def memory_of(pid: int) -> dict[str, int]:
    """Returns the proportional set size in bytes of a process with its descendants, of the largest worker and of the process."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family, previous_count = {pid}, 0
    while len(family) > previous_count:
        previous_count = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    if os.environ.get("RAY_ADDRESS"):  # The workers are then no descendants.
        family |= {process for process in parents if title_of(process).startswith(b"ray::")}
    sizes = {"all": 0, "worker": 0, "driver": 0}
    for process in family:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        size = 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
        sizes["all"] += size
        if b"PruneWorker" in title_of(process):
            sizes["worker"] = max(sizes["worker"], size)
        if process == pid:
            sizes["driver"] = size
    return sizes


def title_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def rows_in(output: Path) -> list[Path]:
    return list((output / "unfinished").glob("*.parquet")) + list(output.glob("shard-*.parquet"))


def read(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["identity"]).to_pylist()


def check(listing: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    """Checks the rows of all runs; returns the faults."""
    names = listing.read_text().split()
    rows = read_rows(folder / "two_workers")
    faults = []
    for name in ("one_worker", "interrupted"):
        if read_rows(folder / name) != rows:
            faults.append(f"{name}: other rows than with two workers")
        for path in sorted((folder / "two_workers").glob("shard-*")):
            if path.read_bytes() != (folder / name / path.name).read_bytes():
                faults.append(f"{name}: another {path.name}")
    rows = {row["identity"]: row for row in rows.to_pylist()}
    if set(rows) != set(names):
        faults.append(f"{len(rows)} rows of {len(names)} videos")
    settings = PruneSettings(selector=options.selector)
    selector, processor = settings.load()
    broken = {name for name in names if (folder / name).with_suffix(".broken").exists()}
    valid = [name for name in names if name not in broken]
    faults += [f"{name}: no error" for name in sorted(broken) if not rows[name]["error"]]
    for name in valid if options.check is None else random.Random(1).sample(valid, options.check):
        gaze = prune_video(folder / name, selector, processor).gaze
        expected = [ids.tolist() for ids in gaze.ids_each_frame()]
        found = None if rows[name]["error"] else [ids.tolist() for ids in gaze_of_row(rows[name]).ids_each_frame()]
        if found != expected:
            faults.append(f"{name}: not the gaze of prune_video ({rows[name]['error']})")
    reasons = {rows[name]["error"][:60]: None for name in sorted(broken)}
    print(f"{len(valid)} valid videos, {len(broken)} broken: {', '.join(map(repr, reasons))}")
    return faults


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
