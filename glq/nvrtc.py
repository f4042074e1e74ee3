"""CUDA C++ compiled when it is first needed, by NVRTC: no compiler at the user's side, and once for each GPU kind."""

import hashlib
import io
import os
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glq.errors import GlqError, how_to_install
from glq.exchange import Arenas

RESERVED = 1024  # bytes of shared memory that the driver takes for each block, from compute capability 8.0 on


@dataclass(frozen=True)
class Source:
    """CUDA files of the package, one after the other, and the macros that specialize them."""

    files: tuple[str, ...]  # relative to the package: "codecs/viterbi.cu"
    macros: tuple[tuple[str, int], ...]
    of_one_arch: bool = False  # instructions that no other architecture has: sm_90a instead of sm_90
    text: str = ""  # code that follows the files

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # once: every launch looks for its kernel
        return hash((self.files, self.macros, self.of_one_arch, self.text))

    def compile(self, arch: str) -> bytes:
        """A cubin for `arch` ("sm_90"); needs no GPU. GlqError if cuda-core is not installed."""
        return self.compile_and_report(arch)[0]

    def compile_and_report(self, arch: str) -> tuple[bytes, str]:
        """And what the assembler says of registers and memory."""
        try:
            from cuda.core import Program, ProgramOptions
        except ModuleNotFoundError as error:
            raise GlqError(f"CUDA kernels need {error.name}: {how_to_install('cuda')}") from error
        defines = [f"{name}={value}" for name, value in self.macros]
        options = ProgramOptions(
            arch=arch,
            std="c++17",
            define_macro=defines,
            device_as_default_execution_space=True,
            ptxas_options=["-v"],
        )
        report = io.StringIO()
        code = Program(self._text(), code_type="c++", options=options).compile("cubin", logs=report).code
        return bytes(code), report.getvalue()

    def cubin(self, arch: str) -> bytes:
        """As `compile`, kept on disk for the next process; concurrent writers are harmless."""
        key = hashlib.sha256(repr((self, arch, self._text())).encode()).hexdigest()[:32]
        path = _cache_dir() / f"{Path(self.files[-1]).stem}-{arch}-{key}.cubin"
        try:
            return path.read_bytes()
        except OSError:
            code = self.compile(arch)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
                f.write(code)
            os.replace(f.name, path)
        except OSError:
            pass  # a cache that cannot be written is only slow
        return code

    def _text(self) -> str:
        texts = [files("glq").joinpath(file).read_text(encoding="utf-8") for file in self.files]
        return "\n".join([*texts, self.text])


def available() -> bool:
    """Whether kernels can be compiled here."""
    try:
        import cuda.core  # noqa: F401
        import platformdirs  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def compiles_for(device: torch.device) -> bool:
    """Whether they can, for a CUDA device that has the instructions of all of them: from sm_80 on."""
    return available() and torch.cuda.get_device_capability(device) >= (8, 0)


class Launcher(Protocol):
    """What runs kernels on one device."""

    arch: int  # compute capability: 90 is 9.0
    multiprocessors: int
    shared_memory: int  # bytes of a multiprocessor; each block takes RESERVED of them besides its own

    def launch(
        self,
        source: Source,
        name: str,
        grid: int | tuple[int, int],
        block: int,
        shared: int,
        *arguments: Tensor | int | None,
    ) -> None:
        """Run the kernel `name` (extern "C") on the current stream; `shared`: bytes of dynamic shared memory a block.

        Tensors go as pointers, None as a null pointer, integers as int32. From sm_90 on it may start before the kernel
        ahead of it is done, and waits for that by itself (griddepcontrol).
        """

    def exchange(self, count: int) -> Tensor:
        """[≥ count] fp32 whose bits are all ones, in which the blocks of a kernel hand each other sums.

        The kernel has to leave it as it was.
        """

    def __hash__(self) -> int:
        """By identity: plans for a device are kept."""


class Gpu:
    """A CUDA device. One for each: gpu()."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        self.multiprocessors: int = properties.multi_processor_count
        self.shared_memory: int = properties.shared_memory_per_multiprocessor
        self.arch: int = 10 * properties.major + properties.minor
        self._index: int = device.index or 0
        self._kernels: dict[tuple[Source, str], Any] = {}
        self._streams: dict[int, Any] = {}  # by handle
        self._shared: dict[tuple[Source, str], int] = {}  # bytes that a kernel may take for a block
        self._ready = lru_cache(4096)(self._prepare)
        self.arenas = Arenas(device)

    def launch(
        self,
        source: Source,
        name: str,
        grid: int | tuple[int, int],
        block: int,
        shared: int,
        *arguments: Tensor | int | None,
    ) -> None:
        """As Launcher.launch. Outside of graphs a layer takes a dozen, so what can be kept from one to the next is."""
        kernel, config = self._ready(source, name, grid, block, shared)
        values = [_int32(a) if isinstance(a, int) else 0 if a is None else a.data_ptr() for a in arguments]
        if torch.cuda.current_device() == self._index:
            _core().launch(self._stream(), config, kernel, *values)
        else:
            with torch.cuda.device(self._device):
                _core().launch(self._stream(), config, kernel, *values)

    def exchange(self, count: int) -> Tensor:
        """As Launcher.exchange."""
        return self.arenas.get(count)

    def _stream(self) -> Any:
        handle = torch._C._cuda_getCurrentRawStream(self._index)  # as Triton does: no object, so a tenth of the time
        if handle not in self._streams:
            self._streams[handle] = _core().Stream.from_handle(handle)
        return self._streams[handle]

    def _prepare(self, source: Source, name: str, grid: int | tuple[int, int], block: int, shared: int) -> Any:
        """The kernel, and how it is launched."""
        config = _core().LaunchConfig(
            grid=grid, block=block, shmem_size=shared, programmatic_stream_serialization=self.arch >= 90
        )
        return self._kernel(source, name, shared), config

    def _kernel(self, source: Source, name: str, shared: int) -> Any:
        """Loaded once; how much shared memory it may take is raised where a launch needs more."""
        key = (source, name)
        if key not in self._kernels:
            self._kernels[key], self._shared[key] = self._load(source, name), 0
        if shared > self._shared[key]:
            from cuda.bindings import driver

            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (error,) = driver.cuKernelSetAttribute(attribute, shared, self._kernels[key].handle, self._index)
            if error != driver.CUresult.CUDA_SUCCESS:
                raise GlqError(f"{name} needs {shared} bytes of shared memory a block, which this GPU refuses: {error}")
            self._shared[key] = shared
        return self._kernels[key]

    def _load(self, source: Source, name: str) -> Any:
        from cuda.core import Device, ObjectCode

        torch.cuda.current_stream(self._index)  # torch's context is the one
        Device(self._index).set_current()
        return ObjectCode.from_cubin(source.cubin(f"sm_{self.arch}{'a' * source.of_one_arch}")).get_kernel(name)


def gpu(device: torch.device) -> Gpu:
    """The one of a CUDA device."""
    return _gpu(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)


_gpu = cache(Gpu)


@cache
def _core() -> Any:
    import cuda.core

    return cuda.core


@lru_cache(4096)
def _int32(value: int) -> Any:
    import numpy as np

    return np.int32(value)


def _cache_dir() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("glq")
