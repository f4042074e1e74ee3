"""Attention in fp32 with shared heads, as calibration on a GPU has it."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from glq.attention import OneHeadEach


class Seen(TorchFunctionMode):
    """The heads of keys of each attention, and whether it was asked for shared ones."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.calls.append((args[1].shape[1], args[2].shape[1], bool((kwargs or {}).get("enable_gqa"))))
        return func(*args, **(kwargs or {}))


def attend(dtype, **options):
    """Its result, and what PyTorch was asked for."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 20, 16, dtype=dtype) for heads in (8, 2, 2))
    with Seen() as seen, OneHeadEach():
        y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, **options)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    return y, expected, seen.calls


def test_each_head_has_its_own():
    y, expected, calls = attend(torch.float32, enable_gqa=True)
    torch.testing.assert_close(y, expected)
    assert calls == [(8, 8, False)]


def test_16_bits_are_left_to_pytorch():
    y, expected, calls = attend(torch.bfloat16, enable_gqa=True)
    assert torch.equal(y, expected)
    assert calls == [(2, 2, True)]


def test_heads_that_do_not_match_are_still_refused():
    with pytest.raises(RuntimeError):
        attend(torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_fused_kernel_takes_it():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(2, heads, 64, 64, device="cuda") for heads in (8, 2, 2))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), OneHeadEach():
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    assert (y - exact).norm() < 1e-5 * exact.norm()
