"""Who rounds matrices on this machine: one device, or several side by side."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch

from glq import spread
from glq.rounder import Matrix, Outcome
from glq.rounding import GraphedPanelRounder, PanelRounder, factor, round_panel


def panels_for(devices: Sequence[torch.device]) -> list[PanelRounder]:
    """A rounder of panels for each device, all of one kind."""
    if devices[0].type != "cuda":
        return [round_panel for _ in devices]
    capturing = Lock()
    return [GraphedPanelRounder(capturing) for _ in devices]


class Devices:
    """Devices of this machine. Matrices are on the first, and what is returned."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._panels = panels_for(devices)
        self._ways: dict[int, torch.cuda.Stream] = {}  # of the first GPU, by who copies from it and to it
        if devices[0].type == "cuda":
            for i, device in enumerate(devices[1:], 1):
                factor(torch.eye(2, device=device), 1)  # PyTorch loads its solvers now, which threads must not do
                self._ways[i] = torch.cuda.Stream(devices[0])

    @property
    def device(self) -> torch.device:
        return self._devices[0]

    @property
    def count(self) -> int:
        return len(self._devices)

    def __call__(self, matrices: Sequence[Matrix]) -> list[Outcome]:
        for way in self._ways.values():
            way.wait_stream(torch.cuda.current_stream(self.device))  # which makes the matrices
        return spread.run(self._devices, [self._task(matrix) for matrix in matrices])

    def _task(self, matrix: Matrix) -> spread.Task[Outcome]:
        def work(index: int) -> Outcome:
            panels = self._panels[index]
            if index == 0:
                return matrix.round(panels)
            with self._apart(index):
                own = matrix.to(self._devices[index])
            outcome = own.round(panels)
            with self._apart(index):
                return outcome.to(self.device)

        return spread.Task(matrix.size, work, matrix.nbytes)

    @contextmanager
    def _apart(self, index: int) -> Iterator[None]:
        """What is copied here does not wait for what the first GPU still has to round, seconds of which are queued."""
        if index not in self._ways:
            yield
            return
        with torch.cuda.stream(self._ways[index]):
            yield
        self._ways[index].synchronize()
