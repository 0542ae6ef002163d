"""What is known about the channels of a traced model, and how rules of operators change it; see `channel_flow`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from secateur.envs.model_graph.identities import EXPANDED, Identities
from secateur.envs.model_graph.shadows import Shadow, along, filled, first_entries, narrow
from secateur.envs.model_graph.trace import Trace, op_name


class ChannelState:
    """The identities of the channels in a traced model, and the operations of the rules on them.

    Attributes:
        identities: the union-find.
        shadows: node -> `Shadow`, or a list of them for operators with several results.
        splits: for each operator that cuts channels into parts of different sizes, the identities in each part.
        views: for each operator that spreads channels over several axes, the identities of its result.
        sizes: attributes of modules that hold numbers of channels: (module, attribute, identities that are counted).
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.identities = Identities(dict(trace.tensor_shapes))
        self.shadows: dict[Node, Shadow | list[Shadow]] = {}
        self.splits: list[list[np.ndarray]] = []
        self.views: list[Tensor] = []
        self.sizes: list[tuple[str, str, np.ndarray]] = []

    def tensor_shadow(self, name: str) -> Shadow:
        """Return the shadow of a parameter or buffer: one tensor per axis with several entries."""
        shape = self.trace.tensor_shapes[name]
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if not axes:
            return (torch.full(shape, self.identities.constant("a scalar")),)
        return tuple(along(self.identities.of(name, axis), axis, shape) for axis in axes)

    def constant(self, node: Node, origin: str) -> Shadow | list[Shadow]:
        """Return shadows without channels for the results of an operator; `origin` describes where the values come from."""
        entry = self.identities.constant(origin)
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return [(filled(entry, x.shape),) for x in value]
        return (filled(entry, value.shape if isinstance(value, Tensor) else ()),)

    def shadow(self, node: Node) -> Shadow:
        """Return the shadow of an operand with one result.

        Raises:
            TypeError: if it has several results.
        """
        found = self.results(node)
        if isinstance(found, list):
            raise TypeError(f"{op_name(node)} has several results.")
        return found

    def results(self, node: Node) -> Shadow | list[Shadow]:
        """Return the shadows of a value; values that are never visited (lifted constants, for example) have no channels."""
        if node not in self.shadows:
            self.shadows[node] = self.constant(node, "a tensor that is neither a parameter nor a buffer")
        return self.shadows[node]

    def single(self, node: Node) -> Tensor:
        """Return the one tensor of an activation's shadow. A parameter with several axes is taken as a constant."""
        shadow = self.shadow(node)
        if len(shadow) == 1:
            return shadow[0]
        self.freeze([node], "is used as a whole")
        return filled(self.identities.constant("a parameter that is used as a whole"), shadow[0].shape)

    def roots(self, ids: Tensor) -> Tensor:
        """Return the representative of each entry's class."""
        return torch.from_numpy(self.identities.find(ids.numpy()))

    def compact(self, ids: Tensor) -> Tensor:
        """Return the representatives, with stride 0 along every axis on which they are equal."""
        shape, ids = ids.shape, self.roots(narrow(ids))
        signs = torch.where(ids < 0, -1, ids)
        for axis in range(ids.dim()):
            if signs.size(axis) > 1 and bool((signs == signs.narrow(axis, 0, 1)).all()):
                ids, signs = ids.narrow(axis, 0, 1), signs.narrow(axis, 0, 1)
        return ids.expand(shape)

    def channel_axes(self, ids: Tensor) -> list[int]:
        """Return the axes along which the entries belong to different classes."""
        compact = narrow(self.compact(ids))
        return [axis for axis, size in enumerate(compact.shape) if size > 1]

    def freeze(self, nodes: Sequence[Node], reason: str) -> None:
        """Freeze the channels of these operands."""
        for node in nodes:
            for ids in pytree.tree_leaves(self.results(node)):
                self.identities.freeze(narrow(ids), reason)

    def unify(self, ids: Tensor, axes: Sequence[int]) -> Tensor:
        """Merge all entries along these axes; return the shadow with size 1 on them."""
        for axis in axes:
            first = ids.narrow(axis, 0, 1)
            rest = narrow(ids)
            if rest.size(axis) > 1:
                self.identities.merge(narrow(first).expand_as(rest).numpy(), rest.numpy())
            ids = first
        return ids

    def give_up(self, ids: Tensor, axes: Sequence[int]) -> bool:
        """Merge the entries along these axes if the channels vary along another axis too; return whether they do."""
        varying = self.channel_axes(ids)
        if not set(varying) - set(axes):
            return False
        self.unify(ids, [axis for axis in axes if axis in varying])
        return True

    def couple_parts(self, ids: Tensor, axis: int, parts: int) -> None:
        """Merge entry i of every equal part of an axis with entry i of the first part."""
        ids = narrow(ids)
        if ids.size(axis) > 1:
            self.unify(ids.unflatten(axis, (parts, -1)), [axis])

    def meet(self, operands: Sequence[Shadow], shape: Sequence[int]) -> Shadow:
        """Merge the identities of operands that are broadcast against each other; return those of the result."""
        activations = [shadow[0] for shadow in operands if len(shadow) == 1]
        several = [shadow for shadow in operands if len(shadow) > 1]
        carrying = [ids for ids in activations if bool((narrow(ids) >= 0).any())]
        if len(several) == 1 and not carrying:  # one parameter alone: a later operator combines it with channels
            return tuple(ids.expand(shape) for ids in several[0])
        activations += [self.matching_axis(shadow, carrying) for shadow in several]
        aligned = [ids.reshape((1,) * (len(shape) - ids.dim()) + tuple(ids.shape)) for ids in activations]
        self._agree_on_axes(aligned)
        axes = [set(self.channel_axes(ids)) for ids in aligned]
        kept = []
        for i, ids in enumerate(aligned):
            broadcast = {d for d, size in enumerate(shape) if ids.size(d) == 1 and size > 1}
            others = {axis for j, found in enumerate(axes) if j != i for axis in found}
            if broadcast & others:
                # One entry is combined with many channels, so the result has no channel of its own for it.
                self.identities.freeze(narrow(ids), "is broadcast over other channels")
            else:
                kept.append(ids.expand(shape))
        if not kept:
            return (filled(self.identities.constant("an outer product"), shape),)
        return (self.merge_entries(kept),)

    def _agree_on_axes(self, operands: Sequence[Tensor]) -> None:
        """Merge the entries of channels on several axes along the axes over which other operands with channels are broadcast."""
        axes = [set(self.channel_axes(ids)) for ids in operands]
        for i, ids in enumerate(operands):
            others = {axis for j, found in enumerate(axes) if j != i for axis in found}
            if axes[i] & others:
                self.unify(ids, sorted(axes[i] - others))

    def merge_entries(self, operands: Sequence[Tensor]) -> Tensor:
        """Merge shadows of equal shape entry by entry."""
        carrying = [ids for ids in operands if self.channel_axes(ids)]
        # If no operand has channels, no width depends on these entries.
        operands = carrying + [ids for ids in operands if not any(ids is c for c in carrying)]
        flat = [d for d in range(operands[0].dim()) if all(ids.stride(d) == 0 for ids in operands)]
        shape, small = operands[0].shape, list(operands)
        for axis in flat:
            small = [ids.narrow(axis, 0, 1) for ids in small]
        small.sort(key=lambda ids: bool((ids == EXPANDED).any()))  # results of constants alone are expanded if one of them is
        result = small[0].numpy()
        for ids in small[1:]:
            if carrying:
                self.identities.merge(result, ids.numpy())
            elif (result >= 0).any() and (ids >= 0).any():
                self.identities.merge(result, ids.numpy())
            result = np.where(result >= 0, result, ids.numpy())
        return torch.from_numpy(np.ascontiguousarray(result)).expand(shape)

    def matching_axis(self, shadow: Shadow, carrying: Sequence[Tensor]) -> Tensor:
        """Return the shadow of the parameter's axis that is combined with channels; a scalar if there is none."""
        best, most = torch.tensor(self.identities.constant("a parameter without channels")), 1
        for ids in shadow:
            for axis, other in itertools.product(self.channel_axes(ids), carrying):
                position = axis - ids.dim() + other.dim()  # shapes are aligned at the last axis
                if position in self.channel_axes(other):
                    count = len(self.roots(first_entries(other, position)).unique())
                    if count > most:
                        best, most = ids, count
        return best
