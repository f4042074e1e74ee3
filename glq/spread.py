"""Work shared out to several devices: a thread each, the largest task first, results in the order of the tasks."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from glq.errors import GlqError

T = TypeVar("T")


@dataclass(frozen=True)
class Task(Generic[T]):
    """What `run` has done by one of the devices: `work` gets the number of the one."""

    size: float
    work: Callable[[int], T]


def run(devices: Sequence[torch.device], tasks: Sequence[Task[T]]) -> list[T]:
    """Do all tasks. A device that is free takes the largest that is left; which one, no result may depend on.

    What a task raises is raised here, and no task is begun after it.
    """
    if len(devices) == 1 or len(tasks) == 1:
        return [task.work(0) for task in tasks]
    waiting = deque(sorted(range(len(tasks)), key=lambda i: -tasks[i].size))
    done: dict[int, T] = {}

    def work(index: int) -> None:
        with _current(devices[index]), torch.no_grad():  # both are each thread's own
            while waiting:
                try:
                    i = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    done[i] = tasks[i].work(index)
                except BaseException:
                    waiting.clear()
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
