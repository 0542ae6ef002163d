"""The prunable groups of a model, and the reasons why other channels cannot be removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby

import numpy as np

from secateur.cost_models.core import InputError
from secateur.envs.model_graph.channel_flow import ChannelFlow
from secateur.envs.model_graph.dataflow import dataflow
from secateur.envs.model_graph.geometry import network_geometry
from secateur.envs.model_graph.plan import ChannelGroup, FrozenChannels, ModelGraph, TensorSlice, WrittenSize
from secateur.envs.model_graph.trace import Trace, argument, calling_module, op_name, shape_of


def exclude_layers(trace: Trace, flow: ChannelFlow, patterns: Sequence[str]) -> None:
    """Freeze the output channels of the layers that match one of the shell patterns.

    Raises:
        InputError: if a pattern matches no layer.
    """
    for pattern in patterns:
        found = [layer for layer in trace.layers if fnmatchcase(layer.shape.name, pattern)]
        if not found:
            names = ", ".join(layer.shape.name for layer in trace.layers[:5])
            raise InputError(f"`exclude` has the pattern {pattern!r}, but no layer matches it. Layers are {names}, ...")
        for layer in found:
            flow.identities.freeze(flow.identities.of(layer.weight, layer.out_axis), "excluded by the config")


def build_graph(trace: Trace, flow: ChannelFlow) -> ModelGraph:
    """Return the model's structure; `seconds` is 0."""
    roots = flow.identities.find(np.arange(flow.identities.starts[-1]))
    reasons = flow.identities.reasons()
    groups: list[ChannelGroup] = []
    for members in _groups(trace, flow, roots, set(reasons)):
        if _differ_in_a_split(flow, roots, roots[members[:, 0]]):
            reasons |= dict.fromkeys(roots[members[:, 0]].tolist(), "a split at constant sizes has its units in different parts")
        elif len(members) > 1:
            groups.append(_channel_group(trace, flow, members, [group.producers[0] for group in groups]))
        else:
            reasons[int(roots[members[0, 0]])] = "a single coupled unit: nothing would be left"
    group_of = np.full(len(roots), -1)
    for index, group in enumerate(groups):
        group_of[group_elements(flow, group)] = index
        groups[index] = replace(group, sizes=_attributes(flow, roots, group, index, group_of))
    return ModelGraph(
        geometry=network_geometry(trace, flow, groups, group_of),
        groups=tuple(groups),
        frozen=tuple(_frozen(trace, flow, roots, reasons)),
        batch_norms=_foldable(trace),
        seconds=0.0,
        operations=dataflow(trace),
    )


def _differ_in_a_split(flow: ChannelFlow, roots: np.ndarray, units: np.ndarray) -> bool:
    """Return whether a split has different numbers of channels of some units in one of its parts.

    The sizes of the parts then depend on which units are removed, and not only on their number.
    """
    for parts in flow.splits:
        for part in parts:
            found = roots[part[part >= 0]]
            if len(set((found == units[:, None]).sum(axis=1).tolist())) > 1:
                return True
    return False


