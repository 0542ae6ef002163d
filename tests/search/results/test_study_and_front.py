"""The Optuna study and our own front: what they hold, and that they agree."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from types import SimpleNamespace
from wsgiref.util import setup_testing_defaults

import optuna
import pytest

from secateur.envs.core import CompressionPolicy, Episode, Evaluation, InputError
from secateur.envs.metric import TOP1
from secateur.envs.policy_space import document_to_policy
from secateur.search.results.document import FRONT_CSV, FRONT_JSON, front_csv, only_budget, read_front, winner, write_front
from secateur.search.results.front import Front
from secateur.search.run.journal import read_journal
from secateur.search.run.study import StudyRecorder, limited_quantities, load_study
from tests.search.results.recorded import DENSE, OBJECTIVES, PHONE, SPACE, WATCH, episode, random_episodes


@pytest.fixture
def recorder(tmp_path):
    return StudyRecorder(tmp_path, SPACE, OBJECTIVES, TOP1, (PHONE, WATCH), {"agent": "random"})


def test_quantities_of_all_budgets_are_named_once():
    assert limited_quantities((PHONE, WATCH), TOP1) == ("macs", "weight_bytes", "top1_drop")


def test_a_trial_holds_policy_scores_and_slacks(recorder, tmp_path):
    recorder.record(0, "random", episode(40, 0.8, 40.0, 100.0))
    recorder.record(1, "random", episode(70, 0.75, 60.0, 300.0, WATCH))
    study = load_study(tmp_path)
    first, second = study.trials
    assert first.values == [0.8, 40.0, 100.0]
    assert first.params == {"prune_ratio/conv": 0.6, "weight_bits/conv": 8}
    assert first.user_attrs["budget"] == "phone" and first.user_attrs["feasible"] is True
    assert first.user_attrs["cost/weight_bytes"] == 100.0 and first.user_attrs["images"] == 500
    names = study.user_attrs["constraint_names"]
    assert names == ["macs", "weight_bytes", "top1_drop"]
    assert {name: first.constraints[name] for name in names} == {
        "macs": 40 / 50 - 1,
        "weight_bytes": -1,
        "top1_drop": -1,
    }
    assert [second.constraints[name] for name in names] == pytest.approx([60 / 80 - 1, 300 / 200 - 1, 0.5])
    assert second.user_attrs["feasible"] is False
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert study.metric_names == list(OBJECTIVES)


def test_failed_and_unscored_episodes_are_failed_trials(recorder, tmp_path):
    recorder.record(0, "random", Episode("phone", None, None, failure="RuntimeError: the forward failed"))
    recorder.record(1, "random", episode(40, float("nan"), 40.0, 100.0))
    recorder.record(2, "random", episode(41, 0.5, 40.0, 100.0))
    trials = load_study(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "FAIL", "COMPLETE"]
    assert trials[0].user_attrs["failure"] == "RuntimeError: the forward failed" and trials[0].params == {}
    assert trials[1].params["prune_ratio/conv"] == 0.6


def test_the_dashboard_shows_the_constraints(recorder, tmp_path):
    from optuna_dashboard import _serializer as serializer

    recorder.record(0, "random", episode(70, 0.75, 60.0, 300.0, WATCH))
    study = load_study(tmp_path)
    shown = serializer.serialize_frozen_trial(study._study_id, study.trials[0], {})
    assert shown["constraints"] == pytest.approx([60 / 80 - 1, 0.5, 0.5])
    assert shown["state"] == "Complete" and len(shown["values"]) == 3


@pytest.mark.parametrize("seed", range(3))
def test_our_front_is_optunas_front(recorder, tmp_path, seed):
    episodes = random_episodes(60, seed)
    front = Front(OBJECTIVES, (PHONE,), DENSE, TOP1)
    for number, item in enumerate(episodes):
        recorder.record(number, "random", item)
        front.add(item)
    best = load_study(tmp_path).best_trials
    assert 0 < len(best) < sum(item.feasible for item in episodes) < 60
    assert {trial.user_attrs["evaluation"] for trial in best} == {candidate.number for candidate in front.of()}


def test_optuna_alone_reads_the_study(recorder, tmp_path):
    """Optuna's own functions, as in its documentation, without any of ours."""
    for number, item in enumerate(random_episodes(40, 0)):
        recorder.record(number, "random", item)
    recorder.record(40, "random", Episode("phone", None, None, failure="worker lost twice"))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal")))
    study = optuna.load_study(study_name=None, storage=storage)
    infeasible = [trial.number for trial in study.trials if any(slack > 0 for slack in trial.constraints.values())]
    assert infeasible == [t.number for t in study.trials if t.state.name == "COMPLETE" and not t.user_attrs["feasible"]] != []
    assert all(trial.number not in infeasible for trial in study.best_trials)
    table = study.trials_dataframe()
    assert {"values_top1", "values_macs", "user_attrs_cost/macs", "params_prune_ratio/conv"} <= set(table) and len(table) == 41
    forest = optuna.importance.FanovaImportanceEvaluator(n_trees=8, seed=0)
    importances = optuna.importance.get_param_importances(study, evaluator=forest, target=lambda trial: trial.values[0])
    assert max(importances, key=importances.get) == "prune_ratio/conv"  # the bits never change


