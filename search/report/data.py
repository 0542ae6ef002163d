"""What a report shows of a run, read from its files: quantities, budgets, trials and fronts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from secateur.agents.pareto import non_dominated
from secateur.envs.core import InputError
from secateur.envs.metric import Metric
from secateur.search.config import SearchConfig
from secateur.search.report.layers import LayerView, read_layers
from secateur.search.report.steps import Latency, Step, read_latencies, read_steps
from secateur.search.results.document import read_front
from secateur.search.run.folder import load_manifest
from secateur.search.run.study import Study, load_study
from secateur.search.schema import metric_of, search_score_of

ANY = "any budget"
"""Stands for all budgets of a run together."""
FRONT, WITHIN, OUTSIDE, STOPPED = "on the front", "within the limits", "outside the limits", "stopped early"
"""What a trial is to a budget."""


@dataclass(frozen=True)
class Quantity:
    """An axis of the front: the score of the search, or a cost.

    Attributes:
        name: as in front.json.
        title: with the unit.
        factor: from the stored value to the shown one (100 for fractions in percent).
        format: d3 format of the shown value.
        higher_is_better: direction.
        dense: stored value of the dense model.
    """

    name: str
    title: str
    factor: float
    format: str
    higher_is_better: bool
    dense: float


@dataclass(frozen=True)
class ReportBudget:
    """A budget: absolute limits of costs, and of the loss of the metric if the search's score is the metric."""

    name: str
    limits: Mapping[str, float]
    drop: float | None
    winner: int | None

    def allows(self, costs: Mapping[str, float], drop: float) -> bool:
        """Return whether all limits are kept; `drop` is the loss of the metric."""
        return all(costs[name] <= limit for name, limit in self.limits.items()) and (self.drop is None or drop <= self.drop)


@dataclass(frozen=True)
class ReportTrial:
    """An evaluation with a score.

    Attributes:
        number: of the evaluation.
        budget: that it was chosen for.
        values: {quantity: stored value}.
        seconds: duration of the evaluation.
        stopped: whether it was stopped early; its score is then an estimate.
        status: {budget, or ANY: FRONT, WITHIN, OUTSIDE or STOPPED}.
        choices: {name of a choice: prune ratio or bits}.
    """

    number: int
    budget: str
    values: Mapping[str, float]
    seconds: float | None
    stopped: bool
    status: Mapping[str, str]
    choices: Mapping[str, float]


@dataclass(frozen=True)
class RunData:
    """A run.

    Attributes:
        folder: of the run.
        name: shown in the report, unique among its runs.
        config, manifest, document: configuration, manifest.json and front.json.
        metric: of the task.
        searched: of the search's score; `split`: of its samples.
        quantities: the score, then all costs.
        budgets: {name: budget}.
        trials: evaluations with a score, by number.
        failures: {sentence: number of evaluations}.
        layers: layers and choices; None: an earlier version made the run.
        levels: {trial: levels of its choices}; empty without `layers`.
        steps: scores of the finalists, step by step.
        latencies: predicted and measured ones.
    """

    folder: Path
    name: str
    config: SearchConfig
    manifest: Mapping[str, Any]
    document: Mapping[str, Any]
    metric: Metric
    searched: Metric
    split: str
    quantities: tuple[Quantity, ...]
    budgets: Mapping[str, ReportBudget]
    trials: Mapping[int, ReportTrial]
    failures: Mapping[str, int]
    layers: LayerView | None
    levels: Mapping[int, list[int]]
    steps: tuple[Step, ...]
    latencies: tuple[Latency, ...]

    def front_lines(self, x: str, y: str, budget: str) -> list[ReportTrial]:
        """Return the trials that no other trial within the budget dominates in two quantities, by the first one."""
        kept = [trial for trial in self.trials.values() if trial.status[budget] in (FRONT, WITHIN)]
        if not kept:
            return []
        signs = {quantity.name: -1 if quantity.higher_is_better else 1 for quantity in self.quantities}
        points = np.array([[signs[name] * trial.values[name] for name in (x, y)] for trial in kept])
        first = {tuple(point): trial for point, trial in reversed(list(zip(points.tolist(), kept, strict=True)))}
        best = {tuple(point) for point in points[non_dominated(points)].tolist()}
        return sorted((first[point] for point in best), key=lambda trial: (trial.values[x], trial.number))

    def improvements(self, budget: str) -> list[ReportTrial]:
        """Return the trials that improved the best score within a budget, in their order."""
        sign, best, found = -1 if self.searched.higher_is_better else 1, np.inf, []
        score = self.quantities[0].name
        for trial in self.trials.values():
            if trial.status[budget] in (FRONT, WITHIN) and sign * trial.values[score] < best:
                best = sign * trial.values[score]
                found.append(trial)
        return found

    def pairs(self) -> list[tuple[str, str]]:
        """Return all ordered pairs of quantities."""
        return list(permutations([quantity.name for quantity in self.quantities], 2))

    def winner(self, budget: str) -> ReportTrial | None:
        """Return the trial that won a budget; None: nothing fits it."""
        number = self.budgets[budget].winner
        return None if number is None else self.trials.get(number)

    def winners(self) -> list[int]:
        """Return the numbers of the budgets' winners."""
        found = [budget.winner for budget in self.budgets.values() if budget.winner is not None]
        return list(dict.fromkeys(found))


