"""The main job: build the problem, search, and keep the run folder complete and readable at any moment."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from os.path import exists, isdir
from pathlib import Path

from rich.console import Console

from secateur.agents.core import Agent, Saving
from secateur.cost_models.device import write_device
from secateur.envs.core import Actor, Episode
from secateur.envs.devices import CPU, describe_device
from secateur.search.build import build_agent, build_front, build_problem, build_trackers, open_runner, prepare, search_start
from secateur.search.config import Overrides, SearchConfig
from secateur.search.given import Given
from secateur.search.loop import Runner, run_loop
from secateur.search.named_code import load_own_manifest
from secateur.search.problem import Problem
from secateur.search.results.document import read_front, write_front
from secateur.search.results.finalize import dense_test_score, finalize
from secateur.search.results.front import Front
from secateur.search.results.score_check import ScoreCheck, recorded_check, score_lines
from secateur.search.results.winners import verify_winners, winner_folder
from secateur.search.run.folder import (
    AGENT,
    DEVICE,
    check_run_folder,
    create_run_folder,
    full_disk_is_an_error,
    held,
    load_manifest,
    write_manifest,
)
from secateur.search.run.journal import JOURNAL
from secateur.search.run.network import write_network
from secateur.search.run.progress import SearchProgress
from secateur.search.run.recorded_trials import recorded_trials
from secateur.search.run.replay import Recorded, check_added_budgets, check_evaluations, check_same_score, check_unchanged
from secateur.search.run.score_check import check_score
from secateur.search.run.sensitivities import read_sensitivities, write_sensitivities
from secateur.search.run.signals import ended_by_signals, first_signal_waits
from secateur.search.run.study import DAMAGED, StudyRecorder
from secateur.search.tracking.core import Tracker, Trackers
from secateur.search.training.finalize import training_config
from secateur.search.training.winners import train_winners


def search(
    config: SearchConfig, progress: SearchProgress | None = None, given: Given | None = None, trackers: Sequence[Tracker] = ()
) -> Path:
    """Run the search that `config` describes, and return its run folder (the engine of `secateur.search`).

    `given` are model and task as Python objects; None: the configuration names them. `trackers` follow it besides those that
    the configuration names.

    front.json is on disk from the start on and follows every change, and the study holds every evaluation as soon as it is
    done. After Ctrl-C, SIGTERM or an error both hold everything that was found, and `resume` continues from there. The first
    signal waits for the evaluations that run, the second one does not (search/run/signals.py).

    Raises:
        InputError: for anything in the configuration that cannot be used; nothing is written then.
    """
    check_run_folder(config.output)
    progress = progress or SearchProgress(Console(quiet=True))
    with ended_by_signals():
        problem = build_problem(config, progress.status, given)
        return _run(problem, None, None, None, progress, build_trackers(config, trackers, progress.note))


def resume(
    run: str | Path,
    overrides: Overrides = (),
    progress: SearchProgress | None = None,
    given: Given | None = None,
    trust: Collection[str] = (),
    trackers: Sequence[Tracker] = (),
) -> Path:
    """Go on with a run until its configuration's evaluations are done, as if it had never stopped (search/run/replay.py).

    Args:
        run: its folder.
        overrides: changes of the run's configuration, such as {"search.evaluations": 500}, or another budget.
        progress: follows it; default: in silence.
        given: the run's model and task as Python objects, if it began with such.
        trust: modules that the run's manifest may name.
        trackers: follow it besides those that the configuration names.
    Raises:
        InputError: if the folder is no run, another process searches in it, or the configuration differs; nothing is written.
    """
    run, progress = Path(run), progress or SearchProgress(Console(quiet=True))
    before, manifest = load_manifest(run)
    config, _ = load_own_manifest(run, overrides, given, trust)
    check_unchanged(before, config)
    check_added_budgets(before, config)
    with ended_by_signals(), held(run):
        trials, damaged = recorded_trials(run)
        check_evaluations(run, len(trials), config)
        problem = build_problem(config, progress.status, given)
        check_same_score(run, manifest, problem)
        if damaged:
            progress.note(f"{JOURNAL} was damaged: {len(trials)} evaluations are sound; {DAMAGED} is the file as it was")
        following = build_trackers(config, trackers, progress.note)
        return _run(problem, run, Recorded(trials, problem, bool(damaged)), recorded_check(manifest), progress, following)


def _run(
    problem: Problem,
    run: Path | None,
    recorded: Recorded | None,
    check: ScoreCheck | None,
    progress: SearchProgress,
    trackers: Trackers,
) -> Path:
    """Search in a new folder, or in that of a resumed run; `check` is what the run has found about its score."""
    config = problem.config
    where = "" if problem.torch_device == CPU else f" on {describe_device(problem.torch_device)}"
    progress.note(f"evaluations in {problem.precision.dtype}{where}: {problem.precision.reason}")
    if run is not None:
        problem = _with_measured(problem, run)
    problem = prepare(problem, config.search.agent, config.search.options, progress.status)
    agent = build_agent(problem, config.search.agent, config.search.options, config.search.seed)
    check = _checked_score(problem, check, progress)
    progress.status("starting the workers")
    with ExitStack() as stack:
        runner = stack.enter_context(closing(open_runner(problem, recorded.evaluated if recorded else ())))
        # Nothing is written before everything that can be refused has been built.
        if run is None:
            run = create_run_folder(config.output)
            stack.enter_context(held(run))
        stack.enter_context(full_disk_is_an_error(run))
        write_sensitivities(run, problem.space)
        write_manifest(run, config, _facts(problem, check))
        done = len(recorded.trials) if recorded is not None else 0
        stack.enter_context(trackers.following(search_start(problem, run, done)))
        front = _evaluate(problem, agent, runner, run, recorded, progress, trackers)
        runner.close()
        _finish(problem, front, run, progress, trackers)
    progress.stop()
    return run


def _with_measured(problem: Problem, run: Path) -> Problem:
    """Return the problem with the sensitivities that the run has measured: another machine may round them differently."""
    measured = read_sensitivities(run, problem.space.policy_space)
    return problem if measured is None else replace(problem, space=problem.space.with_sensitivities(measured))


def _checked_score(problem: Problem, before: ScoreCheck | None, progress: SearchProgress) -> ScoreCheck | None:
    """Return the check of the search's score, measured unless it is not wanted or was measured `before`."""
    wanted = problem.config.search.check_score
    if not wanted or before is not None:
        return before
    check = check_score(problem, progress.status)
    for line in score_lines(check, problem.config):
        progress.note(line)
    return check


