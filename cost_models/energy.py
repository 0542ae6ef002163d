"""Energy from counts: picojoules per multiply-accumulate and per byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from secateur.cost_models.core import LayerShapes, NonNegative, Range, check_fields
from secateur.cost_models.macs import Macs
from secateur.cost_models.traffic import Traffic


@dataclass(frozen=True)
class Energy:
    """Energy figures of a device.

    Attributes:
        mac_pj: {precision: picojoules per multiply-accumulate}, for "float32", "int8" and so on.
        byte_pj: picojoules per byte that is read from or written to memory.
    """

    mac_pj: Annotated[dict[str, float], Range(least=0)]
    byte_pj: NonNegative

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class CountedEnergy:
    """Millijoules per image: arithmetic plus memory traffic, without the device's idle power.

    Attributes:
        energy: energy figures of the device.
        traffic: model of the bytes that are moved, with the precisions of the device.
    """

    name: ClassVar[str] = "energy_mj"

    energy: Energy
    traffic: Traffic

    def per_layer(self, shapes: LayerShapes) -> np.ndarray:
        """Return each layer's millijoules, (population, L)."""
        executed = self.traffic.executed(shapes)
        picojoules = Macs().per_layer(shapes)
        picojoules *= self.traffic.by_precision(executed, self.energy.mac_pj)
        picojoules += self.traffic.layers(shapes, executed) * self.energy.byte_pj
        return 1e-9 * picojoules

    def total(self, shapes: LayerShapes) -> np.ndarray:
        """Return the millijoules of each network, (population,): layers, other steps, and products without weights."""
        moved, _ = self.traffic.other_steps(shapes)
        products = shapes.other_macs * self.energy.mac_pj[self.traffic.float_precision]
        return self.per_layer(shapes).sum(axis=1) + 1e-9 * (moved * self.energy.byte_pj + products)
