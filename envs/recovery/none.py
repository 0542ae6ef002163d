"""No recovery: the network is judged as compression left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.envs.candidate import CandidateNetwork


@dataclass(frozen=True)
class NoRecoveryConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class NoRecovery:
    """Does nothing."""

    config: NoRecoveryConfig = NoRecoveryConfig()
    after_quantization: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
