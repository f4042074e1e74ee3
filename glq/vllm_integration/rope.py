"""Rotary position embedding and the write to the KV cache as one op, which starts while the product ahead of it ends.

vLLM has a kernel for each, neither of which starts early, and cuts the graph that it compiles ahead of the second.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.utils.torch_utils import _USE_LAYERNAME, LayerNameType, _resolve_layer_name
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from glq import nvrtc
from glq.custom_op import custom_op, register_fake
from glq.ops import cuda_rope
from glq.ops.cuda_rope import Cache, Turn

_SPLIT = "vllm::unified_kv_cache_update"
_OP = "rotary_embedding"


def prepare_config(config: Any) -> bool:
    """Have vLLM compile the write to the cache with what is ahead of it, the embedding one node; False: not.

    Not where layers' names are constants of graphs, which would all be compiled then, and not with other embeddings.
    """
    compilation, model = config.compilation_config, config.model_config
    splits = compilation.splitting_ops or []
    if model is None or model.use_mla or model.uses_mrope or not _USE_LAYERNAME:
        return False
    if _SPLIT not in splits or f"-{_OP}" in compilation.custom_ops or config.parallel_config.use_ubatching:
        return False
    splits.remove(_SPLIT)
    if f"+{_OP}" not in compilation.custom_ops:
        compilation.custom_ops.append(f"+{_OP}")
    return True


@custom_op("rope_and_cache")
def rope_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox: bool,
    layer_name: LayerNameType,
) -> tuple[Tensor, Tensor, Tensor]:
    """query [tokens, heads · head_size] and key turned, and what vllm::unified_kv_cache_update returns of the new key.

    value [tokens, heads, head_size]; positions and cos_sin_cache as _C::rotary_embedding has them.
    """
    _, layer, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
    q, k, v = query.flatten(1), key.flatten(1), value.flatten(1)
    by = Turn(positions.flatten(), cos_sin_cache, head_size, is_neox)
    cache = None if slots is None else _cache(layer.impl, kv_cache, k, slots)
    if cuda_rope.works(q.device) and cuda_rope.takes(q, k, v, by, cache):
        turned = cuda_rope.rope(q, k, v, by, cache, nvrtc.gpu(q.device))
    else:
        cache, turned = None, (q.clone(), k.clone())
        torch.ops._C.rotary_embedding(positions, *turned, head_size, cos_sin_cache, is_neox)
    new_query, new_key = turned[0].view(query.shape), turned[1].view(key.shape)
    if slots is not None and cache is None:
        layer.impl.do_kv_cache_update(layer, new_key.view(value.shape), value, kv_cache, slots)
    return new_query, new_key, new_key.new_empty(0)


@register_fake("rope_and_cache")
def _(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(0)


def _cache(impl: Any, kv_cache: Tensor, k: Tensor, slots: Tensor) -> Cache | None:
    """Where vLLM's flash attention has keys and values in 16 bits; None: anything else, which writes them by itself."""
    own = type(impl) is FlashAttentionImpl and impl.attn_type == AttentionType.DECODER
    if not own or kv_cache.dtype != k.dtype or kv_cache.dim() != 4 or kv_cache.shape[-1] != 2 * impl.head_size:
        return None
    pages, size = kv_cache.transpose(1, 2), impl.head_size
    return Cache(pages.narrow(3, 0, size), pages.narrow(3, size, size), slots)
