"""E8 codes of head vectors: what a token's key or value of one head becomes in a KV cache.

A vector x of d channels is rotated, y = H·D·H·x, and divided by one fp16 scale. Every 8 channels of that become a code
word: 32 bits (glq.kv.shaped, q = 16) at 4 bits a channel, 24 (the same, q = 8) at 3, 16 (factored E8 of glq.codecs) at
2. A word at 4 and 3 bits holds its choice of one of eight steps, so the scale is all that comes on top: 16 / d bits a
channel.

H is the orthonormal transform of glq.rotation (Hartley_m ⊗ Hadamard_p, d = m·p), D the fixed signs of `mixing_signs`.
H·D·H is symmetric, and its own inverse. One H is not enough: some keys have most of their energy in a channel or two,
which H makes flat; all words are then alike but for signs, and lucky or unlucky together (docs/decisions.md, "The KV
cache").

A word decodes in integers, coordinates in sixteenths of a step (quarters at 2 bits; docs/kv.md, docs/FORMAT.md,
"Codecs"), up to one product with the step (1 at 2 bits); that is multiplied by the scale and rotated back, each in
fp32.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from glq.codecs import Codec, get_codec
from glq.errors import GlqError
from glq.kv.shaped import ShapedE8
from glq.rotation import hadamard

_CHUNK = 2**18  # words at once: bounds what a long prompt takes beside its codes (half a GB at 3 and 4 bits)


@dataclass(frozen=True)
class KvCodec:
    """`reach`: words longer than this, in units of the scale, make the scale larger."""

    codec: Codec
    reach: float

    @property
    def word_bytes(self) -> int:
        return self.codec.code_bits // 8

    def stored_bits(self, head_dim: int) -> float:
        """Bits a channel, scale included."""
        return self.codec.bits + 16 / head_dim

    @torch.no_grad()
    def encode(self, x: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [..., d] floating point → words [..., d/8 · word_bytes] uint8 and scales [...] fp16; d is a multiple of 8.

        Without `scales`, a vector is rounded at its root mean square, or more where a word would be out of reach, and
        the scale that suits the words best is kept. With a vector's own scale, what `decode` gives encodes to itself.
        A vector with NaN or infinity in it, or whose scale is beyond fp16, decodes to NaN; one whose scale rounds to 0
        (below 3e-8), to zeros.
        """
        d = x.shape[-1]
        check_head_dim(d)
        if not x.numel():
            words = x.new_empty((*x.shape[:-1], d // 8 * self.word_bytes), dtype=torch.uint8)
            return words, x.new_empty(x.shape[:-1], dtype=torch.float16)
        size = max(_CHUNK * 8 // d, 1)
        parts = x.reshape(-1, d).split(size)
        given = [None] * len(parts) if scales is None else scales.reshape(-1).split(size)
        done = [self._encode(part, scale) for part, scale in zip(parts, given, strict=True)]
        words, kept = done[0] if len(done) == 1 else (torch.cat(p) for p in zip(*done, strict=True))
        return words.view(*x.shape[:-1], words.shape[-1]), kept.view(x.shape[:-1])

    @torch.no_grad()
    def decode(self, words: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., d] in dtype. Finite values beyond its range become its largest ones."""
        units = self.codec.decode(unpack(words, self.word_bytes)).flatten(-2)
        return narrow(mix(units * scales[..., None].float()), dtype)

    def _encode(self, x: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [n, d] → words [n, d/8 · word_bytes] uint8, scales [n] fp16."""
        n, d = x.shape
        y = mix(x.float())
        first = self._first_scales(y) if scales is None else scales
        usable = first > 0  # 0 and NaN leave nothing to divide by: such vectors get the words of zeros
        divisor = torch.where(usable, first.float(), 1.0)
        units = torch.where(usable[:, None], y, 0.0) / divisor[:, None]
        words, values = self.codec.round(units.view(n, d // 8, 8))
        if scales is None:
            values = values.reshape(n, d)
            fit = (units * values).sum(-1) / values.square().sum(-1)
            first = torch.where(usable, finite_half(divisor * fit), first)
        return pack(words, self.word_bytes), first

    def _first_scales(self, y: Tensor) -> Tensor:
        """y [n, d], rotated → [n] fp16."""
        energy = y.square().unflatten(-1, (-1, 8)).sum(-1)
        return finite_half(torch.maximum(energy.mean(-1).div(8).sqrt(), energy.amax(-1).sqrt() / self.reach))


_CODECS = {
    4: KvCodec(ShapedE8("shaped-4", 4, (87, 104, 116, 128, 139, 153, 175, 240), mse=0.0063), reach=6.0),
    3: KvCodec(ShapedE8("shaped-3", 3, (151, 179, 207, 237, 268, 306, 358, 480), mse=0.0266), reach=6.0),
    2: KvCodec(get_codec("e8-2"), reach=5.0),
}


def kv_codec(bits: int) -> KvCodec:
    """The codec of 4, 3 or 2 bits a channel."""
    try:
        return _CODECS[bits]
    except KeyError:
        raise GlqError(f"a KV cache takes 4, 3 or 2 bits, found {bits!r}: choose one of these") from None


def check_head_dim(head_dim: int) -> None:
    """GlqError for head vectors that are no whole number of words."""
    if head_dim < 8 or head_dim % 8:
        raise GlqError(
            f"the E8 KV cache rounds 8 channels at a time, so head_dim must be a multiple of 8, found {head_dim}: "
            "use transformers' own cache for this model"
        )


def mix(x: Tensor) -> Tensor:
    """H·D·H·x for each row of x [..., d] fp32: orthonormal, its own inverse; no channel stays a pattern of ±1."""
    d = x.shape[-1]
    return hadamard(hadamard(x, d) * mixing_signs(d, x.device), d)


@cache
def mixing_signs(d: int, device: torch.device) -> Tensor:
    """[d] fp32 of ±1: channel i is negative where bit 31 of h is set, in 32-bit arithmetic

    h = (i + 1) · 0x9E3779B1;   h = h XOR (h >> 15);   h = h · 0x85EBCA77
    """
    h = (torch.arange(1, d + 1) * 0x9E3779B1) & 0xFFFFFFFF
    h = ((h ^ h >> 15) * 0x85EBCA77) & 0xFFFFFFFF  # wraps around in int64, which leaves the low 32 bits right
    return (1 - 2 * (h >> 31)).float().to(device)


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x fp32, which is overwritten, in dtype; what is beyond its range becomes its largest value, NaN stays."""
    largest = torch.finfo(dtype).max
    return x.clamp_(-largest, largest).to(dtype)


def finite_half(x: Tensor) -> Tensor:
    """x in fp16, NaN where that is not finite."""
    half = x.half()
    return torch.where(torch.isfinite(half), half, torch.nan)


def pack(words: Tensor, word_bytes: int) -> Tensor:
    """words [..., k] int64 below 256^word_bytes → uint8 [..., k · word_bytes], lowest byte first."""
    shifts = torch.arange(0, 8 * word_bytes, 8, device=words.device)
    return (words[..., None] >> shifts & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, word_bytes: int) -> Tensor:
    """Inverse of `pack`."""
    parts = packed.unflatten(-1, (-1, word_bytes)).long()
    shifts = torch.arange(0, 8 * word_bytes, 8, device=packed.device)
    return (parts << shifts).sum(-1)