def test_the_dashboards_server_answers_for_the_study(recorder, tmp_path):
    from optuna_dashboard import wsgi

    for number, item in enumerate(random_episodes(10, 0)):
        recorder.record(number, "random", item)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal")))
    server = wsgi(storage)
    (study,) = ask_server(server, "/api/studies")["study_summaries"]
    assert study["study_name"] == tmp_path.name
    detail = ask_server(server, f"/api/studies/{study['study_id']}")
    assert detail["objective_names"] == list(OBJECTIVES) and len(detail["trials"]) == 10
    # The server's own `best_trials` ignores constraints; its pages mark what is infeasible by the constraints of each trial.
    for shown, trial in zip(detail["trials"], load_study(tmp_path).trials, strict=True):
        assert [float(value) for value in shown["values"]] == trial.values
        assert all(slack <= 0 for slack in shown["constraints"]) == trial.user_attrs["feasible"]


def ask_server(server, path):
    """Return the JSON that a WSGI application answers to GET."""
    environment = {"PATH_INFO": path}
    setup_testing_defaults(environment)
    codes = []
    body = b"".join(server(environment, lambda status, headers, *_: codes.append(status)))
    assert codes == ["200 OK"], (path, codes, body[:200])
    return json.loads(body)


def test_a_damaged_or_missing_study_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        load_study(tmp_path)
    assert list(tmp_path.iterdir()) == []  # looking for a study must not make one
    (tmp_path / "study.journal").write_text("nonsense\n")
    with pytest.raises(InputError, match="cannot be read"):
        load_study(tmp_path)


def small_front():
    front = Front(OBJECTIVES, (PHONE, WATCH), DENSE, TOP1)
    changes = [
        front.add(item)
        for item in (
            episode(45, 0.85, 45.0, 150.0),  # 0: fits both
            episode(60, 0.88, 60.0, 150.0),  # 1: asked for phone, fits watch only
            episode(30, 0.60, 30.0, 100.0),  # 2: fits phone; loses too much top-1 for watch
            episode(46, 0.80, 46.0, 160.0),  # 3: dominated by 0
            Episode("phone", None, None, failure="worker lost twice"),  # 4
            episode(90, 0.89, 90.0, 390.0),  # 5: fits nothing
        )
    ]
    return front, changes


def test_a_policy_counts_for_every_budget_that_it_fits():
    front, changes = small_front()
    assert changes == [True, True, True, False, False, False]
    assert [candidate.number for candidate in front.of("phone")] == [0, 2]
    assert [candidate.number for candidate in front.of("watch")] == [1, 0]
    assert [candidate.number for candidate in front.of()] == [1, 0, 2]
    assert (front.evaluations, front.feasible, front.failed) == (6, 3, 1)
    assert front.best_score("watch") == 0.88


def test_finalists_need_not_keep_the_top1_drop_yet():
    front, _ = small_front()
    assert [candidate.number for candidate in front.best("watch", 4)] == [1, 0, 3, 2]
    assert [candidate.number for candidate in front.best("phone", 2)] == [0, 3]
    lost = Front(OBJECTIVES, (WATCH,), DENSE, TOP1)
    assert not lost.add(episode(30, 0.60, 30.0, 100.0)) and lost.of("watch") == []
    assert [candidate.fits for candidate in lost.best("watch", 1)] == [()]


