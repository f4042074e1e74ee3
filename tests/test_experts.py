"""The product over experts: what it means, its kernels on a CPU that plays the GPU, as cubins, and on a GPU."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from cubins import COMPILED_FOR, SHARED_MEMORY, TRELLISES, lattices, rates, spilled
from emulator import Emulator

from glq import nvrtc
from glq.codecs import CODECS
from glq.errors import GlqError
from glq.ops import cuda_experts
from glq.ops.cuda_experts import Plan, Task, make_plan, matmul
from glq.ops.experts import experts_matmul, experts_reference
from glq.ops.pairs import segment_limit, sort_pairs
from glq.packed import PackedExperts, packed_shapes

emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Memory that a kernel should have written, but did not, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_experts(name, experts, rows, cols, block, scale=torch.float16, device="cpu"):
    shapes = packed_shapes(name, rows, cols)
    codes = torch.randint(0, 256, (experts, *shapes["codes"]), dtype=torch.uint8, device=device)
    signs = torch.randint(0, 256, shapes["signs"], dtype=torch.uint8, device=device)
    scales = (torch.rand(experts, rows, device=device) + 0.5).to(scale)
    return PackedExperts(name, rows, cols, block, codes, scales, signs)


def routed(tokens, top_k, experts, device="cpu"):
    """Each token's experts, all different: [tokens · top_k]."""
    return torch.rand(tokens, experts, device=device).topk(top_k).indices.flatten()


