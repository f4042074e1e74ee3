"""Products that make their x: on a CPU that plays the GPU, and on a GPU where there is one."""

import shutil
from dataclasses import replace

import pytest
import torch
from emulator import Emulator
from torch.nn.functional import silu

from glq.ops import cuda_decode, cuda_rotate
from glq.ops.cuda_combine import combine
from glq.ops.cuda_rotate import FRAGMENTS, SWIZZLED, TILES, rotate_tiles
from glq.ops.fused_matmul import norm_matmul, normed, silu_matmul, try_out
from glq.ops.inputs import NORM, SILU, norm_of, plain, silu_of
from glq.ops.matmul import cuda_product, makes_input, matmul, matmul_reference
from glq.ops.matrix import Matrix
from glq.packed import PackedLinear, packed_shapes, unpack_signs
from glq.rotation import rotate

emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
EPS = 1e-5


def packed(name, rows, cols, block, device="cpu"):
    codes = torch.randint(0, 256, packed_shapes(name, rows, cols)["codes"], dtype=torch.uint8, device=device)
    signs = torch.randint(0, 256, (cols // 8,), dtype=torch.uint8, device=device)
    return PackedLinear(name, rows, cols, block, codes, (torch.rand(rows, device=device) + 0.5).half(), signs)


def given(w):
    return w.codes, w.scale, w.signs, w.codec, w.out_features, w.block


def halves(tokens, cols, dtype, device="cpu"):
    """Two tensors whose rows lie side by side, as gate and up of one product do."""
    both = torch.randn(tokens, 2 * cols, device=device).to(dtype)
    return both[:, :cols], both[:, cols:]


def made(kind, a, b, weight):
    return silu_of(a, b) if kind == SILU else norm_of(a, b, weight, EPS)


def plain_x(kind, a, b, weight):
    """By PyTorch, in the same type."""
    return silu(a) * b if kind == SILU else normed(a + b, weight, EPS)


def error(y, kind, a, b, weight, w):
    """Relative to the exact product, in units of what PyTorch has in the same type."""
    exact_x = plain_x(kind, a.double(), b.double(), weight.double())
    if kind == NORM:
        total = (a + b).double()
        exact_x = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double()
    exact = rotate(exact_x, unpack_signs(w.signs, w.in_features), w.block) @ w.decode().double().T * w.scale.double()
    of_torch = matmul_reference(plain_x(kind, a, b, weight), *given(w))
    return ((y.double() - exact).norm() / (of_torch.double() - exact).norm()).item()


def check(kind, name, tokens, rows, cols, block, dtype, gpu):
    a, b = halves(tokens, cols, dtype)
    weight, w = torch.randn(cols).to(dtype), packed(name, rows, cols, block)
    x = made(kind, a, b, weight)
    assert error(cuda_product(x, w, gpu), kind, a, b, weight, w) < 2
    if kind == NORM:
        assert torch.equal(x.total, a + b)


@emulated
@pytest.mark.parametrize("kind", [SILU, NORM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["trellis-4", "trellis-2.25"])
@pytest.mark.parametrize("block", [256, 1792, 2048])
def test_one_token(kind, dtype, name, block):
    check(kind, name, 1, 130, 2 * block, block, dtype, Emulator(3))


@emulated
@pytest.mark.parametrize("multiprocessors", [1, 3, 4, 5, 7, 9, 12])
@pytest.mark.parametrize("cols", [4096, 8192])
def test_blocks_that_have_parts_of_a_row_norm_all_of_it(multiprocessors, cols):
    check(NORM, "trellis-2", 1, 192, cols, 2048, torch.float16, Emulator(multiprocessors))


@emulated
@pytest.mark.parametrize("multiprocessors", [7, 8, 11, 16])
@pytest.mark.parametrize("kind", [SILU, NORM])
def test_a_block_has_the_columns_that_it_needs_side_by_side(multiprocessors, kind):
    """Where all do not fit: of one row of tiles, or of the end of one and the beginning of the next."""
    gpu = Emulator(multiprocessors)
    a, b = halves(1, 4096, torch.float16)
    weight, w = torch.randn(4096).half(), packed("trellis-4", 200, 4096, 256)
    matrix = Matrix(w.codec, w.scale.dtype, w.out_features, w.in_features, w.block)
    plan = cuda_decode.make_plan(1, kind, torch.float16, matrix, gpu)
    plan = replace(plan, packed=cuda_decode._needed(plan, matrix, multiprocessors))
    assert 0 < plan.packed < 4096
    x = made(kind, a, b, weight)
    y = cuda_decode.make_product(plan, kind, matrix, x.device, gpu)(x, w.codes, w.scale, w.signs)
    assert error(y, kind, a, b, weight, w) < 2


@pytest.mark.parametrize(("rows", "cols"), [(8192, 28672), (5120, 17408), (3584, 18944)])
def test_a_wide_x_leaves_room_for_the_table(rows, cols):
    matrix = Matrix("trellis-3", torch.float16, rows, cols, 512)
    plan = cuda_decode.make_plan(1, SILU, torch.float16, matrix, Emulator(132))
    assert plan.copies == 32  # so that no two lanes meet
    assert plan.block == 512


@emulated
@pytest.mark.parametrize("kind", [SILU, NORM])
@pytest.mark.parametrize("tokens", [2, 16])
def test_some_tokens(kind, tokens):
    check(kind, "trellis-3", tokens, 130, 1024, 512, torch.bfloat16, Emulator(2))


@emulated
def test_one_token_where_shared_memory_is_small():
    """The rotation gets a launch of its own, which makes x then."""
    gpu = Emulator(1, shared_memory=70 * 1024)
    matrix = Matrix("trellis-4", torch.float16, 70, 64 * 448, 2048)
    assert cuda_decode.make_plan(1, NORM, torch.float16, matrix, gpu).block == 0
    check(NORM, "trellis-4", 1, 70, 64 * 448, 2048, torch.float16, gpu)


@emulated
@pytest.mark.parametrize(("kind", "few"), [(SILU, 32), (SILU, 0), (NORM, 32)])
@pytest.mark.parametrize("layout", [TILES, SWIZZLED, FRAGMENTS])
@pytest.mark.parametrize("block", [256, 1280, 2048])
def test_rotation_of_what_is_made(kind, few, layout, block, monkeypatch):
    monkeypatch.setattr(cuda_rotate, "FEW_OF_SILU", few)
    a, b = halves(19, 2 * block, torch.float16)
    weight, signs = torch.randn(2 * block).half(), torch.randint(0, 256, (block // 4,), dtype=torch.uint8)
    x = made(kind, a, b, weight)
    tiles, of_torch = (
        rotate_tiles(each, signs, block, 24, layout, Emulator(1))[:, :19, :64].float()
        for each in (x, plain(plain_x(kind, a, b, weight)))
    )
    assert (tiles - of_torch).norm() < 2e-3 * of_torch.norm()
    if kind == NORM:
        assert torch.equal(x.total, a + b)


def test_how_many_tokens_are_made():
    hopper, other = Emulator(1), Emulator(1)
    other.arch = 89
    made = [makes_input("trellis-2", tokens, 2048, hopper) for tokens in (1, 64, 65, 2048, 2049)]
    assert made == [True, True, True, True, False]
    assert [makes_input("trellis-2", tokens, 2048, hopper, NORM) for tokens in (512, 513)] == [True, False]
    for codec, gpu, most in (("trellis-2", other, 64), ("nested-3", hopper, 128), ("e8-3.5", hopper, 1024)):
        assert [makes_input(codec, tokens, 2048, gpu) for tokens in (1, most, most + 1)] == [True, True, False]
    assert not makes_input("trellis-2", 1, 96, hopper)


@emulated
@pytest.mark.parametrize("kind", [SILU, NORM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cols", [8, 2056, 4096])
def test_what_no_rotation_makes(kind, dtype, cols):
    a, b = halves(3, cols, dtype)
    weight = torch.randn(cols).to(dtype)
    x = made(kind, a, b, weight)
    y = combine(x, Emulator(1)).double()
    total = (a + b).double()
    if kind == NORM:
        assert torch.equal(x.total, a + b)
        exact = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double()
    else:
        exact = silu(a.double()) * b.double()
    assert torch.allclose(y, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)  # rounded once


@emulated
@pytest.mark.parametrize(("tokens", "cols", "block"), [(2, 192, 192), (257, 256, 256), (1792, 256, 256)])
@pytest.mark.parametrize("kind", [SILU, NORM])
def test_products_of_it(kind, tokens, cols, block):
    check(kind, "trellis-3", tokens, 64, cols, block, torch.float16, Emulator(2))


@emulated
@pytest.mark.parametrize("tokens", [1, 33, 64])
def test_other_gpus(tokens):
    gpu = Emulator(2)
    gpu.arch = 89
    check(NORM, "trellis-2", tokens, 64, 512, 256, torch.float16, gpu)


@emulated
def test_they_are_tried_out():
    gpu = Emulator(2)
    try_out(lambda x, weight: cuda_product(x, weight, gpu), torch.device("cpu"))
    with pytest.raises(ValueError, match="something else"):
        try_out(lambda x, weight: cuda_product(plain(x.first), weight, gpu), torch.device("cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 9), (1, 64), (130,), (300,), (0,)])
def test_ops(device, dtype, shape):
    """Also where they are composed: many tokens, and on a CPU."""
    w = packed("trellis-4", 200, 1024, 512, device)
    both, weight = torch.randn(*shape, 2048, device=device).to(dtype), torch.randn(1024, device=device).to(dtype)
    a, b = both[..., :1024], both[..., 1024:]
    y, (z, total) = silu_matmul(a, b, *given(w)), norm_matmul(a, b, weight, EPS, *given(w))
    assert torch.equal(total, a + b)
    for kind, found in ((SILU, y), (NORM, z)):
        assert found.shape == (*shape, 200)
        assert found.dtype == dtype
        if found.numel():
            flat = (each.flatten(0, -2) for each in (found, a, b))
            y, *two = flat
            assert error(y, kind, *two, weight, w) < 2


@pytest.mark.parametrize("device", DEVICES)
def test_other_codecs_blocks_and_types(device):
    for name, cols, block, dtype in (
        ("e8-2", 256, 256, torch.float16),
        ("trellis-2", 192, 192, torch.float16),
        ("trellis-2", 256, 256, torch.float32),
    ):
        w = packed(name, 64, cols, block, device)
        a, b = halves(2, cols, dtype, device)
        expected = matmul(silu(a) * b, *given(w))
        assert torch.allclose(silu_matmul(a, b, *given(w)), expected)


def test_compiles_without_a_break():
    w = packed("trellis-4", 64, 256, 256)
    a, b = halves(2, 256, torch.float32)
    weight = torch.randn(256)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(a, b):
        y, total = norm_matmul(a, b, weight, EPS, *given(w))
        return y + silu_matmul(a, b, *given(w)), total

    y, total = run(a, b)
    assert torch.equal(total, a + b)
    assert torch.allclose(y, norm_matmul(a, b, weight, EPS, *given(w))[0] + silu_matmul(a, b, *given(w)))
