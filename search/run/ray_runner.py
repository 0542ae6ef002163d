"""Runs episodes on a pool of long-lived Ray actors, on this machine or on a cluster.

Why not a Ray Tune trial per evaluation: a trial costs 40 to 1,400 ms, a call to an actor 1 ms. Why we retry ourselves:
with `max_task_retries` a candidate that crashes its worker every time is retried until the actor is dead for good. Why
we replace lost workers and do not let Ray restart them: a call to a restarting actor fails, a call to a new one waits.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Actor, CompressionPolicy, Episode, InputError
from secateur.envs.rollout import rollout
from secateur.search.problem import Evaluated
from secateur.search.run.evaluation_timeout import EvaluationTimeout
from secateur.search.run.ray_cluster import LOCAL, RayConnection, available_cores, first_line, last_line
from secateur.search.run.signals import undisturbed

log = logging.getLogger(__name__)

AUTO = "auto"
START_SECONDS = 900
"""How long workers may take to get their cores and build their environments."""

MAX_LOSSES = 2
"""A candidate that has cost this many workers is a failure; the first loss may have been somebody else's fault."""

MAX_FAILED_STARTS = 5
"""The search ends with an error when this many new workers in a row could not start."""


class _Worker:
    """Keeps one environment warm; lives in a process of its own."""

    def __init__(self, make_env: Callable[[], CompressionEnv], threads: int):
        torch.set_num_threads(threads)
        self._env = make_env()

    def ready(self) -> None:
        """Return once the environment is built."""

    def run(self, actor: Actor, evaluated: Evaluated) -> Episode:
        """Return the actor's episode; `evaluated` is what all workers have evaluated since this one last heard."""
        self._env.evaluator.remember(evaluated)
        return rollout(self._env, actor)


@dataclass
class _Task:
    """An episode, from `submit` until its end.

    Attributes:
        losses: how many workers it has cost.
        worker: index of the worker that runs it.
        started: when it began there, in seconds of the monotonic clock.
    """

    actor: Actor
    losses: int = 0
    worker: int = -1
    started: float = 0.0


