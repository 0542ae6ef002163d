"""The client of the service: against a real server in a thread, and against servers that are broken or hostile."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import secateur

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
import uvicorn

from secateur.search import client as module
from secateur.search.cli import app
from secateur.search.connection import server_address
from secateur.search.service.access import Service
from secateur.search.service.app import make_app
from secateur.search.service.processes import Processes
from secateur.search.service.rules import Rules
from secateur.search.service.store import Store

DATA = Path(__file__).parents[1] / "data" / "version_0_1"
DOCS = Path(__file__).parents[2] / "docs" / "service.md"

CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": 256, "calibration": 64, "validation": 200, "test": 300},
    "search": {"agent": "random", "evaluations": 4, "workers": 0, "precision": "float32"},
    "recovery": [],
    "budgets": {"phone": {"macs": "<= 50%"}},
    "finalize": {"top": 1, "verify": False, "recovery": []},
}
SMALL_AGENT = {
    "warmup": 8, "candidates": 8, "training_budgets": 3, "updates": 2, "batch": 8, "planned": 4, "hidden": 8, "critics": 2,
    "lookahead": 2,
}  # fmt: skip


class Background:
    """A server of uvicorn in a thread."""

    def __init__(self, store, port=0):
        self.processes = Processes(store, 1)
        service = Service(store, self.processes, Rules(store))
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()


@pytest.fixture(scope="module")
def background(tmp_path_factory):
    """A running service."""
    started = Background(Store(tmp_path_factory.mktemp("service") / "store"))
    yield started
    started.stop()
    for child in started.processes.children:
        child.kill()


@pytest.fixture(scope="module")
def service(background):
    """The address of a running service, and its store."""
    return f"http://127.0.0.1:{background.port}", background.processes.store


@pytest.fixture
def paused(background, monkeypatch):
    """The service starts no search until this is called."""
    monkeypatch.setattr(background.processes, "limit", 0)
    return lambda: setattr(background.processes, "limit", 1)


@pytest.fixture(scope="module")
def server(service):
    """A connected client that may launch searches."""
    url, store = service
    return secateur.connect(url, store.new_token("ann", "submit"))


@pytest.fixture(scope="module")
def example(service, tmp_path_factory):
    """The example of the documentation, which has launched a search, followed it to its end, and fetched it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "search.yaml").write_text(yaml.safe_dump(CONFIG))
    (code,) = (part.partition("```")[0] for part in DOCS.read_text().split("```python\n")[1:])
    assert "https://gpu-box" in code
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SECATEUR_TOKEN", service[1].new_token("ann", "submit"))
        defined = {"folder": folder}
        exec(code.replace("https://gpu-box", service[0]), defined)
    return defined


@pytest.fixture(scope="module")
def finished(server, example):
    """A search that has ended."""
    return server.search(example["search"].id)


@pytest.fixture
def command(service, server, monkeypatch):
    """Runs `secateur remote` with the address and the token in the environment."""
    monkeypatch.setenv("SECATEUR_SERVER", service[0])
    monkeypatch.setenv("SECATEUR_TOKEN", service[1].new_token("ann", "submit"))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, ["remote", *map(str, words)])


@contextmanager
def answering(answer, tls=None):
    """The address of a server whose answers a function writes: answer(handler)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as fake:
        if tls is not None:
            fake.socket = tls.wrap_socket(fake.socket, server_side=True)
        thread = threading.Thread(target=fake.serve_forever, args=(0.02,))
        thread.start()
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{fake.server_address[1]}"
        fake.shutdown()
        thread.join()


def send(handler, content, kind="application/json", status=200, **headers):
    """Answer a request."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def fake_service(**answers):
    """An answer function: those of a service, with others by the last part of the path."""

    def answer(handler):
        last = handler.path.partition("?")[0].rstrip("/").rpartition("/")[2]
        known = {"healthz": {"status": "ok", "version": "1"}, "data": {"roots": []}, "s1": {"id": "s1", "state": "finished"}}
        found = answers.get(last, known.get(last))
        if callable(found):
            found(handler)
        else:
            send(handler, found if found is not None else {}, status=404 if found is None else 200)

    return answer


# ---------------------------------------------------------------------------------------------------------------- searches


