"""Who rounds matrices on this machine: one device, or several side by side."""

from collections.abc import Sequence
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
        if devices[0].type == "cuda":
            for device in devices[1:]:  # PyTorch loads its solvers when they are first used, which threads must not do
                factor(torch.eye(2, device=device), 1)

    @property
    def device(self) -> torch.device:
        return self._devices[0]

    @property
    def count(self) -> int:
        return len(self._devices)

    def __call__(self, matrices: Sequence[Matrix]) -> list[Outcome]:
        return spread.run(self._devices, [self._task(matrix) for matrix in matrices])

    def _task(self, matrix: Matrix) -> spread.Task[Outcome]:
        def work(index: int) -> Outcome:
            panels = self._panels[index]
            if index == 0:
                return matrix.round(panels)
            return matrix.to(self._devices[index]).round(panels).to(self.device)

        return spread.Task(matrix.size, work)
