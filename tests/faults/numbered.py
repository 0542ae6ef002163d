"""Evaluations that cost nothing: the one choice of a policy is a number, which is its score."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import numpy as np

from secateur.envs.core import CompressionPolicy, Evaluation


class Evaluator:
    """What a worker knows."""

    def remember(self, evaluated):
        pass


class Env:
    """One choice, which is its score."""

    space = SimpleNamespace(num_steps=1)
    seconds = 0.02
    """Duration of an evaluation."""

    def __init__(self):
        self.evaluator, self.policy = Evaluator(), None

    def reset(self, options):
        return np.zeros(1), {}

    def step(self, action):
        time.sleep(self.seconds)
        self.policy = CompressionPolicy((int(action[0]),), (), ())
        info = {"action": action, "policy": self.policy, "evaluation": self.evaluation(float(action[0])), "constraints": {}}
        return np.zeros(1), np.zeros(2), True, False, info

    def evaluation(self, score):
        """Return the evaluation with this score."""
        return Evaluation(score, {"macs": 0.5})


class Fixed:
    """Hands out actors, and hears of their episodes."""

    def __init__(self, actors):
        self.waiting, self.told = list(actors), []

    def ask(self, count):
        chosen, self.waiting = self.waiting[:count], self.waiting[count:]
        return chosen

    def tell(self, results):
        self.told += [actor.number for actor, _ in results]


def send_with_code(module):
    """Let Ray send objects of this module and of a test module with their code: workers cannot import tests."""
    import ray

    for name in (__name__, module):
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
