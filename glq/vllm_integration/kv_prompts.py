"""Causal attention of prompts to vectors: flash-attn's where it is, plain PyTorch elsewhere."""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends import fa_utils

_QUERIES = 256  # at once in PyTorch, which bounds the logits


def prompt_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q [tokens, heads, d] of sequences that start at starts [sequences + 1] int32, none longer than `longest`.

    keys, values [tokens or more, kv heads, d]: as many as q's, or those of one sequence with earlier ones ahead.
    """
    earlier = len(keys) - len(q)
    if q.device.type != "cuda" or not fa_utils.is_flash_attn_varlen_func_available():
        if earlier:
            return _plain(q, keys, values, scale, window, softcap)
        parts = [slice(*ends) for ends in pairwise(starts.tolist())]
        return torch.cat([_plain(q[part], keys[part], values[part], scale, window, softcap) for part in parts])
    return fa_utils.flash_attn_varlen_func(
        q=q,
        k=keys,
        v=values,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts.clamp(max=1) * len(keys) if earlier else starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest + earlier,
        softmax_scale=scale,
        causal=True,
        window_size=[window - 1, 0] if window else None,
        softcap=softcap or 0.0,
        **_version(q.shape[-1]),
    )


@cache
def _version(head_dim: int) -> dict[str, Any]:
    version = fa_utils.get_flash_attn_version(head_size=head_dim)
    return {} if version is None else {"fa_version": version}


def _plain(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One sequence, in fp32. q's tokens are the last of keys'."""
    keys, values = (x.float().transpose(0, 1) for x in (keys, values))  # [kv heads, tokens, d]
    out, last = torch.empty_like(q), keys.shape[1] - len(q)
    for start in range(0, len(q), _QUERIES):
        some = q[start : start + _QUERIES].float()
        grouped = some.unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)  # [kv heads, queries of each, tokens, d]
        logits = grouped @ keys[:, None].mT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        place = last + start + torch.arange(len(some), device=q.device)[:, None]
        age = place - torch.arange(keys.shape[1], device=q.device)  # of a key at a query
        seen = (age >= 0) & (age < window) if window else age >= 0
        attended = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values[:, None]
        out[start : start + len(some)] = attended.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out
