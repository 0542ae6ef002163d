"""Searches as Python users start and read them: `search`, `resume`, `load_run`, and the `Run` that they return."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
from rich.console import Console

from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.policy_space import document_to_policy
from secateur.search.config import ConfigSource, Overrides, SearchConfig, load_config
from secateur.search.named_code import modules_of
from secateur.search.results.document import front_csv, read_front, winner
from secateur.search.results.query import Columns, query
from secateur.search.run import search as engine
from secateur.search.run.folder import MANIFEST, load_manifest, read_json
from secateur.search.run.journal import read_journal, trials_table
from secateur.search.run.progress import SearchProgress
from secateur.search.run.study import Study, load_study
from secateur.search.schema import metric_of, search_score_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.envs.metric import Metric
    from secateur.envs.tasks.core import Batch
    from secateur.search.ask import Reply
    from secateur.search.export.run_exports import Exported
    from secateur.search.given import Given
    from secateur.search.tracking.core import Tracker
    from secateur.search.training.winners import TrainedWinner


def search(
    config: ConfigSource | nn.Module,
    overrides: Overrides = (),
    progress: SearchProgress | bool = False,
    *,
    trackers: Sequence[Tracker] = (),
    inputs: Any = None,
    calibration: Any = None,
    evaluate: Callable[[Any], float] | None = None,
    test: Callable[[Any], float] | None = None,
    metric: Metric | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    divergence: Callable[[Any, Any], Tensor] | None = None,
    **settings: Any,
) -> Run:
    """Run a search, and return the run: study, Pareto front, winners with test scores, exported and verified.

    Whatever ends the search early (Ctrl-C, an error) leaves a run folder with everything that was found; `resume` continues it.

    Args:
        config: a configuration, the path of a YAML file, or its content as a dict. Or a model: then `inputs` and `calibration`
            are needed, and `settings` take the place of a configuration.
        overrides: ["search.evaluations=50"] or {"search.evaluations": 50}; they win over everything else.
        progress: True: show the progress on stderr.
        trackers: objects of subclasses of `secateur.Tracker` that follow it, besides those in `output.trackers`.
        inputs: example inputs of the model: a tensor, a tuple of positional arguments, or a dict of keyword arguments. The first
            axis is the batch.
        calibration: loader or list of batches: inputs, or tuples that begin with the inputs. The first 512 samples are used for
            statistics of activations; no labels are needed.
        evaluate: scores a model in the search: takes a module in eval mode, returns one number. It also gets modules that run an
            exported file. None: the score is the divergence from the dense model's outputs on a part of `calibration`.
        test: scores the finalists, on data that `evaluate` has not used. None: `evaluate` does.
        metric: what `evaluate` and `test` return.
        loss: training loss of a model on a batch (inputs, targets); some importances need it.
        divergence: of the dense model's outputs and another's, (samples,). Default: KL divergence of class scores (samples,
            classes), relative squared error of other outputs.
        settings: `budgets` and other sections of a configuration, `part` (path of the submodule to compress), and `agent`,
            `options`, `evaluations`, `seed`, `workers` and `time_limit` of its section `search`.
    Raises:
        InputError: if something in the configuration cannot be used; nothing is written then.
    """
    given = None
    if not isinstance(config, str | os.PathLike | Mapping | SearchConfig):
        from secateur.search.given import given_config, make_given

        given = make_given(config, inputs, calibration, evaluate, test, metric, loss, divergence)
        config = given_config(given, settings)
    elif settings or inputs is not None or calibration is not None or evaluate is not None:
        named = [*settings, *(["inputs, calibration, evaluate"] if not settings else [])]
        raise InputError(f"`{named[0]}` goes with a model object; with a configuration, use `overrides`.")
    resolved = load_config(config, overrides)
    with _shown(progress) as display:
        folder = engine.search(resolved, display, given, trackers)
    return Run(folder, given, () if given is not None else modules_of(resolved))


def resume(
    run: str | os.PathLike[str],
    overrides: Overrides = (),
    progress: SearchProgress | bool = False,
    trust: Collection[str] = (),
    trackers: Sequence[Tracker] = (),
) -> Run:
    """Continue an interrupted run, or a finished one with more evaluations, as if it had never stopped; return it.

    Args:
        run: the run, or its folder.
        overrides: changes of the run's configuration, such as {"search.evaluations": 500}, or another budget:
            {"budgets.small": {"macs": "<= 35%"}}. All evaluations so far count for it, too.
        progress: True: show the progress on stderr.
        trust: modules that the run's manifest may name; those of secateur and torchvision's models need not be named.
        trackers: as in `search`.
    Raises:
        InputError: if the folder is not a run, another process searches in it, the manifest names a module that is not
            trusted, or the overrides change what was searched; nothing is written then.
    """
    given, trusted = _own(run, trust)
    with _shown(progress) as display:
        return Run(engine.resume(Path(run), overrides, display, given, trusted, trackers), given, trusted)


def finalize(
    run: str | os.PathLike[str],
    *,
    budget: str | None = None,
    top: int = 1,
    epochs: int | None = None,
    overrides: Overrides = (),
    progress: SearchProgress | bool = False,
    trust: Collection[str] = (),
    trackers: Sequence[Tracker] = (),
) -> list[TrainedWinner]:
    """Train the winners of a run with distillation from the dense model; export and verify them in RUN/exports/BUDGET-trained.

    Interrupted, it continues from the last finished epoch when it is called again; what is finished is not done again.

    Args:
        run: the run, or its folder.
        budget: name of one budget; None: all of them.
        top: number of policies per budget that are trained; the best on the validation split is exported.
        epochs: number of epochs; None: `finalize.training.epochs` of the run, or 5.
        overrides: changes of the run's configuration, such as {"finalize.training.flip": True}.
        progress: True: show the progress on stderr.
        trust: as in `resume`.
        trackers: as in `search`.
    Raises:
        InputError: if nothing fits, there is nothing to train on, a checkpoint belongs to another training, the manifest names
            a module that is not trusted, or model, data or code are not what the run was made with.
    """
    from secateur.search.training import finalize as engine

    given, trusted = _own(run, trust)
    with _shown(progress) as display:
        return engine.finalize(
            run,
            budget=budget,
            top=top,
            epochs=epochs,
            overrides=overrides,
            status=display.status,
            note=display.note,
            given=given,
            trust=trusted,
            trackers=trackers,
        )


def load_run(folder: str | os.PathLike[str], trust: Collection[str] = ()) -> Run:
    """Return the run in a folder, whether its search has ended or not. Nothing that it names is imported.

    Args:
        folder: of the run.
        trust: modules that the run's files may name when its methods build the model: see `resume`.
    Raises:
        InputError: if the folder is not a run.
    """
    read_json(Path(folder) / MANIFEST, "a run")
    return Run(Path(folder), trust=tuple(trust))


def _own(run: str | os.PathLike[str], trust: Collection[str]) -> tuple[Given | None, tuple[str, ...]]:
    """Return the objects of a run, and the modules that its files may name."""
    return (run.given, (*run.trust, *trust)) if isinstance(run, Run) else (None, tuple(trust))


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
        validation_score: in the metric's unit; after the finalists' repair once the search has ended. Before: that of the search;
            None if the search's score is not the metric.
        test_score: in the metric's unit; None before the search has ended.
        verified: whether its export kept all promises; None: not verified.
        folder: its export; None: not exported by the search.
        dense: the dense model, if the search was given a Python object in this process.
        trust: modules that the export may name.
    """

    budget: str
    evaluation: int
    policy: CompressionPolicy
    choices: Mapping[str, float]
    costs: Mapping[str, float]
    validation_score: float | None
    test_score: float | None
    verified: bool | None
    folder: Path | None
    dense: nn.Module | None = field(default=None, compare=False, repr=False)
    trust: tuple[str, ...] = field(default=(), compare=False)

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

        return load_compressed(self.folder, self.dense, trust=self.trust)