def test_hypervolume_of_one_point_is_its_box():
    front = Front(("top1", "macs"), (PHONE,), DENSE, replace(TOP1, chance=0.1))
    assert front.hypervolume == 0 and front.best_score("phone") is None
    front.add(episode(40, 0.8, 40.0, 100.0))
    assert front.hypervolume == pytest.approx((0.8 - 0.1) * (1 - 0.4))


def test_a_policy_evaluated_twice_is_one_candidate():
    front = Front(OBJECTIVES, (PHONE,), DENSE, TOP1)
    assert [front.add(episode(40, 0.8, 40.0, 100.0)) for _ in range(2)] == [True, False]
    assert len(front.of()) == 1 and front.evaluations == 2


def test_files_hold_the_front_with_test_scores_apart(tmp_path):
    front, _ = small_front()
    policy = front.of("watch")[0].policy
    final = Evaluation(0.7, {"macs": 60.0, "weight_bytes": 150.0}, "final", images=300)
    validation = Evaluation(0.89, final.costs, "validation", images=500)
    finalists = [SimpleNamespace(budget="watch", policy=policy, validation=validation, final=final)]
    write_front(tmp_path, front.document(SPACE.policy_to_choices, finalists, DENSE))
    document = read_front(tmp_path)
    assert document["front"] == [1, 0, 2] and document["budgets"]["watch"]["front"] == [1, 0]
    point = next(point for point in document["points"] if point["evaluation"] == 1)
    assert point["score"] == 0.88 and document_to_policy(point["policy"]) == policy
    assert document["final"]["points"] == [
        {
            "budget": "watch",
            "evaluation": 1,
            "validation_score": 0.89,
            "score": 0.7,
            "images": 300,
            "costs": {"macs": 60.0, "weight_bytes": 150.0},
        }
    ]
    rows = list(csv.DictReader((tmp_path / FRONT_CSV).read_text().splitlines()))
    assert [row["evaluation"] for row in rows] == ["0", "1", "2"]
    assert [row["test_top1"] for row in rows] == ["", "0.7", ""]
    assert [row["finalist_validation_top1"] for row in rows] == ["", "0.89", ""]
    assert rows[1]["fits"] == "watch" and rows[1]["weight_bits/conv"] == "8" and rows[1]["validation_top1"] == "0.88"
    assert sorted(path.name for path in tmp_path.iterdir()) == [FRONT_CSV, FRONT_JSON]


def test_the_winner_is_the_best_on_validation():
    front, _ = small_front()
    document = front.document(SPACE.policy_to_choices)
    assert winner(document, "phone")["evaluation"] == 0
    # The first finalist stays the winner even if another one does better on the test split.
    scores = {1: 0.7, 0: 0.8}
    finalists = [
        SimpleNamespace(
            budget="watch",
            policy=c.policy,
            validation=c.evaluation,
            final=Evaluation(scores[c.number], c.evaluation.costs, "final"),
        )
        for c in front.of("watch")
    ]
    assert winner(front.document(SPACE.policy_to_choices, finalists), "watch")["evaluation"] == 1
    with pytest.raises(InputError, match="There is no budget `fone`; the run has phone, watch"):
        winner(document, "fone")
    empty = Front(OBJECTIVES, (PHONE,), DENSE, TOP1).document(SPACE.policy_to_choices)
    with pytest.raises(InputError, match="Nothing in 0 evaluations fits"):
        winner(empty, "phone")


def test_one_budget_keeps_its_front_and_its_finalists():
    front, _ = small_front()
    final = Evaluation(0.7, {"macs": 60.0, "weight_bytes": 150.0}, "final")
    dominated = CompressionPolicy((46,), (8,), (32,))  # on no front, but a finalist
    finalists = [
        SimpleNamespace(budget="phone", policy=dominated, validation=final, final=final),
        SimpleNamespace(budget="watch", policy=front.of("watch")[0].policy, validation=final, final=final),
    ]
    whole = front.document(SPACE.policy_to_choices, finalists, DENSE)
    document = only_budget(whole, "phone")
    assert list(document["budgets"]) == ["phone"] and document["front"] == [0, 2]
    assert [point["evaluation"] for point in document["points"]] == [0, 2, 3]
    assert [point["evaluation"] for point in document["final"]["points"]] == [3]
    assert document["final"]["dense"] == whole["final"]["dense"] and len(whole["points"]) == 4
    assert winner(document, "phone") == winner(whole, "phone")
    rows = list(csv.DictReader(front_csv(document).splitlines()))
    assert [(row["evaluation"], row["on_front"], row["test_top1"]) for row in rows] == [
        ("0", "True", ""),
        ("2", "True", ""),
        ("3", "False", "0.7"),
    ]
    with pytest.raises(InputError, match="There is no budget `fone`"):
        only_budget(whole, "fone")


