"""Workers that die or hang in the middle of an evaluation: every evaluation is recorded once. One cluster for all tests."""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from secateur.envs.core import Budget, CompressionPolicy, Evaluation
from secateur.search.loop import run_loop
from secateur.search.run.evaluation_timeout import EvaluationTimeout
from secateur.search.run.ray_runner import RayRunner
from tests.faults.numbered import Env, Fixed, send_with_code

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

BUDGET = Budget("phone", {"macs": 1.0})
MOMENTS = (0, 3, 5, 8, 11)
"""The evaluations that a fault ends, of twelve."""


class Located(Env):
    """`seconds` of an evaluation names the process that has made it."""

    def evaluation(self, score):
        return Evaluation(score, {"macs": 0.5}, seconds=float(os.getpid()))


FAULTS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),  # by the kernel when the memory is full, or by anybody
    "crash": lambda: ctypes.string_at(0),
    "hang": lambda: ctypes.PyDLL(None).sleep(1000),
    "memory": lambda: bytearray(2**60),
}


@dataclass(frozen=True)
class Faulty:
    """An actor whose first attempts end in a fault."""

    number: int
    folder: Path
    fault: str | None = None
    times: int = 1
    budget: Budget = BUDGET

    def act(self, observation, step):
        attempt = len(list(self.folder.glob(f"{self.number}-*")))
        if self.fault is not None and attempt < self.times:
            (self.folder / f"{self.number}-{attempt}").touch()
            FAULTS[self.fault]()
        return np.array([self.number])


def policy_of(actor):
    return CompressionPolicy((actor.number,), (), ())


@pytest.fixture(scope="module")
def runner():
    send_with_code(__name__)
    runner = RayRunner(
        Located, 2, timeout=EvaluationTimeout(1.0), choose=lambda actor: CompressionPolicy((actor.number,), (), ())
    )
    yield runner
    runner.close()


def searched(runner, actors, on_episode=lambda episodes: None):
    """Return {number: episode} of a search; check that each was recorded and told exactly once."""
    agent, episodes = Fixed(actors), []

    def record(actor, episode):
        episodes.append((actor.number, episode))
        on_episode([episode for _, episode in episodes])

    run_loop(agent, runner, len(actors), record)
    assert sorted(number for number, _ in episodes) == sorted(agent.told) == sorted(actor.number for actor in actors)
    return dict(episodes)


@pytest.mark.parametrize("fault", ["killed", "hang"])
def test_evaluations_whose_worker_is_lost_are_made_again(runner, tmp_path, fault):
    actors = [Faulty(number, tmp_path, fault if number in MOMENTS else None) for number in range(12)]
    episodes = searched(runner, actors)
    assert [episodes[number].evaluation.score for number in range(12)] == list(range(12))
    assert len(list(tmp_path.iterdir())) == len(MOMENTS)


def test_all_workers_are_killed_again_and_again(runner, tmp_path):
    def kill(episodes):
        if len(episodes) in (2, 6, 10):
            for process in {int(episode.evaluation.seconds) for episode in episodes[-4:]}:
                if Path(f"/proc/{process}").exists():
                    os.kill(process, signal.SIGKILL)

    episodes = searched(runner, [Faulty(number, tmp_path) for number in range(14)], kill)
    assert [episodes[number].evaluation.score for number in range(14)] == list(range(14))


def test_a_policy_that_always_costs_its_worker_fails_alone(runner, tmp_path):
    actors = [Faulty(number, tmp_path, "crash" if number == 1 else None, 99) for number in range(4)]
    episodes = searched(runner, actors)
    assert episodes.pop(1).failure.endswith(", twice") and len(list(tmp_path.iterdir())) == 2
    assert [episode.failure for episode in episodes.values()] == [None] * 3


def test_a_worker_without_memory_fails_one_evaluation_and_lives_on(runner, tmp_path):
    workers = list(runner._workers)
    episodes = searched(runner, [Faulty(number, tmp_path, "memory" if number in (1, 2) else None) for number in range(5)])
    assert [number for number, episode in sorted(episodes.items()) if episode.failure] == [1, 2]
    assert episodes[1].failure.startswith("MemoryError") and runner._workers == workers
