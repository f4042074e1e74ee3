"""The CUDA kernels: on a CPU that plays the GPU; as cubins for every architecture; and on a GPU where there is one."""

import re
import shutil
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from cubins import COMPILED_FOR, SHARED_MEMORY, TRELLISES, check_pipeline, lattices, rates, spilled
from emulator import Emulator

from glq import nvrtc
from glq.codecs import CODECS
from glq.errors import GlqError
from glq.ops import cuda_batch, cuda_decode, cuda_dequantize, cuda_prompt, cuda_rotate
from glq.ops import matmul as op_module
from glq.ops.cuda_decode import Plan, make_plan, max_tokens
from glq.ops.cuda_rotate import FRAGMENTS, SWIZZLED, TILES, rotate_tiles
from glq.ops.inputs import NORM, PLAIN, SILU, plain
from glq.ops.matmul import MANY, matmul_reference
from glq.ops.matrix import Matrix
from glq.packed import PackedLinear, packed_shapes, unpack_signs
from glq.rotation import rotate

emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def problem(name, tokens, out_features, in_features, block, dtype, scale=torch.float16, device="cpu"):
    shape = packed_shapes(name, out_features, in_features)["codes"]
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    signs = torch.randint(0, 256, (-(-in_features // 8),), dtype=torch.uint8, device=device)
    scales = (torch.rand(out_features, device=device) + 0.5).to(scale)
    weight = PackedLinear(name, out_features, in_features, block, codes, scales, signs)
    return torch.randn(tokens, in_features, device=device).to(dtype), weight


def error(y, x, weight):
    """Relative to the exact product, in units of what the same-dtype PyTorch product has."""
    w = weight
    rotated = rotate(x.double(), unpack_signs(w.signs, w.in_features), w.block)
    exact = rotated @ w.decode().double().T * w.scale.double()
    plain = matmul_reference(x, w.codes, w.scale, w.signs, w.codec, w.out_features, w.block)
    return ((y.double() - exact).norm() / (plain.double() - exact).norm()).item()


def multiply(module, x, w, gpu, plan):
    """By the kernel of a module, for one plan."""
    tokens = () if module is cuda_decode else (len(x),)
    return module.make_product(plan, *tokens, PLAIN, of(w), x.device, gpu)(plain(x), w.codes, w.scale, w.signs)


def of(w):
    return Matrix(w.codec, w.scale.dtype, w.out_features, w.in_features, w.block)


def few(x, w, gpu, plan=None):
    return multiply(cuda_decode, x, w, gpu, plan or make_plan(len(x), PLAIN, x.dtype, of(w), gpu))


def check(name, tokens, out_features, in_features, block, gpu, dtype=torch.float16, plan=None, scale=torch.float16):
    x, weight = problem(name, tokens, out_features, in_features, block, dtype, scale)
    y = few(x, weight, gpu, plan)
    assert y.shape == (tokens, out_features)
    assert y.dtype == dtype
    assert error(y, x, weight) < 2
    assert torch.equal(y, few(x, weight, gpu, plan))


@emulated
@pytest.mark.parametrize("name", CODECS)
def test_every_codec(name):
    check(name, 1, 130, 512, 512, Emulator(1))
    check(name, 3, 130, 200, 200, Emulator(2))


@emulated
@pytest.mark.parametrize("block", [256, 768, 1280, 1536, 1792, 2048])
def test_one_token_is_rotated_in_the_kernel(block):
    check("trellis-4", 1, 70, 2 * block, block, Emulator(3))


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype(dtype, scale):
    check("trellis-3", 1, 70, 256, 256, Emulator(1), dtype, scale=scale)
    check("trellis-2.25", 2, 70, 96, 96, Emulator(1), dtype, scale=scale)


@emulated
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 17, 33, 64])
def test_every_number_of_tokens(tokens):
    check("trellis-3", tokens, 600, 150, 75, Emulator(2), torch.bfloat16)


@pytest.mark.parametrize(("tokens", "rows", "units"), [(1, 8192, (8, 2)), (1, 8191, (2, 8)), (8, 28672, (4, 4))])
def test_units_are_by_rows_where_a_matrix_is_tall(tokens, rows, units):
    gpu, matrix = Emulator(132, SHARED_MEMORY[90] * 1024), Matrix("trellis-3", torch.float16, rows, 4096, 2048)
    plan = make_plan(tokens, PLAIN, torch.float16, matrix, gpu)
    assert (plan.wr, plan.wk) == units


@emulated
@pytest.mark.parametrize(("wr", "wk"), [(1, 4), (2, 2), (4, 1), (2, 4), (8, 1)])
@pytest.mark.parametrize("multiprocessors", [1, 3, 5])
def test_every_division_of_the_work(wr, wk, multiprocessors):
    plan = Plan(TRELLISES["trellis-4"], torch.float16, torch.float16, 1, wr, wk, 8, 512)
    check("trellis-4", 1, 330, 1024, 512, Emulator(multiprocessors), plan=plan)
    plan = replace(plan, tokens=5, block=0)
    check("trellis-4", 5, 330, 1024, 512, Emulator(multiprocessors), plan=plan)


BATCH_SHAPES = [
    cuda_batch.Shape(32, 2, 1, 4),
    cuda_batch.Shape(32, 1, 1, 3),
    cuda_batch.Shape(32, 1, 1, 4),
    cuda_batch.Shape(64, 2, 2, 2),
    cuda_batch.Shape(64, 2, 1, 4),
    cuda_batch.Shape(128, 2, 2, 1),
    cuda_batch.Shape(128, 4, 1, 3),
    cuda_batch.Shape(128, 4, 2, 2),
]


def check_batch(name, tokens, rows, cols, shape, parts, dtype=torch.float16, block=41):
    x, weight = problem(name, tokens, rows, cols, block, dtype)
    gpu = Emulator(2, resident=max(parts, 2))  # as many blocks as may have a tile together: it waits for no other
    plan = cuda_batch.fill(CODECS[name], dtype, torch.float16, shape, parts)
    assert error(multiply(cuda_batch, x, weight, gpu, plan), x, weight) < 2
    gpu.exchange(0)  # is as it was


@emulated
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_of_every_codec(name, dtype):
    """With some rows beyond the last whole tile, of 32 or 64."""
    check_batch(name, 3, 210, 328, cuda_batch.Shape(32, 4 if name in TRELLISES else 2, 1, 2), 2, dtype)


@emulated
@pytest.mark.parametrize(("shape", "parts"), list(zip(BATCH_SHAPES, [1, 2, 3, 1, 4, 2, 5, 1], strict=True)))
@pytest.mark.parametrize("name", ["trellis-4", "trellis-2.25"])
def test_batch_of_every_shape(name, shape, parts):
    check_batch(name, shape.tokens - 5, 330, 328, shape, parts)


def test_batches_have_plans_for_every_matrix():
    for tokens, rows, cols in product((17, 32, 33, 64, 65, 128, 200), (1, 130, 4096, 28672), (64, 200, 14336)):
        plan = cuda_batch.make_plan(tokens, torch.float16, Matrix("trellis-4", torch.float16, rows, cols, 0), 132)
        if plan is None:
            assert tokens > (64 if rows > 132 * 128 else 128)
            continue
        assert tokens <= plan.shape.tokens
        assert plan.shape in BATCH_SHAPES
        assert 1 <= plan.parts <= min(8, -(-cols // 64))
        assert plan.parts == 1 or plan.parts * plan.tiles(tokens, rows) <= 132


TAKEN = [name for name in CODECS if cuda_prompt.most_tokens(CODECS[name])]
PROMPT_SHAPES = [cuda_prompt.Shape(128, 2), cuda_prompt.Shape(256, 2)]


def check_prompt(name, tokens, rows, cols, shape, clusters, dtype=torch.float16, block=41):
    x, weight = problem(name, tokens, rows, cols, block, dtype)
    gpu = Emulator(2, resident=6)
    plan = cuda_prompt.fill(CODECS[name], dtype, torch.float16, shape, clusters)
    assert error(multiply(cuda_prompt, x, weight, gpu, plan), x, weight) < 2
    gpu.exchange(0)  # is as it was


@emulated
@pytest.mark.parametrize(("name", "dtype"), list(zip(TAKEN, cycle([torch.bfloat16, torch.float16]), strict=False)))
def test_prompt_of_every_codec(name, dtype):
    check_prompt(name, 3, 200, 328, PROMPT_SHAPES[0], 2, dtype)


@emulated
@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        *((rows, PROMPT_SHAPES[0]) for rows in (129, 330, 512)),  # odd, even, and whole tiles of y
        (512, PROMPT_SHAPES[1]),
        (330, cuda_prompt.Shape(128, 1)),
    ],
)
def test_prompt_of_every_shape(rows, shape):
    for name in ("trellis-3.75", "e8-3.5"):
        check_prompt(name, shape.tokens + 9, rows, 328, shape, 3)


@emulated
@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 7, 8, 16])
def test_prompt_shares_tiles(clusters):
    """Runs that end within a tile, with it, and have several; and halves of tiles (8)."""
    check_prompt("trellis-4", 130, 330, 256, PROMPT_SHAPES[0], clusters, block=128)


