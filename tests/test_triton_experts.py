"""The product over experts with Triton, and with PyTorch's grouped product, under Triton's interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from test_experts import error, random_experts, routed
from test_triton import DEVICE, DTYPES, FAMILIES, bf16_of_a_gpu, empty_is_nan  # noqa: F401 (fixtures)

from glq.codecs import CODECS
from glq.ops import grouped, triton_experts


def check(weights, x, expert_of, top_k):
    y = triton_experts.matmul(x, weights, expert_of, top_k)
    assert y.dtype == x.dtype
    assert y.shape == (len(expert_of), weights.out_features)
    plain = 1 if x.dtype == torch.float32 else 0  # whose error is next to none
    assert error(y, x, weights, expert_of, top_k) < 2 + plain
    assert torch.equal(y, triton_experts.matmul(x, weights, expert_of, top_k))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_pairs(codec, dtype):
    weights = random_experts(codec, 4, 70, 75, 25, device=DEVICE)
    expert_of = routed(3, 2, 4, DEVICE)
    expert_of[2] = -1
    check(weights, torch.randn(3, 75, device=DEVICE).to(dtype), expert_of, 2)


@pytest.mark.parametrize("codec", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_more_pairs(codec, dtype, top_k, index):
    """One expert has more than fit at once, one has none, and some pairs have no expert."""
    weights = random_experts(codec, 3, 40, 96, 96, device=DEVICE)
    expert_of = torch.randint(-1, 2, (36,), device=DEVICE).to(index)
    expert_of[torch.rand(36, device=DEVICE) < 0.5] = 0
    check(weights, torch.randn(36 // top_k, 96, device=DEVICE).to(dtype), expert_of, top_k)


@pytest.mark.parametrize("codec", ["trellis-2.25", "e8-2"])
def test_very_many_pairs(codec, monkeypatch):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("PyTorch's product waits for the CPU here")
    monkeypatch.setattr(grouped, "_AT_ONCE", 64 * 5 * 96)  # rows in three parts
    weights = random_experts(codec, 5, 136, 96, 96, device=DEVICE)
    expert_of = torch.randint(-1, 4, (60,), device=DEVICE)
    x = torch.randn(30, 96, device=DEVICE).bfloat16()
    y = grouped.matmul(x, weights, expert_of, 2)
    assert error(y, x, weights, expert_of, 2) < 2
    assert torch.equal(y, grouped.matmul(x, weights, expert_of, 2))
