"""No recovery: the network is judged as compression left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from envs.model_graph.plan import ModelGraph


@dataclass(frozen=True)
class NoRecoveryConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class NoRecovery:
    """Does nothing."""

    config: NoRecoveryConfig = NoRecoveryConfig()
    before_quantization: ClassVar[bool] = False

    def prepare(self, model: nn.Module, graph: ModelGraph, images: Tensor) -> None:
        """See `Recovery.prepare`."""

    def apply(
        self,
        network: nn.Module,
        dense_model: nn.Module,
        graph: ModelGraph,
        kept: Sequence[np.ndarray],
        prepared: None,
        images: Tensor,
    ) -> None:
        """See `Recovery.apply`."""
