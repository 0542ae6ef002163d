"""How products of activations change the channels, e.g. those of attention: rules of `ChannelFlow`.

A product is written with one letter per axis, as in `torch.einsum`. Channels on a letter that several operands have are coupled.
If the channels of an operand vary on several letters, those on a letter that all operands and the result have (the heads of
attention) remain prunable as wholes, and the entries on the other letters (the width of a head) are merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor
from torch.fx import Node

from secateur.envs.model_graph.channel_state import ChannelState
from secateur.envs.model_graph.identities import EXPANDED
from secateur.envs.model_graph.shadows import Shadow, along, filled, first_entries, narrow
from secateur.envs.model_graph.trace import argument, arguments, op_name, shape_of

Letters = Sequence[str]
"""One letter per axis; letters of batch axes, which may be broadcast, are numbers that count from the last one."""


def matmul(flow: ChannelState, node: Node) -> Tensor:
    added = op_name(node) == "baddbmm"  # the product is added to the first argument
    operands = [flow.single(argument(node, i + added)) for i in (0, 1)]
    if min(ids.dim() for ids in operands) < 2:
        raise ValueError("A product with a vector.")
    letters = [_batch(ids.dim() - 2) + list(axes) for ids, axes in zip(operands, ("ik", "kj"), strict=True)]
    if added:
        operands.append(flow.single(argument(node, 0)))
        letters.append(_batch(1) + ["i", "j"])
    return _product(flow, node, operands, letters, _batch(len(shape_of(node)) - 2) + ["i", "j"])


def einsum(flow: ChannelState, node: Node) -> Tensor:
    inputs, arrow, result = argument(node, 0).replace(" ", "").partition("->")
    letters = [list(part) for part in inputs.split(",")]
    if not arrow or "." in inputs or any(len(set(part)) < len(part) for part in letters):
        raise ValueError("An equation without a result, with an ellipsis or a diagonal.")
    return _product(flow, node, [flow.single(x) for x in argument(node, 1)], letters, list(result))


def attention(flow: ChannelState, node: Node) -> Tensor:
    given = arguments(node)
    if given["enable_gqa"]:
        raise ValueError("Several heads share their keys.")
    operands, letters = [], []
    for name, axes in (("query", "le"), ("key", "se"), ("value", "sv"), ("attn_mask", "ls")):
        if given[name] is not None:
            operands.append(flow.single(given[name]))
            letters.append(_batch(operands[-1].dim() - 2) + list(axes))
    result = _product(flow, node, operands, letters, _batch(len(shape_of(node)) - 2) + ["l", "v"])
    if given["scale"] is None and operands[0].dim() - 1 in flow.channel_axes(operands[0]):
        flow.freeze([given["query"], given["key"]], f"the default scale of {op_name(node)} depends on the width of a head")
    return result


def _batch(count: int) -> list[str]:
    return [str(i) for i in reversed(range(count))]


def _product(flow: ChannelState, node: Node, operands: Sequence[Tensor], letters: Sequence[Letters], result: Letters) -> Tensor:
    """Couple the channels of the operands; return the shadow of the result.

    Raises:
        ValueError: if channels meet values without channels, or if the channels of two operands remain apart in the result.
    """
    holders = Counter(letter for axes in letters for letter in axes)
    for ids, axes in zip(operands, letters, strict=True):
        varying = [axes[d] for d in flow.channel_axes(ids)]
        kept = [letter for letter in varying if holders[letter] > 1 and letter in result] or varying
        flow.unify(ids, [axes.index(letter) for letter in varying if letter != kept[-1]])
    found = {letter: _along(flow, operands, letters, letter) for letter in holders}
    carried = {letter: entries for letter, entries in found.items() if entries}
    if sum(letter in result for letter in carried) > 1:
        raise ValueError("The channels of two operands remain apart.")
    for entries in carried.values():
        for other in entries[1:]:
            flow.identities.merge(entries[0], other)
    for letter, entries in carried.items():
        if letter in result:
            return along(entries[0], list(result).index(letter), shape_of(node))
    return filled(flow.identities.constant(f"the result of {op_name(node)}"), shape_of(node))


def _along(flow: ChannelState, operands: Sequence[Tensor], letters: Sequence[Letters], letter: str) -> list[np.ndarray]:
    """Return the channels of each operand that has several entries on a letter; [] if no channels vary on it."""
    axes = [(ids, list(found).index(letter)) for ids, found in zip(operands, letters, strict=True) if letter in found]
    axes = [(ids, axis) for ids, axis in axes if ids.size(axis) > 1 and not bool((narrow(ids) == EXPANDED).all())]
    varying = [axis in flow.channel_axes(ids) for ids, axis in axes]
    if any(varying) and not all(varying):
        raise ValueError("Channels meet values without channels.")
    return [first_entries(ids, axis).numpy() for ids, axis in axes] if any(varying) else []


PRODUCTS: dict[str, Callable[[ChannelState, Node], Tensor | Shadow]] = {
    "matmul": matmul,
    "bmm": matmul,
    "baddbmm": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
}
"""Rules of products, by the operator's plain name."""