def test_the_example_of_the_documentation_works(example):
    assert example["search"].status == "finished"
    assert len(example["run"].trials) == 4
    assert example["run"].best("phone").evaluation == example["search"].best("phone")["evaluation"]
    assert not example["model"].training and sum(values.numel() for values in example["model"].parameters()) > 0
    assert sorted(path.name for path in example["folder"].iterdir()) == ["run", "search.yaml"]


def test_events_are_followed_to_the_end_and_go_on_after_a_number(finished):
    events = list(finished.events())
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert [event["event"] for event in events].count("evaluation") == 4
    assert (events[0]["state"], events[-1]["state"]) == ("running", "finished")
    assert list(finished.events(after=3)) == events[3:]


def test_results_are_those_of_the_run(finished):
    front, best, trials = finished.front(), finished.best("phone"), finished.trials(sort="-macs", limit=3)
    assert front["evaluations"] == 4 and list(finished.front("phone")["budgets"]) == ["phone"]
    assert best == finished.best() and best["costs"]["macs"] <= 0.5 * front["dense"]["costs"]["macs"]
    assert len(trials) == 3 and trials.macs.is_monotonic_decreasing
    assert "evaluations 4 of 4" in finished.logs()
    with pytest.raises(secateur.InputError, match="no budget `large`"):
        finished.front("large")


def test_a_search_is_fetched_into_a_new_folder_only(finished, tmp_path):
    folder = finished.fetch(tmp_path / "new" / "run")
    assert folder == tmp_path / "new" / "run" and [path.name for path in folder.parent.iterdir()] == ["run"]
    with pytest.raises(secateur.InputError, match="exists already"):
        finished.fetch(folder)


def test_searches_are_listed_and_found(server, finished):
    (listed,) = (one for one in server.searches("finished") if one["id"] == finished.id)
    assert listed["evaluations"] == 4
    assert server.search(finished.id).status == "finished"
    for identifier in ("nothing", "../x"):
        with pytest.raises(secateur.InputError, match=f"There is no search .?{identifier}"):
            server.search(identifier)


def test_lists_of_several_pages_are_joined(server, service, monkeypatch):
    made = [service[1].add("ann", {}, "many", None)[0] for _ in range(3)]
    ask = server._connection.ask
    small = lambda *words, query: ask(*words, query={**query, "page_size": 1})  # noqa: E731
    monkeypatch.setattr(server._connection, "ask", small)
    found = [one["id"] for one in server.searches()]
    for search in made:
        service[1].remove(search)
    assert [one.id for one in reversed(made)] == [one for one in found if one in {search.id for search in made}]
    assert len(found) == len(set(found))


def test_a_search_is_followed_across_a_restart_of_the_server_and_stopped(tmp_path):
    """No event is lost, and none comes twice."""
    store = Store(tmp_path / "store")
    background = Background(store)
    server = secateur.connect(f"http://127.0.0.1:{background.port}", store.new_token("ann", "submit"))
    search, numbers, evaluations = server.launch(CONFIG, {"search.evaluations": 100_000}), [], 0
    for event in search.events():
        numbers.append(event["id"])
        evaluations += event["event"] == "evaluation"
        if event["event"] == "evaluation" and evaluations == 1:
            background.stop()
            background = Background(store, background.port)
        elif event["event"] == "evaluation" and evaluations == 2:
            with pytest.raises(TimeoutError, match="is still running after 0 seconds"):
                search.wait(timeout=0)
            with pytest.raises(secateur.InputError, match="is running. Fetch it when it has ended"):
                search.fetch(tmp_path / "run")
            search.stop()
    assert search.wait() == "cancelled"
    assert numbers == list(range(1, len(numbers) + 1))
    assert 2 <= search.front()["evaluations"] == evaluations < 100_000
    with pytest.raises(secateur.InputError, match="nothing to cancel"):
        search.stop()
    with pytest.raises(secateur.InputError, match="`model.factory` cannot be changed"):
        search.resume({"model.factory": "os:system"})
    background.stop()


