"""The op and the layer: what they compute, their fake implementations, and casting."""

import pytest
import torch

from glq import GlqError
from glq.codecs import CODECS
from glq.linear import QuantLinear
from glq.ops.matmul import matmul
from glq.packed import PackedLinear, packed_shapes


def random_packed(codec: str, rows: int, cols: int, block: int, seed: int = 0) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    shapes = packed_shapes(codec, rows, cols)
    codes = torch.randint(0, 256, shapes["codes"], generator=generator, dtype=torch.uint8)
    signs = torch.randint(0, 256, shapes["signs"], generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, generator=generator) + 0.5).to(torch.float16)
    return PackedLinear(codec, rows, cols, block, codes, scale, signs)


def arguments(p: PackedLinear) -> tuple:
    return p.codes, p.scale, p.signs, p.codec, p.out_features, p.block


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rows", "cols", "block"), [(192, 640, 640), (70, 100, 100), (33, 1024, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul_is_the_product_with_the_dequantized_matrix(codec, rows, cols, block, dtype):
    p = random_packed(codec, rows, cols, block)
    x = torch.randn(3, 5, cols).to(dtype)
    y = matmul(x, *arguments(p))
    exact = x.double() @ p.dequantize().double().T
    plain = x @ p.dequantize().to(dtype).T
    assert y.dtype == dtype
    assert y.shape == (3, 5, rows)
    error = (y.double() - exact).norm() / exact.norm()
    assert error <= 2 * (plain.double() - exact).norm() / exact.norm() + 1e-6


def test_large_activations_do_not_overflow_in_fp16():
    """Decoded weights are N(0, 1): their sums must not reach fp16 before the row scales bring them down."""
    p = random_packed("e8-2", 64, 1536, 512)
    small = PackedLinear("e8-2", 64, 1536, 512, p.codes, p.scale * 0.01, p.signs)
    x = torch.randn(2, 1536) * 3000
    y = matmul(x.half(), *arguments(small))
    exact = x.half().double() @ small.dequantize().double().T
    assert (x.norm(dim=1).min() * p.dequantize().norm(dim=1).max() / 1536**0.5) > 65504  # it would have overflowed
    assert torch.isfinite(y).all()
    assert ((y.double() - exact).norm() / exact.norm()) < 2e-3


def test_identity_input_reads_out_the_codes():
    p = random_packed("nested-4", 64, 64, 1)  # blocks of one: the rotation is the signs alone
    signs = PackedLinear("nested-4", 64, 64, 1, p.codes, torch.ones(64).half(), torch.zeros_like(p.signs))
    assert torch.equal(matmul(torch.eye(64), *arguments(signs)).T, signs.decode())


def test_opcheck():
    p = random_packed("e8-2", 64, 128, 128)
    torch.library.opcheck(matmul, (torch.randn(2, 128), *arguments(p)))


def test_a_gradient_is_refused():
    p = random_packed("e8-2", 64, 128, 128)
    y = matmul(torch.randn(2, 128, requires_grad=True), *arguments(p))
    with pytest.raises(GlqError, match="glq::matmul has no gradient"):
        y.sum().backward()


def test_compiles_without_a_graph_break():
    layer = QuantLinear.from_packed(random_packed("nested-3", 64, 128, 128), torch.randn(64))
    x = torch.randn(4, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_layer_casts_its_scales_only_and_dequantizes():
    p = random_packed("e8-2", 64, 128, 128)
    layer = QuantLinear.from_packed(p, torch.randn(64))
    x = torch.randn(4, 128)
    before = layer(x)
    linear = layer.dequantize(torch.float32)
    torch.testing.assert_close(linear(x), before)
    layer.float()
    assert layer.codes.dtype == torch.uint8
    torch.testing.assert_close(layer(x), before)
    assert p.bits == pytest.approx(2 + (16 * 64 + 128) / (64 * 128))


def test_empty_batch():
    layer = QuantLinear.from_packed(random_packed("e8-2", 64, 128, 128))
    assert layer(torch.zeros(0, 128)).shape == (0, 64)
