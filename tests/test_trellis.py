"""The trellis: what a state is, and that every search finds the path that the reference finds."""

import subprocess
import sys

import numba
import pytest
import torch

from glq.codecs import CODECS, viterbi
from glq.codecs.trellis import MULTIPLIER, Trellis, pair_table, state_values

TRELLISES = {name: codec for name, codec in CODECS.items() if isinstance(codec, Trellis)}
EVERY = pytest.mark.parametrize("name", TRELLISES)


def pairs(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 64, 2, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, states: torch.Tensor, values: torch.Tensor) -> float:
    return (values[states] - x).square().mean().item()


@EVERY
def test_a_pair_from_16_bits_of_the_circle(name):
    """Read as docs/FORMAT.md says, with Python's integers."""
    codec = TRELLISES[name]
    words = torch.randint(0, 2 ** min(codec.code_bits, 62), (1, 8))
    values = codec.decode(words)[0].flatten()
    circle = sum(int(w) << i * codec.code_bits for i, w in enumerate(words[0]))
    total = 8 * codec.code_bits
    table = pair_table(TRELLISES[name])
    for p in (0, 1, 31, 62, 63):
        at = p * codec.code_bits // 8
        state = (circle >> at | circle << total - at) & 0xFFFF
        h = state * MULTIPLIER % 2**32
        if codec.table_bits == 8:
            entry, signs = h >> 6 & 0xFF, (h >> 15 & 1, h >> 14 & 1)
        elif codec.table_bits == 9:
            entry, signs = (h >> 5 & 0xFF) + (h >> 6 & 0x100), (h >> 13 & 1, h >> 15 & 1)
        else:
            entry, signs = (h >> 7 & 0xFF) + (h >> 8 & 0x300), (h >> 15 & 1, h >> 31)
        first, other = table[entry].tolist()
        assert values[2 * p] == (-first if signs[0] else first)
        assert values[2 * p + 1] == (-other if signs[1] else other)


@EVERY
def test_tables_are_small_and_their_values_bounded(name):
    table = pair_table(TRELLISES[name])
    assert table.dtype == torch.float16
    assert table.shape == (1 << TRELLISES[name].table_bits, 2)
    assert table.numel() * 2 <= 8192
    assert table.min() >= 0
    assert table.max() < 5


@EVERY
def test_numba_finds_the_reference_path(name):
    from glq.codecs.viterbi_numba import search

    codec = TRELLISES[name]
    values, x = state_values(codec, torch.device("cpu")), pairs(4) * torch.tensor([1.0, 3.0])
    assert torch.equal(search(x, values, codec.step_bits), viterbi.reference(x, values, codec.step_bits))


def test_numba_takes_as_many_threads_as_pytorch_has_and_leaves_it_those():
    """In a process of its own, since numba starts its threads once."""
    code = """if True:
        import numba, torch
        from glq.codecs import get_codec
        torch.set_num_threads({threads})
        get_codec("trellis-2").encode(torch.zeros(1, 8, 16))
        print(torch.get_num_threads(), numba.get_num_threads())
    """
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        run = subprocess.run([sys.executable, "-c", code.format(threads=threads)], capture_output=True, text=True)
        assert run.stdout.split() == [str(threads)] * 2, run.stderr


@pytest.mark.parametrize("steps", [16, 33])
def test_paths_close_their_circle_at_any_length(steps):
    codec = TRELLISES["trellis-3"]
    values = state_values(codec, torch.device("cpu"))
    states = viterbi.best_states(pairs(3)[:, :steps].contiguous(), values, codec.step_bits)
    own = states & 63
    assert torch.equal(states, (own | own.roll(-1, 1) << 6 | own.roll(-2, 1) << 12) & 0xFFFF)


@EVERY
def test_steps_of_different_widths_close_their_circle(name):
    """Every state continues in the next pair's: its bits beyond its own are the lowest of that one."""
    codec = TRELLISES[name]
    states = viterbi.best_states(pairs(3), state_values(codec, torch.device("cpu")), codec.step_bits)
    own = torch.tensor(codec.step_bits).repeat(32)
    after = states.roll(-1, 1)
    assert torch.equal(states >> own, after & (1 << 16 - own) - 1)


@EVERY
def test_no_other_bit_is_better(name):
    """Flip any one bit of a strip, outside the node where its circle was closed: its error grows."""
    codec = TRELLISES[name]
    x = pairs(1).view(1, 8, 16)
    codes = codec.encode(x)
    flips = torch.eye(8, dtype=torch.int64)[:, None] << torch.arange(codec.code_bits)[:, None]  # [word, bit, 8]
    others = (codes ^ flips).view(-1, 8)
    errors = (codec.decode(others) - x).square().flatten(1).mean(1)
    best = (codec.decode(codes) - x).square().mean()
    free = errors[16 - min(codec.step_bits) :]  # the node: the first bits of the circle
    assert (free >= best).all()
    assert (errors >= best).float().mean() > 0.98
