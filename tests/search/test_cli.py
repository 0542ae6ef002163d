"""The command: a whole search on the synthetic task, and one sentence with exit code 2 for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from secateur.envs.tasks import synthetic
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.models import load_model
from secateur.search.cli import app
from secateur.search.config import load_config
from secateur.search.schema import SCHEMA

CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "validation": 256, "train": "rest"},
    "search": {"agent": "random", "evaluations": 12, "workers": 0},
    "space": {"weight_bits": [4, 8], "activation_bits": [8]},
    "budgets": {"phone": {"macs": "<= 60%"}, "watch": {"macs": "<= 40%", "weight_bytes": "<= 20%"}},
    "finalize": {"top": 2},
}


def secateur(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(folder, **sections):
    path = Path(folder) / "small.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **sections}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with one finished run, and a cache of its own."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SECATEUR_CACHE", str(folder / "cache"))
        done = secateur("search", write(folder))
        assert done.exit_code == 0, done.output
        assert done.stdout.rstrip().endswith("report: secateur report runs/small-1\nrun: runs/small-1")
        for name in ("phone", "watch"):
            assert f"{name}: exports/{name}, checked from its files; " in done.stdout
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SECATEUR_CACHE", str(folder / "cache"))


def test_a_run_holds_study_front_and_manifest(folder):
    run = folder / "runs" / "small-1"
    assert {path.name for path in run.iterdir()} == {
        "manifest.json", "network.json", "study.journal", "front.json", "front.csv", "exports",
    }  # fmt: skip
    document = json.loads((run / "front.json").read_text())
    assert document["evaluations"] == 12 and document["feasible"] == 12
    for name, budget in document["budgets"].items():
        assert budget["front"], name
        for point in document["points"]:
            if name in point["fits"]:
                assert all(point["costs"][cost] <= limit for cost, limit in budget["limits"].items())
    assert {point["budget"] for point in document["final"]["points"]} == {"phone", "watch"}
    for budget in document["budgets"].values():
        assert budget["check"]["passed"] and (run / budget["check"]["export"] / "verify.json").is_file()


def test_front_prints_tables_json_and_csv():
    table = secateur("front", "runs/small-1")
    assert table.exit_code == 0 and "phone" in table.stdout and "watch" in table.stdout and "dense" in table.stdout
    one = secateur("front", "runs/small-1", "--budget", "watch")
    assert "watch" in one.stdout and "phone" not in one.stdout
    document = json.loads(secateur("front", "runs/small-1", "--format", "json").stdout)
    assert document["schema"] == SCHEMA
    rows = secateur("front", "runs/small-1", "--format", "csv").stdout.splitlines()
    heading = "evaluation,on_front,fits,validation_top1,finalist_validation_top1,test_top1,macs"
    assert rows[0].startswith(heading) and len(rows) > 1


def test_an_exported_model_scores_the_same_in_a_fresh_process(folder):
    done = secateur("export", "runs/small-1", "--budget", "watch")
    assert done.exit_code == 0, done.output
    assert done.stdout == "export: runs/small-1/exports/watch is there already\n"  # the search has written it
    code = """
