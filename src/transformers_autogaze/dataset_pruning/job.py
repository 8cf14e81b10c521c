"""
A dataset on Ray Data: videos are read ahead, pruned by a pool of workers, and their rows put together in shards.

Ray says who does what and when; what is done lies in the other modules. Every worker writes its rows itself, so that neither
frames nor rows pass through the process that started it all.
"""

import logging
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub.utils import tqdm

from .inputs import plan_videos, split_plan
from .reading import is_at_hand, read_plan
from .rows import PruneSettings
from .shards import PrunedFolder, key_of, write_shard
from .summary import DatasetSummary
from .worker import VIDEOS, PruneWorker


_READ, _MOST_READS = 16, 10_000  # videos that a task reads, and tasks, at least and at most where there are many
_READER_CPUS = 0.5
_AHEAD = 2  # videos that wait at each worker
_STORE = 2**27  # bytes of Ray's object store for each core, where Ray is started here
_LONGEST = 400  # characters of an error of Ray


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
    Prunes all videos of a dataset: a row for each in Parquet shards, and on request its kept patches in WebDataset tars.

    A video that cannot be read is a row with its `error`. A run that broke off is gone on with by the same call: rows that are
    there are not done again. The rows do not depend on the number of workers, nor do the shards.

    Ray runs on this machine, unless it is running in this process or the environment variable `RAY_ADDRESS` names a cluster.

    Args:
        source, video_column, id_column: which videos; see [`~inputs.plan_videos`].
        output (`str` or `os.PathLike`): folder to write to, which all machines of a cluster see by this path.
        settings ([`PruneSettings`], *optional*): what decides what is kept.
        workers (`int`, *optional*):
            How many videos are pruned at a time; by default as many as there are cores but one, or as the GPUs have room for.
        gpus_per_worker (`float`, *optional*, defaults to 0):
            Share of a GPU that each worker takes, such as 0.25, or whole ones; 0 to compute on the CPU.
        rows_per_shard (`int`, *optional*, defaults to 1024): rows of a shard.

    Returns:
        [`DatasetSummary`]: all that is in the folder now.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ImportError: if Ray, or a package that opens the source, is missing.
        ValueError: if an argument is out of range, the folder has rows that were made otherwise, or Ray has no room for that many
            workers. Everything is checked before the first video is opened.
    """
    _check(source, output, workers, gpus_per_worker, rows_per_shard)
    settings, start = settings or PruneSettings(), time.perf_counter()
    settings.check()
    plan = plan_videos(source, video_column, id_column)
    with PrunedFolder(output, asdict(settings)) as folder:
        finished = folder.finished()
        plan = _without(plan, lambda identity: identity not in finished)
        waiting = folder.waiting()
        todo = _without(plan, lambda identity: key_of(identity) not in waiting)
        done = plan.num_rows - todo.num_rows
        with (
            _Shards(folder, plan["identity"].to_pylist(), rows_per_shard) as shards,
            tqdm(
                total=len(finished) + plan.num_rows, initial=len(finished) + done, unit="video", desc="pruning"
            ) as bar,
        ):
            for identity in plan["identity"].to_pylist():
                if key_of(identity) in waiting:
                    shards.add(identity)
            if todo.num_rows:
                with _ray(workers, gpus_per_worker) as workers:
                    for identity in _prune(todo, folder.unfinished, settings, video_column, workers, gpus_per_worker):
                        shards.add(identity)
                        bar.update()
            shards.finish()
        folder.close()
        return DatasetSummary.of(folder.folder, todo.num_rows, time.perf_counter() - start)


class _Shards:
    """Which videos each shard is to have, and which of them are done; shards are written in a thread of their own."""

    def __init__(self, folder: PrunedFolder, identities: list[str], size: int):
        numbers = folder.free_numbers()
        self.folder = folder.folder
        self.videos = {next(numbers): identities[start : start + size] for start in range(0, len(identities), size)}
        self.number_of = {identity: number for number, own in self.videos.items() for identity in own}
        self.missing = {number: len(own) for number, own in self.videos.items()}
        self.pool, self.writing = ThreadPoolExecutor(max_workers=1), deque()

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def add(self, identity: str) -> None:
        """Counts a video that is done; the last one of a shard has it written."""
        number = self.number_of.pop(identity, None)
        if number is None:  # A worker has done it and died, and another one did it again.
            return
        self.missing[number] -= 1
        if not self.missing[number]:
            self.writing.append(self.pool.submit(write_shard, self.folder, number, self.videos.pop(number)))
            # What failed is known soon, and not at the end of a long run.
            while self.writing and self.writing[0].done():
                self.writing.popleft().result()

    def finish(self) -> None:
        """Waits for the shards that are being written."""
        for writing in self.writing:
            writing.result()
        if self.videos:
            raise RuntimeError(f"{len(self.number_of)} videos came to no end; run the same command again to go on")


def _prune(
    plan: pa.Table, folder: Path, settings: PruneSettings, video_column: str, workers: int, gpus: float
) -> Iterator[str]:
    """Has the videos of a plan pruned; yields the name of each whose row is written, in no order."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    least = min(_READ, 1 + plan.num_rows // (4 * workers))
    cuts = split_plan(plan, max(least, plan.num_rows // _MOST_READS))
    parts = [plan.slice(start, stop - start) for start, stop in cuts]

    def read(part: pa.Table) -> Iterator[pa.Table]:
        for video in read_plan(part, video_column):
            yield pa.Table.from_pylist([video._asdict()], VIDEOS)

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # A block for each video, so that whoever is free takes the next one.
    with DataContext.current(context):
        if all(map(is_at_hand, plan.to_pylist())):  # There is nothing to read ahead.
            videos = ray.data.from_arrow([_unread(part) for part in parts])
        else:
            parts = ray.data.from_arrow(parts)
            videos = parts.map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=_READER_CPUS)
        selector = os.path.abspath(settings.selector) if os.path.isdir(settings.selector) else settings.selector
        names = videos.map_batches(
            PruneWorker,
            fn_constructor_args=(settings.replace(selector=selector), folder.absolute(), "cuda" if gpus else "cpu"),
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=_AHEAD),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=gpus or None,
        )
        for batch in names.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch["identity"].to_pylist()


