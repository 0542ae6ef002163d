"""Profiles: staircases are found, corrections recovered, interrupted work goes on, and a device file comes out."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from secateur.cost_models.core import InputError
from secateur.cost_models.device import read_device
from secateur.cost_models.latency_table import count_kinds, layer_key
from secateur.search.cli import app
from secateur.search.profiling import profile_run
from secateur.search.profiling import profiler as profiling
from secateur.search.profiling.layer_models import LayerPoint
from secateur.search.profiling.measuring import Journal, chunks, merged
from secateur.search.profiling.plan import grid_axes
from secateur.search.profiling.profiler import ProfileConfig, profile
from secateur.search.profiling.runtimes import RUNTIMES
from secateur.search.profiling.staircases import QUICK, find_staircase, measured_counts, plot

SMOOTH = np.linspace(1.0, 5.0, 72)


@pytest.mark.parametrize(
    "milliseconds, multiples, step",
    [
        (lambda c: c + 10.0, (), 1),
        (lambda c: -(-c // 16) * 16 + 10.0, (), 16),
        (lambda c: (c + 20.0) * np.where(c % 4 == 0, 1, 1.6), (4,), 4),
        (lambda c: np.where(c % 8 == 0, -(-c // 8) * 8, 2 * c + 30) + 10.0, (8,), 8),
        (lambda c: (c + 20.0) * np.where(c % 16 == 0, 1, np.where(c % 8 == 0, 2, 3)), (16, 8), 16),
    ],
)
def test_the_staircase_of_a_scan_is_found(milliseconds, multiples, step):
    counts = np.arange(1, 73)
    found = find_staircase(range(1, 73), milliseconds(counts).tolist())
    assert found[:2] == (multiples, step)
    assert found[2] < 0.02


@pytest.mark.parametrize("largest", [1, 3, 7, 16, 64, 511, 4096])
@pytest.mark.parametrize("multiples, step", [((), 1), ((4,), 16), ((8,), 8), ((32,), 32), ((16, 8), 16)])
def test_measured_counts_span_the_axis(largest, multiples, step):
    counts = measured_counts(largest, multiples, step)
    assert counts[0] == 1 and counts[-1] == largest
    assert list(counts) == sorted(set(counts))
    assert len(counts) <= 32
    if largest >= 64:
        kinds = count_kinds(np.array(counts), multiples)
        assert all((kinds == kind).sum() >= 2 for kind in range(len(multiples) + 1))


def test_a_plot_has_one_column_per_count():
    lines = plot(range(1, 73), SMOOTH).splitlines()
    assert len(lines) == 9
    assert lines[0].count("█") < lines[-2].count("█") == 72


def test_every_layer_is_covered_by_the_grids(subject):
    axes = grid_axes(subject.graph.geometry, (), ("float32", "int8"))
    for layer in subject.graph.geometry.layers:
        for precision in ("float32", "int8"):
            ins, outs = axes[layer_key(layer), precision]
            assert layer.in_channels in ins.counts
            assert layer.depthwise or layer.out_channels in outs.counts
    stem = subject.graph.geometry.layers[0]
    assert 3 in axes[layer_key(stem), "float32"][0].counts


def test_chunks_keep_the_order_and_bound_the_work():
    key = ("conv", (3, 3), (1, 1), (56, 56), 1)
    points = [LayerPoint(key, count, 256) for count in (64, 128, 256) * 4]
    parts = chunks(points)
    assert [point for part in parts for point in part] == points
    assert len(parts) > 1 and all(len(part) == 1 or sum(p.macs for p in part) <= 2e9 for part in parts)


def test_merged_visits_keep_the_least_disturbed():
    assert merged([[(2.0, 0.1, 5)], [(1.0, 0.3, 7)]]) == [(1.0, 0.1, 12)]


class _Exact:
    """Stands in for `LayerTimer`: a layer's time is a formula."""

    calls = 0

    def __init__(self, *arguments):
        pass

    def times(self, points, precision):
        _Exact.calls += 1
        scale = 1e-6 if precision == "float32" else 4e-7
        return [(scale * (point.macs + 50 * point.out_channels + 1000), 0.0, 10) for point in points]

    def conversion(self):
        return 0.25


@pytest.fixture
def exact(monkeypatch):
    """Profiles in which layers cost a formula and a whole network 1.3 times their sum plus 0.05 ms."""
    monkeypatch.setattr(profiling, "LayerTimer", _Exact)
    monkeypatch.setattr(_Exact, "calls", 0)

    def together(self, widths, precision):
        geometry = self._subject.graph.geometry
        shapes = geometry.shapes(np.array(widths))
        points = [
            [LayerPoint(layer_key(layer), int(i), int(o)) for layer, i, o in zip(geometry.layers, ins, outs, strict=True)]
            for ins, outs in zip(shapes.in_channels, shapes.out_channels, strict=True)
        ]
        return [1.3 * sum(time for time, _, _ in _Exact().times(row, precision)) + 0.05 for row in points]

    monkeypatch.setattr(profiling._Profiler, "_together", lambda self, models, widths, p: together(self, widths, p))
    monkeypatch.setattr(profiling._Profiler, "_versions", lambda self, precision, floats=(): None)


