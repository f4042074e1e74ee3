"""A pass over the graphs that vLLM compiles: what makes the x of a product becomes part of the product.

It is the config's post-grad pass of Inductor. vLLM runs it on each piece between two attentions, after its own fusions
and before it lowers its norms: a sum with its norm is one node still, while silu is decomposed.
"""

from logging import getLogger
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode
from vllm.ir.ops import fused_add_rms_norm
from vllm.platforms import current_platform

from glq.ops import fused_matmul
from glq.vllm_integration import all_reduce, graphs, rope, rope_pass
from glq.vllm_integration.graphs import alike, call, erase, is_call, known, value

_log = getLogger("vllm.glq")
_aten, _glq = torch.ops.aten, torch.ops.glq
_convert = torch.ops.prims.convert_element_type.default


def install(vllm_config: Any) -> None:
    """Have vLLM run the pass if it compiles. A pass of the user's in this place stays, and ours is left out."""
    compilation = vllm_config.compilation_config
    options = compilation.inductor_compile_config
    if compilation.mode not in (None, CompilationMode.NONE) and current_platform.pass_key not in options:
        options[current_platform.pass_key] = FuseIntoProducts(all_reduce.wanted(vllm_config))
        rope.prepare_config(vllm_config)


class FuseIntoProducts(InductorPass):
    """glq::matmul becomes glq::norm_matmul or glq::silu_matmul where it alone reads its x.

    A rotary embedding of keys and the write to the KV cache become glq::rope_and_cache.

    own_sums: and vllm::all_reduce becomes glq::all_reduce.
    """

    def __init__(self, own_sums: bool = False) -> None:
        self._own_sums = own_sums

    def __call__(self, graph: Graph) -> None:
        norms = silus = 0
        if self._own_sums:
            for total in graph.find_nodes(op="call_function", target=torch.ops.vllm.all_reduce.default):
                total.target = _glq.all_reduce.default  # of the same signature
        for product in graph.find_nodes(op="call_function", target=_glq.matmul.default):
            x = product.args[0]
            if product.kwargs or len(x.users) > 1 or not known(*product.all_input_nodes):
                continue
            if _fuse_norm(graph, product, x):
                norms += 1
            elif _fuse_silu(graph, product, x):
                silus += 1
        ropes = rope_pass.fuse_all(graph)
        if norms or ropes:
            stable_topological_sort(graph)  # what reads a sum may be ahead of the product, which it comes out of now
        _log.debug("Products that make their x: %d from a normed sum, %d from silu(gate) · up", norms, silus)
        _log.debug("Rotary embeddings with the write to the cache: %d", ropes)

    def uuid(self) -> str:
        """In the keys of vLLM's and of Inductor's caches. What the ops take is part of it."""
        files = (__file__, *(str(m.__file__) for m in (graphs, fused_matmul, all_reduce, rope, rope_pass)))
        return str(self.hash_source(str(self._own_sums), *(Path(file).read_text("utf-8") for file in files)))


def _fuse_norm(graph: Graph, product: Any, x: Any) -> bool:
    """Whether x was the norm of a sum, and is made by the product now."""
    norm: Any = x.args[0] if is_call(x, getitem) and x.args[1] == 0 else None
    if not is_call(norm, fused_add_rms_norm.torch_op) or norm.kwargs:
        return False
    if not all(user is x or (is_call(user, getitem) and user.args[1] == 1) for user in norm.users):
        return False
    summand, residual, weight, eps, *variance_size = norm.args
    if variance_size not in ([], [None]) or not known(weight) or not alike(summand, residual, x):
        return False
    if weight.op not in ("placeholder", "get_attr"):  # made by a kernel: products read it before they wait for that
        return False
    if (value(weight).dtype, value(weight).shape) != (value(x).dtype, value(x).shape[-1:]):
        return False
    with graph.inserting_before(product):
        both = call(graph, _glq.norm_matmul.default, (summand, residual, weight, eps, *product.args[1:]))
        y, total = (call(graph, getitem, (both, i)) for i in range(2))
    product.replace_all_uses_with(y)
    erase(graph, product)
    for old in list(norm.users):  # the sum; none after the last layer
        old.replace_all_uses_with(total)
        erase(graph, old)
    erase(graph, total)
    return True


def _fuse_silu(graph: Graph, product: Any, x: Any) -> bool:
    """Whether x was silu(gate) · up, and is made by the product now."""
    if not is_call(x, _aten.mul.Tensor):
        return False
    for silu, up in (x.args, x.args[::-1]):
        gate = _argument_of_silu(silu)
        if gate is not None and alike(gate, up, x):
            with graph.inserting_before(product):
                y = call(graph, _glq.silu_matmul.default, (gate, up, *product.args[1:]))
            product.replace_all_uses_with(y)
            erase(graph, product)
            return True
    return False


def _argument_of_silu(y: Any) -> Any:
    """x where y is silu(x), whole or decomposed, in fp32 or through it."""
    if is_call(y, _aten.silu.default):
        return y.args[0]
    wide = y.args[0] if is_call(y, _convert) else y
    x: Any = None
    if is_call(wide, _aten.div.Tensor):  # x / (1 + exp(−x)): Inductor's
        above, below = wide.args
        power: Any = (
            below.args[0] if is_call(below, _aten.add.Tensor) and below.args[1] == 1 and not below.kwargs else None
        )
        minus: Any = power.args[0] if is_call(power, _aten.exp.default) else None
        x = above if is_call(minus, _aten.neg.default) and minus.args[0] is above else None
    elif is_call(wide, _aten.mul.Tensor):  # x · sigmoid(x): PyTorch's
        x = next(
            (a for a, b in (wide.args, wide.args[::-1]) if is_call(b, _aten.sigmoid.default) and b.args[0] is a), None
        )
    if wide is y:
        return x
    return x.args[0] if is_call(x, _convert) and x.args[1] == torch.float32 else None
