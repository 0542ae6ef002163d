"""Cost models of compressed networks; a new model is one file and one line in `COST_MODELS`.

Costs that depend on a device (latency, energy) are in `secateur.cost_models.device`.
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
"""{name: class} of the cost models that do not depend on a device; all are made without arguments."""