@dataclass(frozen=True)
class Run:
    """The folder of a search. Every property reads the files anew, so a run can be followed while it searches.

    A run stands for its folder wherever a path is expected: `secateur.resume(run)`, `Path(run)`.

    Attributes:
        folder: of the run.
        given: model and task, if the search was given Python objects in this process.
        trust: modules that its files may name: those of the configuration in this process, or of `load_run`.
    """

    folder: Path
    given: Given | None = field(default=None, compare=False, repr=False)
    trust: tuple[str, ...] = field(default=(), compare=False, repr=False)

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

        Columns: evaluation, on_front (of all budgets together), fits (names of budgets), validation_METRIC in the search (with
        the score `divergence`: calibration_divergence), finalist_validation_METRIC and test_METRIC (NaN unless a finalist;
        METRIC is the metric's name, such as top1), every cost, every choice.
        """
        text = front_csv(self.document)
        return pandas.read_csv(io.StringIO(text), keep_default_na=True) if text else pandas.DataFrame()

    @property
    def trials(self) -> pandas.DataFrame:
        """All evaluations, one row each, indexed by their number.

        Columns: state (COMPLETE, PRUNED if stopped early, FAIL), budget and feasible (within the budget that it was
        chosen for), the metric's name, every cost, images, seconds, failure (a sentence), every choice.
        """
        return trials_table(read_journal(self.folder))

    def query(
        self, where: str | None = None, sort: Columns = (), limit: int | None = None, columns: Columns | None = None
    ) -> pandas.DataFrame:
        """Return the evaluations that satisfy a condition; see `secateur.query`."""
        return query(self, where, sort, limit, columns)

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
            _validation_score(document, point) if final is None else final["validation_score"],
            None if final is None else final["score"],
            check.get("passed"),
            self.folder / check["export"] if check.get("export") else None,
            None if self.given is None else self.given.model,
            self.trust,
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

        return export(self, budget=budget, trial=trial, front=front, output=output, pt2=pt2, given=self.given, trust=self.trust)

    def finalize(
        self,
        *,
        budget: str | None = None,
        top: int = 1,
        epochs: int | None = None,
        overrides: Overrides = (),
        progress: SearchProgress | bool = False,
    ) -> list[TrainedWinner]:
        """Train the winners of this run, export and verify them; see `secateur.finalize`."""
        return finalize(self, budget=budget, top=top, epochs=epochs, overrides=overrides, progress=progress)

    def report(self, output: str | os.PathLike[str] | None = None, plots: str | os.PathLike[str] | None = None) -> Path:
        """Write a self-contained HTML page about this run, and return its path; see `secateur.report`."""
        from secateur.search.report.write import report

        return report(self, output, plots)

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

        return ask(self, budget, preference, evaluations, overrides, given=self.given, trust=self.trust)


def _validation_score(document: Mapping[str, Any], point: Mapping[str, Any]) -> float | None:
    same = search_score_of(document)[0] == metric_of(document)
    return point["score"] if same else None


def _only_budget(document: Mapping[str, Any]) -> str:
    names = list(document["budgets"])
    if len(names) != 1:
        raise InputError(f"The run has {len(names)} budgets; name one: {', '.join(names)}.")
    return names[0]
