"""Memory that blocks share: who gets which, and when a graph's is used again."""

import ctypes
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from glq import exchange, nvrtc
from glq.exchange import Arenas, _is_posted, _libc, _new_semaphore
from glq.linear import QuantLinear
from glq.ops.matmul import matmul_reference


def post(semaphore):
    """As CUDA calls it: by its address."""
    address = ctypes.cast(_libc().sem_post, ctypes.c_void_p).value
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(semaphore)


def test_a_semaphore_says_that_it_was_posted():
    semaphore = _new_semaphore()
    assert not _is_posted(semaphore)
    post(semaphore)
    assert _is_posted(semaphore)
    assert not _is_posted(None)


@pytest.fixture
def now(monkeypatch):
    """What goes on where: a stream, the number of a capture or 0, the semaphores of captures."""
    state = SimpleNamespace(stream=1, capture=0, ends={})

    def end_of(graph):
        state.ends[graph] = _new_semaphore()
        return state.ends[graph]

    monkeypatch.setattr(exchange, "_current", lambda _: (state.stream, state.capture, state.capture or None))
    monkeypatch.setattr(exchange, "_end_of", end_of)
    monkeypatch.setattr(exchange, "_allocate", lambda words, _: torch.empty(words))
    return state


def test_streams_and_graphs_share_nothing(now):
    arenas = Arenas(torch.device("cpu"))
    found = []
    for stream in (1, 2):
        for capture in (0, 10, 20):
            now.stream, now.capture = stream, capture
            found.append(arenas.get(1000))
            assert arenas.get(10) is found[-1]
    assert len({t.data_ptr() for t in found}) == 6
    assert all(len(t) >= 1000 for t in found)


def test_one_that_is_too_small_is_not_given_to_others(now):
    arenas = Arenas(torch.device("cpu"))
    small = arenas.get(10)
    large = arenas.get(len(small) + 1)
    assert arenas.get(10) is large
    now.stream = 2
    assert arenas.get(10) is not small


def test_what_a_graph_had_is_used_again_when_it_is_gone(now):
    arenas = Arenas(torch.device("cpu"))
    now.capture = 5
    first = arenas.get(1000)
    now.capture = 6
    assert arenas.get(1000) is not first
    post(now.ends[5])
    now.capture = 7
    assert arenas.get(1000) is first


def test_graphs_that_are_replayed_in_turn_share(now):
    arenas = Arenas(torch.device("cpu"))
    arenas.graphs_in_turn = True
    eager = arenas.get(10)
    now.capture = 5
    first = arenas.get(10)
    now.capture = 6
    assert arenas.get(10) is first is not eager
    now.stream = 2
    assert arenas.get(10) is not first


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_layer(rows=256, cols=1024):
    layer = QuantLinear(cols, rows, "trellis-4", cols, device="cuda")
    layer.codes.random_(0, 256)
    layer.scale.uniform_(0.5, 1.5)
    return layer


def expected(layer, x):
    return matmul_reference(x, layer.codes, layer.scale, layer.signs, layer.codec, layer.out_features, layer.block)


@needs_gpu
@torch.no_grad()
def test_many_graphs_one_after_the_other_take_the_memory_of_few():
    layer, x = random_layer(), torch.randn(3, 1024, device="cuda").half()
    layer(x)
    seen = set()
    for _ in range(20):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            torch.testing.assert_close(y, expected(layer, x), rtol=0.01, atol=0.3)
        arenas = nvrtc.gpu(x.device).arenas
        seen |= {one.words.data_ptr() for lent in arenas._of_captures.values() for one in lent}
        del graph, y
        gc.collect()
        torch.cuda.synchronize()
    assert len(seen) < 10


@needs_gpu
@torch.no_grad()
def test_torch_compile_captures_graphs():
    model = nn.Sequential(random_layer(1024), nn.SiLU(), random_layer(256)).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        x = torch.randn(1, 1024, device="cuda").half() / 1024
        torch.testing.assert_close(compiled(x).clone(), model(x), rtol=0.01, atol=0.01)
