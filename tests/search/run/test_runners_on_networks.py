"""The runners agree on real networks, not only on toys: same policies, same costs, same scores."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np

from secateur.agents.core import SequenceActor
from secateur.envs.evaluator import Precision
from secateur.search.build import build_problem, make_env
from secateur.search.config import parse_config
from secateur.search.run.local_runner import LocalRunner
from secateur.search.run.ray_runner import RayRunner

VALUES = {
    "model": {"factory": "secateur.envs.tasks.synthetic:synthetic_net", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "secateur.envs.tasks.synthetic:load", "train": "rest", "calibration": 64, "validation": 200},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8], "activation_bits": [8]},
    "budgets": {"small": {"macs": "<= 50%"}},
}


def run(runner, actors):
    """Return the episodes in the order of the actors."""
    found, waiting = {}, list(actors)
    while len(found) < len(actors):
        while waiting and len(actors) - len(waiting) - len(found) < runner.slots:
            runner.submit(waiting.pop(0))
        found |= {actor.ticket: episode for actor, episode in runner.wait()}
    return [found[ticket] for ticket in sorted(found)]


def described_env(problem, file):
    """Return an environment of the problem, and write down how this process holds the calibration."""
    layers = problem.assembler.calibration.layers.values()
    arrays = [array for layer in layers for array in (layer.moments, layer.samples)]
    owners = [array.flags.owndata or array.base is None for array in arrays]
    file.write_text(json.dumps({"writable": sum(array.flags.writeable for array in arrays), "copied": sum(owners)}))
    return make_env(problem)


def test_workers_share_the_calibration(tmp_path):
    problem = build_problem(parse_config(VALUES, "test.yaml"))
    assert len(problem.assembler.calibration.layers) == 5
    runner = RayRunner(partial(described_env, problem, tmp_path / "worker.json"), 1)
    runner.close()
    assert json.loads((tmp_path / "worker.json").read_text()) == {"writable": 0, "copied": 0}


def test_local_and_ray_runners_score_networks_alike():
    problem = replace(build_problem(parse_config(VALUES, "test.yaml")), precision=Precision("float32", "test"))
    rng, space = np.random.default_rng(0), problem.space
    sequences = [space.scale_to_budget(rng.uniform(size=space.used.shape), problem.budgets[0]) for _ in range(6)]
    actors = [SequenceActor(problem.budgets[0], sequence, ticket) for ticket, sequence in enumerate(sequences)]
    local = run(LocalRunner(partial(make_env, problem)), actors)
    runner = RayRunner(partial(make_env, problem), 2)
    try:
        distributed = run(runner, actors)
    finally:
        runner.close()
    assert len({episode.policy for episode in local}) == 6 and all(episode.failure is None for episode in local)
    for mine, theirs in zip(local, distributed, strict=True):
        assert mine.policy == theirs.policy and mine.evaluation.costs == theirs.evaluation.costs
        assert mine.evaluation.top1 == theirs.evaluation.top1
        assert np.array_equal(mine.observations, theirs.observations)
