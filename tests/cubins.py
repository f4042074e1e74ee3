"""What kernels are compiled for in the tests, and what NVRTC's assembler says of them."""

import re

import pytest

from glq.codecs import CODECS
from glq.codecs.trellis import Trellis

TRELLISES = {name: codec for name, codec in CODECS.items() if isinstance(codec, Trellis)}
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"]
SHARED_MEMORY = {80: 164, 90: 228, 100: 228, 103: 228}  # KB of a multiprocessor; of the others 100
HOPPER, HOPPER_AT_EVERY_RATE = "sm_90", "sm_90 at every rate"
COMPILED_FOR = [*ARCHITECTURES, pytest.param(HOPPER_AT_EVERY_RATE, marks=pytest.mark.slow)]


def rates(case: str) -> list[str]:
    """Trellis codes that are compiled for it: architectures with the same kernels have different ones."""
    if case == HOPPER_AT_EVERY_RATE:
        return list(TRELLISES)
    others = [2.25] if ARCHITECTURES.index(case) % 2 else [4]
    return [f"trellis-{bits}" for bits in ([1.5, 3, 3.25, 4] if case == HOPPER else others)]


def lattices(case: str) -> list[str]:
    """The others."""
    return [name for name in CODECS if name not in TRELLISES] if case == HOPPER else ["nested-3"]


def spilled(report: str) -> set[int]:
    """Bytes of registers that it keeps in memory. Skips the test where NVRTC does not pass on what it says."""
    if not report.strip():
        pytest.skip("this NVRTC does not say what its assembler does")
    return {int(n) for n in re.findall(r"(\d+) bytes spill", report)}


def check_pipeline(plan) -> None:
    """Products of warpgroups run while others are made ready: ptxas says so where they do not."""
    assert plan.shared <= 227 * 1024
    _, report = plan.source.compile_and_report("sm_90a")
    assert "serialized" not in report
    assert spilled(report) == {0}
