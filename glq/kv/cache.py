"""`GlqCache`: a transformers Cache whose keys and values are kept as E8 codes of 4, 3 or 2 bits a channel.

A layer keeps one uint8 tensor for its keys and one for its values, [batch, heads, tokens, row]: a row is the code words
of one head vector and the two bytes of its fp16 scale. transformers' dynamic layers append, cut, reorder and repeat
rows as they do 16-bit vectors; `update` encodes what comes and decodes what goes to attention. Every token is rounded
once, as it comes, and never again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from glq.errors import GlqError
from glq.kv.codec import KvCodec, kv_codec

_SCALE_BYTES = 2


class _Coded:
    """Over a dynamic layer: rows of codes where it keeps keys and values."""

    supports_early_init = False  # the layer's tensors are not the shape and type that early initialization would give
    key_codec: KvCodec
    value_codec: KvCodec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encodes the new [batch, heads, tokens, head_dim]; returns what attention sees, decoded, in their dtypes."""
        new = (_rows(self.key_codec, key_states), _rows(self.value_codec, value_states))
        keys, values = super().update(*new, *args, **kwargs)  # type: ignore[misc]
        return (
            _vectors(self.key_codec, keys, key_states.dtype),
            _vectors(self.value_codec, values, value_states.dtype),
        )

    def offload(self) -> None:
        raise GlqError("GlqCache is not offloaded to the CPU: it is for GPU memory, use it without offloading")

    prefetch = offload


class GlqLayer(_Coded, DynamicLayer):
    """Full attention."""

    def __init__(self, key_codec: KvCodec, value_codec: KvCodec) -> None:
        super().__init__()
        self.key_codec, self.value_codec = key_codec, value_codec


class GlqSlidingLayer(_Coded, DynamicSlidingWindowLayer):
    """Sliding-window and chunked attention: the window's tokens alone are kept."""

    def __init__(self, key_codec: KvCodec, value_codec: KvCodec, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.key_codec, self.value_codec = key_codec, value_codec


class GlqCache(Cache):
    """`model.generate(..., past_key_values=GlqCache(bits=4, config=model.config))`.

    bits: 4, 3 or 2, of keys and values; key_bits and value_bits where they differ. config: the model's; with it, layers
    with a sliding window keep that alone, and recurrent layers their state. Without it, every layer keeps all.
    GlqError for other bits, for a head_dim that is no multiple of 8, and layers that keep more than keys and values.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        config: PreTrainedConfig | None = None,
    ) -> None:
        codecs = [kv_codec(bits if own is None else own) for own in (key_bits, value_bits)]
        if config is None:
            super().__init__(layer_class_to_replicate=partial(GlqLayer, *codecs))
        else:
            super().__init__(layers=[_coded(layer, *codecs) for layer in DynamicCache(config=config).layers])

    @property
    def nbytes(self) -> int:
        """Of all codes and scales; recurrent states are not counted."""
        coded = (layer for layer in self.layers if isinstance(layer, GlqLayer | GlqSlidingLayer))
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in coded if layer.is_initialized)


def _coded(layer: Any, key_codec: KvCodec, value_codec: KvCodec) -> Any:
    """What takes the place of a layer that transformers would have."""
    if type(layer) is DynamicLayer:
        return GlqLayer(key_codec, value_codec)
    if type(layer) is DynamicSlidingWindowLayer:
        return GlqSlidingLayer(key_codec, value_codec, layer.sliding_window)
    if isinstance(layer, CacheLayerMixin):
        raise GlqError(
            f"GlqCache holds keys and values of full and of sliding-window attention, and this model has a "
            f"{type(layer).__name__}: use transformers' own cache for it"
        )
    return layer  # a recurrent layer's state, or nothing


def _rows(codec: KvCodec, x: Tensor) -> Tensor:
    words, scales = codec.encode(x)
    return torch.cat([words, scales[..., None].view(torch.uint8)], -1)


def _vectors(codec: KvCodec, rows: Tensor, dtype: torch.dtype) -> Tensor:
    words, scale = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:]
    return codec.decode(words, scale.contiguous().view(torch.float16)[..., 0], dtype)
