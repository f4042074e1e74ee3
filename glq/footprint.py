"""What generating takes of a GPU's memory, without one: the model runs on the meta device, and tensors are counted.

Weights are counted from shapes. The cache and what a prompt takes on its way through the layers come from a pass over
tensors without data, in which every allocation and release is PyTorch's own. What PyTorch does not show there, memory
inside kernels, is added by the stand-ins below: for attention, for products with packed weights, for experts.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from glq.codecs import get_codec
from glq.codecs.packing import tile_rows
from glq.errors import GlqError
from glq.experts import ExpertLinear, quantizable
from glq.kv.cache import GlqCache, cache_keyword
from glq.ops.cuda_dequantize import AT_ONCE as WEIGHTS_AT_ONCE
from glq.ops.cuda_dequantize import own_basis_tokens, unrotates
from glq.ops.embedding import ROWS_AT_ONCE, embedding_reference
from glq.ops.matmul import DECODED
from glq.packed import PACKED_DTYPES, packed_bytes, packed_shapes
from glq.rotation import block_width
from glq.source import SourceModel

WORKSPACE = 32 * 2**20  # of cuBLAS on Hopper, the most that it takes; a quarter of that elsewhere


_ALIGNED = 16  # columns that PyTorch's memory-efficient attention has masks filled up to, in a copy
_CUDNN = (9, 10)  # compute capabilities where PyTorch takes cuDNN's instead, which reads them as they are


@dataclass(frozen=True)
class Rates:
    """Codecs of the decoder layers, and of embeddings and lm_head where these are packed, too."""

    layers: str
    embeddings: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class Footprint:
    """Bytes. activations: the most that is held beside weights and cache, when the prompt is read at once."""

    weights: int
    kv: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations


def weight_bytes(source: SourceModel, rates: Rates | None) -> int:
    """Of the model as it is loaded: packed at these rates, or as it is with None."""
    total, codecs = 0, _quantized(source, rates) if rates else {}
    for name, module in source.model.named_modules():
        if name == source.head and source.tied:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if key == "weight" and name in codecs:
                total += sum(packed_bytes(codecs[name], *shape) for shape in _matrices(module))
            else:
                total += parameter.numel() * _dtype(source).itemsize
    return total


def context_bytes(source: SourceModel, rates: Rates | None, context: int, kv_bits: int | None) -> tuple[int, int]:
    """Of `generate` with one sequence of `context` tokens: (its cache, of 16 bits or kv_bits; activations).

    GlqError for a model that looks at its data on the way, which a pass without any cannot follow.
    """
    try:
        peak, kv = _pass(source, rates, context, kv_bits)
    except GlqError:
        raise
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise GlqError(
            f"what a {source.config.model_type!r} model takes cannot be counted without data "
            f"({str(error).strip().splitlines()[0][:120]}): choose --bits yourself"
        ) from error
    return kv, max(0, peak - kv) + WORKSPACE


def footprint(source: SourceModel, rates: Rates | None, context: int, kv_bits: int | None = None) -> Footprint:
    """Of `generate` with one sequence of `context` tokens, prompt and answer."""
    return Footprint(weight_bytes(source, rates), *context_bytes(source, rates, context, kv_bits))


def _quantized(source: SourceModel, rates: Rates) -> dict[str, str]:
    """Names of the modules that are packed → codecs."""
    codecs = {f"{b}.{name}": rates.layers for b in source.blocks for name, _ in quantizable(source.module(b))}
    if rates.embeddings:
        codecs[source.embeddings] = rates.embeddings
    if rates.head:
        codecs[source.head] = rates.head
    return codecs


def _matrices(module: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of a module's matrices, of all experts."""
    weight = cast(Tensor, module.weight)
    if isinstance(module, ExpertLinear):
        count, rows, cols = weight.shape
        return [(rows // len(module.entries), cols)] * (count * len(module.entries))
    return [(weight.shape[0], weight.shape[1])]


def _dtype(source: SourceModel) -> torch.dtype:
    dtype = getattr(source.config.get_text_config(), "dtype", None) or getattr(source.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@torch.no_grad()
def _pass(source: SourceModel, rates: Rates | None, context: int, kv_bits: int | None) -> tuple[int, int]:
    """(the most bytes held at once beside the weights, the cache's in the end); the prompt is all but one token."""
    model, config = source.model, source.config.get_text_config()
    if (most := getattr(config, "max_position_embeddings", None)) and context > most:
        raise GlqError(f"the model reads at most {most:,} tokens: --context {context:,} is more")
    cache = DynamicCache(config=config) if kv_bits is None else GlqCache(kv_bits, config=config)
    with _standing_in(source, rates):
        tally = _Tally()
        with _Attention(), tally:
            _step(model, max(1, context - 1), cache)
            _step(model, 1, cache)
        kv = cache.nbytes if isinstance(cache, GlqCache) else _cache_bytes(cache)
    return tally.peak, kv


def _step(model: PreTrainedModel, tokens: int, cache: Cache) -> None:
    ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache}).logits.float()


def _cache_bytes(cache: Cache) -> int:
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors)


