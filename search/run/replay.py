"""Resumes a run that was interrupted, or that has too few evaluations, as if it had never stopped.

Agents depend on their seed and on the episodes they receive, not on time. So the search is replayed from its start: evaluations
in the study are reused, and everything after them is evaluated. The agent reaches its earlier state without a checkpoint
that could be lost or outdated; a learning agent learns again, in a fraction of the time of the evaluations.

With several workers and an agent that searches each budget separately, the order of the budgets may differ in the replay; all
recorded evaluations count. With `search.racing`, new policies are compared only with those evaluated since the run was resumed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.envs.core import CompressionPolicy, Episode, Evaluation, InputError
from secateur.envs.rewards import constraints
from secateur.search.config import SearchConfig
from secateur.search.problem import Problem
from secateur.search.results.selection import policy_of_trial

MAY_CHANGE = {
    "data": ["root"],
    "model": ["weights"],
    "search": ["evaluations", "check_score", "time_limit", "evaluation_timeout", "precision"]
    + ["workers", "address", "gpus_per_worker"],
    "compute": None,
    "finalize": None,
    "output": None,
}
"""What may differ in the configuration of a resumed run; None: the whole section. Other weights or another precision change the
dense score, which is checked."""


class Recorded:
    """The episodes of a run so far, in the order of the study.

    Args:
        trials: Optuna's trials of the study.
        problem: of the run.
        damaged: whether these are what was left of a damaged study.
    """

    def __init__(self, trials: Sequence[Any], problem: Problem, damaged: bool = False):
        self.trials, self.damaged = trials, damaged
        self.episodes = [_episode(trial, problem) for trial in trials]
        self._left = Counter(map(_key, self.episodes))

    @property
    def evaluated(self) -> list[tuple[CompressionPolicy, Evaluation | str]]:
        """Policies that are not evaluated again, with their evaluations, or the reasons why they have failed."""
        return [(e.policy, e.evaluation or e.failure or "unknown") for e in self.episodes if e.policy is not None]

    def take(self, episode: Episode) -> bool:
        """Return whether this episode is recorded; each recorded episode is taken once."""
        taken = self._left[_key(episode)] > 0
        self._left[_key(episode)] -= taken
        return taken


def _key(episode: Episode) -> tuple[str, CompressionPolicy | None, bool]:
    scored = episode.evaluation is not None and bool(np.isfinite(episode.evaluation.score))
    return episode.budget, episode.policy, scored


def _episode(trial: Any, problem: Problem) -> Episode:
    facts = trial.user_attrs
    budgets = {budget.name: budget for budget in problem.search_budgets}
    policy = policy_of_trial(trial, problem.space.policy_space) if trial.params else None
    if "failure" in facts or policy is None:
        return Episode(facts["budget"], policy, None, failure=facts.get("failure", "unknown"))
    costs = {name.removeprefix("cost/"): value for name, value in facts.items() if name.startswith("cost/")}
    score, metric, dense = trial.values[0] if trial.values else float("nan"), problem.score.metric, problem.score.dense
    found = Evaluation(
        score, costs, "proxy", facts["images"], facts["seconds"], facts["stopped"], quality=metric.quality(score, dense)
    )
    slacks = constraints(found, budgets[facts["budget"]], metric, dense)
    return Episode(facts["budget"], policy, found, slacks)


def check_unchanged(before: SearchConfig, now: SearchConfig) -> None:
    """Raise InputError if the run would not be the same: its first evaluations could not be replayed. Budgets may be added."""
    apart = {section: set(names) if names else True for section, names in MAY_CHANGE.items()}
    old, new = (config.model_dump(mode="json", exclude=apart) for config in (before, now))
    new["budgets"] = {name: limits for name, limits in new["budgets"].items() if name in old["budgets"]}
    changed = _changes(old, new)
    allowed = [f"`{section}.{name}`".replace(".`", "`") for section, names in MAY_CHANGE.items() for name in names or [""]]
    if changed:
        raise InputError(
            f"A resumed run must have the same configuration, but {', '.join(f'`{name}`' for name in changed)} changed. Start "
            f"another search. What may change: {', '.join(allowed)}; and budgets may be added."
        )


def _changes(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = dict.fromkeys([*old, *new])
        return [c for name in names for c in _changes(old.get(name), new.get(name), f"{place}.{name}".removeprefix("."))]
    return [] if old == new else [place]


def check_evaluations(run: Path, recorded: int, config: SearchConfig) -> None:
    """Raise InputError if fewer evaluations are requested than the run has."""
    if config.search.evaluations < recorded:
        wanted = config.search.evaluations
        raise InputError(f"`search.evaluations: {wanted}` is less than the {recorded} that {run} has already. Raise it.")


def check_added_budgets(before: SearchConfig, now: SearchConfig) -> None:
    """Raise InputError if a new budget limits a cost that the run has not traded so far: its study has no such objective."""
    old, new = ({cost for budget in config.budgets.values() for cost in budget.limits} or {"macs"} for config in (before, now))
    if added := sorted(new - old):
        raise InputError(
            f"A new budget limits {', '.join(f'`{name}`' for name in added)}, but the run trades {', '.join(sorted(old))} only. "
            "Limit these, or start another search with all budgets."
        )


def check_same_score(run: Path, manifest: Mapping[str, Any], problem: Problem) -> None:
    """Raise InputError if the dense model does not score as it did: other weights, other images or another processor."""
    metric, before = problem.task.metric, manifest["dense"]["score"]
    if problem.dense.costs != manifest["dense"]["costs"]:
        raise InputError(f"The dense model has other costs than when {run} began. Bring the same model, or start another search.")
    # Version 0.1 took the mean in float32.
    same = math.isclose(before, problem.dense.score, rel_tol=1e-6)
    if not same or manifest["precision"]["dtype"] != problem.precision.dtype:
        raise InputError(
            f"The dense model scores {metric.text(problem.dense.score)} {metric.label} in {problem.precision.dtype} here, but "
            f"scored {metric.text(before)} in {manifest['precision']['dtype']} when {run} began. Bring the same weights and "
            f"images, set `search.precision={manifest['precision']['dtype']}` on another processor, or start another search."
        )
