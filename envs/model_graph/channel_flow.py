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

from collections.abc import Callable

from torch import Tensor
from torch.fx import Node

from secateur.envs.model_graph import layer_rules, mixing_rules, movement_rules, product_rules
from secateur.envs.model_graph.channel_state import ChannelState
from secateur.envs.model_graph.shadows import Shadow
from secateur.envs.model_graph.trace import Trace, argument, is_pointwise, op_name, schema_of

Result = Tensor | Shadow | list[Tensor] | list[Shadow]
"""The result of a rule: one shadow, or a list of them for operators with several results."""


class ChannelFlow(ChannelState):
    """The identities of a traced model, from one walk through its graph."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        for node, name in trace.tensors.items():
            self.shadows[node] = self.tensor_shadow(name)
        for node in trace.inputs:
            self.shadows[node] = self.constant(node, "the model's input")
        unused = unused_results(trace)
        for node in trace.nodes:
            self.shadows[node] = self.constant(node, "an unused result") if node in unused else self._visit(node)
        for node in trace.outputs:
            self.freeze([node], "model output")
        for ids in self.views:
            self.unify(ids, self.channel_axes(ids)[:-1])

    def _visit(self, node: Node) -> Shadow | list[Shadow]:
        name = op_name(node)
        if name == "getitem":
            shadows = self.results(argument(node, 0))
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


Rule = Callable[[ChannelState, Node], Result]

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
