"""Searches under the costs of a device: from its file to the run and the export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from secateur.cost_models.device import Device, write_device
from secateur.cost_models.latency_table import Axis, LatencyTable, LayerGrid, layer_key
from secateur.envs.tasks.synthetic import synthetic_net
from secateur.search.benchmarks.costs import benchmark_costs
from secateur.search.build import build_costs, build_model_and_graph
from secateur.search.cli import app
from secateur.search.config import INSTALLED_CONFIGS, parse_config
from secateur.search.results.document import read_front
from secateur.search.run.folder import load_manifest

CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": "weights.pth", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "validation": 100, "calibration": 64},
    "search": {"agent": "random", "evaluations": 4, "workers": 0, "precision": "float32"},
    "space": {"weight_bits": [4, 8], "activation_bits": [8, 32]},
    "recovery": [],
    "budgets": {"phone": {"latency_ms": "<= 80%", "macs": "<= 90%"}},
    "finalize": {"top": 1, "recovery": [], "verify": False},
}


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    torch.save(synthetic_net().state_dict(), "weights.pth")


def secateur(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def write(**sections):
    Path("small.yaml").write_text(yaml.safe_dump({**CONFIG, **sections}))
    return "small.yaml"


def measured(precisions=("float32", "int8"), layers=None):
    """A table of random times for the synthetic network's layers, or the first few of them."""
    _, _, graph = build_model_and_graph(parse_config({**CONFIG, "budgets": {"all": {"macs": "<= 1G"}}}, "test.yaml"))
    rng = np.random.default_rng(0)
    axis = Axis((1, 8, 64, 512))
    keys = dict.fromkeys(layer_key(layer) for layer in graph.geometry.layers[:layers])
    grids = tuple(
        LayerGrid(*key, precision, axis, axis if key[-1] else Axis((1,)), _times(rng, 4 if key[-1] else 1))
        for key in keys
        for precision in precisions
    )
    table = LatencyTable("other:model", "onnxruntime", "1.31.1", 1, 1, 3, "float32", grids)
    write_device(Device(1, "here", "measured", (), "float32", (8,), {"processor": "EPYC 9R14"}, table), "device.json")
    return "device.json"


def _times(rng, columns):
    return tuple(map(tuple, rng.uniform(0.1, 1, (4, columns)).tolist()))


def test_a_search_keeps_a_measured_limit_and_its_run_needs_the_file_no_more():
    device = Path(measured())
    done = secateur("search", write(device=str(device)))
    assert done.exit_code == 0, done.output
    assert "latency ms (measured)" in done.stdout
    assert "On the device: measured on EPYC 9R14, onnxruntime 1.31.1, 1 thread." in " ".join(done.stdout.split())
    device.unlink()
    run = Path("runs/small-1")
    assert load_manifest(run)[0].device.table.model == "other:model"
    document = read_front(run)
    limit = document["budgets"]["phone"]["limits"]["latency_ms"]
    assert document["feasible"] == document["evaluations"] == 4 and document["points"]
    assert all(point["costs"]["latency_ms"] <= limit for point in document["points"])
    exported = secateur("export", run, "--budget", "phone")
    assert exported.exit_code == 0, exported.output
    policy = json.loads((run / "exports" / "phone" / "policy.json").read_text())
    assert "latency_ms" in json.dumps(policy)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"layers": 1}, r"has no (float32|int8) times for layer 'conv4'"),
        ({"precisions": ("float32",)}, "has no int8 times for layer 'conv1'"),
    ],
)
def test_a_table_without_such_layers_is_refused_before_anything_is_written(table, sentence):
    config = write(device=measured(**table))
    for verb in ("inspect", "search"):
        done = secateur(verb, config)
        error = done.stderr.splitlines()[-1]
        assert done.exit_code == 2 and re.match(f"error: The latency table of 'other:model' {sentence}", error)
        assert error.endswith("profile this model.")
    assert not Path("runs").exists()


def test_a_table_is_asked_for_used_precisions_only():
    done = secateur("inspect", write(device=measured(precisions=("float32",)), space={"weight_bits": [4, 8]}))
    assert done.exit_code == 0, done.output


def test_inspect_says_where_latencies_come_from():
    done = secateur("inspect", write(device="configs/devices/arm_phone.json"))
    assert done.exit_code == 0, done.output
    assert "latency_ms: analytic: phone, one Arm Cortex-A76 core at 2.84 GHz" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "latency_ms" in line and "phone" in line)
    assert row.count(" ms") == 3 and "(80.0 %)" in row and "yes" in row


def test_limits_that_are_met_one_by_one_but_not_together_are_refused():
    """Here the least latency needs float32 and the fewest bytes need integers."""
    device = json.loads((INSTALLED_CONFIGS / "devices" / "arm_phone.json").read_text())
    device["roofline"]["macs_per_second"]["int8"] = 1e8  # integers are slow, and few bytes need integers
    Path("slow.json").write_text(json.dumps(device))
    space = {"prune_ratio": None, "weight_bits": [8, 32], "activation_bits": [8]}
    config = write(device="slow.json", space=space, budgets={"both": {"latency_ms": "<= 100.1%", "weight_bytes": "<= 40%"}})
    done = secateur("inspect", config)
    assert done.exit_code == 2 and "error: Budget 'both' cannot be met" in done.stderr
    assert done.stdout.count(" yes ") == 2


def test_the_speed_of_a_devices_costs_is_measured_too():
    config = parse_config({**CONFIG, "device": measured()}, "test.yaml")
    _, _, graph = build_model_and_graph(config)
    costs = build_costs(config, graph)
    speeds = {speed.cost: speed for speed in benchmark_costs(costs, population=64, repeats=3)}
    assert speeds["latency_ms"].with_decoding > 0
    done = secateur("benchmark", "costs", write(budgets={"all": {"macs": "<= 90%"}}), "--device", "device.json")
    assert done.exit_code == 0 and "| latency_ms | " in done.stdout
