"""TensorBoard: event files in the run's folder; `tensorboard --logdir runs` shows all runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.search.tracking.core import ScalarTracker, SearchStart

FOLDER = "tensorboard"
"""Folder of the event files in a run."""


@dataclass(frozen=True)
class TensorBoardConfig:
    """TensorBoard: event files in the folder `tensorboard` of the run."""


class TensorBoard(ScalarTracker):
    """Writes event files with tensorboardX, which comes with ray[tune]."""

    def __init__(self, config: TensorBoardConfig):
        self._writer: Any = None

    def open(self, start: SearchStart) -> None:
        """Begin a file; TensorBoard joins those of one folder."""
        from tensorboardX import SummaryWriter

        # Names have seconds: a search that goes on within one would overwrite the file.
        self._writer = SummaryWriter(str(start.run / FOLDER), filename_suffix=f".{start.done}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the values, at once: a search may be killed."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, error: BaseException | None) -> None:
        """Close the file."""
        self._writer.close()
