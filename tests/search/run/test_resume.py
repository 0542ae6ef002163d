"""A resumed run equals a run that was never stopped."""

from __future__ import annotations

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from secateur.agents import AGENTS
from secateur.envs.core import InputError
from secateur.envs.policy_space import policy_to_document
from secateur.search.config import budget_override, parse_config
from secateur.search.results.document import read_front, winner
from secateur.search.results.winners import verify_winners
from secateur.search.run.folder import held
from secateur.search.run.progress import SearchProgress
from secateur.search.run.search import resume, search
from secateur.search.run.sensitivities import SENSITIVITIES
from secateur.search.run.study import load_study

LEARNER = {"warmup": 8, "candidates": 16, "updates": 2, "planned": 4, "hidden": 8, "critics": 2, "training_budgets": 2}


def values(folder, agent="random", evaluations=16, **changes):
    return {
        "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
        "data": {"name": "synthetic", "train": "rest", "calibration": 64, "validation": 100},
        "search": {"agent": agent, "evaluations": evaluations, "workers": 0, "options": changes.pop("options", {})},
        "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8]},
        "recovery": [],
        "budgets": {"small": {"macs": "<= 50%"}, "tiny": {"macs": "<= 30%", "weight_bytes": "<= 10%"}},
        "finalize": {"top": 1, "verify": False, "recovery": []},
        "output": {"root": str(folder)},
        **changes,
    }


def run(folder, **changes):
    return search(parse_config(values(folder, **changes), "test.yaml"))


def trials(run):
    return [(trial.user_attrs["budget"], trial.params, trial.values) for trial in load_study(run).trials]


class Interrupted(SearchProgress):
    """Presses Ctrl-C after so many episodes."""

    def __init__(self, after):
        from rich.console import Console

        super().__init__(Console(quiet=True))
        self.left = after

    def on_episode(self):
        super().on_episode()
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


OPTIONS = {
    "random": {},
    "uniform": {},
    "greedy": {},
    "integer_program": {},
    "clr_rnf": {},
    "evopress": {},
    "spdy": {"population": 4},
    "catcma": {"population": 4},
    "bee_colony": {"sources": 2},
    "nsga2": {"population": 4},
    "optuna": {"startup": 4},
    "envelope_ddpg": LEARNER,
    "amc_ddpg": {},
}


def test_every_agent_is_resumed_here():
    assert set(OPTIONS) == set(AGENTS)


@pytest.mark.numerics
@pytest.mark.parametrize("agent", OPTIONS)
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, agent):
    options = OPTIONS[agent]
    straight = run(tmp_path / "straight", agent=agent, options=options)
    config = parse_config(values(tmp_path / "broken", agent=agent, options=options), "test.yaml")
    progress = Interrupted(after=min(11, len(trials(straight)) - 1))  # some agents have one policy per budget
    with pytest.raises(KeyboardInterrupt):
        search(config, progress)
    broken = progress.run
    assert 1 <= len(trials(broken)) < len(trials(straight))
    assert resume(broken) == broken
    assert trials(broken) == trials(straight)
    documents = [read_front(folder) for folder in (broken, straight)]
    assert documents[0] == documents[1] and documents[0]["evaluations"] == len(trials(straight))
    if agent == "envelope_ddpg":
        states = [json.loads((folder / "agent" / "agent.json").read_text()) for folder in (broken, straight)]
        assert states[0]["rng"] == states[1]["rng"]
        replays = [np.load(folder / "agent" / "replay.npz")["sequences"] for folder in (broken, straight)]
        np.testing.assert_array_equal(*replays)


def test_a_finished_run_takes_more_evaluations(tmp_path):
    few = {"agent": "bee_colony", "options": {"sources": 2}}
    longer = run(tmp_path / "longer", **few, evaluations=14)
    grown = run(tmp_path / "grown", **few, evaluations=8)
    resume(grown, ["search.evaluations=14"])
    assert trials(grown) == trials(longer)
    assert read_front(grown) == read_front(longer)
    assert json.loads((grown / "manifest.json").read_text())["config"]["search"]["evaluations"] == 14
    before = trials(grown)
    resume(grown)
    assert trials(grown) == before, "there was nothing left to do"


