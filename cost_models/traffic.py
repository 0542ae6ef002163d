"""How many bytes a network moves between memory and arithmetic units, by the precision that its layers are executed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from secateur.cost_models.core import FLOAT_BITS, LayerShapes, NetworkGeometry
from secateur.cost_models.precision import FLOAT_WIDTHS, executed_precision, precision_name


@dataclass(frozen=True)
class Traffic:
    """Bytes that are read and written for one image when nothing stays in a cache.

    A layer reads its weights and its input and writes its output, all at the width that it is executed in; each call reads
    the weights again. The input's size is taken as the output's times the stride, which forgets borders without padding.
    Other steps move what they finish reading and what they make; a sum written in place over one of its operands reads both
    and writes one. Work in place on a single operand (activations, norms) is taken as fused into the step before.

    Attributes:
        float_precision: a key of `FLOAT_WIDTHS`; how layers that are not integer are executed.
        integer_bits: widths that the device has integer kernels for.
    """

    float_precision: str
    integer_bits: tuple[int, ...]

    def executed(self, shapes: LayerShapes) -> np.ndarray:
        """Return the bits that each layer is executed in, (population, L), as `executed_precision` says it."""
        return executed_precision(shapes.weight_bits, shapes.activation_bits, self.integer_bits)

    def by_precision(self, executed: np.ndarray, figures: Mapping[str, float]) -> np.ndarray:
        """Return the figure of each layer's precision, (population, L); `figures` has all precisions of the device."""
        by_bits = np.zeros(FLOAT_BITS + 1)
        for bits in (*self.integer_bits, FLOAT_BITS):
            by_bits[bits] = figures[precision_name(bits, self.float_precision)]
        return by_bits[executed]

    def layers(self, shapes: LayerShapes, executed: np.ndarray) -> np.ndarray:
        """Return the bytes that each layer moves, (population, L); `executed` are its bits."""
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
        """Return the bytes that all steps without a layer move, (population,), and how many steps those are."""
        touches = _touches(shapes.geometry)
        times = touches.sum(axis=0)
        at = np.flatnonzero(times)
        elements = shapes.geometry.buffer_fixed[at] + shapes.widths @ shapes.geometry.buffer_per_unit[:, at]
        # A buffer that a layer of integers reads alone may be narrower; what other steps touch, they mostly read as floats.
        return elements @ times[at] * (FLOAT_WIDTHS[self.float_precision] / 8), int((touches > 0).any(axis=1).sum())


def _touches(geometry: NetworkGeometry) -> np.ndarray:
    """Return how often each step without a layer reads or writes each buffer, (steps, B).

    `live` tells which buffers are there while a step runs: what is there for the first time it writes, what is there for
    the last time it reads. A step that ends buffers and starts none has written over another operand of the same size.
    """
    live = geometry.live.astype(int)
    edge = np.zeros((1, live.shape[1]), int)
    starts = np.diff(live, axis=0, prepend=edge) > 0
    ends = np.diff(live, axis=0, append=edge) < 0
    ends[-1] = False  # the outputs
    written = starts.astype(float)
    in_place = ~starts.any(axis=1, keepdims=True)
    return (written + ends * np.where(in_place, 3, 1))[geometry.step_layer < 0]
