"""The table of a trained winner: its scores from the dense model to the export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from secateur.search.run.progress import duration
from secateur.search.training.curve import DENSE, EPOCH, EXPORTED, REPAIR, SEARCH, TRAINED, Stage

if TYPE_CHECKING:
    from secateur.search.training.winners import TrainedWinner

MAX_EPOCHS = 10
"""Epochs that are shown; learning.jsonl has all."""

LABELS = {
    DENSE: "dense", SEARCH: "after the search", REPAIR: "after the repair", TRAINED: "after the training", EXPORTED: "exported",
}  # fmt: skip


def curve_table(winner: TrainedWinner) -> Table:
    """Return one row per stage."""
    metric = winner.metric
    title = f"{winner.budget}: evaluation {winner.evaluation}, trained"
    where = f"export: {winner.folder}" if winner.folder is not None else None
    table = Table(title=escape(title), caption=where and escape(where), title_justify="left", caption_justify="left")
    for heading in ("", "loss", f"validation {metric.label}", f"test {metric.label}", "time"):
        table.add_column(heading, justify="left" if not heading else "right")
    for stage in _shown(winner.stages):
        loss = "" if stage.loss is None else f"{stage.loss:.4f}"
        scores = ["" if score is None else metric.text(score) for score in (stage.validation, stage.test)]
        table.add_row(_label(stage), loss, *scores, "" if stage.seconds is None else duration(stage.seconds))
    return table


def _label(stage: Stage) -> str:
    if stage.stage == EPOCH:
        return f"epoch {stage.epoch}"
    checked = {None: "", True: ", verified", False: ", verification failed"}[stage.passed]
    return LABELS[stage.stage] + checked


def _shown(stages: tuple[Stage, ...]) -> list[Stage]:
    """Return all stages, but of many epochs only some at equal distances and the last one."""
    epochs = [stage for stage in stages if stage.stage == EPOCH]
    step = -(-len(epochs) // MAX_EPOCHS)
    kept = [stage for index, stage in enumerate(reversed(epochs)) if index % step == 0] if epochs else []
    return [stage for stage in stages if stage.stage != EPOCH or stage in kept]
