"""The process of the search is killed with SIGKILL at fixed moments; what it has recorded is kept, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest

from secateur.envs.core import InputError
from secateur.search.results import winners
from secateur.search.run import folder as folders
from secateur.search.run import search as engine
from secateur.search.run.study import JOURNAL, StudyRecorder
from tests.faults.conftest import EVALUATIONS, assert_continued, in_child, killing, resume, run, trials

pytestmark = pytest.mark.faults

MOMENTS = {
    "the manifest is written": (engine, "write_manifest", 1, True, 0),
    "the study has no attributes": ("study", "set_user_attr", 1, False, 0),
    "the study has one attribute": ("study", "set_user_attr", 1, True, 0),
    "before the first front": (engine, "write_front", 1, False, 0),
    "after the first front": (engine, "write_front", 1, True, 0),
    "before the first record": (StudyRecorder, "record", 1, False, 0),
    "after the first record": (StudyRecorder, "record", 1, True, 1),
    "after the fourth record": (StudyRecorder, "record", 4, True, 4),
    "before the last record": (StudyRecorder, "record", EVALUATIONS, False, EVALUATIONS - 1),
    "a front is half written": (os, "replace", 6, False, None),
    "the front of the end": (engine, "finalize", 1, False, EVALUATIONS),
    "the finalists are scored": (engine, "finalize", 1, True, EVALUATIONS),
    "the dense model is scored": (engine, "dense_test_score", 1, True, EVALUATIONS),
    "the last front": (engine, "write_front", -1, True, EVALUATIONS),
}
"""{moment: (owner, function, number of its call, after it, evaluations recorded until then)}."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_search_is_continued(tmp_path, monkeypatch, straight, moment):
    owner, name, call, after, recorded = MOMENTS[moment]
    if owner == "study":
        import optuna

        owner = optuna.Study
    if call < 0:  # count the calls of a whole run first
        calls, function = [], getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *arguments: (calls.append(1), function(*arguments))[1])
            run(tmp_path / "counted")
        call = len(calls)
    with monkeypatch.context() as patch:
        killing(patch, owner, name, call, after)
        assert in_child(lambda: run(tmp_path)) == -signal.SIGKILL
    folder = tmp_path / "run"
    before = trials(folder) if recorded is None or recorded > 0 else []
    assert recorded is None or len(before) == recorded
    assert_continued(folder, straight, before)


def test_a_run_without_a_manifest_has_nothing_to_lose(tmp_path, monkeypatch):
    killing(monkeypatch, engine, "create_run_folder")
    assert in_child(lambda: run(tmp_path)) == -signal.SIGKILL
    with pytest.raises(InputError, match="is not a run: it has no manifest.json"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("call", range(1, 6))
def test_a_search_that_is_killed_again_and_again_is_continued(tmp_path, monkeypatch, straight, call):
    """Each process records `call` evaluations and is killed, until the run is complete."""
    with monkeypatch.context() as patch:
        killing(patch, StudyRecorder, "record", call)
        status, folder = in_child(lambda: run(tmp_path)), tmp_path / "run"
        while status == -signal.SIGKILL:
            status = in_child(lambda: resume(folder))
    assert status == 0 and trials(folder) == trials(straight)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_a_record_that_is_half_written_is_made_again(tmp_path, monkeypatch, straight, share):
    folder = run(tmp_path, search={"agent": "random", "evaluations": 4, "workers": 0})
    journal, before = folder / JOURNAL, trials(folder)
    lines = journal.read_bytes().splitlines(keepends=True)
    with journal.open("ab") as file:
        file.write(lines[-1][: int(share * len(lines[-1]))])
    os.symlink(journal, f"{journal}.lock")  # the process was killed while it held Optuna's lock
    resume(folder, [f"search.evaluations={EVALUATIONS}"])
    assert trials(folder)[:4] == before and trials(folder) == trials(straight)
    assert not os.path.lexists(f"{journal}.lock")


@pytest.mark.parametrize("name", ["write_export", "verify"])
@pytest.mark.parametrize("call, after", [(1, False), (1, True), (2, False), (2, True)])
def test_a_search_that_is_killed_while_it_exports_is_continued(tmp_path, monkeypatch, name, call, after):
    """Exports and checks are stand-ins: the real ones take long and have tests of their own."""

    class Steps:
        @staticmethod
        def write_export(folder, *rest):
            folder.mkdir(parents=True)  # fails if an earlier export is left
            (folder / "policy.json").write_text(json.dumps("a model"))

        @staticmethod
        def verify(folder, **arguments):
            assert (folder / "policy.json").is_file()
            return SimpleNamespace(
                limits=(), latency=SimpleNamespace(milliseconds=1.0, dense_milliseconds=2.0), passed=True, failures=(),
                runtime="onnxruntime", runtime_version="1", threads=1,
            )  # fmt: skip

    monkeypatch.setattr(winners, "write_export", lambda *arguments: Steps.write_export(*arguments))
    function = winners.verify_winners
    monkeypatch.setattr(engine, "verify_winners", lambda *some: function(*some, verify=lambda *a, **o: Steps.verify(*a, **o)))
    sections = {"finalize": {"top": 1, "verify": True, "recovery": []}}
    with monkeypatch.context() as patch:
        killing(patch, Steps, name, call, after)
        assert in_child(lambda: run(tmp_path, **sections)) == -signal.SIGKILL
    folder = tmp_path / "run"
    before = trials(folder)
    assert len(before) == EVALUATIONS
    resume(folder)
    assert trials(folder) == before
    assert sorted(export.name for export in (folder / "exports").iterdir()) == ["half", "third"]
    assert folders.load_manifest(folder)