import sys
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.classification import Classification
from secateur.search.export.load import load_compressed
task = Classification(synthetic.load(validation=256, train="rest"))
print(task.evaluate(load_compressed("runs/small-1/exports/watch"), "test").score)
"""
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    score = float(fresh.stdout)
    recorded = json.loads((folder / "runs/small-1/exports/watch/policy.json").read_text())["scores"]["test"]["score"]
    document = json.loads((folder / "runs/small-1/front.json").read_text())
    winner = next(point for point in document["final"]["points"] if point["budget"] == "watch")
    assert score == recorded == winner["score"]
    again = secateur("export", "runs/small-1", "--budget", "watch", "--output", "runs/small-1/exports/phone")
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_front_of_one_budget_holds_nothing_of_the_others():
    document = json.loads(secateur("front", "runs/small-1", "--format", "json", "--budget", "watch").stdout)
    assert list(document["budgets"]) == ["watch"]
    assert {point["budget"] for point in document["final"]["points"]} == {"watch"}
    assert document["points"] and all("watch" in point["fits"] for point in document["points"])
    rows = secateur("front", "runs/small-1", "--format", "csv", "--budget", "watch").stdout.splitlines()
    assert len(rows) == 1 + len(document["points"])
    whole = secateur("front", "runs/small-1", "--format", "csv").stdout
    assert whole == Path("runs/small-1/front.csv").read_text()


def test_an_export_is_refused_after_the_weights_were_swapped(folder):
    data = synthetic.load(validation=256, train="rest")
    trained = load_model(CONFIG["model"]["factory"], "trained", task=Classification(data))
    torch.save(trained.state_dict(), "net.pth")
    changes = ("--set", "model.weights=net.pth", "--set", "output.root=swapped", "--set", "finalize.verify=false")
    assert secateur("search", write(folder), *changes).exit_code == 0
    run = Path("swapped/small-1")
    before = sorted(run.rglob("*"))
    command = ("export", run, "--budget", "phone")

    torch.save(load_model(CONFIG["model"]["factory"]).state_dict(), "net.pth")
    swapped = secateur(*command)
    assert swapped.exit_code == 2 and "The top-1 of the dense model on the validation split was" in swapped.stderr
    assert sorted(run.rglob("*")) == before

    torch.save(trained.state_dict(), "net.pth")
    text = (run / "front.json").read_text()
    document = json.loads(text)
    for point in document["final"]["points"]:
        point["score"] -= 0.02
    (run / "front.json").write_text(json.dumps(document))
    tested = secateur(*command)
    assert tested.exit_code == 2 and "top-1 of the exported policy on the test split was" in tested.stderr
    assert sorted(run.rglob("*")) == before

    (run / "front.json").write_text(text)
    assert secateur(*command).exit_code == 0


def test_inspect_shows_groups_and_budgets(folder):
    done = secateur("inspect", "small.yaml")
    assert done.exit_code == 0, done.output
    for shown in ("conv1", "Coupled channel groups", "satisfiable", "yes", "dense: macs"):
        assert shown in done.stdout
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["small-1"]


def test_inspect_says_what_the_calibration_will_take(folder):
    write(folder)
    plain = " ".join(secateur("inspect", "small.yaml").stdout.split())
    assert "calibration: 512 images, " in plain and "5 of 5 layers in full detail" in plain
    limited = ("--set", "calibration.max_matrix_bytes=1000", "--set", "calibration.max_images=100")
    shown = " ".join(secateur("inspect", "small.yaml", *limited).stdout.split())
    assert "calibration: 100 images, " in shown and "Calibrated with less detail" in shown
    unused = ("--set", "space.activation_bits=null", "--set", "recovery=[]", "--set", "finalize.recovery=null")
    assert "not needed by this configuration" in secateur("inspect", "small.yaml", *unused).stdout


def test_an_impossible_budget_is_refused_before_anything_is_written(folder):
    path = write(folder, budgets={"tiny": {"macs": "<= 0.1%"}})
    inspected = secateur("inspect", path)
    assert inspected.exit_code == 2 and "no" in inspected.stdout and "cannot be met" in inspected.stderr
    searched = secateur("search", path)
    assert searched.exit_code == 2 and "needs at least" in searched.stderr
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["small-1"]
    write(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "nothing.yaml"], "error: nothing.yaml: there is no such file."),
        (["search", "small.yaml", "--set", "search.evaluatons=5"], "Did you mean `evaluations`?"),
        (["search", "small.yaml", "--set", "output.name=small-1"], "exists already"),
        (["search", "small.yaml", "--set", "model.weights=none.pth"], "none.pth"),
        (["search", "small.yaml", "--set", "model.input=[3, 9, 9]"], "`model.input`"),
        (["inspect", "small.yaml", "--set", "model.factory=secateur.envs.tasks.synthetic:nothing"], "has no `nothing`"),
        (["front", "runs"], "is not a run"),
        (["front", "runs/small-1", "--budget", "fone"], "There is no budget `fone`"),
        (["export", "runs/small-1", "--budget", "fone"], "There is no budget `fone`"),
        (["export", "runs", "--budget", "phone"], "is not a run"),
        (["export", "runs/small-1", "--budget", "phone", "--output", "small.yaml/x"], "cannot be written"),
        (["support", "alexnet", "--output", "missing/SUPPORT.md"], "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(folder, arguments, message):
    write(folder)
    before = sorted(folder.joinpath("runs").rglob("*"))
    done = secateur(*arguments)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in done.output
    assert sorted(folder.joinpath("runs").rglob("*")) == before


def test_an_interrupted_search_leaves_its_front_and_exits_130(folder, monkeypatch):
    from secateur.search.run import search as engine

    write(folder)
    finished = []

    def interrupted(agent, runner, evaluations, on_episode, *more):
        def stop_after_five(actor, episode):
            on_episode(actor, episode)
            finished.append(episode)
            if len(finished) == 5:
                raise KeyboardInterrupt

        return run_loop(agent, runner, evaluations, stop_after_five, *more)

    run_loop = engine.run_loop
    monkeypatch.setattr(engine, "run_loop", interrupted)
    done = secateur("search", "small.yaml", "--set", "output.name=stopped")
    assert done.exit_code == 130 and "run: runs/stopped" in done.stdout and "interrupted" in done.stderr
    assert json.loads((folder / "runs/stopped/front.json").read_text())["evaluations"] == 5
    assert secateur("export", "runs/stopped", "--budget", "phone").exit_code == 0


def test_init_writes_a_valid_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = secateur("init")
    assert done.exit_code == 0 and load_config("secateur.yaml").search.evaluations == 200
    Path("secateur.yaml").write_text("mine")
    again = secateur("init")
    assert again.exit_code == 2 and "exists already" in again.stderr
    assert Path("secateur.yaml").read_text() == "mine"
    assert secateur("init", "no/such/folder/a.yaml").exit_code == 2


def test_help_names_every_verb():
    shown = secateur("--help").stdout
    assert all(verb in shown for verb in ("init", "inspect", "search", "front", "export"))
