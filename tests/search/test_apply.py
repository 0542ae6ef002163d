"""`secateur apply`: a policy of an export on other weights of the same architecture."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur.envs.core import InputError
from secateur.envs.tasks.models import load_model
from secateur.envs.training.descent import Descent
from secateur.search.build import build_problem
from secateur.search.cli import app
from secateur.search.config import parse_config
from secateur.search.export.files import POLICY, policy_checksum, read_export
from secateur.search.results.winners import check_export
from secateur.search.run.search import search

BUDGET = "small"


def values(folder, **changes):
    return {
        "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
        "data": {"name": "synthetic", "train": 256, "calibration": 64, "validation": 200, "test": 300},
        "search": {"agent": "random", "evaluations": 4, "workers": 0, "precision": "float32"},
        "space": {"prune_ratio": [0.25, 0.75], "weight_bits": [4, 8]},
        "recovery": [],
        "budgets": {BUDGET: {"macs": "<= 50%"}},
        "finalize": {"top": 1, "verify": False, "recovery": ["batch_norm"], "training": {"epochs": 0, "batch_size": 32}},
        "output": {"root": str(folder), "name": "run"},
        **changes,
    }


@pytest.fixture(scope="module", autouse=True)
def _without_verification():
    """Exports are not verified, because each verification starts a process; the slow test at the end verifies one."""
    checked = SimpleNamespace(passed=True, failures=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.search.apply.check_export", lambda problem, folder: checked)
        yield


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    run = search(parse_config(values(tmp_path_factory.mktemp("runs")), "test.yaml"))
    return secateur.export(run, budget=BUDGET)[0].folder


def saved(model, path):
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def other_weights(tmp_path):
    """Random weights, in which other channels are the important ones."""
    torch.manual_seed(3)
    dense = load_model("secateur:synthetic")
    for parameter in dense.parameters():
        parameter.data = torch.randn_like(parameter) * parameter.detach().std()
    return saved(dense, tmp_path / "other.pth")


def kept(folder):
    return [group["kept"] for group in read_export(folder)["groups"]]


def test_channels_are_ranked_in_the_new_weights_with_the_same_policy(export, other_weights, tmp_path):
    applied = secateur.apply(export, other_weights, output=tmp_path / "out")
    old, new = read_export(export), read_export(applied.folder)
    assert new["policy"] == old["policy"]
    assert new["costs"] == old["costs"]
    assert kept(applied.folder) != kept(export)


def test_channels_can_be_kept(export, other_weights, tmp_path):
    applied = secateur.apply(export, other_weights, channels="keep", output=tmp_path / "out")
    assert kept(applied.folder) == kept(export)


def test_the_same_weights_give_the_same_network(export, tmp_path):
    model = build_problem(parse_config(values(tmp_path), "test.yaml")).assembler.model
    applied = secateur.apply(export, saved(model, tmp_path / "same.pth"), output=tmp_path / "out")
    one, other = (secateur.load_compressed(folder).state_dict() for folder in (export, applied.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_export(applied.folder)["config"]["model"]["weights"] == str(tmp_path / "same.pth")


def test_the_command_trains_and_names_the_scores(export, other_weights, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.search.export.verification_tables.verification_tables", lambda checked: [])
    command = [
        "apply",
        str(export / POLICY),
        "--weights",
        str(other_weights),
        "--epochs",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*command, "--set", "finalize.training.learning_rate=0.02"])
    assert result.exit_code == 0, result.output
    assert "after the training" in result.output
    training = read_export(tmp_path / "out")["training"]
    assert training["epochs"] == 2
    assert training["recipe"]["learning_rate"] == 0.02
    assert not list(tmp_path.glob(".out*"))


def test_an_interrupted_training_continues(export, other_weights, tmp_path, monkeypatch):
    arguments = {"epochs": 3, "overrides": ["finalize.training.learning_rate=0.02"]}
    whole = secateur.apply(export, other_weights, output=tmp_path / "whole", **arguments)
    epoch, done = Descent.epoch, []

    def interrupted(self, *args, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(epoch(self, *args, **kwargs))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Descent, "epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            secateur.apply(export, other_weights, output=tmp_path / "cut", **arguments)
    cut = secateur.apply(export, other_weights, output=tmp_path / "cut", **arguments)
    one, other = (secateur.load_compressed(found.folder).state_dict() for found in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def rewritten(export, folder, change):
    """Return a copy of an export whose policy.json is changed, with the right checksum."""
    shutil.copytree(export, folder)
    document = read_export(export)
    change(document)
    document["policy_sha256"] = policy_checksum(document)
    (folder / POLICY).write_text(json.dumps(document))
    return folder


def test_another_architecture_is_refused_with_the_first_layer_that_differs(export, other_weights, tmp_path):
    second = list(read_export(export)["architecture"])[1]

    def widen(document):
        document["architecture"][second][2] += 1

    with pytest.raises(InputError, match=f"first layer that differs is `{second}`"):
        secateur.apply(rewritten(export, tmp_path / "changed", widen), other_weights, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weights": "nothing.pth"}, "nothing.pth` is not a file"),
        ({"weights": nn.Linear(2, 2)}, "must be a file"),
        ({"channels": "guess"}, "must be rank or keep"),
        ({"epochs": 0}, "at least 1"),
    ],
)
def test_bad_input(export, other_weights, tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        secateur.apply(export, **{"weights": other_weights, "output": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_and_a_taken_folder_are_refused(export, other_weights, tmp_path):
    other = saved(nn.Sequential(nn.Conv2d(3, 5, 3)), tmp_path / "wrong.pth")
    with pytest.raises(InputError, match="wrong.pth"):
        secateur.apply(export, other, output=tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        secateur.apply(export, other_weights, output=export)


def test_an_export_of_an_earlier_version_says_what_to_do(export, other_weights, tmp_path):
    old = rewritten(export, tmp_path / "old", lambda document: document.pop("config"))
    with pytest.raises(InputError, match="Export the policy again"):
        secateur.apply(old, other_weights)


class Small(nn.Module):
    """A network of the user's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_model_objects(tmp_path):
    torch.manual_seed(0)
    model, images = Small(), torch.randn(64, 3, 8, 8)
    run = secateur.search(
        model,
        inputs=(images[:1],),
        calibration=[images],
        agent="random",
        evaluations=2,
        workers=0,
        budgets={"b": {"macs": "<= 60%"}},
        output={"root": str(tmp_path), "name": "run"},
        finalize={"verify": False},
    )
    export = run.export(budget="b")[0].folder
    other = Small()
    applied = secateur.apply(export, other, given=run.given, output=tmp_path / "out")
    assert applied.dense == 0  # the divergence is that from the new dense model, not from the earlier one
    assert applied.validation < run.given.task.evaluate(other, "validation").score
    with pytest.raises(InputError, match="same architecture"):
        secateur.apply(export, nn.Linear(2, 2), given=run.given, output=tmp_path / "wrong")


@pytest.mark.slow
def test_the_command_verifies_the_files_in_a_fresh_process(export, other_weights, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.search.apply.check_export", check_export)
    result = CliRunner().invoke(app, ["apply", str(export), "--weights", str(other_weights), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "verify.json").is_file()
