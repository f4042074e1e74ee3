"""The search of the trellis in CUDA C++: on a CPU that plays the GPU; as cubins; and on a GPU where there is one."""

import shutil

import pytest
import torch
from cubins import spilled
from emulator import Emulator

from glq import nvrtc
from glq.codecs import CODECS, viterbi, viterbi_cuda
from glq.codecs.trellis import Trellis, state_values
from glq.codecs.viterbi_plan import Block, Cluster, plan

TRELLISES = {name: codec for name, codec in CODECS.items() if isinstance(codec, Trellis)}
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120, 121)
MULTIPROCESSORS = 132
CONSUMERS = 99 * 1024  # bytes of shared memory a block


def pairs(n: int, steps: int = 64) -> torch.Tensor:
    return torch.randn(n, steps, 2, generator=torch.Generator().manual_seed(0))


def error(x: torch.Tensor, states: torch.Tensor, values: torch.Tensor) -> float:
    return (values[states] - x).square().mean().item()


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
@pytest.mark.parametrize(
    ("name", "blocks", "threads", "steps"),
    [("trellis-4", 8, 256, 7), ("trellis-3.75", 4, 256, 8), ("trellis-2", 2, 512, 6), ("trellis-1.75", 4, 128, 4)],
)
def test_a_cluster_finds_what_a_block_finds(name, blocks, threads, steps):
    values, own = state_values(TRELLISES[name], torch.device("cpu")), TRELLISES[name].step_bits
    walked = own[::-1]
    x = 3 * pairs(2, steps)
    alone = viterbi_cuda.run(x, values, plan(walked, 2, steps, MULTIPROCESSORS, CONSUMERS, 80), Emulator(1))
    together = viterbi_cuda.run(x, values, Cluster(walked, blocks, threads), Emulator(1, resident=blocks))
    assert torch.equal(together, alone)
    assert error(x, alone, values) == pytest.approx(error(x, viterbi.reference(x, values, own), values), rel=2e-3)


def test_few_strips_have_clusters_where_a_gpu_has_them():
    def blocks(strips: int, arch: int, bits: int = 8) -> int:
        return plan((bits, bits), strips, 64, MULTIPROCESSORS, CONSUMERS, arch).blocks

    sizes = [blocks(strips, 90) for strips in (1, 8, 9, 49, 50, 66, 67, 99, 100, 264, 265, 5000)]
    assert sizes == [8, 8, 4, 4, 2, 2, 4, 4, 2, 2, 1, 1]
    assert [blocks(99, 90, 6), blocks(100, 90, 6)] == [4, 1]
    assert blocks(16, 89) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_source_compiles_for_every_architecture_within_its_limits(arch):
    for name, strips in (
        ("trellis-1.5", 64),
        ("trellis-1.75", 16),
        ("trellis-1.75", 400),
        ("trellis-2.25", 5000),
        ("trellis-3", 400),
        ("trellis-3.75", 33),
        ("trellis-4", 8),
    ):
        p = plan(TRELLISES[name].step_bits, strips, 64, MULTIPROCESSORS, CONSUMERS, arch)
        assert p.threads <= 1024
        assert p.shared(64) <= CONSUMERS
        code, report = p.source.compile_and_report(f"sm_{arch}")
        assert code[:4] == b"\x7fELF"
        assert isinstance(p, Block) or spilled(report) == {0}, (p, report)


def test_cubins_are_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = plan((8, 8), 10, 64, MULTIPROCESSORS, CONSUMERS, 90).source
    code = source.cubin("sm_90")
    assert [f.read_bytes() for f in (tmp_path / "glq").iterdir()] == [code]
    monkeypatch.setattr(nvrtc.Source, "compile", lambda *_: pytest.fail("compiled again"))
    assert source.cubin("sm_90") == code


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TRELLISES)
@pytest.mark.parametrize("strips", [1, 7, 32, 64, 300, 2100])
def test_cuda_finds_paths_as_good_as_the_reference(name, strips):
    codec = TRELLISES[name]
    values, x = state_values(codec, torch.device("cuda")), pairs(strips).cuda()
    found = viterbi_cuda.search(x, values, codec.step_bits)
    some = slice(0, 64)
    best = viterbi.reference(x[some], values, codec.step_bits)
    assert error(x[some], found[some], values) == pytest.approx(error(x[some], best, values), rel=2e-3)
    codes = codec.encode(x.view(-1, 8, 16))
    assert torch.equal(codec.decode(codes).view(-1, 64, 2), values[found])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TRELLISES)
@pytest.mark.parametrize("strips", [1, 33, 70])
def test_cuda_finds_the_same_by_every_plan(name, strips):
    device = torch.device("cuda")
    gpu, own = nvrtc.gpu(device), TRELLISES[name].step_bits[::-1]  # in the order of the walk
    if gpu.arch < 90:
        pytest.skip("this GPU has no clusters")
    values, x = state_values(TRELLISES[name], device), pairs(strips).cuda()
    alone = viterbi_cuda.run(x, values, plan(own, strips, 64, MULTIPROCESSORS, CONSUMERS, 80), gpu)
    for blocks, threads in ((2, 512), (4, 256), (8, 256)):
        assert torch.equal(viterbi_cuda.run(x, values, Cluster(own, blocks, threads), gpu), alone)
