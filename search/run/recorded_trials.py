"""Reads the study of an interrupted run, whatever has happened to its file: the sound trials are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any

from optuna.distributions import json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from secateur.envs.core import InputError
from secateur.search.run.journal import JOURNAL
from secateur.search.run.study import CHECKSUM, checksum, load_study

_TRIAL = b'{"op_code":4,'
_OTHERS = tuple(b'{"op_code":%d,' % number for number in (0, 2, 3))  # the study itself and its attributes
_FACTS = ("evaluation", "budget", "feasible")


def recorded_trials(run: Path) -> tuple[list[FrozenTrial], int]:
    """Return the trials of a run's study that are sound, in their order, and how many lines are damaged.

    Call it only while the run is held: another process could be writing.
    """
    for lock in run.glob(f"{JOURNAL}.lock*"):  # of a process that was killed; Optuna would wait half a minute for it
        lock.unlink()
    journal = run / JOURNAL
    text = journal.read_bytes() if isfile(journal) else b""
    lines = text[: text.rfind(b"\n") + 1].splitlines()  # the line after the last end of line was never finished
    trials = _sound_study(run, lines)
    if trials is not None:
        return trials, 0
    found = [trial for line in lines if (trial := _sound_trial(line)) is not None]
    intact = sum(line.startswith(_OTHERS) for line in lines)
    return _numbered(found), max(len(lines) - len(found) - intact, 1)


def _sound_study(run: Path, lines: Sequence[bytes]) -> list[FrozenTrial] | None:
    """Return the trials as Optuna reads them; None if anything is damaged."""
    if not all(line.startswith((_TRIAL, *_OTHERS)) for line in lines):
        return None
    try:
        study = load_study(run)
        trials = study.get_trials(deepcopy=False)
        complete = {"objectives", "constraint_names"} <= set(study.user_attrs)
    except InputError:
        return None
    every = len(trials) == sum(line.startswith(_TRIAL) for line in lines)
    return trials if complete and every and all(map(_is_sound, trials)) else None


def _sound_trial(line: bytes) -> FrozenTrial | None:
    """Return the trial of a line of the journal; None if it is damaged, or holds something else."""
    try:
        log = json.loads(line)
        distributions = {name: json_to_distribution(text) for name, text in log["distributions"].items()}
        values = log["values"] if log["values"] is not None or log["value"] is None else [log["value"]]
        trial = create_trial(
            state=TrialState(log["state"]),
            params={name: distributions[name].to_external_repr(value) for name, value in log["params"].items()},
            distributions=distributions,
            values=values,
            user_attrs=log["user_attrs"],
            system_attrs=log["system_attrs"],
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    return trial if _is_sound(trial) else None


def _is_sound(trial: FrozenTrial) -> bool:
    """Return whether a trial is as it was recorded; those of earlier versions have no checksum."""
    facts: Mapping[str, Any] = trial.user_attrs
    if not all(name in facts for name in _FACTS):
        return False
    return CHECKSUM not in facts or facts[CHECKSUM] == checksum(trial.params, trial.values, facts)


def _numbered(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials with consecutive numbers of their evaluations: the lost ones leave no gaps."""
    for number, trial in enumerate(trials):
        trial.user_attrs["evaluation"] = number
        if CHECKSUM in trial.user_attrs:
            trial.user_attrs[CHECKSUM] = checksum(trial.params, trial.values, trial.user_attrs)
    return list(trials)