def test_files_are_uploaded_and_the_agent_is_asked(server, service, tmp_path, monkeypatch):
    """The search reads the uploaded weights and the uploaded device; its agent answers."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "weights.safetensors", tmp_path / "mine.safetensors")
    values = {**CONFIG, "model": {**CONFIG["model"], "weights": "mine.safetensors"}, "device": "configs/devices/h200.json"}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(values))
    changes = {"search.agent": "envelope_ddpg", "search.options": SMALL_AGENT, "search.evaluations": 10}
    search = server.launch("search.yaml", changes)
    assert search.wait() == "finished", search.logs()
    digest = hashlib.sha256((DATA / "weights.safetensors").read_bytes()).hexdigest()
    assert search.summary()["config"]["model"]["weights"] == str(service[1].files / digest)
    assert "latency_ms" in search.front()["dense"]["costs"]
    reply = search.ask({"macs": "<= 37%"}, {"macs": 0.25}, evaluations=1)
    (answer,) = reply["answers"]
    assert reply["metric"] == "top1" and reply["preference"]["macs"] == pytest.approx(0.25)
    assert answer["feasible"] and answer["costs"]["macs"] <= reply["budget"]["macs"]
    with pytest.raises(secateur.InputError, match="budget"):
        search.ask("macs<=")


def test_files_that_are_not_there_are_named(server, tmp_path):
    for weights in ("lost.safetensors", tmp_path):
        with pytest.raises(secateur.InputError, match="no such file to upload"):
            server.launch({**CONFIG, "model": {**CONFIG["model"], "weights": weights}})


def test_a_key_starts_one_search(server, paused):
    first, second = (server.launch(CONFIG, {"search.seed": 8}, key="monday") for _ in range(2))
    assert first.id == second.id
    first.stop()


def test_mistakes_are_those_that_the_server_finds(server):
    before = len(server.searches())
    with pytest.raises(secateur.InputError) as error:
        server.launch(CONFIG, {"search.agent": "bees", "budgets.phone.macs": "<= -1"})
    assert len(str(error.value).splitlines()) == 2 and "unknown name (got bees)" in str(error.value)
    assert len(server.searches()) == before


def test_a_search_without_an_agent_is_not_asked(finished):
    with pytest.raises(secateur.InputError, match=f"^search {finished.id} has no agent that can be queried"):
        finished.ask("macs<=40%")


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("token", ["wrong", None])
def test_a_token_that_is_wrong_or_missing(service, monkeypatch, token):
    monkeypatch.delenv("SECATEUR_TOKEN", raising=False)
    with pytest.raises(secateur.InputError, match="does not accept the token, or needs one.*SECATEUR_TOKEN"):
        secateur.connect(service[0], token)


def test_a_token_without_the_role(service):
    reader = secateur.connect(service[0], service[1].new_token("ann", "read"))
    with pytest.raises(secateur.InputError, match="needs a token with the role submit"):
        reader.launch(CONFIG)


@pytest.mark.parametrize("token", ["two words", "two\nlines", "näh"])
def test_tokens_that_cannot_be_sent(service, token):
    with pytest.raises(secateur.InputError, match="cannot be one"):
        secateur.connect(service[0], token)


@pytest.mark.parametrize(
    "url", ["", "gpu-box:8265", "ftp://gpu-box", "http://", "http://gpu-box:port", "http://a b", "http://gpu-box/?token=x"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(secateur.InputError, match="is no address of a server"):
        secateur.connect(url)


def test_addresses_hold_no_passwords():
    with pytest.raises(secateur.InputError, match="holds no user or password") as error:
        secateur.connect("https://ann:secret@gpu-box")
    assert "secret" not in str(error.value)
    assert server_address("https://gpu-box/lab/") == "https://gpu-box/lab"


def test_an_address_where_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(secateur.InputError, match=f"127.0.0.1:{port} does not answer: Connection refused"):
        secateur.connect(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda handler: send(handler, b"<html>hello</html>", "text/html"), "is no secateur service: it answered text/html"),
        (lambda handler: send(handler, b"<html>no</html>", "text/html", 404), "no secateur service: it answered 404 Not Found"),
        (lambda handler: send(handler, {"status": "ok"}), "is no secateur service: its /healthz has no version"),
        (lambda handler: send(handler, ["ok"]), "is no secateur service: it answered no object"),
        (lambda handler: send(handler, b'{"status"'), "is damaged"),
        (lambda handler: send(handler, b"", "text/html", 502), "answers 502 Bad Gateway"),
        (lambda handler: send(handler, b"", "text/html", 302, Location="https://other"), "redirects to https://other"),
        (lambda handler: send(handler, b"{}", "application/problem+json", 500), "answers 500 Internal Server Error"),
        (lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n"), "does not answer: 220 mail.example"),
        (lambda handler: None, "does not answer: Remote end closed connection"),
    ],
)  # fmt: skip
def test_servers_of_another_kind(answer, sentence):
    with answering(answer) as url, pytest.raises(secateur.InputError) as error:
        secateur.connect(url)
    assert sentence in str(error.value) and str(error.value).count("\n") == 0


def test_a_server_that_is_silent():
    wait = threading.Event()
    with answering(lambda handler: wait.wait(20)) as url:
        with pytest.raises(secateur.InputError, match="has not answered for 0.2 seconds"):
            secateur.connect(url, timeout=0.2)
        wait.set()


def test_tokens_are_not_sent_to_another_server():
    seen = []

    def other(handler):
        seen.append(handler.path)
        send(handler, {})

    with answering(other) as target:
        redirect = lambda handler: send(handler, b"", "text/html", 307, Location=f"{target}/healthz")  # noqa: E731
        with answering(redirect) as url, pytest.raises(secateur.InputError, match="redirects"):
            secateur.connect(url, "sct_token")
    assert seen == []


def test_a_plain_server_behind_an_https_address(service):
    with pytest.raises(secateur.InputError, match="TLS fails: .*begins with http://"):
        secateur.connect(service[0].replace("http:", "https:"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_certificate_that_nobody_trusts(tmp_path, monkeypatch):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with answering(fake_service(), tls) as url:
        with pytest.raises(secateur.InputError, match="certificate is not trusted: self.signed certificate.*SSL_CERT_FILE"):
            secateur.connect(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert secateur.connect(url).version == "1"


# ------------------------------------------------------------------------------------------------------- hostile downloads


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "/tmp/evil.json", "", ".", "a\0b", "..", 7, None])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    files = {"artifacts": [{"name": "good.json", "bytes": 2}, {"name": name, "bytes": 2}]}
    content = lambda handler: send(handler, b"{}", X_SHA256=hashlib.sha256(b"{}").hexdigest())  # noqa: E731
    answers = {"artifacts": files, "good.json": content, "evil.json": content}
    with answering(fake_service(**answers)) as url:
        search = secateur.connect(url).search("s1")
        with pytest.raises(secateur.InputError, match="leads out of the folder|has no `name`"):
            search.fetch(tmp_path / "below" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a", "a/b"], ["a", "a"], ["a" * 300]])
def test_names_that_cannot_be_files(tmp_path, names):
    content = lambda handler: send(handler, b"{}", X_SHA256=hashlib.sha256(b"{}").hexdigest())  # noqa: E731
    answers = {"artifacts": {"artifacts": [{"name": name, "bytes": 2} for name in names]}} | dict.fromkeys(
        ["a", "b", "a" * 300], content
    )
    with answering(fake_service(**answers)) as url:
        search = secateur.connect(url).search("s1")
        with pytest.raises(secateur.InputError, match="run cannot be written"):
            search.fetch(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "size", "headers"),
    [
        (b"damaged", 5, {"X_SHA256": hashlib.sha256(b"model").hexdigest()}),
        (b"model" * 300_000, 5, {"X_SHA256": hashlib.sha256(b"model" * 300_000).hexdigest()}),
        (b"model", 5, {}),
        (b"mod", 5, {"X_SHA256": hashlib.sha256(b"model").hexdigest(), "Content_Length": 5}),
    ],
    ids=["damaged", "larger", "no digest", "cut"],
)
def test_files_that_arrive_otherwise_leave_nothing(tmp_path, content, size, headers):
    answers = {
        "artifacts": {"artifacts": [{"name": "model.onnx", "bytes": size}]},
        "model.onnx": lambda handler: send(handler, content, "application/octet-stream", **headers),
    }
    with answering(fake_service(**answers)) as url:
        search = secateur.connect(url).search("s1")
        with pytest.raises(secateur.InputError, match="model.onnx did not arrive as it is"):
            search.fetch(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_events_of_a_broken_stream_come_once(monkeypatch):
    """The stream breaks after two events; the next connection asks for what follows them."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    asked, states = [], ["running", "finished"]

    def events(handler):
        after = int(handler.headers["Last-Event-ID"])
        asked.append(after)
        texts = [f"id: {number}\ndata: {json.dumps({'id': number})}\n\n" for number in range(after + 1, min(after + 2, 3) + 1)]
        torn = "id: 9\ndata: {" if after == 0 else ""
        send(handler, ("".join(texts) + torn).encode(), "text/event-stream")

    state = lambda handler: send(handler, {"state": states.pop(0) if len(states) > 1 else states[0]})  # noqa: E731
    with answering(fake_service(events=events, s1=state)) as url:
        search = module.RemoteSearch(secateur.connect(url)._connection, "s1")
        assert [event["id"] for event in search.events()] == [1, 2, 3]
    assert asked == [0, 2, 3]


