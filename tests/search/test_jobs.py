"""Ray Jobs on a real head of this machine: a search is sent, followed, stopped, and its run comes back."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from secateur.envs.core import InputError
from secateur.search.jobs import Jobs, pack, unpack
from secateur.search.run.study import load_study
from tests.search.test_sweep import values
from tests.toy_task import SOURCE


def test_a_run_folder_survives_the_way_through_a_log(tmp_path):
    run = tmp_path / "run"
    (run / "exports").mkdir(parents=True)
    (run / "exports" / "model").write_bytes(bytes(range(256)))
    text = pack(run)
    assert text.isascii()
    unpack(text, tmp_path / "copy")
    assert (tmp_path / "copy" / "exports" / "model").read_bytes() == bytes(range(256))
    with pytest.raises(InputError, match="has no run"):
        pack(tmp_path / "nothing")


def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path):
    import base64
    import io
    import tarfile

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(base64.b64encode(content.getvalue()).decode(), tmp_path / "copy")
    assert not (tmp_path / "outside").exists()


@pytest.fixture(scope="module")
def address():
    """The dashboard of a cluster that this module starts; skipped where ray[default] is not installed."""
    pytest.importorskip("aiohttp", reason="needs the extra `jobs`")
    pytest.importorskip("opencensus", reason="needs the extra `jobs`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="sj-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("HOME", folder)  # runs of jobs lie there
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--temp-dir={folder}", "--port=0"]
        options = ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--num-cpus=2", "--min-worker-port=0"]
        head = subprocess.Popen([*command, *options, "--max-worker-port=0", "--disable-usage-stats"], stdout=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def command(*arguments, code=0):
    """Return what a command prints; in a process of its own, because Ray reads the token when it is imported."""
    done = subprocess.run([sys.executable, "-m", "secateur", *map(str, arguments)], capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_is_sent_followed_stopped_and_fetched(address, tmp_path, monkeypatch):
    (tmp_path / "sweep_task.py").write_text(SOURCE)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(values()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    where = ("--address", address)
    _wait_until(lambda: subprocess.run([sys.executable, "-m", "secateur", "jobs", *where], capture_output=True).returncode == 0)
    printed = command("submit", "toy.yaml", *where, "--set", "search.evaluations=4", "--set", "search.workers=1", "--follow",
                      "--fetch", "fetched")  # fmt: skip
    job = printed.split()[0]
    assert "starting the workers" in printed and len(load_study(tmp_path / "fetched" / job).trials) == 4
    broken = command("submit", "nothing.yaml", *where, "--wait", code=1).split()[0]
    assert "there is no such file" in command("jobs", *where, "--log", broken)
    endless = command("submit", "toy.yaml", *where, "--set", "search.evaluations=100000").split()[0]
    _wait_until(lambda: "evaluations " in command("jobs", *where, "--log", endless))
    command("jobs", *where, "--stop", endless)
    _wait_until(lambda: f"{endless}  STOPPED" in command("jobs", *where))
    listed = command("jobs", *where)
    assert f"{job}  SUCCEEDED" in listed and f"{broken}  FAILED" in listed
    command("jobs", *where, "--fetch", endless, "--output", "fetched")
    assert len(load_study(tmp_path / "fetched" / endless).trials) >= 1
    command("jobs", *where, "--fetch", endless, "--output", "fetched", code=2)


def _wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(1)


def test_an_address_without_a_cluster_is_an_error(monkeypatch):
    with pytest.raises(InputError, match="Ray Jobs needs|must be the address of the cluster's dashboard"):
        Jobs("http://127.0.0.1:9")
