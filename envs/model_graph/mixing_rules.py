"""How elementwise operators, reductions and pooling change the channels: rules of `ChannelFlow`."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from secateur.envs.model_graph.channel_state import ChannelState
from secateur.envs.model_graph.shadows import Shadow
from secateur.envs.model_graph.trace import argument, arguments, op_name, shape_of


def creation(flow: ChannelState, node: Node) -> Shadow | list[Shadow]:
    return flow.constant(node, f"{op_name(node)} of constant width")


def pointwise(flow: ChannelState, node: Node) -> Shadow | list[Shadow]:
    operands = [flow.shadow(x) for x in node.all_input_nodes]
    if not operands:
        return creation(flow, node)
    return flow.meet(operands, shape_of(node))


def softmax(flow: ChannelState, node: Node) -> Tensor:
    x = flow.single(argument(node, 0))
    axis = arguments(node)["dim"] % x.dim()
    if axis in flow.channel_axes(x) and not flow.give_up(x, [axis]):
        flow.freeze([argument(node, 0)], f"{op_name(node)} runs over channels")
    return x


def reduce(flow: ChannelState, node: Node) -> Tensor:
    given = arguments(node)
    x = flow.single(given["self"])
    dims = given.get("dim")
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = sorted(axis % x.dim() for axis in dims)
    if set(axes) & set(flow.channel_axes(x)) and not flow.give_up(x, axes):
        raise ValueError(f"{op_name(node)} mixes channels.")
    for axis in axes:
        x = x.narrow(axis, 0, 1)
    if not given.get("keepdim"):
        x = x.squeeze(tuple(axes))
    return x.expand(shape_of(node))


def spatial(flow: ChannelState, node: Node) -> Tensor | list[Tensor]:
    """Pooling, resizing and reflection: every output entry belongs to the channel of the inputs around it."""
    x = flow.single(argument(node, 0))
    rank = next(int(c) for c in op_name(node) if c in "123")
    x = flow.unify(x, range(x.dim() - rank, x.dim()))
    value = node.meta["val"]
    return x.expand(value.shape) if isinstance(value, Tensor) else [x.expand(v.shape) for v in value]