RECORD = '{"op_code": 4, "study_id": 0, "worker_id": "w", "datetime_start": null, "user_attrs": {"evaluation": 5}}'


@pytest.mark.parametrize(
    ("change", "line", "reason"),
    [
        (lambda lines: [*lines, b"text\n"], 11, "not valid JSON"),
        (lambda lines: [*lines, b'{"op_code": 99}\n'], 11, "operation 99"),
        (lambda lines: [*lines, b"\xff\xfe\n"], 11, "no record"),
        (lambda lines: [*lines, b"[" * 100_000 + b"\n"], 11, "nested too deeply"),
        (lambda lines: [*lines, b"7\n"], 11, "no record"),
        (lambda lines: [*lines, RECORD.encode() + b"\n"], 11, "it has no `budget`"),
        (lambda lines: [*lines, RECORD.replace('{"evaluation": 5}', "3").encode() + b"\n"], 11, "no record"),
        (lambda lines: [*lines, lines[-1]], 11, "holds evaluation 4, but the next one is 5"),
        (lambda lines: [*lines[:7], *lines[8:]], 8, "holds evaluation 3, but the next one is 2"),
        (lambda lines: [*lines[:7], lines[7][:40] + b"\n", *lines[8:]], 8, "not valid JSON"),
        (lambda lines: [lines[0], *lines], 2, "must begin with one study"),
        (lambda lines: lines[5:], 1, "must begin with one study"),
    ],
)
def test_the_damaged_line_of_a_journal_is_named(recorder, tmp_path, change, line, reason):
    for number, item in enumerate(random_episodes(5, 0)):
        recorder.record(number, "random", item)
    journal = tmp_path / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 10
    journal.write_bytes(b"".join(change(lines)))
    for read in (load_study, read_journal):
        with pytest.raises(InputError, match=rf"study.journal cannot be read: line {line} .*{reason}"):
            read(tmp_path)


def test_the_last_line_may_be_unfinished(recorder, tmp_path):
    for number, item in enumerate(random_episodes(5, 0)):
        recorder.record(number, "random", item)
    journal = tmp_path / "study.journal"
    text = journal.read_bytes()
    for cut in (1, 100, 300):
        journal.write_bytes(text[:-cut])
        assert len(read_journal(tmp_path).trials) == 4


def test_the_journal_is_read_as_optuna_reads_it(recorder, tmp_path):
    for number, item in enumerate([*random_episodes(5, 1), Episode("phone", None, None, failure="lost"), episode(3, 0.5, 9, 9)]):
        recorder.record(number, "random", item)
    ours, theirs = read_journal(tmp_path), load_study(tmp_path)
    assert ours.user_attrs == theirs.user_attrs
    for one, other in zip(ours.trials, theirs.trials, strict=True):
        assert (one.number, one.state, one.params, one.user_attrs) == (
            other.number,
            other.state.name,
            other.params,
            other.user_attrs,
        )
        assert one.values == other.values


@pytest.mark.parametrize("text", ["", "{", '{"schema": 3}', "[1]", "{}"])
def test_a_damaged_front_is_named(tmp_path, text):
    (tmp_path / FRONT_JSON).write_text(text)
    with pytest.raises(InputError, match="front.json"):
        read_front(tmp_path)


def test_an_empty_front_can_be_written(tmp_path):
    write_front(tmp_path, Front(OBJECTIVES, (PHONE,), DENSE, TOP1).document(SPACE.policy_to_choices))
    assert json.loads((tmp_path / FRONT_JSON).read_text())["points"] == []
    assert (tmp_path / FRONT_CSV).read_text() == ""


def test_optuna_stays_quiet(recorder, capfd):
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
    recorder.record(0, "random", episode(40, 0.8, 40.0, 100.0))
    assert capfd.readouterr().err == ""
