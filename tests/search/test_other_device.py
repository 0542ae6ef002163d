"""The whole path on a device that is not the CPU's: nothing mixes tensors of both, and every number is that of the CPU."""

from __future__ import annotations

import json
import pickle
from itertools import cycle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.envs.devices import CPU
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES
from secateur.search import build
from secateur.search.build import build_problem, make_evaluator, with_sensitivities
from secateur.search.config import parse_config
from tests.other_device import DEVICE, MixedDevicesError, OtherDevice

VALUES = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": "rest", "calibration": 64, "validation": 100, "test": 100},
    "search": {"agent": "random", "evaluations": 2, "workers": 0},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [2, 4, 8], "activation_bits": [8]},
    "budgets": {"small": {"macs": "<= 50%"}},
}
SCENES = {"calibration": 16, "validation": 24, "test": 24}
UNTRAINED = {
    "segmentation": {"model": {"factory": "secateur:unet", "input": [1, 64, 64]}, "data": {"name": "digit_scenes", **SCENES}},
    "restoration": {"model": {"factory": "secateur:edsr", "input": [1, 32, 32]}, "data": {"name": "digit_scenes_x2", **SCENES}},
    "detection": {
        "model": {"factory": "secateur:scene_detector", "input": [1, 64, 64], "part": "network"},
        "data": {"name": "digit_scene_boxes", **SCENES},
        "importance": "taylor",
    },
}
PLUGINS = [
    {"importance": importance, "quantizer": quantizer, "recovery": [recovery], "finalize": {"recovery": [recovery]}}
    for importance, quantizer, recovery in zip(IMPORTANCES, cycle(QUANTIZERS), cycle(RECOVERIES), strict=False)
]
NO_MOMENTS = {"name": "data_free", "options": {"fit": "nonnegative"}}
CASES = [
    *PLUGINS,
    {"recovery": ["sequential"], "quantizer": "gptq"},
    {"recovery": [NO_MOMENTS], "finalize": {"recovery": [{"name": "data_free", "options": {"fit": "closed_form"}}]}},
    {"search": {**VALUES["search"], "score": "divergence", "precision": "bfloat16"}},
    *({"task": task, "space": {"weight_bits": [4, 8]}, **values} for task, values in UNTRAINED.items()),
]


@pytest.fixture
def elsewhere(monkeypatch):
    """The mode in which `compute.device` is the other device; use it in a `with` statement."""

    class Elsewhere(OtherDevice):
        def __enter__(self):
            monkeypatch.setattr(build, "find_device", lambda name: DEVICE)
            return super().__enter__()

    return Elsewhere()


def numbers(changes):
    """Return every number that a search computes with a network: scores, sensitivities, and the tensors of finalists."""
    torch.manual_seed(0)
    problem = with_sensitivities(build_problem(parse_config({**VALUES, **changes}, "test.yaml")))
    space, rng = problem.space, np.random.default_rng(0)
    policy = space.decode(space.scale_to_budget(rng.uniform(size=space.used.shape), problem.budgets[0]))
    network = problem.finalist_assembler.assemble(policy)
    scores = [problem.dense.score, make_evaluator(problem).evaluate(policy).score, problem.task.evaluate(network, "test").score]
    tensors = {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in network.state_dict().items()}
    return scores, space.sensitivities.curves.tobytes(), tensors, problem.torch_device


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: "-".join(map(str, changes.values()))[:60])
def test_every_plugin_and_task_computes_the_same_elsewhere(changes, elsewhere):
    if changes.get("task") == "detection":
        pytest.importorskip("torchmetrics")
    *wanted, here = numbers(changes)
    with elsewhere:
        *found, there = numbers(changes)
    assert (here, there) == (CPU, DEVICE)
    assert found == wanted and elsewhere.operations > 1000


def without_times(tree):
    if isinstance(tree, dict):
        left_out = ("seconds", "latency_ms", "dense_latency_ms")
        return {name: without_times(value) for name, value in tree.items() if name not in left_out}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def files_of(run):
    """Return what a run holds, without times: front, learning curves, and exported tensors."""
    front = without_times(json.loads((run / "front.json").read_text()))
    curves = [without_times(json.loads(line)) for path in run.glob("training/*/learning.jsonl") for line in path.open()]
    exports = {path.parent.name: load_file(path) for path in run.glob("exports/*/model.safetensors")}
    return front, curves, {name: {key: x.numpy().tobytes() for key, x in tensors.items()} for name, tensors in exports.items()}


def test_a_search_with_training_leaves_the_same_files(elsewhere, tmp_path):
    training = {"epochs": 2, "batch_size": 32, "ema": 0.9, "flip": True, "shift": 1, "label_smoothing": 0.1}
    data = {**VALUES["data"], "train": 256}
    values = {**VALUES, "data": data, "finalize": {"training": training}}
    values["search"] = {**VALUES["search"], "agent": "greedy", "racing": True}
    secateur.search({**values, "output": {"root": str(tmp_path), "name": "here"}})
    with elsewhere:
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
        names.append(next(network.parameters()).device)
        return float(nn.functional.cross_entropy(network(images), wanted))

    def searched(**functions):
        settings = {"budgets": {"half": {"macs": "<= 60%"}}, "agent": "greedy", "evaluations": 2, "workers": 0}
        run = secateur.search(model, inputs=images[:1], calibration=[images], **functions, **settings)
        best = run.best("half")
        return best.policy, best.validation_score, best.test_score, best.verified

    for functions in ({"evaluate": evaluate, "metric": metric}, {}):
        here = searched(**functions)
        names.clear()
        with elsewhere:
            assert searched(**functions) == here and here[-1]
        assert not functions or DEVICE in names


def test_a_problem_travels_to_other_processes_in_main_memory(elsewhere):
    changes = {"search": {**VALUES["search"], "score": "divergence"}}
    with elsewhere:
        problem = build_problem(parse_config({**VALUES, **changes}, "test.yaml"))
        assert problem.on(DEVICE) is problem
        with pytest.raises(MixedDevicesError, match="__reduce_ex__"):
            pickle.dumps(problem)
        sent = pickle.loads(pickle.dumps(problem.on(CPU)))
        policy = problem.space.policy_space.levels_to_policy(problem.space.policy_space.weakest)
        scores = [make_evaluator(one).evaluate(policy).score for one in (problem, sent, sent.on(DEVICE))]
    assert scores[0] == scores[1] == scores[2]


def test_images_are_moved_once(elsewhere, monkeypatch):
    with elsewhere as device:
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
