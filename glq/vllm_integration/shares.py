"""How many bytes each tensor-parallel rank of vLLM holds of a model, without vLLM.

What is packed is cut by parts.py, as vLLM's layers have it cut. Of the other tensors, those of layers that the model's
tensor-parallel plan in transformers names are cut likewise, embeddings and lm_head by their vocabulary, and the rest,
norms and routers, is whole on every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from glq.checkpoint import read_config
from glq.config import ModuleConfig
from glq.errors import GlqError
from glq.files import read_index, tensor_shapes
from glq.vllm_integration.parts import Part, Rank, cut, padded_vocabulary, vocabulary_part

Tensors = Mapping[str, tuple[tuple[int, ...], int]]  # by their names in files: shape, bytes


@dataclass(frozen=True)
class Share:
    """Bytes that one rank holds."""

    packed: int  # codes, scales and signs
    other: int

    @property
    def total(self) -> int:
        return self.packed + self.other


def checkpoint_shares(path: str | Path, ranks: int) -> list[Share]:
    """Of a checkpoint directory, for each rank. GlqError where vLLM would refuse this many."""
    from transformers import AutoConfig

    path = Path(path)
    modules = read_config(path).modules
    packed = {f"{name}.{key}" for e, m in modules.items() for name in m.names(e) for key in ("codes", "scale", "signs")}
    shapes = tensor_shapes(path, read_index(path))
    others = {name: (shape, nbytes) for name, (_, shape, nbytes) in shapes.items() if name not in packed}
    return shares(modules, AutoConfig.from_pretrained(path, trust_remote_code=False), others, ranks)


def shares(modules: Mapping[str, ModuleConfig], config: Any, others: Tensors, ranks: int) -> list[Share]:
    """Of a model with these quantized matrices and other tensors; config is transformers'."""
    if ranks < 1:
        raise GlqError(f"tensor-parallel ranks must be at least 1, found {ranks}")
    sharding = _Sharding(config.get_text_config(), ranks)
    other = sum(sharding.other_bytes(name, shape, nbytes) for name, (shape, nbytes) in others.items())
    return [
        Share(sum(sharding.packed_bytes(name, module, rank) for name, module in modules.items()), other)
        for rank in (Rank(i, ranks) for i in range(ranks))
    ]


class _Sharding:
    """How vLLM cuts the layers of one model."""

    def __init__(self, config: Any, ranks: int) -> None:
        self._ranks, self._vocabulary = ranks, config.vocab_size
        self._tied = bool(getattr(config, "tie_word_embeddings", False))
        self._heads = config.num_attention_heads
        self._kv_heads = getattr(config, "num_key_value_heads", None) or self._heads
        plan = getattr(config, "base_model_tp_plan", None) or {}
        self._plan = [(f"*.{pattern}", style) for pattern, style in plan.items() if "*" in pattern]  # of blocks
        if ranks > 1 and not plan:
            raise GlqError(f"transformers has no tensor-parallel plan for {config.model_type!r}: leave out --tp")
        if self._heads % ranks or (self._kv_heads % ranks and ranks % self._kv_heads):
            raise GlqError(
                f"{self._heads} attention heads with {self._kv_heads} of keys and values cannot be cut to {ranks} "
                "ranks: take another tensor-parallel size"
            )
        if padded_vocabulary(config.vocab_size) % ranks:
            raise GlqError(
                f"a vocabulary of {config.vocab_size}, padded to {padded_vocabulary(config.vocab_size)}, cannot be cut "
                f"to {ranks} equal shares: take another tensor-parallel size"
            )

    def packed_bytes(self, name: str, module: ModuleConfig, rank: Rank) -> int:
        """Of one entry of the config. The experts of a layer share their signs."""
        if module.experts is None:
            return sum(part.nbytes + part.scale_bytes + part.signs_bytes for part in self._parts(name, module, rank))
        parts = self._expert_parts(name, module, rank)
        return sum(module.experts * (part.nbytes + part.scale_bytes) + part.signs_bytes for part in parts)

    def other_bytes(self, name: str, shape: tuple[int, ...], nbytes: int) -> int:
        """Of a tensor that is not packed, on every rank."""
        layer, _, kind = name.rpartition(".")
        if self._tied and layer.endswith("lm_head"):
            return 0  # a copy of the embeddings, which vLLM does not load
        if len(shape) == 2 and shape[0] == self._vocabulary:
            return nbytes // shape[0] * (padded_vocabulary(shape[0]) // self._ranks)
        style = self._style(layer)
        if style == "columns":
            return nbytes // shape[0] * sum(self._rows(layer, shape[0]))
        if style == "rows" and kind == "weight":
            return nbytes // self._ranks
        return nbytes

    def _parts(self, name: str, module: ModuleConfig, rank: Rank) -> tuple[Part, ...]:
        style, out, width = self._style(name), module.out_features, module.in_features
        if style is None and out == self._vocabulary:
            return (vocabulary_part(name, module, padded_vocabulary(out), rank),)
        rows = self._rows(name, out) if style == "columns" else [out]
        return cut({name: module}, rows, width // rank.size if style == "rows" else width, rank)

    def _expert_parts(self, name: str, module: ModuleConfig, rank: Rank) -> tuple[Part, ...]:
        """Each rank has a share of every expert: of what gate and up give, and of what down reads."""
        out, width = module.out_features, module.in_features
        if name.rpartition(".")[2] in ("down_proj", "w2"):
            return cut({name: module}, [out], width // rank.size, rank)
        return cut({name: module}, [out // rank.size], width, rank)

    def _style(self, layer: str) -> str | None:
        """ "columns" and "rows", as column- and row-parallel layers are called, or None for what is not cut."""
        found = next((style for pattern, style in self._plan if fnmatchcase(layer, pattern)), "")
        return {"colwise": "columns", "rowwise": "rows"}.get(found.partition("_")[0])

    def _rows(self, layer: str, out: int) -> list[int]:
        """Of each output of a column-parallel layer, on one rank: a head of keys or values is not cut."""
        own, kv_own = self._heads // self._ranks, max(1, self._kv_heads // self._ranks)
        leaf = layer.rpartition(".")[2]
        if leaf in ("k_proj", "v_proj"):
            return [out // self._kv_heads * kv_own]
        if leaf == "qkv_proj":
            size = out // (self._heads + 2 * self._kv_heads)
            return [size * own, size * kv_own, size * kv_own]
        if leaf == "gate_up_proj":
            return [out // 2 // self._ranks] * 2
        return [out // self._ranks]