def test_recorded_evaluations_are_reused(tmp_path, monkeypatch):
    folder = run(tmp_path, evaluations=8)
    from secateur.envs.evaluator import Evaluator

    counted, network = [], Evaluator.network
    monkeypatch.setattr(Evaluator, "network", lambda self, policy: (counted.append(policy), network(self, policy))[1])
    resume(folder, ["search.evaluations=11"])
    assert len(counted) == 3


def test_ctrl_c_during_the_replay_loses_nothing(tmp_path, monkeypatch):
    folder = run(tmp_path, agent="envelope_ddpg", options=LEARNER, evaluations=12)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"}
    taken = []

    def take(self, episode):
        taken.append(episode)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr("secateur.search.run.replay.Recorded.take", take)
    with pytest.raises(KeyboardInterrupt):
        resume(folder, ["search.evaluations=20"])
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"}
    assert after == before


def test_a_run_goes_on_with_the_sensitivities_that_it_measured(tmp_path, monkeypatch):
    folder = run(tmp_path, agent="envelope_ddpg", options=LEARNER, evaluations=9)
    document = json.loads((folder / SENSITIVITIES).read_text())
    assert set(document["curves"]) == set(trials(folder)[0][1])
    monkeypatch.setattr("secateur.search.build.measure_sensitivities", None)
    resume(folder, ["search.evaluations=10"])
    assert len(trials(folder)) == 10
    document["curves"].popitem()
    (folder / SENSITIVITIES).write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"sensitivities.json is damaged: KeyError"):
        resume(folder, ["search.evaluations=11"])
    assert not (run(tmp_path, evaluations=2) / SENSITIVITIES).exists()


def test_a_lost_agent_is_rebuilt_by_the_replay(tmp_path):
    folder = run(tmp_path, agent="envelope_ddpg", options=LEARNER, evaluations=12)
    replay = dict(np.load(folder / "agent" / "replay.npz"))
    shutil.rmtree(folder / "agent")
    resume(folder)
    again = np.load(folder / "agent" / "replay.npz")
    for name, values in replay.items():
        np.testing.assert_array_equal(values, again[name])
    assert len(trials(folder)) == 12


def test_a_failed_policy_is_remembered_and_never_tried_again(tmp_path, monkeypatch):
    from secateur.envs.evaluator import Evaluator

    network = Evaluator.network
    calls = []

    def broken(self, policy):
        calls.append(policy)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return network(self, policy)

    monkeypatch.setattr(Evaluator, "network", broken)
    folder = run(tmp_path, evaluations=6)
    assert read_front(folder)["failed"] == 1
    resume(folder, ["search.evaluations=9"])
    states = [trial.state.name for trial in load_study(folder).trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", *["COMPLETE"] * 6]
    assert load_study(folder).trials[2].user_attrs["failure"] == "RuntimeError: out of luck"
    assert len(set(calls)) == len(calls) == 9 and read_front(folder)["evaluations"] == 9


def test_a_truncated_line_of_the_journal_is_dropped(tmp_path):
    folder = run(tmp_path, evaluations=5)
    journal = folder / "study.journal"
    whole = trials(folder)
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "x')
    resume(folder, ["search.evaluations=8"])
    assert trials(folder)[:5] == whole and len(trials(folder)) == 8


def test_winners_are_exported_anew(tmp_path, monkeypatch):
    """Without real exports and checks, which take long and have tests of their own."""

    def export(folder, problem, policy, *rest):
        folder.mkdir(parents=True)
        (folder / "policy.json").write_text(json.dumps(policy_to_document(policy)))

    def check(folder, **arguments):
        return SimpleNamespace(
            limits=(), latency=SimpleNamespace(milliseconds=1.0, dense_milliseconds=2.0), passed=True, failures=(),
            runtime="onnxruntime", runtime_version="1", threads=1,
        )  # fmt: skip

    monkeypatch.setattr("secateur.search.results.winners.write_export", export)
    monkeypatch.setattr("secateur.search.run.search.verify_winners", partial(verify_winners, verify=check))
    folder = run(tmp_path, evaluations=4, finalize={"top": 1, "verify": True, "recovery": []})
    (folder / "exports" / "small" / "old").write_text("of the earlier winner")
    resume(folder, ["search.evaluations=8"])
    document = read_front(folder)
    assert [file.name for file in (folder / "exports" / "small").iterdir()] == ["policy.json"]
    exported = json.loads((folder / "exports" / "small" / "policy.json").read_text())
    assert exported == winner(document, "small")["policy"]
    assert document["budgets"]["small"]["check"]["passed"]


def test_a_run_goes_on_only_as_it_was(tmp_path):
    folder = run(tmp_path, evaluations=4)
    before = (folder / "manifest.json").read_text()
    for override in ("search.seed=5", "search.agent=bee_colony", "space.prune_ratio=[0.0, 0.5]", "budgets.small.macs=<= 40%"):
        with pytest.raises(InputError, match="must have the same configuration"):
            resume(folder, [override])
    with pytest.raises(InputError, match="less than the 4"):
        resume(folder, ["search.evaluations=3"])
    manifest = json.loads(before)
    manifest["dense"]["score"] = 0.123
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"scored 12\.30 %"):
        resume(folder)
    (folder / "manifest.json").write_text(before)
    with held(folder), pytest.raises(InputError, match="Another process searches"):
        resume(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="is not a run"):
        resume(folder)


