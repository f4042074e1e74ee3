"""Pages of an E8 KV cache: write tokens, attend to them, get them back; one op above every implementation.

`glq.kv.layout` says what a page holds and what each of these means. Kernels import that module, and `_kernels` here is
the one place that chooses them.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from glq import nvrtc
from glq.custom_op import custom_op, register_fake
from glq.kv import cuda_pages
from glq.kv.layout import PageLayout, attend_reference, gather_reference, write_reference

__all__ = ["PageLayout", "attend", "gather", "has_kernels", "prepare", "write"]


class Kernels(Protocol):
    """The three functions of glq.kv.layout, arguments and all. None waits for the GPU, nor needs to in a graph."""

    def write(
        self,
        pages: Tensor,
        layout: PageLayout,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        factors: Tensor | None,
    ) -> None: ...

    def gather(
        self,
        pages: Tensor,
        layout: PageLayout,
        page_table_row: Tensor,
        tokens: int,
        dtype: torch.dtype,
        factors: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...

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
    ) -> Tensor: ...


def _kernels(layout: PageLayout, device: torch.device, dtype: torch.dtype, queries: int = 0) -> Kernels | None:
    """What is used for such pages and such a model, with so many query heads where they are read; None: PyTorch."""
    if cuda_pages.takes(layout, device, dtype, queries) and cuda_pages.works(layout, device, dtype, queries):
        return cuda_pages.CudaKernels(nvrtc.gpu(device))
    return None


def has_kernels(layout: PageLayout, device: torch.device, dtype: torch.dtype, queries: int = 0) -> bool:
    """Whether `write` and `attend` never wait for the device, so that a CUDA graph can hold them."""
    return _kernels(layout, device, dtype, queries) is not None


@cache
def prepare(layout: PageLayout, queries: int, device: torch.device, dtype: torch.dtype) -> None:
    """Compile and load what all three take with so many query heads: no request waits for that."""
    if has_kernels(layout, device, dtype, queries):
        pages = torch.zeros(1, layout.nbytes, dtype=torch.uint8, device=device)
        keys = torch.ones(1, layout.heads, layout.head_dim, dtype=dtype, device=device)
        q = torch.ones(1, queries, layout.head_dim, dtype=dtype, device=device)
        write(pages, layout, keys, keys, torch.zeros(1, dtype=torch.int64, device=device))
        table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        attend(q, pages, layout, table, table[0] + 1, 1.0)
        gather(pages, layout, table[0], 1, dtype)


def write(
    pages: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor, factors: Tensor | None = None
) -> None:
    """keys and values [n, heads, head_dim] fp16, bf16 or fp32 become codes in pages [pages, nbytes] uint8.

    slots [n] int64: page · page_tokens + place; a negative one is padding, of which nothing is written. factors
    [head_dim] fp32: keys are multiplied by these first, and whoever reads the pages gives the same.
    """
    _write(pages, keys, values, slots, factors, *_sizes(layout))


def gather(
    pages: Tensor,
    layout: PageLayout,
    page_table_row: Tensor,
    tokens: int,
    dtype: torch.dtype,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first tokens of the pages in page_table_row [k] int32, decoded: keys, values [tokens, heads, head_dim]."""
    kernels = _kernels(layout, pages.device, dtype)
    return (kernels.gather if kernels else gather_reference)(pages, layout, page_table_row, tokens, dtype, factors)


def attend(
    q: Tensor,
    pages: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence, q [sequences, query heads, head_dim], whose own token is written already.

    page_table [sequences, pages] int32; lengths [sequences] int32, 0 for a padded row, which gives zeros. The rest as
    attend_reference has it.
    """
    return _attend(q, pages, page_table, lengths, scale, window, softcap, factors, *_sizes(layout))


def _sizes(layout: PageLayout) -> tuple[int, int, int, int, int]:
    return layout.heads, layout.head_dim, layout.key_bits, layout.value_bits, layout.page_tokens


@custom_op("kv_write", mutates_args=("pages",))
def _write(
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    factors: Tensor | None,
    heads: int,
    head_dim: int,
    key_bits: int,
    value_bits: int,
    page_tokens: int,
) -> None:
    layout = PageLayout(heads, head_dim, key_bits, value_bits, page_tokens)
    kernels = _kernels(layout, pages.device, keys.dtype)
    (kernels.write if kernels else write_reference)(pages, layout, keys, values, slots, factors)


@register_fake("kv_write")
def _(*args: object) -> None:
    return None


@custom_op("kv_attend")
def _attend(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    factors: Tensor | None,
    heads: int,
    head_dim: int,
    key_bits: int,
    value_bits: int,
    page_tokens: int,
) -> Tensor:
    layout = PageLayout(heads, head_dim, key_bits, value_bits, page_tokens)
    kernels = _kernels(layout, q.device, q.dtype, q.shape[1])
    return (kernels.attend if kernels else attend_reference)(
        q, pages, layout, page_table, lengths, scale, window, softcap, factors
    )


@register_fake("kv_attend")
def _(q: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q)
