"""What the passes over vLLM's graphs have in common: nodes that know their values, as Inductor's do."""

from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg


def is_call(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target == target


def value(node: Any) -> Any:
    return node.meta["val"]


def known(*nodes: Any) -> bool:
    return all(isinstance(node, Node) and "val" in node.meta for node in nodes)


def alike(*nodes: Any) -> bool:
    """Whether they are tensors of the same type and shape."""
    if not known(*nodes):
        return False
    first, *others = map(value, nodes)
    return all(
        (other.dtype, other.dim()) == (first.dtype, first.dim())
        and all(statically_known_true(a == b) for a, b in zip(other.shape, first.shape, strict=True))
        for other in others
    )


def call(graph: Graph, target: Any, args: tuple[Any, ...]) -> Any:
    """A new node, which knows its value as those that Inductor traced do."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, value))
    return node


def erase(graph: Graph, node: Node) -> None:
    """A node that nothing reads, and those that only it has read."""
    if node.op == "call_function" and not node.users:
        inputs = node.all_input_nodes
        graph.erase_node(node)
        for each in inputs:
            erase(graph, each)
