"""QuantExperts in a transformers model, and how the tensors of a checkpoint come into them."""

from typing import Any

from torch import nn
from transformers.core_model_loading import MergeModulelist, WeightConverter

from glq.config import GlqConfig, ModuleConfig
from glq.errors import GlqError
from glq.experts import expert_shapes, is_experts
from glq.naming import Naming
from glq.packed import PACKED_DTYPES
from glq.quant_experts import QuantExperts


def keep_from_initializing(model: nn.Module, name: str) -> None:
    """Tell transformers that the module around a layer is whole: some fill the `weight` that a packed layer has not.

    Unless it has buffers that are computed then, and stored in no file.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if not parent._non_persistent_buffers_set:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def place_experts(model: nn.Module, config: GlqConfig, naming: Naming) -> list[WeightConverter]:
    """Put QuantExperts where the config has experts; the conversions that stack their tensors, one expert's each.

    GlqError where the config and the model do not fit.
    """
    found: dict[str, dict[str, ModuleConfig]] = {}
    endings: dict[str, str] = {}  # what a tensor's name has after the name of the experts' module → the part
    for entry, module in config.modules.items():
        if module.experts is not None:
            name, part = naming.place_of(entry)
            own = naming.renamed(f"{entry.replace('*', '0')}.weight").removesuffix(".weight")
            if not own.startswith(f"{name}.0.") or part in found.setdefault(name, {}):
                raise GlqError(f"{entry} has no place in {type(model).__name__}: config.json is not its own")
            found[name][part] = module
            endings[f"{name.rpartition('.')[2]}.*.{own.removeprefix(f'{name}.0.')}"] = part
    for name, modules in found.items():
        model.set_submodule(name, QuantExperts(_checked(model, name, modules), modules))
    return [
        WeightConverter([f"{ending}.{key}"], [f"{ending.partition('.')[0]}.{part}.{key}"], [MergeModulelist(dim=0)])
        for ending, part in endings.items()
        for key in PACKED_DTYPES
    ]


def _checked(model: nn.Module, name: str, modules: dict[str, ModuleConfig]) -> Any:
    """The experts of that name. GlqError if the config's do not fit them."""
    try:
        original: Any = model.get_submodule(name)
    except AttributeError:
        original = None
    if original is None or not is_experts(original):
        raise GlqError(f"{name} are no experts of {type(model).__name__}: config.json is not its own")
    shapes = expert_shapes(name, original)
    given = {part: (m.experts, m.out_features, m.in_features) for part, m in modules.items()}
    if given != shapes:
        raise GlqError(
            f"{name}: the checkpoint has experts, rows and columns {given}, the model {shapes}: config.json was changed"
        )
    return original
