"""The laws of every codec: distortion as documented, idempotence, exactness, and decoding that never moves."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glq import GlqError
from glq.codecs import CODECS, DEFAULT_CODECS, get_codec
from glq.codecs.e8 import half_table
from glq.codecs.lattice import nearest_e8

EVERY = pytest.mark.parametrize("name", CODECS)


def normal(n: int, seed: int = 0, group: int = 8) -> torch.Tensor:
    """n strips of 8 words."""
    return torch.randn(n, 8, group, generator=torch.Generator().manual_seed(seed))


def any_codes(n: int, bits: int, seed: int = 0) -> torch.Tensor:
    """n strips of words with every bit random, as int64: 64-bit words may be negative."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(0, 2**32, (2, n, 8), generator=generator)
    return (halves[0] << 32 | halves[1]) & (2**bits - 1 if bits < 64 else -1)


@EVERY
def test_distortion_is_the_documented_one(name):
    codec = CODECS[name]
    x = normal(25_000) if codec.group == 8 else normal(2_000, group=16)
    mse = (codec.decode(codec.encode(x)) - x).square().mean().item()
    assert mse == pytest.approx(codec.mse, rel=0.01)


@EVERY
def test_what_is_decoded_is_encoded_without_loss(name):
    codec = CODECS[name]
    n = 2_500 if codec.group == 8 else 100
    x, codes = normal(n, group=codec.group), any_codes(n, codec.code_bits)
    for values in (codec.decode(codec.encode(x)), codec.decode(codec.encode(codec.decode(codes)))):
        torch.testing.assert_close(codec.decode(codec.encode(values)), values, rtol=0, atol=2e-6)


@EVERY
def test_rounding_is_encoding_and_decoding(name):
    codec = CODECS[name]
    for n in (1, 7, 129, 1125) if codec.group == 8 else (1, 7):  # both sides of the chunks and of E8's two searches
        x = normal(n, n, codec.group)
        codes, values = codec.round(x)
        assert torch.equal(codes, codec.encode(x))
        assert torch.equal(values, codec.decode(codes))


@EVERY
def test_codes_fit_their_bits_and_bits_are_honest(name):
    codec = CODECS[name]
    codes = codec.encode(normal(300, group=codec.group) * 3)
    assert codes.shape == (300, 8)
    assert codes.dtype == torch.int64
    assert codec.code_bits == 64 or (codes.min() >= 0 and codes.max() < 2**codec.code_bits)
    assert codec.bits == codec.code_bits / codec.group


@EVERY
def test_vectors_far_out_are_clamped_towards_the_source(name):
    codec = CODECS[name]
    x = normal(250 if codec.group == 8 else 20, group=codec.group) * 100
    values = codec.decode(codec.encode(x))
    assert torch.isfinite(values).all()
    assert (torch.cosine_similarity(values, x, dim=-1) > 0.5).all()
    assert (values.norm(dim=-1) < x.norm(dim=-1)).all()


@pytest.mark.parametrize("name", ["e8-1.5", "e8-2"])
def test_factored_e8_finds_the_nearest_codeword(name):
    codec = CODECS[name]
    x = normal(375, 5).view(3_000, 8) * 1.3
    best = torch.full((3_000,), math.inf)
    for part in torch.arange(2**codec.code_bits).split(4096):
        best = torch.minimum(best, torch.cdist(x, codec.decode(part)).amin(1))
    large = codec.decode(codec.encode(x.repeat(2, 1)))[:3_000]  # enough vectors for the closed form
    small = torch.cat([codec.decode(codec.encode(part)) for part in x.split(500)])  # and few enough for the search
    for values in (large, small):
        torch.testing.assert_close((values - x).norm(dim=1), best, rtol=1e-4, atol=1e-4)


def test_factored_codewords_are_distinct():
    for name in ("e8-1.5", "e8-2"):
        words = CODECS[name].decode(torch.arange(2 ** CODECS[name].code_bits))
        assert torch.unique(words, dim=0).shape[0] == words.shape[0]


