"""E8 codes of head vectors: error, size, exactness, and what happens to values that no code holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glq import GlqError
from glq.kv.codec import kv_codec, mix, mixing_signs, pack, unpack

BITS = (4, 3, 2)
HEAD_DIMS = (64, 80, 96, 128, 256)


def decibels(x, y) -> float:
    return -10 * torch.log10((x - y).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize(("bits", "ratio", "stored"), [(4, 21.9, 4.2), (3, 15.5, 3.2), (2, 10.2, 2.2)])
def test_gaussian_vectors(bits, ratio, stored):
    codec = kv_codec(bits)
    x = torch.randn(2000, 128)
    words, scales = codec.encode(x)
    assert decibels(x, codec.decode(words, scales)) >= ratio
    assert 8 * (words.nbytes + scales.nbytes) / x.numel() == codec.stored_bits(128) <= stored


@pytest.mark.parametrize("head_dim", [8, 72, *HEAD_DIMS])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_head_dim_and_dtype(head_dim, bits, dtype):
    codec = kv_codec(bits)
    x = torch.randn(2, 3, 40, head_dim).to(dtype)
    words, scales = codec.encode(x)
    assert words.shape == (2, 3, 40, head_dim * bits // 8)
    assert (words.dtype, scales.dtype, scales.shape) == (torch.uint8, torch.float16, (2, 3, 40))
    y = codec.decode(words, scales, dtype)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert decibels(x.float(), y.float()) > {4: 21.5, 3: 15.3, 2: 9.9}[bits]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_one_loud_channel(head_dim):
    """Whichever it is: a single Hadamard makes all words of such a vector alike, for good or ill."""
    codec = kv_codec(4)
    x = torch.eye(head_dim).repeat(8, 1) * 20 + torch.randn(8 * head_dim, head_dim) / 2
    words, scales = codec.encode(x)
    assert decibels(x, codec.decode(words, scales)) > 21.8


@pytest.mark.parametrize("bits", BITS)
def test_a_loud_word_is_within_reach(bits):
    """All of a vector's energy in 8 rotated channels: the scale grows, for no code holds 16 σ."""
    codec = kv_codec(bits)
    y = torch.zeros(500, 256)
    y[:, 8:16] = torch.randn(500, 8)
    x = mix(y)
    assert decibels(x, codec.decode(*codec.encode(x))) > {4: 13, 3: 9, 2: 2}[bits]


@given(st.integers(0, 2**32 - 1), st.sampled_from(BITS), st.sampled_from(HEAD_DIMS), st.floats(-4, 4))
@settings(max_examples=30, deadline=None)
def test_decoded_vectors_encode_to_themselves(seed, bits, head_dim, exponent):
    codec = kv_codec(bits)
    x = torch.randn(20, head_dim, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    words, scales = codec.encode(x)
    y = codec.decode(words, scales)
    again, kept = codec.encode(y, scales)
    assert torch.equal(kept, scales)
    z = codec.decode(again, kept)  # equal words, but for two β that have a point in common
    assert (z - y).abs().max() <= 1e-5 * y.abs().max()


@given(st.sampled_from((2, 3, 4)), st.lists(st.integers(0, 255), min_size=12, max_size=12))
def test_pack_and_unpack(word_bytes, content):
    packed = torch.tensor(content, dtype=torch.uint8)
    words = unpack(packed, word_bytes)
    assert words.tolist() == [
        int.from_bytes(content[i : i + word_bytes], "little") for i in range(0, len(content), word_bytes)
    ]
    assert torch.equal(pack(words, word_bytes), packed)


def test_parts_and_batches_do_not_matter(monkeypatch):
    codec = kv_codec(4)
    x = torch.randn(37, 64)
    whole = codec.encode(x)
    monkeypatch.setattr("glq.kv.codec._CHUNK", 64)
    for a, b, c in zip(whole, codec.encode(x), codec.encode(x, whole[1]), strict=True):
        assert torch.equal(a, b)
        assert a.shape == c.shape
    assert [part.shape for part in codec.encode(x[:0])] == [(0, 32), (0,)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_decodes_to_nan_and_harms_no_other_vector(bits, bad):
    codec = kv_codec(bits)
    x = torch.randn(5, 64)
    clean = codec.decode(*codec.encode(x))
    x[2, 7] = bad
    y = codec.decode(*codec.encode(x))
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], clean[keep])


def test_scales_beyond_fp16():
    codec = kv_codec(4)
    x = torch.randn(3, 64)
    assert codec.decode(*codec.encode(x * 1e6)).isnan().all()
    assert codec.decode(*codec.encode((x * 1e38).bfloat16())).isnan().all()
    assert not codec.decode(*codec.encode(x * 1e-9)).any()
    assert not codec.decode(*codec.encode(x * 0)).any()


def test_large_fp16_values_stay_finite():
    codec = kv_codec(2)
    x = torch.zeros(1, 64, dtype=torch.float16)
    x[0, 3] = -65504
    y = codec.decode(*codec.encode(x), torch.float16)
    assert y.isfinite().all()
    assert y[0, 3] < -50000


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_mixing_is_its_own_inverse_and_leaves_no_channel_alone(head_dim):
    x = torch.randn(10, head_dim)
    assert torch.allclose(mix(mix(x)), x, atol=1e-5)
    assert mix(torch.eye(head_dim)).abs().max() < 4 / head_dim**0.5
    assert mixing_signs(head_dim, x.device).abs().eq(1).all()


def test_signs_are_the_documented_hash():
    def sign(i):
        h = (i + 1) * 0x9E3779B1 % 2**32
        h = (h ^ h >> 15) * 0x85EBCA77 % 2**32
        return -1 if h >> 31 else 1

    assert mixing_signs(256, torch.device("cpu")).tolist() == [sign(i) for i in range(256)]


# of the vector below: words, scale
GOLDEN = {
    4: [[[105, 2, 222, 170, 204, 253, 48, 132]], [0.33203125]],
    3: [[[93, 96, 159, 182, 255, 136]], [0.356201171875]],
    2: [[[182, 217, 24, 213]], [0.332763671875]],
}


def test_golden_bytes():
    """The words of one vector: what decodes differently is another format."""
    x = torch.linspace(-1, 1, 16).square()[None] - 0.3
    assert {bits: [part.tolist() for part in kv_codec(bits).encode(x)] for bits in BITS} == GOLDEN


@pytest.mark.parametrize("head_dim", [4, 12, 100])
def test_other_head_dims_are_refused(head_dim):
    with pytest.raises(GlqError, match=f"multiple of 8, found {head_dim}"):
        kv_codec(4).encode(torch.zeros(1, head_dim))


@pytest.mark.parametrize("bits", [0, 1, 5, 3.5])
def test_other_bits_are_refused(bits):
    with pytest.raises(GlqError, match="4, 3 or 2"):
        kv_codec(bits)
