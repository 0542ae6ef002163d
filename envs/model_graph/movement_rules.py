"""How operators that move, join and cut data change the channels: rules of `ChannelFlow`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node

from secateur.envs.model_graph.channel_state import ChannelState
from secateur.envs.model_graph.identities import EXPANDED
from secateur.envs.model_graph.shadows import Shadow, concatenate, filled, narrow
from secateur.envs.model_graph.trace import argument, arguments, op_name, run_with, shape_of


def pad(flow: ChannelState, node: Node) -> Tensor:
    given = arguments(node)
    x = flow.single(given["self"])
    widths = given["pad"]
    channels = flow.channel_axes(x)
    entry = flow.identities.constant(f"zero padding of constant width ({op_name(node)})")
    for i in range(len(widths) // 2):
        axis, (before, after) = x.dim() - 1 - i, widths[2 * i : 2 * i + 2]
        if axis not in channels:
            x = x.narrow(axis, 0, 1).expand([*x.shape[:axis], x.size(axis) + before + after, *x.shape[axis + 1 :]])
        elif before < 0 or after < 0 or given.get("mode", "constant") != "constant":
            raise ValueError(f"{op_name(node)} cuts or fills the channel axis.")
        elif before or after:
            sides = [filled(entry, [*x.shape[:axis], width, *x.shape[axis + 1 :]]) for width in (before, after)]
            x = concatenate([sides[0], x, sides[1]], axis)
    return x


def cat(flow: ChannelState, node: Node) -> Tensor:
    given = arguments(node)
    nodes, axis = given["tensors"], given["dim"] % len(shape_of(node))
    return join(flow, [flow.shadow(x) for x in nodes if shape_of(x) != (0,)], axis)


def stack(flow: ChannelState, node: Node) -> Tensor:
    given = arguments(node)
    axis = given["dim"] % len(shape_of(node))
    return join(flow, [tuple(ids.unsqueeze(axis) for ids in flow.shadow(x)) for x in given["tensors"]], axis)


def join(flow: ChannelState, operands: Sequence[Shadow], axis: int) -> Tensor:
    carrying = [shadow[0] for shadow in operands if len(shadow) == 1]
    singles = []
    for shadow in operands:
        ids = shadow[0] if len(shadow) == 1 else flow.matching_axis(shadow, carrying)
        singles.append(ids.expand(shadow[0].shape))
    for ids in singles:
        other = [d for d in flow.channel_axes(ids) if d != axis]
        if axis in flow.channel_axes(ids) and not _same_channels(flow, singles):
            flow.unify(ids, other)
    if any(set(flow.channel_axes(ids)) - {axis} for ids in singles) and not _same_channels(flow, singles):
        # The axis is not the channels' axis: all operands must keep the same channels.
        flow.merge_entries([flow.unify(ids, [axis]) for ids in singles])
    return concatenate(singles, axis)


def _same_channels(flow: ChannelState, operands: Sequence[Tensor]) -> bool:
    """Return whether all operands hold the same channels, on several axes: parts of one view, e.g. of a rotary embedding."""
    several = all(len(flow.channel_axes(ids)) > 1 for ids in operands)
    return several and len({tuple(flow.roots(narrow(ids)).unique().tolist()) for ids in operands}) == 1


def split(flow: ChannelState, node: Node) -> list[Tensor]:
    given = arguments(node)
    x = flow.single(argument(node, 0))
    axis = given["dim"] % x.dim()
    sizes = [value.shape[axis] for value in node.meta["val"]]
    if axis in flow.channel_axes(x):
        if len(set(sizes)) == 1:
            flow.couple_parts(x, axis, len(sizes))
        else:
            flow.splits.append([narrow(part).numpy() for part in x.split(sizes, axis)])
    return list(x.split(sizes, axis))


def cut(flow: ChannelState, node: Node) -> Shadow | list[Tensor]:
    given = arguments(node)
    size = shape_of(argument(node, 0))
    axis = given["dim"] % len(size)
    start, end, _ = slice(given["start"], given["end"]).indices(size[axis])
    part = math.gcd(start, end, size[axis])
    for ids in flow.shadow(argument(node, 0)):
        if axis in flow.channel_axes(ids) and (start, end, given["step"]) != (0, size[axis], 1):
            if given["step"] == 1 and part > 1:
                flow.couple_parts(ids, axis, size[axis] // part)
            elif not flow.give_up(ids, [axis]):
                flow.identities.freeze(narrow(ids), f"{op_name(node)} picks channels at constant positions")
    return execute(flow, node)


def pick(flow: ChannelState, node: Node) -> Shadow | list[Tensor]:
    given = arguments(node)
    for ids in flow.shadow(argument(node, 0)):
        axes = given.get("dim", given.get("dims", 0))
        axes = [axis % ids.dim() for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]
        if set(axes) & set(flow.channel_axes(ids)) and not flow.give_up(ids, axes):
            flow.identities.freeze(narrow(ids), f"{op_name(node)} picks channels at constant positions")
        elif op_name(node) in ("flip", "roll"):
            return flow.shadow(argument(node, 0))
    return execute(flow, node)


def reshape(flow: ChannelState, node: Node) -> Shadow:
    """Execute a view. One that spreads channels over several axes is noted: only one of the axes can be pruned."""
    found = tuple(flow.compact(ids.reshape(shape_of(node))) for ids in flow.shadow(argument(node, 0)))
    flow.views += [ids for ids in found if len(flow.channel_axes(ids)) > 1]
    return found


def expand(flow: ChannelState, node: Node) -> Shadow:
    """Execute an expansion; values without channels that are repeated fit any number of channels."""
    source, found = argument(node, 0), execute(flow, node)
    repeated = math.prod(shape_of(node)[1:]) > math.prod(shape_of(source)[1:])
    return tuple(filled(EXPANDED, ids.shape) if repeated and not bool((narrow(ids) >= 0).any()) else ids for ids in found)


def index(flow: ChannelState, node: Node) -> Shadow:
    """Indexing along one axis, e.g. of a table of position biases: channels on other axes stay apart."""
    x, indices = argument(node, 0), argument(node, 1)
    axis, *others = [i for i, positions in enumerate(indices) if positions is not None]
    if others or bool(indices[axis].meta["val"].dtype.is_floating_point):
        raise ValueError("Several axes are indexed.")
    rank = indices[axis].meta["val"].dim()
    found = []
    for ids in flow.shadow(x):
        if axis in flow.channel_axes(ids) and not flow.give_up(ids, [axis]):
            flow.identities.freeze(narrow(ids), f"{op_name(node)} picks channels at constant positions")
        else:
            ids = flow.compact(ids).narrow(axis, 0, 1)
            found.append(ids.reshape(*ids.shape[:axis], *[1] * rank, *ids.shape[axis + 1 :]).expand(shape_of(node)))
    if not found:
        raise ValueError("The indexed axis holds the channels.")
    return tuple(found)


def channel_shuffle(flow: ChannelState, node: Node) -> Tensor:
    x, parts = flow.single(argument(node, 0)), argument(node, 1)
    flow.couple_parts(x, 1, parts)
    return x.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)


def glu(flow: ChannelState, node: Node) -> Shadow:
    x = flow.single(argument(node, 0))
    axis = arguments(node)["dim"] % x.dim()
    return flow.meet([(part,) for part in x.chunk(2, axis)], shape_of(node))


def execute(flow: ChannelState, node: Node) -> Shadow | list[Tensor]:
    """Execute an operator that only moves data on the shadows."""
    first, *rest = node.all_input_nodes
    others = {x: flow.shadow(x)[0] for x in rest}
    results = [run_with(node, {first: ids, **others}) for ids in flow.shadow(first)]
    return list(results[0]) if isinstance(results[0], (tuple, list)) else tuple(results)
