"""Kernels that are compiled ahead: all that may be needed."""

import math
import random

import pytest
import torch

from glq.ops import experts as experts_ops
from glq.ops.cuda_experts import Task
from glq.ops.inputs import norm_of, plain, silu_of
from glq.ops.matmul import cuda_product
from glq.ops.prepare import kernel_pairs, prepare, run_all
from glq.packed import PackedExperts, PackedLinear, packed_shapes
from glq.rotation import block_width


class Recorder:
    """An nvrtc.Launcher that only notes what it would load."""

    multiprocessors = 132

    def __init__(self, arch, kilobytes):
        self.arch, self.shared_memory, self.loaded = arch, kilobytes * 1024, set()

    def exchange(self, count):
        return torch.empty(1)

    def launch(self, source, name, grid, block, shared, *arguments):
        self.loaded.add((source, name))


def weight(codec, rows, cols):
    codes = torch.empty(packed_shapes(codec, rows, cols)["codes"], dtype=torch.uint8, device="meta")
    scale = torch.empty(rows, dtype=torch.float16, device="meta")
    signs = torch.empty(math.ceil(cols / 8), dtype=torch.uint8, device="meta")
    return PackedLinear(codec, rows, cols, block_width(cols), codes, scale, signs)


@pytest.mark.parametrize(("arch", "kilobytes"), [(90, 228), (80, 164), (89, 100), (120, 100)])
@pytest.mark.parametrize("codec", ["trellis-2", "trellis-3", "trellis-4", "nested-3", "e8-2"])
@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        (6144, 4096),
        (28672, 4096),
        (4096, 14336),
        (3072, 4096),
        (4096, 7168),
        (576, 1536),
        (960, 576),
        (34816, 512),
        (22016, 512),
    ],
)
def test_no_number_of_tokens_needs_another_kernel(codec, rows, cols, arch, kilobytes, monkeypatch):
    monkeypatch.setattr(torch, "mm", lambda x, w, out: out)
    gpu, w = Recorder(arch, kilobytes), weight(codec, rows, cols)
    run_all(w, torch.bfloat16, 8192, gpu)
    ahead = set(gpu.loaded)
    for tokens in {
        *range(1, 140),
        *random.Random(0).sample(range(140, 8192), 100),
        511,
        512,
        513,
        rows // 5,
        rows // 5 + 1,
    }:
        x = torch.empty(tokens, cols, dtype=torch.bfloat16, device="meta")
        for one in (plain(x), silu_of(x, x), norm_of(x, x, x[0], 1e-5)):
            cuda_product(one, w, gpu)
            assert gpu.loaded <= ahead, tokens


@pytest.mark.parametrize(("arch", "kilobytes"), [(90, 228), (89, 100)])
@pytest.mark.parametrize(("rows", "cols", "each"), [(1536, 2048, 8), (2048, 768, 1)])
@pytest.mark.parametrize("codec", ["trellis-4", "nested-3"])
def test_no_number_of_pairs_needs_another_kernel(codec, rows, cols, each, arch, kilobytes):
    gpu, of_one, experts, top_k = Recorder(arch, kilobytes), weight(codec, rows, cols), 128, 8
    codes = of_one.codes.expand(experts, *of_one.codes.shape)
    scale = of_one.scale.expand(experts, rows)
    w = PackedExperts(codec, rows, cols, of_one.block, codes, scale, of_one.signs)

    def multiply(pairs):
        x = torch.empty(pairs // each, cols, dtype=torch.bfloat16, device="meta")
        expert_of = torch.empty(pairs, dtype=torch.int64, device="meta")
        experts_ops.cuda_product(x, w, expert_of, each, gpu)

    sizes = (w.block, w.scale.dtype, torch.bfloat16, top_k, 2000)
    for pairs in kernel_pairs(w.codec, Task.of(w, 0, each), *sizes, gpu):
        multiply(pairs)
    ahead = set(gpu.loaded)
    assert len(ahead) > 3
    for tokens in {*range(1, 80), *random.Random(0).sample(range(80, 2000), 100)}:
        multiply(tokens * top_k)
        assert gpu.loaded <= ahead, tokens


def test_nothing_to_do_on_a_cpu():
    assert prepare(torch.device("cpu"), torch.float32, "trellis-4", 64, 64, 64, 8) is None