def _evaluate(
    problem: Problem,
    agent: Agent,
    runner: Runner,
    run: Path,
    recorded: Recorded | None,
    progress: SearchProgress,
    trackers: Trackers,
) -> Front:
    """Search; a resumed run keeps its front and its agent until there is a new evaluation."""
    config, describe = problem.config, problem.space.policy_space.policy_to_choices
    write_network(run, problem.assembler.graph)
    if problem.device is not None:
        write_device(problem.device, run / DEVICE)
    front, recorder = build_front(problem), _recorder(problem, run, recorded)
    for episode in recorded.episodes if recorded else ():
        front.add(episode)
    before = front.evaluations
    if recorded is None or recorded.damaged:
        write_front(run, front.document(describe))
    if recorded is not None and before < config.search.evaluations:
        progress.note(f"replaying {before} recorded evaluations")

    noted: set[str] = set()

    def on_episode(actor: Actor, episode: Episode) -> None:
        if recorded is not None and recorded.take(episode):
            return
        recorder.record(front.evaluations, config.search.agent, episode)
        trackers.on_evaluation(front.evaluations, episode)
        if front.add(episode):
            write_front(run, front.document(describe))
            trackers.on_front_change(front)
        if episode.evaluation is not None and (text := episode.evaluation.note) and text not in noted:
            noted.add(text)
            progress.note(text)
        progress.on_episode()

    out_of_time, total = _clock(config.search.time_limit), config.search.evaluations
    lost = isinstance(agent, Saving) and not isdir(run / AGENT)  # the process was killed before: everything is replayed

    def enough() -> bool:
        # With several workers the order of the budgets may differ in a replay, so recorded episodes count, not replayed ones.
        return (front.evaluations >= total and not lost) or out_of_time()

    progress.on_start(run, front, total, config.search.time_limit)
    try:
        with first_signal_waits() as asked_to_end:
            run_loop(agent, runner, total, on_episode, lambda: enough() or asked_to_end())
        new = lost or front.evaluations > before
    except BaseException:
        new = front.evaluations > before
        raise
    finally:
        if recorded is None or new:
            write_front(run, front.document(describe))
            if isinstance(agent, Saving):
                _save(agent, run / AGENT)
    return front


