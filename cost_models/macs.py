"""Multiply-accumulates per image; they do not depend on the precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.cost_models.core import LayerShapes


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image of all layers and of the products without weights; FLOPs are twice as many.

    Norms, activations, pooling and biases are not counted, as in published figures of papers and torchvision.
    """

    name: ClassVar[str] = "macs"

    def per_layer(self, shapes: LayerShapes) -> np.ndarray:
        """Return each layer's multiply-accumulates, (population, L)."""
        return shapes.weights * shapes.geometry.macs_per_weight

    def total(self, shapes: LayerShapes) -> np.ndarray:
        """Return the multiply-accumulates of each network, (population,): those of the layers and of other products."""
        return shapes.weights @ shapes.geometry.macs_per_weight + shapes.other_macs
