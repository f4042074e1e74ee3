"""The rotation of x by one warp a token: how exact it is, and that its registers suffice."""

import pytest
import torch
from cubins import spilled
from emulator import Emulator
from test_cuda_matmul import emulated

from glq.ops import cuda_rotate
from glq.ops.cuda_rotate import FRAGMENTS, rotate_rows, rotation
from glq.ops.inputs import PLAIN
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
    for block in (256, 1024, 2048):
        source = rotation(512, PLAIN, dtype, block, block, 512, FRAGMENTS, Emulator(132)).source
        _, report = source.compile_and_report(arch)
        assert max(spilled(report)) <= 40  # of 168 registers a thread, ten: once a token of 2,048 columns
