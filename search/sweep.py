"""Runs whole searches as Ray Tune trials: agents x seeds x budgets x any other values of the configuration.

One Tune trial is one search in a run folder of its own. The folder is the trial's checkpoint: a trial that starts again, after a
fault or because the sweep was interrupted, resumes its run. So a sweep needs no state besides the run folders and the rows of the
finished searches; the same command continues it. On a cluster, all machines must see the folder of the results.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from os.path import isfile
from pathlib import Path
from typing import Any

from secateur.envs.core import InputError
from secateur.search.benchmarks.agent_tables import outcome_line, summary
from secateur.search.benchmarks.agents import contestant
from secateur.search.benchmarks.records import Records, config_record
from secateur.search.benchmarks.scaffold import ROWS, write_results
from secateur.search.config import SearchConfig, load_config, override_values
from secateur.search.named_code import modules_of
from secateur.search.results.document import finalist_points, read_front
from secateur.search.run.folder import MANIFEST
from secateur.search.run.ray_cluster import LOCAL, RayConnection, available_cores, last_line
from secateur.search.run.study import load_study
from secateur.search.schema import metric_of, search_score_of

RUNS = "runs"
MAX_FAULTS = 3
"""How often a trial is started again after a fault, such as a lost machine; it resumes its run."""


@dataclass(frozen=True)
class Search:
    """One search of a sweep.

    Attributes:
        label: in tables: the agent, and what distinguishes the search besides the seed.
        seed: of the search.
        overrides: what it changes in the configuration of the sweep, {"section.key": value}.
    """

    label: str
    seed: int
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return re.sub(r"[^\w.-]+", "-", f"{self.label}-seed{self.seed}").strip("-.")


def searches(
    config: SearchConfig,
    agents: Sequence[str] | None,
    seeds: int,
    budgets: Sequence[str],
    varied: Sequence[str],
) -> list[Search]:
    """Return every combination.

    Args:
        config: of the sweep.
        agents: texts such as "envelope_ddpg updates=3"; None: the agent of the configuration.
        seeds: number of seeds, from the configuration's on.
        budgets: overrides such as 'budgets.small={"macs": "<= 35%"}': each search has one of them as its only budget; empty: all
            searches have the configuration's budgets.
        varied: texts such as "space.channel_multiple=[1, 8]": the values that a key takes.
    Raises:
        InputError: if a value cannot be used; or if two searches are the same.
    """
    names = [config.search.agent] if agents is None else agents
    axes = [[{"search.agent": one.name, "search.options": one.options} for one in (contestant(text, config) for text in names)]]
    axes.append([{"budgets": {key.removeprefix("budgets."): value}} for key, value in map(override_values, budgets)] or [{}])
    axes += [_values(text) for text in varied]
    labels = [list(names), [" ".join(one["budgets"]) if one else "" for one in axes[1]]]
    labels += [[" ".join(f"{key.rpartition('.')[2]}={value}" for key, value in one.items()) for one in axis] for axis in axes[2:]]
    found = []
    for seed in range(config.search.seed, config.search.seed + seeds):
        for one, label in zip(product(*axes), product(*labels), strict=True):
            overrides = {key: value for part in one for key, value in part.items()} | {"search.seed": seed}
            found.append(Search(" ".join(filter(None, label)), seed, overrides))
    for search in found:
        load_config(config, search.overrides)
    if len({search.name for search in found}) < len(found):
        raise InputError("Two searches of the sweep are the same, or have names that differ in signs only.")
    return found


def _values(text: str) -> list[dict[str, Any]]:
    key, values = override_values(text)
    if not isinstance(values, list) or not values:
        raise InputError(f"`--vary` must read like space.channel_multiple=[1, 8], but got {text!r}.")
    return [{key: value} for value in values]


def run_sweep(
    config: SearchConfig, chosen: Sequence[Search], output: Path, workers: int = 0, concurrent: int | None = None
) -> None:
    """Run the searches that have no row yet, print a table, and write results.jsonl and results.md.

    Args:
        config: of the sweep.
        chosen: the searches; see `searches`.
        output: folder of the results and of the runs.
        workers: of each search; 0: it runs in the trial's own process.
        concurrent: largest number of searches at the same time; None: as many as the cores allow.
    Raises:
        InputError: if the folder holds another sweep, there is no cluster at the configuration's address, or searches have
            failed: the others have their rows.
    """
    records = Records(output / ROWS, {"benchmark": "sweep", "config": config_record(config)})
    missing = {one.name: one for one in chosen if records.find(agent=one.label, seed=one.seed) is None}

    def on_finished(name: str) -> None:
        row = records.add(**search_row(missing[name], output / RUNS / name))
        print(outcome_line(row), flush=True)

    failed = _run_trials(config, list(missing.values()), output.resolve(), workers, concurrent, on_finished) if missing else {}
    if records.rows:
        write_results(records, (), summary)
    for name, reason in failed.items():
        raise InputError(f"{len(failed)} of {len(missing)} searches have failed; {name}: {reason}. The same command tries again.")


def _run_trials(
    config: SearchConfig,
    chosen: Sequence[Search],
    output: Path,
    workers: int,
    concurrent: int | None,
    on_finished: Callable[[str], None],
) -> dict[str, str]:
    """Run the searches, and call `on_finished` with the name of each; return {name: reason} of those that have failed."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints boxes
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours closes everything
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths in configurations are relative to this folder
    address = config.search.address or LOCAL
    connection = RayConnection(address, **({"num_cpus": available_cores()} if address == LOCAL else {}))
    try:
        from ray import tune

        class Finished(tune.Callback):
            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                on_finished(trial.config["search"]["name"])

        values = config.model_dump(mode="json")
        section = {**values["search"], "workers": workers, "address": None}
        plain = {**values, "search": section, "output": {**values["output"], "root": str(output / RUNS)}}
        # The trial itself waits for its workers, so it takes no core besides theirs.
        bundles = [{"CPU": 1.0}] if workers == 0 else [{"CPU": 0.0}, *[{"CPU": 1.0}] * workers]
        trainable = tune.with_resources(tune.with_parameters(_trial, values=plain), tune.PlacementGroupFactory(bundles))
        space = {"search": tune.grid_search([{"name": one.name, "overrides": dict(one.overrides)} for one in chosen])}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner = tune.Tuner(
                trainable,
                param_space=space,
                tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(output),
                    failure_config=tune.FailureConfig(max_failures=MAX_FAULTS),
                    verbose=0,
                    callbacks=[Finished()],
                ),
            )
            results = tuner.fit()
        shutil.rmtree(output / "tune", ignore_errors=True)  # the run folders hold everything
        errors = {one.name: results[number].error for number, one in enumerate(chosen)}
        return {name: last_line(error) for name, error in errors.items() if error is not None}
    finally:
        connection.close()


