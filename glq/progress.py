"""What long work tells whoever waits for it."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TextIO

from glq.machine import peak_memory


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of a stage, and a word on the last one."""

    stage: str  # "rounding", "measuring", "tuning"
    done: int
    total: int
    note: str
    layer: str = ""  # that was rounded last
    error: float | None = None  # share of its outputs' energy that was lost, on the calibration text


Listener = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The listener of those who do not wait."""


class JsonLog:
    """A listener that writes a line of JSON for each step, to a file that stays open."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._begun = file, time.monotonic()

    def __call__(self, step: Progress) -> None:
        seconds = round(time.monotonic() - self._begun, 3)
        self._file.write(json.dumps(asdict(step) | {"seconds": seconds, "peak_bytes": peak_memory()}) + "\n")
        self._file.flush()
