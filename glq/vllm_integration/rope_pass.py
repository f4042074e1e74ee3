"""A rotary embedding of keys that go to the KV cache, and the write, become glq::rope_and_cache (rope.py)."""

from operator import getitem
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Graph, Node

from glq.vllm_integration.graphs import call, erase, is_call, known, value

_aten = torch.ops.aten


def fuse_all(graph: Graph) -> int:
    """How many of a graph did; what reads them may be ahead of them then."""
    updates = graph.find_nodes(op="call_function", target=torch.ops.vllm.unified_kv_cache_update.default)
    if updates:
        _look_through_scatters(graph)
    return sum(_fuse(graph, update) for update in updates)


def _look_through_scatters(graph: Graph) -> None:
    """Queries and keys turn in place, as columns of one tensor: they are read as what was written there instead."""
    for split in graph.find_nodes(op="call_function", target=_aten.split_with_sizes.default):
        whole, sizes, *dim = split.args
        if split.kwargs or not is_call(whole, _aten.slice_scatter.default) or not known(whole):
            continue
        if value(whole).dim() != 2 or dim not in ([1], [-1]):
            continue
        for part in list(split.users):
            begin = sum(sizes[: part.args[1]])
            found = _columns(graph, whole, begin, begin + sizes[part.args[1]], part)
            if found is not None:
                part.replace_all_uses_with(found)
                erase(graph, part)


def _columns(graph: Graph, x: Any, begin: int, end: int, before: Node) -> Any:
    """Columns of x [rows, columns], into which others were written, from where they come; None: from several."""
    while is_call(x, _aten.slice_scatter.default) and not x.kwargs:
        base, written, *at = x.args
        if len(at) != 3 or at[0] != 1:
            return None
        start, stop = at[1], min(at[2], value(x).shape[1])
        if (start, stop) == (begin, end):
            return written
        if start < end and begin < stop:
            return None
        x = base
    with graph.inserting_before(before):
        return call(graph, _aten.slice.Tensor, (x, 1, begin, end))


def _fuse(graph: Graph, update: Any) -> bool:
    """Whether the keys that go to the cache came out of a rotary embedding alone, which writes them now."""
    key, values, layer_name = update.args
    while is_call(key, _aten.view.default) or is_call(key, _aten.reshape.default):
        key = key.args[0]
    turned: Any = key.args[0] if is_call(key, getitem) and key.args[1] == 2 else None
    if not is_call(turned, auto_functionalized) or turned.args != (torch.ops._C.rotary_embedding.default,):
        return False
    given = turned.kwargs
    if given.get("rope_dim_offset", 0) or given.get("inverse", False):
        return False
    if not all(is_call(user, getitem) and user.args[1] in (1, 2) for user in turned.users):
        return False
    names = ("positions", "cos_sin_cache", "head_size", "is_neox")
    with graph.inserting_before(update):
        args = (given["query"], given["key"], values, *(given[name] for name in names), layer_name)
        done = call(graph, torch.ops.glq.rope_and_cache.default, args)
        parts = [call(graph, getitem, (done, i)) for i in range(3)]
    update.replace_all_uses_with(parts[2])
    erase(graph, update)
    for old in list(turned.users):
        old.replace_all_uses_with(parts[old.args[1] - 1])
        erase(graph, old)
    for part in parts:
        erase(graph, part)
    return True
