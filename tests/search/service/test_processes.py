"""Processes of searches: one at a time, they outlive the server, and states are right whatever happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from secateur.cost_models.core import InputError
from secateur.search.service.processes import Processes
from secateur.search.service.store import LOCK, OUTCOME, Caller, Store, is_locked, take_lock, write_json

EVERYONE = Caller("eve", "admin")
SLEEP = "import sys, time; time.sleep(60)"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def started(monkeypatch):
    """The processes of searches sleep; they are ended after the test."""
    popen, children = subprocess.Popen, []

    def sleeping(command, **options):
        children.append(popen([sys.executable, "-c", SLEEP], **options))
        return children[-1]

    monkeypatch.setattr("secateur.search.service.processes.subprocess.Popen", sleeping)
    yield children
    for child in children:
        child.kill()
        child.wait()


def add(store, count=1):
    return [store.add("ann", {"number": number}, "net")[0] for number in range(count)]


def states(store):
    return [search.state for search in reversed(store.list(None))]


def until(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within ten seconds")


def test_searches_wait_for_their_turn_oldest_first(store, started):
    add(store, 3)
    processes = Processes(store, 2)
    assert [one.id for one in processes.start_waiting()] == [one.id for one in reversed(store.list(None))][:2]
    assert states(store) == ["running", "running", "queued"]
    assert processes.start_waiting() == []
    started[0].kill()
    until(lambda: states(store)[0] == "interrupted")
    processes.start_waiting()
    assert states(store) == ["interrupted", "running", "running"]


def test_another_server_on_the_same_store_sees_what_runs_and_starts_nothing_twice(store, started):
    add(store)
    Processes(store, 1).start_waiting()
    again = Store(store.folder)
    assert states(again) == ["running"]
    assert Processes(again, 5).start_waiting() == []
    assert len(started) == 1


def test_a_process_that_ends_without_a_word_can_be_resumed(store, started):
    (search,) = add(store)
    processes = Processes(store, 1)
    processes.start_waiting()
    with pytest.raises(InputError, match="running; cancel it first"):
        processes.resume(search, {})
    os.kill(int((search.folder / LOCK).read_text()), signal.SIGKILL)
    until(lambda: states(store) == ["interrupted"])
    processes.resume(store.list(None)[0], {"search.evaluations": 9})
    assert states(store) == ["queued"]
    processes.start_waiting()
    assert states(store) == ["running"]


def test_a_running_search_gets_a_signal(store, started):
    (search,) = add(store)
    processes = Processes(store, 1)
    processes.start_waiting()
    processes.cancel(store.list(None)[0], seconds=10)
    assert started[0].wait() == -signal.SIGTERM


def test_the_outcome_counts_once_the_process_has_ended(store):
    (search,) = add(store)
    store.started(search)
    lock = take_lock(search.folder)
    assert take_lock(search.folder) is None
    write_json(search.folder / OUTCOME, {"state": "failed", "message": "Nothing fits."})
    assert store.list(None)[0].state == "running"
    os.close(lock)
    assert not is_locked(search.folder)
    found = store.list(None)[0]
    assert (found.state, found.message) == ("failed", "Nothing fits.")


def test_the_store_is_for_its_user_alone(store):
    assert store.folder.stat().st_mode & 0o077 == 0
    assert store.searches.stat().st_mode & 0o077 == 0


def test_a_store_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used"):
        Store(tmp_path / "file" / "store")
