"""Coupled channels: channel identities are propagated through the exported graph.

Every position on every axis of every parameter and buffer is one element of a union-find: the element of a
convolution's weight, axis 0, position j *is* the identity of its output channel j. Each activation has a shadow: an integer
tensor of the same shape that holds the channel of each of its entries. Operators that only move data are executed on the
shadows; operators that combine channels merge the identities; a layer that reads channel x at its input i merges
(weight, axis 1, i) with x. A class of the union-find is therefore a list of (tensor, axis, position): all positions that
must be removed together.

Negative entries are constants: they belong to no channel, and their width cannot change. Channels that are combined with a
constant are frozen. Channels that enter an operator that mixes channels, or an unknown operator, are frozen too.

A view may spread channels over several axes, e.g. the heads and the width of attention, or the parts of a channel shuffle. What
remains prunable is one of these axes: an operator that mixes the entries along one of them merges them, and the classes on the
other axis remain. If no operator decides, the last axis remains.

The rules of the operators are functions in `layer_rules`, `movement_rules`, `mixing_rules` and `product_rules`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from secateur.envs.model_graph import layer_rules, mixing_rules, movement_rules, product_rules
from secateur.envs.model_graph.identities import EXPANDED, Identities
from secateur.envs.model_graph.shadows import Shadow, along, filled, first_entries, narrow
from secateur.envs.model_graph.trace import Trace, argument, is_pointwise, op_name, schema_of

Result = Tensor | Shadow | list[Tensor] | list[Shadow]
"""The result of a rule: one shadow, or a list of them for operators with several results."""


class ChannelFlow:
    """The identities of a traced model, from one walk through its graph.

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
        for node, name in trace.tensors.items():
            self.shadows[node] = self._tensor_shadow(name)
        for node in trace.inputs:
            self.shadows[node] = self.constant(node, "the model's input")
        unused = unused_results(trace)
        for node in trace.nodes:
            self.shadows[node] = self.constant(node, "an unused result") if node in unused else self._visit(node)
        for node in trace.outputs:
            self.freeze([node], "model output")
        for ids in self.views:
            self.unify(ids, self.channel_axes(ids)[:-1])

    # Shadows ---------------------------------------------------------------------------------------------------------

    def _tensor_shadow(self, name: str) -> Shadow:
        shape = self.trace.tensor_shapes[name]
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if not axes:
            return (torch.full(shape, self.identities.constant("a scalar")),)
        return tuple(along(self.identities.of(name, axis), axis, shape) for axis in axes)

    def constant(self, node: Node, origin: str) -> Shadow | list[Shadow]:
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
        found = self._shadows(node)
        if isinstance(found, list):
            raise TypeError(f"{op_name(node)} has several results.")
        return found

    def _shadows(self, node: Node) -> Shadow | list[Shadow]:
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
        for node in nodes:
            for ids in pytree.tree_leaves(self._shadows(node)):
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

    # Operators -------------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> Shadow | list[Shadow]:
        name = op_name(node)
        if name == "getitem":
            shadows = self._shadows(argument(node, 0))
            return shadows[argument(node, 1)] if isinstance(shadows, list) else (shadows[0],)
        if schema_of(node) is None or node.meta.get("val") is None:
            return self._unknown(node)
        if node in self.trace.layer_index:
            rule: Rule = layer_rules.layer
        elif name in RULES:
            rule = RULES[name]
        elif is_pointwise(node):
            rule = mixing_rules.pointwise
        elif is_movement(node):
            rule = movement_rules.execute
        else:
            return self._unknown(node)
        try:
            found = rule(self, node)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
            # The rule does not cover this use of the operator. It is handled like an operator without a rule, which is safe.
            return self._unknown(node)
        if isinstance(found, list):
            return [self._compact_shadow(part) for part in found]
        return self._compact_shadow(found)

    def _compact_shadow(self, found: Tensor | Shadow) -> Shadow:
        return tuple(self.compact(ids) for ids in ((found,) if isinstance(found, Tensor) else found))

    def _unknown(self, node: Node) -> Shadow | list[Shadow]:
        name = op_name(node)
        why = (
            "whose weight is computed in the forward pass"
            if node in self.trace.computed
            else "which mixes channels or is not known"
        )
        self.freeze(node.all_input_nodes, f"enters {name}, {why}")
        return self.constant(node, f"the result of {name}")

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


def unused_results(trace: Trace) -> set[Node]:
    """Return the operators without parameters whose results nothing uses, e.g. the mean of attention weights over the heads."""
    unused: set[Node] = set()
    for node in reversed(trace.nodes):
        schema = schema_of(node)
        reads_tensors = any(x in trace.tensors for x in node.all_input_nodes)
        if node not in trace.outputs and not reads_tensors and unused.issuperset(node.users):
            if schema is None or not schema.is_mutable:
                unused.add(node)
    return unused


def is_movement(node: Node) -> bool:
    """Return whether the operator only rearranges its input: a view, according to its schema, or one of `_MOVEMENTS`."""
    returns = schema_of(node).returns
    if op_name(node) == "as_strided":  # its strides refer to the activation, not to the shadow
        return False
    aliases = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return aliases or op_name(node) in _MOVEMENTS


Rule = Callable[[ChannelFlow, Node], Result]

_MOVEMENTS = ("repeat", "tile", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "lift_fresh_copy")
_CREATIONS = "zeros ones full empty arange linspace eye rand randn scalar_tensor new_zeros new_ones new_full new_empty"
_REDUCTIONS = "mean sum amax amin prod var std logsumexp linalg_vector_norm"
_POOLINGS = "max_pool avg_pool adaptive_max_pool adaptive_avg_pool reflection_pad replication_pad upsample_nearest"
_UPSAMPLINGS = "_upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"

RULES: dict[str, Rule] = {
    "batch_norm": layer_rules.batch_norm,
    "instance_norm": layer_rules.instance_norm,
    "group_norm": layer_rules.group_norm,
    "layer_norm": layer_rules.layer_norm,
    "rms_norm": layer_rules.layer_norm,
    "prelu": layer_rules.prelu,
    "pad": movement_rules.pad,
    "constant_pad_nd": movement_rules.pad,
    "cat": movement_rules.cat,
    "concat": movement_rules.cat,
    "stack": movement_rules.stack,
    "slice": movement_rules.cut,
    "index": movement_rules.index,
    "expand": movement_rules.expand,
    "channel_shuffle": movement_rules.channel_shuffle,
    "glu": movement_rules.glu,
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), mixing_rules.softmax),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), movement_rules.split),
    **dict.fromkeys(("select", "unbind", "flip", "roll", "narrow"), movement_rules.pick),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), movement_rules.reshape),
    **dict.fromkeys(_CREATIONS.split(), mixing_rules.creation),
    **dict.fromkeys(_REDUCTIONS.split(), mixing_rules.reduce),
    **dict.fromkeys([f"{name}{rank}d" for name in _POOLINGS.split() for rank in (1, 2, 3)], mixing_rules.spatial),
    **dict.fromkeys(_UPSAMPLINGS.split(), mixing_rules.spatial),
    **product_rules.PRODUCTS,
}
"""Operators with their own rule, by plain name; all others are pointwise, movements of data, or unknown."""
