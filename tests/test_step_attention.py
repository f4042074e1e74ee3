"""Attention in steps: by its kernel, or as it was."""

import pytest
import torch
from test_step import checked, emulated, fuse, kernels, plain, random
from torch.nn import functional

from glq.ops import cuda_attention
from glq.step.program import Attending


def attention(q, k, v, mask=None, **settings):
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)


def repeated(x, count):
    batch, heads, keys, dim = x.shape
    return x[:, :, None].expand(batch, heads, count, keys, dim).reshape(batch, heads * count, keys, dim)


ATTENTIONS = {
    "one head": (lambda q, k, v, m: attention(q, k, v), (1, 1, 1, 1, 40, 24)),
    "repeated keys": (lambda q, k, v, m: attention(q, repeated(k, 2), repeated(v, 2), m), (2, 4, 2, 1, 70, 32)),
    "groups": (lambda q, k, v, m: attention(q, k, v, m, enable_gqa=True, scale=0.3), (1, 6, 2, 1, 300, 64)),
    "rows of a head": (lambda q, k, v, m: attention(q, k, v, m), (2, 2, 2, 3, 50, 80)),
    "no mask, cut": (lambda q, k, v, m: attention(q, k, v, enable_gqa=True), (1, 8, 1, 1, 260, 256)),
    "a mask for each head": (
        lambda q, k, v, m: attention(q, k, v, m + torch.arange(4.0)[:, None, None]),
        (1, 4, 4, 2, 9, 16),
    ),
}


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, kind, dtype):
    function, (batch, heads, kv_heads, queries, keys, dim) = ATTENTIONS[name]
    q = random(batch, queries, heads, dim, dtype=dtype)
    k, v = random(batch, kv_heads, keys, dim, dtype=dtype), random(batch, kv_heads, keys, dim, dtype=dtype)
    seen = torch.rand(batch, 1, 1, keys) < 0.5
    seen[..., 2] = True
    mask = seen if kind == "bool" and "each" not in name else torch.where(seen, torch.randn(seen.shape), -torch.inf)
    mask = mask if mask.dtype == torch.bool or "each" in name else mask.to(dtype)
    program = checked(lambda q, k, v, m: function(q.transpose(1, 2), k, v, m), q, k, v, mask)
    assert plain(program) == []
    assert sum(isinstance(part.work, Attending) for part in program.parts) == 1
    assert not any("clone" in kernel.name for kernel in kernels(program))


@emulated
def test_copies_that_somebody_else_reads():
    """They are made, and read by attention, too."""

    def function(q, k, v):
        keys = repeated(k, 2)
        return attention(q, keys, repeated(v, 2)), keys.sum(-1)

    program = checked(function, random(2, 4, 1, 32), random(2, 2, 70, 32), random(2, 2, 70, 32))
    assert plain(program) == []
    assert sum("clone" in kernel.name for kernel in kernels(program)) == 1


@emulated
def test_a_wrong_kernel_is_not_used(monkeypatch):
    """Then there is all that PyTorch's attention reads."""
    monkeypatch.setattr(cuda_attention, "attend", lambda q, k, v, mask, scale, out, gpu: out.fill_(7))
    inputs = [random(2, 4, 1, 32), random(2, 2, 70, 32), random(2, 2, 70, 32)]
    program, expected = fuse(lambda q, k, v: attention(q, repeated(k, 2), repeated(v, 2)), *inputs)
    with pytest.warns(UserWarning, match="a kernel for clone_scaled_dot_product_attention is not used"):
        program.run(check=True)
    assert torch.equal(program.run(), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: attention(q, k, v, is_causal=True),
        lambda q, k, v: attention(q.float(), k.float(), v.float()),
        lambda q, k, v: attention(q[..., :7], k[..., :7], v[..., :7]),
        lambda q, k, v: attention(q, k, v[..., :8]),
    ],
)
def test_attention_that_stays(function):
    program = checked(function, random(1, 2, 1, 16), random(1, 2, 5, 16), random(1, 2, 5, 16))
    assert [call for call in plain(program) if "attention" in call] == ["scaled_dot_product_attention"]
