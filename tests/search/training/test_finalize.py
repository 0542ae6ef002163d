"""`secateur finalize`: winners are trained once, exported and verified, and an interrupted training continues."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import secateur
from secateur.envs.core import InputError
from secateur.envs.tasks.splits import Split
from secateur.envs.training.descent import Descent
from secateur.envs.training.recipe import DistillationConfig
from secateur.search.build import build_problem
from secateur.search.cli import app
from secateur.search.config import parse_config
from secateur.search.export.files import read_export
from secateur.search.export.onnx_export import export_onnx
from secateur.search.results.document import read_front
from secateur.search.results.winners import check_export
from secateur.search.run.folder import load_manifest
from secateur.search.run.search import search
from secateur.search.training.curve import CHECKPOINT, CURVE, Curve
from secateur.search.training.finalize import finalize
from secateur.search.training.samples import training_samples
from secateur.search.training.tables import curve_table

RECIPE = {"batch_size": 32, "learning_rate": 0.02}


def values(folder, **changes):
    return {
        "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
        "data": {"name": "synthetic", "train": 256, "calibration": 64, "validation": 200, "test": 300},
        "search": {"agent": "random", "evaluations": 8, "workers": 0, "precision": "float32"},
        "space": {"prune_ratio": [0.25, 0.75], "weight_bits": [4]},
        "recovery": [],
        "budgets": {"small": {"macs": "<= 50%"}, "tiny": {"macs": "<= 30%"}},
        "finalize": {"top": 2, "verify": False, "recovery": ["batch_norm"], "training": {"epochs": 0, **RECIPE}},
        "output": {"root": str(folder), "name": "run"},
        **changes,
    }


@pytest.fixture(scope="module", autouse=True)
def _without_onnx():
    """Exports with an empty model.onnx, which takes no time; the slow test at the end checks a real one."""

    def write(network, graph, images, path, in_float):
        path.write_bytes(b"")
        return []

    checked = SimpleNamespace(passed=True, failures=(), outputs=SimpleNamespace(runtime_score=0.75))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.search.export.write.export_onnx", write)
        patch.setattr("secateur.search.training.winners.check_export", lambda problem, folder: checked)
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return search(parse_config(values(tmp_path_factory.mktemp("runs")), "test.yaml"))


@pytest.fixture(scope="module")
def finished(searched, tmp_path_factory):
    """A run after `finalize`, with what that returned."""
    run = shutil.copytree(searched, tmp_path_factory.mktemp("finished") / "run")
    return run, secateur.finalize(run, epochs=2)


@pytest.fixture
def run(tmp_path, searched):
    """A run that a test may change."""
    return shutil.copytree(searched, tmp_path / "run")


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(Descent, "epoch", lambda *rest: pytest.fail("it trains"))


def curve_of(winner, run):
    (folder,) = [path for path in (run / "training").iterdir() if path.name.startswith(f"{winner.evaluation}-")]
    return folder


def test_winners_of_all_budgets_are_trained_exported_and_verified(finished):
    run, winners = finished
    front = read_front(run)
    assert [winner.budget for winner in winners] == ["small", "tiny"]
    for winner in winners:
        stages = [(stage.stage, stage.epoch) for stage in winner.stages]
        assert stages == [("dense", None), ("search", None), ("repair", None), ("epoch", 1), ("epoch", 2), ("trained", None),
                          ("exported", None)]  # fmt: skip
        assert winner.folder == run / "exports" / f"{winner.budget}-trained" and winner.verified and winner.notes == []
        tested = next(point for point in front["final"]["points"] if point["budget"] == winner.budget)
        assert tested["evaluation"] == winner.evaluation, "the winner of the search is trained"
        dense, searched, repair, *_, trained, exported = winner.stages
        assert (dense.validation, dense.test) == (front["dense"]["score"], front["final"]["dense"]["score"])
        assert (repair.validation, repair.test) == (tested["validation_score"], tested["score"])
        losses = [stage.loss for stage in winner.stages if stage.loss is not None]
        assert losses[1] < losses[0], "training a network that is only recalibrated lowers its loss"
        document = read_export(winner.folder)
        assert document["scores"]["validation"]["score"] == trained.validation
        assert document["scores"]["test"]["score"] == trained.test
        assert document["training"]["recipe"] == {**trained.training["recipe"], **RECIPE} and document["training"]["epochs"] == 2
        assert exported.test == 0.75 and exported.passed
        model = winner.model()
        assert {bits["weight_bits"] for bits in document["layers"]} == {4} and not model.training


def test_the_curve_is_in_the_run_and_in_the_table(finished):
    run, winners = finished
    lines = [json.loads(line) for line in (curve_of(winners[0], run) / CURVE).read_text().splitlines()]
    epochs = [line for line in lines if line["stage"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2] and all(line["loss"] > 0 and line["seconds"] > 0 for line in epochs)
    assert epochs[0]["learning_rate"] > epochs[1]["learning_rate"] == pytest.approx(0, abs=1e-9)
    table = curve_table(winners[0])
    assert list(table.columns[0].cells) == [
        "dense", "after the search", "after the repair", "epoch 1", "epoch 2", "after the training", "exported, verified"
    ]  # fmt: skip
    assert list(table.columns[3].cells)[-2] == winners[0].metric.text(winners[0].test_score)


def test_a_finished_training_is_not_done_again(finished, no_training, monkeypatch):
    run, winners = finished
    monkeypatch.setattr("secateur.search.training.finalize.build_problem", lambda *rest: pytest.fail("it builds the problem"))
    assert secateur.finalize(run, epochs=2) == winners
    assert secateur.load_run(run).finalize(budget="tiny", epochs=2) == winners[1:]


def test_a_lost_export_is_written_again_without_training(finished, tmp_path, no_training):
    run = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(run / "exports" / "tiny-trained")
    (winner,) = secateur.finalize(run, budget="tiny", epochs=2)
    assert winner.verified and winner.test_score == finished[1][1].test_score


class Killed(Exception):
    pass


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_training_continues(finished, run, monkeypatch, epoch):
    """The process dies in the middle of an epoch; the next one ends with the same network."""
    trained, left = Descent.epoch, [epoch]

    def dying(self, *rest):
        left[0] -= 1
        if not left[0]:
            self.optimizer.step = lambda: (_ for _ in ()).throw(Killed)
        return trained(self, *rest)

    monkeypatch.setattr(Descent, "epoch", dying)
    with pytest.raises(Killed):
        secateur.finalize(run, budget="small", epochs=2)
    assert not (run / "exports" / "small-trained").exists()
    monkeypatch.undo()
    (winner,) = secateur.finalize(run, budget="small", epochs=2)
    straight = finished[1][0]
    assert [stage.loss for stage in winner.stages] == [stage.loss for stage in straight.stages]
    one, other = winner.model().state_dict(), straight.model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_checkpoint_of_another_policy_is_refused(finished, run):
    (winner, _), recipe = finished[1], None
    source = curve_of(winner, finished[0])
    recipe = source.name.partition("-")[2]
    other = next(p["evaluation"] for p in read_front(run)["final"]["points"] if p["evaluation"] != winner.evaluation)
    budget = next(p["budget"] for p in read_front(run)["final"]["points"] if p["evaluation"] == other)
    target = run / "training" / f"{other}-{recipe}"
    target.mkdir(parents=True)
    shutil.copy(source / CHECKPOINT, target / CHECKPOINT)
    with pytest.raises(InputError, match="is the checkpoint of another training: its policy differs. Remove it to train anew."):
        secateur.finalize(run, budget=budget, top=2, epochs=2)


def test_the_best_of_several_finalists_is_exported(run):
    (winner,) = secateur.finalize(run, budget="small", top=2, epochs=1)
    curves = [Curve.read(folder) for folder in (run / "training").iterdir()]
    assert len(curves) == 2
    scores = [curve.find("trained").validation for curve in curves]
    assert winner.validation_score == max(scores)


def test_a_limit_of_the_loss_holds_after_the_training(run):
    notes = []
    front = read_front(run)
    front["budgets"]["small"]["metric_drop"] = -1.0
    (run / "front.json").write_text(json.dumps(front))
    assert finalize(run, budget="small", epochs=1, note=notes.append) == []
    assert any("No trained network of budget `small` meets its limit" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1"),
        ({"top": 0}, "`top` must be at least 1"),
        ({"budget": "large"}, "There is no budget `large`"),
        ({"overrides": ["finalize.training.temperature=0"]}, "temperature` of the training must be .*above 0"),
        ({"overrides": ["finalize.training.flips=true"]}, "`training` has no option `flips`. Did you mean `flip`"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(run, options, message):
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(InputError, match=message):
        secateur.finalize(run, **options)
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_search_trains_its_winners_at_its_end(tmp_path, finished):
    config = values(tmp_path, finalize={**values(tmp_path)["finalize"], "training": {"epochs": 2, **RECIPE}})
    folder = search(parse_config(config, "test.yaml"))
    shown = CliRunner().invoke(app, ["finalize", str(folder)])
    assert shown.exit_code == 0 and "after the training" in shown.stdout and "exported, verified" in shown.stdout
    found = secateur.load_run(folder).finalize()
    assert [winner.test_score for winner in found] == [winner.test_score for winner in finished[1]]


@pytest.fixture(scope="module")
def problem(searched):
    return build_problem(load_manifest(searched)[0])


def with_data(problem, **changes):
    config = problem.config
    return replace(problem, config=config.model_copy(update={"data": config.data.model_copy(update=changes)}))


def test_all_training_images_are_used_unless_the_configuration_says_how_many(problem):
    samples, source = training_samples(problem, DistillationConfig())
    assert samples.count == 256 and source == "The networks are trained on 256 images with labels."
    assert training_samples(with_data(problem, train=0), DistillationConfig())[0].count == 1024


def test_without_training_images_the_dense_model_is_imitated(problem, monkeypatch):
    """Their labels are not used, even where calibration samples have some."""
    data = replace(problem.task.data, train=None)
    monkeypatch.setattr("secateur.search.training.samples.load_data", lambda **options: data)
    samples, source = training_samples(problem, DistillationConfig())
    assert samples.count == 64 and samples.at(torch.arange(3)).targets is None
    assert source.startswith("There are no training images: ") and source.endswith("64 calibration samples, without labels.")
    with pytest.raises(InputError, match="`finalize.training.distillation` must be above 0"):
        training_samples(problem, DistillationConfig(distillation=0.0))
    with pytest.raises(InputError, match="there is nothing to train on"):
        training_samples(replace(problem, task=replace(problem.task, data=replace(data, calibration=None))), DistillationConfig())


def test_images_are_not_moved_away_from_targets_that_are_arrays(problem, monkeypatch):
    split = Split(np.zeros((4, 3, 8, 8), np.float32), np.zeros((4, 8, 8), np.int64))
    moved = SimpleNamespace(max_bytes=0)
    data = SimpleNamespace(train=split, device=torch.device("cpu"), moved=moved, on=lambda device: data)
    monkeypatch.setattr("secateur.search.training.samples.load_data", lambda **options: data)
    assert training_samples(problem, DistillationConfig())[0].count == 4
    with pytest.raises(InputError, match="move the images but not their targets"):
        training_samples(problem, DistillationConfig(flip=True))


def test_a_model_object_is_trained_without_labels(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()
    inputs = torch.randn(64, 6)
    found = secateur.search(
        model,
        inputs=inputs[:1],
        calibration=inputs.split(16),
        budgets={"small": {"macs": "<= 60%"}},
        agent="uniform",
        evaluations=2,
        workers=0,
        finalize={"verify": False, "recovery": [], "top": 1},
        output={"root": str(tmp_path)},
    )
    (winner,) = found.finalize(epochs=20, overrides=["finalize.training.learning_rate=0.05"])
    repair, trained = (next(stage for stage in winner.stages if stage.stage == name) for name in ("repair", "trained"))
    assert trained.validation < repair.validation, "the divergence falls"
    assert "A task of functions has no training images" in trained.training["samples"]
    assert (
        isinstance(winner.model(), torch.nn.Module)
        and found.finalize(epochs=20, overrides=["finalize.training.learning_rate=0.05"])[0].model()
    )


@pytest.mark.slow
@pytest.mark.numerics
def test_the_digits_are_trained_exported_and_verified(tmp_path, monkeypatch):
    """A real ONNX file, checked by a fresh process; a network with a tenth of the multiply-accumulates gains by training."""
    monkeypatch.setattr("secateur.search.export.write.export_onnx", export_onnx)
    monkeypatch.setattr("secateur.search.training.winners.check_export", check_export)
    config = {
        "model": {"factory": "secateur:digits", "weights": "trained", "input": [1, 8, 8]},
        "data": {"name": "digits", "train": "rest", "calibration": 128, "validation": 300},
        "search": {"agent": "uniform", "evaluations": 2, "workers": 0, "precision": "float32"},
        "space": {"prune_ratio": [0.0, 0.9], "weight_bits": [4]},
        "recovery": [],
        "budgets": {"tenth": {"macs": "<= 10%"}},
        "finalize": {"verify": False, "top": 1, "training": {"epochs": 5, "batch_size": 32, "learning_rate": 0.02}},
        "output": {"root": str(tmp_path), "name": "run"},
    }
    (winner,) = secateur.load_run(search(parse_config(config, "test.yaml"))).finalize()
    repair, trained, exported = (next(s for s in winner.stages if s.stage == name) for name in ("repair", "trained", "exported"))
    assert winner.verified and trained.validation > repair.validation + 0.02
    assert abs(exported.test - trained.test) < 0.02
