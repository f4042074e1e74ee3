"""What glq.kv.layout does, by CUDA kernels: the Kernels of glq.kv.pages on an NVIDIA GPU."""

import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.errors import GlqError
from glq.kv import cuda_attend, cuda_gather, cuda_write
from glq.kv.layout import PageLayout, attend_reference, gather_reference, write_reference
from glq.ops.matmul import compare


@dataclass(frozen=True)
class CudaKernels:
    gpu: nvrtc.Launcher

    def write(
        self,
        pages: Tensor,
        layout: PageLayout,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        factors: Tensor | None,
    ) -> None:
        cuda_write.write(pages, layout, keys, values, slots, factors, self.gpu)

    def gather(
        self,
        pages: Tensor,
        layout: PageLayout,
        page_table_row: Tensor,
        tokens: int,
        dtype: torch.dtype,
        factors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return cuda_gather.gather(pages, layout, page_table_row, tokens, dtype, factors, self.gpu)

    def attend(
        self,
        q: Tensor,
        pages: Tensor,
        layout: PageLayout,
        page_table: Tensor,
        lengths: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        factors: Tensor | None,
    ) -> Tensor:
        return cuda_attend.attend(q, pages, layout, page_table, lengths, scale, window, softcap, factors, self.gpu)


@cache
def works(layout: PageLayout, device: torch.device, dtype: torch.dtype, queries: int) -> bool:
    """Whether the kernels compile, load and compute what PyTorch does, tried once. No queries: nothing attends."""
    try:
        try_out(CudaKernels(nvrtc.gpu(device)), layout, device, dtype, queries)
    except Exception as error:  # noqa: BLE001 (cuda-core, NVRTC and the driver have kinds of their own)
        warnings.warn(f"glq's CUDA kernels for KV caches cannot be used, PyTorch is: {error}", stacklevel=2)
        return False
    return True


def try_out(kernels: CudaKernels, layout: PageLayout, device: torch.device, dtype: torch.dtype, queries: int) -> None:
    """Write some tokens, read them and, with so many query heads, attend. GlqError if PyTorch gives something else."""
    tokens, dim = layout.page_tokens + 3, layout.head_dim
    wave = torch.arange((2 * tokens * layout.heads + queries) * dim, dtype=torch.float64, device=device).square().sin()
    vectors = wave.to(dtype).view(-1, dim)
    q, (keys, values) = vectors[None, :queries], vectors[queries:].view(2, tokens, layout.heads, dim)
    _try_out(kernels, layout, q, keys, values, None)
    factors = torch.linspace(0.1, 1, dim, device=device)
    _try_out(kernels, layout, q, keys / factors.to(dtype), values, factors)


def _try_out(
    kernels: CudaKernels, layout: PageLayout, q: Tensor, keys: Tensor, values: Tensor, factors: Tensor | None
) -> None:
    (tokens, _, dim), dtype, device = keys.shape, keys.dtype, keys.device
    pages, plain = torch.zeros(2, 2, layout.nbytes, dtype=torch.uint8, device=device)
    slots, table = torch.arange(tokens, device=device), torch.arange(2, dtype=torch.int32, device=device)
    kernels.write(pages, layout, keys, values, slots, factors)
    write_reference(plain, layout, keys, values, slots, factors)
    written, known = (gather_reference(p, layout, table, tokens, dtype, factors) for p in (pages, plain))
    for x, found, expected in zip((keys, values), written, known, strict=True):
        lost, usually = ((y.float() - x.float()).norm() for y in (found, expected))
        if not lost <= 1.05 * usually:  # a tie or two may be decided otherwise
            raise GlqError("other codes are written than by PyTorch")
    for found, expected in zip(kernels.gather(pages, layout, table, tokens, dtype, factors), written, strict=True):
        compare(found, expected, tokens)
    if not q.numel():
        return
    lengths = torch.tensor([tokens], dtype=torch.int32, device=device)
    given = (q, pages, layout, table[None], lengths, 2 * dim**-0.5, None, None, factors)
    compare(kernels.attend(*given), attend_reference(*given), tokens)


def takes(layout: PageLayout, device: torch.device, dtype: torch.dtype, queries: int) -> bool:
    """Whether the kernels are for these, with so many query heads, if any."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and nvrtc.compiles_for(device)
        and not cuda_attend.refusal(layout, queries or layout.heads, dtype)
    )
