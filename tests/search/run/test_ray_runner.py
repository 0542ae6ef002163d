"""The Ray runner against the local one: on an environment without any network, then on a network. One cluster for all tests.

The tests run in the order of this file: those of the toy environment need its two workers, those of the network need the cores,
and the last ones close the cluster.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from secateur.agents.core import SequenceActor
from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError, KnownFailure
from secateur.envs.evaluator import Precision
from secateur.search.build import build_problem, make_env
from secateur.search.config import parse_config
from secateur.search.run.evaluation_timeout import EvaluationTimeout
from secateur.search.run.local_runner import LocalRunner
from secateur.search.run.ray_runner import RayRunner

BUDGET = Budget("phone", {"macs": 1.0})
STEPS = 3


class ToyEvaluator:
    """What a worker knows: evaluations and failures."""

    def __init__(self):
        self.cache, self.failures = {}, {}

    def remember(self, evaluated):
        for policy, found in evaluated:
            (self.failures if isinstance(found, str) else self.cache)[policy] = found


class ToyEnv:
    """Three choices among ten; the score is their sum. Two choices of 10 break things in the ways that candidates do."""

    space = SimpleNamespace(num_steps=STEPS)

    def __init__(self, evaluator_delay: float = 0.0):
        self.evaluator = ToyEvaluator()
        self.evaluated = 0
        self._delay = evaluator_delay

    def reset(self, options):
        self.chosen, self.policy = [], None
        return np.zeros(1, np.float32), {}

    def step(self, action):
        choice = round(float(action[0]) * 10)
        self.chosen.append(choice)
        done = len(self.chosen) == STEPS
        info = {"action": np.array([choice / 10], np.float32)}
        reward = np.zeros(2, np.float32)
        if done:
            self.policy = CompressionPolicy(tuple(self.chosen), (), ())
            evaluation = self._evaluate()
            reward = np.array([evaluation.score, -evaluation.costs["macs"]], np.float32)
            info |= {"policy": self.policy, "evaluation": evaluation, "constraints": {"macs": -0.5}}
        return np.full(1, choice / 10, np.float32), reward, done, False, info

    def _evaluate(self):
        if self.policy in self.evaluator.failures:
            raise KnownFailure(self.evaluator.failures[self.policy])
        if self.chosen == [10, 10, 10]:
            os._exit(1)
        if self.chosen == [10, 10, 8]:
            time.sleep(1000)
        if self.chosen == [10, 10, 7]:
            ctypes.PyDLL(None).sleep(1000)  # it holds Python's lock: no other thread of the process can run
        if self.chosen == [10, 10, 0]:
            raise RuntimeError("the forward failed")
        if self.policy not in self.evaluator.cache:
            self.evaluated += 1
            time.sleep(self._delay)
            score = sum(self.chosen) / 30
            # `images` counts what this worker has evaluated itself, `seconds` names it.
            self.evaluator.cache[self.policy] = Evaluation(
                score, {"macs": 1 - score}, images=self.evaluated, seconds=float(os.getpid())
            )
        return self.evaluator.cache[self.policy]


@dataclass(frozen=True)
class Replay:
    """Plays a fixed sequence of choices."""

    choices: tuple[int, ...]
    budget: Budget = BUDGET

    def act(self, observation, step):
        return np.array([self.choices[step] / 10])


def chosen(actor):
    """Return the toy policy of an actor."""
    return CompressionPolicy(actor.choices, (), ())


def run_all(runner, actors):
    """Return {choices: episode}; keeps every slot busy and checks that the very actors come back."""
    waiting, out, episodes = list(actors), [], {}
    while waiting or out:
        while waiting and len(out) < runner.slots:
            out.append(waiting.pop(0))
            runner.submit(out[-1])
        for actor, episode in runner.wait():
            assert any(actor is sent for sent in out)
            out = [sent for sent in out if sent is not actor]
            episodes[actor.choices] = episode
    return episodes


@pytest.fixture(scope="module")
def runner():
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    runner = RayRunner(partial(ToyEnv, 0.01), workers=2, timeout=EvaluationTimeout(1.0), choose=chosen)
    yield runner
    runner.close()


def test_local_and_ray_runners_return_the_same_episodes(runner):
    actors = [Replay((a, b, 3)) for a in range(4) for b in range(3)] + [Replay((10, 10, 0))]
    local = run_all(LocalRunner(ToyEnv), actors)
    remote = run_all(runner, actors)
    assert len(local) == len(actors) and set(local) == set(remote)
    for choices, episode in local.items():
        other = remote[choices]
        assert (other.budget, other.policy, other.constraints) == (episode.budget, episode.policy, episode.constraints)
        assert other.failure == episode.failure
        if episode.failure is None:
            assert other.evaluation.score == episode.evaluation.score and other.evaluation.costs == episode.evaluation.costs
            np.testing.assert_array_equal(other.actions, episode.actions)
            np.testing.assert_array_equal(other.observations, episode.observations)
            np.testing.assert_array_equal(other.reward, episode.reward)
    assert "the forward failed" in local[(10, 10, 0)].failure


def test_both_workers_work_and_neither_repeats_what_the_other_has_evaluated(runner):
    policies = [(a, 7, 7) for a in range(8)]
    first = run_all(runner, [Replay(choices) for choices in policies])
    assert len({episode.evaluation.seconds for episode in first.values()}) == 2
    again = run_all(runner, [Replay(choices) for choices in policies * 2])
    assert {choices: episode.evaluation for choices, episode in again.items()} == {
        choices: episode.evaluation for choices, episode in first.items()
    }


def test_a_candidate_that_kills_its_worker_twice_fails_and_the_search_goes_on(runner):
    before = run_all(runner, [Replay((5, 5, 5))])
    episodes = run_all(runner, [Replay((10, 10, 10)), *(Replay((a, 8, 8)) for a in range(6)), Replay((5, 5, 5))])
    failed = episodes[(10, 10, 10)]
    assert failed.failure.startswith("worker lost: ") and failed.failure.endswith(", twice")
    assert not failed.feasible and failed.policy == chosen(Replay((10, 10, 10)))
    assert all(episodes[(a, 8, 8)].failure is None for a in range(6))
    assert episodes[(5, 5, 5)].evaluation == before[(5, 5, 5)].evaluation
    # The new worker is sent all earlier evaluations.
    after = run_all(runner, [Replay((5, 5, 5)), Replay((5, 5, 5)), Replay((4, 8, 8)), Replay((4, 8, 8))])
    assert after[(5, 5, 5)].evaluation == before[(5, 5, 5)].evaluation


@pytest.mark.parametrize("choices", [(10, 10, 8), (10, 10, 7)], ids=["asleep", "holding Python's lock"])
def test_a_hanging_evaluation_is_ended_and_fails_after_the_second_time(runner, choices):
    episodes = run_all(runner, [Replay(choices), *(Replay((a, 6, 8)) for a in range(4))])
    assert episodes[choices].failure == "the evaluation took longer than 1 s, twice"
    assert episodes[choices].policy == chosen(Replay(choices))
    assert all(episodes[(a, 6, 8)].failure is None for a in range(4))


def test_a_policy_that_failed_is_never_tried_again(runner):
    workers = list(runner._workers)
    for choices in ((10, 10, 10), (10, 10, 8)):
        for _ in range(2):  # by both workers
            again = run_all(runner, [Replay(choices), Replay((1, 1, 1))])
            assert again[choices].failure.endswith("twice")
    assert runner._workers == workers, "no worker was lost"


def test_ray_asks_for_a_token_and_sends_no_statistics(runner):
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_local_cluster_is_open_to_nobody_else():
    """In a fresh process, because Ray decides at import where it listens."""
    program = """