@pytest.mark.parametrize("tokens", [65, 129, 300, 2048])
@pytest.mark.parametrize("rows", [1, 130, 4096, 28672])
@pytest.mark.parametrize("cols", [64, 200, 14336])
@pytest.mark.parametrize("multiprocessors", [1, 78, 132])
def test_every_cluster_of_prompt_has_a_unit(tokens, rows, cols, multiprocessors):
    matrix = Matrix("trellis-4", torch.float16, rows, cols, 0)
    plan = cuda_prompt.make_plan(tokens, torch.float16, matrix, multiprocessors)
    assert plan.shape in PROMPT_SHAPES
    assert 1 <= plan.clusters <= max(1, multiprocessors // 2)
    assert plan.clusters <= plan.tiles(tokens, rows) * -(-cols // 64)


def test_products_of_warpgroups_keep_their_pipeline():
    """ptxas says so where it does not."""
    for name in ("trellis-1.5", "trellis-2.75", "trellis-3.25", "trellis-4"):
        spills = [] if TRELLISES[name].signs == 2 else [cuda_batch.Shape(32, 1, 1, 4)]  # which no plan takes then
        shapes = [shape for shape in BATCH_SHAPES if shape not in spills]
        plans = [cuda_batch.fill(TRELLISES[name], torch.float16, torch.float16, shape) for shape in shapes]
        plans += [cuda_prompt.fill(TRELLISES[name], torch.float16, torch.float16, shape) for shape in PROMPT_SHAPES]
        for plan in plans:
            check_pipeline(plan)


def test_prompt_fills_the_gpu():
    for tokens, rows, cols in product((65, 128, 200, 512, 2000, 2048), (1024, 4096, 14336), (4096, 14336)):
        plan = cuda_prompt.make_plan(tokens, torch.float16, Matrix("trellis-4", torch.float16, rows, cols, 0), 132)
        assert plan.clusters >= 60
        assert tokens < 2048 or rows < 4096 or plan.tiles(tokens, rows) % plan.clusters == 0


@emulated
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_of_every_codec(name, dtype):
    _, weight = problem(name, 1, 150, 200, 40, dtype)
    found = cuda_dequantize.decode_scaled(weight, dtype, Emulator(2))[:150, :200].float()
    expected = weight.decode() * weight.scale.float()[:, None]
    plain = (expected.to(dtype).float() - expected).norm()
    assert (found - expected).norm() < (1.6 if name in TRELLISES else 2) * plain


@emulated
@pytest.mark.parametrize("name", TRELLISES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unrotate_of_every_codec(name, dtype):
    check_unrotate(name, 150, 384, 128, dtype)


@emulated
@pytest.mark.parametrize("block", [64, 256, 512, 1024, 2048])
@pytest.mark.parametrize("shared_memory", [228, 164, 100])
def test_unrotate_of_every_block(block, shared_memory):
    check_unrotate("trellis-4", 70, 3 * block, block, torch.bfloat16, shared_memory)


def check_unrotate(name, rows, cols, block, dtype, shared_memory=228):
    _, weight = problem(name, 1, rows, cols, block, dtype)
    expected = weight.dequantize().double()
    found = cuda_dequantize.unrotate(weight, dtype, Emulator(3, shared_memory * 1024)).double()
    assert (found - expected).norm() < 1.6 * (expected.to(dtype).double() - expected).norm()


@emulated
@pytest.mark.parametrize("block", [256, 2048, 96, 75])
@pytest.mark.parametrize("rows", [1, 33, 129, 1100])
def test_product_with_a_dequantized_matrix(block, rows, monkeypatch):
    monkeypatch.setattr(cuda_dequantize, "AT_ONCE", 64 * 2 * block)
    for name in ("trellis-2.75", "e8-3.5"):
        x, weight = problem(name, 200, rows, 2 * block, block, torch.bfloat16)
        assert error(cuda_dequantize.matmul(x, weight, Emulator(3)), x, weight) < 2


def test_dequantize_fits_every_architecture():
    for name in ("trellis-1.5", "trellis-2.75", "trellis-4", "nested-3", "nested-3.5", "e8-3.5"):
        plan = cuda_dequantize.Plan(CODECS[name], torch.bfloat16, torch.float16)
        assert plan.shared <= 99 * 1024
        for arch in ("sm_80", "sm_90", "sm_120"):
            _, report = plan.source.compile_and_report(arch)
            assert max(spilled(report)) <= (12 if name == "nested-3.5" else 0)  # three registers, on sm_80


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_unrotate_fits_every_architecture(arch):
    gpu = Emulator(132, SHARED_MEMORY.get(arch, 100) * 1024)
    for name in ("trellis-2.75", "trellis-4"):
        plan = cuda_dequantize.make_plan(TRELLISES[name], torch.bfloat16, torch.float16, 2048, gpu)
        assert plan.shared + nvrtc.RESERVED <= gpu.shared_memory
        assert plan.source.compile(f"sm_{arch}")[:4] == b"\x7fELF"


@emulated
@pytest.mark.parametrize("block", [256, 512, 768, 1024, 1280, 1536, 1792, 2048, 96, 75, 344, 688, 896, 1376, 1344])
@pytest.mark.parametrize("layout", [TILES, SWIZZLED, FRAGMENTS])
@pytest.mark.parametrize("few", [0, 16])
def test_rotation(block, layout, few, monkeypatch):
    monkeypatch.setattr(cuda_rotate, "FEW", few)
    x = torch.randn(11, 2 * block).bfloat16()
    signs = torch.randint(0, 256, (-(-2 * block // 8),), dtype=torch.uint8)
    tiles = rotate_tiles(plain(x), signs, block, 16, layout, Emulator(1 if few else 132))[:, :11].float()
    if layout != TILES:  # [tile, token, chunk of 8, 8] → the columns' order
        chunk = torch.arange(8)[None] ^ torch.arange(11)[:, None] % 8
        chunks = tiles.unflatten(2, (8, 8)).gather(2, chunk[None, :, :, None].expand(len(tiles), -1, -1, 8))
        if layout == SWIZZLED:
            tiles = chunks.reshape(-1, 11, 2, 4, 2, 4).transpose(3, 4).flatten(2)
        else:  # [step, pair of its four columns, lane, 2]
            tiles = chunks.reshape(-1, 11, 4, 2, 4, 2).permute(0, 1, 4, 2, 3, 5).flatten(2)
    found = tiles[..., :64].transpose(0, 1).flatten(1)
    expected = rotate(x.float(), unpack_signs(signs, 2 * block), block)
    torch.testing.assert_close(found[:, : 2 * block], expected, rtol=0.01, atol=0.01)
    assert not found[:, 2 * block :].any()


def try_out(gpu):
    tokens = (1, 16, 17, 129, MANY)  # one for each kernel
    op_module.try_out(
        lambda x, weight: op_module.cuda_product(plain(x), weight, gpu), torch.device("cpu"), "trellis-2", tokens
    )


@emulated
@pytest.mark.parametrize("module", [cuda_decode, cuda_batch, cuda_prompt, cuda_dequantize])
def test_the_first_use_checks_the_kernels(module, monkeypatch):
    try_out(Emulator(1))
    monkeypatch.setattr(module, "device_table", lambda *_: torch.zeros(1024, 2).half())
    with pytest.raises(GlqError, match="computes something else"):
        try_out(Emulator(1))


@emulated
def test_shared_memory_that_begins_elsewhere_is_not_silently_wrong():
    x, weight = problem("trellis-4", 3, 70, 128, 64, torch.bfloat16)
    assert few(x, weight, Emulator(2, begin=2048)).isnan().all()
    with pytest.raises(GlqError, match="computes something else"):
        try_out(Emulator(1, begin=2048))


def plans(arch, names):
    gpu = Emulator(132, SHARED_MEMORY.get(arch, 100) * 1024)
    for name in names:
        for tokens in (1, 8, 16, max_tokens(arch)):
            for rows, cols in ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672)):
                for kind in (PLAIN, SILU, NORM):
                    matrix = Matrix(name, torch.float16, rows, cols, 2048)
                    plan = make_plan(tokens, kind, torch.float16, matrix, gpu)
                    assert plan.fits(cols, gpu)
                    # those of lattices are slow to compile, and differ little by the matrix
                    if name in TRELLISES or (kind == PLAIN and rows > cols and tokens != 8):
                        yield plan


@pytest.mark.parametrize("case", COMPILED_FOR)
def test_cubins_stay_within_the_limits_of_every_architecture(case):
    arch = case.split()[0]
    for source in {plan.source: None for plan in plans(int(arch[3:]), [*rates(case), *lattices(case)])}:
        macros = dict(source.macros)
        code, report = source.compile_and_report(arch)
        assert code[:4] == b"\x7fELF"
        # with q = 8 and one token three registers are missing on Hopper, outside of the loop over a row's units
        most = 12 if (macros.get("NESTED"), macros["NT"], arch) == (8, 1, "sm_90") else 0
        assert max(spilled(report)) <= most, (source, report)
        assert (
            int(re.findall(r"Used (\d+) registers", report)[0]) > 64
        )  # fewer: the compiler saw that it always refuses


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(name, dtype):
    gpu = nvrtc.gpu(torch.device("cuda"))
    tall = ((8193, 2048, 2048), (16391, 1376, 688))  # units by rows
    for tokens in (1, 2, 7, 8, 16, 33, 64):
        for out_features, in_features, block in ((4096, 4096, 2048), (1000, 1376, 688), (70, 14336, 2048), *tall):
            x, weight = problem(name, tokens, out_features, in_features, block, dtype, device="cuda")
            y = few(x, weight, gpu)
            assert error(y, x, weight) < 2
            assert torch.equal(y, few(x, weight, gpu))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("name", TRELLISES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_tokens_on_a_gpu(name, dtype):
    gpu = nvrtc.gpu(torch.device("cuda"))
    for out_features, in_features, block in ((4096, 4096, 2048), (1000, 1376, 688), (70, 14336, 2048)):
        for tokens in (65, 100, 128, 200, 513, 2000):
            x, weight = problem(name, tokens, out_features, in_features, block, dtype, device="cuda")
            plan = cuda_prompt.make_plan(tokens, dtype, of(weight), gpu.multiprocessors)
            y = multiply(cuda_prompt, x, weight, gpu, plan)
            assert error(y, x, weight) < 2
            assert torch.equal(y, multiply(cuda_prompt, x, weight, gpu, plan))
        for tokens in (17, 40, 128):
            for shape in BATCH_SHAPES:
                plan = cuda_batch.fill(TRELLISES[name], dtype, torch.float16, shape)
                plan = cuda_batch.spread_out(plan, tokens, of(weight), gpu.multiprocessors)
                y = multiply(cuda_batch, x[:tokens], weight, gpu, plan)
                assert error(y, x[:tokens], weight) < 2
                assert torch.equal(y, multiply(cuda_batch, x[:tokens], weight, gpu, plan))
        assert error(cuda_dequantize.matmul(x, weight, gpu), x, weight) < 2
