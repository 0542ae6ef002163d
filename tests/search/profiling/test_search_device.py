"""Searches that profile this machine: measured once for a model and settings, kept with the run, and never again on resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.cost_models.device import Device, read_device, write_device
from secateur.cost_models.latency_table import Axis, LatencyTable, LayerGrid, layer_key
from secateur.envs.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.tasks.synthetic import synthetic_net
from secateur.search.build import build_cost_models, build_problem
from secateur.search.config import DeviceProfile, parse_config
from secateur.search.profiling import search_device
from secateur.search.profiling.search_device import with_measured_device
from secateur.search.run.folder import load_manifest
from secateur.search.run.search import resume, search

CONFIG = {
    "model": {"factory": "secateur.envs.tasks.synthetic:synthetic_net", "input": [3, 8, 8]},
    "data": {"name": "secateur.envs.tasks.synthetic:load", "validation": 20, "test": 20, "calibration": 16},
    "device": "profile",
    "search": {"agent": "random", "evaluations": 2, "workers": 0, "precision": "float32"},
    "recovery": [],
    "budgets": {"phone": {"latency_ms": "<= 80%"}},
    "finalize": {"top": 1, "recovery": [], "verify": False},
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = synthetic_net().eval()
    return model, analyze(model, (torch.zeros(1, 3, 8, 8),))


@pytest.fixture
def measured(network, tmp_path, monkeypatch):
    """The settings of all profiles that were made, which take no time here: layers have made-up times."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    made = []

    def measure(subject, output, runtime_name, config, note, advance, tell):
        note("layers")
        axis, grids, times = Axis((1, 512)), {}, ((0.01, 1.0), (1.0, 2.0))
        for layer in subject.graph.geometry.layers:
            for precision in config.precisions:
                grids[layer_key(layer), precision] = LayerGrid(*layer_key(layer), precision, axis, axis, times)
        table = LatencyTable("test", runtime_name, "1", config.threads, config.batch, 1, "float32", tuple(grids.values()))
        device = Device(1, "here", "measured", (), "float32", config.integer_bits, {"processor": "none"}, table)
        write_device(device, output)
        made.append(config)
        return device

    monkeypatch.setattr(search_device, "measure_device", measure)
    return made


def resolved(network, **device):
    config = parse_config({**CONFIG, "device": device or "profile"}, "test.yaml")
    told = []
    return with_measured_device(config, *network, told.append), told


def test_a_profile_is_made_once_for_a_model_and_settings(network, measured):
    first, _ = resolved(network)
    again, told = resolved(network, profile="quick")
    assert first.device == again.device and isinstance(first.device, Device) and len(measured) == 1
    path = next(Path("cache/devices").iterdir())
    assert read_device(path) == first.device
    assert str(path) in told[0] and "remove the file to measure again" in told[0]
    other, _ = resolved(network, profile="quick", threads=2)
    assert len(measured) == 2 and other.device.table.threads == 2
    resolved(network, profile="full")
    assert measured[0].seconds < measured[2].seconds and len(list(Path("cache/devices").iterdir())) == 3


def test_another_model_is_measured_for_itself(network, measured):
    resolved(network)
    wider = synthetic_net(width=12).eval()
    resolved((wider, analyze(wider, (torch.zeros(1, 3, 8, 8),))))
    assert len(measured) == 2


def test_a_run_keeps_the_device_and_is_resumed_without_a_profile(measured):
    run = search(parse_config(CONFIG, "test.yaml"))
    assert len(measured) == 1
    device = load_manifest(run)[0].device
    assert isinstance(device, Device) and read_device(run / "device.json") == device
    for path in Path("cache/devices").iterdir():
        path.unlink()
    assert resume(run, ["search.evaluations=3"]) == run
    assert len(measured) == 1 and load_manifest(run)[0].device == device


def test_a_device_in_a_problem_is_measured(measured):
    problem = build_problem(parse_config(CONFIG, "test.yaml"))
    assert isinstance(problem.device, Device) and problem.config.device == problem.device
    assert problem.budgets[0].limits["latency_ms"] == pytest.approx(0.8 * problem.dense.costs["latency_ms"])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"profile": "slow"}, "device: option `profile`: input should be 'quick' or 'full'"),
        ({"profil": "quick"}, "device: has no option `profil`. Did you mean `profile`?"),
        ({"threads": 0}, "device: option `threads`: input should be greater than or equal to 1"),
        (3, "device: must be the path of a device file, or `profile` (got 3)"),
    ],
)
def test_wrong_profiles_are_one_sentence(device, message):
    with pytest.raises(InputError) as error:
        parse_config({**CONFIG, "device": device}, "test.yaml")
    assert str(error.value).startswith(f"test.yaml: {message}") and "\n" not in str(error.value)


def test_a_profile_has_no_energies():
    with pytest.raises(
        InputError, match="`budgets.phone.energy_mj` is not known of the device that is profiled, only latency_ms"
    ):
        parse_config({**CONFIG, "budgets": {"phone": {"energy_mj": "<= 80%"}}}, "test.yaml")


def test_unknown_runtimes_and_unusable_folders_are_one_sentence(network, measured, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="There is no runtime `tensorrt`"):
        resolved(network, runtime="tensorrt")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="profile of this machine cannot be kept in .*Set another SECATEUR_CACHE"):
        resolved(network)


def test_commands_that_do_not_profile_say_so():
    config = parse_config(CONFIG, "test.yaml")
    assert config.device == DeviceProfile()
    with pytest.raises(InputError, match="secateur profile CONFIG --quick"):
        build_cost_models(config)
