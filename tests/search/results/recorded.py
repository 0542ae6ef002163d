"""Recorded runs without a search: episodes of a space with two choices, and the folder that a run would hold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from secateur.envs.core import Budget, CompressionPolicy, Episode, Evaluation
from secateur.envs.metric import TOP1
from secateur.envs.policy_space import Decision
from secateur.envs.rewards import constraints
from secateur.search.results.document import write_front
from secateur.search.results.front import Front
from secateur.search.run.study import StudyRecorder

DENSE = Evaluation(0.9, {"macs": 100.0, "weight_bytes": 400.0}, images=500)
PHONE = Budget("phone", {"macs": 50.0})
WATCH = Budget("watch", {"macs": 80.0, "weight_bytes": 200.0}, metric_drop=0.1)
OBJECTIVES = ("top1", "macs", "weight_bytes")
WIDTHS, BITS = tuple(range(100, 0, -1)), (8, 4)
SPACE = SimpleNamespace(
    decisions=(
        Decision("prune_ratio/conv", "prune_ratio", 0, WIDTHS, tuple(1 - w / 100 for w in WIDTHS), np.linspace(0, 1, 100)),
        Decision("weight_bits/conv", "weight_bits", 0, BITS, BITS, np.array([0.0, 1.0])),
    ),
    policy_to_choices=lambda policy: {
        "prune_ratio/conv": 1 - policy.widths[0] / 100,
        "weight_bits/conv": policy.weight_bits[0],
    },
)


def episode(width, top1, macs, weight_bytes, budget=PHONE):
    evaluation = Evaluation(top1, {"macs": macs, "weight_bytes": weight_bytes}, images=500, seconds=0.1)
    policy = CompressionPolicy((width,), (8,), (32,))
    return Episode(budget.name, policy, evaluation, constraints(evaluation, budget, TOP1, DENSE.score), reward=np.zeros(3))


def random_episodes(count, seed):
    rng = np.random.default_rng(seed)
    return [
        episode(int(width), float(rng.random()), float(rng.uniform(20, 70)), float(rng.uniform(50, 400)))
        for width in rng.permutation(np.arange(1, 101))[:count]
    ]


def write_run(folder, episodes, dense=DENSE):
    """Write study and front of a run, as a search does."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder, front = (
        StudyRecorder(folder, SPACE, OBJECTIVES, TOP1, (PHONE, WATCH)),
        Front(OBJECTIVES, (PHONE, WATCH), dense, TOP1),
    )
    for number, item in enumerate(episodes):
        recorder.record(number, "random", item)
        front.add(item)
    write_front(folder, front.document(SPACE.policy_to_choices))
    return folder
