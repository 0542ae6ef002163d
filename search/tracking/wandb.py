"""Weights & Biases: one W&B run per search, online or in a local folder. Needs the extra `wandb`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from secateur.cost_models.core import InputError
from secateur.search.tracking.core import ScalarTracker, SearchStart

STEP = "step"
"""Number of the evaluation or epoch that values belong to. W&B's own step only rises, but epochs begin at 1 again."""


@dataclass(frozen=True)
class WeightsAndBiasesConfig:
    """Weights & Biases: scores, costs and the configuration as a W&B run.

    Attributes:
        project: name of the project.
        entity: user or team that the run belongs to; None: W&B's default.
        mode: "online"; "offline": files in the folder `wandb` of the run, which `wandb sync` uploads later.
    """

    project: str = "secateur"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class WeightsAndBiases(ScalarTracker):
    """Logs to a W&B run whose id follows from the path of the run's folder, so a search that goes on continues it."""

    def __init__(self, config: WeightsAndBiasesConfig):
        self._config = config
        self._run: Any = None

    def open(self, start: SearchStart) -> None:
        """Begin the W&B run, or go on with it.

        Raises:
            InputError: if W&B is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise InputError("Weights & Biases is not installed: pip install 'secateur[wandb]'") from None
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            dir=str(start.run),
            name=start.run.name,
            id=hashlib.sha256(str(start.run.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            config=dict(start.config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        self._run.define_metric("*", step_metric=STEP)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the values."""
        self._run.log({**values, STEP: step})

    def close(self, error: BaseException | None) -> None:
        """Say how the run ended."""
        self._run.finish(exit_code=0 if error is None else 1)