def _attributes(
    flow: ChannelFlow, roots: np.ndarray, group: ChannelGroup, index: int, group_of: np.ndarray
) -> tuple[WrittenSize, ...]:
    """Return the attributes in which modules store numbers of a group's channels, as the rules of the operators found them."""
    counts = [(module, name, int((group_of[roots[ids]] == index).sum())) for module, name, ids in flow.sizes]
    found = [WrittenSize(module, name, count // group.units) for module, name, count in counts if count]
    return tuple(dict.fromkeys(found))  # a module may be called several times


def group_elements(flow: ChannelFlow, group: ChannelGroup) -> np.ndarray:
    """Return all elements of the union-find that belong to a group, (n,)."""
    return np.concatenate([flow.identities.of(s.tensor, s.axis)[s.positions].ravel() for s in group.slices])


def _groups(trace: Trace, flow: ChannelFlow, roots: np.ndarray, frozen: set[int]) -> list[np.ndarray]:
    """Return the elements of each group, (units, elements per unit).

    Classes with equally many positions on the same axes are the units of one group. Groups are ordered by first producer,
    units by position.
    """
    produced: dict[int, int] = {}  # class -> index of its first output channel, among the output channels of all layers
    outputs = [roots[flow.identities.of(layer.weight, layer.out_axis)] for layer in trace.layers]
    for index, root in enumerate(np.concatenate([*outputs, np.empty(0, int)]).tolist()):
        produced.setdefault(root, index)
    elements = np.flatnonzero(np.isin(roots, [root for root in produced if root not in frozen]))
    elements = elements[np.argsort(roots[elements], kind="stable")]
    keys = np.searchsorted(flow.identities.starts, elements, side="right") - 1
    bounds = [0, *(np.flatnonzero(np.diff(roots[elements])) + 1), len(elements)]
    same_axes: dict[bytes, list[np.ndarray]] = {}
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end > start:
            same_axes.setdefault(keys[start:end].tobytes(), []).append(elements[start:end])

    def first_output(unit: np.ndarray) -> int:
        return produced[roots[unit[0]]]

    ordered = [sorted(units, key=first_output) for units in same_axes.values()]
    groups = [np.stack(units) for units in ordered]
    return sorted(groups, key=lambda members: first_output(members[0]))


def _channel_group(trace: Trace, flow: ChannelFlow, members: np.ndarray, taken: list[str]) -> ChannelGroup:
    """Return the group of these elements, (units, elements per unit); `taken` lists the first producers of earlier groups."""
    keys = np.searchsorted(flow.identities.starts, members[0], side="right") - 1
    slices = []
    for key in np.unique(keys):
        tensor, axis = flow.identities.keys[key]
        slices.append(TensorSlice(tensor, axis, members[:, keys == key] - flow.identities.starts[key]))
    places = {(s.tensor, s.axis) for s in slices}
    producers = [layer.shape.name for layer in trace.layers if (layer.weight, layer.out_axis) in places]
    consumers = [layer.shape.name for layer in trace.layers if (layer.weight, layer.in_axis) in places]
    count = taken.count(producers[0])
    name = f"{producers[0]}#{count + 1}" if count else producers[0]
    return ChannelGroup(name, len(members), tuple(slices), tuple(producers), tuple(consumers))


def _frozen(trace: Trace, flow: ChannelFlow, roots: np.ndarray, reasons: dict[int, str]) -> list[FrozenChannels]:
    frozen = []
    for layer in trace.layers:
        out = roots[flow.identities.of(layer.weight, layer.out_axis)].tolist()
        found = sorted(reasons[root] for root in out if root in reasons)
        frozen += [FrozenChannels(layer.shape.name, len(list(same)), reason) for reason, same in groupby(found)]
    return frozen + _computed(trace)


def _computed(trace: Trace) -> list[FrozenChannels]:
    """Return the operators whose weight is computed, once for each module; they are no layers."""
    frozen = {}
    for node in trace.computed:
        channels = shape_of(node)[-1 if op_name(node) == "linear" else 1 - len(shape_of(argument(node, 1)))]
        name = calling_module(node) or "the model's own forward pass"
        frozen[name] = FrozenChannels(name, channels, f"the weight of its {op_name(node)} is computed in the forward pass")
    return list(frozen.values())


def _foldable(trace: Trace) -> tuple[tuple[str, str], ...]:
    """Return (layer, batch norm) for each layer with its own weight that is called once and whose only reader is a batch norm."""
    pairs = []
    for layer in trace.layers:
        node = layer.nodes[0]
        readers = list(node.users)
        if len(layer.nodes) == 1 and layer.shape.own_weight and len(readers) == 1:
            name = trace.batch_norms.get(readers[0])
            # Without running statistics nothing can be folded; the batch norm must normalize the axis of the channels, which
            # is not the second one of tokens or of a single image.
            batched = node.meta["val"].dim() == len(trace.tensor_shapes[layer.weight])
            if name is not None and argument(readers[0], 3) is not None and batched:
                pairs.append((layer.shape.name, name))
    return tuple(pairs)
