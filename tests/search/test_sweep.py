"""A sweep: which searches it runs, what it records of them, and that it goes on after faults."""

from __future__ import annotations

import json

import pytest

from secateur.envs.core import InputError
from secateur.search.benchmarks.agent_tables import summary
from secateur.search.config import budget_override, load_config, parse_config
from secateur.search.run.search import search
from secateur.search.run.study import load_study
from secateur.search.sweep import RUNS, Search, run_sweep, search_row, searches
from tests.toy_task import SOURCE, functions

DIES = """
import os
from pathlib import Path

CALLS = []
measured = error

def error(model):
    CALLS.append(model)
    died = os.environ.get("SWEEP_DIED")
    if died and len(CALLS) == 6 and not Path(died).exists():
        Path(died).touch()
        os._exit(1)
    return measured(model)
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    (path / "sweep_task.py").write_text(SOURCE + DIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        yield path


def values(**changes):
    return {
        "model": {"factory": "sweep_task:Net", "input": [8]},
        "task": functions("sweep_task"),
        "search": {"agent": "random", "evaluations": 8, "workers": 0, "options": {"redraws": 5}},
        "recovery": [],
        "budgets": {"half": {"macs": "<= 60%"}, "third": {"macs": "<= 40%"}},
        "finalize": {"top": 1, "verify": False, "recovery": []},
        **changes,
    }


CONFIG = parse_config(values(), "test.yaml")


def test_every_combination_is_one_search():
    budgets = [budget_override("small=macs<=35%"), budget_override("tiny=macs<=20%,error_drop<=3")]
    found = searches(CONFIG, ["random", "bee_colony sources=2"], 2, budgets, ["space.channel_multiple=[1, 4]"])
    assert len(found) == len({one.name for one in found}) == 16
    first, last = found[0], found[-1]
    assert first.label == "random small channel_multiple=1" and first.seed == 0
    assert last.label == "bee_colony sources=2 tiny channel_multiple=4" and last.name.endswith("channel_multiple-4-seed1")
    config = load_config(CONFIG, last.overrides)
    assert list(config.budgets) == ["tiny"] and set(config.budgets["tiny"].root) == {"macs", "error_drop"}
    assert (config.search.agent, config.search.options["sources"], config.search.seed) == ("bee_colony", 2, 1)
    assert config.space.channel_multiple == 4
    assert load_config(CONFIG, first.overrides).search.options == {"redraws": 5}, (
        "the configuration's own agent keeps its options"
    )


def test_without_options_the_configuration_is_searched_as_it_is():
    (one,) = searches(CONFIG, None, 1, [], [])
    assert one == Search("random", 0, {"search.agent": "random", "search.options": {"redraws": 5}, "search.seed": 0})


@pytest.mark.parametrize(
    "agents, budgets, varied, message",
    [
        (["nobody"], [], [], "--agent"),
        (None, [], ["space.channel_multiple=4"], "must read like"),
        (None, [], ["space.channel_multiple"], "must read section.key=value"),
        (None, [], ["space.channel_multiple=[0]"], "channel_multiple"),
        (None, [], ["space.nothing=[1]"], "nothing"),
        (["random", "random"], [], [], "are the same"),
        (None, [budget_override("small=nothing<=3%")], [], "unknown cost"),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(agents, budgets, varied, message):
    with pytest.raises(InputError, match=message):
        searches(CONFIG, agents, 1, budgets, varied)


def test_a_row_has_the_scores_of_the_winners_and_fits_the_tables_of_the_benchmark(tmp_path):
    run = search(load_config(CONFIG, {"output.root": str(tmp_path)}))
    row = json.loads(json.dumps(search_row(Search("random", 0, {}), run)))
    document = json.loads((run / "front.json").read_text())
    assert row["evaluations"] == 8 and row["hypervolume"] == document["hypervolume"]
    for point in document["final"]["points"]:
        winner = row["winners"][point["budget"]]
        assert (winner["validation_score"], winner["test_score"]) == (point["validation_score"], point["score"])
    budgets, runs, _ = summary([row, {**row, "seed": 1, "winners": {"half": None, "third": None}}]).split("\n\n")
    assert "| half | random | 1 of 2 |" in budgets and "| random | 8 |" in runs


@pytest.mark.slow
def test_a_sweep_resumes_a_search_whose_process_died_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SWEEP_DIED", str(tmp_path / "died"))
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    chosen = searches(CONFIG, None, 2, [], [])
    output = tmp_path / "results"
    run_sweep(CONFIG, chosen[:1], output)
    assert (tmp_path / "died").exists(), "the process of the search has died once"
    study = load_study(output / RUNS / "random-seed0")
    assert [trial.user_attrs["evaluation"] for trial in study.trials] == list(range(8))
    monkeypatch.delenv("SWEEP_DIED")
    straight = search(load_config(CONFIG, {"output.root": str(tmp_path)}))
    assert [trial.values for trial in study.trials] == [trial.values for trial in load_study(straight).trials]
    before = {path: path.stat().st_mtime_ns for path in (output / RUNS / "random-seed0").iterdir()}
    run_sweep(CONFIG, chosen, output)
    assert before == {path: path.stat().st_mtime_ns for path in before}, "a search with a row is not run again"
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()][1:]
    assert [(row["agent"], row["seed"]) for row in rows] == [("random", 0), ("random", 1)]
    assert capsys.readouterr().out.count("8 evaluations") == 2
    with pytest.raises(InputError, match="holds another measurement"):
        run_sweep(load_config(CONFIG, ["search.evaluations=9"]), chosen, output)
