"""NVIDIA GPUs by their makers' data sheets, and the bound that their memory sets to decoding."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind. gb and gbps: 10⁹ bytes of memory, and of reading a second."""

    name: str
    arch: str
    gb: int
    gbps: int


GPUS = (
    Gpu("A100 80GB SXM", "sm_80", 80, 2039),
    Gpu("A100 40GB", "sm_80", 40, 1555),
    Gpu("RTX 3090", "sm_86", 24, 936),
    Gpu("A10", "sm_86", 24, 600),
    Gpu("RTX 4070", "sm_89", 12, 504),
    Gpu("RTX 4070 Ti SUPER", "sm_89", 16, 672),
    Gpu("RTX 4080", "sm_89", 16, 717),
    Gpu("RTX 4090", "sm_89", 24, 1008),
    Gpu("L4", "sm_89", 24, 300),
    Gpu("L40S", "sm_89", 48, 864),
    Gpu("H100 SXM", "sm_90", 80, 3350),
    Gpu("H100 PCIe", "sm_90", 80, 2000),
    Gpu("H200", "sm_90", 141, 4800),
    Gpu("B200", "sm_100", 180, 8000),
    Gpu("B300", "sm_103", 288, 8000),
    Gpu("RTX 5070", "sm_120", 12, 672),
    Gpu("RTX 5070 Ti", "sm_120", 16, 896),
    Gpu("RTX 5080", "sm_120", 16, 960),
    Gpu("RTX 5090", "sm_120", 32, 1792),
    Gpu("RTX PRO 6000 Blackwell (workstation)", "sm_120", 96, 1792),
    Gpu("RTX PRO 6000 Blackwell Server (AWS g7e)", "sm_120", 96, 1597),
    Gpu("DGX Spark (GB10)", "sm_121", 128, 273),
)
COMPILED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")  # by tests/test_cuda_matmul.py
RUN = ("sm_90",)  # where the kernels were run and timed:
TIMED = ("H100 SXM", "H200")


def evidence(arch: str) -> str:
    """How far glq's kernels are known to work on GPUs of this architecture."""
    if arch in RUN:
        return "run and timed"
    return "compiled in the tests, run on an emulator, not on such a GPU" if arch in COMPILED else "not tried"


def bound(gbps: float, nbytes: int) -> float:
    """Tokens a second of one sequence if reading the weights at the full bandwidth were all that a step takes."""
    return gbps * 1e9 / nbytes
