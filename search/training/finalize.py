"""`secateur finalize`: the winners of a run are trained, exported and verified."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from secateur.envs.core import InputError
from secateur.envs.training.recipe import DistillationConfig
from secateur.search.build import build_options, build_problem, build_trackers, search_start
from secateur.search.config import Overrides, SearchConfig
from secateur.search.export.write import check_same_model
from secateur.search.given import Given
from secateur.search.named_code import load_own_manifest, modules_of
from secateur.search.problem import StatusCallback
from secateur.search.results.document import check_budget, finalist_points, read_front
from secateur.search.run.folder import held
from secateur.search.tracking.core import Tracker
from secateur.search.training.winners import TrainedWinner, finished_winners, train_winners


def finalize(
    run: str | os.PathLike[str],
    *,
    budget: str | None = None,
    top: int = 1,
    epochs: int | None = None,
    overrides: Overrides = (),
    status: StatusCallback = lambda text: None,
    note: StatusCallback = lambda text: None,
    given: Given | None = None,
    trust: Collection[str] = (),
    trackers: Sequence[Tracker] = (),
) -> list[TrainedWinner]:
    """Return the trained winner of each budget; see `secateur.finalize`.

    Args:
        run, budget, top, epochs, overrides: as in `secateur.finalize`.
        status: called with a few words at each stage, and with the time left while a network is trained.
        note: called with sentences that are worth keeping.
        given: model and task as Python objects, if the run began with such (`Run.given`).
        trust: modules that the run's manifest may name.
        trackers: follow the training besides those that the configuration names.
    """
    run = Path(run)
    if top < 1:
        raise InputError(f"`top` must be at least 1, but got {top}.")
    settings, _ = load_own_manifest(run, overrides, given, trust)
    config = training_config(settings, epochs)
    document = read_front(run)
    if budget is not None:
        check_budget(document, budget)
    budgets = list(document["budgets"]) if budget is None else [budget]
    points = [point for name in budgets for point in finalist_points(document, name, top)]
    if not points:
        fitting = f"budget `{budget}`" if budget is not None else "any budget"
        raise InputError(f"Nothing in {document['evaluations']} evaluations fits {fitting}, so there is nothing to train.")
    with held(run):
        finished = finished_winners(document, run, config, budgets, top)
        dense, trusted = None if given is None else given.model, () if given is not None else modules_of(settings)
        if finished is not None:
            note("These networks are trained already.")
            return [replace(winner, dense=dense, trust=trusted) for winner in finished]
        problem = build_problem(settings, status, given)
        for point in points:
            check_same_model(problem, document, point)
        following = build_trackers(settings, trackers, note)
        with following.following(search_start(problem, run, document["evaluations"])):
            winners = train_winners(problem, document, run, config, budgets, top, status, note, following.on_epoch)
        return [replace(winner, trust=trusted) for winner in winners]


def training_config(settings: SearchConfig, epochs: int | None = None) -> DistillationConfig:
    """Return how to train: the options of the configuration, with other epochs, or 5 where it has none.

    Raises:
        InputError: if `epochs` is below 1.
    """
    if epochs is not None and epochs < 1:
        raise InputError(f"`epochs` must be at least 1, but got {epochs}.")
    options = settings.finalize.training or {}
    epochs = epochs or options.get("epochs") or DistillationConfig().epochs
    config: DistillationConfig = build_options(DistillationConfig, {**options, "epochs": epochs})
    return config
