"""The anytime result of a search: the policies that fit each budget, and the Pareto-optimal ones among them.

Scores of the search and of the validation split are used for selection; test scores are reported. A front never mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from secateur.agents.pareto import Archive, hypervolume
from secateur.envs.core import Budget, CompressionPolicy, Episode, Evaluation, without_drop
from secateur.envs.metric import Metric
from secateur.envs.policy_space import policy_to_document
from secateur.envs.rewards import constraints, reward_vector
from secateur.envs.scores.core import Score
from secateur.search.results.core import Finalist, FrontPoint, Outcome
from secateur.search.schema import SCHEMA


class Front:
    """Collects episodes; keeps the Pareto front of every budget, and of all policies that fit any of them.

    Args:
        objectives: name of the score's metric, then of the costs that are traded against it.
        budgets: of the search.
        dense: validation score and costs of the dense model.
        metric: of the task.
        device: source of latencies and energies (`Device.label`); None: there are none.
        score: of the episodes; its chance level is the hypervolume's reference point. None: the metric on the validation split.

    Attributes:
        evaluations, feasible, failed: number of episodes added, of those feasible for their own budget, and of failed ones.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        budgets: Sequence[Budget],
        dense: Evaluation,
        metric: Metric,
        device: str | None = None,
        score: Score | None = None,
    ):
        self.objectives, self.budgets, self.dense, self.device = tuple(objectives), tuple(budgets), dense, device
        self.metric = metric
        self.score_metric, self.split, self.dense_score = (
            (metric, "validation", dense.score) if score is None else (score.metric, score.split, score.dense)
        )
        self._searched = [budget if self.score_metric == metric else without_drop(budget) for budget in budgets]
        self.evaluations = self.feasible = self.failed = 0
        self._reference = np.array([1 - self.score_metric.chance_quality(self.dense_score)] + [1.0] * (len(objectives) - 1))
        self._candidates: dict[CompressionPolicy, FrontPoint] = {}
        self._overall = Archive()
        self._archives = {budget.name: Archive() for budget in budgets}

    def add(self, episode: Episode) -> bool:
        """Count the episode; return whether any front has changed. A policy that was stopped early is on no front."""
        number = self.evaluations
        self.evaluations += 1
        self.feasible += episode.feasible
        self.failed += episode.failure is not None
        policy, evaluation = episode.policy, episode.evaluation
        if policy is None or evaluation is None or evaluation.stopped or policy in self._candidates:
            return False
        slacks = {b.name: constraints(evaluation, b, self.score_metric, self.dense_score) for b in self._searched}
        affordable = tuple(b.name for b in self.budgets if all(slacks[b.name][cost] <= 0 for cost in b.limits))
        if not affordable:
            return False
        fits = tuple(name for name in affordable if all(slack <= 0 for slack in slacks[name].values()))
        self._candidates[policy] = FrontPoint(number, policy, evaluation, fits, affordable)
        if not fits:
            return False
        # Minimized: one minus the quality, and every cost by its dense value.
        losses = -reward_vector(evaluation, self.objectives, self.dense.costs).astype(float)
        losses[0] += 1
        changed = [archive.add(policy, losses) for archive in (self._overall, *(self._archives[name] for name in fits))]
        return any(changed)

    def of(self, budget: str | None = None) -> list[FrontPoint]:
        """Return the front of a budget, or of all of them together; best score first."""
        archive = self._overall if budget is None else self._archives[budget]
        candidates = [self._candidates[policy] for policy in archive.policies]
        return sorted(candidates, key=lambda candidate: (-candidate.evaluation.quality, candidate.number))

    def best(self, budget: str, count: int) -> list[FrontPoint]:
        """Return the `count` policies with the best score within the budget's cost limits: its finalists.

        A limit of the metric's loss is not checked here: finalists get another recovery, and are scored again.
        """
        fitting = [candidate for candidate in self._candidates.values() if budget in candidate.affordable]
        undominated = set(self._archives[budget].policies)  # of equal score, the cheaper one goes first, as in `of`

        def order(candidate: FrontPoint) -> tuple[float, bool, int]:
            return -candidate.evaluation.quality, candidate.policy not in undominated, candidate.number

        return sorted(fitting, key=order)[:count]

    def best_score(self, budget: str) -> float | None:
        """Return the best score that fits the budget, or None."""
        front = self.of(budget)
        return front[0].evaluation.score if front else None

    @property
    def hypervolume(self) -> float:
        """Volume between the overall front and (chance, dense costs), in shares; in [0, 1]."""
        return hypervolume(self._overall.objectives, self._reference)

    def document(
        self,
        describe: Callable[[CompressionPolicy], Mapping[str, float]],
        finalists: Sequence[Finalist] = (),
        dense_final: Evaluation | None = None,
        outcomes: Sequence[Outcome] = (),
    ) -> dict[str, Any]:
        """Return what front.json holds.

        Args:
            describe: names a policy's choices.
            finalists: policies with their test scores, winners of a budget first.
            dense_final: test score of the dense model.
            outcomes: results of the checks of the winners.
        """
        shown = {candidate.number: candidate for candidate in self.of()}
        for budget in self.budgets:
            shown |= {candidate.number: candidate for candidate in self.of(budget.name)}
        rejected = [rejected.finalist for outcome in outcomes for rejected in outcome.rejected]
        shown |= {(one := self._candidates[finalist.policy]).number: one for finalist in (*finalists, *rejected)}
        checks = {outcome.budget: self._check_document(outcome) for outcome in outcomes}
        return {
            "schema": SCHEMA,
            "metric": asdict(self.metric),
            "search": {"metric": asdict(self.score_metric), "split": self.split, "dense_score": self.dense_score},
            "objectives": list(self.objectives),
            "evaluations": self.evaluations,
            "feasible": self.feasible,
            "failed": self.failed,
            "hypervolume": self.hypervolume,
            "device": self.device,
            "dense": _scores(self.dense),
            "budgets": {
                budget.name: {
                    "limits": dict(budget.limits),
                    "metric_drop": budget.metric_drop,
                    "front": [candidate.number for candidate in self.of(budget.name)],
                    "check": checks.get(budget.name),
                }
                for budget in self.budgets
            },
            "front": [candidate.number for candidate in self.of()],
            "points": [
                {
                    "evaluation": candidate.number,
                    "fits": list(candidate.fits),
                    **_scores(candidate.evaluation),
                    "policy": policy_to_document(candidate.policy),
                    "choices": dict(describe(candidate.policy)),
                }
                for _, candidate in sorted(shown.items())
            ],
            "final": {
                "dense": None if dense_final is None else _scores(dense_final),
                "points": [
                    {
                        "budget": finalist.budget,
                        "evaluation": self._candidates[finalist.policy].number,
                        "validation_score": finalist.validation.score,
                        **_scores(finalist.final),
                    }
                    for finalist in finalists
                ],
            },
        }

    def _check_document(self, outcome: Outcome) -> dict[str, Any]:
        """Return the entry of front.json for the check of a budget's winner."""
        found = outcome.verification
        return {
            "passed": None if found is None else found.passed,
            "failures": [] if found is None else list(found.failures),
            "export": None if outcome.folder is None else f"{outcome.folder.parent.name}/{outcome.folder.name}",
            "latency_ms": None if found is None else found.latency.milliseconds,
            "dense_latency_ms": None if found is None else found.latency.dense_milliseconds,
            "runtime": None if found is None else f"{found.runtime} {found.runtime_version}",
            "threads": None if found is None else found.threads,
            "note": outcome.note,
            "rejected": [
                {
                    "evaluation": self._candidates[rejected.finalist.policy].number,
                    "predicted_ms": rejected.predicted,
                    "measured_ms": rejected.measured,
                }
                for rejected in outcome.rejected
            ],
        }


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    return {"score": evaluation.score, "images": evaluation.images, "costs": dict(evaluation.costs)}
