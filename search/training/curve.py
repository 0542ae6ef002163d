"""The learning curve of a finalist: learning.jsonl in its training folder, one stage per line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.search.jsonl import read_lines, write_lines

TRAINING, CURVE, CHECKPOINT = "training", "learning.jsonl", "checkpoint.safetensors"
DENSE, SEARCH, REPAIR, EPOCH, TRAINED, EXPORTED = "dense", "search", "repair", "epoch", "trained", "exported"
"""Stages, in their order: the dense model, the policy in the search, after the finalists' recovery, after each epoch, at the end
of the training, and as the runtime executes its export."""


@dataclass(frozen=True)
class Stage:
    """A line of a learning curve; None: not measured, or of no meaning at this stage.

    Attributes:
        stage: its name.
        epoch: number of finished epochs.
        loss: mean loss on the training samples.
        validation, test: scores.
        learning_rate: at the end of the epoch.
        seconds: duration of the epoch.
        training: of the stage `trained`: how the network was trained, as policy.json has it.
        budget: of the stage `exported`: name of the budget that the export is for.
        passed: of the stage `exported`: whether the export kept all promises.
        note: one sentence about what went wrong, or "".
    """

    stage: str
    epoch: int | None = None
    loss: float | None = None
    validation: float | None = None
    test: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None
    training: Mapping[str, Any] | None = None
    budget: str | None = None
    passed: bool | None = None
    note: str = ""


@dataclass
class Curve:
    """The stages of one training, on disk after every change.

    Attributes:
        folder: of the training.
        stages: in the order in which they were reached.
    """

    folder: Path
    stages: list[Stage] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Curve:
        """Return the curve in a folder; empty if there is none."""
        return cls(folder, [Stage(**line) for line in read_lines(folder / CURVE)])

    def add(self, stage: Stage) -> None:
        """Add a stage; an export takes the place of the one for the same budget."""
        self.stages = [
            one for one in self.stages if stage.stage != EXPORTED or (one.stage, one.budget) != (EXPORTED, stage.budget)
        ]
        self.stages.append(stage)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ({key: value for key, value in asdict(one).items() if value not in (None, "")} for one in self.stages)
        write_lines(self.folder / CURVE, lines)

    def find(self, name: str, budget: str | None = None) -> Stage | None:
        """Return the last stage of this name, and of this budget; None: it is not reached."""
        return next((one for one in reversed(self.stages) if (one.stage, one.budget) == (name, budget)), None)


def training_folder(run: Path, evaluation: int, recipe: Mapping[str, Any]) -> Path:
    """Return where a finalist is trained: each recipe has its own folder."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    return run / TRAINING / f"{evaluation}-{recipe['epochs']}-epochs-{digest}"
