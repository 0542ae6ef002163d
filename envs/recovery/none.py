"""No recovery: the network is evaluated without changes after compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.envs.candidate import CandidateNetwork


@dataclass(frozen=True)
class NoRecoveryConfig:
    """No options."""


@dataclass(frozen=True)
class NoRecovery:
    """Does not change the network."""

    config: NoRecoveryConfig = NoRecoveryConfig()
    after_quantization: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
