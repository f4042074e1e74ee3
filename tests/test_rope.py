"""Rotary embedding and the write to a KV cache by one kernel: on an emulator, and as cubins."""

import shutil

import pytest
import torch
from cubins import spilled
from emulator import Emulator

from glq import nvrtc
from glq.errors import GlqError
from glq.ops import cuda_rope
from glq.ops.cuda_rope import Cache, Turn, _source, reference, rope, takes

PAGE, PAGES, POSITIONS = 4, 5, 50
HEADS, KV_HEADS = 6, 2


def turned(x, positions, angles, head_size, halves):
    """In fp64, by the definition: columns as complex numbers."""
    half = angles.shape[1] // 2
    by = torch.complex(angles[positions, :half].double(), angles[positions, half:].double())[:, None]
    heads = x.double().view(len(x), -1, head_size).clone()
    part = heads[..., : 2 * half]
    pairs = part.unflatten(-1, (2, half)).transpose(-1, -2) if halves else part.unflatten(-1, (half, 2))
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * by)
    heads[..., : 2 * half] = (pairs.transpose(-1, -2) if halves else pairs).flatten(-2)
    return heads.flatten(1)


def case(tokens, dtype, head_size, rotated):
    """q, k and v side by side as a product gives them, and what turns them."""
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * head_size).to(dtype)
    q, k, v = qkv.split([HEADS * head_size, KV_HEADS * head_size, KV_HEADS * head_size], 1)
    phase = torch.randn(POSITIONS, rotated // 2)
    return q, k, v, torch.randint(POSITIONS, (tokens,)), torch.cat((phase.cos(), phase.sin()), 1).to(dtype)


def empty_cache(dtype, head_size, slots):
    """As vLLM has it, both in one tensor: [pages, heads, page size, 2 · head size]."""
    both = torch.full((PAGES, KV_HEADS, PAGE, 2 * head_size), float("nan"), dtype=dtype)
    return Cache(*both.transpose(1, 2).split(head_size, -1), slots)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_size", "rotated", "halves"),
    [(128, 128, True), (64, 32, True), (256, 256, True), (64, 64, False), (96, 40, False), (72, 16, True)],
)
def test_queries_and_keys_turn_and_keys_and_values_are_written(dtype, head_size, rotated, halves):
    for tokens in (1, 3, 7):
        q, k, v, positions, angles = case(tokens, dtype, head_size, rotated)
        slots = torch.randperm(PAGE * PAGES)[: max(1, tokens - 1)]  # the last token is padding if there are several
        slots[0] = slots[0] if tokens < 7 else -1
        cache = empty_cache(dtype, head_size, slots)
        by = Turn(positions, angles, head_size, halves)
        assert takes(q, k, v, by, cache)
        new_q, new_k = rope(q, k, v, by, cache, Emulator(4))
        for old, new in ((q, new_q), (k, new_k)):
            expected = turned(old, positions, angles, head_size, halves)
            torch.testing.assert_close(reference(old, by).double(), expected)
            torch.testing.assert_close(new.double(), expected.to(dtype).double(), rtol=2**-7, atol=1e-3)
        keys, values = torch.full_like(cache.keys, float("nan")), torch.full_like(cache.values, float("nan"))
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                keys[slot // PAGE, slot % PAGE] = new_k[token].view(KV_HEADS, -1)
                values[slot // PAGE, slot % PAGE] = v[token].view(KV_HEADS, -1)
        torch.testing.assert_close(cache.keys, keys, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(cache.values, values, rtol=0, atol=0, equal_nan=True)
        alone = rope(q, k, v, by, None, Emulator(4))
        assert torch.equal(alone[0], new_q)
        assert torch.equal(alone[1], new_k)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
def test_a_kernel_that_computes_something_else_is_found_out(monkeypatch):
    """By what is run before its first use on a GPU."""
    emulator = Emulator(4)
    monkeypatch.setattr(nvrtc, "gpu", lambda _: emulator)
    cuda_rope._try_out(torch.device("cpu"))
    for changed in ({"angles": lambda a: -a}, {"slots": lambda s: s.clamp(min=0)}):  # turned back; padding written
        launch = emulator.launch

        def wrong(source, name, grid, block, shared, *arguments, launch=launch, changed=changed):
            names = ("q", "k", "v", "positions", "angles", "slots")
            given = [changed.get(n, lambda a: a)(a) for n, a in zip(names, arguments, strict=False)]
            launch(source, name, grid, block, shared, *given, *arguments[len(names) :])

        with monkeypatch.context() as patch:
            patch.setattr(emulator, "launch", wrong)
            with pytest.raises(GlqError, match="something else than PyTorch"):
                cuda_rope._try_out(torch.device("cpu"))


def test_what_it_takes():
    q, k, v, at, angles = case(2, torch.half, 64, 64)
    by = Turn(at, angles, 64, True)
    cache = empty_cache(torch.half, 64, torch.zeros(2, dtype=torch.int64))
    assert takes(q, k, v, by, cache)
    assert takes(q, k, v, by, None)
    assert not takes(q.float(), k.float(), v.float(), Turn(at, angles.float(), 64, True), None)
    assert not takes(q, k, v, Turn(at.int(), angles, 64, True), None)
    assert not takes(q, k, v, by, Cache(cache.keys, cache.values, cache.slots.int()))
    assert not takes(q, k, v, Turn(at, angles.float(), 64, True), None)
    assert not takes(q.bfloat16(), k, v, by, None)
    assert not takes(q, k, v[:, :64], by, None)
    assert not takes(q, k, v, Turn(at, angles[:, :24], 64, False), None)
    assert not takes(q, k, v, Turn(at, angles[:, :24].contiguous(), 64, True), None)  # 12 columns a half
    assert takes(q, k, v, Turn(at, angles[:, :24].contiguous(), 64, False), None)
    assert not takes(q[:, 4:-4], k, v, by, None)  # 8 bytes beyond a place that is aligned
    assert not takes(q, k, v, Turn(at, angles, 32, True), None)  # more columns turn than a head has
    assert not takes(q, k, v, by, Cache(cache.keys.float(), cache.values.float(), cache.slots))
    assert not takes(q, k, v, by, Cache(cache.keys[..., :32], cache.values[..., :32], cache.slots))


@pytest.mark.skipif(not nvrtc.available(), reason="needs cuda-core")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"])
def test_cubins_keep_everything_in_registers(arch):
    for facts in ((torch.float16, 128, 128, True), (torch.bfloat16, 64, 64, False)):
        assert spilled(_source(*facts).compile_and_report(arch)[1]) == {0}
