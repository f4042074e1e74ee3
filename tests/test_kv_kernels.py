"""The CUDA kernels of the paged E8 KV cache: on a CPU that plays the GPU, as cubins, and on a GPU if there is one."""

import shutil

import pytest
import torch
from cubins import spilled
from emulator import Emulator

from glq import nvrtc
from glq.errors import GlqError
from glq.kv import cuda_attend, cuda_write
from glq.kv.codec import kv_codec
from glq.kv.cuda_tables import device_tables
from glq.kv.layout import PageLayout, attend_reference, gather_reference, write_reference

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"]
LARGEST_SHARED = 99 * 1024  # bytes that a block gets on all of them
emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DECODE = """
extern "C" __global__ void
decode_all(const u32* words, u32* out, const uint4* from) {
  extern __shared__ __align__(16) u8 memory[];
  for (int i = threadIdx.x; i < (int)sizeof(Tables) / 16; i += 256) ((uint4*)memory)[i] = from[i];
  __syncthreads();
  const int at = blockIdx.x * 256 + threadIdx.x;
  decode2<WORD_BITS>(out + 8 * at, words[2 * at], words[2 * at + 1], *(const Tables*)memory);
}
"""


@emulated
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_words_decode_as_the_codec_has_them(bits):
    """Up to fp16's rounding of the product."""
    codec = kv_codec(bits).codec
    words = torch.randint(0, 2**codec.code_bits, (16384, 2))
    as_int = torch.where(words < 2**31, words, words - 2**32).int()
    if bits == 3:
        as_int |= torch.randint(0, 128, as_int.shape).int() << 24  # what lies beside a word in memory
    out, tables = torch.empty(len(words) * 8, dtype=torch.int32), device_tables(torch.device("cpu"))
    files = ("ops/ptx.cuh", "ops/half2.cuh", "ops/half_bits.cuh", "kv/decode.cuh")
    source = nvrtc.Source(files, (("BF16", 0), ("WORD_BITS", bits)), text=DECODE)
    Emulator(1).launch(source, "decode_all", len(words) // 256, 256, len(tables), as_int, out, tables)
    found = out.view(torch.float16).view(-1, 8, 2).transpose(1, 2).float()
    torch.testing.assert_close(found, codec.decode(words), rtol=2**-10, atol=2e-3 if bits > 2 else 0)


def some_factors(layout, device="cpu"):
    """Of keys' channels: 0.04 to 1, as Gemma's."""
    return torch.logspace(-1.4, 0, layout.head_dim, device=device)[torch.randperm(layout.head_dim, device=device)]


def cache(layout, lengths, width, device="cpu", factors=None):
    """Pages of random vectors, and NaN where nothing is to be looked at; their table."""
    pages = torch.full((len(lengths) * width + 2, layout.nbytes), 0xFF, dtype=torch.uint8, device=device)
    table = torch.randperm(len(pages), device=device)[: len(lengths) * width].view(len(lengths), width).int()
    for row, length in zip(table.long(), lengths, strict=True):
        slots = torch.arange(length, device=device)
        slots = row[slots // layout.page_tokens] * layout.page_tokens + slots % layout.page_tokens
        shape = (length, layout.heads, layout.head_dim)
        keys, values = (torch.randn(shape, device=device) * torch.rand(*shape[:2], 1, device=device) for _ in range(2))
        write_reference(pages, layout, keys if factors is None else keys / factors, values, slots, factors)
    return pages, table


def check_attend(layout, group, lengths, dtype, window, softcap, plan=None, gpu=None, device="cpu", factored=False):
    factors = some_factors(layout, device) if factored else None
    pages, table = cache(layout, lengths, max(-(-n // layout.page_tokens) for n in lengths) + 1, device, factors)
    q = torch.randn(len(lengths), layout.heads * group, layout.head_dim, device=device).to(dtype)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    given = (pages, layout, table, lengths, 2 * layout.head_dim**-0.5, window, softcap, factors)
    if factored:  # queries are small where keys are large
        q = (q.float() * factors).to(dtype)
    found = cuda_attend.attend(q, *given, gpu or Emulator(1), plan)
    expected = attend_reference(q.float(), *given)
    assert found.dtype == dtype
    assert (found - expected).norm() < (1.5e-3 if dtype == torch.float16 else 3e-3) * expected.norm()
    assert not found[lengths == 0].any()


@emulated
@pytest.mark.parametrize(
    ("head_dim", "bits", "page_tokens", "group", "lengths", "dtype", "window", "softcap", "factored"),
    [
        (128, (4, 4), 16, 4, [37, 0, 100], torch.float16, None, None, False),
        (128, (4, 4), 16, 4, [37, 0, 100], torch.bfloat16, None, None, True),
        (64, (4, 3), 32, 3, [50, 7], torch.bfloat16, None, None, True),
        (80, (3, 4), 16, 8, [33, 1], torch.bfloat16, 300, None, False),
        (96, (3, 3), 48, 8, [50, 33], torch.float16, 20, None, False),
        (256, (2, 2), 16, 1, [50, 33], torch.float16, None, 5.0, True),
        (64, (2, 4), 16, 16, [50, 16], torch.float16, 16, 2.0, False),
        (80, (2, 3), 16, 2, [90, 33], torch.float16, 40, None, True),
    ],
)
def test_attention_is_the_references(head_dim, bits, page_tokens, group, lengths, dtype, window, softcap, factored):
    layout = PageLayout(2 if head_dim == 128 else 1, head_dim, *bits, page_tokens)
    plan = cuda_attend.Plan(dtype, layout, group, 2, 1, 3)
    check_attend(layout, group, lengths, dtype, window, softcap, plan, factored=factored)


@emulated
@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_scales_of_any_size(size):
    """Their products with weights would be nothing in fp16, or infinite."""
    layout = PageLayout(1, 64, 4, 4)
    pages, table = cache(layout, [40], 3)
    layout.views(pages)[3].mul_(size)
    q, lengths = torch.randn(1, 2, 64).bfloat16(), torch.tensor([40], dtype=torch.int32)
    given = (pages, layout, table, lengths, 0.1, None, None, None)
    found = cuda_attend.attend(q, *given, Emulator(1), cuda_attend.Plan(q.dtype, layout, 2, 1, 1, 1)).float()
    expected = attend_reference(q.float(), *given)
    assert (found - expected).norm() < 3e-3 * expected.norm()


@emulated
@pytest.mark.parametrize(
    ("head_dim", "bits", "dtype", "factored"),
    [
        (128, (4, 4), torch.float16, False),
        (128, (4, 4), torch.bfloat16, True),
        (64, (3, 4), torch.float16, False),
        (80, (2, 3), torch.bfloat16, True),
        (96, (4, 2), torch.float16, False),
        (256, (3, 2), torch.float16, True),
    ],
)
def test_written_words_are_the_codecs(head_dim, bits, dtype, factored):
    """All of them here. Sums in another order may decide a near tie otherwise: at most one word in a thousand."""
    check_write(PageLayout(2, head_dim, *bits), 30, dtype, Emulator(1), factored=factored)


def check_write(layout, tokens, dtype, gpu, device="cpu", factored=False):
    shape, factors = (tokens, layout.heads, layout.head_dim), some_factors(layout, device) if factored else None
    keys = (torch.randn(shape, device=device) * torch.rand(*shape[:2], 1, device=device) * 5).to(dtype)
    values = torch.randn(shape, device=device).to(dtype)
    keys[1, 0], values[2, 0, 3], keys[5, 1, 7] = 0, torch.nan, torch.inf
    keys[4, 0], keys[4, 0, 5] = 0, 9  # one channel is all there is
    pages = torch.zeros(2, tokens // layout.page_tokens + 2, layout.nbytes, dtype=torch.uint8, device=device)
    slots = torch.randperm(pages.shape[1] * layout.page_tokens, device=device)[:tokens]
    slots[3] = -1
    cuda_write.write(pages[0], layout, keys, values, slots, factors, gpu)
    write_reference(pages[1], layout, keys, values, slots, factors)
    assert (pages[0] != pages[1]).float().mean() < 1e-3
    every = torch.arange(pages.shape[1], device=device)
    written, count = slots[slots >= 0], pages.shape[1] * layout.page_tokens
    decoded = [gather_reference(p, layout, every, count, torch.float32, factors) for p in pages]
    for x, found, expected in zip((keys, values), *decoded, strict=True):
        found, expected, x = found[written], expected[written], x[slots >= 0].float()
        assert torch.equal(found.isnan(), expected.isnan())
        usual = ~expected.isnan()
        lost, usually = ((y - x)[usual].square().sum() for y in (found, expected))
        assert abs(lost / usually - 1) < 1e-3


def test_what_kernels_refuse():
    pages = torch.zeros(2, PageLayout(1, 40, 4, 4).nbytes, dtype=torch.uint8)
    table, lengths = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    for layout, heads, dtype in (
        (PageLayout(1, 40, 4, 4), 1, torch.float16),
        (PageLayout(1, 64, 4, 4), 17, torch.float16),
    ):
        q = torch.zeros(1, heads, layout.head_dim, dtype=dtype)
        with pytest.raises(GlqError, match=r"heads"):
            cuda_attend.attend(q, pages, layout, table, lengths, 1.0, None, None, None, Emulator(1))
    x = torch.zeros(1, 1, 64)
    with pytest.raises(GlqError, match="float32"):
        cuda_write.write(pages, PageLayout(1, 64, 4, 4), x, x, torch.zeros(1).long(), None, Emulator(1))
    x = x.half()
    for factors in (torch.ones(32), torch.ones(64).half(), torch.ones(128)[::2]):
        with pytest.raises(GlqError, match="64 contiguous float32"):
            cuda_write.write(pages, PageLayout(1, 64, 4, 4), x, x, torch.zeros(1).long(), factors, Emulator(1))


PLANS = [  # channels, bits of keys and values, query heads of a kv head
    (128, 4, 4, 4),
    (256, 3, 4, 16),
    (64, 4, 2, 8),
    (80, 3, 3, 4),
    (96, 2, 3, 16),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cubins_stay_within_the_limits_of_every_architecture(arch):
    for head_dim, key_bits, value_bits, group in PLANS if arch == "sm_90" else PLANS[:1]:
        layout = PageLayout(1, head_dim, key_bits, value_bits)
        gpu = Emulator(132)
        gpu.arch = int(arch[3:])
        plan = cuda_attend.make_plan(torch.bfloat16, layout, group, 1, 4096, gpu)
        assert plan.shared + 4096 <= LARGEST_SHARED
        for source in (plan.source, cuda_write.source(torch.bfloat16, layout)):
            _, report = source.compile_and_report(arch)
            assert spilled(report) == {0}, report


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (4, 2)])
@pytest.mark.parametrize("head_dim", cuda_attend.HEAD_DIMS)
def test_on_a_gpu(head_dim, bits, dtype):
    gpu = nvrtc.gpu(torch.device("cuda"))
    layout = PageLayout(2, head_dim, *bits)
    for factored in (False, True):
        check_write(layout, 300, dtype, gpu, "cuda", factored)
        for group, window, softcap in ((1, None, None), (4, 300, 20.0), (8, None, 20.0), (16, 1000, None)):
            check_attend(layout, group, [700, 0, 1, 333, 1500], dtype, window, softcap, None, gpu, "cuda", factored)
