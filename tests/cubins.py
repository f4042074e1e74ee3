"""What NVRTC's assembler says of a kernel."""

import re

import pytest


def spilled(report: str) -> set[int]:
    """Bytes of registers that it keeps in memory. Skips the test where NVRTC does not pass on what it says."""
    if not report.strip():
        pytest.skip("this NVRTC does not say what its assembler does")
    return {int(n) for n in re.findall(r"(\d+) bytes spill", report)}
