"""Trackers follow every event of a search, from the configuration or from Python, and cannot break it."""

from __future__ import annotations

import math
import struct
import time

import pytest

import secateur
from secateur.envs.core import InputError
from secateur.search.config import parse_config
from secateur.search.tracking import TRACKERS
from secateur.search.tracking.core import ScalarTracker, Trackers
from tests.toy_task import SOURCE, functions

VALUES = {
    "model": {"factory": "tracked_task:Net", "input": [8]},
    "task": functions("tracked_task"),
    "search": {"agent": "random", "evaluations": 5, "workers": 0},
    "recovery": [],
    "budgets": {"half": {"macs": "<= 60%"}, "tiny": {"macs": "<= 40%"}},
    "finalize": {"top": 1, "verify": False, "recovery": []},
}


@pytest.fixture(scope="module", autouse=True)
def task(tmp_path_factory):
    """The module that the configuration names."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "tracked_task.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Events(secateur.Tracker):
    """Keeps the events as tuples."""

    def __init__(self):
        self.events = []

    def on_search_start(self, start):
        self.events.append(("start", start.done, start.evaluations, start.metric.name, start.run.is_dir()))

    def on_evaluation(self, number, episode):
        self.events.append(("evaluation", number, episode.evaluation.score))

    def on_front_change(self, front):
        self.events.append(("front", front.evaluations))

    def on_finalist(self, finalist):
        self.events.append(("finalist", finalist.budget, finalist.final.score))

    def on_epoch(self, evaluation, epoch):
        self.events.append(("epoch", evaluation, epoch.epoch))

    def on_end(self, error):
        self.events.append(("end", error))

    def of(self, kind):
        return [event for event in self.events if event[0] == kind]


class Scalars(ScalarTracker):
    def __init__(self):
        self.logged, self.closed = [], []

    def open(self, start):
        self.start = start

    def log(self, values, step):
        self.logged.append((dict(values), step))

    def close(self, error):
        self.closed.append(error)


def values(folder, trackers=(), **changes):
    return {**VALUES, "output": {"root": str(folder), "name": "run", "trackers": list(trackers)}, **changes}


def test_every_event_is_told_in_order(tmp_path):
    seen = Events()
    run = secateur.search(values(tmp_path), trackers=[seen])
    trials = run.trials
    assert seen.events[0] == ("start", 0, 5, "error", True) and seen.events[-1] == ("end", None)
    assert [event[1] for event in seen.of("evaluation")] == list(range(5))
    assert [event[2] for event in seen.of("evaluation")] == pytest.approx(list(trials["error"]))
    assert seen.of("front")[0] == ("front", 1) and len(seen.of("front")) <= 5
    tested = {event[1]: event[2] for event in seen.of("finalist")}
    assert tested == {budget: run.best(budget).test_score for budget in VALUES["budgets"]}


def test_a_resumed_search_tells_new_evaluations_only(tmp_path):
    secateur.search(values(tmp_path))
    seen = Events()
    secateur.resume(tmp_path / "run", {"search.evaluations": 8}, trust=("tracked_task",), trackers=[seen])
    assert seen.events[0][:3] == ("start", 5, 8)
    assert [event[1] for event in seen.of("evaluation")] == [5, 6, 7]


def test_epochs_of_a_training_are_told(tmp_path):
    finalize = {**VALUES["finalize"], "training": {"epochs": 2, "batch_size": 32}}
    seen, later, kept = Events(), Events(), Scalars()
    run = secateur.search(values(tmp_path, finalize=finalize, budgets={"half": {"macs": "<= 60%"}}), trackers=[seen, kept])
    assert [event[2] for event in seen.of("epoch")] == [1, 2]
    training = [logged for logged, _ in kept.logged if any(name.startswith("training/") for name in logged)]
    assert [{name.split("/")[2] for name in logged} for logged in training] == [{"loss", "learning_rate", "validation"}] * 2
    secateur.finalize(run, epochs=3, trackers=[later])
    assert [event[2] for event in later.of("epoch")] == [1, 2, 3]
    assert later.events[0][:2] == ("start", 5) and later.events[-1] == ("end", None)


def test_what_ends_a_search_is_told(tmp_path):
    class Ending(Events):
        def on_evaluation(self, number, episode):
            super().on_evaluation(number, episode)
            raise KeyboardInterrupt

    seen = Ending()
    with pytest.raises(KeyboardInterrupt):
        secateur.search(values(tmp_path), trackers=[seen])
    assert isinstance(seen.events[-1][1], KeyboardInterrupt) and len(seen.of("evaluation")) == 1


@pytest.mark.parametrize("error", [ValueError("full"), SystemExit(1)])
def test_a_tracker_that_fails_is_left_out_and_the_search_goes_on(tmp_path, capsys, error):
    class Failing(Events):
        def on_evaluation(self, number, episode):
            super().on_evaluation(number, episode)
            raise error

    failing, sound = Failing(), Events()
    run = secateur.search(values(tmp_path), progress=True, trackers=[failing, sound])
    assert len(run.trials) == 5 and len(sound.of("evaluation")) == 5
    assert [event[0] for event in failing.events] == ["start", "evaluation"]
    printed = capsys.readouterr().err
    assert printed.count("The tracker `Failing` failed in on_evaluation and is not called again") == 1


def test_numbers_of_every_event(tmp_path):
    kept = Scalars()
    run = secateur.search(
        values(tmp_path, finalize={**VALUES["finalize"], "training": {"epochs": 1, "batch_size": 32}}), trackers=[kept]
    )
    names = {name for logged, _ in kept.logged for name in logged}
    assert {"evaluation/score", "evaluation/seconds", "evaluation/feasible", "evaluation/cost/macs"} <= names
    assert {"hypervolume", "best/half", "best/tiny", "finalist/half/test", "finalist/tiny/validation"} <= names
    best = [(logged["best/half"], step) for logged, step in kept.logged if "best/half" in logged]
    assert [score for score, _ in best] == sorted((score for score, _ in best), reverse=True)
    limit = next(budget.limits["macs"] for budget in kept.start.budgets if budget.name == "half")
    assert best[-1][0] == pytest.approx(run.trials.query(f"macs <= {limit}")["error"].min())
    assert kept.closed == [None]


def test_a_tracker_that_could_not_open_is_not_closed():
    class Closed(Scalars):
        def open(self, start):
            raise OSError("no server")

    notes, tracker = [], Closed()
    with Trackers([("one", tracker)], notes.append).following(None):
        pass
    assert not tracker.closed and notes == ["The tracker `one` failed in on_search_start and is not called again: "
                                            "AttributeError: 'NoneType' object has no attribute 'done'"]  # fmt: skip


def events_of(folder):
    """{tag: [(step, value)]} of TensorBoard's event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])  # a checksum of 4 bytes follows length and record
            at += length + 16
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_has_every_evaluation_also_after_a_resumption(tmp_path):
    run = secateur.search(values(tmp_path, ["tensorboard"]))
    secateur.resume(run, {"search.evaluations": 7})
    found = events_of(run.folder / "tensorboard")
    assert [step for step, _ in found["evaluation/score"]] == list(range(7))
    assert [score for _, score in found["evaluation/score"]] == pytest.approx(list(secateur.load_run(run.folder).trials["error"]))
    assert "finalist/half/test" in found


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_has_one_run_per_search(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = secateur.search(values(tmp_path, [{"name": "mlflow", "options": {"tracking_uri": uri, "experiment": "toys"}}]))
    secateur.resume(run, {"search.evaluations": 7})
    client = mlflow.MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["search.agent"] == "random"
    history = client.get_metric_history(found.info.run_id, "evaluation/score")
    assert sorted(metric.step for metric in history) == list(range(7))
    assert math.isclose(found.data.metrics["finalist/half/test"], secateur.load_run(run.folder).best("half").test_score)


@pytest.mark.slow  # its process writes the file some seconds later
@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = secateur.search(values(tmp_path, [{"name": "wandb", "options": {"mode": "offline", "project": "toys"}}]), progress=True)
    (file,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    end = time.monotonic() + 30
    while b"finalist/half/test" not in (data := file.read_bytes()) and time.monotonic() < end:
        time.sleep(0.2)  # a process of W&B writes the file
    assert b"evaluation/score" in data and b"finalist/half/test" in data and b"toys" in data


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_library_that_is_not_installed_is_one_note(tmp_path, capsys, monkeypatch, name):
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    run = secateur.search(values(tmp_path, [name]), progress=True)
    assert len(run.trials) == 5
    assert f"not installed: pip install 'secateur[{name}]'" in capsys.readouterr().err.replace("\n", " ")


def test_names_and_options_are_checked_with_the_configuration(tmp_path):
    with pytest.raises(InputError, match="(?s)output.trackers.*unknown name.*Did you mean `tensorboard`"):
        parse_config(values(tmp_path, ["tensorbord"]), "test.yaml")
    with pytest.raises(InputError, match="(?s)`wandb`: option `mode`: input should be 'online' or 'offline'"):
        parse_config(values(tmp_path, [{"name": "wandb", "options": {"mode": "on"}}]), "test.yaml")


def test_every_tracker_is_one_class_with_its_options():
    for config, tracker in TRACKERS.values():
        assert issubclass(tracker, secateur.Tracker) and tracker(config())
