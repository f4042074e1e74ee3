"""The kernel that reads a paged E8 KV cache: on a CPU that plays the GPU, as cubins, and on a GPU if there is one."""

from types import SimpleNamespace

import pytest
import torch
from cubins import spilled
from emulator import Emulator
from test_kv_kernels import ARCHITECTURES, LARGEST_SHARED, PLANS, cache, emulated, on_gpu, some_factors

from glq import GlqError, nvrtc
from glq.kv import cuda_gather, cuda_pages
from glq.kv.cuda_attend import HEAD_DIMS
from glq.kv.cuda_tables import device_tables
from glq.kv.layout import PageLayout, gather_reference


def check_gather(layout, tokens, dtype, gpu, device="cpu", factored=False):
    factors = some_factors(layout, device) if factored else None
    pages, table = cache(layout, [tokens], -(-tokens // layout.page_tokens) + 1, device, factors)
    if tokens > 4:
        scales = layout.views(pages)
        scales[1][table[0, 0].long(), 0, 3], scales[3][table[0, 0].long(), -1, 4] = torch.nan, 60000.0
    found = cuda_gather.gather(pages, layout, table[0], tokens, dtype, factors, gpu)
    expected = gather_reference(pages, layout, table[0], tokens, torch.float32, factors)
    for x, y in zip(found, expected, strict=True):
        y = y.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        assert x.dtype == dtype
        assert torch.equal(x.isnan(), y.isnan())
        error = (x.float() - y).nan_to_num().norm(dim=-1) / y.nan_to_num().norm(dim=-1).clamp_min(1e-9)
        assert error.max() < (1.5e-3 if dtype == torch.float16 else 3e-3)


@emulated
@pytest.mark.parametrize(
    ("head_dim", "bits", "page_tokens", "tokens", "dtype", "factored"),
    [
        (128, (4, 4), 16, 37, torch.float16, False),
        (128, (4, 4), 16, 37, torch.bfloat16, True),
        (64, (3, 2), 32, 50, torch.bfloat16, False),
        (80, (2, 3), 16, 16, torch.float16, True),
        (96, (4, 3), 48, 1, torch.bfloat16, False),
        (256, (3, 4), 16, 33, torch.float16, True),
    ],
)
def test_vectors_are_the_references(head_dim, bits, page_tokens, tokens, dtype, factored):
    check_gather(PageLayout(2, head_dim, *bits, page_tokens), tokens, dtype, Emulator(1), factored=factored)


@emulated
@pytest.mark.parametrize(("head_dim", "bits", "dtype"), [(128, (4, 4), torch.bfloat16), (64, (3, 2), torch.float16)])
def test_kernels_are_tried_out(head_dim, bits, dtype, monkeypatch):
    given = (PageLayout(2, head_dim, *bits), torch.device("cpu"), dtype, 6)
    kernels = cuda_pages.CudaKernels(Emulator(1))
    cuda_pages.try_out(kernels, *given)
    right = {"write": kernels.write, "gather": kernels.gather, "attend": kernels.attend}
    wrong = {
        "write": lambda pages, layout, keys, *args: right["write"](pages, layout, -keys, *args),
        "gather": lambda *args: [x.roll(1, 0) for x in right["gather"](*args)],
        "attend": lambda *args: right["attend"](*args) * 1.1,
    }
    wrongs = list(wrong.items())
    wrongs += [(name, lambda *args, f=function: f(*args[:-1], None)) for name, function in right.items()]  # no factors
    for name, function in wrongs:
        with pytest.raises(GlqError):
            cuda_pages.try_out(SimpleNamespace(**right | {name: function}), *given)


def test_a_gpu_whose_kernels_are_wrong_is_said_once(monkeypatch):
    def fails(*args):
        raise GlqError("other codes are written than by PyTorch")

    monkeypatch.setattr(cuda_pages.nvrtc, "gpu", lambda device: Emulator(1))
    monkeypatch.setattr(cuda_pages, "try_out", fails)
    given = (PageLayout(3, 64, 4, 4, 48), torch.device("cpu"), torch.float16, 3)
    with pytest.warns(UserWarning, match="cannot be used, PyTorch is: other codes"):
        assert not cuda_pages.works(*given)
    assert not cuda_pages.works(*given)


def test_nothing_to_read():
    layout = PageLayout(1, 64, 4, 4)
    pages = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
    keys, values = cuda_gather.gather(pages, layout, torch.zeros(0).int(), 0, torch.float16, None, Emulator(1))
    assert keys.shape == values.shape == (0, 1, 64)


def test_what_the_kernel_refuses():
    pages, row = torch.zeros(1, 2048, dtype=torch.uint8), torch.zeros(1).int()
    for layout, dtype in ((PageLayout(1, 40, 4, 4), torch.float16), (PageLayout(1, 64, 4, 4), torch.float32)):
        with pytest.raises(GlqError, match="does not take"):
            cuda_gather.gather(pages, layout, row, 1, dtype, None, Emulator(1))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cubins_stay_within_the_limits_of_every_architecture(arch):
    assert len(device_tables(torch.device("cpu"))) + 8 * 2 * 256 * 4 <= LARGEST_SHARED
    for head_dim, key_bits, value_bits, _ in PLANS if arch == "sm_90" else PLANS[:1]:
        layout = PageLayout(1, head_dim, key_bits, value_bits)
        _, report = cuda_gather.source(torch.bfloat16, layout).compile_and_report(arch)
        assert spilled(report) == {0}, report


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (4, 2)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_on_a_gpu(head_dim, bits, dtype):
    gpu = nvrtc.gpu(torch.device("cuda"))
    for tokens in (1, 100, 1000):
        check_gather(PageLayout(2, head_dim, *bits), tokens, dtype, gpu, "cuda", factored=tokens == 100)
