"""Tensors that wait on disk: their memory becomes a mapping of a file, whose pages are dropped until they are read.

What a decoder block and its paused passes keep is larger than what is worked on at a time. A tensor that is put here
stays the same object with the same values; the file has no name any more, and is gone with the tensor. A view keeps
what it is a view of in memory, so that one is what moves, and the view becomes one of it there.
"""

import ctypes
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from glq.errors import ResumableError

LEAST = 2**20  # bytes of a tensor that is worth a file
_READ_WRITE, _SHARED, _DONTNEED = 3, 1, 4


class Spill:
    """Puts CPU tensors into unnamed files in a folder. Tensors of a GPU, and small ones, stay where they are."""

    def __init__(self, folder: Path | None) -> None:
        """folder: None leaves everything in memory, as do systems without mmap."""
        self._folder = folder if sys.platform in ("linux", "darwin") else None
        self._live: dict[int, int] = {}  # address of a mapping → its bytes

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Move tensors to disk, and let go of the pages that were read of those that are there already.

        Resumable if the disk is full.
        """
        if self._folder is None:
            return
        for tensor in tensors:
            whole = tensor._base if tensor._is_view() else tensor
            if whole is None:
                continue
            self._put(whole)
            if tensor is not whole and _address(whole) in self._live and _address(tensor) != _address(whole):
                tensor.data = whole.data.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def put_module(self, module: nn.Module) -> None:
        self.put(module.parameters())

    def _put(self, tensor: Tensor) -> None:
        at = _address(tensor)
        if at in self._live:
            _libc().madvise(ctypes.c_void_p(at), ctypes.c_size_t(self._live[at]), _DONTNEED)
        elif _worth(tensor):
            tensor.data = self._mapped(tensor.data)

    def _mapped(self, tensor: Tensor) -> Tensor:
        """The same values and strides in the pages of a file."""
        flat = tensor.as_strided((tensor.numel(),), (1,))
        nbytes = tensor.nbytes
        try:
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                left = flat.view(torch.uint8).numpy().data
                while len(left):
                    left = left[file.write(left) :]
                at = _libc().mmap(None, nbytes, _READ_WRITE, _SHARED, file.fileno(), 0)
        except OSError as error:
            raise ResumableError(f"cannot keep activations on disk in {self._folder}: {error.strerror}") from error
        if at in (None, ctypes.c_void_p(-1).value):
            raise ResumableError(f"cannot map {nbytes:,} bytes of a file in {self._folder} into memory")
        pages = (ctypes.c_char * nbytes).from_address(at)
        self._live[at] = nbytes
        weakref.finalize(pages, _unmap, self._live, at, nbytes).atexit = False
        mapped = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel())
        return mapped.as_strided(tensor.size(), tensor.stride())


def host_copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of tensors of a GPU, in the host's page-locked memory, which the GPU reads at the speed of the bus."""
    return [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t) for t in tensors]


def held_by(frame: FrameType | None) -> Iterator[Tensor]:
    """The tensors in the local variables of a frame and of those that called it; parameters are not among them."""
    while frame is not None:
        yield from _tensors_in(list(frame.f_locals.values()))
        frame = frame.f_back


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors_in(item)
    elif type(value) is dict:
        yield from _tensors_in(list(value.values()))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _worth(tensor: Tensor) -> bool:
    """Whether it is large, in memory, and dense, in whatever order its dimensions are."""
    if tensor.device.type != "cpu" or tensor.nbytes < LEAST or tensor.layout is not torch.strided:
        return False
    if tensor.storage_offset() != 0:
        return False
    size = 1
    for stride, length in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != size:
            return False
        size *= length
    return True


def _unmap(live: dict[int, int], at: int, nbytes: int) -> None:
    del live[at]
    _libc().munmap(ctypes.c_void_p(at), ctypes.c_size_t(nbytes))


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    sizes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
    libc.mmap.argtypes = (ctypes.c_void_p, *sizes)
    return libc
