"""The public API: a search from Python, what its run offers, and runs and exports of earlier versions."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from typer.testing import CliRunner

import secateur
from secateur.envs.core import CompressionPolicy
from secateur.search.cli import app

OLD = Path(__file__).parent / "data" / "version_0_1"
"""A run of version 0.1 with an export, and the weights of its model."""

CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": str(OLD / "weights.safetensors"), "input": [3, 8, 8]},
    "data": {"name": "synthetic", "validation": 256, "calibration": 64},
    "search": {"agent": "random", "evaluations": 8, "workers": 0, "precision": "float32"},
    "space": {"weight_bits": [4, 8], "activation_bits": [8]},
    "budgets": {"phone": {"macs": "<= 60%"}, "watch": {"macs": "<= 40%", "weight_bytes": "<= 20%"}},
    "finalize": {"top": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(folder / "cache"))
        return secateur.search(CONFIG, {"output.root": folder / "runs"})


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may change."""
    shutil.copytree(run, tmp_path / "copy")
    return secateur.load_run(tmp_path / "copy")


# ---------------------------------------------------------------------------------------------------------------- names


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, secateur; print(sorted({'torch', 'ray', 'optuna', 'pandas', 'numpy', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", secateur.__all__)
def test_every_public_name_exists_and_says_what_it_is(name):
    value = getattr(secateur, name)
    assert isinstance(value, str) or value.__doc__.strip().endswith((".", "E", ")"))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute `serch`"):
        secateur.serch  # noqa: B018
    assert dir(secateur) == sorted(secateur.__all__)


def test_the_search_is_a_function_and_a_package():
    import secateur.search.loop

    assert callable(secateur.search) and secateur.search.loop.run_loop


def test_errors_keep_both_wordings():
    both = pickle.loads(pickle.dumps(secateur.InputError("`output` is wrong", "--output is wrong")))
    assert str(both) == "`output` is wrong" and both.command == "--output is wrong"
    assert secateur.InputError("`x` is wrong").command == "`x` is wrong"


# ---------------------------------------------------------------------------------------------------------------- a run


def test_a_run_has_its_configuration_and_stands_for_its_folder(run):
    assert run.config.search.evaluations == 8 and run.config.output.root == str(run.folder.parent)
    assert Path(run) == run.folder and str(run) == str(run.folder)
    assert secateur.load_run(run) == run


def test_trials_are_all_evaluations(run):
    trials = run.trials
    assert list(trials.index) == list(range(8)) and set(trials["budget"]) == {"phone", "watch"}
    assert len(run.study.trials) == 8
    for number, trial in enumerate(run.study.trials):
        assert trials.loc[number, "top1"] == trial.values[0]
        assert all(trials.loc[number, name] == value for name, value in trial.params.items())
    assert trials["feasible"].all() and (trials["state"] == "COMPLETE").all()


def test_trials_of_a_run_without_any_are_an_empty_table(copy):
    journal = copy.folder / "study.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if json.loads(line)["op_code"] < 4))
    assert isinstance(copy.trials, pandas.DataFrame) and copy.trials.empty


def test_the_front_is_the_table_in_its_file(run):
    front = run.front
    pandas.testing.assert_frame_equal(front, pandas.read_csv(run.folder / "front.csv"))
    document = run.document
    assert list(front["evaluation"]) == [point["evaluation"] for point in document["points"]]
    assert list(front.loc[front["on_front"], "evaluation"]) == sorted(document["front"])


def test_the_winner_has_policy_scores_and_a_model(run):
    for budget, limits in (("phone", {"macs": 0.6}), ("watch", {"macs": 0.4, "weight_bytes": 0.2})):
        winner = run.best(budget)
        dense = run.document["dense"]["costs"]
        assert isinstance(winner.policy, CompressionPolicy) and winner.verified is True
        assert all(winner.costs[cost] <= share * dense[cost] for cost, share in limits.items())
        assert winner.folder == run.folder / "exports" / budget
        policy = json.loads((winner.folder / "policy.json").read_text())
        assert policy["scores"]["test"]["score"] == winner.test_score
        assert policy["scores"]["validation"]["score"] == winner.validation_score
        assert winner.model()(torch.zeros(2, 3, 8, 8)).shape == (2, 6)


def test_a_winner_may_be_asked_for_without_a_name_if_there_is_one_budget(run):
    with pytest.raises(secateur.InputError, match="2 budgets; name one: phone, watch"):
        run.best()
    assert secateur.load_run(OLD / "small-1").best().budget == "phone"


def test_a_winner_that_was_not_exported_says_how(copy):
    document = copy.document
    document["budgets"]["phone"]["check"] = None
    (copy.folder / "front.json").write_text(json.dumps(document))
    winner = copy.best("phone")
    assert winner.verified is None and winner.folder is None
    with pytest.raises(secateur.InputError, match=r"export\(budget='phone'\)"):
        winner.model()


def test_exports_are_written_once(copy, tmp_path):
    (there,) = copy.export(budget="phone")
    assert not there.written and there.folder == copy.folder / "exports" / "phone"
    assert there.test_score == copy.best("phone").test_score
    (trial,) = secateur.export(copy, trial=0, output=tmp_path / "trial")
    assert trial.written and trial.folder == tmp_path / "trial"
    assert secateur.load_compressed(trial.folder)(torch.zeros(1, 3, 8, 8)).shape == (1, 6)
    first, again = copy.export(front=True), copy.export(front=True)
    assert [one.folder for one in first] == [one.folder for one in again] and len(first) == len(copy.document["front"])
    assert all(one.written for one in first) and not any(one.written for one in again)
    with pytest.raises(secateur.InputError, match="exists already. Remove it, or choose another with `output`"):
        copy.export(budget="phone", output=tmp_path / "trial")


def test_exports_name_no_internal_module(run):
    text = (run.best("phone").folder / "policy.json").read_text() + (run.best("phone").folder / "README.md").read_text()
    assert "secateur:synthetic" in text and "envs.tasks" not in text


def test_an_export_is_verified_from_python(run):
    found = secateur.verify(run.best("phone").folder, seconds=0.01)
    assert found.passed and found.budget == "phone"
    with pytest.raises(secateur.InputError, match="overrides: search.seed: must start with `data.`"):
        secateur.verify(run.best("phone").folder, overrides={"search.seed": 3})


def test_a_run_goes_on_with_more_evaluations(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    before = copy.trials
    longer = copy.resume({"search.evaluations": 10, "finalize.verify": False})
    assert longer == copy and len(longer.trials) == 10
    pandas.testing.assert_frame_equal(longer.trials.head(8), before)


def test_the_same_search_finds_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    config = secateur.load_config(CONFIG, {"output.root": tmp_path, "output.name": "again", "finalize.verify": False})
    again = secateur.search(config)
    assert again.folder == tmp_path / "again"
    np.testing.assert_array_equal(again.trials["top1"], run.trials["top1"])


def test_a_configuration_is_inspected_without_a_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = secateur.inspect(CONFIG, {"budgets.tiny": {"macs": "<= 0.1%"}})
    assert {row.budget: row.satisfiable for row in found.feasibility} == {"phone": True, "watch": True, "tiny": False}
    assert found.costs.dense["macs"] == 106080 and len(found.graph.groups) == 3
    with pytest.raises(secateur.InputError, match="cannot be met"):
        found.check()
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: secateur.search({**CONFIG, "serch": {}}), "config: serch: unknown key"),
        (lambda run: secateur.search(CONFIG, {"search.evaluatons": 5}), "overrides: search.evaluatons: unknown key"),
        (lambda run: secateur.search("nothing.yaml"), "nothing.yaml: there is no such file"),
        (lambda run: secateur.load_run(run.folder.parent), "is not a run"),
        (lambda run: run.export(), "exactly one of budget=NAME, trial=NUMBER and front=True"),
        (lambda run: run.export(budget="fone"), "There is no budget `fone`"),
        (lambda run: run.ask("macs<=50%"), "Search with `search.agent=envelope_ddpg`"),
        (lambda run: secateur.profile(), "Name either a configuration or a model: secateur.profile"),
        (lambda run: secateur.profile(model="secateur:resnet20", image_shape=(3, 32)), "`image_shape` must be"),
        (lambda run: secateur.profile(CONFIG, precisions=()), "`precisions` must name one float precision"),
        (lambda run: secateur.profile(CONFIG, output="no/such/folder/x.json"), "existing folder with `output`"),
    ],
)
def test_errors_speak_of_arguments(run, call, message):
    with pytest.raises(secateur.InputError) as caught:
        call(run)
    assert message in str(caught.value) and "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{run}"], "exactly one of --budget NAME, --trial NUMBER and --front"),
        (["profile"], "secateur profile CONFIG, or --model"),
        (["profile", "--model", "secateur:resnet20", "--input", "3,32"], "`--input` must be channels,height,width"),
        (["profile", "--model", "secateur:resnet20", "--precisions", ""], "`--precisions` must name one float precision"),
        (["search", "nothing.yaml"], "`secateur init` writes a starter configuration"),
        (["search", "configs/searches/digits.yaml", "--set", "serch=1"], "--set: serch: unknown key"),
    ],
)
def test_the_command_speaks_of_options(run, arguments, message):
    done = CliRunner().invoke(app, [argument.format(run=run) for argument in arguments])
    assert done.exit_code == 2 and message in done.stderr


