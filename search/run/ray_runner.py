"""Runs episodes on a pool of long-lived Ray actors, on this machine or on a cluster.

Why not a Ray Tune trial per evaluation: a trial costs 40 to 1,400 ms, a call to an actor 1 ms. Why we retry ourselves:
with `max_task_retries` a candidate that crashes its worker every time is retried until the actor is dead for good. Why
we replace lost workers and do not let Ray restart them: a call to a restarting actor fails, a call to a new one waits.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Actor, CompressionPolicy, Episode, Evaluation, InputError
from secateur.envs.rollout import rollout

log = logging.getLogger(__name__)

LOCAL, AUTO = "local", "auto"
START_SECONDS = 900
"""How long workers may take to get their cores and build their environments."""

MAX_LOSSES = 2
"""A candidate that has cost this many workers is a failure; the first loss may have been somebody else's fault."""


def available_cores() -> int:
    """Return how many cores this process may use: what `workers: auto` means on this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """Keeps one environment warm; lives in a process of its own."""

    def __init__(self, make_env: Callable[[], CompressionEnv], threads: int):
        torch.set_num_threads(threads)
        self._env = make_env()

    def ready(self) -> None:
        """Return once the environment is built."""

    def run(self, actor: Actor, evaluated: Sequence[tuple[CompressionPolicy, Evaluation]]) -> Episode:
        """Return the actor's episode; `evaluated` is what all workers have evaluated since this one last heard."""
        self._env.evaluator.cache.update(evaluated)
        return rollout(self._env, actor)


@dataclass
class _Task:
    """An episode that is out."""

    actor: Actor
    worker: int
    losses: int = 0


