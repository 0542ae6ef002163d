"""Bytes that a network moves between memory and arithmetic units, for the precisions in which its layers are executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from secateur.cost_models.core import FLOAT_BITS, LayerShapes, NetworkGeometry
from secateur.cost_models.precision import FLOAT_WIDTHS, executed_precision, precision_name


@dataclass(frozen=True)
class Traffic:
    """Bytes that are read and written for one image without a cache.

    A layer reads its weights and its input and writes its output, all with the bit-width of its execution; each call reads the
    weights again. The size of the input is taken as the size of the output times the stride, which ignores borders without
    padding. Other steps move the buffers that they read for the last time and the buffers that they write; a sum that is
    written in place of one operand reads both operands and writes one. Operators that work in place on one operand
    (activations, norms) are taken as fused with the step before.

    Attributes:
        float_precision: a key of `FLOAT_WIDTHS`; the precision of layers that are not executed in integers.
        integer_bits: bit-widths of the device's integer kernels.
    """

    float_precision: str
    integer_bits: tuple[int, ...]

    def executed(self, shapes: LayerShapes) -> np.ndarray:
        """Return the bits in which each layer is executed, (population, L); see `executed_precision`."""
        return executed_precision(shapes.weight_bits, shapes.activation_bits, self.integer_bits)

    def by_precision(self, executed: np.ndarray, figures: Mapping[str, float]) -> np.ndarray:
        """Return the figure for each layer's precision, (population, L); `figures` has all precisions of the device."""
        by_bits = np.zeros(FLOAT_BITS + 1)
        for bits in (*self.integer_bits, FLOAT_BITS):
            by_bits[bits] = figures[precision_name(bits, self.float_precision)]
        return by_bits[executed]

    def layers(self, shapes: LayerShapes, executed: np.ndarray) -> np.ndarray:
        """Return the bytes that each layer moves, (population, L); `executed`: bits in which each layer is executed."""
        layers = shapes.geometry.layers
        outputs = np.array([layer.out_hw[0] * layer.out_hw[1] for layer in layers], float)
        inputs = outputs * [layer.stride[0] * layer.stride[1] for layer in layers]
        moved = shapes.weights + shapes.in_channels * inputs
        moved += shapes.out_channels * outputs
        widths = np.arange(FLOAT_BITS + 1) / 8
        widths[FLOAT_BITS] = FLOAT_WIDTHS[self.float_precision] / 8
        moved *= widths[executed]
        moved *= [layer.calls for layer in layers]
        return moved

    def other_steps(self, shapes: LayerShapes) -> tuple[np.ndarray, int]:
        """Return the bytes that all steps without a layer move, (population,), and the number of these steps."""
        touches = _touches(shapes.geometry)
        times = touches.sum(axis=0)
        at = np.flatnonzero(times)
        elements = shapes.geometry.buffer_fixed[at] + shapes.widths @ shapes.geometry.buffer_per_unit[:, at]
        # Other steps mostly read floats; only a buffer that a single layer reads in integers may have fewer bits.
        return elements @ times[at] * (FLOAT_WIDTHS[self.float_precision] / 8), int((touches > 0).any(axis=1).sum())


def _touches(geometry: NetworkGeometry) -> np.ndarray:
    """Return how often each step without a layer reads or writes each buffer, (steps, B).

    `live` marks the buffers that hold memory while a step runs: the step writes the buffers that are live for the first time,
    and reads those that are live for the last time. A step with last reads but without a new buffer overwrites another operand
    of the same size.
    """
    live = geometry.live.astype(int)
    edge = np.zeros((1, live.shape[1]), int)
    starts = np.diff(live, axis=0, prepend=edge) > 0
    ends = np.diff(live, axis=0, append=edge) < 0
    ends[-1] = False  # the outputs of the network
    written = starts.astype(float)
    in_place = ~starts.any(axis=1, keepdims=True)
    return (written + ends * np.where(in_place, 3, 1))[geometry.step_layer < 0]
