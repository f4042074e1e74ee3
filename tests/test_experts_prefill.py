"""The product over experts with many pairs, on a CPU that plays the GPU, as cubins, and on a GPU."""

from dataclasses import replace

import pytest
import torch
from cubins import spilled
from emulator import Emulator
from test_experts import TRELLISES, emulated, error, random_experts, routed

from glq.ops import cuda_experts_prefill
from glq.ops.cuda_experts_prefill import Shape, fill, make_plan, matmul


def check(weights, x, expert_of, top_k, gpu, plan):
    y = matmul(x, weights, expert_of, top_k, gpu, plan)
    assert y.shape == (len(expert_of), weights.out_features)
    assert error(y, x, weights, expert_of, top_k) < 2
    assert torch.equal(y, matmul(x, weights, expert_of, top_k, gpu, plan))
    gpu.exchange(0)  # is as it was
    return y


def plan_of(name, tokens, blocks, dtype=torch.float16, stages=3):
    plan = fill(TRELLISES[name], dtype, torch.float16, Shape(tokens, 2, 8))
    return replace(plan, blocks=blocks, copies=8, stages=stages)


@emulated
@pytest.mark.parametrize("blocks", [1, 5, 40])
@pytest.mark.parametrize(("top_k", "each"), [(2, 2), (2, 1)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_every_pair_gets_its_product(blocks, top_k, each, index):
    """Experts without pairs, with a few and with more than a block; some units for a block, or none."""
    weights = random_experts("trellis-2.25", 5, 200, 512, 256)
    expert_of = routed(45, top_k, 3) + 1
    x = torch.randn(len(expert_of) // each, 512).half()
    check(weights, x, expert_of.to(index), each, Emulator(3), plan_of("trellis-2.25", 32, blocks))


@emulated
def test_pairs_without_an_expert_are_zeros():
    weights = random_experts("trellis-3", 4, 130, 256, 256)
    expert_of = torch.randint(-1, 5, (90,))
    y = check(
        weights, torch.randn(90, 256).bfloat16(), expert_of, 1, Emulator(2), plan_of("trellis-3", 64, 3, torch.bfloat16)
    )
    none = (expert_of < 0) | (expert_of > 3)
    assert none.any()
    assert not y[none].any()
    nobody = matmul(
        torch.randn(9, 256).half(), weights, torch.full((9,), -1), 1, Emulator(2), plan_of("trellis-3", 32, 3)
    )
    assert not nobody.any()


@pytest.mark.parametrize("name", ["trellis-1.5", "trellis-2", "trellis-2.75", "trellis-3", "trellis-4"])
@pytest.mark.parametrize("average", [20, 100])
def test_it_fits_hopper(name, average):
    plan = make_plan(TRELLISES[name], torch.bfloat16, torch.float16, average, Emulator(132))
    code, report = plan.source.compile_and_report("sm_90a")
    assert code[:4] == b"\x7fELF"
    assert spilled(report) == {0}
    assert plan.shared <= 227 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [200, 1000])
def test_on_a_gpu(tokens):
    from glq import nvrtc

    gpu = nvrtc.gpu(torch.device("cuda"))
    weights = random_experts("trellis-4", 16, 1536, 2048, 2048, device="cuda")
    x, expert_of = torch.randn(tokens, 2048, device="cuda").bfloat16(), routed(tokens, 4, 16, "cuda")
    assert cuda_experts_prefill.takes(16, 2048, len(expert_of), gpu) == (gpu.arch == 90)
    y = matmul(x, weights, expert_of, 4, gpu)
    assert error(y, x, weights, expert_of, 4) < 2