import os, stat
from secateur.search.run.ray_runner import RayRunner
runner = RayRunner(dict, 1)
import psutil  # comes with Ray
processes = {one.pid for one in (psutil.Process(), *psutil.Process().children(recursive=True))}
listening = [one for one in psutil.net_connections("inet") if one.status == psutil.CONN_LISTEN and one.pid in processes]
print(len(listening), {one.laddr.ip for one in listening}, oct(stat.S_IMODE(os.stat(runner._connection.folder).st_mode)))
runner.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    count, *addresses, mode = done.stdout.split(" ")
    assert int(count) >= 4 and mode.strip() == "0o700"
    assert " ".join(addresses) in ("{'::ffff:127.0.0.1', '127.0.0.1'}", "{'127.0.0.1', '::ffff:127.0.0.1'}", "{'127.0.0.1'}")


def test_a_cluster_that_is_too_small_is_an_error_and_stays_as_it_was(runner):
    with pytest.raises(InputError, match="`search.workers: 64` needs 64 cores, but the Ray cluster has 2"):
        RayRunner(ToyEnv, workers=64)
    assert run_all(runner, [Replay((1, 2, 3))])[(1, 2, 3)].failure is None


# ----------------------------------------------------------------------------------------------------------- a network

VALUES = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": "rest", "calibration": 64, "validation": 200},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8], "activation_bits": [8]},
    "budgets": {"small": {"macs": "<= 50%"}},
}


