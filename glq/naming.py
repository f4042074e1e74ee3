"""Names in a model's files and in the module that transformers builds: it renames, stacks and splits on loading."""

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from glq.experts import part_names


@dataclass
class Origin:
    """Where a parameter comes from: tensors of the files, by the patterns of the converter that joins them, if any."""

    converter: Any = None
    keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]


class Naming:
    """How transformers takes the tensors of files for the parameters of `model`, a skeleton with its own modules."""

    def __init__(self, model: PreTrainedModel, more: Sequence[Any] = ()) -> None:
        """more: conversions beside the model's own."""
        self.model = model
        transforms = [*get_model_conversion_mapping(model), *more]
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._known = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}

    def renamed(self, key: str) -> str:
        """A tensor's name after transformers' renamings, before anything is joined."""
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    def target(self, key: str) -> tuple[str, Any, str | None]:
        """The parameter that a tensor of the files is for, or part of; by which converter and which of its patterns."""
        if key in self._known:
            return key, None, None
        name = self.renamed(key)
        for converter in self._converters:
            joined, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return self._with_prefix(joined), converter, pattern
        return self._with_prefix(name), None, None

    def origins(self, keys: Iterable[str]) -> dict[str, Origin]:
        """Where each parameter that these tensors make comes from, by its name."""
        found: dict[str, Origin] = {}
        for key in sorted(keys, key=_by_number):
            name, converter, pattern = self.target(key)
            origin = found.setdefault(name, Origin(converter))
            origin.keys.setdefault(pattern or key, []).append(key)
            for other in converter.target_patterns[1:] if converter is not None else ():
                found[name.replace(converter.target_patterns[0], other)] = origin
        return found

    def join(self, name: str, origin: Origin, tensors: dict[str, Tensor]) -> Tensor:
        """A parameter from the tensors of its origin, as transformers makes it."""
        converter = deepcopy(origin.converter)
        first = name
        for other in converter.target_patterns[1:]:
            first = first.replace(other, converter.target_patterns[0])
        for pattern, keys in origin.keys.items():
            for key in keys:
                converter.add_tensor(first, key, pattern, tensors[key])
        made = converter.convert(first, model=self.model, config=self.model.config)[name]
        return made[0] if isinstance(made, list) else made

    def place_of(self, entry: str) -> tuple[str, str]:
        """The module of experts that a name with * for their number belongs to, and which of their matrices it is."""
        first = f"{entry.replace('*', '0')}.weight"
        parameter, converter, pattern = self.target(first)
        name, _, own = parameter.rpartition(".")
        if converter is None:
            name, _, own = self.renamed(first).removesuffix(".weight").rpartition(".0.")
            return name, own
        patterns, parts = converter.source_patterns, part_names(own)
        return name, parts[patterns.index(pattern)] if len(patterns) == len(parts) else own

    def expert_entries(self, parameter: str, origin: Origin, count: int, concatenated: bool) -> tuple[str, ...]:
        """Names for the matrices of each expert of a 3-D parameter, with * for its number; none if there is no way.

        Those of the files where these hold the experts one by one: then whatever loads the original finds these, too.
        """
        experts, _, own = parameter.rpartition(".")
        parts = part_names(own, concatenated)
        patterns = [p for p in getattr(origin.converter, "source_patterns", ()) if p in origin.keys]
        starred = [_starred(origin.keys[p], count).removesuffix(".weight") for p in patterns]
        stored = origin.names[0].removesuffix(f".{own}")
        for names in (starred, *([f"{name}.*.{part}" for part in parts] for name in (stored, experts))):
            whole = len(names) == len(parts) and all(names)
            if whole and [self.place_of(name) for name in names] == [(experts, part) for part in parts]:
                return tuple(names)
        return ()

    def _with_prefix(self, name: str) -> str:
        prefix = f"{self.model.base_model_prefix}."
        if name in self._known:
            return name
        if f"{prefix}{name}" in self._known:
            return f"{prefix}{name}"
        return name.removeprefix(prefix) if name.removeprefix(prefix) in self._known else name


def _starred(keys: list[str], count: int) -> str:
    """The one name with * that stands for `count` keys, the experts' numbers in its place; nothing if there is none."""
    for match in reversed(list(re.finditer(r"\.0(?=\.)", keys[0]))):
        name = f"{keys[0][: match.start()]}.*{keys[0][match.end() :]}"
        if keys == [name.replace("*", str(e)) for e in range(count)]:
            return name
    return ""


def _by_number(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
