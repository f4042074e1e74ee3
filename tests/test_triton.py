"""The Triton kernels against the reference: on a GPU where there is one, otherwise under Triton's interpreter."""

import numpy as np
import pytest
import torch

from glq.codecs import CODECS
from glq.ops.matmul import has_triton_kernel, matmul_reference
from glq.packed import PackedLinear, packed_shapes, unpack_signs
from glq.rotation import rotate as rotate_reference

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from glq.ops import triton_matmul, triton_nvidia, triton_one_token, triton_rotate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ("trellis-2.75", "e8-3.5", "nested-3")
PLANNED = ("trellis-2", "trellis-2.5", "trellis-3", "trellis-3.5", "trellis-4", "e8-2", "nested-3")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Memory that a kernel should have written, but did not, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bf16_of_a_gpu(monkeypatch):
    """The interpreter cuts bf16 off where GPUs round, and multiplies its bit patterns as integers."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, src, to):
        if (src.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, to)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16).reshape(src.data.shape), tl.bfloat16)

    def fp32_dot(self, a, b, *rest):
        wide = [cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return dot(self, *wide, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", fp32_dot)


def random_packed(codec: str, rows: int, cols: int, block: int) -> PackedLinear:
    shapes = packed_shapes(codec, rows, cols)
    codes = torch.randint(0, 256, shapes["codes"], dtype=torch.uint8)
    signs = torch.randint(0, 256, shapes["signs"], dtype=torch.uint8)
    scale = (torch.rand(rows) + 0.5).to(torch.float16)
    return PackedLinear(codec, rows, cols, block, codes.to(DEVICE), scale.to(DEVICE), signs.to(DEVICE))


def arguments(p: PackedLinear) -> tuple:
    return p.codes, p.scale, p.signs, p.codec, p.out_features, p.block


def scaled_weights(p: PackedLinear) -> torch.Tensor:
    return p.decode() * p.scale.float()[:, None]


def check_matmul(p: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    y = triton_matmul.matmul(x, *arguments(p))
    rotated = rotate_reference(x.double(), unpack_signs(p.signs, p.in_features), p.block)
    exact = rotated @ (p.decode().double() * p.scale.double()[:, None]).T
    plain = matmul_reference(x, *arguments(p))
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert (y.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-6 * exact.norm()
    return y


@pytest.mark.parametrize("codec", CODECS)
def test_dequantize_is_the_reference_to_the_bit(codec):
    p = random_packed(codec, 70, 75, 25)
    assert torch.equal(triton_matmul.dequantize(p.codes, p.scale, codec, 70, 75, torch.float32), scaled_weights(p))


@pytest.mark.parametrize("codec", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_rounds_once(codec, dtype):
    p = random_packed(codec, 33, 64, 64)
    weight = triton_matmul.dequantize(p.codes, p.scale, codec, 33, 64, dtype)
    assert torch.equal(weight, scaled_weights(p).to(dtype))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_matmul_of_few_tokens(codec, dtype, tokens):
    check_matmul(random_packed(codec, 70, 75, 25), torch.randn(tokens, 75).to(DEVICE, dtype))


@pytest.mark.parametrize(("codec", "processors"), [*((c, 1) for c in PLANNED), ("trellis-2", 100), ("trellis-4", 100)])
def test_one_token_by_each_plan(codec, processors, monkeypatch):
    """19 column tiles: no plan takes as many at a time, nor a part of them in whole numbers."""
    monkeypatch.setattr(triton_one_token, "multiprocessors", lambda device: processors)
    check_matmul(random_packed(codec, 70, 1216, 64), torch.randn(1, 1216).to(DEVICE, torch.float16))


@pytest.mark.parametrize("codec", CODECS)
def test_plans_leave_no_thread_without_words(codec):
    words = 8 if codec == "trellis-3" else 1  # whole lanes
    for row_tiles in (1, 64, 131, 132, 448, 4001):
        plan = triton_one_token.plan_of(codec, row_tiles, 132)
        assert plan.group in (1, 2, 4, 8)
        assert all(n & (n - 1) == 0 for n in (plan.tiles, plan.warps))
        assert plan.group * plan.tiles * 32 >= plan.warps * 32 * words


@pytest.mark.parametrize(("block", "cols"), [(1, 65), (64, 320), (192, 384), (75, 225)])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_rotation_to_words(block, cols, size):
    x, signs = torch.randn(cols).to(DEVICE), torch.full((48,), 0xB1, dtype=torch.uint8).to(DEVICE)
    y = triton_rotate.rotate_to_words(x, signs, block, 512, size)
    exact = torch.zeros(512, device=DEVICE)
    exact[:cols] = triton_rotate.rotate(x, signs, block)
    lanes = exact.view(8, 4, 8 // size, size, 2)  # [tile, t, step, word, column]
    assert torch.allclose(y, lanes.transpose(1, 2).flatten(), atol=1e-5)


def test_an_older_triton_starts_no_kernel_early(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    early = triton_nvidia.starts_early.__wrapped__
    assert early(device) == (triton_nvidia.gdc_wait is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not early(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_nvidia, "gdc_wait", None)
    assert not early(device)


def test_early_starts_change_no_bit(monkeypatch):
    """Products that read what the one before wrote, with nothing between them."""
    if DEVICE == "cpu" or not triton_nvidia.starts_early(torch.device("cuda", 0)):
        pytest.skip("no kernel starts early here")

    def last(weights: list[PackedLinear]) -> torch.Tensor:
        y = torch.linspace(-1, 1, 768, device=DEVICE)
        for p in weights:
            y = triton_matmul.matmul(y, *arguments(p))
        return y

    weights = [random_packed(codec, 768, 768, block) for codec in PLANNED for block in (256, 384)]
    early = [last(weights) for _ in range(3)]  # the first compiles
    monkeypatch.setattr(triton_nvidia, "starts_early", lambda device: False)
    late = last(weights)
    assert late.isfinite().all()
    assert all(torch.equal(y, late) for y in early)


@pytest.mark.parametrize("codec", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (17,), (2, 35)])
def test_matmul_of_more_tokens(codec, dtype, shape):
    check_matmul(random_packed(codec, 70, 96, 96), torch.randn(*shape, 96).to(DEVICE, dtype))


@pytest.mark.parametrize("codec", FAMILIES)
@pytest.mark.parametrize("tokens", [2, 17])
def test_sums_in_parts_are_as_good_and_always_the_same(codec, tokens, monkeypatch):
    monkeypatch.setattr(triton_matmul, "multiprocessors", lambda device: 100)
    p = random_packed(codec, 40, 784, 784)  # 13 column tiles: three parts, of 5, 4 and 4
    x = torch.randn(tokens, 784).to(DEVICE, torch.float16)
    assert torch.equal(check_matmul(p, x), triton_matmul.matmul(x, *arguments(p)))


def test_identity_input_reads_out_the_codes():
    p = random_packed("trellis-3.25", 64, 64, 1)  # blocks of one: the rotation is the signs alone
    plain = PackedLinear("trellis-3.25", 64, 64, 1, p.codes, torch.ones_like(p.scale), torch.zeros_like(p.signs))
    y = triton_matmul.matmul(torch.eye(64, device=DEVICE, dtype=torch.float16)[:3], *arguments(plain))
    assert torch.equal(y.T.float(), plain.decode()[:, :3])


def test_large_activations_do_not_overflow_in_fp16():
    p = random_packed("trellis-2", 64, 256, 128)
    small = PackedLinear("trellis-2", 64, 256, 128, p.codes, p.scale * 0.01, p.signs)
    check_matmul(small, (torch.randn(2, 256) * 8000).to(DEVICE, torch.float16))


def test_input_may_be_a_slice():
    p = random_packed("trellis-4", 64, 64, 64)
    check_matmul(p, torch.randn(3, 130).to(DEVICE, torch.float16)[:, 1:65])


@pytest.mark.parametrize("block", [1, 5, 75, 96, 200, 512, 576, 688, 1376, 2048])
def test_rotation(block):
    x = torch.randn(2, max(block, 16 // block * block)).to(DEVICE)
    signs = torch.randint(0, 256, (-(-x.shape[1] // 8),), dtype=torch.uint8).to(DEVICE)
    exact = rotate_reference(x.double(), unpack_signs(signs, x.shape[1]), block)
    y = triton_rotate.rotate(x, signs, block)
    assert (y - exact).norm() < 1e-6 * exact.norm()
    half = triton_rotate.rotate(x.bfloat16(), signs, block)
    exact = rotate_reference(x.bfloat16().double(), unpack_signs(signs, x.shape[1]), block)
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 2 * (exact.bfloat16() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("row_tiles", "col_tiles", "tokens", "parts"), [(2, 3, 2, 1), (64, 64, 2, 9), (64, 64, 64, 4), (2000, 64, 2, 1)]
)
def test_rows_are_split_where_their_tiles_do_not_fill_the_gpu(row_tiles, col_tiles, tokens, parts):
    assert triton_matmul.parts_of_a_row(row_tiles, col_tiles, tokens, 132) == parts


def test_the_first_use_checks_the_kernels(monkeypatch):
    device = torch.device(DEVICE)
    has_triton_kernel.cache_clear()
    assert has_triton_kernel(device, "e8-3.5")
    monkeypatch.setattr(triton_matmul, "matmul", lambda x, *rest: x.new_zeros(len(x), 100))
    with pytest.warns(UserWarning, match="computes something else than PyTorch"):
        assert not has_triton_kernel(device, "nested-3")
    has_triton_kernel.cache_clear()
