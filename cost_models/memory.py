"""Memory: the size of the stored network, and the memory of its activations during a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.cost_models.core import FLOAT_BITS, LayerShapes

FLOAT_BYTES = FLOAT_BITS // 8
ROWS_AT_ONCE = 4096
"""Number of policies whose live bytes are computed together."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of all parameters: weights with their bit-widths, all other parameters in float32.

    A quantized layer has one additional float32 scale per output channel; a dense float32 network has 4 bytes per parameter.
    Codes are packed: a 4-bit weight takes half a byte.
    """

    name: ClassVar[str] = "weight_bytes"

    def per_layer(self, shapes: LayerShapes) -> np.ndarray:
        """Return the bytes of each layer's weights, scales and biases, (population, L)."""
        vectors = shapes.geometry.has_bias + (shapes.weight_bits < FLOAT_BITS)  # float32 vectors of one entry per output channel
        vectors *= shapes.out_channels
        vectors *= FLOAT_BYTES
        weight_bytes = shapes.weights * shapes.weight_bits
        weight_bytes /= 8
        weight_bytes += vectors
        return weight_bytes

    def total(self, shapes: LayerShapes) -> np.ndarray:
        """Return the bytes of each network, (population,): those of the layers, the norms and all other parameters."""
        return self.per_layer(shapes).sum(axis=1) + shapes.other_parameters * FLOAT_BYTES


@dataclass(frozen=True)
class PeakActivationBytes:
    """Largest sum of all buffers that are live at the same step, for one image; it is not a sum over layers."""

    name: ClassVar[str] = "peak_activation_bytes"

    def per_layer(self, shapes: LayerShapes) -> np.ndarray:
        """Return the live bytes while each layer runs, (population, L): the maximum over its calls, 0 if it has no step."""
        step_layer = shapes.geometry.step_layer
        peaks = np.zeros((len(shapes), len(shapes.geometry.layers)))
        for rows, live_bytes in _live_bytes(shapes):
            for step in np.flatnonzero(step_layer >= 0):
                column = peaks[rows, step_layer[step]]
                np.maximum(column, live_bytes[:, step], out=column)
        return peaks

    def total(self, shapes: LayerShapes) -> np.ndarray:
        """Return the peak of each network over all steps, (population,)."""
        return np.concatenate([live_bytes.max(axis=1, initial=0.0) for _, live_bytes in _live_bytes(shapes)])


def _live_bytes(shapes: LayerShapes) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, live bytes at every step, (rows, S)) in parts, because all rows together would need gigabytes."""
    live = shapes.geometry.live.T.astype(float)
    for start in range(0, max(len(shapes), 1), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        yield rows, shapes.buffer_bytes[rows] @ live