def test_nearest_e8_point_is_in_e8_and_no_neighbour_is_nearer():
    x = torch.randn(8, 2_000, generator=torch.Generator().manual_seed(0)) * 3
    point = nearest_e8(x)
    doubled = (2 * point).long()
    assert torch.equal(doubled.remainder(2).amin(0), doubled.remainder(2).amax(0))  # all integers, or all halves
    assert (point.sum(0).remainder(2) == 0).all()
    signs = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 8)
    roots = [signs[signs.sum(1).remainder(2) == 0]]
    for i in range(8):
        for j in range(i):
            for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                root = torch.zeros(1, 8)
                root[0, i], root[0, j] = a, b
                roots.append(root)
    roots = torch.cat(roots)
    assert roots.shape[0] == 240  # the neighbours of a point of E8: they decide its Voronoi cell
    distance = (x - point).norm(dim=0)
    for root in roots:
        assert (distance <= (x - point - root[:, None]).norm(dim=0) + 1e-5).all()


# sha256 of decode() of 4,096 codes spread over the range, fp32 little-endian: old checkpoints must stay readable
# (trellis-2.25 to trellis-3 are those of format version 3)
GOLDEN = {
    "e8-1.5": "54c722e66bde9264",
    "e8-2": "48f7ddf011494594",
    "e8-3.5": "9a5ca0ba05621ea0",
    "nested-3": "292f8556d7e4a2ac",
    "nested-3.5": "87dff7b56b229f2e",
    "nested-4": "26beeead116240bb",
    "trellis-1.5": "f79e530275e478fc",
    "trellis-1.75": "7d27648bb2ea2128",
    "trellis-2": "0cac865ac6b02852",
    "trellis-2.25": "e0544d39b76fa3b7",
    "trellis-2.5": "fa1216a4e77a8f50",
    "trellis-2.75": "3f789ff0dcde441e",
    "trellis-3": "7cd3e2433905db7f",
    "trellis-3.25": "c4714d60421ca704",
    "trellis-3.5": "8e30bebb778a043a",
    "trellis-3.75": "46426b82b3125f6c",
    "trellis-4": "1c0ea70af212814e",
}


def golden_words(n: int, bits: int) -> torch.Tensor:
    """n strips of words that any language can write down: multiples of 2^64 / golden ratio, their high bits."""
    words = [(i * 0x9E3779B97F4A7C15 % 2**64) >> (64 - bits) for i in range(1, 8 * n + 1)]
    return torch.tensor([w - 2**64 if w >= 2**63 else w for w in words]).view(n, 8)


@EVERY
def test_decoding_never_changes(name):
    codec = CODECS[name]
    if codec.group == 8:
        step = 2**codec.code_bits // 4096
        codes = torch.arange(4096) * step + torch.arange(4096) % (step or 1)
    else:
        codes = golden_words(64, codec.code_bits)
    digest = hashlib.sha256(codec.decode(codes).contiguous().numpy().tobytes()).hexdigest()
    assert digest[:16] == GOLDEN[name]


@pytest.mark.parametrize(("entries", "size"), [(32, 128), (128, 512)])
def test_half_tables_are_small_exact_and_fit_int8(entries, size):
    table = half_table(entries, torch.device("cpu"))
    assert table.shape == (size, 4)
    assert torch.equal(table * 4, (table * 4).round())
    assert (table * 4).abs().max() <= 127
    assert torch.equal(table, table.half().float())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=8, max_size=8), st.sampled_from(sorted(CODECS)), st.integers(0, 3)
)
def test_any_strip_is_rounded_the_same_alone_and_in_company(values, name, others):
    codec = CODECS[name]
    x = torch.tensor([values]).T.expand(8, codec.group)[None]
    together = torch.cat([normal(others, group=codec.group), x])
    torch.testing.assert_close(
        (codec.round(together)[1][-1:] - x).norm(), (codec.round(x)[1] - x).norm(), rtol=1e-5, atol=1e-5
    )


def test_rates_by_name():
    assert {bits: get_codec(name).bits for bits, name in DEFAULT_CODECS.items()} == {b: b for b in DEFAULT_CODECS}
    assert sorted(DEFAULT_CODECS) == [quarters / 4 for quarters in range(6, 17)]
    with pytest.raises(GlqError, match="unknown codec 'e9'.*e8-2"):
        get_codec("e9")
