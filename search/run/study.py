"""Records every evaluation as an Optuna trial in a journal file; the search's process is its only writer."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from secateur.envs.core import Budget, Episode, InputError
from secateur.envs.metric import Metric, drop_name
from secateur.envs.policy_space import Decision, PolicySpace
from secateur.search.run.journal import JOURNAL, read_journal

Study: TypeAlias = optuna.Study

DAMAGED = "study.journal.damaged"
"""What the file of the study was before a resumed run left damaged lines out of it."""

CHECKSUM = "checksum"
"""Attribute of a trial."""

UNLIMITED = -1.0
"""Slack of a quantity that an episode's budget does not limit: what a cost of zero would have."""


class StudyRecorder:
    """Writes the study of one run.

    A trial's parameters are the policy's choices, its values the objectives (the metric in its own direction, every cost
    minimized), its constraints the slacks value / limit - 1 of every quantity that some budget limits. A failed episode is a
    failed trial, one that was stopped early is a pruned trial.

    Args:
        folder: the run; the journal is made in it, or gone on with.
        space: names and levels of the choices.
        objectives: name of the score's metric, then of the costs that are traded against it.
        metric: of the search's score.
        budgets: of the search; episodes name the one they were conditioned on.
        attributes: about the whole run, JSON values.
        sound: trials of a damaged journal, which is written anew with them; None: the journal is sound.
    """

    def __init__(
        self,
        folder: Path,
        space: PolicySpace,
        objectives: Sequence[str],
        metric: Metric,
        budgets: Sequence[Budget],
        attributes: Mapping[str, Any] | None = None,
        sound: Sequence[FrozenTrial] | None = None,
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._objectives = space, tuple(objectives)
        self._distributions = {decision.name: _distribution(decision) for decision in space.decisions}
        self._limited = limited_quantities(budgets, metric)
        self._attributes = {"objectives": list(objectives), "constraint_names": list(self._limited), **(attributes or {})}
        first = StudyDirection.MAXIMIZE if metric.higher_is_better else StudyDirection.MINIMIZE
        self._directions = [first, *[StudyDirection.MINIMIZE] * (len(objectives) - 1)]
        journal = folder / JOURNAL
        if sound is not None and isfile(journal):
            self._rewrite(journal, sound)
        if not isfile(journal):
            self._study = self._create(journal)
            return
        _drop_unfinished_line(journal)
        self._study = load_study(folder)
        if self._study.directions != self._directions:
            self._rewrite(journal, self._study.get_trials(deepcopy=False))
            self._study = load_study(folder)
        for name, value in self._attributes.items():  # the names of the constraints change with another budget
            if self._study.user_attrs.get(name) != value:
                self._study.set_user_attr(name, value)

    def _create(self, journal: Path) -> Study:
        study = optuna.create_study(
            study_name=journal.parent.name,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            directions=self._directions,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # without names the dashboard shows "Objective 0"
            study.set_metric_names(list(self._objectives))
        for name, value in self._attributes.items():
            study.set_user_attr(name, value)
        return study

    def _rewrite(self, journal: Path, trials: Sequence[FrozenTrial]) -> None:
        """Replace a damaged journal by one of these trials at once, and keep the old one."""
        draft = journal.with_name(f"{JOURNAL}.draft")
        draft.unlink(missing_ok=True)
        study = self._create(draft)
        for trial in trials:
            study.add_trial(trial)
        shutil.copyfile(journal, journal.with_name(DAMAGED))
        os.replace(draft, journal)

    def record(self, number: int, agent: str, episode: Episode) -> None:
        """Add one episode as a trial.

        Args:
            number: of the evaluation in this run, from 0 on.
            agent: who chose.
        """
        values = self._values(episode)
        failure = episode.failure or (None if values else "the scores are not finite")
        slacks = {name: float(episode.constraints.get(name, UNLIMITED)) for name in self._limited}
        attributes = {"evaluation": number, "agent": agent, "budget": episode.budget, "feasible": episode.feasible}
        if episode.evaluation is not None:
            attributes |= {name: getattr(episode.evaluation, name) for name in ("images", "seconds", "stopped")}
            attributes |= {"note": episode.evaluation.note} if episode.evaluation.note else {}
            attributes |= {f"cost/{name}": float(value) for name, value in episode.evaluation.costs.items()}
        if failure is not None:
            attributes["failure"] = failure
        choices = self._space.policy_to_choices(episode.policy) if episode.policy is not None else {}
        attributes[CHECKSUM] = checksum(choices, values if failure is None else None, attributes)
        trial = create_trial(
            state=_state(episode, failure),
            params=choices,
            distributions=self._distributions if episode.policy is not None else {},
            values=values if failure is None else None,
            user_attrs=attributes,
            constraints=slacks if failure is None else None,
            # The dashboard reads only this older list, in the order of the study's "constraint_names".
            system_attrs={"constraints": list(slacks.values())} if failure is None else None,
        )
        self._study.add_trial(trial)

    def _values(self, episode: Episode) -> list[float] | None:
        """Return the objectives, or None if there are none or they are not finite."""
        if episode.evaluation is None:
            return None
        evaluation = episode.evaluation
        values = [float(evaluation.score), *(float(evaluation.costs[name]) for name in self._objectives[1:])]
        return values if np.isfinite(values).all() else None


def checksum(choices: Mapping[str, float], values: Sequence[float] | None, facts: Mapping[str, Any]) -> int:
    """Return the checksum of a trial: of its parameters, values and user attributes."""
    numbers = {name: float(value) for name, value in choices.items()}
    content = [numbers, values, {name: value for name, value in facts.items() if name != CHECKSUM}]
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def limited_quantities(budgets: Sequence[Budget], metric: Metric) -> tuple[str, ...]:
    """Return the names of everything that any budget limits, in order of appearance."""
    names = [
        name for budget in budgets for name in (*budget.limits, *([drop_name(metric)] if budget.metric_drop is not None else []))
    ]
    return tuple(dict.fromkeys(names))


def load_study(run: str | Path) -> optuna.Study:
    """Return the study of a run, for reading.

    Raises:
        InputError: if the folder holds no study that can be read.
    """
    journal = Path(run) / JOURNAL
    read_journal(run)  # names the damaged line; Optuna's reader raises whatever a line happens to cause
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(journal))))
    except (ValueError, LookupError, AttributeError, TypeError, AssertionError) as error:  # what damaged lines happen to cause
        raise InputError(f"{journal} cannot be read: {type(error).__name__}: {error}") from error


def _drop_unfinished_line(journal: Path) -> None:
    """Remove the incomplete last line of a killed process; the next line would be appended to it."""
    text = journal.read_bytes()
    if not text.endswith(b"\n"):
        os.truncate(journal, text.rfind(b"\n") + 1)


def _state(episode: Episode, failure: str | None) -> TrialState:
    if failure is not None:
        return TrialState.FAIL
    assert episode.evaluation is not None, "an episode without failure has scores"
    return TrialState.PRUNED if episode.evaluation.stopped else TrialState.COMPLETE


def _distribution(decision: Decision) -> BaseDistribution:
    if decision.kind == "prune_ratio":
        return FloatDistribution(min(decision.values), max(decision.values))
    return CategoricalDistribution(decision.values)
