"""Upstream checkpoints in numbers, and written as plain 16-bit models."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from glq.arguments import refuse_existing
from glq.errors import GlqError
from glq.experts import INNER, expert_shapes, is_experts, outer_name, part_names
from glq.hub import resolve
from glq.naming import Naming
from glq.progress import Listener, Progress, silent
from glq.upstream.placing import EXPERT, LEAVES, find_places
from glq.upstream.reader import UpstreamCheckpoint, check_sizes, read_upstream
from glq.writer import CheckpointWriter

_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")
_NOT_COPIED = ("config.json", "quantize_config.json", "layer_metrics.json", "bpw_allocation.json")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class UpstreamModel:
    """A checkpoint beside the skeleton of its model, which knows the sizes without padding."""

    def __init__(self, path: Path) -> None:
        self.checkpoint: UpstreamCheckpoint = read_upstream(path)
        try:
            config = AutoConfig.from_pretrained(path)
            del config.quantization_config
            with init_empty_weights():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            raise GlqError(
                f"{path}: transformers cannot build its model: {str(error).strip().splitlines()[0]}"
            ) from error
        self.places, self.conversions = find_places(self.model, self.checkpoint.layouts)

    @cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each quantized matrix. GlqError where they do not fit what is stored."""
        found = {}
        for name, place in self.places.items():
            if (experts := self.experts_of(place)) is None:
                rows, columns = self._weight(place).shape
            else:
                _, rows, columns = expert_shapes(*experts[:2])[experts[2]]
            check_sizes(self.checkpoint.layouts[name], rows, columns)
            found[name] = rows, columns
        return found

    def experts_of(self, place: str) -> tuple[str, nn.Module, str] | None:
        """For a matrix of stacked experts: their name and module, and which of its matrices it is."""
        match = EXPERT.fullmatch(place)
        if match is None or not is_experts(module := self.model.get_submodule(match[1])):
            return None
        return match[1], module, LEAVES.get(match[3], match[3])

    def _weight(self, place: str) -> Tensor:
        weight = self.model.get_submodule(place).weight
        assert isinstance(weight, Tensor)
        return weight


@dataclass(frozen=True)
class Overview:
    """What an upstream checkpoint stores, counted from its headers."""

    codebook: str
    layers: dict[str, int]  # matrices by their kinds of codes
    weights: int
    nbytes: int  # of quantized matrices, padding included
    other_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits a quantized weight, all included."""
        return 8 * self.nbytes / self.weights


def inspect_upstream(path: str | Path) -> Overview:
    """GlqError if the directory is no whole upstream checkpoint."""
    model = UpstreamModel(Path(path))
    checkpoint = model.checkpoint
    layers: dict[str, int] = {}
    for layout in checkpoint.layouts.values():
        kind = " + ".join(stage.kind for stage in layout.stages)
        layers[kind] = layers.get(kind, 0) + 1
    weights = sum(rows * columns for rows, columns in model.sizes.values())
    total = sum(nbytes for _, _, nbytes in checkpoint.headers.values())
    return Overview(checkpoint.config.codebook, layers, weights, checkpoint.nbytes, total - checkpoint.nbytes)


def convert(source: str | Path, out: str | Path, *, dense: bool = False, progress: Listener = silent) -> Path:
    """Write an upstream checkpoint anew: dense, as a plain model with its weights in the model's own 16 bits.

    Without `dense` it is a GlqError that says why its codes cannot be kept: no codec of glq can hold them.
    """
    path = resolve(source)
    refuse_existing(Path(out))
    model = UpstreamModel(path)
    if not dense:
        raise GlqError(_why_not(model))
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    del raw["quantization_config"]
    dtype = _DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16)
    with CheckpointWriter(Path(out)) as writer, torch.no_grad():
        total = len(model.places)
        for done, tensors in enumerate(_dense(model)):
            writer.add({name: tensor.to(dtype) for name, tensor in tensors.items()})
            progress(Progress("converting", min(done + 1, total), total, next(iter(tensors))))
        naming = Naming(model.model, model.conversions)
        checkpoint = model.checkpoint
        for name in sorted(checkpoint.files.keys() - checkpoint.packed_names):
            own = naming.target(name)[0] if model.conversions else name
            writer.add({own: checkpoint.read([name])[name]})
        for file in sorted({file for pattern in _COPIED for file in path.glob(pattern)}):
            if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
                writer.add_file(file)
        writer.add_json("config.json", raw)
        writer.commit()
    return Path(out)


def _why_not(model: UpstreamModel) -> str:
    name, layout = max(model.checkpoint.layouts.items(), key=lambda item: not item[1].embedding)
    return (
        f"the codes of these {len(model.places)} matrices cannot be kept: upstream mixes the rows of a matrix, too "
        f"(first {name}: {layout.rows}), which glq's layout cannot say, and no codec of glq has upstream's tables. It "
        "loads as it is; --dense writes it in 16 bits, which `glq quantize` takes"
    )


def _dense(model: UpstreamModel) -> Iterator[dict[str, Tensor]]:
    """The weights of quantized matrices by their names in files; of stacked experts, a layer's at once."""
    naming = Naming(model.model)
    stacked: dict[str, list[str]] = {}
    for name, place in model.places.items():
        experts = model.experts_of(place)
        if experts is not None and naming.target(f"{name}.weight")[1] is None:
            stacked.setdefault(experts[0], []).append(name)
            continue
        own = place if model.conversions else name
        yield {f"{own}.weight": model.checkpoint.weight(name, *model.sizes[name])}
    for place, names in stacked.items():
        yield _stack(model, place, names)


def _stack(model: UpstreamModel, place: str, names: list[str]) -> dict[str, Tensor]:
    """The 3-D parameters of a module of experts, in the form that it has them."""
    module: Any = model.model.get_submodule(place)
    found: dict[tuple[str, int], Tensor] = {}
    for name in names:
        match = re.fullmatch(r".+\.(\d+)\.(\w+)", name)
        assert match is not None
        found[LEAVES.get(match[2], match[2]), int(match[1])] = model.checkpoint.weight(name, *model.sizes[name])
    parent = place if model.conversions else names[0].rsplit(".", 2)[0]
    made = {}
    for parameter in (outer_name(module), INNER):
        rows = [
            torch.cat([found[part, expert] for part in part_names(parameter)]) for expert in range(module.num_experts)
        ]
        weight = torch.stack(rows)
        made[f"{parent}.{parameter}"] = weight.transpose(1, 2).contiguous() if module.is_transposed else weight
    return made