def run_profile(subject, journal, **changes):
    said, shares = [], []
    device = profile(subject, RUNTIMES["onnxruntime"], ProfileConfig(**changes), journal, said.append, shares.append)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    return device


def test_whole_networks_are_predicted_after_the_correction(subject, exact, tmp_path):
    device = run_profile(subject, Journal(tmp_path / "part", {}))
    assert device.precisions == ("int8", "float32")
    assert [check.precision for check in device.table.checks] == ["float32", "int8", "mixed"]
    for check in device.table.checks[:2]:
        assert check.mean_error < 0.02 < check.uncorrected_error
        assert check.rank_correlation > 0.99
        assert (check.fitted, len(check.measured)) == (20, 20)
    assert device.table.border == 0.25
    assert device.integer_bits == (8,)


def test_an_interrupted_profile_goes_on(subject, exact, tmp_path):
    path = tmp_path / "part"
    first = run_profile(subject, Journal(path, {"model": "small"}))
    lines = path.read_text().splitlines()
    measured = _Exact.calls
    path.write_text("\n".join(lines[: len(lines) // 2]) + '\n{"name": "torn')  # as a killed process leaves it
    again = run_profile(subject, Journal(path, {"model": "small"}))
    assert again == first
    assert measured < _Exact.calls < 2 * measured
    assert len(Journal(path, {"model": "other"})) == 0


@pytest.mark.parametrize("precisions", [("int8",), ("float32", "bfloat16")])
def test_one_float_precision_is_needed(precisions):
    with pytest.raises(InputError, match="must name one float precision"):
        ProfileConfig(precisions=precisions)


def test_a_quick_profile_writes_a_device_file(subject, tmp_path):
    output = tmp_path / "device.json"
    config = replace(ProfileConfig.quick(), seconds=0.001, scanned=12, fitted=3, checked=3, mixed=2)
    device = profile_run.profile_to_file(subject, output, "onnxruntime", config, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["device.json"]
    assert read_device(output) == device
    model = device.cost_models()["latency_ms"]
    eight = np.full((1, len(subject.graph.geometry.layers)), 8)
    assert 0 < model.total(subject.graph.geometry.shapes(None, eight, eight))[0] < 100
    assert "onnxruntime" in device.label and "1 thread" in device.label
    assert device.sources == ("measured by `secateur profile --quick` with small at 3x12x12",)
    assert [check.precision for check in device.table.checks] == ["float32", "int8", "mixed"]


def test_a_quick_profile_measures_far_fewer_sizes(subject):
    axes = {}
    for name, config in (("full", ProfileConfig()), ("quick", ProfileConfig.quick())):
        planned = grid_axes(subject.graph.geometry, (), config.precisions, config.density)
        axes[name] = sum(len(ins.counts) * len(outs.counts) for ins, outs in planned.values())
    assert axes["quick"] < axes["full"] / 2
    assert len(measured_counts(128, (8,), 8, density=QUICK)) < len(measured_counts(128, (8,), 8)) / 1.5


def test_eager_modules_are_profiled(subject, tmp_path):
    config = replace(ProfileConfig.quick(("float32",)), seconds=0.001, scanned=12, fitted=2, checked=2)
    device = profile_run.profile_to_file(subject, tmp_path / "device.json", "pytorch", config, Console(quiet=True))
    assert device.table.runtime == "pytorch" and device.integer_bits == ()
    assert device.cost_models()["latency_ms"].total(subject.graph.geometry.shapes())[0] > 0


def test_the_machine_is_described():
    assert set(profiling.describe_machine()) == {"processor", "cores", "system"}
    assert all(profiling.describe_machine().values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Name either a configuration or a model"),
        (["digits.yaml", "--model", "torchvision:resnet18"], "Name either a configuration or a model"),
        (["--model", "torchvision:resnet18", "--input", "3,x"], "--input` must be channels,height,width"),
        (["--model", "torchvision:resnet18", "--precisions", "int8"], "must name one float precision"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    result = CliRunner().invoke(app, ["profile", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_unusable_outputs_and_precisions_are_refused_before_measuring(subject, tmp_path):
    console = Console(quiet=True)
    with pytest.raises(InputError, match="cannot be written"):
        profile_run.profile_to_file(subject, tmp_path / "no" / "device.json", "onnxruntime", ProfileConfig(), console)
    with pytest.raises(InputError, match="onnxruntime cannot execute bfloat16"):
        profile_run.profile_to_file(
            subject, tmp_path / "device.json", "onnxruntime", ProfileConfig(precisions=("bfloat16", "int8")), console
        )
    assert list(tmp_path.iterdir()) == []


def test_the_journal_keeps_everything_at_once(tmp_path):
    path = tmp_path / "part"
    assert Journal(path, {"a": (1, 2)}).get("x", lambda: [1.5]) == [1.5]
    assert Journal(path, {"a": [1, 2]}).get("x", lambda: pytest.fail("measured again")) == [1.5]
    assert json.loads(path.read_text().splitlines()[1]) == {"name": "x", "value": [1.5]}
    with path.open("a") as file:
        file.write('{"name": "torn')  # as a killed process leaves it
    Journal(path, {"a": [1, 2]}).get("y", lambda: 2)
    assert len(Journal(path, {"a": [1, 2]})) == 2
