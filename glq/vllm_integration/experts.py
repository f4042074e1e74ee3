"""How vLLM's experts keep packed weights and multiply by them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import (
    ApplyMoEActivationConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    UnquantizedFusedMoEMethod,
    apply_moe_activation,
)

from glq import nvrtc
from glq.config import ModuleConfig
from glq.errors import GlqError
from glq.ops.experts import experts_matmul
from glq.ops.prepare import prepare_experts
from glq.packed import PackedExperts
from glq.vllm_integration import methods
from glq.vllm_integration.parts import Part, Rank, cut, dequantize, runs

_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}  # vLLM's names for gate and up, and for down
_JOINED = {stem: (stem,) for stem in _SHARDS}  # where gate and up are one matrix, rows of both in turn


class GlqExpertsMethod(FusedMoEMethodBase):
    """The experts of a layer, `modules` by vLLM's names for their matrices: w1, w2 and w3, or w13 and w2."""

    def __init__(self, name: str, modules: dict[str, ModuleConfig], moe: Any) -> None:
        super().__init__(moe)
        self.name, self.modules = name, modules
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.shards = _JOINED if "w13" in modules else _SHARDS
        known = set(modules) == {name for names in self.shards.values() for name in names} and moe.is_act_and_mul
        if not known or moe.has_bias != (self.shards is _JOINED):
            raise GlqError(
                f"{name}: glq serves experts of a gate, an up and a down projection alone, and with biases gpt-oss's"
            )
        if any(module.experts != moe.num_logical_experts for module in modules.values()):
            raise GlqError(
                f"{name}: config.json has not the {moe.num_logical_experts} experts of the model: it was changed"
            )

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: Any, moe_parallel_config: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Tensors for this rank's experts, or its share of each. GlqError for a tensor-parallel size that does not fit.

        Codes [experts, bytes], the tiles of one part after another; scale [experts, rows]; signs [parts, columns / 8].
        """
        rank, inside = Rank(self.moe.tp_rank, self.moe.tp_size), intermediate_size_per_partition
        gate_up = {f"{self.name}.*.{key}": self.modules[key] for key in self.shards["w13"]}
        self.parts = {
            "w13": cut(gate_up, [2 * inside // len(gate_up)] * len(gate_up), hidden_size, rank),
            "w2": cut({f"{self.name}.*.w2": self.modules["w2"]}, [hidden_size], inside, rank),
        }
        config = get_current_vllm_config()
        self.tokens, dummy = config.scheduler_config.max_num_batched_tokens, config.load_config.load_format == "dummy"
        for stem, parts in self.parts.items():
            tensors = {
                "codes": torch.empty(num_experts, sum(part.nbytes for part in parts), dtype=torch.uint8),
                "scale": torch.empty(num_experts, sum(part.rows for part in parts), dtype=torch.float16),
                "signs": torch.zeros(len(parts), -(-parts[0].columns // 8), dtype=torch.uint8),
            }
            if dummy:
                tensors["codes"].random_()
            local = layer.expert_map_manager.map_global_to_local
            for key, tensor in tensors.items():
                param: Any = nn.Parameter(tensor, requires_grad=False)
                param.weight_loader = ExpertsLoader(key, parts, self.shards[stem], num_experts, local)
                param.glq_missing = set() if dummy else {(e, i) for e in range(num_experts) for i in range(len(parts))}
                layer.register_parameter(f"{stem}_{key}", param)
            if self.moe.has_bias:  # NaN until it comes
                bias = torch.full((num_experts, parts[0].rows), torch.nan, dtype=params_dtype)
                layer.register_parameter(f"{stem}_bias", nn.Parameter(bias, requires_grad=False))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded. On a CPU, for which there are no kernels, decode it, and leave the rest to vLLM.

        But not where ranks share out the experts: vLLM's kernel for CPUs does not know that it has not all of them.
        """
        for stem in self.shards:
            for key in ("codes", "scale", "signs"):
                if getattr(layer, f"{stem}_{key}").glq_missing:
                    raise GlqError(f"{self.name}: vLLM has not loaded its {stem} {key}: it gives them other names")
            if not torch.isfinite(getattr(layer, f"{stem}_scale")).all():
                raise GlqError(f"{self.name}: scales are NaN or infinite: the file is damaged, get it again")
            if self.moe.has_bias and not torch.isfinite(getattr(layer, f"{stem}_bias")).all():
                raise GlqError(f"{self.name}: biases are missing or not finite: the file is damaged, get it again")
        if methods.decodes_once() and layer.expert_map is None:
            self._decode(layer)
            return
        for stem, parts in self.parts.items():
            self._keep(layer, stem, parts)
        if layer.w2_signs.is_cuda and nvrtc.available():
            nvrtc.gpu(layer.w2_signs.device).arenas.graphs_in_turn = True  # of which vLLM captures a thousand
            top_k = self.moe.experts_per_token
            for products, each in ((layer.glq_w13, top_k), (layer.glq_w2, 1)):
                for p in products:
                    prepare_experts(packed(layer, p), layer.params_dtype, each, top_k, self.tokens)

    def _decode(self, layer: Any) -> None:
        for stem, parts in self.parts.items():
            codes, scale, signs = (getattr(layer, f"{stem}_{key}") for key in ("codes", "scale", "signs"))
            weights = [dequantize(c, s, signs, parts, layer.params_dtype) for c, s in zip(codes, scale, strict=True)]
            for key in ("codes", "scale", "signs"):
                delattr(layer, f"{stem}_{key}")
            layer.register_parameter(f"{stem}_weight", nn.Parameter(torch.stack(weights), requires_grad=False))
        layer.quant_method = UnquantizedFusedMoEMethod(layer.moe_config)
        layer.quant_method.process_weights_after_loading(layer)

    def _keep(self, layer: Any, stem: str, parts: tuple[Part, ...]) -> None:
        """Codes and scales of what one product takes each in a tensor of its own."""
        codes, scale = getattr(layer, f"{stem}_codes").data, getattr(layer, f"{stem}_scale").data
        found = []
        for i, run in enumerate(runs(parts, getattr(layer, f"{stem}_signs"))):
            tiles = codes[:, run.first_byte : run.end_byte].contiguous().view(len(codes), *run.tiles)
            rows = scale[:, run.first_row : run.end_row].contiguous()
            names = f"{stem}_codes_{i}", f"{stem}_scale_{i}", f"{stem}_signs"
            layer.register_parameter(names[0], nn.Parameter(tiles, requires_grad=False))
            layer.register_parameter(names[1], nn.Parameter(rows, requires_grad=False))
            found.append(Product(*names, run.signs, run.codec, parts[0].columns, run.block))
        delattr(layer, f"{stem}_codes")
        delattr(layer, f"{stem}_scale")
        setattr(layer, f"glq_{stem}", tuple(found))

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """For the activation; there are no scales that vLLM would have to know."""
        limits = {f"gemm1_{key}": getattr(layer, f"swiglu_{key}", None) for key in ("alpha", "beta")}
        return FusedMoEQuantConfig.make(gemm1_clamp_limit=getattr(layer, "swiglu_limit", None), **limits)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [tokens, hidden], topk_weights and topk_ids [tokens, k] → [tokens, hidden], this rank's share of it."""
        pairs = topk_ids.flatten()
        if layer.expert_map is not None:  # −1 where another rank has the expert: such a pair counts nothing
            pairs = layer.expert_map[pairs.long()]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        products = self._biased(layer, "w13", _multiply(layer, layer.glq_w13, x, pairs, topk_ids.shape[1]), pairs)
        inside = products.new_empty(products.shape[0], products.shape[1] // 2)
        config = ApplyMoEActivationConfig.from_configs(self.moe, self.get_fused_moe_quant_config(layer))
        apply_moe_activation(layer.activation, inside, products, activation_config=config)
        y = self._biased(layer, "w2", _multiply(layer, layer.glq_w2, inside, pairs, 1), pairs).view(*topk_ids.shape, -1)
        return torch.bmm(topk_weights.to(y.dtype)[:, None], y)[:, 0]

    def _biased(self, layer: Any, stem: str, products: Tensor, pairs: Tensor) -> Tensor:
        """[pairs, rows] with the bias of each pair's expert, if it is here."""
        if not self.moe.has_bias:
            return products
        return products + getattr(layer, f"{stem}_bias")[pairs.clamp(0).long()] * (pairs >= 0)[:, None]


@dataclass(frozen=True)
class Product:
    """What one product takes: the names of a layer's tensors, which of the signs, and the codec."""

    codes: str
    scale: str
    signs: str
    row: int
    codec: str
    columns: int
    block: int


def _multiply(layer: Any, products: tuple[Product, ...], x: Tensor, pairs: Tensor, each: int) -> Tensor:
    """x [pairs / each, in] → [pairs, rows of all products]."""
    done = []
    for p in products:
        w = packed(layer, p)
        done.append(experts_matmul(x, w.codes, w.scale, w.signs, pairs, each, p.codec, w.out_features, p.block))
    return done[0] if len(done) == 1 else torch.cat(done, 1)


def packed(layer: Any, p: Product) -> PackedExperts:
    """The experts' matrices that one product multiplies by, as a rank has them."""
    codes, scale, signs = getattr(layer, p.codes), getattr(layer, p.scale), getattr(layer, p.signs)[p.row]
    return PackedExperts(p.codec, scale.shape[1], p.columns, p.block, codes, scale, signs)


@dataclass(frozen=True)
class ExpertsLoader:
    """Copies a tensor of one expert into a layer's: what vLLM calls for each. A part's signs are those of all experts.

    The parameter's attribute glq_missing is the set of (expert, part) that have not come yet.
    """

    name: str  # of the layer's tensor: codes, scale or signs
    parts: tuple[Part, ...]
    shards: tuple[str, ...]  # vLLM's names for the parts
    experts: int  # on this rank
    local: Callable[[int], int]  # the number that an expert has on this rank, −1 if it is not there

    def __call__(
        self,
        param: Any,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        expert, i = self.local(expert_id), self.shards.index(shard_id)
        if expert >= 0:
            piece = getattr(self.parts[i], f"of_{self.name}")(loaded_weight)
            if self.name == "signs":
                begun = any((e, i) not in param.glq_missing for e in range(self.experts))
                if begun and not torch.equal(param.data[i], piece.to(param.device)):
                    raise GlqError(f"{weight_name}: a layer's experts have different signs: the file is damaged")
                param.data[i].copy_(piece)
            else:
                sizes = [part.rows if self.name == "scale" else part.nbytes for part in self.parts]
                param.data[expert].split(sizes)[i].copy_(piece.flatten())
            param.glq_missing.discard((expert, i))
        return expert >= 0 if return_success else None
