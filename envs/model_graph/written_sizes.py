"""Numbers of channels that the forward pass takes from attributes of modules, or writes into views: candidates to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from secateur.envs.model_graph.channel_flow import ChannelFlow
from secateur.envs.model_graph.groups import group_elements
from secateur.envs.model_graph.plan import ChannelGroup, ModelGraph, ViewSize, WrittenSize
from secateur.envs.model_graph.shadows import first_entries, narrow
from secateur.envs.model_graph.trace import Trace, argument, calling_module, op_name, shape_of
from secateur.envs.pruning.slicing import is_written_size

_MOST_NAMES = 4
"""Names of attributes of which all combinations are tried."""


def modules_with(trace: Trace, flow: ChannelFlow, members: np.ndarray) -> list[str]:
    """Return the paths of the modules whose own forward pass uses some of these channels, in execution order."""
    wanted, paths = set(flow.identities.find(members).tolist()), []
    for node in trace.nodes:
        path = calling_module(node)
        if path is None or path in paths or node in trace.layer_index:
            continue
        operands = [ids for x in node.all_input_nodes for ids in pytree.tree_leaves(flow.shadows.get(x, ()))]
        if any(not wanted.isdisjoint(flow.identities.find(narrow(ids).numpy()).ravel().tolist()) for ids in operands):
            paths.append(path)
    return paths


def size_candidates(model: nn.Module, group: ChannelGroup, modules: Sequence[str]) -> list[tuple[WrittenSize, ...]]:
    """Return the attributes to try: each one, the same one in all modules of a class, all of one module, all of them."""
    alone: list[WrittenSize] = []
    of_class: dict[tuple[type, str, int | None], list[WrittenSize]] = {}
    for path in modules:
        module = model.get_submodule(path)
        if type(module).__module__.startswith("torch."):  # slicing sets the attributes of PyTorch's own modules
            continue
        for name, value in vars(module).items():
            if not is_written_size(value):
                continue
            for entry, number in [(None, value)] if isinstance(value, int) else enumerate(value):
                if number > 1 and number % group.units == 0:
                    alone.append(WrittenSize(path, name, number // group.units, entry))
                    of_class.setdefault((type(module), name, entry), []).append(alone[-1])
    of_module = [[size for size in alone if size.module == path] for path in modules]
    together = [tuple(sizes) for sizes in (*of_class.values(), *of_module, alone) if len(sizes) > 1]
    return [*((size,) for size in alone), *dict.fromkeys(together)]


@dataclass(frozen=True)
class GroupViews:
    """Views whose sizes contain the channels of groups.

    A view that runs with other sizes must not be taken for another one. So a group is left out of `views` if another group is
    viewed alike in one module, or if a view with a free size (-1) has the same number of other channels.

    Attributes:
        views: the views by the group's index.
        alike: pairs of groups with equally many units that are viewed alike in one module.
    """

    views: dict[int, tuple[ViewSize, ...]]
    alike: set[tuple[int, int]]


def views_of_groups(trace: Trace, flow: ChannelFlow, graph: ModelGraph) -> GroupViews:
    """Return the views whose sizes contain the channels of groups."""
    owners = np.full(flow.identities.starts[-1], -1)
    for index, group in enumerate(graph.groups):
        owners[group_elements(flow, group)] = index
    found: dict[int, list[ViewSize]] = {}
    free: list[tuple[ViewSize, int]] = []  # of the views with a free size
    for node in trace.nodes:
        path, ids = calling_module(node), flow.shadows.get(node)
        if op_name(node) not in ("view", "reshape", "unflatten") or path is None or not isinstance(ids, tuple):
            continue
        requested = _requested_sizes(node)
        for axis, dense in enumerate(requested):
            entries = first_entries(ids[0], axis).numpy()
            groups = owners[entries[entries >= 0]] if axis in flow.channel_axes(ids[0]) else np.array([-1])
            for index in np.unique(groups).tolist() if dense > 0 else ():
                per_unit = int((groups == index).sum()) // graph.groups[index].units
                size = ViewSize(path, tuple(requested), axis, per_unit)
                if index >= 0:
                    found.setdefault(index, []).append(size)
                if min(requested) < 0:
                    free.append((size, index))
    others = [(size, index) for index, sizes in found.items() for size in sizes]
    confused: set[tuple[int, int]] = set()
    for index, size in {(index, size): None for size, index in others}:
        confused |= {(index, i) for other, i in (*others, *free) if i != index and _alike(size, other)}
    return GroupViews(
        views={i: tuple(dict.fromkeys(sizes)) for i, sizes in found.items() if not any(i == first for first, _ in confused)},
        alike={(i, j) for i, j in confused if 0 <= i < j and graph.groups[i].units == graph.groups[j].units},
    )


def _alike(size: ViewSize, other: ViewSize) -> bool:
    """Return whether a module that runs views with another size could confuse a view with another one in it."""
    inside = not size.module or f"{other.module}.".startswith(f"{size.module}.")
    same_number = size.axis == other.axis and size.sizes[size.axis] == other.sizes[other.axis]
    return inside and same_number and len(size.sizes) == len(other.sizes)


def _requested_sizes(node: Node) -> list[int]:
    """Return the sizes that a view requests for its result; -1: free."""
    if op_name(node) != "unflatten":
        return list(argument(node, 1))
    shape = shape_of(argument(node, 0))
    axis = argument(node, 1) % len(shape)
    return [*shape[:axis], *argument(node, 2), *shape[axis + 1 :]]


def same_classes(model: nn.Module, written: Mapping[int, Sequence[ViewSize]]) -> list[list[int]]:
    """Return the groups in lists of those that are viewed by modules of the same classes."""
    found: dict[frozenset[type], list[int]] = {}
    for index, sizes in written.items():
        found.setdefault(frozenset(type(model.get_submodule(size.module)) for size in sizes), []).append(index)
    return list(found.values())


def attribute_candidates(
    model: nn.Module, graph: ModelGraph, written: Mapping[int, Sequence[ViewSize]]
) -> Iterator[dict[int, tuple[WrittenSize, ...]]]:
    """Yield attributes to try, by the group's index: those with the numbers of the views, all of them and then fewer names."""
    found: dict[int, list[WrittenSize]] = {}
    for index, sizes in written.items():
        for size in sizes:
            number = size.sizes[size.axis]
            if number != size.per_unit * graph.groups[index].units:  # other channels are in this view too
                continue
            for name, value in vars(model.get_submodule(size.module)).items():
                if type(value) is int and value == number:
                    found.setdefault(index, []).append(WrittenSize(size.module, name, size.per_unit))
    found = {index: list(dict.fromkeys(sizes)) for index, sizes in found.items()}
    names = sorted({size.name for sizes in found.values() for size in sizes})
    counts = range(len(names), 0, -1) if len(names) <= _MOST_NAMES else [len(names)] if names else []
    for count in counts:
        for chosen in combinations(names, count):
            yield {index: tuple(size for size in sizes if size.name in chosen) for index, sizes in found.items()}
