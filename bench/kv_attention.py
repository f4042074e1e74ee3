"""Decode attention over an E8 KV cache beside bf16 caches, on one GPU.

    python bench/kv_attention.py OUT [--tokens 4096 16384 65536] [--batches 1 8 32] [--bits 4 3 2]

Llama-3-8B's heads (32 of queries, 8 of keys, 128 channels), equal lengths. Kernels are checked first, against the codec
and PyTorch. A time is the median over replays of a CUDA graph of calls whose caches take more than the L2 cache
together, so each is read from memory. bf16: the fastest of what is here of vLLM's FlashAttention over pages of 16
tokens and of PyTorch's scaled_dot_product_attention with FlashAttention and with cuDNN, whose keys are contiguous. The
floor is bytes stored ÷ what the card reads in the same run. write: a token of each sequence. OUT gets kv_attention.json
and kv_attention.md.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kernels import heading, read_rate, time_graph
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from glq import nvrtc
from glq.kv import cuda_attend, cuda_write
from glq.kv.layout import PageLayout, attend_reference, write_reference

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
_POOL = 300e6  # bytes that a graph's calls read
_MOST_CALLS = 48
_SCALE = DIM**-0.5


@dataclass(frozen=True)
class Row:
    """µs a layer's attention, or a layer's new tokens."""

    bits: int
    sequences: int
    tokens: int
    us: float
    floor_us: float
    bf16_us: float
    bf16: str
    write_us: float


def check_write(layout: PageLayout, dtype: torch.dtype, gpu: nvrtc.Launcher) -> None:
    """Words as the codec has them but for near ties, of which fp32 sums in another order decide."""
    n, shape = 200, (200, layout.heads, layout.head_dim)
    keys, values = (torch.randn(shape, device="cuda").mul(3).to(dtype) for _ in range(2))
    found, expected = (torch.zeros(n // 16 + 2, layout.nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    slots = torch.randperm(len(found) * layout.page_tokens, device="cuda")[:n] % (16 * len(found))
    cuda_write.write(found, layout, keys, values, slots, None, gpu)
    write_reference(expected, layout, keys, values, slots)
    differ = (found != expected).float().mean().item()
    print(f"write {layout} {dtype}: {differ:.2e} of bytes differ", flush=True)
    assert differ < 2e-3


def check_attend(
    layout: PageLayout, group: int, dtype: torch.dtype, window: int | None, softcap: float | None, gpu: nvrtc.Launcher
) -> None:
    lengths = torch.tensor([700, 0, 1, 333, 1500], dtype=torch.int32, device="cuda")
    width = 1536 // layout.page_tokens
    pages = random_pages(layout, len(lengths) * width + 3)
    table = torch.randperm(len(pages), device="cuda")[: len(lengths) * width].view(len(lengths), width).int()
    q = torch.randn(len(lengths), group * layout.heads, layout.head_dim, device="cuda").to(dtype)
    scale = 2 * layout.head_dim**-0.5
    found = cuda_attend.attend(q, pages, layout, table, lengths, scale, window, softcap, None, gpu)
    expected = attend_reference(q.float(), pages, layout, table, lengths, scale, window, softcap)
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"attend {layout} group {group} {dtype} window {window} softcap {softcap}: error {error:.1e}", flush=True)
    assert error < (2e-3 if dtype == torch.float16 else 4e-3)


def random_pages(layout: PageLayout, count: int) -> Tensor:
    """Any words; scales around 1."""
    pages = torch.randint(0, 256, (count, layout.nbytes), dtype=torch.uint8, device="cuda")
    for scales in layout.views(pages)[1::2]:
        scales.copy_(torch.rand(scales.shape, device="cuda") + 0.5)
    return pages


def calls_of(size: float) -> int:
    return max(2, min(_MOST_CALLS, int(_POOL / size) + 1))


def time_attend(layout: PageLayout, sequences: int, tokens: int, gpu: nvrtc.Launcher) -> tuple[float, float]:
    width = tokens // PAGE
    count = calls_of(sequences * width * layout.nbytes)
    pages = random_pages(layout, count * sequences * width)
    order = torch.randperm(len(pages), device="cuda").int().view(count, sequences, width)
    lengths = torch.full((sequences,), tokens, dtype=torch.int32, device="cuda")
    q = torch.randn(sequences, HEADS, DIM, device="cuda").bfloat16()
    attend = [
        lambda t=t: cuda_attend.attend(q, pages, layout, t, lengths, _SCALE, None, None, None, gpu)
        for t in order.unbind()
    ]
    new = torch.randn(sequences, KV_HEADS, DIM, device="cuda").bfloat16()
    slots = torch.arange(sequences, device="cuda") * PAGE * width
    write = [lambda: cuda_write.write(pages, layout, new, new, slots, None, gpu)] * 16
    return time_graph(attend), time_graph(write)


def bf16_times(sequences: int, tokens: int) -> dict[str, float]:
    """By implementation. Those that are not here, or refuse, are left out."""
    size = 2 * 2 * sequences * tokens * KV_HEADS * DIM
    count = calls_of(size)
    caches = torch.randn(count, 2, sequences, tokens, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(sequences, HEADS, 1, DIM, device="cuda").bfloat16()
    calls: dict[str, list[Callable[[], Tensor]]] = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        calls[name] = [lambda c=c, b=backend: _sdpa(q, c, b) for c in caches]
    with suppress(ImportError):
        calls["vllm"] = [_vllm(q, c, tokens) for c in caches]
    times = {}
    for name, of_name in calls.items():
        try:
            of_name[0]()
            times[name] = time_graph(of_name)
        except RuntimeError as error:
            print(f"{name} refuses: {str(error).splitlines()[0]}", flush=True)
    return times


def _sdpa(q: Tensor, cache: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        k, v = cache.transpose(2, 3)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _vllm(q: Tensor, cache: Tensor, tokens: int) -> Callable[[], Tensor]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    sequences = len(q)
    k, v = cache.view(2, -1, PAGE, KV_HEADS, DIM)
    table = torch.arange(len(k), device="cuda", dtype=torch.int32).view(sequences, -1)
    first = torch.arange(sequences + 1, device="cuda", dtype=torch.int32)
    used = torch.full((sequences,), tokens, dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"max_seqlen_q": 1, "max_seqlen_k": tokens, "causal": True, "fa_version": 3}
    return lambda: flash_attn_varlen_func(
        q[:, :, 0], k, v, cu_seqlens_q=first, seqused_k=used, block_table=table, **options
    )


def check(gpu: nvrtc.Launcher) -> None:
    half, brain = torch.float16, torch.bfloat16
    for dim, bits, dtype in ((128, (4, 4), brain), (64, (3, 2), half), (80, (4, 3), brain), (256, (2, 4), half)):
        check_write(PageLayout(2, dim, *bits, 16), dtype, gpu)
    for dim, bits, page, group, dtype, window, softcap in (
        (128, (4, 4), 16, 4, brain, None, None),
        (128, (3, 2), 32, 8, half, 100, None),
        (64, (4, 3), 16, 3, brain, None, 20.0),
        (80, (2, 4), 16, 1, half, None, None),
        (96, (3, 3), 48, 16, brain, 1000, None),
        (256, (4, 4), 16, 4, half, 512, 50.0),
        (256, (2, 2), 16, 16, brain, None, None),
    ):
        check_attend(PageLayout(2, dim, *bits, page), group, dtype, window, softcap, gpu)


def table(rows: list[Row], rate: float) -> str:
    lines = [
        heading(rate),
        "",
        "| bits | sequences | tokens | µs | ÷ floor | bf16 µs | × bf16 | write µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.bits} | {r.sequences} | {r.tokens} | {r.us:.1f} | {r.us / r.floor_us:.2f} "
        f"| {r.bf16_us:.1f} ({r.bf16}) | {r.bf16_us / r.us:.2f} | {r.write_us:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=[4, 3, 2])
    args = parser.parse_args()
    torch.manual_seed(0)
    gpu = nvrtc.gpu(torch.device("cuda"))
    check(gpu)
    rate = read_rate()
    rows = []
    for tokens in args.tokens:
        for sequences in args.batches:
            times = bf16_times(sequences, tokens)
            print(sequences, tokens, {name: round(us, 1) for name, us in times.items()}, flush=True)
            bf16 = min(times, key=times.__getitem__)
            for bits in args.bits:
                layout = PageLayout(KV_HEADS, DIM, bits, bits, PAGE)
                us, write_us = time_attend(layout, sequences, tokens, gpu)
                floor = sequences * tokens / PAGE * layout.nbytes / rate
                rows.append(Row(bits, sequences, tokens, us, floor, times[bf16], bf16, write_us))
                print(rows[-1], flush=True)
                torch.cuda.empty_cache()
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(rows, rate)
    (args.out / "kv_attention.md").write_text(text + "\n")
    (args.out / "kv_attention.json").write_text(json.dumps([asdict(r) for r in rows], indent=1))
    print(text)


if __name__ == "__main__":
    main()
