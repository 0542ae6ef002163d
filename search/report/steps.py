"""Scores of the finalists from the search to the verified export, with intervals; predicted and measured latencies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

from secateur.envs.metric import Metric
from secateur.search.export.verification import VERIFY, Verification, read_verification
from secateur.search.results.winners import EXPORTS
from secateur.search.schema import metric_of, search_score_of
from secateur.search.training.curve import CURVE, EPOCH, EXPORTED, TRAINED, TRAINING, Curve

SEARCH, REPAIR, EXPORT, TRAINED_STEP, EXPORT_OF_TRAINED = "search", "repair", "export", "trained", "export of trained"
COUNTED = ("top1", "top5")
"""Metrics that are shares of independent samples, so that a binomial interval holds."""
Z = 1.96
"""Standard normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class Step:
    """A score of a finalist.

    Attributes:
        budget: name of the budget.
        evaluation: number of the evaluation that found the policy.
        winner: whether it is the budget's winner.
        step: "search", "repair", "epoch 1", …, "trained", "export", "export of trained".
        split: "validation" or "test".
        score: in the metric's unit.
        low, high: 95 % interval; None: the metric has none, or the number of samples is not known.
    """

    budget: str
    evaluation: int
    winner: bool
    step: str
    split: str
    score: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Latency:
    """A predicted latency and the one that a verification measured, in ms; None: not known.

    Attributes:
        name: of the export, or of the rejected policy.
        rejected: whether the measured latency broke the budget.
        low, high: 10 % and 90 % quantiles.
        dense: measured latency of the dense model.
        where: runtime and machine.
        measured_here: whether the prediction is for this machine and runtime.
    """

    name: str
    rejected: bool
    predicted: float | None
    measured: float
    low: float | None = None
    high: float | None = None
    dense: float | None = None
    where: str = ""
    measured_here: bool = True


def interval(metric: Metric, score: float, samples: int | None) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a share of independent samples (Wilson 1927); (None, None) for other metrics."""
    if metric.name not in COUNTED or not samples or not 0 <= score <= 1:
        return None, None
    center = (score + Z**2 / (2 * samples)) / (1 + Z**2 / samples)
    half = Z / (1 + Z**2 / samples) * (score * (1 - score) / samples + Z**2 / (4 * samples**2)) ** 0.5
    return max(center - half, 0.0), min(center + half, 1.0)


def read_steps(run: Path, document: Mapping[str, Any]) -> Iterator[Step]:
    """Yield the scores of all finalists of a run, step by step."""
    metric, points = metric_of(document), {point["evaluation"]: point for point in document["points"]}
    same, seen = search_score_of(document)[0] == metric, set()
    for final in document["final"]["points"]:
        budget, number = final["budget"], final["evaluation"]
        winner = budget not in seen
        seen.add(budget)
        validation_samples, test_samples = document["dense"]["images"], final["images"]
        scores: list[tuple[str, str, float, int]] = []
        if same and number in points:
            scores.append((SEARCH, "validation", points[number]["score"], points[number]["images"]))
        scores.append((REPAIR, "validation", final["validation_score"], validation_samples))
        scores.append((REPAIR, "test", final["score"], test_samples))
        if winner:
            scores += _exported(run / EXPORTS / budget, EXPORT)
        scores += _trained(run, budget, number, validation_samples, test_samples)
        for step, split, score, samples in scores:
            yield Step(budget, number, winner, step, split, score, *interval(metric, score, samples))


def _trained(run: Path, budget: str, number: int, validation: int, test: int) -> Iterator[tuple[str, str, float, int]]:
    for folder in sorted((run / TRAINING).glob(f"{number}-*")):
        if not isfile(folder / CURVE):
            continue
        curve = Curve.read(folder)
        for stage in curve.stages:
            if stage.stage not in (EPOCH, TRAINED):
                continue
            step = f"epoch {stage.epoch}" if stage.stage == EPOCH else TRAINED_STEP
            if stage.validation is not None:
                yield step, "validation", stage.validation, validation
            if stage.test is not None:
                yield step, "test", stage.test, test
        if curve.find(EXPORTED, budget) is not None:
            yield from _exported(run / EXPORTS / f"{budget}-trained", EXPORT_OF_TRAINED)


def _exported(folder: Path, step: str) -> list[tuple[str, str, float, int]]:
    if not isfile(folder / VERIFY):
        return []
    outputs = read_verification(folder).outputs
    return [(step, "test", outputs.runtime_score, outputs.images)]


def read_latencies(run: Path, document: Mapping[str, Any]) -> Iterator[Latency]:
    """Yield the latencies of all verified exports, and of the policies that were rejected for theirs."""
    for path in sorted((run / EXPORTS).rglob(VERIFY)):
        found: Verification = read_verification(path.parent)
        latency, name = found.latency, path.parent.relative_to(run / EXPORTS).as_posix()
        threads = f"{found.threads} thread{'s' * (found.threads != 1)}"
        where = f"{found.runtime} {found.runtime_version}, {threads}, {found.machine.get('processor', '')}"
        yield Latency(
            name, False, latency.promised, latency.milliseconds, latency.low, latency.high, latency.dense_milliseconds, where,
            latency.measured_here,
        )  # fmt: skip
    for name, budget in document["budgets"].items():
        for rejected in (budget.get("check") or {}).get("rejected", ()):
            label = f"{name}: policy {rejected['evaluation']}, rejected"
            yield Latency(label, True, rejected["predicted_ms"], rejected["measured_ms"])
