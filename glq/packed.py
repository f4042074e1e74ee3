"""PackedLinear: the tensors of one quantized matrix, and what they mean."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glq.codecs import get_codec
from glq.codecs.packing import from_strips, pack, tile_bytes, tile_grid, unpack
from glq.rotation import unrotate


@dataclass(frozen=True)
class PackedLinear:
    """W ≈ diag(scale) · decode(codes) · R, W [out, in].

    codes [row tiles, column tiles, tile bytes] uint8; scale [out] floating point; signs [⌈in / 8⌉ · 8 / 8] uint8, the
    rotation's signs as bits, least significant first, 1 for −1. `block` is the width of the rotation's blocks.
    """

    codec: str
    out_features: int
    in_features: int
    block: int
    codes: Tensor
    scale: Tensor
    signs: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes stored for this matrix: codes, padding included, scales and signs."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.signs))

    @property
    def bits(self) -> float:
        """Stored bits a weight, all included."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def to(self, device: torch.device) -> "PackedLinear":
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), signs=self.signs.to(device))

    def decode(self) -> Tensor:
        """decode(codes) [out, in] fp32: the weights in the rotated basis, before their rows are scaled."""
        return decode_matrix(self.codes, self.codec, self.out_features, self.in_features)

    def dequantize(self) -> Tensor:
        """The matrix W itself, [out, in] fp32, in the model's own basis."""
        rotated = self.decode() * self.scale.float()[:, None]
        return unrotate(rotated, unpack_signs(self.signs, self.in_features), self.block)


@dataclass(frozen=True)
class PackedExperts:
    """A matrix for each expert of a layer, W_e [out, in], as in PackedLinear; they share the rotation.

    codes [experts, row tiles, column tiles, tile bytes]; scale [experts, out]; signs as of one matrix.
    """

    codec: str
    out_features: int
    in_features: int
    block: int
    codes: Tensor
    scale: Tensor
    signs: Tensor

    @property
    def count(self) -> int:
        return len(self.codes)

    def __getitem__(self, expert: int) -> PackedLinear:
        sizes = (self.codec, self.out_features, self.in_features, self.block)
        return PackedLinear(*sizes, self.codes[expert], self.scale[expert], self.signs)


def packed_shapes(codec: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a [out, in] matrix stores; fixed by the codec and the two sizes alone."""
    c = get_codec(codec)
    rows, cols = tile_grid(out_features, in_features, c.group)
    return {
        "codes": (rows, cols, tile_bytes(c.code_bits)),
        "scale": (out_features,),
        "signs": (math.ceil(in_features / 8),),
    }


PACKED_DTYPES = {"codes": torch.uint8, "scale": torch.float16, "signs": torch.uint8}


def packed_bytes(codec: str, out_features: int, in_features: int) -> int:
    """Of a matrix as it is stored: codes, padding included, scales and signs."""
    shapes = packed_shapes(codec, out_features, in_features)
    return sum(math.prod(shape) * PACKED_DTYPES[key].itemsize for key, shape in shapes.items())


def decode_matrix(codes: Tensor, codec: str, out_features: int, in_features: int) -> Tensor:
    """codes [row tiles, column tiles, tile bytes] uint8 → [out, in] fp32, rotated basis, unscaled rows."""
    c = get_codec(codec)
    return from_strips(c.decode(unpack(codes, c.code_bits)))[:out_features, :in_features]


def pack_codes(codes: Tensor, codec: str) -> Tensor:
    """codes [row tiles, in / 2, 8] int64 → [row tiles, column tiles, tile bytes] uint8."""
    return pack(codes, get_codec(codec).code_bits)


def pack_signs(signs: Tensor) -> Tensor:
    """[in] of ±1 → [⌈in / 8⌉] uint8."""
    bits = torch.nn.functional.pad((signs < 0).to(torch.uint8), (0, -signs.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=signs.device, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_signs(packed: Tensor, in_features: int) -> Tensor:
    """[⌈in / 8⌉] uint8 → [in] fp32 of ±1."""
    bits = packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[:in_features].float()
