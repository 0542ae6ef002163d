"""Costs of a compressed network; a new model is one file and one line in `COST_MODELS`.

What depends on a device (latency, energy) comes with the device's file: `secateur.cost_models.device`.
"""

from __future__ import annotations

from secateur.cost_models.bops import Bops
from secateur.cost_models.core import CostModel
from secateur.cost_models.macs import Macs
from secateur.cost_models.memory import PeakActivationBytes, WeightBytes

COST_MODELS: dict[str, type[CostModel]] = {
    "macs": Macs,
    "bops": Bops,
    "weight_bytes": WeightBytes,
    "peak_activation_bytes": PeakActivationBytes,
}
"""Every cost model that holds on all devices, by name; each is made without arguments."""