@contextmanager
def _ray(workers: int | None, gpus: float) -> Iterator[int]:
    """Connects to Ray, or starts it; gives the number of workers that it has room for."""
    import ray

    is_running = ray.is_initialized()
    if not is_running:
        _start_ray(workers)
    try:
        yield _count_workers(workers, gpus, ray.cluster_resources())
    finally:
        if not is_running:
            ray.shutdown()


def _count_workers(workers: int | None, gpus: float, room: Mapping[str, float]) -> int:
    """Gives how many workers there are to be, no more than Ray has room for; half a CPU is left to read."""
    cpus, all_gpus = room.get("CPU", 0), room.get("GPU", 0)
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

    # It warns of its own bars, which are off, and of workers that take their time to start.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not os.environ.get("RAY_ADDRESS"):
        # One core more than workers, or nobody could read.
        cores = 1 + (workers or max(1, _cores() - 1))
        options |= {"address": "local", "num_cpus": cores, "object_store_memory": cores * _STORE}
        options |= {"include_dashboard": False}
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises any kind.
        raise OSError(f"Ray cannot be started or reached: {' '.join(str(error).split())[:_LONGEST]}") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unread(plan: pa.Table) -> pa.Table:
    nothing = [pa.nulls(plan.num_rows, VIDEOS.field(name).type) for name in ("contents", "error")]
    return pa.table([*plan.select(["identity", "address"]).columns, *nothing], VIDEOS)


def _without(plan: pa.Table, is_kept: Any) -> pa.Table:
    mask = pa.array([is_kept(identity) for identity in plan["identity"].to_pylist()], pa.bool_())
    return plan.filter(mask).combine_chunks()


def _check(source: str, output: str | os.PathLike, workers: int | None, gpus: float, rows_per_shard: int) -> None:
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"prune-dataset needs Ray Data: pip install 'transformers-autogaze[ray]' ({error})"
        ) from error
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", os.fspath(output)):  # A Path has one slash of a URL's two.
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
