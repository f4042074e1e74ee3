"""Attention of a step by a kernel that reads each key once, however many heads share it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from glq.step.record import Call, Value


@dataclass(frozen=True)
class Attention:
    """softmax(q Kᵀ · scale + mask) V, as ops.cuda_attention.attend."""

    q: Value
    k: Value
    v: Value
    mask: Value | None
    scale: float
    out: Value
    calls: tuple[Call, ...]  # whose work it does: copies of keys and values for all heads, and the attention itself

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(v for v in (self.q, self.k, self.v, self.mask) if v is not None)


def attention(call: Call, copies: Iterable[Call]) -> Attention | None:
    """The call, if it is such attention; copies: calls whose results it alone reads, of tensors that did not change."""
    if call.function is not scaled_dot_product_attention or len(call.makes) != 1:
        return None
    given = _by_name(*call.args, **call.kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    if given["dropout_p"] or given["is_causal"] or any(len(x.shape) != 4 for x in (q, k, v)):
        return None
    if k.shape[1] != q.shape[1] and not given["enable_gqa"]:
        return None
    clones = {c.makes[0]: c for c in copies if c.function is torch.ops.aten.clone.default}
    originals = {made: c.args[0] for made, c in clones.items()}
    keys, values = _unrepeated(k, originals), _unrepeated(v, originals)
    if keys.shape != values.shape:  # somebody else needs the copy of one
        keys, values = k, v
    left_out = {x.root for x, original in ((k, keys), (v, values)) if original is not x}
    calls = (*(c for made, c in clones.items() if made in left_out), call)
    scale = q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    return Attention(q, keys, values, given["attn_mask"], scale, call.makes[0], calls)


def _by_name(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    return locals()


def _unrepeated(x: Value, originals: dict[Value, Value]) -> Value:
    """What x [batch, heads, keys, dim] repeats for each head of a group, if it is a copy that does.

    The copy is of a tensor [batch, kv_heads, group, keys, dim] whose group takes no memory.
    """
    original = originals.get(x.root)
    if original is None or len(original.shape) != 5 or original.stride[2] or x.offset:
        return x
    batch, kv_heads, group, keys, dim = original.shape
    copied = (kv_heads * group * keys * dim, group * keys * dim, keys * dim, dim, 1)
    if x.shape != (batch, kv_heads * group, keys, dim) or x.root.stride != copied:
        return x
    if x.stride != (kv_heads * group * keys * dim, keys * dim, dim, 1):
        return x
    shape, stride = (batch, kv_heads, keys, dim), tuple(original.stride[d] for d in (0, 1, 3, 4))
    return Value(shape, stride, x.dtype, x.device, original.root, original.offset)
