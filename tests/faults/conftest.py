"""A search of a task that costs nothing, and processes that are killed in the middle of it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from secateur.search.config import Overrides, parse_config
from secateur.search.results.document import read_front
from secateur.search.run import search as engine
from secateur.search.run.search import search
from secateur.search.run.study import load_study
from tests.toy_task import SOURCE, functions

EVALUATIONS = 8


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Ctrl-C works, although a shell starts jobs in the background with that signal ignored, and their children inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def task(tmp_path_factory):
    """The folder with the module `toy_task`, which is the working directory."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "toy_task.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        yield folder


def values(folder, **changes):
    return {
        "model": {"factory": "toy_task:Net", "input": [8]},
        "task": functions("toy_task"),
        "search": {"agent": "random", "evaluations": EVALUATIONS, "workers": 0},
        "recovery": [],
        "budgets": {"half": {"macs": "<= 60%"}, "third": {"macs": "<= 40%"}},
        "finalize": {"top": 1, "verify": False, "recovery": []},
        "output": {"root": str(folder), "name": "run"},
        **changes,
    }


def run(folder, **changes):
    """Return the folder of a search."""
    return search(parse_config(values(folder, **changes), "test.yaml"))


def resume(folder, overrides: Overrides = ()):
    """Go on with a search of the task; the files that name its module are trusted."""
    return engine.resume(folder, overrides, trust=("toy_task",))


def trials(run):
    """Return budget, choices and scores of every evaluation, in order."""
    return [(trial.user_attrs["budget"], trial.params, trial.values) for trial in load_study(run).trials]


def in_child(action):
    """Run a function in a copy of this process; return its exit status, negative if a signal has ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:
            Path("child.txt").write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing(patch, owner, name, call=1, after=True):
    """Replace a function by one that kills its process at a call: after the function's work, or before it."""
    function, calls = getattr(owner, name), []

    def killed(*arguments, **options):
        calls.append(name)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    patch.setattr(owner, name, killed)


@pytest.fixture(scope="session")
def straight(tmp_path_factory, task):
    """The folder of a run that nothing has interrupted."""
    return run(tmp_path_factory.mktemp("straight"))


def assert_continued(folder, straight, recorded):
    """Resume a run, and check that it ends as the straight one, with the evaluations that it had recorded."""
    resume(folder)
    after = trials(folder)
    assert after[: len(recorded)] == recorded, "a recorded evaluation was lost or changed"
    assert after == trials(straight), "an evaluation is missing, or recorded twice"
    assert [trial.user_attrs["evaluation"] for trial in load_study(folder).trials] == list(range(EVALUATIONS))
    assert read_front(folder) == read_front(straight)
