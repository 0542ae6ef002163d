"""Evaluations that were stopped early are counted and recorded, but are not results."""

from types import SimpleNamespace

import numpy as np

from secateur.envs.core import Budget, CompressionPolicy, Episode, Evaluation
from secateur.envs.metric import TOP1
from secateur.envs.policy_space import Decision
from secateur.search.results.front import Front
from secateur.search.run.study import StudyRecorder, load_study

HALF = Budget("half", {"macs": 50.0})
DENSE = Evaluation(0.9, {"macs": 100.0}, images=500)
WIDTHS = tuple(range(100, 0, -1))
RATIOS = tuple(1 - width / 100 for width in WIDTHS)
SPACE = SimpleNamespace(
    decisions=(Decision("prune_ratio/conv", "prune_ratio", 0, WIDTHS, RATIOS, np.linspace(0, 1, 100)),),
    policy_to_choices=lambda policy: {"prune_ratio/conv": 1 - policy.widths[0] / 100},
)


def episode(width, top1, stopped):
    evaluation = Evaluation(top1, {"macs": float(width)}, images=64 if stopped else 500, stopped=stopped, correct=b"\x01")
    return Episode("half", CompressionPolicy((width,), (8,), (8,)), evaluation, {"macs": width / 50 - 1})


def test_a_stopped_policy_is_counted_but_neither_on_a_front_nor_a_finalist():
    front = Front(("top1", "macs"), (HALF,), DENSE, TOP1)
    assert front.add(episode(40, 0.8, stopped=False))
    assert not front.add(episode(30, 0.85, stopped=True)), "even if its estimate looks good"
    assert [candidate.number for candidate in front.of()] == [0] == [c.number for c in front.best("half", 5)]
    assert (front.evaluations, front.feasible, front.failed) == (2, 2, 0)
    document = front.document(SPACE.policy_to_choices)
    assert [point["evaluation"] for point in document["points"]] == [0]
    assert not {"correct", "stopped"} & set(document["points"][0])


def test_the_study_records_which_evaluations_were_stopped(tmp_path):
    recorder = StudyRecorder(tmp_path, SPACE, ("top1", "macs"), TOP1, (HALF,))
    recorder.record(0, "random", episode(40, 0.8, stopped=False))
    recorder.record(1, "random", episode(30, 0.7, stopped=True))
    full, stopped = load_study(tmp_path).trials
    assert (full.user_attrs["stopped"], stopped.user_attrs["stopped"]) == (False, True)
    assert stopped.user_attrs["images"] == 64 and stopped.user_attrs["feasible"] is True
    assert [trial.user_attrs["evaluation"] for trial in load_study(tmp_path).best_trials] == [0]
