"""Work shared out to several devices: a thread each, the largest task first, results in the order of the tasks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import torch

from glq.errors import GlqError

T = TypeVar("T")
_AS_LARGE = 0.9  # of the largest task


@dataclass(frozen=True)
class Task(Generic[T]):
    """What `run` has done by one of the devices: `work` gets the number of the one.

    nbytes: what it is made of, which lies on the first device.
    """

    size: float
    work: Callable[[int], T]
    nbytes: int = 0


class _Waiting(Generic[T]):
    """Tasks that no device has taken yet."""

    def __init__(self, tasks: Sequence[Task[T]]) -> None:
        self._tasks, self._left, self._lock = tasks, set(range(len(tasks))), Lock()

    def take(self, index: int) -> int | None:
        """One of the largest, for a device: for the first one that which is most to copy, for others the least."""
        with self._lock:
            large = _AS_LARGE * max((self._tasks[i].size for i in self._left), default=0.0)
            some = [i for i in sorted(self._left) if self._tasks[i].size >= large]
            if not some:
                return None
            taken = (min if index else max)(some, key=lambda i: self._tasks[i].nbytes)
            self._left.remove(taken)
            return taken

    def drop(self) -> None:
        with self._lock:
            self._left.clear()


def run(devices: Sequence[torch.device], tasks: Sequence[Task[T]]) -> list[T]:
    """Do all tasks. A device that is free takes one of the largest that are left; no result may depend on which.

    What a task raises is raised here, and no task is begun after it.
    """
    if len(devices) == 1 or len(tasks) == 1:
        return [task.work(0) for task in tasks]
    waiting, done = _Waiting(tasks), dict[int, T]()

    def work(index: int) -> None:
        with _current(devices[index]), torch.no_grad():  # both are each thread's own
            while (i := waiting.take(index)) is not None:
                try:
                    done[i] = tasks[i].work(index)
                except BaseException:
                    waiting.drop()
                    raise

    with ThreadPoolExecutor(len(devices)) as pool:
        ended = [pool.submit(work, index) for index in range(len(devices))]
    for future in ended:
        future.result()
    return [done[i] for i in range(len(tasks))]


def pick_devices(names: Sequence[str]) -> list[torch.device]:
    """Devices by name; a number is a GPU. GlqError for one that is not there, or named twice, and for different kinds.

    cpu may be named more than once: so many threads, as tests take it.
    """
    found = [_device(f"cuda:{name}" if name.isdigit() else name) for name in names]
    if len({device.type for device in found}) > 1:
        raise GlqError(
            f"devices {', '.join(names)} are of different kinds, which round differently: name GPUs alone, 0,1 say"
        )
    gpus = [device for device in found if device.type != "cpu"]
    if twice := [str(device) for i, device in enumerate(gpus) if device in gpus[:i]]:
        raise GlqError(f"device {twice[0]} is named twice: name each GPU once")
    return found


def _device(name: str) -> torch.device:
    """With a number, so that one device has one name."""
    try:
        index = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GlqError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; there are {torch.cuda.device_count()} GPUs"
        ) from error
    return index


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
