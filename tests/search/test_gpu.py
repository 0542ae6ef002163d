"""On a real GPU: the numbers of the CPU up to rounding, 16 bits under their check, training, and Ray workers with GPUs."""

from __future__ import annotations

import json
from itertools import cycle

import numpy as np
import pytest
import torch

import secateur
from secateur.envs.devices import CPU, find_device
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES
from secateur.search.build import build_problem, make_evaluator, open_runner
from secateur.search.config import parse_config
from secateur.search.run.local_runner import LocalRunner
from tests.search.test_other_device import VALUES

PLUGINS = [
    {"importance": importance, "quantizer": quantizer, "recovery": [recovery], "finalize": {"recovery": [recovery]}}
    for importance, quantizer, recovery in zip(IMPORTANCES, cycle(QUANTIZERS), cycle(RECOVERIES), strict=False)
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]


def problem_on(device, **changes):
    search = {**VALUES["search"], "precision": "float32", **changes.pop("search", {})}
    return build_problem(parse_config({**VALUES, "search": search, "compute": {"device": device}, **changes}, "test.yaml"))


def policies_of(problem, count=3):
    rng, space = np.random.default_rng(0), problem.space
    return [space.decode(space.scale_to_budget(rng.uniform(size=space.used.shape), problem.budgets[0])) for _ in range(count)]


@pytest.mark.parametrize("changes", PLUGINS, ids=lambda changes: changes["importance"])
def test_scores_are_those_of_the_cpu(changes):
    here, there = problem_on("cpu", **changes), problem_on("cuda", **changes)
    assert there.dense.score == pytest.approx(here.dense.score, abs=0.02)
    for policy in policies_of(here):
        networks = [problem.finalist_assembler.assemble(policy) for problem in (here, there)]
        assert next(networks[1].parameters()).is_cuda
        scores = [one.task.evaluate(net, "test").score for one, net in zip((here, there), networks, strict=True)]
        # Rounding may change the order of channels of almost equal importance, and codes at the middle between two values.
        assert scores[0] == pytest.approx(scores[1], abs=0.15)


def test_sixteen_bits_pass_the_check_or_are_not_used():
    problem = problem_on("cuda", search={"precision": "auto"})
    assert problem.precision.dtype in ("bfloat16", "float16", "float32") and "moves the dense model's" in problem.precision.reason
    network = make_evaluator(problem).network(policies_of(problem, 1)[0])
    weight = network.conv2.weight
    assert weight.is_cuda and weight.dtype == problem.precision.torch_dtype
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_search_with_training_is_exported_and_verified(tmp_path):
    values = {**VALUES, "data": {**VALUES["data"], "train": 256}, "compute": {"device": "cuda"}}
    values["finalize"] = {"training": {"epochs": 2, "batch_size": 32, "precision": "bfloat16"}}
    run = secateur.search({**values, "output": {"root": str(tmp_path), "name": "run"}})
    assert run.best("small").verified
    assert json.loads((tmp_path / "run/manifest.json").read_text())["config"]["compute"] == {"device": "cuda"}
    again = secateur.finalize(run.folder, epochs=3)[0]
    assert again.verified and next(again.model().parameters()).device == CPU


def test_workers_share_the_gpu():
    problem = problem_on("cuda", search={"workers": "auto", "gpus_per_worker": 0.5})
    policy = policies_of(problem, 1)[0]
    runner = open_runner(problem)
    try:
        assert not isinstance(runner, LocalRunner) and runner.slots >= 2
    finally:
        runner.close()
    assert make_evaluator(problem).evaluate(policy).score > 0


def test_a_full_memory_halves_batches():
    device = find_device("cuda")
    free, _ = torch.cuda.mem_get_info(device)
    from secateur.envs import memory

    def run(parts):
        return torch.empty(2 * free // parts, dtype=torch.uint8, device=device).numel()

    assert memory.halving("test of memory", run) < free
    assert "test of memory by" in memory.memory_note()
