"""What long work tells whoever waits for it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of a stage, and a word on the last one."""

    stage: str  # "rounding", "measuring", "tuning"
    done: int
    total: int
    note: str


Listener = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The listener of those who do not wait."""
