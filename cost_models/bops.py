"""Bit operations: multiply-accumulates weighted by the bits of both operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.cost_models.core import FLOAT_BITS, LayerShapes
from secateur.cost_models.macs import Macs


@dataclass(frozen=True)
class Bops:
    """Bit operations per image: multiply-accumulates x weight bits x activation bits, 32 x 32 without quantization."""

    name: ClassVar[str] = "bops"

    def per_layer(self, shapes: LayerShapes) -> np.ndarray:
        """Return each layer's bit operations, (population, L)."""
        bops = Macs().per_layer(shapes)
        bops *= shapes.weight_bits
        bops *= shapes.activation_bits
        return bops

    def total(self, shapes: LayerShapes) -> np.ndarray:
        """Return the bit operations of each network, (population,); products without weights are in float32."""
        return self.per_layer(shapes).sum(axis=1) + shapes.other_macs * FLOAT_BITS**2
