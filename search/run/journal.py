"""Reads the journal of a study: one pass, every line checked, without Optuna's objects.

Optuna's own reader makes one distribution per choice of every trial; for 20,000 trials of 60 choices that takes most of a minute.
The distributions of all trials of a run are the same, so they are parsed once here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path
from typing import Any

import pandas

from secateur.envs.core import InputError

JOURNAL = "study.journal"
MAX_LINE_BYTES = 16_000_000
"""Of one record; a trial with a thousand choices takes 0.2 MB."""

CREATE_STUDY, SET_STUDY_ATTRIBUTE, CREATE_TRIAL = 0, 2, 4
OPERATIONS = range(11)
"""Codes of the operations in a journal, as Optuna 5 numbers them."""

STATES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING")
"""Names of a trial's states, by their number in a journal."""


@dataclass(frozen=True)
class Trial:
    """One trial, with the names that Optuna's `FrozenTrial` has.

    Attributes:
        number: in the study, from 0 on.
        state: one of `STATES`.
        values: the objectives; None if it failed.
        params: {choice: value}.
        user_attrs: facts, see `StudyRecorder.record`.
    """

    number: int
    state: str
    values: list[float] | None
    params: dict[str, Any]
    user_attrs: dict[str, Any]


@dataclass
class Journal:
    """The content of a journal.

    Attributes:
        user_attrs: facts about the study; `objectives` are names, at least one.
        trials: in order.
    """

    user_attrs: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)


def read_journal(run: str | Path) -> Journal:
    """Return the study of a run. An unfinished last line, left by a killed process, is skipped.

    Raises:
        InputError: if the folder has no journal, a line of it is damaged, missing or repeated, or it names no objectives.
    """
    path = Path(run) / JOURNAL
    if not isfile(path):
        raise InputError(f"{run} is not a run: it has no {JOURNAL}.")
    journal, shared, studies = Journal(), _SharedDistributions(), 0
    for number, line in _lines(path):
        try:
            record = shared.parse(line)
            operation = record["op_code"]
            if operation not in OPERATIONS:
                raise ValueError(f"it has the operation {operation!r}, which Optuna does not know")
            studies += operation == CREATE_STUDY
            if operation == SET_STUDY_ATTRIBUTE:
                journal.user_attrs.update(record["user_attr"])
            elif operation == CREATE_TRIAL:
                journal.trials.append(_trial(record, len(journal.trials)))
            if studies != 1:
                raise ValueError("the journal must begin with one study, and hold no other")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, number, error) from None
    if not studies:
        raise InputError(f"{path} cannot be read: it holds no study. Search again.")
    objectives = journal.user_attrs.get("objectives")
    if not isinstance(objectives, list) or not objectives or not all(isinstance(name, str) for name in objectives):
        raise InputError(f"{path} cannot be read: it does not name the objectives of its search. Search again.")
    return journal


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of every finished line."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if line.endswith(b"\n"):
                    yield number, line
                elif len(line) == MAX_LINE_BYTES:
                    raise _damaged(path, number, ValueError(f"it is longer than {MAX_LINE_BYTES:,} bytes"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from None


def _damaged(path: Path, number: int, error: Exception) -> InputError:
    problem = "is not valid JSON" if isinstance(error, json.JSONDecodeError) else "is no record of a study"
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
    way_out = f"Keep its first {number - 1} lines (head -n {number - 1}) and resume the run: the rest is evaluated again."
    way_out = way_out if number > 1 else "Search again."
    return InputError(f"{path} cannot be read: line {number} {problem} ({reason}). {way_out}")


class _SharedDistributions:
    """Parses records. The text of a trial's distributions is parsed only if it differs from the trial before."""

    START, END = b'"distributions":{', b'},"params":{'

    def __init__(self) -> None:
        self._text = b""
        self._choices: dict[str, list[Any]] = {}

    def parse(self, line: bytes) -> dict[str, Any]:
        """Return the record of a line; its `distributions` are those of `_choices`."""
        start = line.find(self.START)
        end = line.find(self.END, start)
        if start < 0 or end < 0:
            record = json.loads(line)
            if "distributions" in record:
                record["distributions"] = _choices(record["distributions"])
            return record
        start += len(self.START) - 1
        if (text := line[start : end + 1]) != self._text:
            self._choices, self._text = _choices(json.loads(text)), text
        record = json.loads(line[:start] + b"null" + line[end + 1 :])
        record["distributions"] = self._choices
        return record


def _choices(distributions: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return {name: choices} of the categorical distributions; the values of others are stored as they are."""
    parsed = {name: json.loads(text) for name, text in distributions.items()}
    return {name: found["attributes"]["choices"] for name, found in parsed.items() if found["name"] == "CategoricalDistribution"}


def _trial(record: Mapping[str, Any], number: int) -> Trial:
    facts = record.get("user_attrs", {})
    if facts.get("evaluation") != number:
        raise ValueError(
            f"it holds evaluation {facts.get('evaluation')}, but the next one is {number}: a line was removed or repeated"
        )
    missing = [name for name in ("budget", "feasible") if name not in facts]
    if missing:
        raise ValueError(f"it has no `{missing[0]}`")
    values = record.get("values")
    if values is not None and not all(isinstance(value, int | float) for value in values):
        raise ValueError("its values are no numbers")
    params = record.get("params", {})
    for name, choices in record.get("distributions", {}).items():
        if name in params:
            params[name] = choices[int(params[name])]
    return Trial(number, STATES[record.get("state", 0)], values, params, facts)


# ----------------------------------------------------------------------------------------------------------------- table


def trials_table(journal: Journal) -> pandas.DataFrame:
    """Return one row per evaluation, indexed by its number; `Run.trials` lists the columns."""
    objectives = journal.user_attrs["objectives"]
    rows = [_row(trial, objectives[0]) for trial in journal.trials]
    columns = dict.fromkeys(
        ["evaluation", *(name for row in rows for name in row)] if rows else ["evaluation", *_FACTS, *objectives]
    )
    return pandas.DataFrame(rows, columns=list(columns)).set_index("evaluation")


_FACTS = ("state", "budget", "feasible")
"""Columns of every table of trials, also of one without rows."""


def _row(trial: Trial, metric: str) -> dict[str, Any]:
    facts = trial.user_attrs
    return {
        "evaluation": facts["evaluation"],
        "state": trial.state,
        "budget": facts["budget"],
        "feasible": facts["feasible"],
        metric: trial.values[0] if trial.values else float("nan"),
        **{name.removeprefix("cost/"): value for name, value in facts.items() if name.startswith("cost/")},
        "images": facts.get("images"),
        "seconds": facts.get("seconds"),
        "failure": facts.get("failure"),
        **trial.params,
    }
