"""Words of E8 shaped by D8: what docs/kv.md says they are, that every word is of use, and what they lose."""

from itertools import product

import pytest
import torch

from glq.kv.codec import kv_codec
from glq.kv.shaped import _turn, _turn_back

BITS = (4, 3)


def hamming_words():
    return {(*h, *((sum(h) + b) % 2 for b in h)) for h in product((0, 1), repeat=4)}


def decoded_by_hand(word, bits, steps):
    """docs/kv.md, in plain Python, in sixteenths of a step; and the step."""
    q = 2**bits
    field = [word >> bits * i & q - 1 for i in range(8)]
    spare = [f & 1 for f in field[4:]]
    for i in range(4):
        field[4 + i] += (field[i] + sum(field[:4])) % 2 - spare[i]
    d = [16 * (f - q // 2) + 8 + i for i, f in enumerate(field)]
    if spare[0]:
        i = max(range(8), key=lambda i: abs(d[i]))
        d[i] += -16 * q if d[i] > 0 else 16 * q
    return d, steps[spare[1] + 2 * spare[2] + 4 * spare[3]] / 512


@pytest.mark.parametrize("bits", BITS)
def test_words_decode_as_documented(bits):
    codec = kv_codec(bits).codec
    words = torch.randint(0, 2**codec.code_bits, (2000,))
    for word, found in zip(words.tolist(), codec.decode(words), strict=True):
        d, step = decoded_by_hand(word, bits, codec.steps)
        assert found.tolist() == [v / 16 * step for v in d]


@pytest.mark.parametrize("bits", BITS)
def test_every_word_is_the_one_its_values_encode_to(bits):
    """So none is wasted, and what is decoded loses nothing when it is encoded again."""
    codec = kv_codec(bits).codec
    words = torch.randint(0, 2**codec.code_bits, (20000,))
    values = codec.decode(words)
    again, rounded = codec.round(values)
    assert torch.equal(rounded, values)
    assert torch.equal(codec.decode(again), values)
    assert (again != words).float().mean() < 1e-3  # two steps may have a point in common


@pytest.mark.parametrize(("bits", "mse"), [(4, 0.0065), (3, 0.027)])
def test_gaussian_error(bits, mse):
    codec = kv_codec(bits).codec
    x = torch.randn(50000, 8)
    words, values = codec.round(x)
    assert torch.equal(codec.decode(words), values)
    assert torch.equal(codec.encode(x), words)
    assert words.min() >= 0
    assert words.max() < 2**codec.code_bits
    error = (x - values).square().mean().item()
    assert error < mse
    assert error == pytest.approx(codec.mse, rel=0.03)


@pytest.mark.parametrize("bits", BITS)
def test_points_are_those_of_the_hamming_code_in_the_region_of_d8(bits):
    codec = kv_codec(bits).codec
    words = torch.randint(0, 2**codec.code_bits, (20000,))
    spare = 1 << torch.arange(4, 8) * bits
    one_step = words & ~int(spare[1:].sum())  # the smallest
    d = codec.decode(one_step) / (codec.steps[0] / 512)
    points = (d - 0.5 - torch.arange(8) / 16).round().long()
    assert {tuple(p) for p in (points % 2).tolist()} == hamming_words()
    top = d.abs().sort(-1).values[:, -2:].sum(-1)
    assert top.max() <= codec.q  # no nearer to a shortest vector of q·D8 than to 0
    assert len({tuple(p) for p in points.tolist()}) == len(set(one_step.tolist()))


def test_turning_makes_e8_of_the_lattice():
    """Shortest vectors: 16 of a single ±2, and 14 · 16 of four ±1."""
    found = [v for v in product((-2, -1, 0, 1, 2), repeat=8) if sum(c * c for c in v) == 4]
    short = torch.tensor([v for v in found if tuple(c % 2 for c in v) in hamming_words()]).float()
    assert len(short) == 240
    turned = _turn(short.T)
    halves = (turned * 2).long() % 2
    assert torch.equal(halves.amin(0), halves.amax(0))  # all integers, or all halves of odd ones
    assert not (turned.sum(0) % 2).any()
    assert torch.equal(turned.square().sum(0), torch.full((240,), 2.0))
    assert torch.equal(_turn_back(turned.clone()).T, short)


@pytest.mark.parametrize("bits", BITS)
def test_a_vector_out_of_reach_is_rounded_as_well_as_if_it_were_clamped(bits):
    codec = kv_codec(bits).codec
    step = codec.steps[-1] / 512
    x = torch.nn.functional.normalize(torch.randn(500, 8), dim=-1) * 100
    _, values = codec.round(x)
    assert (x - values).norm(dim=-1).max() <= 100 - step * (codec.q - 2) / 2**0.5 + 2**0.5 * step
