"""The rotation of x by one warp a token: how exact it is, and that its registers suffice."""

from itertools import product

import pytest
import torch
from cubins import spilled
from emulator import Emulator
from test_cuda_matmul import emulated, error, multiply, of, problem
from torch.nn.functional import silu

from glq.codecs import CODECS
from glq.ops import cuda_batch, cuda_prompt, cuda_rotate
from glq.ops.cuda_rotate import FRAGMENTS, rotate_rows, rotation
from glq.ops.inputs import NORM, PLAIN, SILU, plain, silu_of
from glq.ops.matmul import cuda_product
from glq.ops.matrix import Matrix
from glq.packed import unpack_signs
from glq.rotation import rotate


@emulated
@pytest.mark.parametrize("block", [256, 1024, 1280, 1792, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_as_exact_as_its_type(block, dtype):
    """Sums in tf32 in between show in neither: they are made up for in bf16, and complete in fp16."""
    x = torch.randn(cuda_rotate.FEW + 1, block).to(dtype)
    signs = torch.randint(0, 256, (block // 8,), dtype=torch.uint8)
    exact = rotate(x.double(), unpack_signs(signs, block), block)
    found = rotate_rows(x, signs, block, Emulator(1)).double()
    rounded = exact.to(dtype).double()
    assert (found - exact).norm() < 1.03 * (rounded - exact).norm()
    assert abs((found * exact).sum() / exact.square().sum() - 1) < 2e-4  # no smaller, on average


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_fits(arch, dtype):
    for block in (344, 1376, 896):
        source = rotation(512, PLAIN, dtype, block, block, 512, FRAGMENTS, Emulator(132)).source
        assert max(spilled(source.compile_and_report(arch)[1])) == 0
    for block, kind in product((256, 1024, 2048), (PLAIN, SILU)):
        source = rotation(512, kind, dtype, block, block, 512, FRAGMENTS, Emulator(132)).source
        _, report = source.compile_and_report(arch)
        assert max(spilled(report)) <= (40 if kind == PLAIN else 44)  # of 168 registers, once a token of 2,048 columns


class Noting(Emulator):
    """Notes what it launches."""

    def __init__(self):
        super().__init__(2, resident=6)
        self.launched, self.grids = [], []

    def launch(self, source, name, grid, block, shared, *arguments):
        self.launched.append((name, arguments))
        self.grids.append((name, grid))
        super().launch(source, name, grid, block, shared, *arguments)


@emulated
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, PLAIN), (torch.bfloat16, PLAIN), (torch.float16, SILU)])
def test_a_part_is_rotated_beside_the_product_of_the_one_before(dtype, kind, monkeypatch):
    monkeypatch.setattr(cuda_prompt, "_WIDE", 256)
    x, weight = problem("trellis-4", 532, 200, 256, 256, dtype)
    gpu = Noting()
    if kind == PLAIN:
        assert error(cuda_product(plain(x), weight, gpu), x, weight) < 2
    else:
        both = torch.cat([x, x.flip(0)], 1)
        gate, up = both[:, :256], both[:, 256:]
        assert error(cuda_product(silu_of(gate, up), weight, gpu), silu(gate) * up, weight) < 2
    assert [name for name, _ in gpu.launched] == [
        "rotate_many",
        "prompt",
        "rotate_many",
        "prompt",
        "rotate_many",
        "batch",
    ]
    rotations = [arguments for name, arguments in gpu.launched if name == "rotate_many"]
    assert [beside for *_, beside in rotations] == [False, True, True]
    # What the product beside it reads is not what it writes; nor what the one before reads, which may not be over.
    assert len({out.data_ptr() for _, _, _, out, *_ in rotations}) == 3


def test_which_products_are_made_in_parts():
    def parts(rows, cols, kind=PLAIN, block=2048):
        return cuda_prompt.tokens_at_once(4096, kind, Matrix("trellis-4", torch.float16, rows, cols, block), 132)

    assert parts(4096, 14336) == 1024  # 16 × 4 tiles for 66 clusters
    assert parts(8192, 28672, SILU) == 512
    assert parts(5120, 17408, block=1024) == 768
    whole = [parts(4096, 4096), parts(14336, 14336), parts(4096, 14336, NORM), parts(4096, 14336, block=896)]
    assert whole == [4096] * 4


def test_a_product_leaves_room_for_the_next_rotation():
    """In each of the sizes that a Hopper's shared memory has; there is none beyond the largest."""
    gpu = Emulator(132)
    asked = [
        cuda_rotate.with_room(kb << 10, gpu) >> 10
        for kb in (128, 129, 131, 160, 161, 163, 164, 192, 193, 196, 224, 227)
    ]
    assert asked == [128, 132, 132, 160, 164, 164, 164, 192, 196, 196, 224, 227]
    gpu.arch = 89
    assert cuda_rotate.with_room(129 << 10, gpu) == 129 << 10


@emulated
@pytest.mark.parametrize("tokens", [32, 40])
def test_tiles_that_are_left_over_have_a_launch_of_their_own(tokens):
    gpu = Noting()
    gpu.multiprocessors = 3
    rows = 3 * 256 + 40
    x, weight = problem("trellis-4", tokens, rows, 512, 256, torch.float16)
    shape = cuda_batch.Shape(32, 1, 1, 3) if tokens == 32 else cuda_batch.Shape(64, 2, 2, 2)
    plan = cuda_batch.spread_out(
        cuda_batch.fill(CODECS["trellis-4"], x.dtype, torch.float16, shape), tokens, of(weight), 3
    )
    assert error(multiply(cuda_batch, x, weight, gpu, plan), x, weight) < 2
    grids = [grid for name, grid in gpu.grids if name == "batch"]
    assert grids == [(1, 3), (3, 1)]  # the last 40 rows by three blocks
