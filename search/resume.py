"""Goes on with a run that was interrupted, or has had too few evaluations, as if it had never stopped.

Agents depend on their seed and on what they are told, not on when. So the search is played again from its start: what the study
holds is answered from there, in milliseconds, and everything after it is evaluated. The agent ends up where it was, networks and
all, without any checkpoint that could be lost or outdated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from envs.core import CompressionPolicy, Episode, Evaluation, InputError
from envs.rewards import constraints
from search.build import Problem
from search.config import SearchConfig
from search.deployment.selection import policy_of_trial

MAY_CHANGE = {
    "data": {"root"},
    "model": {"weights"},
    "search": {"evaluations", "workers", "address", "time_limit", "precision"},
    "finalize": None,
    "output": None,
}
"""What of a configuration may differ when a run goes on; None: all of the section. Other weights or another
precision would show in the dense score."""


class Recorded:
    """The episodes of a run so far, in the order of the study.

    Args:
        trials: of the study.
        problem: of the run.
    """

    def __init__(self, trials: Sequence[FrozenTrial], problem: Problem):
        self.episodes = [_episode(trial, problem) for trial in trials]
        self._left = Counter(map(_key, self.episodes))

    @property
    def known(self) -> list[tuple[CompressionPolicy, Evaluation]]:
        """What need not be evaluated again; early-stopped scores and failures are tried anew."""
        scored = (episode for episode in self.episodes if episode.evaluation is not None and not episode.evaluation.stopped)
        return [(episode.policy, episode.evaluation) for episode in scored]

    def take(self, episode: Episode) -> bool:
        """Return whether this episode was recorded; each recorded one is taken once."""
        taken = self._left[_key(episode)] > 0
        self._left[_key(episode)] -= taken
        return taken


def _key(episode: Episode) -> tuple[str, CompressionPolicy | None]:
    return episode.budget, episode.policy


def _episode(trial: FrozenTrial, problem: Problem) -> Episode:
    facts = trial.user_attrs
    budgets = {budget.name: budget for budget in problem.budgets}
    policy = policy_of_trial(trial, problem.space.space) if trial.params else None
    if "failure" in facts or policy is None:
        return Episode(facts["budget"], policy, None, failure=facts.get("failure", "unknown"))
    costs = {name.removeprefix("cost/"): value for name, value in facts.items() if name.startswith("cost/")}
    top1 = trial.values[0] if trial.values else float("nan")
    score = Evaluation(top1, costs, "proxy", facts["images"], facts["seconds"], facts["stopped"])
    slacks = constraints(score, budgets[facts["budget"]], problem.space.dense_top1)
    return Episode(facts["budget"], policy, score, slacks)


def check_unchanged(before: SearchConfig, now: SearchConfig) -> None:
    """Raise InputError if the run would not be the same: its first evaluations could not be played again."""
    old, new = (config.model_dump(mode="json", exclude={k: v or True for k, v in MAY_CHANGE.items()}) for config in (before, now))
    changed = _changes(old, new)
    if changed:
        raise InputError(
            f"A run goes on only as it was, but {', '.join(f'`{name}`' for name in changed)} changed. Start another search; "
            "`search.evaluations`, `search.workers`, `search.time_limit`, `finalize` and where files are may change."
        )


def _changes(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = dict.fromkeys([*old, *new])
        return [c for name in names for c in _changes(old.get(name), new.get(name), f"{place}.{name}".removeprefix("."))]
    return [] if old == new else [place]


def check_same_score(run: Path, manifest: Mapping[str, Any], problem: Problem) -> None:
    """Raise InputError if the dense model does not score as it did: other weights, other images or another processor."""
    before = manifest["dense"]["top1"]
    if before != problem.dense.top1 or manifest["precision"]["dtype"] != problem.precision.dtype:
        raise InputError(
            f"The dense model scores {100 * problem.dense.top1:.2f} % top-1 in {problem.precision.dtype} here, but scored "
            f"{100 * before:.2f} % in {manifest['precision']['dtype']} when {run} began. Bring the same weights and images, set "
            f"`search.precision={manifest['precision']['dtype']}` on another processor, or start another search."
        )
