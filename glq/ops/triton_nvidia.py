"""What Triton has for NVIDIA GPUs alone: kernels that start early, and how many registers they may take.

With programmatic dependent launch (from sm_90 on) a kernel may start before the one ahead of it has ended: once all of
that one's programs have said gdc_launch_dependents, or ended. What that one and those before it write may be read after
gdc_wait; where it said so after its own gdc_wait, what those before it wrote may be read at once.
"""

from dataclasses import fields
from functools import cache

import torch

__all__ = ["gdc_launch_dependents", "gdc_wait", "is_nvidia", "options", "starts_early"]

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    gdc_launch_dependents = gdc_wait = None


def is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@cache
def starts_early(device: torch.device) -> bool:
    """Whether Triton and the GPU let kernels start early."""
    if not is_nvidia(device) or torch.cuda.get_device_capability(device) < (9, 0) or gdc_wait is None:
        return False
    from triton.backends.nvidia.compiler import CUDAOptions

    return any(field.name == "launch_pdl" for field in fields(CUDAOptions))


def options(device: torch.device, registers: int | None = None) -> dict[str, int]:
    """Of a launch; registers: that a thread has at most."""
    early = {"launch_pdl": True} if starts_early(device) else {}
    return early | ({"maxnreg": registers} if registers and is_nvidia(device) else {})