def read_run(folder: Path, name: str) -> RunData:
    """Return what a report shows of a run; only its files are read.

    Raises:
        InputError: if the folder is no run, or a file of it is damaged.
    """
    config, manifest = load_manifest(folder)
    document = read_front(folder)
    searched, split, _ = search_score_of(document)
    try:
        quantities, budgets = _quantities(document), _budgets(document)
        trials, failures = _trials(load_study(folder), document, budgets)
        layers = read_layers(folder, config, document)
        levels = {} if layers is None else {number: layers.levels(trial.choices) for number, trial in trials.items()}
        return RunData(
            folder, name, config, manifest, document, metric_of(document), searched, split, quantities, budgets, trials, failures,
            layers, levels, tuple(read_steps(folder, document)), tuple(read_latencies(folder, document)),
        )  # fmt: skip
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"The files of {folder} do not fit together: {type(error).__name__}: {error}") from None


def _quantities(document: Mapping[str, Any]) -> tuple[Quantity, ...]:
    searched, split, dense_score = search_score_of(document)
    factor, unit = (100, "%") if searched.unit == "%" else (1, searched.unit)
    title = f"{split} {searched.label}" + f" ({unit})" * bool(unit)
    score_format = ".2~f" if searched.unit == "%" else ".4~g"
    score = Quantity(searched.name, title, factor, score_format, searched.higher_is_better, dense_score)
    return (score, *(_cost(name, value) for name, value in document["dense"]["costs"].items()))


def _cost(name: str, dense: float) -> Quantity:
    words, unit = name.replace("_", " "), {"ms": "ms", "mj": "mJ", "bytes": "B"}.get(name.rpartition("_")[2], "")
    if unit in ("ms", "mJ"):
        return Quantity(name, f"{words.rpartition(' ')[0]} ({unit})", 1, ".4~g", False, dense)
    return Quantity(name, words if unit else {"macs": "MACs", "bops": "BOPs"}.get(name, words), 1, ".3~s", False, dense)


def _budgets(document: Mapping[str, Any]) -> dict[str, ReportBudget]:
    same = search_score_of(document)[0] == metric_of(document)
    finals = document["final"]["points"]
    found = {}
    for name, budget in document["budgets"].items():
        tested = [point["evaluation"] for point in finals if point["budget"] == name]
        rejected = (budget.get("check") or {}).get("rejected")
        winner = next(iter(tested or ([] if rejected else budget["front"])), None)
        found[name] = ReportBudget(name, budget["limits"], budget["metric_drop"] if same else None, winner)
    return found


def _trials(
    study: Study, document: Mapping[str, Any], budgets: Mapping[str, ReportBudget]
) -> tuple[dict[int, ReportTrial], dict[str, int]]:
    searched, _, dense_score = search_score_of(document)
    fronts = {ANY: set(document["front"]), **{name: set(document["budgets"][name]["front"]) for name in budgets}}
    found: dict[int, ReportTrial] = {}
    failures: dict[str, int] = {}
    for trial in study.get_trials(deepcopy=False):
        facts = trial.user_attrs
        if not trial.values:
            reason = facts.get("failure", "no score")
            failures[reason] = failures.get(reason, 0) + 1
            continue
        costs = {name.removeprefix("cost/"): value for name, value in facts.items() if name.startswith("cost/")}
        drop, number, stopped = searched.drop(trial.values[0], dense_score), facts["evaluation"], bool(facts.get("stopped"))
        allowed = {name for name, budget in budgets.items() if budget.allows(costs, drop)}
        kept = {**({ANY: True} if allowed else {}), **dict.fromkeys(allowed, True)}
        status = {
            name: FRONT if number in front else STOPPED if stopped else WITHIN if name in kept else OUTSIDE
            for name, front in fronts.items()
        }
        values = {searched.name: trial.values[0], **costs}
        found[number] = ReportTrial(number, facts["budget"], values, facts.get("seconds"), stopped, status, trial.params)
    return dict(sorted(found.items())), failures


def limited_costs(run: RunData) -> list[str]:
    """Return the costs that any budget limits, in their order."""
    return list(dict.fromkeys(name for budget in run.budgets.values() for name in budget.limits))