class RayRunner:
    """A `Runner` (search/loop.py) over Ray actors.

    A lost worker (it crashed, ran out of memory, or its machine went away) is replaced and its episode tried once more;
    the second loss makes the episode a failure. All workers share their evaluations.

    Args:
        make_env: returns a worker's environment; sent once to Ray's object store, so it may hold the whole problem.
        workers: how many; "auto": as many as there are cores, and GPUs if the workers ask for them.
        address: of a running cluster; "local": start one for this runner, and end it in `close`. A connection that this
            process already has is used and left open.
        threads: torch threads, and cores, per worker.
        gpus: GPUs per worker, or a share of one; None: one if the cluster has any.
    Raises:
        InputError: if there is no cluster at `address`, or it has too few cores or GPUs.
    """

    def __init__(
        self,
        make_env: Callable[[], CompressionEnv],
        workers: int | str,
        address: str = LOCAL,
        threads: int = 1,
        gpus: float | None = 0.0,
    ):
        self._threads = threads
        self._folder: str | None = None
        self._workers: list[Any] = []
        _set_ray_environment(address)
        import ray

        self._ray = ray
        self._connected = not ray.is_initialized()
        if self._connected:
            self._connect(address, workers)
        try:
            all_gpus = self._ray.cluster_resources().get("GPU", 0.0)
            self._gpus = min(all_gpus, 1.0) if gpus is None else gpus
            self.slots = self._count(workers, all_gpus)
            # Kept: Ray forgets what only the constructor calls of its actors refer to, and replacements need it too.
            self._make_env = ray.put(make_env)
            self._workers = [self._new_worker() for _ in range(self.slots)]
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        self._idle = list(range(self.slots))
        self._out: dict[Any, _Task] = {}
        # All evaluations so far, in order, and how many of them each worker has received.
        self._evaluated: list[tuple[CompressionPolicy, Evaluation]] = []
        self._seen: set[CompressionPolicy] = set()
        self._received = [0] * self.slots

    def _wait_until_ready(self) -> None:
        try:
            self._ray.get([worker.ready.remote() for worker in self._workers], timeout=START_SECONDS)
        except self._ray.exceptions.GetTimeoutError:
            raise InputError(
                f"Ray did not start {self.slots} workers within {START_SECONDS // 60} minutes: the cluster's cores are "
                "probably taken. Lower `search.workers`, or try again later."
            ) from None

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

    def _connect(self, address: str, workers: int | str) -> None:
        options: dict[str, Any] = {}
        if address == LOCAL:
            # Socket paths end at 107 characters, so the folder's path must be short whatever TMPDIR says.
            self._folder = tempfile.mkdtemp(prefix="secateur-", dir="/tmp" if os.path.isdir("/tmp") else None)
            options = {
                "num_cpus": available_cores() if workers == AUTO else workers * self._threads,
                "include_dashboard": False,
                # Ray opens its folder to all users; the one around it stays ours.
                "_temp_dir": os.path.join(os.path.realpath(self._folder), "r"),
            }
        try:
            if address != LOCAL:
                _knock(address)
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            self._remove_folder()
            if address == LOCAL:
                raise
            raise InputError(
                f"`search.address: {address}` cannot be joined: {_first_line(error)}. Leave it out to search on this "
                "machine. If there is a cluster, both sides need RAY_AUTH_MODE=token and the same token."
            ) from None

    def submit(self, actor: Actor) -> None:
        """Start an episode on an idle worker; there must be one."""
        self._start(_Task(actor, self._idle.pop()))

    def _start(self, task: _Task) -> None:
        news = self._evaluated[self._received[task.worker] :]
        self._received[task.worker] = len(self._evaluated)
        self._out[self._workers[task.worker].run.remote(task.actor, news)] = task

    def wait(self) -> list[tuple[Actor, Episode]]:
        """Block until at least one episode is finished; return all that are."""
        finished: list[tuple[Actor, Episode]] = []
        while not finished:
            out = list(self._out)
            self._ray.wait(out, num_returns=1)
            ready, _ = self._ray.wait(out, num_returns=len(out), timeout=0)
            for reference in ready:
                finished += self._collect(reference)
        return finished

    def _collect(self, reference: Any) -> Sequence[tuple[Actor, Episode]]:
        """Return the finished episode, or nothing if its worker was lost and it is tried again."""
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

        task = self._out.pop(reference)
        try:
            episode = self._ray.get(reference)
        except (RayActorError, OutOfMemoryError, ObjectLostError) as error:  # ActorDiedError and ActorUnavailableError alike
            task.losses += 1
            log.warning("a worker was lost (loss %d of this candidate): %s", task.losses, _first_line(error))
            self._replace(task.worker)
            if task.losses < MAX_LOSSES:
                self._start(task)
                return []
            failure = f"worker lost twice: {_first_line(error)}"
            episode = Episode(task.actor.budget.name, None, None, failure=failure)
        self._idle.append(task.worker)
        if episode.evaluation is not None and episode.policy not in self._seen:
            self._seen.add(episode.policy)
            self._evaluated.append((episode.policy, episode.evaluation))
        return [(task.actor, episode)]

    def _replace(self, worker: int) -> None:
        self._ray.kill(self._workers[worker])  # one that is only out of reach must not come back
        self._workers[worker] = self._new_worker()
        self._received[worker] = 0

    def close(self) -> None:
        """End the workers; leave the cluster, and end it if it was started here."""
        if self._ray.is_initialized():
            for worker in self._workers:
                self._ray.kill(worker)
            if self._connected:
                self._ray.shutdown()
        self._workers = []
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _knock(address: str) -> None:
    """Raise OSError unless something listens at "host:port"; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _set_ray_environment(address: str) -> None:
    """Set what Ray reads from the environment when it is imported; the processes it starts inherit it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behavior to come; unset, Ray warns
    if address != LOCAL:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        return
    # Ray starts workers at a niceness of 15: anything else on the machine would run first, also the search's own driver.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray reads this when it is imported; on Linux too, its processes then listen on the loopback interface only. A cluster of
    # ours always asks for a token as well: programs may have imported Ray before, and other users share the interface.
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ["RAY_AUTH_MODE"] = "token"
    else:
        # Ray has cached the mode when it was imported. Only while the variable is unset does `ray.init` turn the token
        # on and refresh that; otherwise this process and the cluster would disagree.
        os.environ.pop("RAY_AUTH_MODE", None)
    # A token that lives in our environment only keeps Ray from writing one to a file that every user can read.
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
