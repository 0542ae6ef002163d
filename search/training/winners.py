"""Trains the best policies of each budget, and exports and verifies the best trained network.

    careful repair ─▶ training ─▶ validation and test score ─▶ exports/<budget>-trained, verified

Everything is in the run's folder: training/<evaluation>-<epochs>-epochs-<recipe>/ has the checkpoint and the learning curve. A
training that was interrupted continues from its last epoch, and a finished one is not done again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from secateur.envs.core import CompressionPolicy, Evaluation, InputError
from secateur.envs.metric import Metric
from secateur.envs.policy_space import document_to_policy
from secateur.envs.training.distillation import EpochRecord, Training, Watch
from secateur.envs.training.recipe import DistillationConfig
from secateur.envs.training.samples import Samples
from secateur.search.export.write import BuiltNetwork, is_export_of, write_export
from secateur.search.problem import Problem, StatusCallback
from secateur.search.results.document import finalist_points
from secateur.search.results.finalize import dense_test_score, score_network
from secateur.search.results.winners import EXPORTS, check_export
from secateur.search.schema import metric_of, search_score_of
from secateur.search.training.curve import (
    CHECKPOINT,
    DENSE,
    EPOCH,
    EXPORTED,
    REPAIR,
    SEARCH,
    TRAINED,
    Curve,
    Stage,
    training_folder,
)
from secateur.search.training.reports import batch_reporter
from secateur.search.training.samples import training_samples

log = logging.getLogger(__name__)

EpochCallback = Callable[[int, EpochRecord], None]
"""Called after every epoch of a training, with the number of the policy's evaluation."""


@dataclass(frozen=True)
class TrainedWinner:
    """The best trained network of a budget.

    Attributes:
        budget: name of the budget.
        evaluation: number of the evaluation that found the policy.
        metric: of the scores.
        stages: its learning curve, from the dense model to the export.
        folder: of the export; None: it could not be exported.
        dense: the dense model, if the search was given a Python object in this process.
        trust: modules that the export may name.
    """

    budget: str
    evaluation: int
    metric: Metric
    stages: tuple[Stage, ...]
    folder: Path | None
    dense: nn.Module | None = field(default=None, compare=False, repr=False)
    trust: tuple[str, ...] = field(default=(), compare=False)

    @property
    def validation_score(self) -> float | None:
        """The score of the trained network on the validation split."""
        return self._stage(TRAINED).validation

    @property
    def test_score(self) -> float | None:
        """The score of the trained network on the test split."""
        return self._stage(TRAINED).test

    @property
    def verified(self) -> bool | None:
        """Whether the export kept all promises; None: not verified."""
        return self._stage(EXPORTED).passed

    @property
    def notes(self) -> list[str]:
        """Return what went wrong, a sentence each."""
        return [stage.note for stage in self.stages if stage.note]

    def model(self) -> nn.Module:
        """Return the trained network in eval mode, loaded from the export.

        Raises:
            InputError: if there is no export, or it cannot be loaded.
        """
        if self.folder is None:
            raise InputError(f"The trained winner of budget `{self.budget}` is not exported: {' '.join(self.notes)}")
        from secateur.search.export.load import load_compressed

        return load_compressed(self.folder, self.dense, trust=self.trust)

    def _stage(self, name: str) -> Stage:
        return next(stage for stage in reversed(self.stages) if stage.stage == name)


def trained_folder(run: Path, budget: str) -> Path:
    """Return where the trained winner of a budget is exported to."""
    return run / EXPORTS / f"{budget}-trained"


def train_winners(
    problem: Problem,
    document: Mapping[str, Any],
    run: Path,
    config: DistillationConfig,
    budgets: Sequence[str],
    top: int = 1,
    status: StatusCallback = log.info,
    note: StatusCallback = log.info,
    on_epoch: EpochCallback = lambda evaluation, record: None,
) -> list[TrainedWinner]:
    """Return the trained winner of each budget; budgets without one are left out, with a note.

    Args:
        problem: the search.
        document: the run's front.json.
        run: its folder.
        config: how to train.
        budgets: names of budgets.
        top: number of policies per budget that are trained; the best on the validation split is the winner.
        status: called at each stage, and every ten seconds while a network is trained.
        note: called with sentences that are worth keeping.
        on_epoch: called after every epoch with the number of the policy's evaluation.
    Raises:
        InputError: if there are no samples to train on, or a checkpoint belongs to another training.
    """
    samples, source = training_samples(problem, config)
    note(source)
    work = _Work(problem, document, run, config, samples, source, status, note, on_epoch)
    winners = [work.winner(budget, finalist_points(document, budget, top)) for budget in budgets]
    return [winner for winner in winners if winner is not None]


