"""Exports of a run: the winner of a budget, any trial of the study, or the whole front."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.envs.metric import Metric
from secateur.search.build import build_problem
from secateur.search.config import Overrides
from secateur.search.export.files import read_export
from secateur.search.export.write import check_free, export_point, is_export_of
from secateur.search.given import Given
from secateur.search.named_code import load_own_manifest
from secateur.search.problem import Problem, StatusCallback
from secateur.search.results.document import read_front
from secateur.search.results.selection import (
    Chosen,
    check_selection,
    chosen_front,
    chosen_trial,
    chosen_winner,
    find_trial,
    trial_folder,
)
from secateur.search.schema import metric_of


@dataclass(frozen=True)
class Exported:
    """One export of a run.

    Attributes:
        folder: of the export.
        budget: name of the budget that it is for.
        metric: of the scores.
        validation_score, test_score: in the metric's unit.
        test_images: number of test images.
        written: False: the folder held this very export already.
    """

    folder: Path
    budget: str
    metric: Metric
    validation_score: float
    test_score: float
    test_images: int
    written: bool


def export(
    run: str | os.PathLike[str],
    *,
    budget: str | None = None,
    trial: int | None = None,
    front: bool = False,
    output: str | os.PathLike[str] | None = None,
    pt2: bool = False,
    overrides: Overrides = (),
    status: StatusCallback = lambda text: None,
    given: Given | None = None,
    trust: Collection[str] = (),
) -> list[Exported]:
    """Write models of a run: policy.json, safetensors and ONNX, loadable without pickles. Give one of the first three options.

    Args:
        run: the run, or its folder.
        budget: name of the budget whose winner is exported.
        trial: number of any trial of the study.
        front: whether to export every policy of the front, a folder each.
        output: folder to write; default: RUN/exports/BUDGET, RUN/exports/trial-NUMBER or RUN/exports/front.
        pt2: whether to write model.pt2 of torch.export too.
        overrides: changes of the run's configuration, such as {"data.root": "where/the/data/are/now"}.
        status: called with a few words at each stage.
        given: model and task as Python objects, if the run began with such (`Run.given`).
        trust: modules that the run's manifest may name.
    Returns:
        The exports, in the order of the front. Exports that are in their default folders already are not written again.
    Raises:
        InputError: if nothing fits, a folder is not free, or model, data or code are not what the run was made with.
    """
    check_selection(budget, trial, front)
    run, output = Path(run), None if output is None else Path(output)
    settings, _ = load_own_manifest(run, overrides, given, trust)
    document = read_front(run)
    if trial is not None:
        found = find_trial(run, trial)
        check_free(output or trial_folder(run, trial))
        problem = build_problem(settings, status, given)
        chosen = chosen_trial(run, found, problem.space.policy_space, output)
        return [_write(chosen, problem, document, pt2, status)]
    selected = [chosen_winner(run, document, budget, output)] if budget is not None else chosen_front(run, document, output)
    present = {one.folder for one in selected if output is None and is_export_of(one.folder, one.point, one.budget, pt2)}
    missing = [one for one in selected if one.folder not in present]
    for one in missing:
        check_free(one.folder)
    written: dict[Path, Exported] = {}
    if missing:
        problem = build_problem(settings, status, given)
        written = {one.folder: _write(one, problem, document, pt2, status) for one in missing}
    return [written.get(one.folder) or _exported(one.folder, written=False) for one in selected]


def _write(chosen: Chosen, problem: Problem, document: Mapping[str, Any], pt2: bool, status: StatusCallback) -> Exported:
    status(f"exporting {chosen.folder.name}")
    export_point(chosen.folder, problem, document, chosen.budget, chosen.point, pt2)
    return _exported(chosen.folder, written=True)


def _exported(folder: Path, written: bool) -> Exported:
    document = read_export(folder)
    validation, test = document["scores"]["validation"], document["scores"]["test"]
    return Exported(
        folder, document["budget"]["name"], metric_of(document), validation["score"], test["score"], test["images"], written
    )
