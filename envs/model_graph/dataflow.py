"""The effect of each operator on the channels, as plain records that do not refer to the trace.

Recoveries without images compute from them the statistics of each layer's inputs, starting at the batch norms.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from secateur.envs.model_graph.plan import Operation
from secateur.envs.model_graph.trace import Trace, argument, arguments, is_pointwise, op_name, schema_of, shape_of

_PASSED_THROUGH = (
    *("dropout", "feature_dropout", "clone", "contiguous", "detach", "alias", "upsample_bilinear2d"),
    *(f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)),
    *(f"upsample_nearest{rank}d" for rank in (1, 2, 3)),
    *("upsample_linear1d", "upsample_trilinear3d"),
)
"""Operators that change the values of a channel little and keep the correlations between channels."""


def dataflow(trace: Trace) -> tuple[Operation, ...]:
    """Return the operators whose inputs are known, in execution order; see `Operation`."""
    operations: list[Operation] = []
    index: dict[Node, int] = {}
    for node in trace.nodes:
        found = _operation(trace, node, index)
        if isinstance(found, Operation):
            index[node] = len(operations)
            operations.append(found)
        elif found is not None:
            index[node] = found
    return tuple(operations)


def _operation(trace: Trace, node: Node, index: dict[Node, int]) -> Operation | int | None:
    """Return a node's record, the index of an earlier record with the same statistics, or None if the operator is unknown."""
    if schema_of(node) is None or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if node in trace.layer_index:
        return _layer(trace, node, index)
    if node in trace.batch_norms:
        return Operation("batch_norm", (index.get(argument(node, 0), -1),), trace.batch_norms[node])
    operands, name = node.all_input_nodes, op_name(node)
    if not operands or not all(_known(x, index) for x in operands):
        return None
    inputs = tuple(index[x] for x in operands)
    if name == "cat":
        return Operation("cat", tuple(index[x] for x in argument(node, 0))) if _axis(node, "dim", 1) else None
    if len(operands) == 1:
        return _of_one(node, name, operands[0], inputs[0])
    return _of_two(node, name, inputs)


def _known(node: object, index: dict[Node, int]) -> bool:
    return isinstance(node, Node) and node in index


def _layer(trace: Trace, node: Node, index: dict[Node, int]) -> Operation | None:
    layer = trace.layers[trace.layer_index[node]]
    if not layer.shape.quantizable or len(layer.nodes) > 1:  # no module of its own, or called several times
        return None
    x = arguments(node)["input"]
    if layer.shape.kind == "linear" and len(shape_of(x)) != 2:
        return None
    return Operation("layer", (index.get(x, -1),), layer.shape.name)


def _axis(node: Node, name: str, axis: int) -> bool:
    return arguments(node)[name] % len(shape_of(node)) == axis


def _of_one(node: Node, name: str, operand: Node, source: int) -> Operation | int | None:
    """Return the record of an operator with one operand."""
    before, after = shape_of(operand), shape_of(node)
    same_channels = len(after) >= 2 and after[:2] == before[:2]
    if is_pointwise(node):
        (_, first), *given = arguments(node).items()
        plain = all(value is None or isinstance(value, (bool, int, float, str)) for _, value in given)
        return Operation("function", (source,), str(node.target), tuple(given)) if plain and first is operand else None
    if name in _PASSED_THROUGH and same_channels or name == "to" and before == after:
        return source
    if name == "mean":
        axes = arguments(node).get("dim") or ()
        return source if {axis % len(before) for axis in axes} == set(range(2, len(before))) != set() else None
    if name == "slice":
        return source if not _axis(node, "dim", 1) and not _axis(node, "dim", 0) else None
    if name == "pad":
        return _pad(node, source, len(before))
    if name in ("flatten", "view", "reshape", "_unsafe_view", "squeeze") and len(before) > 2 == len(after):
        if before[0] == after[0] and after[1] == math.prod(before[1:]):
            names = ("depth", "height", "width")[-len(before[2:]) :]
            return Operation("flatten", (source,), arguments=tuple(zip(names, before[2:], strict=True)))
    return None


def _pad(node: Node, source: int, rank: int) -> Operation | int | None:
    given = arguments(node)
    widths = list(given["pad"]) + [0] * (2 * rank - len(given["pad"]))
    if given["mode"] != "constant" or given["value"] or rank < 3 or any(widths[-2:]) or min(widths) < 0:
        return None
    before, after = widths[-4:-2]  # of the channels; the widths start at the last axis
    return Operation("pad", (source,), arguments=(("before", before), ("after", after))) if before or after else source


def _of_two(node: Node, name: str, inputs: tuple[int, ...]) -> Operation | None:
    """Return the record of a sum or a product (for example with the gate of a squeeze-and-excite block)."""
    if len(inputs) != 2 or any(shape_of(x)[:2] != shape_of(node)[:2] for x in node.all_input_nodes):
        return None
    if name == "add" and arguments(node)["alpha"] == 1:
        return Operation("add", inputs)
    return Operation("mul", inputs) if name == "mul" else None
