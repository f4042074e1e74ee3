"""vLLM's names of modules: as its model has them, and which matrices of a checkpoint a layer is made of."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from glq.errors import GlqError

V = TypeVar("V")
JOINED = {"w13": "gate_up_proj", "w2": "down_proj"}  # matrices of gpt-oss's experts in a checkpoint, by vLLM's names


def renamed(named: Mapping[str, V], mapper: Any) -> dict[str, V]:
    """By the names that modules have in vLLM's model."""
    ended = {f"{name}.": value for name, value in named.items()}  # rules may name a dot on each side
    return {name.removesuffix("."): value for name, value in mapper.apply_dict(ended).items()}


def of_tensors(architecture: str, prefix: str, blocks: int) -> str:
    """The name that the tensors of a layer have which vLLM 0.32 calls `prefix`, where it is another."""
    if architecture == "FalconH1ForCausalLM":
        if found := re.fullmatch(r"(.*)\.(\d+)\.mixer(\..*)", prefix):  # Mamba's are counted after all others
            return f"{found[1]}.layers.{int(found[2]) - blocks}.mamba.mamba{found[3]}"
        return re.sub(r"(\.layers\.\d+)(\.(qkv|o)_proj)$", r"\1.self_attn\2", prefix)
    return prefix


def members(prefix: str, quantized: Mapping[str, Any], fused: Mapping[str, Sequence[str]]) -> list[str]:
    """The quantized matrices that a linear layer is made of; none if it is not quantized.

    fused: vLLM's packed_modules_mapping. GlqError where vLLM fuses one that is quantized with one that is not.
    """
    parent, _, last = prefix.rpartition(".")
    names = [prefix]
    if prefix not in quantized and last in fused:
        names = [f"{parent}.{name}" if parent else name for name in fused[last]]
    found = [name for name in names if name in quantized]
    if found and (lost := [name for name in names if name not in quantized]):
        raise GlqError(f"{prefix}: vLLM fuses {lost[0]}, which is not quantized, with {found[0]}, which is")
    return found
