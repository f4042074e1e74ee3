"""Mixture-of-experts layers: which modules they are, and how their products fit together, whatever multiplies.

transformers keeps the experts of a layer as two 3-D parameters of a module that is called with (hidden states, each
token's experts, their weights), and says by attributes of the class how it uses them. That is what is recognized here:
no list of architectures.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glq.errors import GlqError

BIAS = "_bias"  # what the name of a product's biases ends with
INNER = "down_proj"  # the parameter that multiplies what the experts compute inside
_TILE = 64  # rows and columns that are stored at least; at 4 bits, a quarter of a tile takes as much in 16 bits
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether a module is transformers' experts of a layer, its weights 3-D parameters."""
    return all(hasattr(module, mark) for mark in _MARKS) and isinstance(getattr(module, INNER, None), nn.Parameter)


def outer_name(experts: nn.Module) -> str:
    """The name of the parameter that multiplies what the layer reads."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def part_names(parameter: str, concatenated: bool = True) -> tuple[str, ...]:
    """The matrices of an expert of which a parameter is made, one below the other.

    One, where it has rows of gate and up in turn.
    """
    return ("gate_proj", "up_proj") if parameter == "gate_up_proj" and concatenated else (parameter,)


def refuse_unknown(name: str, experts: Any) -> None:
    """GlqError for experts that have more than two products and their biases."""
    names = {key + ending for key in (outer_name(experts), INNER) for ending in ("", BIAS)}
    if extra := [key for key, _ in experts.named_parameters() if key not in names]:
        kind = type(experts).__name__
        raise GlqError(f"{name}: experts of type {kind} have {', '.join(extra)}, which glq cannot quantize yet")


def expert_shapes(name: str, experts: Any) -> dict[str, tuple[int, int, int]]:
    """How many experts, rows and columns each matrix of a module of experts has. GlqError for unknown ones."""
    refuse_unknown(name, experts)
    shapes: dict[str, tuple[int, int, int]] = {}
    for parameter in (outer_name(experts), INNER):
        count, *sizes = experts.get_parameter(parameter).shape
        rows, columns = reversed(sizes) if experts.is_transposed else sizes
        parts = part_names(parameter, experts.is_concatenated)
        shapes |= {part: (count, rows // len(parts), columns) for part in parts}
    return shapes


def refuse_other_experts(name: str, block: nn.Module) -> None:
    """GlqError for a decoder block that has modules with two 3-D parameters after its experts were replaced."""
    for key, module in block.named_modules():
        if sum(parameter.ndim == 3 for parameter in module.parameters(recurse=False)) > 1:
            kind = type(module).__name__
            raise GlqError(f"{name}.{key}: experts of type {kind} are kept in a form that glq does not know yet")


class Experts(nn.Module):
    """Stands for a module of experts, whose activation it takes, with other products: `outer` and `inner`."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.count: int = original.num_experts
        self.rest = original  # without its weights: the activation, and whatever that takes
        self.outer_name, self.concatenated = outer_name(original), bool(original.is_concatenated)
        for key in (self.outer_name, INNER):
            original._parameters.pop(key, None)
            self.register_parameter(key + BIAS, original._parameters.pop(key + BIAS, None))
        original._is_hf_initialized = True  # or transformers looks for these, to fill them with random numbers

    def outer(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [tokens, in], experts [tokens, k] → [tokens · k, out]."""
        raise NotImplementedError

    def inner(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [tokens · k, in], experts [tokens, k] → [tokens · k, out]."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, k], [tokens, k] → [tokens, hidden]; a number that no expert has counts nothing."""
        products = self._biased(self.outer(hidden_states, top_k_index), self.outer_name, top_k_index)
        inside = self.rest._apply_gate(products) if self.rest.has_gate else self.rest.act_fn(products)
        y = self._biased(self.inner(inside, top_k_index), INNER, top_k_index).view(*top_k_index.shape, -1)
        return (y * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _biased(self, y: Tensor, key: str, experts: Tensor) -> Tensor:
        """Rows of a product with the bias of their expert; those that no expert has stay as they are."""
        bias = getattr(self, key + BIAS)
        if bias is None:
            return y
        of_row = experts.flatten()
        known = (of_row >= 0) & (of_row < self.count)
        return y + (bias[of_row.clamp(0, self.count - 1)] * known[:, None]).to(y.dtype)

    def restored(self, outer: Tensor, inner: Tensor) -> nn.Module:
        """The module this one stands for, with these weights, [experts, out, in]."""
        for key, weight in ((self.outer_name, outer), (INNER, inner)):
            value = weight.transpose(1, 2).contiguous() if self.rest.is_transposed else weight
            self.rest.register_parameter(key, nn.Parameter(value, requires_grad=False))
            if (bias := getattr(self, key + BIAS)) is not None:
                self.rest.register_parameter(key + BIAS, nn.Parameter(bias.to(weight.dtype), requires_grad=False))
        return self.rest


class ExpertLinear(nn.Module):
    """A linear layer of each expert; weight [experts, out, in].

    entries: the names of its matrices, one below the other, with * for the expert's number. of_pairs: whether a row of
    its input belongs to one of a token's experts, or to all of them.
    """

    entries: tuple[str, ...] = ()

    def __init__(self, weight: Tensor, of_pairs: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.of_pairs = of_pairs

    @property
    def in_features(self) -> int:
        return self.weight.shape[2]

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        y = x.new_zeros(experts.numel(), self.weight.shape[1])
        each = 1 if self.of_pairs else experts.shape[1]
        for expert, weight in enumerate(self.weight):
            (pairs,) = torch.where(experts.flatten() == expert)
            if len(pairs):
                y[pairs] = x[pairs // each] @ weight.T
        return y

    def linears(self, expert: int) -> dict[str, nn.Linear]:
        """The matrices of one expert as linear layers, by their entries' names; views."""
        layers = {}
        for entry, weight in zip(self.entries, self.weight[expert].chunk(len(self.entries)), strict=True):
            layers[entry] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layers[entry].weight = nn.Parameter(weight, requires_grad=False)
        return layers

    def replace(self, expert: int, layers: dict[str, nn.Linear]) -> None:
        """Take the weights of `linears` back."""
        self.weight.data[expert] = torch.cat([layer.weight for layer in layers.values()])


class DenseExperts(Experts):
    """Experts whose products are modules, so that a pass can be stopped before each; parameters are NAME.weight."""

    def __init__(self, original: Any) -> None:
        weights = [original.get_parameter(key) for key in (outer_name(original), INNER)]
        if original.is_transposed:
            weights = [weight.transpose(1, 2) for weight in weights]
        super().__init__(original)
        self.add_module(self.outer_name, ExpertLinear(weights[0], of_pairs=False))
        self.add_module(INNER, ExpertLinear(weights[1], of_pairs=True))

    @property
    def products(self) -> tuple[ExpertLinear, ExpertLinear]:
        return getattr(self, self.outer_name), getattr(self, INNER)

    def outer(self, x: Tensor, experts: Tensor) -> Tensor:
        return self.products[0](x, experts)

    def inner(self, x: Tensor, experts: Tensor) -> Tensor:
        return self.products[1](x, experts)

    def agrees(self, args: tuple[Tensor, ...], y: Tensor) -> bool:
        """Whether the module that this one stands for makes y of these arguments, too."""
        expected = self.restored(*(product.weight for product in self.products))(*args)
        for key in (self.outer_name, INNER):
            del self.rest._parameters[key]
            self.rest._parameters.pop(key + BIAS, None)
        return bool((y - expected).norm() <= 1e-3 * expected.norm())


def quantizable(block: nn.Module) -> Iterator[tuple[str, nn.Linear | ExpertLinear]]:
    """The layers of a decoder block that take part, with their names in it; routers do not.

    Of the linear layers beside experts, those with no more outputs than there are experts are routers or gates. A class
    with a forward of its own is more than a linear layer.
    """
    beside = {name.rpartition(".")[0]: m.count for name, m in block.named_modules() if isinstance(m, DenseExperts)}
    for name, module in block.named_modules():
        inside = [count for parent, count in beside.items() if name.startswith(f"{parent}.")]
        plain = isinstance(module, nn.Linear) and not why_not(module)
        if isinstance(module, ExpertLinear) or (plain and module.out_features > max(inside, default=0)):
            yield name, module


def matrices_of(module: nn.Module) -> list[str]:
    """Parameters of a module itself that are as large as a tile: whatever is done with them, glq does not quantize."""
    own = module.named_parameters(recurse=False)
    return [key for key, parameter in own if parameter.ndim > 1 and sorted(parameter.shape)[-2] >= _TILE]


def why_not(module: nn.Linear) -> str:
    """Why a linear layer of a decoder block cannot be quantized; nothing if it can, unless it routes to experts."""
    if type(module).forward is not nn.Linear.forward:
        return "does more than a linear layer"
    rows, columns = module.out_features, module.in_features
    if math.ceil(rows / _TILE) * math.ceil(columns / _TILE) * _TILE**2 > 4 * rows * columns:
        return "is too small: its tiles would be mostly padding"
    return ""
