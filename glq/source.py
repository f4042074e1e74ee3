"""The model to quantize, read piece by piece: its skeleton on the meta device, its decoder blocks one at a time."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

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

from glq import mxfp4
from glq.errors import GlqError
from glq.experts import (
    DenseExperts,
    ExpertLinear,
    is_experts,
    matrices_of,
    quantizable,
    refuse_other_experts,
    refuse_unknown,
    why_not,
)
from glq.files import read_index, read_json, tensor_shapes
from glq.naming import Naming, Origin
from glq.rounding import all_finite
from glq.shards import read_ahead


class SourceModel:
    """A causal language model in safetensors, of any architecture that transformers builds from a config.

    `model` is its skeleton with parameters on the meta device, in which the products of experts are modules of their
    own (DenseExperts); `blocks` are the names of its decoder blocks. Layers have the names that the files give them.
    Raises GlqError for a directory that is not a whole model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self._stored = read_index(path)  # tensor name -> file name
        self._packed = mxfp4.find_packed(self._stored) if _quant_method(path) == mxfp4.METHOD else {}
        self.files = self._unpacked_names()  # the same, with parameters in the place of what they are packed in
        try:
            with init_empty_weights():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            raise GlqError(
                f"{path}: transformers cannot build a causal language model of type {self.config.model_type!r}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        self.model.eval().requires_grad_(False)
        self._naming = Naming(self.model)
        self._origins = self._naming.origins(self.files)
        self._split_experts()
        self.blocks = _find_blocks(self.model, self.config.model_type)
        for block in self.blocks:
            refuse_other_experts(block, self.module(block))
        self.left: dict[str, str] = {}  # layers of blocks that were found to have to stay as they are, and why
        self.block_output: Callable[[Tensor], Any] = lambda x: x  # what a block returns for its hidden states
        self.replaced: dict[str, Tensor] = {}  # tensors that `read` returns instead of those in the files
        self._check_complete()

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def read(self, name: str) -> Tensor:
        """One tensor of the files, in its stored dtype, on the CPU."""
        return self.replaced[name] if name in self.replaced else self._read_all([name])[name]

    def _read_all(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors of the files, each file opened once: experts are many."""
        parts = {name: self._packed.get(name, (name,)) for name in names}
        stored = [part for of_one in parts.values() for part in of_one]
        found: dict[str, Tensor] = {}
        for file in sorted({self._stored[name] for name in stored}):
            try:
                with safe_open(self.path / file, "pt") as f:
                    found |= {name: f.get_tensor(name) for name in stored if self._stored[name] == file}
            except (SafetensorError, OSError) as error:
                raise GlqError(f"{self.path / file} is damaged ({error}): download the model again") from error
        for name in self._packed.keys() & parts.keys():
            blocks, scales = self._packed[name]
            found[name] = mxfp4.decode(name, found.pop(blocks), found.pop(scales))
        return found

    def _unpacked_names(self) -> dict[str, str]:
        hidden = {part for parts in self._packed.values() for part in parts}
        files = {name: file for name, file in self._stored.items() if name not in hidden}
        return files | {name: self._stored[blocks] for name, (blocks, _) in self._packed.items()}

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
    def layers(self) -> dict[str, int]:
        """The layers of the decoder blocks that can be quantized, by name; how many inputs each has."""
        modules = [(f"{b}.{n}", m) for b in self.blocks for n, m in quantizable(self.module(b))]
        return {e: module.in_features for n, module in modules if n not in self.left for e in self.entries(n, module)}

    def unquantized(self, stored: Collection[str]) -> dict[str, str]:
        """The matrices that are not among those stored, and why; linear layers by the names of their modules."""
        reasons = {}
        for name, module in self.model.named_modules():
            block = next((b for b in self.blocks if name.startswith(f"{b}.") or name == b), None)
            if isinstance(module, nn.Linear) and self.entries(name, module)[0] not in stored:
                other = "is outside of the decoder blocks" if block is None else why_not(module) or "routes to experts"
                reasons[name] = self.left.get(name, other)
            elif block is not None and not isinstance(module, nn.Linear | ExpertLinear):
                kind = type(module).__name__
                reasons |= {f"{name}.{key}": f"is a matrix of a {kind}, no linear layer" for key in matrices_of(module)}
        return reasons

    def entries(self, name: str, module: nn.Module) -> tuple[str, ...]:
        """The names that a layer's matrices have in files, without the ending; with * for the number of an expert."""
        if isinstance(module, ExpertLinear):
            return module.entries
        return (self.stored_name(f"{name}.weight").removesuffix(".weight"),)

    def files_of(self, entries: Iterable[str]) -> set[str]:
        """The tensors of the files that hold the weights of these layers."""
        linears = ((f"{b}.{n}", m) for b in self.blocks for n, m in quantizable(self.module(b)))
        owners = {entry: name for name, module in linears for entry in self.entries(name, module)}
        names = (self.stored_name(f"{owners.get(entry, entry)}.weight") for entry in entries)
        return {key for name in names for key in self._origin(name).names}

    def bytes_beside(self, entries: Iterable[str]) -> int:
        """What the files hold beside the weights of these layers."""
        replaced = {part for name in self.files_of(entries) for part in self._packed.get(name, (name,))}
        headers = tensor_shapes(self.path, self._stored)
        return sum(nbytes for name, (_, _, nbytes) in headers.items() if name not in replaced)

    @cached_property
    def row_parallel(self) -> frozenset[str]:
        """Names of the layers whose input tensor-parallel ranks share out, by the model's plan in transformers."""
        plan = getattr(self.config.get_text_config(), "base_model_tp_plan", None) or {}
        patterns = [f"*.{pattern}" for pattern, style in plan.items() if style.startswith("rowwise")]
        found = {name for name in self.layers if any(fnmatchcase(name, pattern) for pattern in patterns)}
        experts = [module for module in self.model.modules() if isinstance(module, DenseExperts) and found]
        return frozenset(found.union(*(module.products[1].entries for module in experts)))

    def as_linear(self, name: str, device: torch.device) -> dict[str, nn.Linear]:
        """The matrix of embeddings or lm_head [vocabulary, hidden] as a linear layer in fp32, under its name."""
        weight = self.read(self.stored_name(f"{name}.weight")).to(device, torch.float32)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return {name: layer}

    def _name(self, module: nn.Module) -> str:
        return next(name for name, candidate in self.model.named_modules() if candidate is module)

    def load(self, name: str, device: torch.device, dtype: torch.dtype, rows: Tensor | None = None) -> nn.Module:
        """Give the submodule `name` its weights, cast to dtype. GlqError for NaN or infinite ones.

        rows: of a matrix that are needed; the others are not filled in, and take no memory on a CPU.
        """
        module = self.module(name)
        prefix = name + "." if name else ""
        for key, parameter in list(module.named_parameters()):
            if parameter.device.type != "meta":
                continue
            stored = self.stored_name(prefix + key)
            value = self._read_parameter(stored)
            if stored in self._transposed:
                value = value.transpose(1, 2)
            if value.shape != parameter.shape:
                raise GlqError(
                    f"{stored} in {self.path}: expected shape {list(parameter.shape)} from config.json, found "
                    f"{list(value.shape)}: config and weights do not belong together"
                )
            some = rows if value.ndim == 2 else None
            if some is None:
                value = value.to(device)  # as it is stored: a GPU checks and casts it sooner
            if not all_finite(value):
                raise GlqError(f"{stored} in {self.path} holds NaN or infinite values: the model is broken")
            if some is None:
                value = value.to(dtype)
            else:
                read, value = value, torch.empty(value.shape, device=device, dtype=dtype)
                value[some.to(device)] = read[some].to(device, dtype)
            _set(module, key, nn.Parameter(value, requires_grad=False))
        for key, buffer in list(module.named_buffers()):
            if prefix + key in self._origins:
                buffer = self._read_parameter(prefix + key)
            _set(module, key, buffer.to(device))
        return module

    def expect(self, name: str) -> Thread:
        """Have a thread read ahead what `load` will read of a submodule, into memory that the system has to spare."""
        keys = (f"{name}.{key}" for key, _ in self.module(name).named_parameters())
        read = {part for key in keys for part in self._origin(self.stored_name(key)).names}
        parts = {part for own in read for part in self._packed.get(own, (own,))}

        def work() -> None:
            with suppress(OSError, ValueError, KeyError, TypeError):  # `load` will say so
                for file in sorted({self._stored[part] for part in parts}):
                    read_ahead(self.path / file, parts)

        thread = Thread(target=work, daemon=True)
        thread.start()
        return thread

    def unload(self, name: str) -> None:
        """Drop the weights of the submodule `name` again."""
        module = self.module(name)
        for key, parameter in list(module.named_parameters()):
            _set(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def stored_name(self, name: str) -> str:
        """The name under which the files hold a parameter: its own there, or that of the one it is tied to.

        Where several tensors make a parameter, it is the parameter's.
        """
        tied = getattr(self.model, "all_tied_weights_keys", {})
        others = [b if a == name else a for a, b in tied.items() if name in (a, b)]
        for candidate in (name, self._parameters.get(name, name), *others):
            if candidate in self._origins:
                names = self._origins[candidate].names
                return names[0] if self._origins[candidate].converter is None else candidate
        return name

    def _origin(self, stored: str) -> Origin:
        """Where what `stored_name` returned comes from."""
        return self._origins.get(stored) or Origin(None, {stored: [stored]})

    def _read_parameter(self, stored: str) -> Tensor:
        origin = self._origin(stored)
        if origin.converter is None:
            return self.read(origin.names[0])
        return self._naming.join(stored, origin, self._read_all(origin.names))

    def _split_experts(self) -> None:
        """Put DenseExperts in the place of experts; GlqError for such as are not known."""
        self._parameters: dict[str, str] = {}  # of DenseExperts → what they were in the model
        self._transposed: set[str] = set()
        for name, module in list(self.model.named_modules()):
            if not is_experts(module):
                continue
            refuse_unknown(name, module)
            transposed = module.is_transposed
            split = DenseExperts(module)
            for key, product in split.named_children():
                if isinstance(product, ExpertLinear):
                    own = f"{name}.{key}"
                    origin = self._origin(own)
                    if any("*" in p and len(keys) != split.count for p, keys in origin.keys.items()):
                        raise GlqError(
                            f"{self.path} lacks some of the {split.count} experts of {name}: it is incomplete"
                        )
                    product.entries = self._naming.expert_entries(own, origin, split.count, split.concatenated)
                    if not product.entries:
                        raise GlqError(f"{own}: transformers makes it of {origin.names[0]}, which glq does not know")
                    self._parameters[f"{own}.weight"] = own
                    if transposed:
                        self._transposed.add(self.stored_name(own))
            self.model.set_submodule(name, split)

    @contextmanager
    def outside_blocks(
        self, device: torch.device, dtype: torch.dtype, tokens: Sequence[Tensor]
    ) -> Iterator[PreTrainedModel]:
        """The model with everything but the decoder blocks and the lm_head loaded, for as long as the context lasts.

        tokens: all that are embedded meanwhile.
        """
        used = torch.cat([batch.flatten() for batch in tokens]).unique()
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
            self.load(name, device, dtype, used if name == self.embeddings else None)
        try:
            yield self.model
        finally:
            for name in outside:
                self.unload(name)

    def _check_complete(self) -> None:
        names = [self.stored_name(name) for name, _ in self.model.named_parameters()]
        missing = sorted({name for name in names if not self.files.keys() >= set(self._origin(name).names)})
        if missing:
            raise GlqError(
                f"{self.path} lacks {len(missing)} of the tensors of a {self.config.model_type!r} model, first "
                f"{missing[0]}: the directory is incomplete, or this architecture's naming is not supported yet"
            )


def _read_config(path: Path) -> PretrainedConfig:
    """The config, as that of a model in 16 bits. GlqError for one that is quantized, but to MXFP4."""
    method = _quant_method(path)
    if method not in (None, mxfp4.METHOD):
        raise GlqError(f"{path} is quantized already (quant_method {method!r}): give the original model")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if method is not None:
        del config.quantization_config
    return config


def _quant_method(path: Path) -> Any:
    """What config.json says of how the model is quantized; None if it is not."""
    file = path / "config.json"
    if not file.is_file():
        raise GlqError(f"{path} has no config.json: it is not a Hugging Face model directory")
    try:
        quantization = read_json(file).get("quantization_config")
    except GlqError:
        raise
    except (AttributeError, TypeError) as error:
        raise _unreadable(path, error) from error
    return quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization


def _unreadable(path: Path, error: Exception) -> GlqError:
    return GlqError(
        f"{path / 'config.json'} is not a config that transformers reads: {str(error).strip().splitlines()[0]}"
    )


def _find_blocks(model: nn.Module, model_type: str) -> list[str]:
    """The decoder blocks: the elements of the module list with the most weights in linear layers, experts included."""
    best, size, length = "", 0, 0
    text = _text_model(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.startswith(text):
            layers = (m for m in module.modules() if isinstance(m, nn.Linear | ExpertLinear))
            count = sum(layer.weight.numel() for layer in layers)
            if count > size and not (best and name.startswith(best + ".")):
                best, size, length = name, count, len(module)
    if not best:
        raise GlqError(
            f"no decoder blocks with linear layers were found in a {model_type!r} model: it is not supported"
        )
    return [f"{best}.{i}" for i in range(length)]


def _text_model(model: nn.Module) -> str:
    """What the names of the modules that write text begin with: other parts may have more weights."""
    try:
        decoder = model.get_decoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return ""
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    holds = isinstance(decoder, nn.Module) and any(isinstance(m, nn.ModuleList) for m in decoder.modules())
    return f"{name}." if name and holds else ""


def _set(module: nn.Module, key: str, value: Tensor) -> None:
    *path, leaf = key.split(".")
    owner = module.get_submodule(".".join(path))
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