class _Tally(TorchDispatchMode):
    """Bytes of all storages that were made under it and still live; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if id(storage) not in given and storage not in self._seen:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size


class _Attention(TorchFunctionMode):
    """scaled_dot_product_attention as the fused kernels have it: no matrix of scores, but a mask in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self._fills_up = not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in _CUDNN)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        query, mask = named["query"], named.get("attn_mask")
        held = [query.new_empty(query.shape[:-1], dtype=torch.float32)]  # of each row its sum of exponentials
        if mask is not None and mask.dtype == torch.bool:
            held.append(query.new_empty(mask.shape))
            if mask.shape[-1] % _ALIGNED and self._fills_up:
                held.append(query.new_empty(*mask.shape[:-1], -(-mask.shape[-1] // _ALIGNED) * _ALIGNED))
        shape = (query.shape[0], query.shape[2], query.shape[1], named["value"].shape[-1])
        return query.new_empty(shape).transpose(1, 2)


@contextmanager
def _standing_in(source: SourceModel, rates: Rates | None) -> Iterator[None]:
    """The skeleton in the model's dtype, all on the meta device, with products that allocate what packed ones do."""
    model, dtype = source.model, _dtype(source)
    model.to(device="meta", dtype=dtype)
    codecs = _quantized(source, rates) if rates is not None else {}
    changed: list[nn.Module] = []

    def put(module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        changed.append(module)

    owners: dict[str, _Products] = {}
    for name, codec in codecs.items():
        module = source.module(name)
        if isinstance(module, nn.Embedding):
            put(module, _embedding(module, codec, dtype))
        elif isinstance(module, ExpertLinear):
            put(module, _experts)
        elif not (name == source.head and source.tied):
            put(module, owners.setdefault(name.rpartition(".")[0], _Products(codec)).forward)
    if model.config._attn_implementation != "sdpa":
        model.set_attn_implementation("sdpa")
    try:
        _step(model, 8, DynamicCache(config=source.config.get_text_config()))  # which products read the same x
        for products in owners.values():
            products.learn()
        yield
    finally:
        for module in changed:
            del module.forward


class _Products:
    """The packed layers of one module. Those that read the same x are one product, whose parts are views of it."""

    def __init__(self, codec: str) -> None:
        self._tile = tile_rows(get_codec(codec).group)
        self._calls: list[tuple[nn.Linear, Tensor]] = []
        self._groups: dict[int, list[nn.Linear]] | None = None
        self._waiting: dict[int, Tensor] = {}

    def learn(self) -> None:
        by_input: dict[int, list[nn.Linear]] = {}
        for layer, x in self._calls:
            by_input.setdefault(id(x), []).append(layer)
        self._groups = {id(layer): layers for layers in by_input.values() for layer in layers}
        self._calls = []

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if self._groups is None:
            self._calls.append((layer, x))
            return x.new_empty(*x.shape[:-1], layer.out_features)
        if id(layer) not in self._waiting:
            group = self._groups[id(layer)]
            tile = 1 if len(group) == 1 else self._tile  # joined, each has whole tiles
            rows = [-(-one.out_features // tile) * tile for one in group]
            parts = _product(x, sum(rows)).split(rows, -1)
            self._waiting |= {id(one): part[..., : one.out_features] for one, part in zip(group, parts, strict=True)}
        y = self._waiting.pop(id(layer))
        return y if layer.bias is None else y + layer.bias


def _product(x: Tensor, rows: int) -> Tensor:
    """y [..., rows], and memory that glq::matmul holds on the way: x rotated; with many tokens, weights in 16 bits.

    As on any GPU but Hopper, which has kernels of its own for up to 4,096 tokens and holds less.
    """
    tokens, cols = x.numel() // x.shape[-1], x.shape[-1]
    own_basis = tokens > DECODED and tokens >= own_basis_tokens(rows) and unrotates(block_width(cols))
    held = [] if own_basis else [x.new_empty(tokens, cols)]
    y = x.new_empty(*x.shape[:-1], rows)
    if tokens > DECODED:
        held.append(x.new_empty(min(rows * cols, max(WEIGHTS_AT_ONCE, 64 * cols))))
    return y


def _embedding(module: nn.Embedding, codec: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Rows of a packed matrix, by what glq::embedding does."""
    rows, width = module.num_embeddings, module.embedding_dim
    shapes = packed_shapes(codec, rows, width)
    codes, scale, signs = (
        torch.empty(shapes[key], dtype=PACKED_DTYPES[key], device="meta") for key in ("codes", "scale", "signs")
    )

    def forward(_: nn.Embedding, ids: Tensor) -> Tensor:
        parts = [
            embedding_reference(part, codes, scale, signs, codec, width, block_width(width))
            for part in ids.flatten().split(ROWS_AT_ONCE)
        ]
        return torch.cat(parts).to(dtype).view(*ids.shape, width)

    return forward


def _experts(module: ExpertLinear, x: Tensor, experts: Tensor) -> Tensor:
    """As ExpertLinear.forward, one row for each pair of a token and an expert."""
    held = x.new_empty(x.shape)  # rotated
    return held.new_empty(experts.numel(), module.weight.shape[1])