def finished_winners(
    document: Mapping[str, Any], run: Path, config: DistillationConfig, budgets: Sequence[str], top: int = 1
) -> list[TrainedWinner] | None:
    """Return what `train_winners` would return, from the files of the run; None if anything is left to do."""
    winners = []
    for budget in budgets:
        points = finalist_points(document, budget, top)
        curves = [Curve.read(training_folder(run, point["evaluation"], asdict(config))) for point in points]
        if any(curve.find(TRAINED) is None for curve in curves):
            return None
        best = _best(document, budget, curves)
        if best is None:
            continue
        point, curve = points[curves.index(best)], best
        trained, exported = curve.find(TRAINED), curve.find(EXPORTED, budget)
        folder = trained_folder(run, budget)
        assert trained is not None
        if exported is None or not is_export_of(folder, point, budget, training=trained.training):
            return None
        winners.append(_winner(document, budget, point, curve, folder))
    return winners


def _winner(
    document: Mapping[str, Any],
    budget: str,
    point: Mapping[str, Any],
    curve: Curve,
    folder: Path | None,
    dense: nn.Module | None = None,
) -> TrainedWinner:
    stages = tuple(stage for stage in curve.stages if stage.budget in (None, budget))
    return TrainedWinner(budget, point["evaluation"], metric_of(document), stages, folder, dense)


def _best(document: Mapping[str, Any], budget: str, curves: Sequence[Curve]) -> Curve | None:
    """Return the curve with the best validation score at its end, among those that meet the limit of the metric's loss."""
    metric, dense = metric_of(document), document["dense"]["score"]
    allowed = document["budgets"][budget]["metric_drop"]

    def quality(curve: Curve) -> float:
        stage = curve.find(TRAINED)
        assert stage is not None and stage.validation is not None
        drop = metric.drop(stage.validation, dense)
        return -drop if allowed is None or drop <= allowed else float("-inf")

    best = max(curves, key=quality, default=None)
    return None if best is None or quality(best) == float("-inf") else best