def _save(agent: Saving, folder: Path) -> None:
    """Write the agent, in place of an earlier one."""
    draft, old = (folder.with_name(f"{folder.name}.{what}") for what in ("draft", "old"))
    for left in (draft, old):
        shutil.rmtree(left, ignore_errors=True)
    agent.save(draft)
    if exists(folder):
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _finish(problem: Problem, front: Front, run: Path, progress: SearchProgress, trackers: Trackers) -> None:
    """Score the best policies on the test images, and check the winners."""
    config, describe = problem.config, problem.space.policy_space.policy_to_choices
    progress.status("scoring the best policies on the test images")
    finalists, dense_final = finalize(problem, front, config.finalize.top), dense_test_score(problem)
    write_front(run, front.document(describe, finalists, dense_final))
    if config.finalize.verify:
        for budget in problem.budgets:  # winners of this run before it went on
            shutil.rmtree(winner_folder(run, budget), ignore_errors=True)
        outcomes = verify_winners(problem, front, finalists, run, progress.status)
        finalists = [finalist for outcome in outcomes for finalist in outcome.finalists]
        write_front(run, front.document(describe, finalists, dense_final, outcomes))
    for finalist in finalists:
        trackers.on_finalist(finalist)
    if config.finalize.training is not None and config.finalize.training["epochs"]:
        budgets = [budget.name for budget in problem.budgets]
        recipe, status, note = training_config(config), progress.status, progress.note
        train_winners(problem, read_front(run), run, recipe, budgets, status=status, note=note, on_epoch=trackers.on_epoch)


def _facts(problem: Problem, check: ScoreCheck | None) -> dict:
    """Return the facts in the manifest besides the configuration and the versions."""
    return {
        **({} if check is None else {"score_check": check.record()}),
        "data": problem.task.source,
        "metric": asdict(problem.task.metric),
        "score": {"metric": asdict(problem.score.metric), "split": problem.score.split, "dense": problem.score.dense},
        "precision": asdict(problem.precision),
        "dense": {name: getattr(problem.dense, name) for name in ("score", "images", "costs")},
        "budgets": [asdict(budget) for budget in problem.budgets],
    }


def _recorder(problem: Problem, run: Path, recorded: Recorded | None) -> StudyRecorder:
    attributes = {"agent": problem.config.search.agent, "seed": problem.config.search.seed, "data": problem.task.source}
    space, metric = problem.space, problem.score.metric
    sound = recorded.trials if recorded is not None and recorded.damaged else None
    return StudyRecorder(run, space.policy_space, space.objectives, metric, problem.search_budgets, attributes, sound)


def _clock(limit: float | None) -> Callable[[], bool]:
    """Return a function that tells whether `limit` seconds have passed since now; never, without a limit."""
    start = time.monotonic()
    return lambda: limit is not None and time.monotonic() - start > limit
