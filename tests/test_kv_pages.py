"""Pages of the E8 KV cache: what is written comes back as the codec gives it, and attention to it is softmax's."""

from types import SimpleNamespace

import pytest
import torch

from glq import GlqError
from glq.kv.codec import kv_codec
from glq.kv.layout import attend_reference, gather_reference, write_reference
from glq.kv.pages import PageLayout, attend, gather, prepare, write

SCALE = 0.2


def filled(layout, lengths, dtype=torch.float32, gap=0):
    """Random tokens of sequences whose pages are shuffled; pages without tokens decode to NaN. Keys, values of each."""
    per = -(-max(max(lengths), 1) // layout.page_tokens)
    count = per * len(lengths) + 1
    pages = torch.full((count, layout.nbytes + gap), 255, dtype=torch.uint8)[:, : layout.nbytes]
    table = (1 + torch.randperm(count - 1)).view(len(lengths), per).int()
    kept = []
    for row, length in zip(table, lengths, strict=True):
        states = torch.randn(2, length, layout.heads, layout.head_dim).to(dtype)
        places = torch.arange(length)
        slots = row[places // layout.page_tokens].long() * layout.page_tokens + places % layout.page_tokens
        order = torch.randperm(length)
        write(pages, layout, states[0, order], states[1, order], slots[order])
        kept.append(tuple(states))
    return pages, table, kept


def rounded(layout, keys, values, dtype=torch.float32):
    codecs = kv_codec(layout.key_bits), kv_codec(layout.value_bits)
    return [codec.decode(*codec.encode(x), dtype) for codec, x in zip(codecs, (keys, values), strict=True)]


def plain_attention(q, keys, values, window=None, softcap=None):
    """q [heads, d]; keys, values [tokens, kv heads, d], in fp64."""
    keys, values = (x[-window if window else 0 :].double() for x in (keys, values))
    out = []
    for i, one in enumerate(q.double()):
        head = i * keys.shape[1] // len(q)
        logits = keys[:, head] @ one * SCALE
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        out.append(logits.softmax(0) @ values[:, head])
    return torch.stack(out)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("page_tokens", [16, 32])
def test_pages_hold_the_codecs_words(head_dim, bits, page_tokens):
    layout = PageLayout(2, head_dim, *bits, page_tokens)
    pages, table, kept = filled(layout, [1, 33, page_tokens], gap=48)
    assert layout.nbytes == 2 * page_tokens * (head_dim * sum(bits) // 8 + 4)
    for row, states in zip(table, kept, strict=True):
        found = gather(pages, layout, row, len(states[0]), torch.float32)
        for x, y in zip(rounded(layout, *states), found, strict=True):
            off = (x - y).norm(dim=-1) > 1e-5 * x.norm(
                dim=-1
            )  # a word near a tie: sums of 3 · 32 channels in another order
            assert off.float().mean() < 0.01


def test_the_bytes_of_a_page_are_where_they_are_said_to_be():
    layout = PageLayout(2, 64, 4, 3, 16)
    pages, _, _ = filled(layout, [16])
    keys, values = torch.randn(2, 16, 2, 64)
    write(pages, layout, keys, values, torch.arange(16) + 16)
    expected = []
    for x, bits in ((keys, 4), (values, 3)):
        words, scales = kv_codec(bits).encode(x.transpose(0, 1))
        expected += [words.flatten(), scales.flatten().view(torch.uint8)]
    assert torch.equal(pages[1], torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gather_rounds_to_the_models_type(dtype):
    layout = PageLayout(3, 64, 4, 4)
    pages, table, [states] = filled(layout, [20], dtype)
    for x, y in zip(rounded(layout, *states, dtype), gather(pages, layout, table[0], 20, dtype), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("tokens", [1, 32, 47, 100])
def test_gather_in_parts(tokens, monkeypatch):
    monkeypatch.setattr("glq.kv.layout._AT_ONCE", 40)
    layout = PageLayout(3, 64, 4, 3)
    pages, table, [states] = filled(layout, [100])
    for x, y in zip(rounded(layout, *states), gather(pages, layout, table[0], tokens, torch.float32), strict=True):
        assert torch.equal(x[:tokens], y)


def test_padding_is_not_written():
    layout = PageLayout(1, 64, 4, 4)
    pages, _, _ = filled(layout, [20])
    before = pages.clone()
    x = torch.randn(4, 1, 64)
    write(pages, layout, x, x, torch.full((4,), -1))
    assert torch.equal(pages, before)
    write(pages, layout, x, x, torch.tensor([-1, 18, -1, -1]))
    assert (pages != before).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("heads", "queries", "head_dim"), [(1, 1, 64), (2, 8, 128), (3, 9, 80), (2, 2, 96), (1, 4, 256)]
)
@pytest.mark.parametrize("bits", [(4, 4), (3, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 1.5}, {"window": 16, "softcap": 3.0}], ids=str)
def test_attention_is_softmax_over_what_is_decoded(heads, queries, head_dim, bits, options):
    lengths = [1, 16, 50, 0, 37]
    layout = PageLayout(heads, head_dim, *bits, 16)
    pages, table, kept = filled(layout, lengths)
    q = torch.randn(len(lengths), queries, head_dim)
    out = attend(q, pages, layout, table, torch.tensor(lengths).int(), SCALE, **options)
    assert not out[3].any()
    for i in (0, 1, 2, 4):
        expected = plain_attention(q[i], *rounded(layout, *kept[i]), **options)
        assert (out[i] - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_16_bits_is_rounded_once(dtype):
    layout = PageLayout(2, 64, 4, 4, 32)
    pages, table, [states] = filled(layout, [70], dtype)
    q = torch.randn(1, 4, 64).to(dtype)
    out = attend(q, pages, layout, table, torch.tensor([70]).int(), SCALE)
    expected = plain_attention(q[0], *rounded(layout, *states))
    assert out.dtype == dtype
    assert (out[0] - expected).norm() / expected.norm() < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 20, "softcap": 1.5}], ids=str)
def test_pages_hold_keys_times_factors(dtype, options):
    """Readers see keys as they are, with errors that are small where queries are large."""
    layout, lengths, factors = PageLayout(2, 64, 4, 3), torch.tensor([50, 17]).int(), torch.logspace(-1.4, 0, 64)
    pages, plain = torch.full((2, 9, layout.nbytes), 255, dtype=torch.uint8)
    table, q = 1 + torch.randperm(8).view(2, 4).int(), (torch.randn(2, 4, 64) * factors).to(dtype)
    errors = []
    for row, one, length in zip(table, q, lengths, strict=True):
        keys, values = torch.randn(2, length, 2, 64)
        keys = (keys / factors).to(dtype)
        places = torch.arange(length)
        slots = row[places // 16].long() * 16 + places % 16
        write(pages, layout, keys, values.to(dtype), slots, factors)
        write(plain, layout, keys, values.to(dtype), slots)
        found = gather(pages, layout, row, length, dtype, factors)
        times, expected = rounded(layout, keys.float() * factors, values.to(dtype))
        assert torch.equal(found[0], (times / factors).to(dtype))
        assert torch.equal(found[1], expected.to(dtype))
        seen = found[0], gather(plain, layout, row, length, dtype)[0]
        exact = torch.einsum("hd,nhd->hn", one[::2].float(), keys.float())
        errors.append([(torch.einsum("hd,nhd->hn", one[::2].float(), k.float()) - exact).norm() for k in seen])
    assert all(a < b / 2 for a, b in errors)
    out = attend(q, pages, layout, table, lengths, SCALE, factors=factors, **options)
    for one, row, length, attended in zip(q, table, lengths, out, strict=True):
        expected = plain_attention(one, *gather(pages, layout, row, length, torch.float32, factors), **options)
        assert (attended - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("what", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_token_spoils_its_head_of_its_sequence_alone(what, value):
    layout, lengths = PageLayout(2, 64, 4, 4), torch.tensor([30, 30]).int()
    pages, table, kept = filled(layout, lengths.tolist())
    q = torch.randn(2, 4, 64)
    before = attend(q, pages, layout, table, lengths, SCALE)
    states = [x[3:4].clone() for x in kept[0]]
    states[what][0, 1, 5] = value
    write(pages, layout, *states, table[0, :1].long() * 16 + 3)
    after = attend(q, pages, layout, table, lengths, SCALE)
    assert after[0, 2:].isnan().all()
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :2], before[0, :2])
    behind = attend(q, pages, layout, table, lengths, SCALE, window=26)  # tokens 4 and on
    assert behind.isfinite().all()


def test_what_is_ahead_of_a_window_may_belong_to_others():
    layout, lengths = PageLayout(1, 64, 4, 4), torch.tensor([50]).int()
    pages, table, _ = filled(layout, [50])
    q = torch.randn(1, 2, 64)
    before = attend(q, pages, layout, table, lengths, SCALE, window=18)
    table[0, :2] = -7  # no page at all
    assert torch.equal(attend(q, pages, layout, table, lengths, SCALE, window=18), before)


def test_prepare_runs_what_it_finds(monkeypatch):
    """The reference, in place of a GPU's kernels."""
    calls = []
    found = SimpleNamespace(
        write=lambda *args: calls.append(("write", write_reference(*args))),
        attend=lambda *args: calls.append(("attend", attend_reference(*args))) or calls[-1][1],
        gather=lambda *args: calls.append(("gather", gather_reference(*args))),
    )
    monkeypatch.setattr("glq.kv.pages._kernels", lambda *args: found)
    prepare.__wrapped__(PageLayout(2, 64, 4, 3), 6, torch.device("cpu"), torch.bfloat16)
    assert [name for name, _ in calls] == ["write", "attend", "gather"]
    assert calls[1][1].shape == (1, 6, 64)
    assert (calls[1][1] - 1).abs().max() < 0.3  # the one value


def test_the_ops_are_what_torch_library_takes_them_for():
    layout = PageLayout(2, 64, 4, 3)
    pages, table, [(keys, values)] = filled(layout, [20])
    sizes = (2, 64, 4, 3, 16)
    factors = torch.linspace(0.1, 1, 64)
    for given in (None, factors):
        torch.library.opcheck(torch.ops.glq.kv_write, (pages, keys, values, torch.arange(20), given, *sizes))
    q, lengths = torch.randn(1, 4, 64), torch.tensor([20]).int()
    torch.library.opcheck(torch.ops.glq.kv_attend, (q, pages, table, lengths, 0.1, None, None, factors, *sizes))


@pytest.mark.parametrize("sizes", [(2, 60, 4, 4, 16), (2, 64, 5, 4, 16), (2, 64, 4, 4, 24), (0, 64, 4, 4, 16)])
def test_sizes_that_no_page_has(sizes):
    with pytest.raises(GlqError):
        PageLayout(*sizes)
