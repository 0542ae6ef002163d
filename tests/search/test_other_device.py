"""The whole path on a device that is not the CPU's: nothing mixes tensors of both, and every number is that of the CPU."""

from __future__ import annotations

import json
import pickle
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.envs.devices import CPU
from secateur.envs.evaluator import Precision
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.pruning.importance.core import DenseModel
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES
from secateur.envs.tasks.core import all_samples
from secateur.search import build
from secateur.search.build import build_plugin, build_problem, make_evaluator, with_sensitivities
from secateur.search.config import PluginEntry, parse_config
from tests.other_device import DEVICE, OtherDevice

VALUES = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": "rest", "calibration": 64, "validation": 100, "test": 100},
    "search": {"agent": "random", "evaluations": 2, "workers": 0},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [2, 4, 8], "activation_bits": [8]},
    "budgets": {"small": {"macs": "<= 50%"}},
}
SCENES = {"calibration": 16, "validation": 24, "test": 24}
DETECTION = {
    "model": {"factory": "secateur:scene_detector", "input": [1, 64, 64], "part": "network"},
    "data": {"name": "digit_scene_boxes", **SCENES},
    "task": "detection",
    "space": {"weight_bits": [4, 8]},
    "importance": "taylor",
}
DATA_FREE = [("data_free", {"fit": fit}) for fit in ("nonnegative", "closed_form")]


@pytest.fixture(scope="module")
def device():
    return OtherDevice()


@pytest.fixture
def elsewhere(device, monkeypatch):
    """A context in which `compute.device` is the other device."""

    @contextmanager
    def context():
        with monkeypatch.context() as patch, device:
            patch.setattr(build, "find_device", lambda name: DEVICE)
            yield device

    return context


@pytest.fixture(scope="module")
def problems(device):
    """A problem on the CPU, and the same one on the other device."""
    here = build_problem(parse_config({**VALUES, "importance": "second_order"}, "test.yaml"))
    with device:
        return here, here.on(DEVICE)


def both(device, problems, compute):
    """Return what `compute` finds on the CPU and on the other device."""
    here, there = problems
    found = compute(here)
    before = device.operations
    with device:
        again = compute(there)
    assert device.operations > before
    return found, again


def policy_of(problem):
    space, rng = problem.space, np.random.default_rng(0)
    return space.decode(space.scale_to_budget(rng.uniform(size=space.used.shape), problem.budgets[0]))


