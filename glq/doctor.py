"""What this machine has, and which of glq's kernels it gets: what `glq doctor` tells."""

import ctypes
import os
import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import torch

from glq import nvrtc
from glq.errors import how_to_install
from glq.gpus import evidence
from glq.machine import available_memory
from glq.ops.matmul import has_cuda_kernel, has_triton_kernel

# what glq's tests and benchmarks were run with
TESTED = {
    "torch": "2.11 (H100), 2.13",
    "transformers": "5.17 (H100), 5.23",
    "safetensors": "0.4.5 and later",
    "cuda-core": "1.2",
    "nvidia-cuda-nvrtc": "13",
    "triton": "3.6 (H100), 3.9",
    "vllm": "0.32",
    "lm_eval": "0.4.13",
}
_EXTRAS = {"cuda-core": "cuda", "nvidia-cuda-nvrtc": "cuda", "vllm": "vllm", "lm_eval": "eval", "transformers": "hf"}


@dataclass(frozen=True)
class Package:
    """found: its version here, None where it is not installed; tested: with which glq was."""

    name: str
    found: str | None
    tested: str
    extra: str | None  # of glq, which brings it


@dataclass(frozen=True)
class Device:
    """A GPU as the driver describes it."""

    name: str
    arch: str
    memory: int  # bytes
    multiprocessors: int
    evidence: str


@dataclass(frozen=True)
class Choice:
    """The family of kernels that products with these codecs take here, and why."""

    codecs: str
    family: str
    why: str


def packages() -> list[Package]:
    return [Package(name, _version(name), tested, _EXTRAS.get(name)) for name, tested in TESTED.items()]


def system() -> dict[str, str]:
    """Python, the system, what it has free, and the NVIDIA driver, where there is one."""
    cuda = torch.version.cuda
    return {
        "Python": f"{platform.python_version()} (tested: 3.11, 3.12)",
        "system": f"{platform.system()} {platform.machine()}",
        "cores and memory": f"{os.cpu_count()}, {available_memory() / 1e9:.1f} GB free",
        "disk here": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free",
        "NVIDIA driver": driver_version() or "none found",
        "CUDA of torch": cuda or "none: this torch is built without it",
    }


def busy() -> str | None:
    """What to do where other work has the cores: threads that wait for each other by spinning are then slow."""
    load, cores = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1
    if load < cores / 2:
        return None
    threads = max(1, cores - round(load))
    return (
        f"other work has {load:.1f} of {cores} cores: OMP_NUM_THREADS={threads} glq … may be several times faster here"
    )


def driver_version() -> str | None:
    """By NVML, which comes with the driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1" if platform.system() != "Windows" else "nvml.dll")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlSystemGetDriverVersion(text, 96) != 0:
        return None
    return text.value.decode()


def devices() -> list[Device]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        arch = f"sm_{p.major}{p.minor}"
        found.append(Device(p.name, arch, p.total_memory, p.multi_processor_count, evidence(arch)))
    return found


def choices(device: torch.device) -> list[Choice]:
    """Which kernels run on this device, after trying them."""
    if device.type != "cuda":
        built = "torch finds no NVIDIA GPU" if torch.version.cuda else "this torch is built without CUDA"
        return [Choice("all", "PyTorch", f"{built}; `glq generate` decodes the weights once, when it loads them")]
    x = torch.empty(1, device=device, dtype=torch.bfloat16)
    found = []
    for codecs, codec in (("trellis", "trellis-4"), ("E8", "e8-2"), ("nested", "nested-3")):
        works, said = _asked(partial(has_cuda_kernel, x, codec))
        if works:
            right = "NVRTC compiles for this GPU, and small products are right"
            found.append(Choice(f"{codecs}, fp16 and bf16", "CUDA C++", right))
        else:
            found.append(_triton(codec, codecs, device, said or _why_no_cuda(device)))
    return [*found, _triton("trellis-4", "fp32", device, "CUDA C++ is for fp16 and bf16")]


def _triton(codec: str, codecs: str, device: torch.device, why_no_cuda: str) -> Choice:
    works, said = _asked(lambda: has_triton_kernel(device, codec))
    if works:
        return Choice(codecs, "Triton", why_no_cuda)
    missing = "Triton is not installed" if _version("triton") is None else "Triton does not work here"
    return Choice(codecs, "PyTorch", f"{why_no_cuda}; {said or missing}")


def _why_no_cuda(device: torch.device) -> str:
    if not nvrtc.available():
        return f"cuda-core or platformdirs is not installed: {how_to_install('cuda')}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor} is older than sm_80" if major < 8 else "CUDA C++ does not work here"


def _asked(question: Callable[[], bool]) -> tuple[bool, str]:
    """Its answer, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = question()
    return answer, "; ".join(str(w.message).splitlines()[0] for w in caught if "glq" in str(w.message))


def _version(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None
