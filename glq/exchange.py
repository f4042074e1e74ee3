"""Memory in which the blocks of a kernel hand each other sums: all ones before a kernel and after it.

Kernels that run at the same time must not share it: each stream has its own, and in each CUDA graph, too. It is not
taken from PyTorch's allocator, which would give a graph's memory to the next one (and torch.compile forbids to keep
any). A graph's is used again when the graph is gone, which CUDA says by a "user object" that the graph owns.
"""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from glq.errors import GlqError

_AT_LEAST = 1 << 16  # words
_SEMAPHORE = 32  # bytes of a sem_t, on 64-bit Linux


class Arenas:
    """Those of one device.

    graphs_in_turn: no two CUDA graphs are replayed at a time, so they may share what they have.
    """

    def __init__(self, device: torch.device) -> None:
        self.graphs_in_turn = False
        self._device = device
        self._of_streams: dict[tuple[int, bool], Tensor] = {}  # by stream, and whether for graphs
        self._of_captures: dict[tuple[int, int], list[_Lent]] = {}  # by capture and stream
        self._free: list[Tensor] = []

    def get(self, count: int) -> Tensor:
        """[≥ count] fp32 for the current stream, or for the graph that is captured from it."""
        stream, capture, graph = _current(self._device)
        if graph is not None and not self.graphs_in_turn:
            return self._of_capture((capture, stream), graph, count)
        key = (stream, graph is not None)
        found = self._of_streams.get(key)
        if found is None or len(found) < count:  # kernels under way may still use the smaller one: it is kept, too
            found = self._of_streams[key] = self._take(count)
        return found

    def _of_capture(self, key: tuple[int, int], graph: Any, count: int) -> Tensor:
        for one in self._of_captures.get(key, []):
            if len(one.words) >= count:
                return one.words
        found = self._take(count)
        self._of_captures.setdefault(key, []).append(_Lent(found, _end_of(graph)))
        return found

    def _take(self, count: int) -> Tensor:
        for key, lent in list(self._of_captures.items()):
            ended = [_is_posted(one.end) for one in lent]  # asked once: another may end meanwhile
            self._free += [one.words for one, over in zip(lent, ended, strict=True) if over]
            if all(ended):
                del self._of_captures[key]
            else:
                self._of_captures[key] = [one for one, over in zip(lent, ended, strict=True) if not over]
        fitting = [i for i, words in enumerate(self._free) if len(words) >= count]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        return _allocate(max(_AT_LEAST, 1 << (count - 1).bit_length()), self._device)


@dataclass(frozen=True)
class _Lent:
    words: Tensor
    end: int | None  # address of a semaphore that is posted when the graph is gone; None: that is never known


class _Allocated:
    """Memory that is never given back, in the form that torch.as_tensor takes."""

    def __init__(self, address: int, words: int) -> None:
        self.__cuda_array_interface__ = {"shape": (words,), "typestr": "<f4", "data": (address, False), "version": 3}


def _allocate(words: int, device: torch.device) -> Tensor:
    """[words] of ones, bit for bit; also while a graph is captured, which then has nothing of it."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        mode = _checked(
            driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        )
        try:
            address = _checked(driver.cuMemAlloc(4 * words))
            stream = _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
            _checked(driver.cuMemsetD32Async(address, 0xFFFFFFFF, words, stream))
            _checked(driver.cuStreamSynchronize(stream))
            _checked(driver.cuStreamDestroy(stream))
        finally:
            _checked(driver.cuThreadExchangeStreamCaptureMode(mode))
    return torch.as_tensor(_Allocated(int(address), words), device=device)


def _current(device: torch.device) -> tuple[int, int, Any]:
    """The current stream of a device, by its handle, and what _capture says of it."""
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if torch.cuda.current_device() == device.index and not torch.cuda.is_current_stream_capturing():
        return stream, 0, None  # as nearly always, and found in a quarter of the time
    return stream, *_capture(stream)


def _capture(stream: int) -> tuple[int, Any]:
    """The number of the capture that goes on in a stream, by its handle, and the graph that it makes; None: none."""
    from cuda.bindings import driver

    error, status, number, graph, *_ = driver.cuStreamGetCaptureInfo(stream)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise GlqError(f"CUDA does not tell whether a graph is being captured: {error}")
    active = status == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
    return (int(number), graph) if active else (0, None)


def _end_of(graph: Any) -> int | None:
    """A semaphore that CUDA posts when the graph and all that was made of it are gone.

    By the C library itself: Python may not be called from CUDA's thread. Its 32 bytes are never freed, as the process
    may end before the graph.
    """
    if sys.platform != "linux":
        return None
    from cuda.bindings import driver

    end = _new_semaphore()
    post = ctypes.cast(_libc().sem_post, ctypes.c_void_p).value
    flags = driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
    owned = _checked(driver.cuUserObjectCreate(end, driver.CUhostFn(post), 1, flags.value))
    moved = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
    _checked(driver.cuGraphRetainUserObject(graph, owned, 1, moved.value))
    return end


def _new_semaphore() -> int:
    libc = _libc()
    address = libc.calloc(1, _SEMAPHORE)
    libc.sem_init(ctypes.c_void_p(address), 0, 0)
    return address


def _is_posted(semaphore: int | None) -> bool:
    value = ctypes.c_int(0)
    if semaphore is not None:
        _libc().sem_getvalue(ctypes.c_void_p(semaphore), ctypes.byref(value))
    return value.value > 0


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    return libc


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a function of the driver gave besides its error. GlqError if there is one."""
    from cuda.bindings import driver

    error, *values = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise GlqError(f"CUDA refuses memory for the kernels: {error}")
    return values[0] if values else None
