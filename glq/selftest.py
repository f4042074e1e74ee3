"""Each kernel for itself, on this machine: is it right, and how fast is it beside a bf16 product."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from glq import nvrtc
from glq.ops.cuda_prompt import ARCH as HOPPER
from glq.ops.inputs import plain
from glq.ops.matmul import cuda_product, matmul_reference
from glq.packed import PACKED_DTYPES, PackedLinear, packed_shapes
from glq.rotation import block_width

_SIZES = {"cuda": (14336, 4096), "cpu": (1024, 1024)}  # [out, in] of the matrix
_CHECKED = 1024  # of its rows
_HELD = 256e6  # bytes of copies of a matrix, more than an L2 cache has: each product reads from memory
_SECONDS = 1.0  # of timing, at most

Product = Callable[[Tensor, PackedLinear], Tensor]


@dataclass(frozen=True)
class Kernel:
    """A product x [tokens, in] · Wᵀ by one kernel; `multiply` is looked up when it runs."""

    family: str  # CUDA C++, Triton, PyTorch
    name: str
    codec: str
    tokens: int
    multiply: Product


@dataclass(frozen=True)
class Outcome:
    """error: relative to the fp32 result, by norms. µs a product, bf16_us of PyTorch's with an unquantized matrix."""

    kernel: Kernel
    error: float | None = None
    us: float | None = None
    bf16_us: float | None = None
    failure: str | None = None

    @property
    def good(self) -> bool:
        return self.failure is None


def kernels(device: torch.device) -> list[Kernel]:
    """What is worth a test on this device: on a CPU the reference alone."""
    reference = Kernel("PyTorch", "reference: decode, then multiply", "trellis-4", 1, _reference)
    if device.type != "cuda":
        return [reference]
    found = []
    if nvrtc.available():
        hopper = nvrtc.gpu(device).arch == HOPPER
        own = [("trellis-4", 1, "decode"), ("nested-3", 1, "decode")]
        own += [("trellis-4", 8, "rotate + decode"), ("e8-2", 8, "rotate + decode")]
        if hopper:
            own += [("trellis-4", 32, "batch (wgmma)"), ("e8-2", 32, "batch (wgmma)")]
            own += [("trellis-4", 256, "prompt (wgmma)"), ("trellis-4", 4096, "unrotate + cuBLAS")]
        else:
            own += [("trellis-4", 32, "rotate + decode"), ("trellis-4", 256, "dequantize + cuBLAS")]
        own += [("nested-3", 256, "dequantize + cuBLAS")]
        found += [Kernel("CUDA C++", name, codec, tokens, _cuda) for codec, tokens, name in own]
    for codec, tokens in (("trellis-4", 1), ("trellis-4", 32), ("nested-3", 1), ("e8-2", 1)):
        found.append(Kernel("Triton", "one token" if tokens == 1 else "tiles", codec, tokens, _triton))
    return [*found, reference]


def run(kernel: Kernel, device: torch.device) -> Outcome:
    """Check it, then time it. What it raises, or a wrong result, is its failure."""
    rows, cols = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    try:
        weights = _random(kernel.codec, rows, cols, device)
        x = torch.randn(kernel.tokens, cols, device=device).to(torch.bfloat16)
        error = _error(kernel.multiply(x, weights[-1]), x, weights[-1])
        if not error < 2 * torch.finfo(torch.bfloat16).eps:
            return Outcome(kernel, error, failure=f"wrong: {error:.1e} from the fp32 result")
        calls = [partial(kernel.multiply, x, weight) for weight in weights]
        us = _time(calls, device, in_graph=kernel.family != "PyTorch")  # whose tables come from the CPU
        return Outcome(kernel, error, us, bf16_time(kernel.tokens, device))
    except Exception as error:  # noqa: BLE001 (NVRTC, Triton and the driver have kinds of their own)
        return Outcome(kernel, failure=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


def bf16_time(tokens: int, device: torch.device) -> float:
    """µs of PyTorch's product with a bf16 matrix of the same size."""
    rows, cols = _SIZES["cuda" if device.type == "cuda" else "cpu"]
    count = _copies(2 * rows * cols, device)
    weights = [torch.randn(rows, cols, device=device, dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(tokens, cols, device=device, dtype=torch.bfloat16)
    return _time([partial(torch.nn.functional.linear, x, weight) for weight in weights], device)


def _reference(x: Tensor, w: PackedLinear) -> Tensor:
    return matmul_reference(x, w.codes, w.scale, w.signs, w.codec, w.out_features, w.block)


def _cuda(x: Tensor, w: PackedLinear) -> Tensor:
    return cuda_product(plain(x), w, nvrtc.gpu(x.device))


def _triton(x: Tensor, w: PackedLinear) -> Tensor:
    from glq.ops import triton_matmul

    return triton_matmul.matmul(x, w.codes, w.scale, w.signs, w.codec, w.out_features, w.block)


def _copies(nbytes: int, device: torch.device) -> int:
    return int(_HELD / nbytes) + 2 if device.type == "cuda" else 1


def _random(codec: str, rows: int, cols: int, device: torch.device) -> list[PackedLinear]:
    """Matrices of random codes that between them do not stay in a cache."""
    shapes = packed_shapes(codec, rows, cols)
    scale = (torch.rand(rows, device=device) + 0.5).to(PACKED_DTYPES["scale"])
    signs = torch.randint(0, 256, shapes["signs"], dtype=torch.uint8, device=device)
    first = torch.randint(0, 256, shapes["codes"], dtype=torch.uint8, device=device)
    codes = [first, *(torch.randint_like(first, 0, 256) for _ in range(_copies(first.numel(), device) - 1))]
    return [PackedLinear(codec, rows, cols, block_width(cols), part, scale, signs) for part in codes]


def _error(y: Tensor, x: Tensor, weight: PackedLinear) -> float:
    """Of the last rows, which are whole tiles."""
    rows = min(_CHECKED, weight.out_features)
    tiles = packed_shapes(weight.codec, rows, weight.in_features)["codes"][0]
    last = PackedLinear(
        weight.codec, rows, weight.in_features, weight.block, weight.codes[-tiles:], weight.scale[-rows:], weight.signs
    )
    exact = x.float() @ last.dequantize().T
    return ((y[:, -rows:].float() - exact).norm() / exact.norm()).item()


def _time(calls: Sequence[Callable[[], Tensor]], device: torch.device, in_graph: bool = True) -> float:
    """Median µs of a call; on a GPU in a CUDA graph of all of them."""
    if device.type != "cuda":
        return _median(lambda: [call() for call in calls], len(calls))
    with torch.cuda.device(device):
        if not in_graph:
            return _median(lambda: [call().sum().item() for call in calls[:2]], 2)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return _median(replay, len(calls))


def _median(work: Callable[[], object], count: int) -> float:
    work()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e6 / count
