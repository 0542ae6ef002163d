"""Searches as Python users start and read them: `search`, `resume`, `load_run`, and the `Run` that they return."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
from rich.console import Console

from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.policy_space import document_to_policy
from secateur.search.config import ConfigSource, Overrides, SearchConfig, load_config
from secateur.search.results.document import front_csv, read_front, winner
from secateur.search.run import search as engine
from secateur.search.run.folder import MANIFEST, load_manifest, read_json
from secateur.search.run.progress import SearchProgress
from secateur.search.run.study import Study, load_study, trials_table

if TYPE_CHECKING:
    from torch import nn

    from secateur.search.ask import Reply
    from secateur.search.export.run_exports import Exported


def search(config: ConfigSource, overrides: Overrides = (), progress: SearchProgress | bool = False) -> Run:
    """Run a search, and return the run: study, Pareto front, winners with test scores, exported and verified.

    Whatever ends the search early (Ctrl-C, an error) leaves a run folder with everything that was found; `resume` continues it.

    Args:
        config: a configuration, the path of a YAML file, or its content as a dict.
        overrides: ["search.evaluations=50"] or {"search.evaluations": 50}; they win over `config`.
        progress: True: show the progress on stderr.
    Raises:
        InputError: if something in the configuration cannot be used; nothing is written then.
    """
    settings = load_config(config, overrides)
    with _shown(progress) as display:
        return Run(engine.search(settings, display))


def resume(run: str | os.PathLike[str], overrides: Overrides = (), progress: SearchProgress | bool = False) -> Run:
    """Continue an interrupted run, or a finished one with more evaluations, as if it had never stopped; return it.

    Args:
        run: the run, or its folder.
        overrides: changes of the run's configuration, such as {"search.evaluations": 500}.
        progress: True: show the progress on stderr.
    Raises:
        InputError: if the folder is not a run, another process searches in it, or the overrides change what was searched;
            nothing is written then.
    """
    with _shown(progress) as display:
        return Run(engine.resume(Path(run), overrides, display))


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Return the run in a folder, whether its search has ended or not.

    Raises:
        InputError: if the folder is not a run.
    """
    read_json(Path(folder) / MANIFEST, "a run")
    return Run(Path(folder))


def _shown(progress: SearchProgress | bool) -> SearchProgress:
    if isinstance(progress, SearchProgress):
        return progress
    return SearchProgress(Console(stderr=True, quiet=not progress))


@dataclass(frozen=True)
class Winner:
    """The policy to export for a budget: the best one on the validation images.

    Attributes:
        budget: name of the budget.
        evaluation: number of the evaluation that found it.
        policy: channels and bit-widths of every layer.
        choices: {name of a choice: value}, as the study names them.
        costs: {name: value} in the unit of the name.
        validation_score: in the metric's unit; after the finalists' repair once the search has ended.
        test_score: in the metric's unit; None before the search has ended.
        verified: whether its export kept all promises; None: not verified.
        folder: its export; None: not exported by the search.
    """

    budget: str
    evaluation: int
    policy: CompressionPolicy
    choices: Mapping[str, float]
    costs: Mapping[str, float]
    validation_score: float
    test_score: float | None
    verified: bool | None
    folder: Path | None

    def model(self) -> nn.Module:
        """Return the compressed network in eval mode, loaded from the export.

        Raises:
            InputError: if there is no export, or it cannot be loaded.
        """
        if self.folder is None:
            raise InputError(
                f"The winner of budget `{self.budget}` is not exported. Call export(budget={self.budget!r}) of the run."
            )
        from secateur.search.export.load import load_compressed

        return load_compressed(self.folder)


@dataclass(frozen=True)
class Run:
    """The folder of a search. Every property reads the files anew, so a run can be followed while it searches.

    A run stands for its folder wherever a path is expected: `secateur.resume(run)`, `Path(run)`.

    Attributes:
        folder: of the run.
    """

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def config(self) -> SearchConfig:
        """The configuration, with all defaults."""
        return load_manifest(self.folder)[0]

    @property
    def document(self) -> dict[str, Any]:
        """The content of front.json: counts, dense model, budgets, policies and final scores."""
        return read_front(self.folder)

    @property
    def front(self) -> pandas.DataFrame:
        """The policies on the front of any budget, and the finalists, one row each, as in front.csv.

        Columns: evaluation, on_front (of all budgets together), fits (names of budgets), validation_METRIC in the search,
        finalist_validation_METRIC and test_METRIC (NaN unless a finalist; METRIC is the metric's name, such as top1), every
        cost, every choice.
        """
        text = front_csv(self.document)
        return pandas.read_csv(io.StringIO(text), keep_default_na=True) if text else pandas.DataFrame()

    @property
    def trials(self) -> pandas.DataFrame:
        """All evaluations, one row each, indexed by their number.

        Columns: state (COMPLETE, PRUNED if stopped early, FAIL), budget and feasible (within the budget that it was
        chosen for), the metric's name, every cost, images, seconds, failure (a sentence), every choice.
        """
        return trials_table(self.study)

    @property
    def study(self) -> Study:
        """The Optuna study, for reading."""
        return load_study(self.folder)

    def best(self, budget: str | None = None) -> Winner:
        """Return the winner of a budget; the name may be left out if the run has one budget.

        Raises:
            InputError: if there is no such budget, or nothing fits it.
        """
        document = self.document
        budget = _only_budget(document) if budget is None else budget
        point = winner(document, budget)
        final = next((one for one in document["final"]["points"] if one["budget"] == budget), None)
        check = document["budgets"][budget].get("check") or {}  # runs of earlier versions have none
        return Winner(
            budget,
            point["evaluation"],
            document_to_policy(point["policy"]),
            point["choices"],
            point["costs"],
            point["score"] if final is None else final["validation_score"],
            None if final is None else final["score"],
            check.get("passed"),
            self.folder / check["export"] if check.get("export") else None,
        )

    def export(
        self,
        *,
        budget: str | None = None,
        trial: int | None = None,
        front: bool = False,
        output: str | os.PathLike[str] | None = None,
        pt2: bool = False,
    ) -> list[Exported]:
        """Write models of this run; see `secateur.export`."""
        from secateur.search.export.run_exports import export

        return export(self, budget=budget, trial=trial, front=front, output=output, pt2=pt2)

    def resume(self, overrides: Overrides = (), progress: SearchProgress | bool = False) -> Run:
        """Continue this run; see `secateur.resume`."""
        return resume(self, overrides, progress)

    def ask(
        self,
        budget: str | Mapping[str, str],
        preference: str | Mapping[str, float] | None = None,
        evaluations: int = 3,
        overrides: Overrides = (),
    ) -> Reply:
        """Return policies for any budget from the run's agent; see `secateur.ask`."""
        from secateur.search.ask import ask

        return ask(self, budget, preference, evaluations, overrides)


def _only_budget(document: Mapping[str, Any]) -> str:
    names = list(document["budgets"])
    if len(names) != 1:
        raise InputError(f"The run has {len(names)} budgets; name one: {', '.join(names)}.")
    return names[0]
