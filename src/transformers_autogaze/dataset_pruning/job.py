"""
Prunes a dataset on Ray Data: tasks read videos, a pool of workers prunes them, and their rows are joined into shards.

This module schedules; the work itself is in the other modules. Every worker writes its rows itself, so that neither frames
nor rows pass through the driver, the process that calls [`prune_dataset`].
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub.utils import tqdm

from .inputs import has_scheme, plan_videos, split_plan
from .reading import needs_prefetch, read_plan
from .rows import PruneSettings
from .shards import PrunedFolder, key_of, write_shard
from .summary import DatasetSummary
from .worker import VIDEOS, PruneWorker


_MIN_VIDEOS_PER_TASK, _MAX_TASKS = 16, 10_000  # of the tasks that read; fewer videos per task in small datasets
_READER_CPUS = 0.5
_VIDEOS_IN_FLIGHT = 2  # per worker: the one that it prunes and the next one
_OBJECT_STORE_BYTES = 2**27  # per core, if Ray is started here
_MAX_ERROR_CHARS = 400


def prune_dataset(
    source: str,
    output: str | os.PathLike,
    settings: PruneSettings | None = None,
    *,
    video_column: str = "video",
    id_column: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float = 0,
    rows_per_shard: int = 1024,
) -> DatasetSummary:
    """
    Prunes all videos of a dataset into Parquet shards with one row per video, and optionally writes the kept patches as tars.

    A video that cannot be read gives a row with its `error`. The same call resumes a run that was interrupted: videos that
    have a row already are not pruned again. Neither rows nor shards depend on the number of workers.

    It uses the Ray that this process is connected to, or else the cluster that the environment variable `RAY_ADDRESS` names,
    or else starts Ray on this machine.

    Args:
        source, video_column, id_column: which videos; see [`~inputs.plan_videos`].
        output (`str` or `os.PathLike`): folder to write to, which all machines of a cluster reach by this path.
        settings ([`PruneSettings`], *optional*): selector, budgets and frames; those of `PruneSettings()` by default.
        workers (`int`, *optional*):
            Number of videos that are pruned at a time; by default one less than there are cores, or as many as fit on the GPUs.
        gpus_per_worker (`float`, *optional*, defaults to 0):
            Share of a GPU that each worker takes, such as 0.25, or whole ones; 0 to compute on the CPU.
        rows_per_shard (`int`, *optional*, defaults to 1024): rows of a shard.

    Returns:
        [`DatasetSummary`]: totals over all rows of the folder.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ImportError: if Ray, or a package that opens the source, is missing.
        ValueError: if an argument is out of range, the folder has rows made with other settings, or Ray has not enough CPUs or
            GPUs for the workers. All of this is checked before the first video is opened.
    """
    _check(source, output, workers, gpus_per_worker, rows_per_shard)
    settings, start = settings or PruneSettings(), time.perf_counter()
    settings.check()
    plan = plan_videos(source, video_column, id_column)
    with PrunedFolder(output, asdict(settings)) as folder:
        finished = folder.finished()
        plan = _filter(plan, lambda identity: identity not in finished)
        waiting = folder.waiting()
        missing = _filter(plan, lambda identity: key_of(identity) not in waiting)
        done = plan.num_rows - missing.num_rows
        with (
            _Shards(folder, plan["identity"].to_pylist(), rows_per_shard) as shards,
            tqdm(
                total=len(finished) + plan.num_rows, initial=len(finished) + done, unit="video", desc="pruning"
            ) as bar,
        ):
            for identity in plan["identity"].to_pylist():
                if key_of(identity) in waiting:
                    shards.add(identity)
            if missing.num_rows:
                with _ray(workers, gpus_per_worker) as workers:
                    pruned = _prune(missing, folder.unfinished, settings, video_column, workers, gpus_per_worker)
                    for identity in pruned:
                        shards.add(identity)
                        bar.update()
            shards.finish()
        folder.remove_unfinished()
        return DatasetSummary.of(folder.folder, missing.num_rows, time.perf_counter() - start)


class _Shards:
    """Assigns videos to shards, and writes a shard in a background thread as soon as all of its videos have rows."""

    def __init__(self, folder: PrunedFolder, identities: list[str], size: int):
        numbers = folder.free_numbers()
        self.folder = folder.folder
        self.videos = {next(numbers): identities[start : start + size] for start in range(0, len(identities), size)}
        self.number_of = {identity: number for number, own in self.videos.items() for identity in own}
        self.missing = {number: len(own) for number, own in self.videos.items()}
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.writing: deque[Future] = deque()

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def add(self, identity: str) -> None:
        """Counts a video that has its row; after the last one of a shard, the shard is written."""
        number = self.number_of.pop(identity, None)
        if number is None:  # Its worker died after writing the row, so that Ray gave the video to another one.
            return
        self.missing[number] -= 1
        if not self.missing[number]:
            self.writing.append(self.pool.submit(write_shard, self.folder, number, self.videos.pop(number)))
            # Raises errors of earlier shards now, and not only at the end of a long run.
            while self.writing and self.writing[0].done():
                self.writing.popleft().result()

    def finish(self) -> None:
        """Waits until all shards are written."""
        for writing in self.writing:
            writing.result()
        if self.videos:
            raise RuntimeError(f"{len(self.number_of)} videos were not pruned; run the same command again to resume")


def _prune(
    plan: pa.Table, folder: Path, settings: PruneSettings, video_column: str, workers: int, gpus: float
) -> Iterator[str]:
    """Prunes the videos of a plan on Ray; yields the name of each video once its row is written, in any order."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    size = max(min(_MIN_VIDEOS_PER_TASK, 1 + plan.num_rows // (4 * workers)), plan.num_rows // _MAX_TASKS)
    parts = [plan.slice(start, stop - start) for start, stop in split_plan(plan, size)]

    def read(part: pa.Table) -> Iterator[pa.Table]:
        for video in read_plan(part, video_column):
            yield pa.Table.from_pylist([video._asdict()], VIDEOS)

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # One video per block, so that an idle worker takes the next one.
    with DataContext.current(context):
        if any(map(needs_prefetch, plan.to_pylist())):
            parts = ray.data.from_arrow(parts)
            videos = parts.map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=_READER_CPUS)
        else:
            videos = ray.data.from_arrow([_without_contents(part) for part in parts])
        selector = os.path.abspath(settings.selector) if os.path.isdir(settings.selector) else settings.selector
        names = videos.map_batches(
            PruneWorker,
            fn_constructor_args=(replace(settings, selector=selector), folder.absolute(), "cuda" if gpus else "cpu"),
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=_VIDEOS_IN_FLIGHT),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=gpus or None,
        )
        for batch in names.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch["identity"].to_pylist()


