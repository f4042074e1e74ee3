"""Kernels in CUDA C++ on a CPU: their sources, compiled by g++ with tests/emulator/cuda.h instead of ops/ptx.cuh."""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

HERE = Path(__file__).parent
PLAYED = ("ptx.cuh", "wgmma.cuh", "half2.cuh", "device.cuh", "cluster.cuh")  # by the headers here


class Emulator:
    """An nvrtc.Launcher without a GPU."""

    arch = 90

    def __init__(
        self, multiprocessors: int, shared_memory: int = 228 * 1024, begin: int = 1024, resident: int = 1, rank: int = 0
    ) -> None:
        """begin: where dynamic shared memory does. resident: blocks that run at a time; those of a cluster always do.

        rank: of those that run in threads of their own, each by a library of its own.
        """
        self._begin = begin
        self._resident = resident
        self._rank = rank
        self.multiprocessors = multiprocessors
        self.shared_memory = shared_memory
        self._exchange = torch.full((1 << 20,), -1, dtype=torch.int32).view(torch.float32)

    def exchange(self, count):
        assert count <= len(self._exchange)
        assert (self._exchange.view(torch.int32) == -1).all()
        return self._exchange

    def launch(self, source, name, grid, block, shared, *arguments):
        assert shared <= 2**18
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments]
        columns, rows = grid if isinstance(grid, tuple) else (grid, 1)
        array = (ctypes.c_longlong * len(values))(*values)
        resident = max(self._resident, dict(source.macros).get("CLUSTER", 1))
        getattr(_library(source, self._begin, resident, self._rank), f"run_{name}")(columns, rows, block, array)


@cache
def _library(source, begin, resident, rank):
    texts = [files("glq").joinpath(f).read_text() for f in source.files if Path(f).name not in PLAYED]
    code = "\n".join([*texts, source.text])
    code = re.sub(
        r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];", r"\1* \2 = (\1*)(dynamic_shared + SHARED_BEGIN);", code
    )
    macros = "".join(f"#define {name} {value}\n" for name, value in source.macros)
    macros += f"#define SHARED_BEGIN {begin}\n#define RESIDENT {resident}\n#define RANK {rank}\n"
    headers = ("cuda.h", "half2.h", *(["cluster.h"] if "CLUSTER" in dict(source.macros) else []))
    text = macros + "".join((HERE / header).read_text() for header in headers) + code + _entries(code)
    folder = Path(tempfile.gettempdir()) / f"glq-emulator-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    library = folder / "kernels.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        (folder / "kernels.cpp").write_text(text)
        _compile(folder, library.name, "-include", str(_system()), "-shared", "kernels.cpp")
    return ctypes.CDLL(str(library))


def _compile(folder: Path, out: str, *arguments: str) -> None:
    own = f"{os.getpid()}-{out}"  # other workers may build the same
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-o", own, *arguments], cwd=folder, check=True)
    (folder / own).rename(folder / out)


@cache
def _system() -> Path:
    """A header that g++ finds compiled beside it, which takes a third off each kernel."""
    text = (HERE / "system.h").read_bytes()
    folder = Path(tempfile.gettempdir()) / f"glq-emulator-system-{hashlib.sha256(text).hexdigest()[:16]}"
    if not (folder / "system.h.gch").exists():
        folder.mkdir(exist_ok=True)
        own = folder / f"{os.getpid()}.h"
        own.write_bytes(text)
        own.rename(folder / "system.h")
        _compile(folder, "system.h.gch", "-x", "c++-header", "system.h")
    return folder / "system.h"


def _entries(code: str) -> str:
    """For each kernel a function that takes the grid and an array of 64-bit arguments."""
    entries = []
    for name, parameters in re.findall(r"__global__ void[^\n]*\n(\w+)\((.*?)\) \{", code, re.S):
        kinds = [parameter.strip().rsplit(" ", 1)[0] for parameter in parameters.split(",")]
        call = f"{name}({', '.join(f'({kind})a[{i}]' for i, kind in enumerate(kinds))})"
        entries.append(
            f'extern "C" void run_{name}(int columns, int rows, int threads, long long* a) '
            f"{{ run_grid(columns, rows, threads, [a] {{ {call}; }}); }}\n"
        )
    return "".join(entries)