def _trial(trial: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Run or resume one search: the function of a Tune trial."""
    from secateur.search.run import search as engine

    name, overrides = trial["search"]["name"], trial["search"]["overrides"]
    folder = Path(values["output"]["root"]) / name
    config = load_config(values, {**overrides, "output.name": name})
    if isfile(folder / MANIFEST):
        engine.resume(folder, trust=modules_of(config))  # the user's own configuration names them
    else:
        shutil.rmtree(folder, ignore_errors=True)  # it was killed before its first evaluation
        engine.search(config)
    return {"evaluations": read_front(folder)["evaluations"]}


def search_row(search: Search, run: Path) -> dict[str, Any]:
    """Return the row of a finished search, with the keys of `secateur benchmark search`; seconds are those of evaluations."""
    document = read_front(run)
    evaluations, metric = document["evaluations"], metric_of(document)
    seconds = sum(trial.user_attrs.get("seconds", 0.0) for trial in load_study(run).get_trials(deepcopy=False))
    return {
        "agent": search.label,
        "seed": search.seed,
        "overrides": dict(search.overrides),
        "run": str(run),
        "metric": asdict(metric),
        "search_metric": asdict(search_score_of(document)[0]),
        "evaluations": evaluations,
        "feasible": document["feasible"] / evaluations,
        "failed": document["failed"],
        "hypervolume": document["hypervolume"],
        "seconds": round(seconds, 1),
        "winners": {budget: _winner(document, budget) for budget in document["budgets"]},
        "curve": [{"evaluations": evaluations, "hypervolume": document["hypervolume"]}],
    }


def _winner(document: Mapping[str, Any], budget: str) -> dict[str, Any] | None:
    final = next((point for point in document["final"]["points"] if point["budget"] == budget), None)
    if final is None:
        return None
    point = finalist_points(document, budget, 1)[0]
    scores = {"search_score": point["score"], "validation_score": final["validation_score"], "test_score": final["score"]}
    return {**scores, "costs": final["costs"], "policy": point["policy"]}