@dataclass
class _Work:
    """Trains and exports; a policy that is a finalist of several budgets is trained once."""

    problem: Problem
    document: Mapping[str, Any]
    run: Path
    config: DistillationConfig
    samples: Samples
    source: str
    status: StatusCallback
    note: StatusCallback
    on_epoch: EpochCallback
    done: dict[int, tuple[Curve, nn.Module]] = field(default_factory=dict)

    def winner(self, budget: str, points: Sequence[Mapping[str, Any]]) -> TrainedWinner | None:
        """Return the trained winner of a budget, exported and verified; None, with a note, if there is none."""
        if not points:
            self.note(f"Nothing fits budget `{budget}`, so nothing is trained for it.")
            return None
        curves = [self.trained(point)[0] for point in points]
        best = _best(self.document, budget, curves)
        if best is None:
            self.note(f"No trained network of budget `{budget}` meets its limit of the {metric_of(self.document).label} drop.")
            return None
        point = points[curves.index(best)]
        folder = self.exported(budget, point)
        given = self.problem.given
        return _winner(self.document, budget, point, best, folder, None if given is None else given.model)

    def trained(self, point: Mapping[str, Any]) -> tuple[Curve, nn.Module]:
        """Return the learning curve of a policy and its trained network."""
        number = point["evaluation"]
        if number not in self.done:
            self.done[number] = self._train(number, point)
        return self.done[number]

    def _train(self, number: int, point: Mapping[str, Any]) -> tuple[Curve, nn.Module]:
        problem, task = self.problem, self.problem.task
        folder = training_folder(self.run, number, asdict(self.config))
        policy = document_to_policy(point["policy"])
        exports = [stage for stage in Curve.read(folder).stages if stage.stage == EXPORTED]
        self.status(f"repairing the network of evaluation {number}")
        start = problem.finalist_assembler.assemble(policy)
        curve = Curve(folder)
        for stage in self._before(number, point, start):
            curve.add(stage)
        training = Training(
            task,
            problem.assembler.model,
            self.samples,
            self.config,
            folder / CHECKPOINT,
            {"policy": point["policy"], "samples": self.source},
        )

        def after(record: EpochRecord) -> None:
            curve.add(_epoch_stage(record))
            self.on_epoch(number, record)

        watch = Watch(batch_reporter(self.status, f"evaluation {number}"), after, self._validation_score)
        found = training.run(start, watch)
        if found.note:
            self.note(f"Evaluation {number}: {found.note}")
        validation, test = self._scores(found.network, policy)
        done = {"recipe": asdict(self.config), "epochs": len(found.epochs), "samples": self.source}
        curve.add(Stage(TRAINED, validation=validation.score, test=test.score, training=done, note=found.note))
        for stage in exports:
            curve.add(stage)
        before, metric = curve.find(REPAIR), task.metric
        assert before is not None and before.validation is not None
        moved = f"{metric.text(before.validation)} -> {metric.text(validation.score)}"
        self.note(f"evaluation {number}: validation {metric.label} {moved} by {len(found.epochs)} epochs")
        return curve, found.network

    def _before(self, number: int, point: Mapping[str, Any], start: nn.Module) -> list[Stage]:
        """Return the stages before the training; test scores are those that the search has recorded."""
        final = self.document["final"]
        dense = dense_test_score(self.problem).score if final["dense"] is None else final["dense"]["score"]
        tested = next((one["score"] for one in final["points"] if one["evaluation"] == number), None)
        same = search_score_of(self.document)[0] == metric_of(self.document)
        repaired = self.problem.task.evaluate(start, "validation").score
        return [
            Stage(DENSE, validation=self.document["dense"]["score"], test=dense),
            Stage(SEARCH, validation=point["score"] if same else None),
            Stage(REPAIR, validation=repaired, test=tested),
        ]

    def _scores(self, network: nn.Module, policy: CompressionPolicy) -> tuple[Evaluation, Evaluation]:
        costs = self.problem.space.costs.of_policy(policy)
        validation, test = (score_network(self.problem, network, costs, split) for split in ("validation", "test"))
        return validation, test

    def _validation_score(self, network: nn.Module) -> float | None:
        try:
            return self.problem.task.evaluate(network, "validation").score
        except InputError as error:  # a user's function may fail for a network in the middle of its training
            log.warning("a network in training cannot be scored: %s", error)
            return None

    def exported(self, budget: str, point: Mapping[str, Any]) -> Path | None:
        """Export a trained network for a budget and verify it, unless it was; return the folder, None if it fails."""
        curve, network = self.trained(point)
        trained, folder = curve.find(TRAINED), trained_folder(self.run, budget)
        assert trained is not None and trained.training is not None
        if curve.find(EXPORTED, budget) is not None and is_export_of(folder, point, budget, training=trained.training):
            return folder
        self.status(f"exporting and checking the trained winner of {budget}")
        shutil.rmtree(folder, ignore_errors=True)
        policy = document_to_policy(point["policy"])
        limits = next(one for one in self.problem.budgets if one.name == budget)
        try:
            scores = self._scores(network, policy)
            write_export(folder, self.problem, policy, limits, *scores, built=BuiltNetwork(network, trained.training))
            checked = check_export(self.problem, folder)
        except (InputError, RuntimeError) as error:
            log.info("checking the trained winner of %s failed", budget, exc_info=True)
            failed = f"The trained winner of budget '{budget}' was not checked: {error}"
            self.note(failed)
            curve.add(Stage(EXPORTED, budget=budget, note=failed))
            return folder if folder.is_dir() else None
        for failure in checked.failures:
            self.note(f"The trained winner of budget '{budget}': {failure}")
        problems = " ".join(checked.failures)
        curve.add(Stage(EXPORTED, test=checked.outputs.runtime_score, budget=budget, passed=checked.passed, note=problems))
        return folder


def _epoch_stage(record: EpochRecord) -> Stage:
    found = asdict(record)
    return Stage(EPOCH, validation=found.pop("score"), **found)
