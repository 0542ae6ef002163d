"""Verification of the groups: one unit of every group is removed, and the model's own forward pass is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.cost_models.core import InputError
from secateur.envs.model_graph.channel_flow import ChannelFlow
from secateur.envs.model_graph.groups import build_graph, group_elements
from secateur.envs.model_graph.plan import ModelGraph, ViewSize, WrittenSize
from secateur.envs.model_graph.trace import Trace, first_line
from secateur.envs.model_graph.written_sizes import (
    attribute_candidates,
    modules_with,
    same_classes,
    size_candidates,
    views_of_groups,
)
from secateur.envs.pruning.slicing import masked_model, slice_model

RELATIVE_TOLERANCE = 1e-3
"""Largest difference, relative to the largest output, that is attributed to float32 rounding in a deep network."""

MACS_LIMIT = 3e9
"""Networks with more multiply-accumulates are verified on smaller images, if their forward pass accepts them."""


def verified_graph(
    model: nn.Module, example_inputs: Sequence[Tensor], trace: Trace, flow: ChannelFlow, graph: ModelGraph
) -> ModelGraph:
    """Return the structure without the groups for which the model's own forward pass fails.

    The analysis sees one execution. A forward pass with constant sizes in its code (`x[:, :32]`) runs only with the dense widths.
    If the numbers are stored in attributes, or are sizes of views, they change with the units. Other such groups are found by
    bisection and frozen; the reason is the error.

    Args:
        model: the traced model, in eval mode.
        example_inputs: example inputs of the model.
        trace, flow, graph: results of the analysis; new reasons are added to `flow`.
    Raises:
        InputError: if the forward pass accepts single images only.
    """
    inputs = _test_inputs(model, example_inputs, graph)
    _check_batch(model, inputs)
    if _error_without(model, graph, inputs, range(len(graph.groups))) is None:
        return graph
    graph = _couple_alike(model, trace, flow, graph, inputs)
    # Attributes and views that change with the units, by the elements of their group.
    sizes = {group_elements(flow, group).tobytes(): group.sizes for group in graph.groups if group.sizes}
    views = _resolve_views(model, trace, flow, graph, inputs, sizes)
    graph = _with_sizes(flow, graph, sizes, views)
    while graph.groups:
        culprits = _culprits(model, graph, inputs, list(range(len(graph.groups))))
        if not culprits:
            break
        for index, error in culprits.items():
            members = group_elements(flow, graph.groups[index])
            known = members.tobytes() in sizes or members.tobytes() in views
            found = () if known else _find_sizes(model, graph, inputs, index, modules_with(trace, flow, members))
            if found:
                sizes[members.tobytes()] = found
            else:
                flow.identities.freeze(members, f"cannot be removed: {error}")
        graph = _with_sizes(flow, build_graph(trace, flow), sizes, views)
    return graph


def _couple_alike(model: nn.Module, trace: Trace, flow: ChannelFlow, graph: ModelGraph, inputs: Sequence[Tensor]) -> ModelGraph:
    """Couple groups for which a module uses the same number, e.g. the heads of keys and of values with a layer between them."""
    pairs = views_of_groups(trace, flow, graph).alike
    pairs = {pair for pair in pairs if _error_without(model, graph, inputs, pair) is not None}
    for pair in pairs:
        first, second = (graph.groups[index].slices[0] for index in pair)
        units = [flow.identities.of(s.tensor, s.axis)[s.positions[:, 0]] for s in (first, second)]
        flow.identities.merge(*units)
    return build_graph(trace, flow) if pairs else graph


def _with_sizes(
    flow: ChannelFlow,
    graph: ModelGraph,
    sizes: Mapping[bytes, tuple[WrittenSize, ...]],
    views: Mapping[bytes, tuple[ViewSize, ...]],
) -> ModelGraph:
    """Return the structure with the attributes and views of each group, by the group's elements."""
    groups = []
    for group in graph.groups:
        key = group_elements(flow, group).tobytes()
        groups.append(replace(group, sizes=sizes.get(key, group.sizes), views=views.get(key, ())))
    return replace(graph, groups=tuple(groups))


def _resolve_views(
    model: nn.Module,
    trace: Trace,
    flow: ChannelFlow,
    graph: ModelGraph,
    inputs: Sequence[Tensor],
    sizes: dict[bytes, tuple[WrittenSize, ...]],
) -> dict[bytes, tuple[ViewSize, ...]]:
    """Find what must change with the units of the groups whose channels pass through views, e.g. the heads of attention.

    Groups that are viewed by modules of the same classes are tried together: first without a change, then with attributes of
    these modules, e.g. `num_heads` (added to `sizes`). If neither works, the views themselves change.

    Args:
        model, trace, flow, graph, inputs: the traced model, its structure, and inputs for its forward pass.
        sizes: attributes by the elements of their group; found ones are added.
    Returns:
        The views by the elements of their group.
    """
    views: dict[bytes, tuple[ViewSize, ...]] = {}
    written = views_of_groups(trace, flow, graph).views
    for members in same_classes(model, written):
        if _exact(model, graph, inputs, members):
            continue
        found = {index: written[index] for index in members}
        for candidate in attribute_candidates(model, graph, found):
            groups = [replace(g, sizes=g.sizes + candidate.get(i, ())) for i, g in enumerate(graph.groups)]
            if _exact(model, replace(graph, groups=tuple(groups)), inputs, members):
                sizes |= {group_elements(flow, groups[index]).tobytes(): groups[index].sizes for index in members}
                break
        else:
            views |= {group_elements(flow, graph.groups[index]).tobytes(): found[index] for index in members}
    return views


