"""
A queue of jobs that run in background threads: one job per visitor, a limited number at a time, each of which can be cancelled.

This module is independent of the page and of videos.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Cancelled(Exception):
    """A job was cancelled."""


class Job:
    """
    A job and its progress.

    Attributes:
        stage (`str`): what the job is doing; empty while it waits.
        done, total (`int`): finished and total steps of the stage; `total` is 0 if it is unknown.
    """

    def __init__(self):
        self.stage, self.done, self.total = "", 0, 0
        self._is_cancelled = threading.Event()
        self._future: Future | None = None

    def report(self, stage: str, done: int = 0, total: int = 0) -> None:
        """
        Sets the progress. The job's function calls this often.

        Raises:
            Cancelled: if the job was cancelled.
        """
        if self._is_cancelled.is_set():
            raise Cancelled
        self.stage, self.done, self.total = stage, done, total

    def cancel(self) -> None:
        """Cancels the job: at once if it still waits, otherwise at its next call of [`~Job.report`]."""
        self._is_cancelled.set()
        self._future.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether the job was cancelled; its function may still run until its next call of [`~Job.report`]."""
        return self._is_cancelled.is_set()

    @property
    def is_done(self) -> bool:
        """Whether the job has ended."""
        return self._future.done()

    def result(self) -> Any:
        """
        Waits for the job's end, and returns what its function returned or raises what it raised.

        Raises:
            Cancelled: if the job was cancelled.
        """
        if self._future.cancelled():
            raise Cancelled
        return self._future.result()


class JobQueue:
    """
    Runs jobs in background threads, in the order in which they were started.

    Args:
        max_running (`int`, *optional*, defaults to 1): maximum number of jobs that run at a time.
        max_waiting (`int`, *optional*, defaults to 16): maximum number of jobs that wait.

    Example:

    ```python
    >>> from transformers_autogaze.app.jobs import JobQueue

    >>> JobQueue().start("Ada", lambda job: 6 * 7).result()
    42

    ```
    """

    def __init__(self, max_running: int = 1, max_waiting: int = 16):
        self._max_jobs = max_running + max_waiting
        self._pool = ThreadPoolExecutor(max_running, thread_name_prefix="autogaze-app")
        self._jobs: dict[Hashable, Job] = {}  # in the order in which they were started
        self._lock = threading.Lock()

    def start(self, visitor: Hashable, work: Callable[[Job], Any]) -> Job:
        """
        Adds a job to the queue; it runs as soon as a thread is free.

        Args:
            visitor (`Hashable`): the owner of the job.
            work (`Callable[[Job], Any]`): the function to run; it calls [`~Job.report`].

        Raises:
            ValueError: if the visitor has a job that has not ended, or too many jobs wait.
        """
        job = Job()
        with self._lock:
            if visitor in self._jobs:
                raise ValueError("Your last video is still being worked on. Wait for it, or cancel it.")
            if len(self._jobs) >= self._max_jobs:
                raise ValueError("Too many videos are waiting. Try again in some minutes.")
            self._jobs[visitor] = job
            job._future = self._pool.submit(work, job)
        job._future.add_done_callback(lambda _: self._remove(visitor))
        return job

    def cancel(self, visitor: Hashable) -> None:
        """Cancels a visitor's job, if there is one."""
        with self._lock:
            job = self._jobs.get(visitor)
        if job is not None:
            job.cancel()

    def close(self) -> None:
        """Cancels all jobs and waits for their end; no further job can start."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        self._pool.shutdown()

    def num_ahead(self, job: Job) -> int:
        """Returns how many jobs ahead of this one have not ended."""
        with self._lock:
            jobs = list(self._jobs.values())
        return jobs.index(job) if job in jobs else 0

    def _remove(self, visitor: Hashable) -> None:
        with self._lock:
            self._jobs.pop(visitor, None)
