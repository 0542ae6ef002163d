"""The plan of a profile: which layers are scanned finely, and at which channel counts all layers are timed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.cost_models.core import LayerShape, NetworkGeometry
from secateur.cost_models.latency_table import Axis, LayerKey, Staircase, layer_family, layer_key
from secateur.search.profiling.layer_models import LayerPoint
from secateur.search.profiling.staircases import FULL, Density, measured_counts

LEAST_SCANNED = 12
"""A shorter axis is measured as it is."""
SCAN_WIDTH = 32
"""The other channel count of a scanned layer, at most."""
COARSE_WEIGHTS = 4_000_000
"""A layer with more weights is measured at few counts."""


def scanned_layers(geometry: NetworkGeometry) -> dict[str, LayerShape]:
    """Return one layer of each family that can be pruned: not too large, with many channels, of the most frequent kind."""
    frequency: dict[LayerKey, int] = {}
    for layer in geometry.layers:
        frequency[layer_key(layer)] = frequency.get(layer_key(layer), 0) + 1
    chosen: dict[str, LayerShape] = {}
    ranked = sorted(
        enumerate(geometry.layers),
        key=lambda item: (
            item[1].macs_per_weight > 1024,
            -min(item[1].in_channels, item[1].out_channels, 2 * SCAN_WIDTH),
            -frequency[layer_key(item[1])],
            item[0],
        ),
    )
    for index, layer in ranked:
        prunable = geometry.in_per_unit[:, index].any() or geometry.out_per_unit[:, index].any()
        if prunable and layer_key(layer)[4] in (0, 1):
            chosen.setdefault(_family(layer), layer)
    return chosen


def scan_points(geometry: NetworkGeometry, layer: LayerShape, axis: str, scanned: int) -> dict[int, LayerPoint]:
    """Return {count: point} of one axis of a layer, "in" or "out", up to `scanned`; empty if it is short or never pruned."""
    fixed, counts = _scan_range(geometry, layer, axis, scanned)
    if len(counts) < LEAST_SCANNED:
        return {}
    return {count: _point(layer_key(layer), axis, count, fixed) for count in counts}


def _family(layer: LayerShape) -> str:
    return layer_family(layer.kind, layer.kernel, layer_key(layer)[4])


def _scan_range(geometry: NetworkGeometry, layer: LayerShape, axis: str, scanned: int) -> tuple[int, range]:
    """Return the other axis's count and the counts to scan; no counts if the axis cannot be pruned."""
    index = geometry.layers.index(layer)
    per_unit, largest, other = (
        (geometry.in_per_unit, layer.in_channels, layer.out_channels)
        if axis == "in"
        else (geometry.out_per_unit, layer.out_channels, layer.in_channels)
    )
    if not per_unit[:, index].any() or (layer.depthwise and axis == "out"):
        return other, range(0)
    return min(other, SCAN_WIDTH), range(1, min(largest, scanned) + 1)


def _point(key: LayerKey, axis: str, count: int, other: int) -> LayerPoint:
    if key[4] == 0:
        return LayerPoint(key, count, count)
    return LayerPoint(key, count, other) if axis == "in" else LayerPoint(key, other, count)


def grid_axes(
    geometry: NetworkGeometry, staircases: Sequence[Staircase], precisions: Sequence[str], density: Density = FULL
) -> dict[tuple[LayerKey, str], tuple[Axis, Axis]]:
    """Return the channel counts to measure, {(key, precision): (in axis, out axis)}, for all layers of a network."""
    found = {(stairs.family, stairs.axis, stairs.precision): stairs for stairs in staircases}
    members: dict[LayerKey, list[int]] = {}
    for index, layer in enumerate(geometry.layers):
        members.setdefault(layer_key(layer), []).append(index)
    axes = {}
    for key, indices in members.items():
        layers = [geometry.layers[index] for index in indices]
        weights = max(shape.in_channels * shape.out_channels // shape.conv_groups for shape in layers)
        for precision in precisions:
            pair: list[Axis] = []
            for axis, per_unit in (("in", geometry.in_per_unit), ("out", geometry.out_per_unit)):
                dense = [shape.in_channels if axis == "in" else shape.out_channels for shape in layers]
                prunable = [count for count, index in zip(dense, indices, strict=True) if per_unit[:, index].any()]
                stairs = found.get((_family(layers[0]), axis, precision))
                if key[4] == 0 and axis == "out":
                    pair.append(Axis((max(1, layers[0].out_channels // layers[0].in_channels),)))
                else:
                    pair.append(_axis(dense, prunable, stairs, key[4], bool(weights * np.prod(key[1]) > COARSE_WEIGHTS), density))
            axes[key, precision] = (pair[0], pair[1])
    return axes


def _axis(
    dense: Sequence[int], prunable: Sequence[int], stairs: Staircase | None, conv_groups: int, coarse: bool, density: Density
) -> Axis:
    if not prunable:
        return Axis(tuple(sorted(set(dense))))
    if conv_groups > 1:  # counts are multiples of the groups, so a scan of layers without groups does not apply
        counts = measured_counts(max(prunable) // conv_groups, density=density)
        return Axis(tuple(sorted({conv_groups * count for count in counts} | set(dense))))
    multiples, step = (stairs.multiples, stairs.step) if stairs is not None and not coarse else ((), 1)
    counts = measured_counts(max(prunable), multiples, step, coarse, density)
    return Axis(tuple(sorted({*counts, *dense})), multiples, step)
