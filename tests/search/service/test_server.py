"""The server as a process: it is killed in the middle of a search, and finds the search again."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

from secateur.search.cli import app
from secateur.search.service import serve as serve_module
from secateur.search.service.store import Store

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytestmark = pytest.mark.slow

CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": 256, "calibration": 64, "validation": 200, "test": 300},
    "search": {"agent": "random", "evaluations": 60, "workers": 0, "precision": "float32"},
    "budgets": {"small": {"macs": "<= 50%"}},
    "finalize": {"top": 1, "verify": False, "recovery": []},
}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Server:
    """A server process."""

    def __init__(self, store, port):
        command = [sys.executable, "-P", "-m", "secateur", "serve", "--no-token", "--store", str(store), "--port", str(port)]
        self.process, self.url = subprocess.Popen(command), f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                self.ask("/healthz")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise AssertionError("the server did not start within a minute")

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(self.url + path, data, timeout=10) as answer:
            return json.load(answer)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def test_a_killed_server_loses_nothing(tmp_path):
    server = Server(tmp_path / "store", free_port())
    try:
        found = server.ask("/v1/searches", CONFIG)["id"]
        for count in (1, 15, 30):  # evaluations after which the server is killed
            for _ in range(1200):
                at = server.ask(f"/v1/searches/{found}")
                if at["evaluations"] >= count or at["state"] not in ("queued", "running"):
                    break
                time.sleep(0.1)
            assert at["state"] in ("running", "finished"), at
            server.kill()
            server = Server(tmp_path / "store", free_port())
        for _ in range(1200):
            at = server.ask(f"/v1/searches/{found}")
            if at["state"] not in ("queued", "running"):
                break
            time.sleep(0.1)
        assert (at["state"], at["evaluations"]) == ("finished", 60)
        numbers = [row["evaluation"] for row in server.ask(f"/v1/searches/{found}/trials")]
        assert numbers == list(range(60)), "none is lost, none is there twice"
    finally:
        server.kill()


def test_a_token_is_printed_and_works(tmp_path):
    result = CliRunner().invoke(app, ["serve", "token", "--owner", "ann", "--role", "read", "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    caller = Store(tmp_path / "store").caller(result.output.strip())
    assert (caller.owner, caller.role) == ("ann", "read")


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve(tmp_path, "--no-token", "--port", str(port))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"http://127.0.0.1:{port} cannot be served: Address already in use. Choose another --host or --port." in done.stderr


def test_answers_are_sent_at_once():
    """Head and body of an answer are sent apart; otherwise the body waits until the client has acknowledged the head."""
    with serve_module._listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def serve(store, *options):
    """Run the command until it ends."""
    command = [sys.executable, "-P", "-m", "secateur", "serve", "--store", str(store), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--no-token", "--host", "0.0.0.0"], "--no-token is not for"),
        (["--data", "photos"], "NAME=FOLDER"),
        (["--data", "photos=/nowhere"], "NAME=FOLDER"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, options, sentence):
    done = serve(tmp_path / "store", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