def described_env(problem, file):
    """Return an environment of the problem, and write down how this process holds the calibration."""
    layers = problem.assembler.calibration.layers.values()
    arrays = [array for layer in layers for array in (layer.moments, layer.samples)]
    owners = [array.flags.owndata or array.base is None for array in arrays]
    writable = sum(array.flags.writeable for array in arrays)
    file.write_text(json.dumps({"arrays": len(arrays), "writable": writable, "copied": sum(owners)}))
    return make_env(problem)


def test_a_worker_shares_the_calibration_and_scores_networks_as_the_local_runner(runner, tmp_path):
    import ray

    for worker in runner._workers:
        ray.kill(worker)  # the network's worker needs their cores
    problem = replace(build_problem(parse_config(VALUES, "test.yaml")), precision=Precision("float32", "test"))
    rng, space = np.random.default_rng(0), problem.space
    sequences = [space.scale_to_budget(rng.uniform(size=space.used.shape), problem.budgets[0]) for _ in range(6)]
    actors = [SequenceActor(problem.budgets[0], sequence, ticket) for ticket, sequence in enumerate(sequences)]
    local = in_order(LocalRunner(partial(make_env, problem)), actors)
    remote_runner = RayRunner(partial(described_env, problem, tmp_path / "worker.json"), 1)
    remote = in_order(remote_runner, actors)
    remote_runner.close()
    assert ray.is_initialized(), "the cluster of the first runner stays"
    assert json.loads((tmp_path / "worker.json").read_text()) == {"arrays": 10, "writable": 0, "copied": 0}
    assert len({episode.policy for episode in local}) == 6 and all(episode.failure is None for episode in local)
    for mine, theirs in zip(local, remote, strict=True):
        assert mine.policy == theirs.policy and mine.evaluation.costs == theirs.evaluation.costs
        assert mine.evaluation.score == theirs.evaluation.score
        assert np.array_equal(mine.observations, theirs.observations)


def in_order(runner, actors):
    """Return the episodes in the order of the actors; one is out at a time."""
    episodes = []
    for actor in actors:
        runner.submit(actor)
        ((_, episode),) = runner.wait()
        episodes.append(episode)
    return episodes


# ------------------------------------------------------------------------------------------------------------- the end


def test_closing_removes_everything_that_the_runner_made(runner):
    import ray

    folder = runner._connection.folder
    assert glob.glob(f"{folder}/r/session_*")
    runner.close()
    assert not ray.is_initialized() and not os.path.exists(folder)


def test_an_address_without_a_cluster_is_an_error_before_ray_tries_it(runner, monkeypatch):
    import ray

    runner.close()
    assert not ray.is_initialized()
    monkeypatch.setattr(ray, "init", None)  # it would try for minutes
    with pytest.raises(InputError, match="`search.address: 127.0.0.1:1` cannot be joined"):
        RayRunner(ToyEnv, workers=1, address="127.0.0.1:1")