def _exact(model: nn.Module, graph: ModelGraph, inputs: Sequence[Tensor], members: Sequence[int]) -> bool:
    """Return whether these groups can be removed, both with one unit less and with one unit left."""
    kept = [np.arange(group.units)[: 1 if index in members else None] for index, group in enumerate(graph.groups)]
    return _error_without(model, graph, inputs, members) is None and _error(model, graph, inputs, kept) is None


def _find_sizes(
    model: nn.Module, graph: ModelGraph, inputs: Sequence[Tensor], index: int, modules: Sequence[str]
) -> tuple[WrittenSize, ...]:
    """Return attributes that must change with a group's units so that its units can be removed; () if none are found.

    Modules often store numbers of channels and use them in their forward pass, e.g. `x.split(self.width, dim=1)`. Tried are the
    numbers, alone or in lists, that are stored by modules whose forward pass uses the group's channels, and that are multiples of
    the number of units. A trial succeeds if the outputs are those of the network with the same entries zeroed, both with one unit
    less and with one unit left.

    Args:
        model, graph, inputs: the traced model, its structure, and inputs for its forward pass.
        index: of the group.
        modules: paths of the modules whose forward pass uses the group's channels.
    """
    group = graph.groups[index]
    for found in size_candidates(model, group, modules):
        groups = [*graph.groups[:index], replace(group, sizes=found), *graph.groups[index + 1 :]]
        trial = replace(graph, groups=tuple(groups))
        if _exact(model, trial, inputs, [index]):
            return found
    return ()


@torch.no_grad()
def _check_batch(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Raise InputError unless the forward pass runs on two images and returns a tensor with one row for each of them."""
    try:
        outputs = [x for x in pytree.tree_leaves(model(*inputs)) if isinstance(x, Tensor)]
    except Exception as error:  # the user's forward may raise any error
        reason = first_line(error)
    else:
        if not outputs or any(x.dim() and len(x) == len(inputs[0]) for x in outputs):
            return
        reason = f"the output has shape {tuple(outputs[0].shape)}"
    raise InputError(
        f"The forward pass of {type(model).__name__} runs on one image but not on a batch of two: {reason}. Keep the first axis "
        "free in it, for example `x.flatten(1)` in place of `x.view(1, -1)`."
    )


def _culprits(model: nn.Module, graph: ModelGraph, inputs: Sequence[Tensor], suspects: list[int]) -> dict[int, str]:
    """Return {group: error} of the groups for which the forward pass fails, found by bisection."""
    error = _error_without(model, graph, inputs, suspects)
    if error is None:
        return {}
    if len(suspects) == 1:
        return {suspects[0]: error}
    half = len(suspects) // 2
    found = {
        **_culprits(model, graph, inputs, suspects[:half]),
        **_culprits(model, graph, inputs, suspects[half:]),
    }
    # Each half can be removed alone but not both together: the second half is frozen.
    return found or dict.fromkeys(suspects[half:], error)


def _error_without(model: nn.Module, graph: ModelGraph, inputs: Sequence[Tensor], removed: Sequence[int]) -> str | None:
    """Return the error of the forward pass when the middle unit of each of these groups is removed, or None."""
    kept = [np.arange(group.units) for group in graph.groups]
    for index in removed:
        kept[index] = np.delete(kept[index], graph.groups[index].units // 2)
    return _error(model, graph, inputs, kept)


@torch.no_grad()
def _error(model: nn.Module, graph: ModelGraph, inputs: Sequence[Tensor], kept: Sequence[np.ndarray]) -> str | None:
    """Return the error of the forward pass with these units, or how its outputs differ from the masked network's, or None."""
    try:
        outputs = slice_model(model, graph, kept)(*inputs)
    except Exception as error:  # the user's forward may raise any error
        return first_line(error)
    expected = masked_model(model, graph, kept)(*inputs)
    for found, wanted in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True):
        if not isinstance(wanted, Tensor):
            continue
        if found.shape != wanted.shape:
            return f"the output has shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
        if not _close(found.double(), wanted.double()):
            return "the output differs from that of the network with these channels zeroed"
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Return whether two outputs agree; entries that overflowed in both are not compared."""
    finite = wanted.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    found, wanted = found[finite], wanted[finite]
    return not len(wanted) or bool((found - wanted).abs().max() <= RELATIVE_TOLERANCE * wanted.abs().max())


def _test_inputs(model: nn.Module, example_inputs: Sequence[Tensor], graph: ModelGraph) -> list[Tensor]:
    """Return two random images; they are smaller than the example if the network is large and accepts smaller images."""
    geometry = graph.geometry
    macs = geometry.shapes().weights[0] @ geometry.macs_per_weight
    if macs > MACS_LIMIT:
        smaller = [_two_images(x, (MACS_LIMIT / macs) ** 0.5) for x in example_inputs]
        if _runs(model, smaller):
            return smaller
    return [_two_images(x, 1.0) for x in example_inputs]


@torch.no_grad()
def _runs(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    try:
        model(*inputs)
    except Exception:  # the user's forward may raise any error
        return False
    return True


def _two_images(example: Tensor, scale: float) -> Tensor:
    """Return a random batch of two images; height and width are those of the example, scaled to a multiple of 32."""
    if not example.is_floating_point():
        return example[:1].expand(2, *example.shape[1:])
    size = [2, *example.shape[1:]]
    if example.dim() == 4 and scale < 1:
        size[2:] = [min(length, max(64, round(length * scale / 32) * 32)) for length in size[2:]]
    generator = torch.Generator(example.device).manual_seed(0)
    return torch.randn(size, generator=generator, dtype=example.dtype, device=example.device)
