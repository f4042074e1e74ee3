"""CUDA C++ compiled when it is first needed, by NVRTC: no compiler at the user's side, and once for each GPU kind."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from glq.errors import GlqError


@dataclass(frozen=True)
class Source:
    """A .cu file of the package, and the macros that specialize it."""

    file: str  # relative to the package: "codecs/viterbi.cu"
    macros: tuple[tuple[str, int], ...]

    def compile(self, arch: str) -> bytes:
        """A cubin for `arch` ("sm_90"); needs no GPU. GlqError if cuda-core is not installed."""
        try:
            from cuda.core import Program, ProgramOptions
        except ModuleNotFoundError as error:
            raise GlqError(f"CUDA kernels need {error.name}: pip install 'glq[cuda]'") from error
        defines = [f"{name}={value}" for name, value in self.macros]
        options = ProgramOptions(arch=arch, std="c++17", define_macro=defines, device_as_default_execution_space=True)
        return bytes(Program(self._text(), code_type="c++", options=options).compile("cubin").code)

    def cubin(self, arch: str) -> bytes:
        """As `compile`, kept on disk for the next process; concurrent writers are harmless."""
        key = hashlib.sha256(repr((self, arch, self._text())).encode()).hexdigest()[:32]
        path = _cache_dir() / f"{Path(self.file).stem}-{arch}-{key}.cubin"
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
        return files("glq").joinpath(self.file).read_text(encoding="utf-8")


def available() -> bool:
    """Whether kernels can be compiled here."""
    try:
        import cuda.core  # noqa: F401
        import platformdirs  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


@cache
def kernel(source: Source, name: str, device: torch.device, shared: int) -> Any:
    """The kernel `name` (extern "C") of a source, loaded on a CUDA device; `shared` bytes of dynamic shared memory."""
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    index = device.index if device.index is not None else torch.cuda.current_device()
    torch.cuda.current_stream(index)  # torch's context is the one
    Device(index).set_current()
    major, minor = torch.cuda.get_device_capability(index)
    loaded = ObjectCode.from_cubin(source.cubin(f"sm_{major}{minor}")).get_kernel(name)
    if shared > 48 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(attribute, shared, loaded.handle, index)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise GlqError(f"{name} needs {shared} bytes of shared memory a block, which this GPU refuses: {error}")
    return loaded


def launch(loaded: Any, grid: int, block: int, shared: int, *arguments: torch.Tensor | int) -> None:
    """Run a kernel on torch's current stream: tensors go as pointers, integers as int32."""
    import numpy as np
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as run

    stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
    config = LaunchConfig(grid=grid, block=block, shmem_size=shared)
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else np.int32(a) for a in arguments]
    run(stream, config, loaded, *values)


def _cache_dir() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("glq")