def test_a_server_that_stays_away_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    with answering(fake_service()) as url:
        search = secateur.connect(url).search("s1")
    for call in (search.wait, lambda: list(search.events())):
        with pytest.raises(secateur.InputError, match="does not answer"):
            call()


# ----------------------------------------------------------------------------------------------------------------- command


def test_the_command_shows_a_search_and_fetches_it(command, finished, tmp_path):
    identifier = finished.id
    *_, last = lines = command("follow", identifier).stdout.splitlines()
    assert any(line.startswith("evaluation 4 of 4, best: phone ") for line in lines) and last
    assert json.loads(command("front", identifier, "--json").stdout)["evaluations"] == 4
    assert "phone: macs <= " in command("front", identifier).stdout
    assert "4 of 4 evaluations" in command("query", identifier).stdout
    assert command("export", identifier, "--budget", "phone").stdout == "export: exports/phone\n"
    assert "evaluations 4 of 4" in command("logs", identifier).stdout
    assert f"{identifier} " in command("list", "--state", "finished").stdout
    assert command("fetch", identifier, tmp_path / "run").stdout == f"run: {tmp_path / 'run'}\n"
    assert (tmp_path / "run" / "exports" / "phone" / "policy.json").is_file()


def test_the_command_waits_for_the_search_that_it_launches(command, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Server, "launch", lambda server, config, overrides: server.search(finished.id))
    done = command("search", "search.yaml", "--follow", "--fetch", tmp_path / "run")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == finished.id and done.stdout.splitlines()[-1] == f"run: {tmp_path / 'run'}"
    assert done.stderr == f"{finished.id}: finished\n"


