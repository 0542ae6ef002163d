"""Verification: an export is judged by its files alone; broken promises are found, and changed files are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from secateur.cost_models.device import Device
from secateur.cost_models.latency_table import Axis, LatencyTable, LayerGrid, layer_key
from secateur.envs.core import Budget, CompressionPolicy, InputError
from secateur.envs.metric import TOP1
from secateur.search.build import build_problem
from secateur.search.cli import app
from secateur.search.config import parse_config
from secateur.search.export import verify as module
from secateur.search.export.files import ONNX, POLICY, WEIGHTS, policy_checksum, read_export
from secateur.search.export.onnx_export import export_onnx
from secateur.search.export.verification import VERIFY, MeasuredLatency, read_verification
from secateur.search.export.verification_tables import verification_tables
from secateur.search.export.verify import INPUT_ERROR, check_limits, find_failures, main, verify_export, verify_in_fresh_process
from secateur.search.export.write import write_export
from secateur.search.results.finalize import finalist_scores

LATENCY = MeasuredLatency(2.5, 2.4, 2.6, 5.0, 4.9, 5.1, 100, promised=1.9, measured_here=True)
CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "calibration": 64, "validation": 256, "train": "rest"},
    "search": {"workers": 0, "precision": "float32"},
    "space": {"weight_bits": [4, 8, 32], "activation_bits": [8, 32]},
    "budgets": {"phone": {"macs": "<= 90%", "weight_bytes": "<= 90%", "top1_drop": "<= 20"}},
}


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_problem(parse_config(CONFIG, "test"))


@pytest.fixture
def unmeasured(monkeypatch):
    """Verifications with a fixed latency: measuring it exports the dense network, which takes seconds."""
    monkeypatch.setattr(module, "_latency", lambda *arguments: replace(LATENCY, measured_here=False))


def written(folder, problem, weight_bits, activation_bits, share=0.75):
    layers = len(problem.graph.geometry.layers)
    widths = tuple(int(share * group.units) for group in problem.graph.groups)
    policy = CompressionPolicy(widths, (weight_bits,) * layers, (activation_bits,) * layers)
    write_export(folder, problem, policy, problem.budgets[0], *finalist_scores(problem, policy))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, problem):
    return written(tmp_path_factory.mktemp("exports") / "phone", problem, 8, 8)


@pytest.fixture
def folder(tmp_path, exported):
    """A copy that a test may damage."""
    return shutil.copytree(exported, tmp_path / "phone")


def edit(folder, change):
    """Change policy.json as its own writer would: with new checksums."""
    document = json.loads((folder / POLICY).read_text())
    change(document)
    document["policy_sha256"] = policy_checksum(document)
    (folder / POLICY).write_text(json.dumps(document))


def verify(folder, **arguments):
    return verify_export(folder, seconds=0.01, **arguments)


def test_an_export_keeps_what_it_promises(folder, problem):
    found = verify(folder)
    assert found.passed and found.failures == ()
    assert {limit.name: limit.kept for limit in found.limits} == {"macs": True, "weight_bytes": True, "top1_drop": True}
    assert all(cost.found == pytest.approx(cost.promised, rel=1e-9) for cost in found.costs)
    assert [cost.name for cost in found.costs] == list(problem.space.costs.models)
    document, outputs = read_export(folder), found.outputs
    assert outputs.images == len(problem.task.data.test) and not outputs.exact
    assert outputs.pytorch_score == pytest.approx(document["scores"]["test"]["score"])
    assert outputs.agreement > 0.95 and 0 < outputs.mean_difference < 0.1
    assert found.latency.milliseconds > 0 and found.latency.dense_milliseconds > 0 and found.latency.promised is None
    assert found.files == {name: (folder / name).stat().st_size for name in (ONNX, WEIGHTS)}
    assert read_verification(folder) == found
    macs = found.limits[0]
    assert macs.margin == pytest.approx(1 - macs.found / macs.limit)
    assert [table.row_count > 0 for table in verification_tables(found)] == [True, True]


@pytest.fixture(scope="module")
def in_float(tmp_path_factory, problem):
    """An export without integers: weights of 4 bits, inputs in float."""
    return written(tmp_path_factory.mktemp("exports") / "float", problem, 4, 32)


def test_float_exports_are_held_to_the_last_digits(in_float, unmeasured):
    found = verify(in_float)
    assert found.passed and found.outputs.exact and found.outputs.agreement == 1
    assert found.outputs.max_difference < 1e-4


def test_a_fresh_process_finds_the_same_whatever_is_in_the_working_directory(folder, tmp_path, monkeypatch, unmeasured):
    """Files and folders that are called like modules of ours or of Python would end the process if it imported them."""
    for name in ("search.py", "json.py", "torch.py", "secateur.py", "envs/__init__.py", "agents/__init__.py"):
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise SystemExit('{name} was imported')\n")
    monkeypatch.chdir(tmp_path / "work")
    # The checkout may be found through a relative path, or through the working directory itself.
    monkeypatch.setenv("PYTHONPATH", str(Path(module.__file__).resolve().parents[2]))
    here, fresh = verify(folder), verify_in_fresh_process(folder)
    assert replace(fresh, latency=here.latency) == here


def test_the_sentence_of_a_fresh_process_is_its_error(folder, monkeypatch, capsys):
    (folder / ONNX).write_bytes(b"nothing")
    assert main([str(folder), "onnxruntime", "1", ""]) == INPUT_ERROR
    sentence = capsys.readouterr().err
    assert "model.onnx is not the file that was exported" in sentence
    done = SimpleNamespace(returncode=INPUT_ERROR, stderr=f"a warning\n{sentence}")
    monkeypatch.setattr(module.subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(InputError, match="model.onnx is not the file that was exported"):
        verify_in_fresh_process(folder)
    done.returncode = 1
    with pytest.raises(RuntimeError, match="in a fresh process failed:\na warning"):
        verify_in_fresh_process(folder)


@pytest.mark.parametrize("name", [WEIGHTS, ONNX, POLICY])
def test_truncated_files_are_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{name} is (damaged|not the file that was exported)"):
        verify(folder)
    path.unlink()
    with pytest.raises(InputError, match=f"is not an export: it has no {name}"):
        verify(folder)
    assert not (folder / VERIFY).exists()


def test_a_hand_edited_policy_is_named(folder):
    text = (folder / POLICY).read_text()
    (folder / POLICY).write_text(text.replace('"macs"', '"makes"'))
    with pytest.raises(InputError, match="policy.json is not the file that was exported"):
        verify(folder)
    (folder / POLICY).write_text(text)
    document = json.loads(text)
    del document["execution"]
    (folder / POLICY).write_text(json.dumps(document))
    with pytest.raises(InputError, match="has no `execution`"):
        verify(folder)


def test_a_promise_that_is_not_kept_is_a_failure(folder, unmeasured):
    edit(folder, lambda document: document["costs"].update(bops=1.0))
    (failure,) = verify(folder).failures
    assert failure.startswith("bops of the files is") and "promises 1" in failure


def test_a_broken_limit_is_a_failure(folder, unmeasured):
    edit(folder, lambda document: document["budget"]["limits"].update(macs=10.0))
    found = verify(folder)
    assert [limit.kept for limit in found.limits] == [False, True, True]
    assert "macs is" in found.failures[0] and "the budget allows 10" in found.failures[0]
    assert found.limits[0].margin < 0


def test_another_score_is_a_failure(folder, unmeasured):
    def change(document):
        document["scores"]["test"]["score"] -= 0.1
        document["scores"]["dense_validation"]["score"] += 0.3

    edit(folder, change)
    drop, test = verify(folder).failures
    assert drop.startswith("top1_drop is") and test.startswith("The test top-1 is")


@pytest.fixture(scope="module")
def other_onnx(tmp_path_factory, problem):
    """The ONNX file of another network, with two channels per group."""
    other = problem.finalist_assembler.assemble(CompressionPolicy((2, 2, 2)[: len(problem.graph.groups)], (32,) * 5, (32,) * 5))
    path = tmp_path_factory.mktemp("other") / ONNX
    export_onnx(other, problem.graph, problem.assembler.images, path)
    return path


@pytest.mark.parametrize("name", ["exported", "in_float"])
def test_an_onnx_file_with_other_answers_is_a_failure(tmp_path, other_onnx, name, request, unmeasured):
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "phone")
    shutil.copy(other_onnx, folder / ONNX)
    checksum = sha256((folder / ONNX).read_bytes()).hexdigest()
    edit(folder, lambda document: document["files"].update({ONNX: checksum}))
    failures = verify(folder).failures
    assert failures and all(ONNX in failure for failure in failures)


def test_latency_limits_are_judged_only_where_the_device_was_measured():
    document = {"budget": {"limits": {"latency_ms": 2.0}, "metric_drop": None}}
    (limit,) = check_limits(document, (), LATENCY, 0.9)
    assert limit.found == 2.5 and limit.kept is False and limit.margin == pytest.approx(-0.25)
    assert _failures_of(limit) == ["latency_ms is 2.5 ms (measured), but the budget allows 2 ms."]
    (limit,) = check_limits(document, (), replace(LATENCY, measured_here=False), 0.9)
    assert limit.kept is None and limit.margin is None and "not measured here" in limit.how
    assert _failures_of(limit) == []


def test_a_latency_limit_in_percent_is_one_of_the_dense_network_measured_beside_it():
    """2.5 of 5 ms are half, though 2 ms were predicted for half of a dense network of 4 ms."""
    document = {"budget": {"limits": {"latency_ms": 2.0}, "metric_drop": None, "shares": {"latency_ms": 0.5}}}
    (limit,) = check_limits(document, (), LATENCY, 0.9)
    assert (limit.limit, limit.found, limit.kept, limit.how) == (2.5, 2.5, True, "measured; 50.0 % of the dense network")
    (limit,) = check_limits(document, (), replace(LATENCY, dense_milliseconds=4.9), 0.9)
    assert limit.kept is False and limit.limit == 2.45


def _failures_of(limit):
    document = {"scores": {"validation": {"score": 0.9}, "dense_validation": {"score": 0.9}}, "metric": asdict(TOP1)}
    outputs = SimpleNamespace(recorded_score=None, exact=True, max_difference=0.0)
    return find_failures(document, outputs, (), (limit,), 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runtime": "tensorflow"}, "no runtime `tensorflow`"),
        ({"overrides": ["data.root"]}, "overrides: data.root: must read section.key=value"),
        ({"overrides": ["model.factory=x:y"]}, "overrides: model.factory: must start with `data.`"),
        ({"overrides": ["data.rot=x"]}, "`data.rot`"),
        ({"overrides": ["data.validation=many"]}, "`data.validation`"),
        ({"overrides": ["data.name=cifar10", "data.root=nowhere"]}, "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        verify(folder, **arguments)
    assert not (folder / VERIFY).exists()


def test_the_command_prints_tables_and_its_exit_code_tells_the_verdict(folder, tmp_path, unmeasured):
    def secateur(*arguments):
        return CliRunner().invoke(app, ["verify", *map(str, arguments)])

    kept = secateur(folder)
    assert kept.exit_code == 0, kept.output
    assert "weight_bytes" in kept.stdout and "yes" in kept.stdout and "verified:" in kept.stdout
    assert (folder / VERIFY).is_file()
    edit(folder, lambda document: document["budget"]["limits"].update(macs=10.0))
    broken = secateur(folder)
    assert broken.exit_code == 1 and "broken: macs is" in broken.stderr and "verified" not in broken.stdout
    missing = secateur(tmp_path)
    assert missing.exit_code == 2 and missing.stderr.startswith("error: ") and "is not an export" in missing.stderr
    assert secateur(folder, "--threads", "0").exit_code == 2


def _device(problem, slow_in_integers):
    """A measured device that takes 1 ms for every layer in float32, and 2 or 0.1 ms in int8."""
    axis, grids = Axis((1, 512)), {}
    for layer in problem.graph.geometry.layers:
        for precision, time in (("float32", 1.0), ("int8", 2.0 if layer.name in slow_in_integers else 0.1)):
            outs = axis if layer_key(layer)[-1] else Axis((1,))
            times = ((time,) * len(outs.counts),) * 2
            grids.setdefault((layer_key(layer), precision), LayerGrid(*layer_key(layer), precision, axis, outs, times))
    table = LatencyTable("test", "onnxruntime", "1", 1, 1, 1, "float32", tuple(grids.values()))
    return Device(1, "here", "measured", (), "float32", (8,), {"processor": "none"}, table)


def test_layers_that_are_faster_in_float_are_executed_so_and_predicted_so(tmp_path, problem, unmeasured):
    device = _device(problem, slow_in_integers=("conv1", "conv2", "conv3"))
    policy = CompressionPolicy(tuple(group.units // 2 for group in problem.graph.groups), (8, 4, 32, 8, 8), (8,) * 5)
    shapes = problem.graph.geometry.shapes(policy.widths, policy.weight_bits, policy.activation_bits)
    latency = float(device.cost_models()["latency_ms"].total(shapes)[0])
    validation, test = finalist_scores(problem, policy)
    validation = replace(validation, costs={**validation.costs, "latency_ms": latency})
    dense = replace(problem.dense, costs={**problem.dense.costs, "latency_ms": 5.0})
    profiled = replace(problem, config=problem.config.model_copy(update={"device": device}), dense=dense)
    write_export(tmp_path / "phone", profiled, policy, Budget("wide", {"macs": 1e9}), validation, test)
    execution = read_export(tmp_path / "phone")["execution"]
    expected = {"conv1": "float32", "conv2": "float32", "conv3": "float32", "conv4": "int8", "linear": "int8"}
    assert {layer["name"]: layer["executed"] for layer in execution} == expected
    assert [layer["name"] for layer in execution if layer["kept_in_float"]] == ["conv1", "conv2"]
    assert execution[0]["note"].startswith("It runs in float32, which is faster on the device than 8-bit integers")
    found = verify(tmp_path / "phone")
    assert found.passed and next(cost for cost in found.costs if cost.name == "latency_ms").found == pytest.approx(latency)
    assert latency == pytest.approx(sum(0.1 if executed == "int8" else 1.0 for executed in expected.values()))


def test_an_earlier_export_keeps_its_promised_latency(tmp_path, problem, exported, unmeasured):
    """Earlier versions executed every layer with bits in integers, and predicted that latency, although float32 is faster."""
    folder = shutil.copytree(exported, tmp_path / "phone")
    device = _device(problem, slow_in_integers=[layer.name for layer in problem.graph.geometry.layers])

    def change(document):
        document["device"] = device.document()
        document["costs"]["latency_ms"] = 2.0 * len(document["execution"])
        document["budget"].pop("shares")
        for layer in document["execution"]:
            layer.pop("kept_in_float")

    edit(folder, change)
    assert verify(folder).passed


def test_an_export_that_was_not_verified_is_named(folder):
    with pytest.raises(InputError, match="is not a verified export: it has no verify.json"):
        read_verification(folder)
    (folder / VERIFY).write_text('{"schema": 1}')
    with pytest.raises(InputError, match="verify.json is damaged"):
        read_verification(folder)


def test_data_of_a_policy_cannot_make_other_functions_run(folder):
    edit(folder, lambda d: d["data_config"].update(name="os:system"))
    with pytest.raises(InputError, match="policy.json names `os:system`.* importing `os`"):
        verify(folder)
    with pytest.raises(InputError, match="`data.name: os:system` failed"):
        verify(folder, overrides=["data.name=os:system"])
