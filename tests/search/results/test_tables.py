"""The tables in the terminal say what front.json says."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from secateur.cost_models.device import Device, read_device
from secateur.cost_models.energy import Energy
from secateur.cost_models.latency_table import LatencyTable, WholeModelCheck
from secateur.envs.calibration import LayerPlan
from secateur.envs.core import Budget, CompressionPolicy, Episode, Evaluation
from secateur.envs.metric import TOP1
from secateur.search.build import Feasibility
from secateur.search.results.formatting import amount
from secateur.search.results.front import Front
from secateur.search.results.tables import (
    MAX_ROWS,
    calibration_line,
    calibration_table,
    device_line,
    feasibility_report,
    front_tables,
)

DENSE = Evaluation(0.9, {"macs": 2e6, "weight_bytes": 4e5}, images=500)
BUDGETS = (Budget("phone", {"macs": 1e6}), Budget("watch", {"weight_bytes": 2e5}, metric_drop=0.05))


def document(count):
    front = Front(("top1", "macs", "weight_bytes"), BUDGETS, DENSE, TOP1)
    for number in range(count):
        evaluation = Evaluation(0.5 + number / 100, {"macs": 8e5 + 1e3 * number, "weight_bytes": 3e5}, images=500)
        front.add(Episode("phone", CompressionPolicy((number,), (), ()), evaluation, {}, reward=np.zeros(3)))
    return front.document(lambda policy: {})


def shown(tables, width=80):
    output = io.StringIO()
    for table in tables:
        Console(file=output, width=width).print(table)
    return output.getvalue()


def test_one_table_per_budget_and_one_for_all():
    text = " ".join(shown(front_tables(document(3))).split())
    assert "phone: macs <= 1 M (50.0 %)" in text
    assert "watch: weight_bytes <= 200 kB (50.0 %), top-1 drop <= 5 points" in text
    assert text.count("Pareto front of all") == 1 and text.count("nothing fits yet") == 1
    assert "52.00 %" in text and "40.1 %" in text and "90.00 %" in text
    assert len(front_tables(document(3), "phone")) == 1


def test_a_column_of_a_device_says_whether_it_was_measured():
    dense = Evaluation(0.9, {"latency_ms": 1.25}, images=500)
    device = "measured on EPYC 9R14, onnxruntime 1.31.1, 1 thread"
    front = Front(("top1", "latency_ms"), (Budget("phone", {"latency_ms": 0.5}),), dense, TOP1, device)
    text = " ".join(shown(front_tables(front.document(lambda policy: {})), 140).split())
    assert "phone: latency_ms <= 0.5 ms (40.0 %)" in text and "latency ms (measured)" in text
    assert f"On the device: {device}." in text
    front = Front(("top1", "energy_mj"), (), Evaluation(0.9, {"energy_mj": 2.0}, images=500), TOP1, device)
    assert "energy mj (analytic)" in " ".join(shown(front_tables(front.document(lambda policy: {})), 140).split())


def test_the_device_line_has_its_error_for_whole_networks():
    analytic = read_device("configs/devices/h200.json")
    assert device_line(analytic) == "latency_ms: analytic: NVIDIA H200 SXM"
    check = WholeModelCheck("int8", 20, 0.034, 0.2, 0.99, (1.0, 2.0), (1.1, 2.1))
    table = LatencyTable("test", "onnxruntime", "1.31.1", 1, 1, 1, "float32", (), checks=(check,))
    measured = Device(1, "here", "measured", (), "float32", (8,), {"processor": "EPYC"}, table)
    assert device_line(measured) == (
        "latency_ms: measured on EPYC, onnxruntime 1.31.1, 1 thread; mean error 3.4 % (int8, 2 networks)"
    )
    counted = replace(measured, energy=Energy({"float32": 4.6, "int8": 0.3}, 100.0))
    assert device_line(counted).splitlines()[1] == "energy_mj: analytic, energies of single operations"


def test_long_fronts_are_cut_and_say_so():
    text = shown(front_tables(document(MAX_ROWS + 5), "phone"))
    assert f"The best {MAX_ROWS} of {MAX_ROWS + 5}; front.csv has all." in " ".join(text.split())
    assert text.count(" % │") - 1 == 2 * MAX_ROWS  # no finalists: their columns are empty; the dense row's cost is no share


@pytest.mark.parametrize(
    ("cost", "value", "text"),
    [
        ("macs", 1.81e9, "1.81 G"),
        ("macs", 763.5e3, "763.5 k"),
        ("weight_bytes", 311e3, "311 kB"),
        ("weight_bytes", 12, "12 B"),
        ("latency_ms", 0.05823, "0.05823 ms"),
        ("latency_ms", 1250.0, "1250 ms"),
        ("energy_mj", 2.35, "2.35 mJ"),
    ],
)
def test_amounts(cost, value, text):
    assert amount(cost, value) == text


def test_layers_that_are_calibrated_with_less_detail_say_why():
    plans = {
        "first": LayerPlan("full", 1_000_000),
        "wide": LayerPlan("channel", 400_000, matrix_bytes=85_000_000),
        "up": LayerPlan("none", 100_000, reason="it is special"),
    }
    text = shown([calibration_table(plans, 32_000_000)], width=120)
    assert "first" not in text and "matrix of 85 MB > 32 MB" in text and "moments of its channels" in text
    assert "it is special" in text and "range only" in text
    assert calibration_line(plans, 1024) == "calibration: 1,024 images, 1.5 MB, 1 of 3 layers in full detail"
    assert "not needed" in calibration_line(None, 1024)


def test_feasibility_says_yes_or_no():
    rows = [Feasibility("phone", "macs", 1e5, 1e6, 2e6), Feasibility("tiny", "macs", 1e5, 5e4, 2e6)]
    lines = shown([feasibility_report(rows)], width=120).splitlines()
    assert [line.split()[-2] for line in lines if "macs" in line] == ["yes", "no"]
