"""Runs episodes in this process, one at a time: the reference that the other runner must agree with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Actor, Episode
from secateur.envs.rollout import rollout


class LocalRunner:
    """A `Runner` (search/loop.py) without any other process.

    Args:
        make_env: returns the environment; called once.
        threads: torch threads while an episode runs; as many as a worker of the other runner has, because sums over
            images may differ in the last bit with their number.
    """

    slots = 1

    def __init__(self, make_env: Callable[[], CompressionEnv], threads: int = 1):
        self._env = make_env()
        self._threads = threads
        self._queue: deque[Actor] = deque()

    def submit(self, actor: Actor) -> None:
        """Note the actor; its episode runs in `wait`."""
        self._queue.append(actor)

    def wait(self) -> list[tuple[Actor, Episode]]:
        """Run the next episode and return it."""
        actor = self._queue.popleft()
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return [(actor, rollout(self._env, actor))]
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """Nothing to free."""
