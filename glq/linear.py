"""QuantLinear: a linear layer whose weight is packed."""

import torch
from torch import Tensor, nn

from glq.fused import Fusable
from glq.packed import PACKED_DTYPES, PackedLinear, packed_shapes


class QuantLinear(Fusable):
    """Drop-in for nn.Linear in inference: x [..., in] → [..., out], same dtype.

    Its buffers `codes`, `scale` and `signs` are those of PackedLinear. Casting the module casts only the scales;
    the op computes with them in fp32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codec: str,
        block: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.codec, self.block = codec, block
        for name, shape in packed_shapes(codec, out_features, in_features).items():
            self.register_buffer(name, torch.zeros(shape, dtype=PACKED_DTYPES[name], device=device))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    @classmethod
    def from_packed(cls, packed: PackedLinear, bias: Tensor | None = None) -> "QuantLinear":
        """A layer that holds `packed`, and `bias` [out] if there is one."""
        layer = cls(packed.in_features, packed.out_features, packed.codec, packed.block, device="meta")
        layer.codes, layer.scale, layer.signs = packed.codes, packed.scale, packed.signs
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer

    @property
    def packed(self) -> PackedLinear:
        return PackedLinear(
            self.codec, self.out_features, self.in_features, self.block, self.codes, self.scale, self.signs
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        """An nn.Linear with the same weight, [out, in] in `dtype`, in the model's own basis."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.packed.dequantize().to(dtype), requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self.codec!r}"
