"""y = x · Wᵀ by a matrix as upstream stores it: one op, PyTorch's on every device, opaque to torch.compile."""

from torch import Tensor

from glq.custom_op import custom_op, register_fake
from glq.upstream.matrix import Matrix, Part


@custom_op("upstream_matmul")
def upstream_matmul(
    x: Tensor,
    su: Tensor,
    sv: Tensor,
    scale: Tensor,
    codes: list[Tensor],
    tables: list[Tensor],
    weights: list[Tensor],
    kinds: str,
    rows: int,
) -> Tensor:
    """x [..., in] fp32, fp16 or bf16 → [..., rows] in x's dtype; the rest as in Matrix.

    kinds: of the parts, with commas between; weights: of all parts but the first.
    """
    parts = zip(kinds.split(","), codes, tables, [None, *weights], strict=True)
    return Matrix(tuple(Part(*part) for part in parts), su, sv, scale).product(x, rows)


@register_fake("upstream_matmul")
def _(
    x: Tensor,
    su: Tensor,
    sv: Tensor,
    scale: Tensor,
    codes: list[Tensor],
    tables: list[Tensor],
    weights: list[Tensor],
    kinds: str,
    rows: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def multiply(x: Tensor, matrix: Matrix, rows: int) -> Tensor:
    """x [..., in] → x · Wᵀ [..., rows] by the op."""
    parts = matrix.parts
    weights = [part.weight for part in parts if part.weight is not None]
    codes, tables = [part.codes for part in parts], [part.table for part in parts]
    kinds = ",".join(part.kind for part in parts)
    return upstream_matmul(x, matrix.su, matrix.sv, matrix.scale, codes, tables, weights, kinds, rows)
