"""x rotated while a product goes on: schedules, the rotation of a token by one warp, and both in products."""

from dataclasses import replace

import pytest
import torch
from cubins import check_pipeline
from emulator import Emulator
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_matmul import TAKEN, emulated, error, multiply, of, problem

from glq.codecs import CODECS
from glq.ops import cuda_beside, cuda_prompt, cuda_rotate
from glq.ops.cuda_beside import TOKENS, make_schedule
from glq.ops.cuda_rotate import rotate_rows
from glq.ops.matrix import Matrix
from glq.packed import unpack_signs
from glq.rotation import block_width, rotate

SHAPE = cuda_prompt.Shape(TOKENS, 2)


@given(
    blocks=st.integers(1, 16),
    row_tiles=st.integers(1, 24),
    clusters=st.integers(1, 70),
    chunks=st.integers(1, 8),
    slices=st.integers(1, 16),
    ragged=st.integers(0, TOKENS - 1),
)
def test_what_a_run_wants_early_is_there(blocks, row_tiles, clusters, chunks, slices, ragged):
    """And what it wants later is rotated beside, each item once."""
    width, tiles = 256 * chunks, blocks * row_tiles
    schedule = make_schedule(blocks * TOKENS - ragged, slices * width, width, tiles, clusters, 4)
    if (tiles % clusters and clusters % tiles) or slices > 14:
        assert schedule is None
    if schedule is None:
        return
    units, each = slices * width // 64, blocks // schedule.apart
    steps = [(i, turn) for turn in range(schedule.apart) for i in schedule.order]
    items = [(i, turn + schedule.apart * k) for i, turn in steps for k in range(each)]
    assert sorted(items) == [(i, block) for i in range(slices) for block in range(blocks)]
    ahead, total = set(items[: schedule.ahead]), tiles * units
    for run in range(clusters):
        begin, end = total * run // clusters, total * (run + 1) // clusters
        for unit in range(begin, min(end, begin + schedule.early)):
            assert (unit % units * 64 // width, unit // units % blocks) in ahead


@pytest.mark.parametrize(("tokens", "rows", "cols"), [(512, 4096, 14336), (1000, 4096, 14336), (2048, 4096, 4096)])
def test_who_has_no_tile_rotates(tokens, rows, cols):
    matrix = Matrix("trellis-4", torch.float16, rows, cols, block_width(cols))
    plan = cuda_prompt.make_plan(tokens, torch.float16, matrix, 132)
    assert plan.schedule
    assert plan.schedule.beside + 2 * plan.clusters == 132
    assert plan.schedule.ahead < len(plan.schedule.order) * -(-tokens // TOKENS)


def test_nobody_rotates_where_all_have_tiles():
    matrix = Matrix("trellis-4", torch.float16, 14336, 4096, 2048)
    assert cuda_prompt.make_plan(512, torch.float16, matrix, 132).schedule is None


@emulated
@pytest.mark.parametrize(
    ("tokens", "cols", "block", "runs"),
    [
        (520, 1024, 256, 3),  # a tile each
        (520, 1024, 256, 6),  # half of one, so the rotation's blocks are wanted in another order
        (1030, 768, 768, 1),  # several, with a Hartley transform
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(tokens, cols, block, runs, dtype, monkeypatch):
    monkeypatch.setattr(cuda_beside, "_UNIT", 10**7)  # so that as much as may be is rotated beside
    x, w = problem("trellis-4", tokens, 256, cols, block, dtype)
    gpu, plan = Emulator(16, resident=16), cuda_prompt.fill(CODECS["trellis-4"], dtype, torch.float16, SHAPE, runs)
    schedule = make_schedule(tokens, cols, block, plan.tiles(tokens, 256), runs, 4)
    assert schedule
    assert error(multiply(cuda_prompt, x, w, gpu, replace(plan, schedule=schedule)), x, w) < 2
    gpu.exchange(0)  # is as it was
    assert of(w).block == block


def test_there_is_room_and_the_pipeline_goes_on():
    schedule = make_schedule(2048, 14336, 2048, 128, 64, 4)
    for name in ("trellis-2", "trellis-4", "e8-2"):
        check_pipeline(replace(cuda_prompt.fill(CODECS[name], torch.bfloat16, torch.float16, SHAPE), schedule=schedule))
    for name in TAKEN:
        plan = cuda_prompt.fill(CODECS[name], torch.bfloat16, torch.float16, SHAPE)
        assert plan.shared == replace(plan, schedule=schedule).shared


@emulated
@pytest.mark.parametrize("block", [256, 1024, 1280, 1792, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rotation_is_as_exact_as_its_type(block, dtype):
    """Sums in tf32 in between show in neither: they are made up for in bf16, and complete in fp16."""
    x, signs = (
        torch.randn(cuda_rotate.FEW + 1, block).to(dtype),
        torch.randint(0, 256, (block // 8,), dtype=torch.uint8),
    )
    exact = rotate(x.double(), unpack_signs(signs, block), block)
    found = rotate_rows(x, signs, block, Emulator(1)).double()
    rounded = exact.to(dtype).double()
    assert (found - exact).norm() < 1.03 * (rounded - exact).norm()
    assert abs((found * exact).sum() / exact.square().sum() - 1) < 2e-4  # no smaller, on average