class RayRunner:
    """A `Runner` (search/loop.py) over Ray actors.

    A lost worker (it crashed, hung, ran out of memory, or its machine went away) is replaced, and its episode is tried once
    more; the second loss makes the episode a failure. All workers share their evaluations and failures, so no policy is tried
    again. An episode whose worker was lost waits for any worker: if a machine is gone for good, the search goes on with those
    that are left.

    Args:
        make_env: returns a worker's environment; sent once to Ray's object store, so it may hold the whole problem.
        workers: how many; "auto": as many as there are cores, and GPUs if the workers ask for them.
        address: of a running cluster; "local": start one for this runner, and end it in `close`. A connection that this
            process already has is used and left open.
        timeout: of one evaluation.
        choose: returns the policy that an actor chooses, so that a policy which cost two workers has a name; None: unknown.
        threads: torch threads, and cores, per worker.
        gpus: GPUs per worker, or a share of one; None: one if the cluster has any.
    Raises:
        InputError: if there is no cluster at `address`, it has too few cores or GPUs, or its workers cannot start.
    """

    def __init__(
        self,
        make_env: Callable[[], CompressionEnv],
        workers: int | str,
        address: str = LOCAL,
        timeout: EvaluationTimeout | None = None,
        choose: Callable[[Actor], CompressionPolicy | None] = lambda actor: None,
        threads: int = 1,
        gpus: float | None = 0.0,
    ):
        self._timeout, self._choose, self._threads = timeout or EvaluationTimeout(), choose, threads
        self._workers: list[Any] = []
        cores = available_cores() if isinstance(workers, str) else workers * threads
        self._connection = RayConnection(address, num_cpus=cores)
        self._ray: Any = self._connection.ray
        try:
            all_gpus = self._ray.cluster_resources().get("GPU", 0.0)
            self._gpus = min(all_gpus, 1.0) if gpus is None else gpus
            self.slots = self._count(workers, all_gpus)
            # Kept: Ray forgets what only the constructor calls of its actors refer to, and replacements need it too.
            self._make_env = self._ray.put(make_env)
            self._workers = [self._new_worker() for _ in range(self.slots)]
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        self._waiting: deque[_Task] = deque()
        self._idle = list(range(self.slots))
        self._out: dict[Any, _Task] = {}
        self._starting: dict[Any, int] = {}  # {reference that is ready when the worker is: the worker}
        self._failed_starts = 0
        self._last_sign = time.monotonic()  # of any worker
        # All evaluations so far, in order, and how many of them each worker has received.
        self._evaluated: list[tuple[CompressionPolicy, Any]] = []
        self._seen: set[CompressionPolicy] = set()
        self._received = [0] * self.slots

    # ------------------------------------------------------------------------------------------------------------ workers

    def _count(self, workers: int | str, all_gpus: float) -> int:
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        if isinstance(workers, str):  # AUTO
            fitting = cores // self._threads
            return max(min(fitting, int(all_gpus / self._gpus + 1e-6)) if self._gpus else fitting, 1)
        if workers * self._threads > cores:
            raise InputError(
                f"`search.workers: {workers}` needs {workers * self._threads} cores, but the Ray cluster has {cores}. "
                "Lower it, or write `auto`."
            )
        if workers * self._gpus > all_gpus + 1e-6:
            raise InputError(
                f"`search.workers: {workers}` with {self._gpus:g} GPUs each needs {workers * self._gpus:g} GPUs, but the Ray "
                f"cluster has {all_gpus:g}. Lower `search.workers` or `search.gpus_per_worker`, or set `compute.device: cpu`."
            )
        return workers

    def _new_worker(self) -> Any:
        options = {"num_cpus": self._threads, "num_gpus": self._gpus, "max_restarts": 0, "max_task_retries": 0}
        return self._ray.remote(_Worker).options(**options).remote(self._make_env, self._threads)

    def _wait_until_ready(self) -> None:
        try:
            self._ray.get([worker.ready.remote() for worker in self._workers], timeout=START_SECONDS)
        except self._ray.exceptions.GetTimeoutError:
            raise InputError(
                f"Ray did not start {self.slots} workers within {START_SECONDS // 60} minutes: the cluster's cores are "
                "probably taken. Lower `search.workers`, or try again later."
            ) from None
        except self._ray.exceptions.RayActorError as error:
            raise _cannot_start(error) from None

    def _replace(self, worker: int) -> None:
        """End a worker that is lost, and start another one in its place."""
        self._ray.kill(self._workers[worker])  # one that hangs, or is only out of reach, must not come back
        self._workers[worker] = self._new_worker()
        self._received[worker] = 0
        self._starting[self._workers[worker].ready.remote()] = worker

    def _begin(self, reference: Any) -> None:
        """Take a new worker into the pool; start another one if it could not start."""
        worker = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            log.warning("a worker could not start: %s", first_line(error))
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise _cannot_start(error) from None
            self._replace(worker)
            return
        self._failed_starts = 0
        self._idle.append(worker)

    # ----------------------------------------------------------------------------------------------------------- episodes

    def submit(self, actor: Actor) -> None:
        """Start an episode as soon as a worker is idle."""
        self._waiting.append(_Task(actor))
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            task = self._waiting.popleft()
            task.worker, task.started = self._idle.pop(), time.monotonic()
            news = self._evaluated[self._received[task.worker] :]
            self._received[task.worker] = len(self._evaluated)
            self._out[self._workers[task.worker].run.remote(task.actor, news)] = task

    def wait(self) -> list[tuple[Actor, Episode]]:
        """Block until at least one episode is finished; return all that are.

        Raises:
            InputError: if all workers are lost and no new one can start.
        """
        finished: list[tuple[Actor, Episode]] = []
        while not finished:
            for reference in self._ready():
                if reference in self._starting:
                    self._begin(reference)
                else:
                    finished += self._collect(reference)
            for reference, task in list(self._out.items()):
                if time.monotonic() - task.started > self._timeout.seconds:
                    del self._out[reference]
                    finished += self._lose(task, f"the evaluation took longer than {self._timeout.seconds:g} s")
            self._dispatch()
        return finished

    def _ready(self) -> list[Any]:
        """Block until something happens or an evaluation's time is up; return what has happened."""
        references = [*self._out, *self._starting]
        now = time.monotonic()
        limits = [task.started + self._timeout.seconds - now for task in self._out.values()]
        patience = min(limits) if limits else self._last_sign + START_SECONDS - now
        self._ray.wait(references, num_returns=1, timeout=max(patience, 0.0) + 0.01)
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        now = time.monotonic()
        if ready or limits:
            self._last_sign = now
        elif now - self._last_sign > START_SECONDS:
            raise InputError(
                f"All workers are lost, and no new one has started within {START_SECONDS // 60} minutes. What was found is kept: "
                "resume the run when the cluster is back."
            )
        return list(ready)

    def _collect(self, reference: Any) -> list[tuple[Actor, Episode]]:
        """Return the finished episode, or nothing if its worker was lost and it is tried again."""
        errors, task = self._ray.exceptions, self._out.pop(reference)
        try:
            episode = self._ray.get(reference)
        except (errors.RayActorError, errors.OutOfMemoryError, errors.ObjectLostError) as error:
            return self._lose(task, f"worker lost: {first_line(error)}")
        self._idle.append(task.worker)
        self._timeout.add(episode)
        self._share(episode)
        return [(task.actor, episode)]

    def _lose(self, task: _Task, reason: str) -> list[tuple[Actor, Episode]]:
        """Replace the worker of an episode; return the episode if it has failed, or nothing if it is tried again."""
        task.losses += 1
        log.warning("a worker was lost (loss %d of this candidate): %s", task.losses, reason)
        self._replace(task.worker)
        if task.losses < MAX_LOSSES:
            self._waiting.appendleft(task)
            return []
        episode = Episode(task.actor.budget.name, self._choose(task.actor), None, failure=f"{reason}, twice")
        self._share(episode)
        return [(task.actor, episode)]

    def _share(self, episode: Episode) -> None:
        """Note what all workers should know: the evaluation of the policy, or its failure."""
        if episode.policy is not None and episode.policy not in self._seen:
            self._seen.add(episode.policy)
            self._evaluated.append((episode.policy, episode.evaluation or episode.failure))

    def close(self) -> None:
        """End the workers; leave the cluster, and end it if it was started here."""
        with undisturbed():
            if self._ray.is_initialized():
                for worker in self._workers:
                    self._ray.kill(worker)
            self._workers = []
            self._connection.close()


def _cannot_start(error: Exception) -> InputError:
    """Return the error for workers whose constructor fails; the last line of Ray's text names the cause."""
    return InputError(
        f"The workers cannot start: {last_line(error)}. They must be able to import what this process imports, and to read the "
        "same files: install your modules on every machine of the cluster, or start the search in their folder."
    )
