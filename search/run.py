"""The main job: build the problem, search, and leave a run folder that is worth reading at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from agents.core import Agent
from envs.core import Actor, Episode
from search.build import Problem, build_agent, build_front, build_problem, open_runner
from search.config import SearchConfig
from search.finalize import dense_test_score, finalize
from search.front import Front, write_front
from search.loop import Runner, run_loop
from search.progress import SearchProgress
from search.run_folder import AGENT, check_run_folder, create_run_folder, write_manifest
from search.study import StudyRecorder
from search.winners import verify_winners


def search(config: SearchConfig, progress: SearchProgress | None = None) -> Path:
    """Run the search that `config` describes, and return its run folder; `progress` follows it, default: in silence.

    front.json is on disk from the start on and follows every change, and the study holds every evaluation as soon as it is
    done. Whatever ends the search early (Ctrl-C, an error) leaves both with all that was found.

    Raises:
        InputError: for anything in the configuration that cannot be used; nothing is written then.
    """
    check_run_folder(config.output)
    progress = progress or SearchProgress(Console(quiet=True))
    problem = build_problem(config, progress.say)
    progress.note(f"evaluations in {problem.precision.dtype}: {problem.precision.reason}")
    agent = build_agent(problem, config.search.agent, config.search.options, config.search.seed)
    progress.say("starting the workers")
    runner = open_runner(problem)
    try:
        run, front = _evaluate(problem, agent, runner, progress)
    finally:
        runner.close()
    progress.say("scoring the best policies on the test images")
    finalists, dense_final = finalize(problem, front, config.finalize.top), dense_test_score(problem)
    write_front(run, front.document(problem.space.space.describe, finalists, dense_final))
    if config.finalize.verify:
        outcomes = verify_winners(problem, front, finalists, run, progress.say)
        finalists = [finalist for outcome in outcomes for finalist in outcome.finalists]
        write_front(run, front.document(problem.space.space.describe, finalists, dense_final, outcomes))
    progress.stop()
    return run


def _evaluate(problem: Problem, agent: Agent, runner: Runner, progress: SearchProgress) -> tuple[Path, Front]:
    """Make the run folder, and search: nothing is written before everything that can be refused has been built."""
    config = problem.config
    run = create_run_folder(config.output)
    write_manifest(run, config, _facts(problem))
    front = build_front(problem)
    write_front(run, front.document(problem.space.space.describe))
    on_episode = _follow(problem, run, front, _recorder(problem, run), progress)
    progress.on_start(run, front, config.search.evaluations, config.search.time_limit)
    try:
        run_loop(agent, runner, config.search.evaluations, on_episode, _clock(config.search.time_limit))
    finally:
        write_front(run, front.document(problem.space.space.describe))
        if hasattr(agent, "save"):
            agent.save(run / AGENT)
    return run, front


def _facts(problem: Problem) -> dict:
    """What the manifest says beyond the configuration and the versions."""
    return {
        "data": problem.data.source,
        "precision": asdict(problem.precision),
        "dense": {name: getattr(problem.dense, name) for name in ("top1", "images", "costs")},
        "budgets": [asdict(budget) for budget in problem.budgets],
    }


def _recorder(problem: Problem, run: Path) -> StudyRecorder:
    attributes = {"agent": problem.config.search.agent, "seed": problem.config.search.seed, "data": problem.data.source}
    return StudyRecorder(run, problem.space.space, problem.space.objectives, problem.budgets, attributes)


def _follow(
    problem: Problem, run: Path, front: Front, recorder: StudyRecorder, progress: SearchProgress
) -> Callable[[Actor, Episode], None]:
    """Return what happens to every finished episode: record, keep the front, show."""

    def on_episode(actor: Actor, episode: Episode) -> None:
        recorder.record(front.evaluations, problem.config.search.agent, episode)
        if front.add(episode):
            write_front(run, front.document(problem.space.space.describe))
        progress.on_episode()

    return on_episode


def _clock(limit: float | None) -> Callable[[], bool]:
    """Return a function that tells whether `limit` seconds have passed since now; never, without a limit."""
    start = time.monotonic()
    return lambda: limit is not None and time.monotonic() - start > limit