def error(y, x, weights, expert_of, top_k):
    """Relative to the exact product, in units of what the same-dtype PyTorch product has."""
    exact = x.new_zeros(y.shape, dtype=torch.float64)
    for e in set(expert_of.tolist()) & set(range(weights.count)):
        mine = (expert_of == e).nonzero()[:, 0]
        exact[mine] = x[mine // top_k].double() @ weights[e].dequantize().double().T
    plain = experts_reference(x, weights, expert_of, top_k)
    return ((y.double() - exact).norm() / (plain.double() - exact).norm()).item()


def check(weights, x, expert_of, top_k, gpu, plan=None):
    y = matmul(x, weights, expert_of, top_k, gpu, plan)
    assert y.dtype == x.dtype
    assert y.shape == (len(expert_of), weights.out_features)
    assert error(y, x, weights, expert_of, top_k) < 2
    assert torch.equal(y, matmul(x, weights, expert_of, top_k, gpu, plan))
    gpu.exchange(0)  # is as it was


@pytest.mark.parametrize("name", ["trellis-2.25", "e8-2", "nested-3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [1, 2])
def test_op_is_the_product_with_dequantized_matrices(name, dtype, top_k):
    weights = random_experts(name, 4, 40, 100, 50)
    x, expert_of = torch.randn(6, 100).to(dtype), routed(6, top_k, 3)
    w = weights
    y = experts_matmul(x, w.codes, w.scale, w.signs, expert_of, top_k, name, w.out_features, w.block)
    for pair, expert in enumerate(expert_of.tolist()):
        expected = x[pair // top_k].float() @ weights[expert].dequantize().T
        torch.testing.assert_close(y[pair].float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_opcheck():
    w = random_experts("e8-2", 3, 64, 128, 128)
    torch.library.opcheck(
        experts_matmul, (torch.randn(2, 128), w.codes, w.scale, w.signs, routed(2, 2, 3), 2, "e8-2", 64, 128)
    )


def test_pairs_must_be_as_many_as_the_rows_say():
    w = random_experts("e8-2", 3, 64, 128, 128)
    with pytest.raises(GlqError, match="2 rows of x with 2 experts each, but 3 pairs"):
        experts_matmul(torch.randn(2, 128), w.codes, w.scale, w.signs, torch.zeros(3).int(), 2, "e8-2", 64, 128)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sorted_pairs(dtype):
    order, ends = sort_pairs(torch.tensor([3, 0, 3, -1, 1, 7, 3, 4], dtype=dtype), 4)
    assert order.tolist() == [1, 4, 0, 2, 6, 3, 5, 7]
    assert ends.tolist() == [1, 2, 2, 5]


@pytest.mark.parametrize(("pairs", "experts", "at_once"), [(1, 8, 8), (8, 2, 8), (9, 3, 8), (40, 2, 16), (64, 64, 8)])
def test_there_are_no_more_segments_than_the_limit(pairs, experts, at_once):
    for _ in range(50):
        counts = torch.bincount(torch.randint(0, experts, (pairs,)), minlength=experts)
        assert (-(-counts // at_once)).sum() <= segment_limit(pairs, experts, at_once)


@emulated
@pytest.mark.parametrize("name", CODECS)
def test_every_codec(name):
    weights = random_experts(name, 5, 130, 200, 200)
    check(weights, torch.randn(3, 200).half(), routed(3, 2, 5), 2, Emulator(2))


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_every_dtype(dtype, scale, index):
    weights = random_experts("trellis-3", 4, 70, 96, 96, scale)
    check(weights, torch.randn(3, 96).to(dtype), routed(3, 2, 4).to(index), 2, Emulator(2))


@emulated
@pytest.mark.parametrize("experts", [2, 40])
@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("pair_tiles", [1, 2])
def test_every_number_of_pairs_of_an_expert(experts, top_k, by_torch, pair_tiles):
    """One has more than fit at once, others have none, and some pairs have no expert."""
    weights = random_experts("trellis-4", experts, 100, 150, 75)
    plan = Plan(TRELLISES["trellis-4"], torch.bfloat16, torch.float16, pair_tiles, 1, 2, 8, top_k, by_torch)
    for pairs in (8, 40, 72):
        expert_of = torch.randint(-1, experts + 1, (pairs,))
        expert_of[torch.rand(pairs) < 0.6] = experts - 1
        check(weights, torch.randn(pairs // top_k, 150).bfloat16(), expert_of, top_k, Emulator(5), plan)


@emulated
@pytest.mark.parametrize(("wr", "wk"), [(1, 4), (2, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize("multiprocessors", [1, 3, 7, 50])
def test_every_division_of_the_work(wr, wk, multiprocessors):
    weights = random_experts("trellis-4", 6, 330, 328, 41)
    plan = Plan(TRELLISES["trellis-4"], torch.float16, torch.float16, 1, wr, wk, 8, 3, False)
    for by_torch in (False, True):
        check(
            weights,
            torch.randn(4, 328).half(),
            routed(4, 3, 5),
            3,
            Emulator(multiprocessors),
            replace(plan, sorted=by_torch),
        )


@emulated
@pytest.mark.parametrize("pair_tiles", [4, 8])
def test_many_pairs_of_an_expert_at_once(pair_tiles):
    weights = random_experts("trellis-2.5", 3, 130, 130, 65)
    plan = Plan(TRELLISES["trellis-2.5"], torch.float16, torch.float16, pair_tiles, 2, 2, 8, 2, True)
    check(weights, torch.randn(70, 130).half(), routed(70, 2, 3), 2, Emulator(3), plan)


@emulated
@pytest.mark.parametrize("block", [256, 1024])
@pytest.mark.parametrize("copies", [8, 32])
@pytest.mark.parametrize("multiprocessors", [1, 5, 30])
def test_one_token_is_rotated_in_the_kernel(block, copies, multiprocessors):
    weights = random_experts("trellis-4", 9, 130, 1024, block)
    plan = Plan(TRELLISES["trellis-4"], torch.float16, torch.float16, 1, 2, 4, copies, 8, False, block)
    x = torch.randn(1, 1024).half()
    check(weights, x, routed(1, 8, 9), 8, Emulator(multiprocessors), plan)
    check(weights, x, torch.tensor([3, 3, -1, 5, 3, 0, 5, 9]), 8, Emulator(multiprocessors), plan)
    automatic = make_plan(plan.codec, plan.dtype, plan.scale, Task(8, 9, 8, 3, 16), block, Emulator(2))
    assert automatic.block == block


@emulated
def test_pairs_without_any_expert():
    weights = random_experts("trellis-4", 2, 70, 64, 64)
    y = matmul(torch.randn(9, 64).half(), weights, torch.full((9,), -1), 1, Emulator(3))
    assert torch.equal(y, torch.zeros(9, 70).half())


def tasks():
    for experts in (8, 64, 128):
        for pairs in (1, 8, 128, 512, 4096):
            for tiles in ((24, 32), (32, 12)):
                yield Task(pairs, experts, 8, *tiles)


@pytest.mark.parametrize("case", COMPILED_FOR)
def test_cubins_stay_within_the_limits_of_every_architecture(case):
    arch = case.split()[0]
    gpu = Emulator(132, SHARED_MEMORY.get(int(arch[3:]), 100) * 1024)
    gpu.arch = int(arch[3:])
    sources = {}
    for name in [*rates(case), *lattices(case)]:
        for task in tasks():
            plan = make_plan(CODECS[name], torch.float16, torch.float16, task, 2048, gpu)
            assert plan.shared(task) <= gpu.shared_memory - 1024
            sources[plan.source] = None
    for source in sources:
        code, report = source.compile_and_report(arch)
        assert code[:4] == b"\x7fELF"
        assert spilled(report) == {0}, (source, report)
        assert int(re.findall(r"Used (\d+) registers", report)[0]) > 64


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(name, dtype):
    gpu = nvrtc.gpu(torch.device("cuda"))
    for rows, cols, block in ((1536, 2048, 2048), (2048, 768, 768), (1000, 1376, 688)):
        weights = random_experts(name, 32, rows, cols, block, device="cuda")
        for tokens, top_k in ((1, 8), (5, 8), (16, 8), (64, 8), (8, 1), (200, 8)):
            x = torch.randn(tokens, cols, device="cuda").to(dtype)
            expert_of = routed(tokens, top_k, 32, "cuda")
            expert_of[::7] = -1
            check(weights, x, expert_of, top_k, gpu)


@needs_gpu
@pytest.mark.parametrize("name", ["trellis-4", "nested-3"])
def test_a_cuda_graph_follows_its_routing(name):
    w = random_experts(name, 16, 256, 512, 512, device="cuda")
    for tokens in (1, 40, 300):
        x, expert_of = torch.randn(tokens, 512, device="cuda").bfloat16(), routed(tokens, 4, 16, "cuda")
        given = (x, w.codes, w.scale, w.signs, expert_of, 4, name, w.out_features, w.block)
        with torch.cuda.stream(torch.cuda.Stream()):
            experts_matmul(*given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts_matmul(*given)
        for _ in range(3):
            expert_of.copy_(routed(tokens, 4, 16, "cuda"))
            graph.replay()
            assert error(y, x, w, expert_of, 4) < 2


def test_more_pairs_than_a_warp_should_sort_are_sorted_by_pytorch():
    gpu = Emulator(132)
    for pairs in (cuda_experts._SORTED_FROM - 1, cuda_experts._SORTED_FROM):
        plan = make_plan(TRELLISES["trellis-4"], torch.float16, torch.float16, Task(pairs, 64, 8, 24, 32), 2048, gpu)
        assert plan.sorted == (pairs >= cuda_experts._SORTED_FROM)
