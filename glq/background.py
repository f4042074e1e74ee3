"""A thread that does jobs one after the other, in the order in which they were given, while the work goes on."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Does jobs in their order. What one raises is raised by what is called here next, and no job begins after it."""

    def __init__(self, most: int) -> None:
        """most: bytes that may wait in jobs together."""
        self._most = most
        self._pool = ThreadPoolExecutor(1)
        self._jobs: deque[tuple[Future[None], int]] = deque()
        self._error: BaseException | None = None
        self.ended = False  # nothing is done any more

    def give(self, job: Callable[[], None], nbytes: int = 0) -> None:
        """Have a job done, which holds so many bytes until then. Waits for others, or for itself, if it must."""
        while self._jobs and (self._jobs[0][0].done() or sum(held for _, held in self._jobs) + nbytes > self._most):
            self._jobs[0][0].result()
            self._jobs.popleft()
        self.check()
        self._jobs.append((self._pool.submit(self._do, job), nbytes))
        if nbytes > self._most:
            self.wait()

    def check(self) -> None:
        """Raise what a job raised."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until all jobs are done."""
        while self._jobs:
            self._jobs[0][0].result()
            self._jobs.popleft()
        self.check()

    def close(self, drop: bool) -> None:
        """End the thread when all jobs are done; drop: those that have not begun are not. Raises nothing of theirs."""
        try:
            while self._jobs and not drop:
                self._jobs.popleft()[0].result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self.ended = True

    def _do(self, job: Callable[[], None]) -> None:
        if self._error is None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                self._error = error
