"""Verification: an export is judged by its files alone; whatever does not hold is found, and whatever was changed is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256

import pytest
from typer.testing import CliRunner

from secateur.envs.core import CompressionPolicy, InputError
from secateur.search.build import build_problem
from secateur.search.cli import app
from secateur.search.config import parse_config
from secateur.search.export.folder import ONNX, POLICY, WEIGHTS, policy_checksum, read_export, write_export
from secateur.search.export.onnx_export import export_onnx
from secateur.search.export.verification import (
    VERIFY,
    MeasuredLatency,
    _failures,
    _limits,
    read_verification,
    verification_tables,
    verify_export,
    verify_in_fresh_process,
)
from secateur.search.results.finalize import finalist_scores

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
    assert outputs.images == len(problem.data.test) and not outputs.exact
    assert outputs.pytorch_top1 == pytest.approx(document["scores"]["test"]["top1"])
    assert outputs.agreement > 0.95 and 0 < outputs.mean_difference < 0.1
    assert found.latency.milliseconds > 0 and found.latency.dense_milliseconds > 0 and found.latency.promised is None
    assert found.files == {name: (folder / name).stat().st_size for name in (ONNX, WEIGHTS)}
    assert read_verification(folder) == found
    macs = found.limits[0]
    assert macs.margin == pytest.approx(1 - macs.found / macs.limit)
    assert [table.row_count > 0 for table in verification_tables(found)] == [True, True]


def test_float_exports_are_held_to_the_last_digits(tmp_path, problem):
    found = verify(written(tmp_path / "phone", problem, 32, 32))
    assert found.passed and found.outputs.exact and found.outputs.agreement == 1
    assert found.outputs.max_difference < 1e-4


def test_weights_with_bits_alone_are_held_to_the_last_digits_too(tmp_path, problem):
    found = verify(written(tmp_path / "phone", problem, 4, 32))
    assert found.passed and found.outputs.exact and found.outputs.max_difference < 1e-4


def test_a_fresh_process_finds_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, fresh = verify(folder), verify_in_fresh_process(folder)
    assert replace(fresh, latency=here.latency) == here
    (folder / ONNX).write_bytes(b"nothing")
    with pytest.raises(InputError, match="model.onnx is not the file that was exported"):
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


def test_a_promise_that_is_not_kept_is_a_failure(folder):
    edit(folder, lambda document: document["costs"].update(bops=1.0))
    (failure,) = verify(folder).failures
    assert failure.startswith("bops of the files is") and "promises 1" in failure


def test_a_broken_limit_is_a_failure(folder):
    edit(folder, lambda document: document["budget"]["limits"].update(macs=10.0))
    found = verify(folder)
    assert [limit.kept for limit in found.limits] == [False, True, True]
    assert "macs is" in found.failures[0] and "the budget allows 10" in found.failures[0]
    assert found.limits[0].margin < 0


def test_another_score_is_a_failure(folder):
    def change(document):
        document["scores"]["test"]["top1"] -= 0.1
        document["scores"]["dense_validation"]["top1"] += 0.3

    edit(folder, change)
    drop, test = verify(folder).failures
    assert drop.startswith("top1_drop is") and test.startswith("The test top-1 is")


@pytest.mark.parametrize("bits", [8, 32])
def test_an_onnx_file_that_answers_otherwise_is_a_failure(tmp_path, problem, bits):
    folder = written(tmp_path / "phone", problem, bits, bits)
    other = problem.finalist_assembler.assemble(CompressionPolicy((2, 2, 2)[: len(problem.graph.groups)], (32,) * 5, (32,) * 5))
    export_onnx(other, problem.graph, (3, 8, 8), problem.assembler.images, folder / ONNX)

    checksum = sha256((folder / ONNX).read_bytes()).hexdigest()
    edit(folder, lambda document: document["files"].update({ONNX: checksum}))
    failures = verify(folder).failures
    assert failures and all(ONNX in failure for failure in failures)


def test_latency_limits_are_judged_only_where_the_device_was_measured(folder):
    document = {**read_export(folder), "budget": {"limits": {"latency_ms": 2.0}, "top1_drop": None}}
    latency = MeasuredLatency(2.5, 2.4, 2.6, 5.0, 4.9, 5.1, 100, promised=1.9, measured_here=True)
    (limit,) = _limits(document, (), latency, 0.9)
    assert limit.found == 2.5 and limit.kept is False and limit.margin == pytest.approx(-0.25)
    outputs = verify(folder).outputs
    top1 = document["scores"]["validation"]["top1"]
    assert _failures(document, outputs, (), (limit,), top1) == ["latency_ms is 2.5 ms (measured), but the budget allows 2 ms."]
    (limit,) = _limits(document, (), replace(latency, measured_here=False), 0.9)
    assert limit.kept is None and limit.margin is None and "not measured here" in limit.how
    assert _failures(document, outputs, (), (limit,), top1) == []


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


def test_the_command_prints_tables_and_tells_by_its_exit_code(folder, tmp_path):
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


def test_what_was_not_verified_is_named(folder):
    with pytest.raises(InputError, match="is not a verified export: it has no verify.json"):
        read_verification(folder)
    (folder / VERIFY).write_text('{"schema": 1}')
    with pytest.raises(InputError, match="verify.json is damaged"):
        read_verification(folder)
