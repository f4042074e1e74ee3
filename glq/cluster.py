"""Rounding on a Ray cluster: a matrix is a task, done wherever a place is free, and done again if its worker dies."""

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glq.errors import GlqError, ResumableError, how_to_install
from glq.machine import likeness
from glq.moments import Moments
from glq.rounder import Matrix, Outcome, Workers, linear
from glq.rounding import PanelRounder
from glq.workers import Devices, panels_for

_RETRIES = 10  # of a task whose worker died: one that takes more memory than there is kills every one
_NAMED = ("codec", "seed", "damping", "shards", "alone")


@dataclass(frozen=True)
class _Sent:
    """A Matrix as arrays, which Ray keeps once a machine, and what the place must be like for the same bytes."""

    weights: list[np.ndarray[Any, Any]]
    hessian: np.ndarray[Any, Any]
    drift: np.ndarray[Any, Any]
    largest: float
    how: dict[str, Any]
    device: str
    threads: int
    like: dict[str, str]

    def matrix(self) -> Matrix:
        """In memory that is PyTorch's own: the arrays are read-only, and aligned in another way."""
        moments = Moments(torch.tensor(self.hessian), torch.tensor(self.drift), self.largest)
        return Matrix([linear(torch.tensor(weight)) for weight in self.weights], moments, **self.how)


class RayWorkers:
    """The places of a cluster. A place is as many processors as this process has threads, or a GPU.

    The number of threads and the kind of processor or GPU may change the last bits of a sum: places have the same.
    """

    def __init__(self, ray: ModuleType, device: torch.device) -> None:
        self.device, self._ray = device, ray
        gpu = device.type == "cuda"
        self._threads = torch.get_num_threads()
        places = {"num_cpus": 1, "num_gpus": 1} if gpu else {"num_cpus": self._threads}
        key, size = ("GPU", 1) if gpu else ("CPU", self._threads)
        self.count = sum(int(node["Resources"].get(key, 0) // size) for node in ray.nodes() if node["Alive"])
        if not self.count:
            need = "a GPU" if gpu else f"{size} processors, as many as this process has threads (OMP_NUM_THREADS)"
            raise GlqError(f"no machine of the Ray cluster has {need}")
        self._round = ray.remote(max_retries=_RETRIES, **places)(_round)

    def __call__(self, matrices: Sequence[Matrix]) -> list[Outcome]:
        tasks = {}
        for i in sorted(range(len(matrices)), key=lambda i: -matrices[i].size):  # the largest begins
            tasks[i] = self._round.remote(self._sent(matrices[i]))
        errors = self._ray.exceptions
        try:
            outcomes: list[Outcome] = self._ray.get([tasks[i] for i in range(len(matrices))])
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            raise ResumableError(f"the Ray cluster gave up on a matrix: {_line(error)}") from error
        return [outcome.to(self.device) for outcome in outcomes]

    def _sent(self, matrix: Matrix) -> _Sent:
        arrays = [_array(layer.weight.detach()) for layer in matrix.layers]
        moments, how = matrix.moments, {name: getattr(matrix, name) for name in _NAMED}
        both = (_array(moments.hessian), _array(moments.drift), moments.largest)
        return _Sent(arrays, *both, how, self.device.type, self._threads, likeness(self.device))


def workers_of(devices: Sequence[torch.device], ray: str | None) -> AbstractContextManager[Workers]:
    """These devices, or the Ray cluster at an address, with the first of them here."""
    return nullcontext(Devices(devices)) if ray is None else _connected(ray, devices[0])


@contextmanager
def _connected(address: str, device: torch.device) -> Iterator[RayWorkers]:
    """The workers of the cluster at this address. GlqError if Ray is not installed, or nothing answers."""
    try:
        import ray
    except ImportError as error:
        raise GlqError(f"a Ray cluster takes Ray: {how_to_install('ray')}") from error
    try:
        _ask(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise GlqError(f"no Ray cluster answers at {address!r}: {_line(error)}") from error
    try:
        yield RayWorkers(ray, device)
    finally:
        ray.shutdown()  # ends what still runs for this process


def _ask(address: str) -> None:
    """OSError if nothing listens there, which Ray would take minutes to say."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _round(sent: _Sent) -> Outcome:
    """In a worker of the cluster."""
    device = torch.device(sent.device)
    mine = likeness(device)
    if wrong := [f"{key} {mine[key]}, not {value}" for key, value in sent.like.items() if mine[key] != value]:
        raise GlqError(
            f"{socket.gethostname()} of the Ray cluster would round otherwise than this machine: it has {wrong[0]}"
        )
    torch.set_num_threads(sent.threads)
    with torch.no_grad():
        return sent.matrix().to(device).round(_panels(device)).to(torch.device("cpu"))


@cache
def _panels(device: torch.device) -> PanelRounder:
    """Of a worker, which Ray keeps from task to task: its graphs are captured once."""
    return panels_for([device])[0]


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.float().cpu().contiguous().numpy()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