def bytes_of(network):
    return {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_importances_are_the_same_elsewhere(name, device, problems):
    def compute(problem):
        images, labels = all_samples(problem.task, "calibration")
        assembler, rng = problem.assembler, np.random.default_rng(0)
        dense = DenseModel(assembler.model, problem.graph, assembler.calibration, images, labels, rng, problem.task.loss)
        return [scores.tolist() for scores in build_plugin(IMPORTANCES, PluginEntry(name=name)).scores(dense)]

    found, again = both(device, problems, compute) if name != "random" else ((), ())
    assert found == again


@pytest.mark.parametrize(
    ("recovery", "quantizer"),
    [
        *zip([(name, {}) for name in RECOVERIES], ["gptq"] * len(RECOVERIES), strict=True),
        *zip(DATA_FREE, ["uniform", "power_of_two"], strict=True),
        (("batch_norm", {}), "dual_bounds"),
    ],
    ids=str,
)
def test_repairs_and_quantizers_are_the_same_elsewhere(recovery, quantizer, device, problems):
    plugin = build_plugin(RECOVERIES, PluginEntry(name=recovery[0], options=recovery[1]))

    def compute(problem):
        rounding = build_plugin(QUANTIZERS, PluginEntry(name=quantizer))
        assembler = replace(problem.assembler, recoveries=[plugin], quantizer=rounding)
        network = assembler.assemble(policy_of(problem))
        return problem.task.evaluate(network, "test").score, bytes_of(network)

    found, again = both(device, problems, compute)
    assert found == again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluations_and_sensitivities_are_the_same_elsewhere(dtype, device, problems):
    def compute(problem):
        problem = replace(problem, precision=Precision(dtype, "test"))
        score = make_evaluator(problem).evaluate(policy_of(problem)).score
        return score, with_sensitivities(problem).space.sensitivities.curves.tolist() if dtype == "float32" else None

    found, again = both(device, problems, compute)
    assert found == again


def test_parts_and_their_loss_are_the_same_elsewhere(elsewhere):
    pytest.importorskip("torchmetrics")

    def numbers():
        torch.manual_seed(0)
        problem = build_problem(parse_config({**VALUES, **DETECTION}, "test.yaml"))
        network = problem.finalist_assembler.assemble(policy_of(problem))
        return problem.dense.score, problem.task.evaluate(network, "test").score, bytes_of(network), problem.torch_device

    *wanted, here = numbers()
    with elsewhere():
        *found, there = numbers()
    assert (here, there) == (CPU, DEVICE) and found == wanted


def without_times(tree):
    if isinstance(tree, dict):
        left_out = ("seconds", "latency_ms", "dense_latency_ms")
        return {name: without_times(value) for name, value in tree.items() if name not in left_out}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def files_of(run):
    """Return what a run holds, without times: front, learning curves, and exported tensors."""
    front = without_times(json.loads((run / "front.json").read_text()))
    curves = [
        without_times(json.loads(line))
        for path in run.glob("training/*/learning.jsonl")
        for line in path.read_text().splitlines()
    ]
    exports = {path.parent.name: load_file(path) for path in run.glob("exports/*/model.safetensors")}
    return front, curves, {name: {key: x.numpy().tobytes() for key, x in tensors.items()} for name, tensors in exports.items()}


@pytest.mark.slow
def test_a_search_with_training_leaves_the_same_files(elsewhere, tmp_path):
    training = {"epochs": 2, "batch_size": 32, "ema": 0.9, "flip": True, "shift": 1, "label_smoothing": 0.1}
    data = {**VALUES["data"], "train": 256}
    values = {**VALUES, "data": data, "finalize": {"training": training}}
    values["search"] = {**VALUES["search"], "agent": "greedy", "racing": True}
    secateur.search({**values, "output": {"root": str(tmp_path), "name": "here"}})
    with elsewhere():
        run = secateur.search({**values, "output": {"root": str(tmp_path), "name": "there"}})
        assert next(run.best("small").model().parameters()).device == CPU
    here, there = (files_of(tmp_path / name) for name in ("here", "there"))
    assert there == here
    assert set(here[2]) == {"small", "small-trained"} and here[0]["budgets"]["small"]["check"]["passed"]


def test_functions_of_the_user_need_not_know_the_device(elsewhere, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(128, 3)).eval()
    images, wanted = torch.randn(48, 1, 8, 8), torch.randint(3, (48,))
    metric = secateur.Metric("error", higher_is_better=False, best=0.0)
    names = []

    def evaluate(network):
        names.append(next((x.device for x in network.parameters()), CPU))  # exported files have none
        return float(nn.functional.cross_entropy(network(images), wanted))

    def searched(**functions):
        settings = {"budgets": {"half": {"macs": "<= 60%"}}, "agent": "greedy", "evaluations": 2, "workers": 0}
        run = secateur.search(model, inputs=images[:1], calibration=[images], **functions, **settings)
        best = run.best("half")
        return best.policy, best.validation_score, best.test_score, best.verified

    for functions in ({"evaluate": evaluate, "metric": metric}, {}):
        here = searched(**functions)
        names.clear()
        with elsewhere():
            assert searched(**functions) == here and here[-1]
        assert not functions or DEVICE in names


def test_a_problem_travels_to_other_processes_in_main_memory(elsewhere):
    changes = {"search": {**VALUES["search"], "score": "divergence"}}
    with elsewhere():
        problem = build_problem(parse_config({**VALUES, **changes}, "test.yaml"))
        assert problem.on(DEVICE) is problem
        main = problem.on(CPU)
        tensors = [*main.assembler.model.state_dict().values(), main.assembler.images, *main.score._outputs, *main.score._batches]
        assert all(x.device == CPU for x in tensors) and main.task.data.device == CPU
        sent = pickle.loads(pickle.dumps(main))
        policy = problem.space.policy_space.levels_to_policy(problem.space.policy_space.weakest)
        scores = [make_evaluator(one).evaluate(policy).score for one in (problem, sent, sent.on(DEVICE))]
    assert scores[0] == scores[1] == scores[2]


def test_images_are_moved_once(elsewhere, monkeypatch):
    with elsewhere() as device:
        problem = build_problem(parse_config({**VALUES, "importance": "l1_norm"}, "test.yaml"))
        first, again = (next(iter(problem.task.batches("validation"))) for _ in range(2))
        assert torch.equal(first.inputs, again.inputs) and first.targets.device == DEVICE
        assert first.targets.untyped_storage()._cdata == again.targets.untyped_storage()._cdata
        data = problem.task.data
        monkeypatch.setattr(data.moved, "max_bytes", 1000)
        monkeypatch.setattr(data.moved, "_pieces", type(data.moved._pieces)())
        first, again = (next(iter(problem.task.batches("validation"))) for _ in range(2))
        assert torch.equal(first.inputs, again.inputs) and device.is_marked(first.targets)
        assert first.targets.untyped_storage()._cdata != again.targets.untyped_storage()._cdata
