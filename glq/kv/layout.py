"""What a page of an E8 KV cache holds, and in plain PyTorch what is done with pages; the kernels are held to it.

A page holds `page_tokens` tokens of all heads of one layer, as bytes, without gaps:

    keys' words    [heads, page_tokens, head_dim / 8 · word bytes]  uint8
    keys' scales   [heads, page_tokens]                             fp16
    values' words and values' scales, likewise

Words and scales are glq.kv.codec's. No centre is subtracted: sequences that begin alike share pages. A token's place is
its slot, page · page_tokens + its number within the page. Where a layer has factors (glq.kv.channels), [head_dim] fp32,
pages hold its keys times these.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from glq.errors import GlqError
from glq.kv.codec import KvCodec, check_head_dim, kv_codec, narrow

_ALIGNED = 16  # tokens that a page is a multiple of: each of its four parts then starts at a multiple of 16 bytes
_AT_ONCE = 4096  # tokens that are decoded at once: bounds what that takes beside its result


@dataclass(frozen=True)
class PageLayout:
    """`heads`: of keys and values, on this rank. GlqError for sizes that no page has."""

    heads: int
    head_dim: int
    key_bits: int
    value_bits: int
    page_tokens: int = _ALIGNED

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        kv_codec(self.key_bits), kv_codec(self.value_bits)
        if self.heads < 1 or self.page_tokens < 1 or self.page_tokens % _ALIGNED:
            raise GlqError(
                f"a page of the E8 KV cache holds a multiple of {_ALIGNED} tokens of one head or more, found "
                f"{self.page_tokens} tokens of {self.heads} heads"
            )

    @property
    def key_codec(self) -> KvCodec:
        return kv_codec(self.key_bits)

    @property
    def value_codec(self) -> KvCodec:
        return kv_codec(self.value_bits)

    @cached_property
    def ends(self) -> tuple[int, int, int, int]:
        """Of the four parts, in bytes from the page's start."""
        vectors, words = self.heads * self.page_tokens, self.head_dim // 8
        keys, values = (vectors * words * codec.word_bytes for codec in (self.key_codec, self.value_codec))
        return keys, keys + 2 * vectors, keys + 2 * vectors + values, keys + values + 4 * vectors

    @property
    def nbytes(self) -> int:
        return self.ends[-1]

    def views(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """pages [pages, nbytes] uint8, rows contiguous → the four parts [pages, heads, page_tokens, ...] of all."""
        vectors = (self.heads, self.page_tokens)
        parts = [pages[:, start:end] for start, end in pairwise((0, *self.ends))]
        words = [part.unflatten(1, (*vectors, -1)) for part in parts[::2]]
        scales = [part.view(torch.float16).unflatten(1, vectors) for part in parts[1::2]]
        return words[0], scales[0], words[1], scales[1]


def write_reference(
    pages: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor, factors: Tensor | None = None
) -> None:
    """keys and values [n, heads, head_dim] floating point become codes at slots [n]; a negative one is padding."""
    written = slots >= 0
    page, place = slots[written] // layout.page_tokens, slots[written] % layout.page_tokens
    key_words, key_scales, value_words, value_scales = layout.views(pages)
    keys = keys if factors is None else keys.float() * factors
    for codec, x, words, scales in (
        (layout.key_codec, keys, key_words, key_scales),
        (layout.value_codec, values, value_words, value_scales),
    ):
        words[page, :, place], scales[page, :, place] = codec.encode(x[written])


def gather_reference(
    pages: Tensor,
    layout: PageLayout,
    page_table_row: Tensor,
    tokens: int,
    dtype: torch.dtype,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first tokens of the pages in page_table_row [k], decoded: keys and values [tokens, heads, head_dim]."""
    taken = page_table_row[: -(-tokens // layout.page_tokens)].long()
    key_words, key_scales, value_words, value_scales = layout.views(pages)

    def vectors(codec: KvCodec, words: Tensor, scales: Tensor, factors: Tensor | None = None) -> Tensor:
        some = taken.split(max(_AT_ONCE // layout.page_tokens, 1))
        parts = [decoded(codec, words[few], scales[few], factors).transpose(1, 2).flatten(0, 1) for few in some]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:tokens]

    def decoded(codec: KvCodec, words: Tensor, scales: Tensor, factors: Tensor | None) -> Tensor:
        if factors is None:
            return codec.decode(words, scales, dtype)
        return narrow(codec.decode(words, scales) / factors, dtype)

    keys = vectors(layout.key_codec, key_words, key_scales, factors)
    return keys, vectors(layout.value_codec, value_words, value_scales)


def attend_reference(
    q: Tensor,
    pages: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence to all its tokens, its own, which is the last, among them; in fp32.

    q [sequences, query heads, head_dim]: head i reads the keys of head i // (query heads / heads). page_table
    [sequences, pages] and lengths [sequences] int32; a length of 0 gives zeros. scale times q · k are the logits;
    softcap: they become softcap · tanh(logit / softcap). window: the last so many tokens alone are seen.
    What pages hold beyond a sequence's tokens, or ahead of its window, changes nothing, NaN included.
    """
    out = torch.zeros_like(q)
    for i, length in enumerate(lengths.tolist()):
        if not length:
            continue
        first = max(length - window, 0) if window else 0
        page = first // layout.page_tokens
        start = page * layout.page_tokens  # earlier pages may belong to others by now
        keys, values = (
            x[first - start :].transpose(0, 1)
            for x in gather_reference(pages, layout, page_table[i, page:], length - start, torch.float32, factors)
        )
        grouped = q[i].float().unflatten(0, (layout.heads, -1))  # [heads, queries of each, head_dim]
        logits = grouped @ keys.mT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        out[i] = (logits.softmax(-1) @ values).flatten(0, 1).to(q.dtype)
    return out
