"""The tables in the terminal say what front.json says."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from envs.calibration import LayerPlan
from envs.core import Budget, CompressionPolicy, Episode, Evaluation
from search.build import Feasibility
from search.front import Front
from search.tables import MAX_ROWS, amount, calibration_line, calibration_table, feasibility_report, front_tables

DENSE = Evaluation(0.9, {"macs": 2e6, "weight_bytes": 4e5}, images=500)
BUDGETS = (Budget("phone", {"macs": 1e6}), Budget("watch", {"weight_bytes": 2e5}, top1_drop=0.05))


def document(count):
    front = Front(("top1", "macs", "weight_bytes"), BUDGETS, DENSE, num_classes=10)
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


def test_long_fronts_are_cut_and_say_so():
    text = shown(front_tables(document(MAX_ROWS + 5), "phone"))
    assert f"The best {MAX_ROWS} of {MAX_ROWS + 5}; front.csv has all." in text.replace("\n", " ")
    assert text.count(" % │") - 1 == 2 * MAX_ROWS  # no finalists: their columns are empty; the dense row's cost is no share


@pytest.mark.parametrize(
    ("cost", "value", "text"),
    [
        ("macs", 1.81e9, "1.81 G"),
        ("macs", 763.5e3, "763.5 k"),
        ("weight_bytes", 311e3, "311 kB"),
        ("weight_bytes", 12, "12 B"),
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
    assert "needs one" in calibration_line(None, 1024)


def test_feasibility_says_yes_or_no():
    rows = [Feasibility("phone", "macs", 1e5, 1e6, 2e6), Feasibility("tiny", "macs", 1e5, 5e4, 2e6)]
    lines = shown([feasibility_report(rows)], width=120).splitlines()
    assert [line.split()[-2] for line in lines if "macs" in line] == ["yes", "no"]
