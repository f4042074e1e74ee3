"""Upstream's matrices in a transformers model: layers put where the files have codes, settled once they are loaded."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from glq.embedding import embedding_scale
from glq.errors import GlqError
from glq.experts import INNER, expert_shapes, is_experts
from glq.naming import Naming
from glq.placing import keep_from_initializing
from glq.upstream.format import Layout, UpstreamConfig
from glq.upstream.linear import UpstreamEmbedding, UpstreamExperts, UpstreamLayer, UpstreamLinear, pair
from glq.upstream.reader import UpstreamCheckpoint, check_sizes

EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+)")
LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": INNER}  # Mixtral's names


class UpstreamPlacing:
    """What is put into a model for an upstream checkpoint, and what has to be done when its tensors are there.

    conversions: renamings beside the model's own, for files whose names lack or have a prefix that the model has not.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, config: UpstreamConfig) -> None:
        """GlqError where files and model do not fit."""
        self.checkpoint = UpstreamCheckpoint(folder, config)
        self._dense: dict[str, str] = {}  # parameters of modules that are no linear layers → names in the files
        self._biases: list[str] = []
        layouts = self.checkpoint.layouts
        places, self.conversions = find_places(model, layouts)
        experts: dict[str, dict[tuple[int, str], str]] = {}
        for name, place in places.items():
            match = EXPERT.fullmatch(place)
            if match and is_experts(model.get_submodule(match[1])):
                experts.setdefault(match[1], {})[int(match[2]), match[3]] = name
            else:
                self._put(model, place, layouts[name])
        for place, names in experts.items():
            self._put_experts(model, place, names)
        self._refuse_missing(model, Naming(model, self.conversions))
        self._ignore_dense(model)
        if self._biases:
            warnings.warn(
                f"upstream glq leaves out the biases of quantized layers: those of {len(self._biases)} layers, first "
                f"{self._biases[0]}, count as zeros",
                stacklevel=2,
            )

    def _put(self, model: PreTrainedModel, place: str, layout: Layout) -> None:
        original: Any = model.get_submodule(place)
        rows, columns = original.weight.shape
        check_sizes(layout, rows, columns)
        tables = self.checkpoint.tables
        if isinstance(original, nn.Embedding) != layout.embedding:
            raise GlqError(
                f"{layout.name}: a {type(original).__name__} cannot hold what the files have: config.json is not theirs"
            )
        with torch.device("meta"):
            if isinstance(original, nn.Embedding):
                factor, dtype = embedding_scale(original), original.weight.dtype
                model.set_submodule(place, UpstreamEmbedding(layout, tables, rows, columns, factor, dtype))
                return
            if not isinstance(original, nn.Linear) or type(original).forward is not nn.Linear.forward:
                self._dense[f"{place}.weight"] = layout.name
                return
            model.set_submodule(place, UpstreamLinear(layout, tables, rows, columns))
            keep_from_initializing(model, place)
        if original.bias is not None and "bias" not in layout.tensors:
            self._biases.append(layout.name)

    def _put_experts(self, model: PreTrainedModel, place: str, names: dict[tuple[int, str], str]) -> None:
        original: Any = model.get_submodule(place)
        shapes = expert_shapes(place, original)
        if original.has_bias or not original.is_concatenated:
            raise GlqError(f"{place}: {type(original).__name__} are experts that upstream glq does not quantize")
        leaves = {LEAVES.get(leaf, leaf): leaf for _, leaf in names}
        wanted = {(e, part) for part, (count, _, _) in shapes.items() for e in range(count)}
        found = {(e, LEAVES.get(leaf, leaf)): name for (e, leaf), name in names.items()}
        if found.keys() != wanted or len(leaves) != len(shapes):
            odd = min(found.keys() ^ wanted)
            raise GlqError(
                f"{place}: the model has {len(wanted)} matrices of experts, the checkpoint {len(found)}; they differ "
                f"in {odd[1]} of expert {odd[0]}: config.json is not its own, or files are missing"
            )
        layouts = {key: self.checkpoint.layouts[name] for key, name in found.items()}
        for (_, part), layout in layouts.items():
            check_sizes(layout, *shapes[part][1:])
        with torch.device("meta"):
            made = UpstreamExperts(original, layouts, shapes, leaves, self.checkpoint.tables)
        model.set_submodule(place, made)

    def _refuse_missing(self, model: PreTrainedModel, naming: Naming) -> None:
        """transformers fills tensors that a checkpoint lacks with random values."""
        found = naming.origins(self.checkpoint.files).keys()
        tied = getattr(model, "all_tied_weights_keys", {})
        missing = [n for n in model.state_dict() if n not in found and n not in tied and n not in self._dense]
        if missing:
            raise GlqError(
                f"{self.checkpoint.path} lacks {len(missing)} tensors of a {type(model).__name__}, first {missing[0]}: "
                "the checkpoint is incomplete, or was made for another model class"
            )

    def _ignore_dense(self, model: PreTrainedModel) -> None:
        """transformers need not say that it misses these, nor that it does not know what the files have instead."""
        for kind, names in (("missing", self._dense.keys()), ("unexpected", self._dense.values())):
            key = f"_keys_to_ignore_on_load_{kind}"
            setattr(model, key, set(getattr(model, key, None) or ()) | {rf"^{re.escape(name)}(\.|$)" for name in names})

    def settle(self, model: PreTrainedModel) -> None:
        """Check what was loaded, find what was quantized as one, and fill what cannot hold codes."""
        for name, module in model.named_modules():
            if isinstance(module, UpstreamLayer):
                if any(buffer.is_meta for buffer in module.buffers()):
                    raise GlqError(f"{name} was not loaded: upstream checkpoints cannot be offloaded to disk")
                module.settle()
        for module in model.modules():
            for gate, up in (("gate_proj", "up_proj"), ("w1", "w3")):
                pair_of = module._modules.get(gate), module._modules.get(up)
                if isinstance(pair_of[0], UpstreamLinear) and isinstance(pair_of[1], UpstreamLinear):
                    pair(pair_of[0], pair_of[1])
        for name, stored in self._dense.items():
            parameter = model.get_parameter(name)
            parameter.data.copy_(self.checkpoint.weight(stored, *parameter.shape))


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put plain layers in the place of all that hold an upstream matrix."""
    for kind in (UpstreamExperts, UpstreamLinear | UpstreamEmbedding):  # linear layers of experts go with these
        for name, module in [found for found in model.named_modules() if isinstance(found[1], kind)]:
            model.set_submodule(name, module.dequantize(dtype))
    model._weight_conversions = None  # the model's own hold from here on


def find_places(model: PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, str], list[Any]]:
    """Where in a model each quantized module of the files is, and the renamings that this takes beside its own.

    What the model's class ignores has no place: Gemma's later layers once had projections that nothing read. GlqError
    for anything else without one.
    """
    conversions: list[Any] = []
    naming = Naming(model)
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    places = {name: _place(model, naming, name) for name in names}
    for name in [name for name, place in places.items() if place is None]:
        if any(pattern.search(name) for pattern in ignored):
            del places[name]
    if lost := [name for name, place in places.items() if place is None]:
        conversions = [_renaming(model, naming, max(lost, key=lambda name: name.count(".")))]
        naming = Naming(model, conversions)
        places = {name: _place(model, naming, name) for name in places}
    if lost := [name for name, place in places.items() if place is None]:
        raise _no_place(model, lost[0])
    return {name: place for name, place in places.items() if place is not None}, conversions


def _place(model: nn.Module, naming: Naming, name: str) -> str | None:
    """The name in the model of a quantized module of the files; None if there is none."""
    renamed = naming.renamed(f"{name}.weight").removesuffix(".weight")
    target, converter, _ = naming.target(f"{name}.weight")
    candidates = [renamed, name] if converter is not None else [target.removesuffix(".weight"), renamed, name]
    prefix = f"{naming.model.base_model_prefix}."
    candidates += [f"{prefix}{renamed}", renamed.removeprefix(prefix)]
    return next((candidate for candidate in candidates if _holds(model, candidate)), None)


def _holds(model: nn.Module, name: str) -> bool:
    """Whether a model has a matrix of that name, perhaps as one of stacked experts."""
    match = EXPERT.fullmatch(name)
    for place in (name, match[1] if match else name):
        try:
            module = model.get_submodule(place)
        except AttributeError:
            continue
        weight = getattr(module, "weight", None)
        if is_experts(module) or (place == name and isinstance(weight, nn.Parameter) and weight.ndim == 2):
            return True
    return False


def _renaming(model: PreTrainedModel, naming: Naming, name: str) -> WeightRenaming:
    """For files whose names have another beginning than the model's: found by the longest common ending.

    GlqError if there is nothing of the kind.
    """
    own = naming.renamed(f"{name}.weight").split(".")[:-1]
    best, size = "", 0
    for candidate in _holders(model):
        common = _common_ending(own, candidate.split("."))
        if common > size:
            best, size = candidate, common
    old, new = own[: len(own) - size], best.split(".")[: len(best.split(".")) - size]
    if size < 3:  # the number of a layer, an attention or MLP, and a projection at least
        raise _no_place(model, name)
    return WeightRenaming("^" + "".join(rf"{re.escape(part)}\." for part in old), "".join(f"{part}." for part in new))


def _no_place(model: nn.Module, name: str) -> GlqError:
    kind = type(model).__name__
    return GlqError(f"{name} is quantized, but no layer of {kind}: the checkpoint was made for another model class")


def _holders(model: nn.Module) -> Iterable[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name
        elif is_experts(module):
            yield from (f"{name}.0.{part}" for part in expert_shapes(name, module))


def _common_ending(a: list[str], b: list[str]) -> int:
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1
    return common