def test_the_command_launches_stops_and_resumes(command, server, paused, tmp_path):
    """A search that is stopped before it starts, and resumed with changes, begins with the changes."""
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(CONFIG))
    identifier = command("search", tmp_path / "search.yaml", "--set", "search.evaluations=100000").stdout.strip()
    assert command("stop", identifier).stdout == f"{identifier}: cancelled\n"
    assert command("follow", identifier).exit_code == 1
    paused()
    assert command("resume", identifier, "--set", "search.evaluations=1").stdout == f"{identifier}: queued\n"
    search = server.search(identifier)
    assert search.wait() == "finished", search.logs()
    assert search.front()["evaluations"] == 1


def test_the_command_uploads(command):
    digest = hashlib.sha256((DATA / "weights.safetensors").read_bytes()).hexdigest()
    assert command("upload", DATA / "weights.safetensors").stdout == f"sha256:{digest}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["follow", "nothing"], "error: There is no search nothing."),
        (["list", "--state", "lost"], "error: `query.state`"),
        (["upload", "nothing.safetensors"], "error: nothing.safetensors: there is no such file to upload."),
        (["search", "nothing.yaml"], "error: nothing.yaml: there is no such file."),
        (["list", "--server", "gpu-box"], "error: 'gpu-box' is no address of a server"),
    ],
)
def test_wrong_input_of_the_command(command, words, sentence):
    done = command(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(sentence) and len(done.stderr.splitlines()) == 1


def test_the_command_names_the_variable_of_the_token(command, monkeypatch):
    monkeypatch.setenv("SECATEUR_TOKEN", "wrong")
    done = command("list")
    assert done.exit_code == 2 and done.stderr.endswith("Put it into SECATEUR_TOKEN.\n") and "wrong" not in done.stderr
