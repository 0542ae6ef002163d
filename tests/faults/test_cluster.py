"""A search on three nodes, simulated on this machine: one is killed in the middle, and no evaluation is lost."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass

import numpy as np
import pytest

from secateur.envs.core import Budget, Evaluation, InputError
from secateur.search.loop import run_loop
from secateur.search.run.ray_cluster import set_ray_environment
from secateur.search.run.ray_runner import RayRunner
from tests.faults.numbered import Env, Fixed, send_with_code

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

EVALUATIONS = 30


class Located(Env):
    """The cost of an evaluation names the node that has made it."""

    seconds = 0.3

    def evaluation(self, score):
        import ray

        return Evaluation(score, {"macs": ray.get_runtime_context().get_node_id()})


class NeedsModule(Env):
    """An environment of a module that only the driver has."""

    def __init__(self):
        import a_module_that_no_worker_has  # noqa: F401


@dataclass(frozen=True)
class Number:
    number: int
    budget: Budget = Budget("phone", {"macs": 1.0})

    def act(self, observation, step):
        return np.array([self.number])


@pytest.fixture(scope="module")
def cluster():
    set_ray_environment("local")
    import ray
    from ray.cluster_utils import Cluster

    send_with_code(__name__)
    folder = tempfile.mkdtemp(prefix="sc-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield cluster
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_workers_that_cannot_start_are_an_error_in_one_sentence(cluster):
    with pytest.raises(InputError, match="The workers cannot start: .*No module named 'a_module_that_no_worker_has'"):
        RayRunner(NeedsModule, 1, address=cluster.address)


def test_a_node_is_killed_in_the_middle(cluster):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    runner = RayRunner(Located, 3, address=cluster.address)
    agent, episodes = Fixed(map(Number, range(EVALUATIONS))), []

    def record(actor, episode):
        episodes.append((actor.number, episode))
        if len(episodes) == 8:
            cluster.remove_node(nodes[0], allow_graceful=False)

    try:
        run_loop(agent, runner, EVALUATIONS, record)
    finally:
        runner.close()
    assert sorted(number for number, _ in episodes) == sorted(agent.told) == list(range(EVALUATIONS))
    assert all(episode.evaluation.score == number for number, episode in episodes)
    assert len({episode.evaluation.costs["macs"] for _, episode in episodes}) == 3, "all three nodes have evaluated"
    assert len({episode.evaluation.costs["macs"] for _, episode in episodes[-6:]}) == 2