# ----------------------------------------------------------------------------------------------------- earlier versions


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of a run of version 0.1, which named our networks and data by their modules."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")  # the run's weights are beside it
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    assert "envs.tasks.synthetic:synthetic_net" in Path("small-1/manifest.json").read_text()
    return secateur.load_run("small-1")


def test_a_run_of_version_0_1_is_read(old):
    assert old.config.model.factory == "secateur:synthetic" and old.config.data.name == "synthetic"
    assert len(old.trials) == 6 and len(old.front) == 2
    assert CliRunner().invoke(app, ["front", "small-1"]).exit_code == 0


def test_an_export_of_version_0_1_is_loaded_and_verified(old):
    winner = old.best("phone")
    assert winner.model()(torch.zeros(1, 3, 8, 8)).shape == (1, 6)
    assert secateur.verify(winner.folder, seconds=0.01).passed


def test_a_run_of_version_0_1_is_exported_and_goes_on(old, tmp_path):
    (new,) = old.export(budget="phone", output=tmp_path / "new")
    assert (new.folder / "model.safetensors").read_bytes() == (old.best().folder / "model.safetensors").read_bytes()
    assert json.loads((new.folder / "policy.json").read_text())["model"]["factory"] == "secateur:synthetic"
    before = old.trials
    longer = old.resume({"search.evaluations": 7, "finalize.verify": False})
    pandas.testing.assert_frame_equal(longer.trials.head(6), before)
    assert len(longer.trials) == 7
