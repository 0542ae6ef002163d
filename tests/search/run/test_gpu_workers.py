"""How many workers there are, and what share of a GPU each of them asks Ray for."""

from types import SimpleNamespace

import pytest
import torch

from secateur.envs.core import InputError
from secateur.search.build import _workers_and_gpus, driver_device
from secateur.search.config import parse_config
from secateur.search.run.ray_runner import RayRunner
from tests.search.test_other_device import VALUES

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "driver", "search", "expected"),
    [
        ("auto", CPU, {}, ("auto", 0.0)),
        ("auto", GPU, {}, ("auto", None)),
        ("cpu", GPU, {"gpus_per_worker": 1}, ("auto", 0.0)),
        ("cuda", GPU, {"gpus_per_worker": 0.25, "workers": 3}, (3, 0.25)),
        ("auto", CPU, {"address": "10.0.0.1:6379"}, ("auto", None)),
        ("cuda:1", GPU, {}, (1, 0.0)),
        ("cuda:1", GPU, {"gpus_per_worker": 0.5}, (2, 0.0)),
    ],
)
def test_what_workers_ask_for(device, driver, search, expected):
    values = {**VALUES, "search": {"agent": "random", **search}, "compute": {"device": device}}
    problem = SimpleNamespace(config=parse_config(values, "test.yaml"), torch_device=driver)
    assert _workers_and_gpus(problem) == expected


def counted(workers, share, cores=8, gpus=2.0):
    runner = object.__new__(RayRunner)
    runner._threads, runner._gpus = 1, share
    runner._ray = SimpleNamespace(cluster_resources=lambda: {"CPU": float(cores), "GPU": gpus})
    return runner._count(workers, gpus)


def test_workers_are_counted_by_cores_and_gpus():
    assert counted("auto", 0.0) == 8 and counted("auto", 1.0) == 2
    assert counted("auto", 0.2) == 8 and counted("auto", 0.5) == 4 and counted("auto", 1.0, cores=1) == 1
    assert counted(4, 0.5) == 4
    with pytest.raises(InputError, match="`search.workers: 5` with 0.5 GPUs each needs 2.5 GPUs, but the Ray cluster has 2"):
        counted(5, 0.5)


def test_the_driver_of_a_cluster_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def config(**search):
        return parse_config({**VALUES, "search": {"agent": "random", **search}, "compute": {"device": "cuda"}}, "test.yaml")

    assert driver_device(config(address="10.0.0.1:6379")) == CPU
    for search in ({}, {"workers": 0, "address": "10.0.0.1:6379"}):
        with pytest.raises(InputError, match="`compute.device: cuda` asks for a GPU, but PyTorch finds none on this machine"):
            driver_device(config(**search))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CUDA", "cuda1"])
def test_a_device_has_a_known_name(device):
    with pytest.raises(InputError, match="compute.device: must be `auto`, `cpu`, `cuda`, or the number of a GPU"):
        parse_config({**VALUES, "compute": {"device": device}}, "test.yaml")


@pytest.mark.parametrize("share", [-1, "half", True])
def test_a_share_is_a_number(share):
    with pytest.raises(InputError, match="must be a number from 0 on, or `auto`"):
        parse_config({**VALUES, "search": {"agent": "random", "gpus_per_worker": share}}, "test.yaml")
