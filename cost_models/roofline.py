"""Analytic latency: the time of a layer is the time of its arithmetic or of its memory traffic, whichever is longer.

Source: Williams, Waterman and Patterson 2009, "Roofline", doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from secateur.cost_models.core import LayerShapes, NonNegative, Positive, Range, check_fields
from secateur.cost_models.macs import Macs
from secateur.cost_models.traffic import Traffic


@dataclass(frozen=True)
class Roofline:
    """Peak rates of a device.

    Attributes:
        macs_per_second: {precision: multiply-accumulates per second}, for "float32", "int8" and so on.
        bytes_per_second: memory bandwidth.
        layer_overhead_us: additional microseconds for every call of a layer.
        step_overhead_us: additional microseconds for every other step that reads or writes memory (a sum, a pooling).
    """

    macs_per_second: Annotated[dict[str, float], Range(above=0)]
    bytes_per_second: Positive
    layer_overhead_us: NonNegative = 0.0
    step_overhead_us: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class RooflineLatency:
    """Milliseconds per image from peak rates: a lower bound if the overheads are zero, and a ranking in any case.

    Layers run one after the other, each in max(arithmetic, traffic) + overhead. Bytes are those of `Traffic`. Caches and the
    efficiency of kernels are not modeled: depthwise layers, whose arithmetic is far below the peak on all devices, are limited
    by their traffic here. Products without weights (attention) run at the peak rate of the float precision.

    Attributes:
        roofline: peak rates of the device.
        traffic: model of the bytes that are moved, with the precisions of the device.
    """

    name: ClassVar[str] = "latency_ms"

    roofline: Roofline
    traffic: Traffic

    def per_layer(self, shapes: LayerShapes) -> np.ndarray:
        """Return each layer's milliseconds, (population, L)."""
        executed = self.traffic.executed(shapes)
        seconds = Macs().per_layer(shapes)
        seconds /= self.traffic.by_precision(executed, self.roofline.macs_per_second)
        np.maximum(seconds, self.traffic.layers(shapes, executed) / self.roofline.bytes_per_second, out=seconds)
        seconds += [1e-6 * self.roofline.layer_overhead_us * layer.calls for layer in shapes.geometry.layers]
        seconds *= 1e3
        return seconds

    def total(self, shapes: LayerShapes) -> np.ndarray:
        """Return the milliseconds of each network, (population,): layers, other steps, and products without weights."""
        moved, steps = self.traffic.other_steps(shapes)
        peak = self.roofline.macs_per_second[self.traffic.float_precision]
        seconds = moved / self.roofline.bytes_per_second + shapes.other_macs / peak
        seconds += 1e-6 * self.roofline.step_overhead_us * steps
        return self.per_layer(shapes).sum(axis=1) + 1e3 * seconds
