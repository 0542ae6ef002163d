"""Which quantized layers an export executes in float32: those that the device computes faster that way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from secateur.cost_models.core import FLOAT_BITS, LayerShapes
from secateur.cost_models.device import Device
from secateur.cost_models.latency_table import TableLatency
from secateur.cost_models.precision import executed_precision
from secateur.search.profiling.runtimes import PyTorch

INTEGER_BITS = 8
"""The width of the integers in an ONNX file; layers with fewer bits are stored in it."""

FASTER_IN_FLOAT = (
    "It runs in float32, which is faster on the device than 8-bit integers: its weights are the rounded values, its input is "
    "not rounded."
)
NOT_MEASURED = (
    "It runs in float32, because the device was profiled without 8-bit integers: its weights are the rounded values, its input "
    "is not rounded."
)


def layers_in_float(device: Device | None, shapes: LayerShapes) -> dict[str, str]:
    """Return {layer: reason} of the layers that have bits for integers and are executed in float32.

    The latency table of a measured device decides, and its predicted latencies are those of the same execution
    (`TableLatency.executed`). Without a table, or with a table of PyTorch, which executes no ONNX files, every layer that has the
    bits is executed in integers.

    Args:
        device: of the search.
        shapes: of one network.
    """
    if device is None or device.table is None or device.table.runtime == PyTorch.name:
        return {}
    possible = executed_precision(shapes.weight_bits, shapes.activation_bits, (INTEGER_BITS,))[0] != FLOAT_BITS
    executed = TableLatency(device.table, device.integer_bits).executed(shapes)[0]
    reason = FASTER_IN_FLOAT if device.integer_bits else NOT_MEASURED
    return {shapes.geometry.layers[index].name: reason for index in np.flatnonzero(possible & (executed == FLOAT_BITS))}


def recorded_execution(execution: Sequence[Mapping[str, Any]], shapes: LayerShapes, integer_bits: tuple[int, ...]) -> np.ndarray:
    """Return the bits that each layer of an export is executed in, (1, L), as its policy.json records it.

    Args:
        execution: the entries of policy.json. Exports of earlier versions have no `kept_in_float`: they keep no layer in float32.
        shapes: of the network.
        integer_bits: widths that the device has integer kernels for.
    """
    kept = {layer["name"] for layer in execution if layer.get("kept_in_float", False)}
    in_float = np.array([layer.name in kept for layer in shapes.geometry.layers])
    return np.where(in_float, FLOAT_BITS, executed_precision(shapes.weight_bits, shapes.activation_bits, integer_bits))
