"""The sum over ranks by one kernel: on an emulator whose ranks are threads, as cubins, and on two GPUs."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cubins import spilled
from emulator import Emulator

from glq import nvrtc
from glq.ops.cuda_all_reduce import all_reduce, capacity, inbox_bytes, make_inboxes, source, takes

DTYPES = (torch.float16, torch.bfloat16)
# Numbers of a call, of fewer blocks and more, of whole blocks and not, each size in every turn.
SIZES = [8, 4096, 1000, 1000, 4096, 8, 2048, 4096, 1024, 8, 8, 4096]


def summed(xs):
    """In the order of the ranks, in fp32."""
    return sum((x.float() for x in xs[1:]), xs[0].float()).to(xs[0].dtype)


def inputs(ranks, dtype):
    """[calls][ranks]; the first call has an infinity, and NaNs of all bits, which is what nothing looks like."""
    calls = [[torch.randn(size, dtype=dtype) for _ in range(ranks)] for size in SIZES]
    calls[0][0][3] = float("inf")
    calls[0][1].view(torch.int16)[4:6] = -1
    return calls


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float16), (2, torch.bfloat16), (4, torch.bfloat16)])
def test_every_rank_gets_the_sum(ranks, dtype):
    """Also when one rank is late at every call, and another at every second one."""
    memory = [torch.full((inbox_bytes(ranks) // 4,), -1, dtype=torch.int32) for _ in range(ranks)]
    calls = inputs(ranks, dtype)

    def run(rank):
        inboxes = make_inboxes(rank, [m.data_ptr() for m in memory], torch.device("cpu"))
        gpu, results = Emulator(1, rank=rank), []
        for i, xs in enumerate(calls):
            time.sleep(0.01 * (rank == 1 or (rank == 0 and i % 2)))
            results.append(all_reduce(xs[rank], inboxes, gpu))
        return results

    with ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(run, range(ranks)))
    for xs, *ys in zip(calls, *results, strict=True):
        for y in ys:
            torch.testing.assert_close(y, summed(xs), rtol=0, atol=0, equal_nan=True)
    for inbox in memory:  # the last call had all blocks, and nothing else is left
        assert (inbox != -1).sum() == (ranks - 1) * SIZES[-1] // 2


def test_what_it_takes():
    assert takes(torch.zeros(64, 8192, dtype=torch.bfloat16), 2)
    assert not takes(torch.zeros(65, 8192, dtype=torch.bfloat16), 2)
    assert takes(torch.zeros(8, 8192, dtype=torch.half), 8)
    assert not takes(torch.zeros(16, 8192, dtype=torch.half), 8)
    assert not takes(torch.zeros(8), 2)
    assert not takes(torch.zeros(12, dtype=torch.half), 2)
    assert not takes(torch.zeros(0, dtype=torch.half), 2)
    assert not takes(torch.zeros(32, dtype=torch.half)[4:-4], 2)  # 8 bytes beyond a place that is aligned
    assert not takes(torch.zeros(8, 16, dtype=torch.half).T, 2)
    assert all(capacity(ranks) % 2048 == 0 and capacity(ranks) * (ranks - 1) <= 2**20 for ranks in range(2, 9))


@pytest.mark.skipif(not nvrtc.available(), reason="needs cuda-core")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"])
def test_cubins_keep_everything_in_registers(arch):
    reports = [source(dtype, ranks).compile_and_report(arch)[1] for dtype in DTYPES for ranks in (2, 8)]
    for report in reports:
        assert spilled(report) == {0}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("graph", [False, True])
def test_two_gpus(dtype, graph):
    """Of one process, which reach each other's memory once something was copied between them."""
    devices = [torch.device("cuda", i) for i in range(2)]
    memory = [torch.full((inbox_bytes(2) // 4,), -1, dtype=torch.int32, device=device) for device in devices]
    for one, other in (memory, memory[::-1]):
        one[:1].copy_(other[:1])
    calls = [[torch.randn(size, device=d).to(dtype) for d in devices] for size in [*SIZES, 2**19, 2**18, 2**19, 8]]
    inboxes = [make_inboxes(rank, [m.data_ptr() for m in memory], device) for rank, device in enumerate(devices)]
    gpus = [nvrtc.gpu(device) for device in devices]
    source(dtype, 2).cubin(f"sm_{gpus[0].arch}")
    torch.cuda.synchronize(devices[0])
    torch.cuda.synchronize(devices[1])

    def add_all(rank):
        return [all_reduce(xs[rank], inboxes[rank], gpus[rank]) for xs in calls]

    results, graphs = [], []
    for rank, device in enumerate(devices):
        with torch.cuda.device(device):
            if graph:
                graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(graphs[-1], stream=torch.cuda.Stream(device)):
                    results.append(add_all(rank))
            else:
                results.append(add_all(rank))
    for _ in range(2):
        for rank, recorded in enumerate(graphs):
            with torch.cuda.device(devices[rank]):
                recorded.replay()
    for xs, *ys in zip(calls, *results, strict=True):
        for y in ys:
            assert torch.equal(y.cpu(), summed([x.cpu() for x in xs]))