@contextmanager
def _ray(workers: int | None, gpus: float) -> Iterator[int]:
    """Connects to Ray or starts it, and disconnects afterwards; yields the number of workers."""
    import ray

    is_running = ray.is_initialized()
    if not is_running:
        _start_ray(workers)
    try:
        yield _count_workers(workers, gpus, ray.cluster_resources())
    finally:
        if not is_running:
            ray.shutdown()


def _count_workers(workers: int | None, gpus: float, resources: Mapping[str, float]) -> int:
    """Returns the number of workers, at most what the resources of Ray are enough for; half a CPU is left to a task that reads."""
    cpus, all_gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    most = int(cpus - _READER_CPUS)
    if gpus:
        most = min(most, int(all_gpus) * int(1 / gpus + 1e-6) if gpus <= 1 else int(all_gpus / gpus))
    has = f"Ray has {cpus:g} CPUs and {all_gpus:g} GPUs"
    if most < 1:
        raise ValueError(
            f"`--gpus-per-worker` must leave room for a worker, which takes a CPU as well, got {gpus:g}: {has}"
        )
    if workers is not None and workers > most:
        raise ValueError(f"`--workers` must be 1 to {most}, got {workers}: {has}, of which each takes 1 and {gpus:g}")
    return workers or most


def _start_ray(workers: int | None) -> None:
    """Connects to the cluster that the environment names, or starts Ray on this machine."""
    import ray

    # It would warn that its progress bars are off and that workers start slowly.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not os.environ.get("RAY_ADDRESS"):
        # One core more than workers, for the tasks that read.
        cores = 1 + (workers or max(1, _cores() - 1))
        options |= {"address": "local", "num_cpus": cores, "object_store_memory": cores * _OBJECT_STORE_BYTES}
        options |= {"include_dashboard": False}
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises many classes of errors.
        raise OSError(
            f"Ray cannot be started or reached: {' '.join(str(error).split())[:_MAX_ERROR_CHARS]}"
        ) from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaced it by a handler that dumps its stack.


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _without_contents(plan: pa.Table) -> pa.Table:
    """Returns a table of the columns `VIDEOS` for workers, for videos that they open themselves."""
    nothing = [pa.nulls(plan.num_rows, VIDEOS.field(name).type) for name in ("contents", "error")]
    return pa.table([*plan.select(["identity", "address"]).columns, *nothing], VIDEOS)


def _filter(plan: pa.Table, condition: Callable[[str], bool]) -> pa.Table:
    """Keeps the videos whose names meet a condition."""
    mask = pa.array([condition(identity) for identity in plan["identity"].to_pylist()], pa.bool_())
    return plan.filter(mask).combine_chunks()


def _check(source: str, output: str | os.PathLike, workers: int | None, gpus: float, rows_per_shard: int) -> None:
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"prune-dataset needs Ray Data: pip install 'transformers-autogaze[ray]' ({error})"
        ) from error
    if has_scheme(os.fspath(output)) and ":/" in os.fspath(output):  # `Path` replaces the two slashes of a URL by one.
        raise ValueError(
            f"OUTPUT must be a folder that all machines see, got {os.fspath(output)!r}; copy the shards to an object store once "
            "they are written"
        )
    if os.path.isdir(source) and Path(output).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"OUTPUT must lie outside INPUT, got {os.fspath(output)!r} in {source!r}")
    for name, value in {"--workers": 1 if workers is None else workers, "--rows-per-shard": rows_per_shard}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    if not (0 <= gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
        raise ValueError(
            f"`--gpus-per-worker` must be a share of a GPU, 0..1, or a whole number of them, got {gpus:g}"
        )
