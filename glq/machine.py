"""What the process may ask of the machine: a device, and how much memory it took."""

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from glq import __version__
from glq.errors import GlqError


def pick_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one. GlqError for a device that torch does not have."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        why = "there is none of that name, name cuda or cpu" if why.startswith("Expected one of") else why
        raise GlqError(f"device {device!r} cannot be used: {why}") from error
    return torch.device(device)


def describe(device: torch.device) -> str:
    """Its name, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Products of fp32 matrices on a GPU take TF32 while the context lasts: factors of 11 bits, sums in fp32."""
    matmul = torch.backends.cuda.matmul
    key, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, key)
    setattr(matmul, key, value)
    try:
        yield
    finally:
        setattr(matmul, key, before)


def likeness(device: torch.device) -> dict[str, str]:
    """What makes another machine compute the same to the last bit, the number of threads aside."""
    if device.type == "cuda":
        unit = torch.cuda.get_device_name(device)
    else:
        unit = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"glq": __version__, "PyTorch": torch.__version__, "unit": unit}


def _processor() -> str:
    """Its model, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes of memory that the process can still have, within its control group; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = next(int(size) for name, size in stat if name == "inactive_file")
        return min(free, int(limit) - int(used) + cached)
    except (OSError, StopIteration, ValueError):  # no limit ("max"), or no such group
        return free


def release_memory() -> None:
    """Give freed heap pages back to the system: glibc keeps those of large tensors, which adds up over the blocks."""
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(0)


def keep_large_tensors_off_the_heap() -> None:
    """Have glibc map each allocation of 16 MiB or more by itself, so that it is gone when it is freed.

    For a whole process, so it is for the one that owns it to call. glibc would move the threshold up otherwise, and
    keep what lies below; a lower one costs page faults (docs/decisions.md, "Memory of quantizing").
    """
    option = _libc_function("mallopt")
    if option is not None:
        option(-3, 16 * 2**20)  # M_MMAP_THRESHOLD


def _libc_function(name: str) -> Any:
    """A function of glibc, or None where there is none of that name (musl, macOS, Windows)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
