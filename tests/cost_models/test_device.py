"""Device files: what the shipped ones status, and what a mistake in one says."""

from __future__ import annotations

import json

import pytest

from secateur.cost_models.core import InputError
from secateur.cost_models.device import SHIPPED, parse_device, read_device, write_device
from secateur.cost_models.energy import CountedEnergy
from secateur.cost_models.latency_table import TableLatency
from secateur.cost_models.roofline import RooflineLatency

ANALYTIC = {
    "schema": 1,
    "name": "calculator",
    "kind": "analytic",
    "sources": ["its manual"],
    "float_precision": "float32",
    "integer_bits": [8],
    "roofline": {"macs_per_second": {"float32": 1e9, "int8": 4e9}, "bytes_per_second": 1e9},
}
TABLE = {
    "model": "test",
    "runtime": "onnxruntime",
    "runtime_version": "1.31.1",
    "threads": 2,
    "batch": 1,
    "warm_up": 3,
    "float_precision": "float32",
    "grids": [],
}
MEASURED = {
    **{key: value for key, value in ANALYTIC.items() if key != "roofline"},
    "kind": "measured",
    "machine": {"processor": "EPYC 9R14"},
    "table": TABLE,
}


def without(values, key):
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_device_is_analytic_and_says_where_its_figures_come_from(path):
    device = read_device(path)
    assert device.kind == "analytic" and device.label == f"analytic: {device.name}"
    said = " ".join(device.sources)
    figures = ["macs_per_second", "bytes_per_second", "layer_overhead_us"] * (device.roofline is not None)
    assert all(name in said for name in figures + ["mac_pj", "byte_pj"] * (device.energy is not None))
    assert parse_device(device.document(), "again") == device


def test_figures_of_shipped_devices_follow_from_their_sources():
    rates = {path.stem: read_device(path).roofline for path in SHIPPED.glob("*.json")}
    phone, jetson, h200 = (rates[name] for name in ("arm_phone", "jetson_xavier_nx", "h200"))
    assert phone.macs_per_second == pytest.approx({"float32": 2 * 4 * 2.84e9, "int8": 2 * 16 * 2.84e9})
    assert phone.bytes_per_second == pytest.approx(4 * 16 / 8 * 4266e6)
    assert jetson.macs_per_second == pytest.approx({"float16": 48 * 64 * 1.1e9, "int8": 48 * 128 * 1.1e9})
    assert jetson.bytes_per_second == pytest.approx(128 / 8 * 2 * 1600e6)
    assert h200.macs_per_second == pytest.approx({"bfloat16": 989.4e12 / 2, "int8": 1978.9e12 / 2})
    energy = read_device("configs/devices/energy_45nm.json").energy
    assert energy.mac_pj == pytest.approx({"float32": 3.7 + 0.9, "int8": 0.2 + 0.1}) and energy.byte_pj == 1300 / 8


def test_costs_are_those_that_the_device_knows():
    assert {name: type(model) for name, model in parse_device(ANALYTIC, "d").cost_models().items()} == {
        "latency_ms": RooflineLatency
    }
    energy = {"mac_pj": {"float32": 4.6, "int8": 0.3}, "byte_pj": 100}
    device = parse_device({**ANALYTIC, "roofline": None, "energy": energy}, "d")
    assert {name: type(model) for name, model in device.cost_models().items()} == {"energy_mj": CountedEnergy}
    both = parse_device({**MEASURED, "energy": energy}, "d").cost_models()
    assert {name: type(model) for name, model in both.items()} == {"latency_ms": TableLatency, "energy_mj": CountedEnergy}


def test_a_measured_device_says_on_what():
    assert parse_device(MEASURED, "d").label == "measured on EPYC 9R14, onnxruntime 1.31.1, 2 threads"


def test_a_written_device_reads_back(tmp_path):
    device = parse_device(MEASURED, "d")
    write_device(device, tmp_path / "device.json")
    assert read_device(tmp_path / "device.json") == device


def test_shipped_devices_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = read_device("configs/devices/h200.json")
    (tmp_path / "configs" / "devices").mkdir(parents=True)
    (tmp_path / "configs" / "devices" / "h200.json").write_text(json.dumps(ANALYTIC))
    assert shipped.name == "NVIDIA H200 SXM" and read_device("configs/devices/h200.json").name == "calculator"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1], "d.json is no device file: it has no `schema`."),
        ({**ANALYTIC, "schema": 2}, "d.json has schema 2; this version reads schema 1. Profile the device again."),
        ({**ANALYTIC, "speed": 1}, "d.json: speed: unknown key."),
        (
            {**ANALYTIC, "roofline": {**ANALYTIC["roofline"], "peak": 1}},
            "d.json: roofline.peak: unknown key.",
        ),
        ({**MEASURED, "table": {**TABLE, "cores": 2}}, "d.json: table.cores: unknown key."),
        (without(ANALYTIC, "name"), "d.json: name: is missing."),
        ({**ANALYTIC, "kind": "guessed"}, "d.json: kind: input should be 'measured' or 'analytic'."),
        (without(ANALYTIC, "roofline"), "d.json: an analytic device needs a `roofline`, or `energy` figures."),
        (without(MEASURED, "table"), "d.json: a measured device needs a `table`; profiling the device writes one."),
        ({**MEASURED, "kind": "analytic"}, "d.json: an analytic device has no `table`: write `kind: measured`."),
        ({**MEASURED, "float_precision": "float16"}, "d.json: `table.float_precision` is float32, but that of the device is"),
        ({**ANALYTIC, "integer_bits": [64]}, "d.json: `integer_bits` must be in [2, 31], but got 64."),
        ({**ANALYTIC, "integer_bits": [4, 8]}, "d.json: `roofline.macs_per_second` has no figure for int4, in which"),
        ({**ANALYTIC, "energy": {"mac_pj": {"int8": 1}, "byte_pj": 1}}, "d.json: `energy.mac_pj` has no figure for float32"),
        (
            {**ANALYTIC, "roofline": {**ANALYTIC["roofline"], "bytes_per_second": 0}},
            "d.json: roofline: `bytes_per_second` must be above 0, but got 0.0.",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, values, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        read_device("d.json")
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_a_truncated_file_is_damaged(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(MEASURED, indent=1)[:200])
    with pytest.raises(InputError, match=r"d\.json is damaged: .* \(line \d+, column \d+\)"):
        read_device(tmp_path / "d.json")


def test_a_missing_file_names_the_shipped_ones(tmp_path):
    with pytest.raises(InputError, match=r"no such device file.*secateur.profile.*configs/devices/h200\.json"):
        read_device(tmp_path / "none.json")
