"""SIGTERM and Ctrl-C: the first one finishes what runs and saves it; the second one stops the search at once."""

from __future__ import annotations

import glob
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from secateur.envs import evaluator
from secateur.search.run import ray_cluster
from secateur.search.run import search as engine
from secateur.search.run.signals import Ended, ended_by_signals, exit_code, first_signal_waits
from secateur.search.run.study import JOURNAL
from tests.faults.conftest import EVALUATIONS, assert_continued, in_child, resume, run, trials

pytestmark = pytest.mark.faults

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def ending(action):
    """Return an action that ends with the exit code of the command line."""

    def end():
        try:
            action()
        except KeyboardInterrupt as error:
            os._exit(exit_code(error))

    return end


def signalling(patch, owner, name, number, call, times=1):
    """Replace a function by one whose process gets a signal at a call, perhaps several times."""
    function, calls = getattr(owner, name), []

    def signalled(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return function(*arguments, **options)

    patch.setattr(owner, name, signalled)


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("call", [1, 2, 4, 6, EVALUATIONS])
def test_the_first_signal_finishes_and_saves_what_runs(tmp_path, monkeypatch, straight, number, call):
    with monkeypatch.context() as patch:
        signalling(patch, evaluator.Evaluator, "measure", number, call)
        assert in_child(ending(lambda: run(tmp_path))) == CODES[number]
    before = trials(tmp_path / "run")
    assert len(before) == call, "the evaluation that ran was finished and recorded"
    assert_continued(tmp_path / "run", straight, before)


@pytest.mark.parametrize("call", [1, 2, 4, 6, EVALUATIONS])
def test_the_second_signal_stops_at_once(tmp_path, monkeypatch, straight, call):
    with monkeypatch.context() as patch:
        signalling(patch, evaluator.Evaluator, "measure", signal.SIGINT, call, times=2)
        assert in_child(ending(lambda: run(tmp_path))) == 130
    before = trials(tmp_path / "run")
    assert len(before) == call - 1
    assert_continued(tmp_path / "run", straight, before)


@pytest.mark.parametrize("name", ["build_problem", "build_agent", "open_runner", "finalize", "dense_test_score"])
def test_before_and_after_the_evaluations_one_signal_is_enough(tmp_path, monkeypatch, straight, name):
    with monkeypatch.context() as patch:
        signalling(patch, engine, name, signal.SIGTERM, 1)
        assert in_child(ending(lambda: run(tmp_path))) == 143
    if name in ("finalize", "dense_test_score"):
        assert_continued(tmp_path / "run", straight, trials(straight))
    else:
        assert not (tmp_path / "run").exists()


def test_handlers_are_restored_and_ignored_signals_stay_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ended_by_signals(), first_signal_waits() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(Ended), first_signal_waits() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    assert signal.getsignal(signal.SIGINT) is before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# -------------------------------------------------------------------------------------------------------------- with Ray


def marked(variable):
    """Return the names of the processes that have an environment variable, by their numbers."""
    found = {}
    for folder in map(Path, glob.glob("/proc/[0-9]*")):
        try:
            if f"\0{variable}=".encode() in b"\0" + (folder / "environ").read_bytes():
                found[folder.name] = (folder / "cmdline").read_text().strip("\0")
        except OSError:  # it has ended
            continue
    return found


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


ENDS = {
    "SIGTERM": ([signal.SIGTERM], 143),
    "Ctrl-C twice": ([signal.SIGINT, signal.SIGINT], 130),
    "SIGKILL": ([signal.SIGKILL], -signal.SIGKILL),
}


@pytest.mark.parametrize("end", ENDS)
def test_no_process_and_no_folder_is_left(tmp_path, straight, end, ray_folders):
    """A search with Ray in a session of its own; Ctrl-C reaches all its processes, as in a terminal."""
    numbers, code = ENDS[end]
    variable = f"SECATEUR_TEST_{os.getpid()}_{code & 255}"
    section = {"agent": "random", "evaluations": 5000, "workers": 1}
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ[variable] = "1"  # all processes that it starts have it
        try:
            ending(lambda: run(tmp_path, search=section))()
        finally:
            os._exit(1)
    folder = tmp_path / "run"
    wait_until(lambda: (folder / JOURNAL).is_file() and (folder / JOURNAL).read_bytes().count(b'"op_code":4') >= 3)
    assert marked(variable), "Ray runs"
    for number in numbers:
        os.killpg(child, number) if number == signal.SIGINT else os.kill(child, number)
        time.sleep(0.2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    # Two agents of a cluster that lost its head notice it after a minute, and end by themselves.
    wait_until(lambda: not [name for name in marked(variable).values() if code > 0 or "Agent" not in name])
    if code < 0:  # nobody could remove the folder: the next search does
        assert len(os.listdir(ray_folders)) == 1
        ray_cluster.remove_left_folders()
    assert not os.listdir(ray_folders)
    recorded = trials(folder)
    resume(folder, ["search.workers=0", f"search.evaluations={len(recorded) + 2}"])
    after = trials(folder)
    assert after[: len(recorded)] == recorded and len(after) == len(recorded) + 2
    assert after[:EVALUATIONS] == trials(straight)[: len(after)]


@pytest.fixture
def ray_folders(monkeypatch):
    """Where the searches of a test have Ray's folders: other tests run at the same time. The path must be short."""
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as folder:
        monkeypatch.setattr(ray_cluster, "_FOLDERS", folder)
        yield folder