def test_torch_threads_are_left_alone(tmp_path):
    before = torch.get_num_threads()
    run(tmp_path, agent="envelope_ddpg", evaluations=6, options=LEARNER)
    assert torch.get_num_threads() == before


def test_a_budget_is_added_to_a_finished_run_and_reuses_its_evaluations(tmp_path, monkeypatch):
    from secateur.envs.evaluator import Evaluator

    few = {"agent": "evopress", "evaluations": 12}
    folder = run(tmp_path, **few)
    before = trials(folder)
    counted, network = [], Evaluator.network
    monkeypatch.setattr(Evaluator, "network", lambda self, policy: (counted.append(policy), network(self, policy))[1])
    resume(folder, [budget_override("middle=macs<=40%,top1_drop<=90")])
    assert not counted and trials(folder) == before
    document = read_front(folder)
    assert list(document["budgets"]) == ["small", "tiny", "middle"]
    assert document["budgets"]["middle"]["front"], "policies of the tighter budget fit it, too"
    assert any(point["budget"] == "middle" for point in document["final"]["points"])
    resume(folder, ["search.evaluations=20"])
    added = trials(folder)[12:]
    assert trials(folder)[:12] == before and len(added) == 8
    assert [budget for budget, _, _ in added[:4]] == ["middle"] * 4, "the new budget catches up with the others"
    assert load_study(folder).user_attrs["constraint_names"] == ["macs", "weight_bytes", "top1_drop"]


def test_a_budget_that_a_run_cannot_take_is_refused(tmp_path):
    folder = run(tmp_path, evaluations=4)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="limits `peak_activation_bytes`, but the run trades macs, weight_bytes only"):
        resume(folder, [budget_override("memory=peak_activation_bytes<=50%")])
    with pytest.raises(InputError, match="must have the same configuration, but `budgets.small.macs` changed"):
        resume(folder, [budget_override("small=macs<=35%")])
    for wrong in ("macs<=35%", "=macs<=35%", "small", "small=", "small=macs", "small=macs<=1%,macs<=2%"):
        with pytest.raises(InputError, match="--budget"):
            budget_override(wrong)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("schema", [0, 3, "2", None])
def test_a_run_of_another_schema_is_refused_in_one_sentence(tmp_path, schema):
    folder = run(tmp_path, evaluations=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema": schema}))
    with pytest.raises(InputError, match=rf"has schema {schema!r}; this version reads schemas 1 and 2\.$"):
        resume(folder)
