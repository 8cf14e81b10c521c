"""
Jobs that run in threads while a page waits: one for each visitor, so many at a time, and each can be cancelled.

This module knows nothing of pages or videos.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Cancelled(Exception):
    """A job was cancelled."""


class Job:
    """
    A job, and how far it is.

    Attributes:
        stage (`str`): what it does now; empty while it waits.
        done, total (`int`): how much of the stage is done; `total` is 0 where nobody knows.
    """

    def __init__(self):
        self.stage, self.done, self.total = "", 0, 0
        self._is_cancelled = threading.Event()
        self._future: Future | None = None

    def report(self, stage: str, done: int = 0, total: int = 0) -> None:
        """
        Says how far it is; the work calls it often.

        Raises:
            Cancelled: if the job was cancelled, which ends the work.
        """
        if self._is_cancelled.is_set():
            raise Cancelled
        self.stage, self.done, self.total = stage, done, total

    def cancel(self) -> None:
        """Ends the job, at once if it still waits, otherwise when it reports next."""
        self._is_cancelled.set()
        self._future.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled; the work may go on a little."""
        return self._is_cancelled.is_set()

    @property
    def is_done(self) -> bool:
        """Whether the work has ended."""
        return self._future.done()

    def result(self) -> Any:
        """
        Gives what the work returned, and raises what it raised; waits for its end.

        Raises:
            Cancelled: if it was cancelled.
        """
        if self._future.cancelled():
            raise Cancelled
        return self._future.result()


class JobBoard:
    """
    Runs jobs.

    Args:
        max_running (`int`, *optional*, defaults to 1): jobs that run at a time.
        max_waiting (`int`, *optional*, defaults to 16): jobs that wait at most.

    Example:

    ```python
    >>> from transformers_autogaze.app.jobs import JobBoard

    >>> JobBoard().start("Ada", lambda job: 6 * 7).result()
    42

    ```
    """

    def __init__(self, max_running: int = 1, max_waiting: int = 16):
        self._max_jobs = max_running + max_waiting
        self._pool = ThreadPoolExecutor(max_running, thread_name_prefix="autogaze-app")
        self._jobs: dict[Hashable, Job] = {}  # in the order in which they came
        self._lock = threading.Lock()

    def start(self, visitor: Hashable, work: Callable[[Job], Any]) -> Job:
        """
        Starts a job, or lets it wait.

        Args:
            visitor (`Hashable`): whose it is.
            work (`Callable[[Job], Any]`): what to do; it calls [`~Job.report`].

        Raises:
            ValueError: if the visitor has a job that has not ended, or too many wait.
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
        """Cancels all jobs and waits for their end; no other can start."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        self._pool.shutdown()

    def num_before(self, job: Job) -> int:
        """Tells how many jobs came before this one and have not ended."""
        with self._lock:
            jobs = list(self._jobs.values())
        return jobs.index(job) if job in jobs else 0

    def _remove(self, visitor: Hashable) -> None:
        with self._lock:
            self._jobs.pop(visitor, None)
