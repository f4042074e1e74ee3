"""The model to quantize, read piece by piece: its skeleton on the meta device, its decoder blocks one at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from glq.errors import GlqError
from glq.files import read_index


class SourceModel:
    """A causal language model in safetensors, of any architecture that transformers builds from a config.

    `model` is its skeleton with parameters on the meta device; `blocks` are the names of its decoder blocks.
    Raises GlqError for a directory that is not a whole model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self.files = read_index(path)  # tensor name -> file name
        try:
            with init_empty_weights():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            raise GlqError(
                f"{path}: transformers cannot build a causal language model of type {self.config.model_type!r}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        self.model.eval().requires_grad_(False)
        self.blocks = _find_blocks(self.model, self.config.model_type)
        self.replaced: dict[str, Tensor] = {}  # tensors that `read` returns instead of those in the files
        self._check_complete()

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def read(self, name: str) -> Tensor:
        """One tensor of the files, in its stored dtype, on the CPU."""
        if name in self.replaced:
            return self.replaced[name]
        file = self.path / self.files[name]
        try:
            with safe_open(file, "pt") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise GlqError(f"{file} is damaged ({error}): download the model again") from error

    @property
    def embeddings(self) -> str:
        """Name of the input embeddings."""
        return self._name(self.model.get_input_embeddings())

    @property
    def head(self) -> str:
        """Name of the lm_head."""
        return self._name(self.model.get_output_embeddings())

    @property
    def tied(self) -> bool:
        """Whether embeddings and lm_head are one matrix."""
        return self.stored_name(f"{self.head}.weight") == self.stored_name(f"{self.embeddings}.weight")

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers of the decoder blocks."""
        modules = ((b, self.module(b)) for b in self.blocks)
        return [f"{b}.{n}" for b, block in modules for n, m in block.named_modules() if isinstance(m, nn.Linear)]

    @cached_property
    def row_parallel(self) -> frozenset[str]:
        """Names of the layers whose input tensor-parallel ranks share out, by the model's plan in transformers."""
        plan = getattr(self.config.get_text_config(), "base_model_tp_plan", None) or {}
        patterns = [f"*.{pattern}" for pattern, style in plan.items() if style.startswith("rowwise")]
        return frozenset(name for name in self.layers if any(fnmatchcase(name, pattern) for pattern in patterns))

    def as_linear(self, name: str, device: torch.device) -> dict[str, nn.Linear]:
        """The matrix of embeddings or lm_head [vocabulary, hidden] as a linear layer in fp32, under its name."""
        weight = self.read(self.stored_name(f"{name}.weight")).to(device, torch.float32)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return {name: layer}

    def _name(self, module: nn.Module) -> str:
        return next(name for name, candidate in self.model.named_modules() if candidate is module)

    def load(self, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Give the submodule `name` its weights, cast to dtype. GlqError for NaN or infinite ones."""
        module = self.module(name)
        prefix = name + "." if name else ""
        for key, parameter in list(module.named_parameters()):
            if parameter.device.type != "meta":
                continue
            stored = self.stored_name(prefix + key)
            value = self.read(stored)
            if value.shape != parameter.shape:
                raise GlqError(
                    f"{stored} in {self.path}: expected shape {list(parameter.shape)} from config.json, found "
                    f"{list(value.shape)}: config and weights do not belong together"
                )
            if not torch.isfinite(value).all():
                raise GlqError(f"{stored} in {self.path} holds NaN or infinite values: the model is broken")
            _set(module, key, nn.Parameter(value.to(device, dtype), requires_grad=False))
        for key, buffer in list(module.named_buffers()):
            if prefix + key in self.files:
                buffer = self.read(prefix + key)
            _set(module, key, buffer.to(device))
        return module

    def unload(self, name: str) -> None:
        """Drop the weights of the submodule `name` again."""
        module = self.module(name)
        for key, parameter in list(module.named_parameters()):
            _set(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def stored_name(self, name: str) -> str:
        """The name under which the files hold a parameter: its own, or that of the one it is tied to."""
        if name in self.files:
            return name
        tied = getattr(self.model, "all_tied_weights_keys", {})
        for a, b in tied.items():
            other = b if a == name else a if b == name else None
            if other in self.files:
                return other
        return name

    @contextmanager
    def outside_blocks(self, device: torch.device, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
        """The model with everything but the decoder blocks and the lm_head loaded, for as long as the context lasts."""
        head = self.model.get_output_embeddings()
        skip = {id(p) for b in self.blocks for p in self.module(b).parameters()}
        skip |= {id(p) for p in head.parameters()} if head is not None else set()
        skip -= {id(p) for p in self.model.get_input_embeddings().parameters()}
        owners = [
            name
            for name, module in self.model.named_modules()
            if any(id(p) not in skip for p in module.parameters(recurse=False)) or list(module.buffers(recurse=False))
        ]
        outside = [name for name in owners if not any(name == b or name.startswith(b + ".") for b in self.blocks)]
        for name in outside:
            self.load(name, device, dtype)
        try:
            yield self.model
        finally:
            for name in outside:
                self.unload(name)

    def _check_complete(self) -> None:
        names = [self.stored_name(name) for name, _ in self.model.named_parameters()]
        missing = sorted({name for name in names if name not in self.files})
        if missing:
            raise GlqError(
                f"{self.path} lacks {len(missing)} of the tensors of a {self.config.model_type!r} model, first "
                f"{missing[0]}: the directory is incomplete, or this architecture's naming is not supported yet"
            )


def _read_config(path: Path) -> PretrainedConfig:
    file = path / "config.json"
    if not file.is_file():
        raise GlqError(f"{path} has no config.json: it is not a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if "quantization_config" in raw:
            method = raw["quantization_config"].get("quant_method")
            raise GlqError(f"{path} is quantized already (quant_method {method!r}): give the original model")
        return AutoConfig.from_pretrained(path)
    except GlqError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise GlqError(f"{file} is not a config that transformers reads: {first}") from error


def _find_blocks(model: nn.Module, model_type: str) -> list[str]:
    """The decoder blocks: the elements of the module list with the most weights in linear layers."""
    best, size, length = "", 0, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            count = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
            if count > size and not (best and name.startswith(best + ".")):
                best, size, length = name, count, len(module)
    if not best:
        raise GlqError(
            f"no decoder blocks with linear layers were found in a {model_type!r} model: it is not supported"
        )
    return [f"{best}.{i}" for i in range(length)]


def _set(module: nn.Module, key: str, value: Tensor) -> None:
    *path, leaf = key.split(".")
    owner = module.get_submodule(".".join(path))
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
