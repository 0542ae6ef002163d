"""Fits what whole networks take beyond the sum of their layers, and checks it on other networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import lsq_linear

from secateur.cost_models.core import LayerShapes
from secateur.cost_models.latency_table import Correction, LatencyTable, TableLatency, WholeModelCheck, layer_family, weight_bytes
from secateur.cost_models.precision import executed_precision
from secateur.cost_models.traffic import Traffic
from secateur.search.correlation import spearman

PULL = 0.1
"""How strongly a factor is drawn to 1, against one network's relative error: families that hardly matter stay at 1."""

SMALL_LAYERS = 0.05
"""The share of layers whose time may be less than what is taken from each."""


def fit_correction(
    table: LatencyTable, integer_bits: tuple[int, ...], shapes: LayerShapes, milliseconds: Sequence[float], precision: str
) -> Correction:
    """Return the correction with the least squared relative error.

    Nothing of it is negative but `per_layer`, which also takes back what a runtime's profile adds to each operator.

    Args:
        table: grids without a correction for this precision.
        shapes: the networks, all layers in `precision`.
        milliseconds: their measured latency.
    """
    measured = np.array(milliseconds)
    geometry = shapes.geometry
    executed = _measured_execution(shapes, integer_bits)
    layers = TableLatency(replace(table, corrections=()), integer_bits).per_layer(shapes, executed)
    families = [layer_family(layer.kind, layer.kernel, 0 if layer.depthwise else layer.conv_groups) for layer in geometry.layers]
    names = sorted(set(families))
    traffic = Traffic(table.float_precision, integer_bits)
    width = weight_bytes(int(executed.flat[0]), table.float_precision)
    columns = [layers[:, [family == name for family in families]].sum(axis=1) for name in names]
    columns += [np.full(len(measured), float(sum(layer.calls for layer in geometry.layers)))]
    columns += [1e-6 * width * shapes.weights.sum(axis=1), 1e-6 * traffic.other_steps(shapes)[0]]
    matrix = np.stack(columns, axis=1) / measured[:, None]
    pull = PULL * np.eye(len(names), len(columns))
    target = np.concatenate([np.ones(len(measured)), np.full(len(names), PULL)])
    least = np.zeros(len(columns))
    least[len(names)] = -np.quantile(layers, SMALL_LAYERS)  # more would leave nothing of small layers
    *factors, per_layer, per_weight, per_megabyte = lsq_linear(np.concatenate([matrix, pull]), target, (least, np.inf)).x.tolist()
    return Correction(precision, dict(zip(names, factors, strict=True)), per_layer, per_weight, per_megabyte)


def check(
    table: LatencyTable,
    integer_bits: tuple[int, ...],
    shapes: LayerShapes,
    milliseconds: Sequence[float],
    precision: str,
    fitted: int,
) -> WholeModelCheck:
    """Return how far the table's predictions are from networks that took no part in the fit.

    Args:
        fitted: how many others did.
    """
    measured = np.array(milliseconds)
    executed = _measured_execution(shapes, integer_bits)
    predicted = TableLatency(table, integer_bits).total(shapes, executed)
    plain = TableLatency(replace(table, corrections=(), border=0.0), integer_bits).total(shapes, executed)
    return WholeModelCheck(
        precision,
        fitted,
        float(np.mean(np.abs(predicted / measured - 1))),
        float(np.mean(np.abs(plain / measured - 1))),
        spearman(predicted, measured),
        tuple(predicted.round(6).tolist()),
        tuple(measured.round(6).tolist()),
    )


def _measured_execution(shapes: LayerShapes, integer_bits: tuple[int, ...]) -> np.ndarray:
    """Return the bits that each layer was executed in, (population, L): the profiler has every layer run in its own bits."""
    return executed_precision(shapes.weight_bits, shapes.activation_bits, integer_bits)
