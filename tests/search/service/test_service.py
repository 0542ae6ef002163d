"""The service over HTTP: searches, tokens, errors, results. The processes of searches are real; only the network is not."""

from __future__ import annotations

import hashlib
import json
import pickle
import time

import numpy as np
import pytest
from safetensors.numpy import save

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from fastapi.testclient import TestClient

from secateur.search.service.access import Limits, Service
from secateur.search.service.app import make_app
from secateur.search.service.processes import Processes
from secateur.search.service.rules import Rules
from secateur.search.service.store import RUN, Store

CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": 256, "calibration": 64, "validation": 200, "test": 300},
    "search": {"agent": "random", "evaluations": 4, "workers": 0, "precision": "float32"},
    "recovery": [],
    "budgets": {"small": {"macs": "<= 50%"}},
    "finalize": {"top": 1, "verify": False, "recovery": []},
}


def make_service(folder, **options):
    store = Store(folder)
    return Service(store, Processes(store, 1), Rules(store), **options)


@pytest.fixture
def service(tmp_path):
    """A service whose searches wait: nothing starts them."""
    return make_service(tmp_path / "store")


@pytest.fixture
def client(service):
    """Sends requests without a running starter; with the tokens of `tokens`."""
    return TestClient(make_app(service))


@pytest.fixture
def tokens(service):
    return {
        f"{owner} {role}": {"Authorization": f"Bearer {service.store.new_token(owner, role)}"}
        for owner, role in (("ann", "read"), ("ann", "submit"), ("bob", "submit"), ("eve", "admin"))
    }


@pytest.fixture
def ann(tokens):
    return tokens["ann submit"]


# --------------------------------------------------------------------------------------------------------------- access


def test_without_a_token_nothing_but_health_and_the_page_is_shown(client):
    assert client.get("/v1/searches").status_code == 401
    answer = client.post("/v1/searches", json=CONFIG, headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/healthz").json()["status"] == "ok"
    assert "<title>secateur</title>" in client.get("/").text


def test_roles_allow_what_they_say(client, tokens):
    assert client.get("/v1/searches", headers=tokens["ann read"]).status_code == 200
    answer = client.post("/v1/searches", json=CONFIG, headers=tokens["ann read"])
    assert answer.status_code == 403
    assert "role submit" in answer.json()["title"]


def test_searches_of_others_are_not_seen(client, tokens, ann):
    found = client.post("/v1/searches", json=CONFIG, headers=ann).json()
    assert [one["id"] for one in client.get("/v1/searches", headers=tokens["ann read"]).json()["searches"]] == [found["id"]]
    assert client.get("/v1/searches", headers=tokens["bob submit"]).json()["searches"] == []
    for path in ("", "/front", "/logs", "/events", "/artifacts"):
        assert client.get(f"/v1/searches/{found['id']}{path}", headers=tokens["bob submit"]).status_code == 404
    assert client.post(f"/v1/searches/{found['id']}:cancel", headers=tokens["bob submit"]).status_code == 404
    assert client.get(f"/v1/searches/{found['id']}", headers=tokens["eve admin"]).status_code == 200


def test_tokens_are_stored_hashed(service, tokens):
    token = tokens["ann submit"]["Authorization"].removeprefix("Bearer ")
    everything = b"".join(path.read_bytes() for path in service.store.folder.rglob("*") if path.is_file())
    assert token.encode() not in everything
    assert hashlib.sha256(token.encode()).hexdigest().encode() in everything


# -------------------------------------------------------------------------------------------------------------- requests


def test_validation_starts_nothing_and_lists_every_mistake(client, ann):
    good = client.post("/v1/searches?validate_only=true", json=CONFIG, headers=ann)
    assert good.status_code == 200
    assert good.json()["config"]["search"]["agent"] == "random"
    bad = {**CONFIG, "search": {"evaluations": 0, "agent": "bees"}, "budgets": {"small": {"mac": "<= 50%"}}}
    answer = client.post("/v1/searches?validate_only=true", json=bad, headers=ann)
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 3
    assert client.get("/v1/searches", headers=ann).json()["searches"] == []


def test_yaml_is_read_like_json(client, ann):
    text = "model: {factory: 'secateur:synthetic', input: [3, 8, 8]}\ndata: {name: synthetic, validation: 100}\n"
    answer = client.post("/v1/searches", content=text + "budgets: {a: {macs: '<= 50%'}}\n", headers=ann)
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/searches/{answer.json()['id']}"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {**CONFIG["model"], "factory": "os:system"}}, "`model.factory: os:system` is not allowed"),
        ({"model": {**CONFIG["model"], "factory": "secateur.envs.tasks.imports:import_object"}}, "is not allowed"),
        ({"model": {**CONFIG["model"], "weights": "/etc/passwd"}}, "`model.weights` must be"),
        ({"model": {**CONFIG["model"], "weights": "sha256:../../service.sqlite"}}, "`model.weights` must be"),
        ({"data": {**CONFIG["data"], "root": "/etc"}}, "`data.root: /etc` is not known"),
        ({"data": {**CONFIG["data"], "name": "os:listdir"}}, "`data.name: os:listdir` is not allowed"),
        ({"device": "/etc/passwd"}, "`device` must be"),
        ({"task": {"evaluate": "os:system", "metric": "a"}}, "`task` names os:system"),
        ({"task": {"name": "functions", "options": {"evaluate": "os:system"}}}, "`task` names os:system"),
    ],
)
def test_configurations_name_neither_code_nor_files_of_the_server(client, ann, changes, sentence):
    answer = client.post("/v1/searches", json={**CONFIG, **changes}, headers=ann)
    assert answer.status_code == 422
    assert any(sentence in error for error in answer.json()["errors"]), answer.json()
    assert client.get("/v1/searches", headers=ann).json()["searches"] == []


@pytest.mark.parametrize("body", [b"", b"[1, 2]", b"model: [", b"!!python/object/apply:os.system [ls]", b"[" * 3000, b"model: 3"])
def test_bodies_that_are_no_configuration(client, ann, body):
    answer = client.post("/v1/searches", content=body, headers=ann)
    assert answer.status_code == 422
    assert answer.json()["title"]


def test_modules_and_data_can_be_allowed(tmp_path):
    (tmp_path / "photos").mkdir()
    rules = Rules(Store(tmp_path / "store"), ("secateur.envs.tasks.synthetic",), {"photos": tmp_path / "photos"})
    model = {**CONFIG["model"], "factory": "secateur.envs.tasks.synthetic:synthetic_net"}
    config = rules.accept({**CONFIG, "model": model, "data": {**CONFIG["data"], "root": "photos"}})
    assert config.data.root == str(tmp_path / "photos")


def test_a_request_that_is_repeated_starts_one_search(client, ann, tokens):
    headers = {**ann, "Idempotency-Key": "monday"}
    first, second = (client.post("/v1/searches", json=CONFIG, headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    other = client.post("/v1/searches", json={**CONFIG, "importance": "l2_norm"}, headers=headers)
    assert other.status_code == 422
    assert "another configuration" in other.json()["errors"][0]
    of_bob = client.post("/v1/searches", json=CONFIG, headers={**tokens["bob submit"], "Idempotency-Key": "monday"})
    assert of_bob.status_code == 201


def test_lists_have_pages(client, ann):
    made = [client.post("/v1/searches", json=CONFIG, headers=ann).json()["id"] for _ in range(5)]
    found, query = [], "/v1/searches?page_size=2"
    while query:
        page = client.get(query, headers=ann).json()
        found.append([one["id"] for one in page["searches"]])
        token = page["next_page_token"]
        query = token and f"/v1/searches?page_size=2&page_token={token!r}"
    assert [len(page) for page in found] == [2, 2, 1]
    assert [one for page in found for one in page] == made[::-1]
    assert client.get("/v1/searches?state=running", headers=ann).json()["searches"] == []
    assert len(client.get("/v1/searches?state=queued", headers=ann).json()["searches"]) == 5


def test_too_many_searches_of_one_owner_are_refused(tmp_path):
    service = make_service(tmp_path / "store", open_to_all=True, limits=Limits(waiting=2))
    client = TestClient(make_app(service))
    assert [client.post("/v1/searches", json=CONFIG).status_code for _ in range(3)] == [201, 201, 429]
    assert len(client.get("/v1/searches").json()["searches"]) == 2


def test_a_waiting_search_is_canceled_and_a_canceled_one_is_not_started(client, ann, service):
    found = client.post("/v1/searches", json=CONFIG, headers=ann).json()
    assert client.post(f"/v1/searches/{found['id']}:cancel", headers=ann).json()["state"] == "cancelled"
    assert service.processes.start_waiting() == []
    again = client.post(f"/v1/searches/{found['id']}:cancel", headers=ann)
    assert again.status_code == 422
    assert "nothing to cancel" in again.json()["errors"][0]
    assert client.get(f"/v1/searches/{found['id']}/front", headers=ann).status_code == 409


def test_only_some_values_can_change_when_a_search_is_resumed(client, ann):
    found = client.post("/v1/searches", json=CONFIG, headers=ann).json()
    client.post(f"/v1/searches/{found['id']}:cancel", headers=ann)
    answer = client.post(f"/v1/searches/{found['id']}:resume", json={"overrides": {"model.factory": "os:system"}}, headers=ann)
    assert answer.status_code == 422
    assert "cannot be changed" in answer.json()["title"]
    for overrides, words in (
        ({"budgets.small": {"macs": "<= 10%"}}, "`budgets.small` cannot be changed"),
        ({"budgets": {}}, "`budgets` cannot be changed"),
        ({"budgets.tiny": {"mac": "<= 10%"}}, "unknown cost"),
        ({"search.evaluations": "many"}, "search.evaluations"),
    ):
        answer = client.post(f"/v1/searches/{found['id']}:resume", json={"overrides": overrides}, headers=ann)
        assert answer.status_code == 422 and words in json.dumps(answer.json())


def test_uploads_are_named_by_their_digest(client, ann, service):
    weights = save({"weight": np.zeros(3, np.float32)})
    answer = client.post("/v1/models", content=weights, headers=ann)
    assert answer.status_code == 201
    digest = hashlib.sha256(weights).hexdigest()
    assert answer.json() == {"name": f"sha256:{digest}", "bytes": len(weights)}
    config = {**CONFIG, "model": {**CONFIG["model"], "weights": f"sha256:{digest}"}}
    assert service.rules.accept(config).model.weights == str(service.store.files / digest)
    assert client.post("/v1/models", content=b"", headers=ann).status_code == 422


@pytest.mark.parametrize(
    ("resource", "content", "words"),
    [
        ("models", pickle.dumps({"weight": 1}), "The body is no safetensors file"),
        ("models", b"weights", "The body is no safetensors file"),
        ("devices", b"{", "The body"),
        ("devices", b'{"name": 3}', "The body"),
        ("devices", b"\xff\xfe", "The body"),
    ],
)
def test_only_files_of_the_kind_are_stored(client, ann, service, resource, content, words):
    answer = client.post(f"/v1/{resource}", content=content, headers=ann)
    assert answer.status_code == 422 and words in answer.json()["title"]
    assert not (service.store.files / hashlib.sha256(content).hexdigest()).exists()


def test_an_upload_that_is_too_large_leaves_nothing(tmp_path):
    service = make_service(tmp_path / "store", open_to_all=True, limits=Limits(upload=10))
    client = TestClient(make_app(service))
    assert client.post("/v1/devices", content=b"x" * 11).status_code == 413
    assert list(service.store.files.iterdir()) == []


def test_the_interface_is_described(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/searches", "/v1/searches/{identifier}/events", "/v1/models"} <= set(paths)


def test_metrics_count_searches_by_state(client, ann):
    client.post("/v1/searches", json=CONFIG, headers=ann)
    text = client.get("/metrics").text
    assert 'secateur_searches{state="queued"} 1.0' in text
    assert 'secateur_requests_total{kind="submit"} 1.0' in text


# --------------------------------------------------------------------------------------------------- a search to its end


def wait(client, identifier, *states, seconds=240):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = client.get(f"/v1/searches/{identifier}").json()
        if found["state"] in states:
            return found
        time.sleep(0.2)
    raise AssertionError(f"still {found['state']}: {client.get(f'/v1/searches/{identifier}/logs').text}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A running service, and a search that has ended."""
    service = make_service(tmp_path_factory.mktemp("service") / "store", open_to_all=True)
    with TestClient(make_app(service)) as client:
        identifier = client.post("/v1/searches", json=CONFIG).json()["id"]
        found = wait(client, identifier, "finished", "failed")
        assert found["state"] == "finished", found["message"]
        yield client, service, found


def test_a_finished_search_shows_what_it_did(finished):
    client, _, found = finished
    assert (found["evaluations"], found["total"], found["failed"]) == (4, 4, 0)
    front = client.get(f"/v1/searches/{found['id']}/front").json()
    assert front["evaluations"] == 4
    assert found["best"]["small"] == pytest.approx(max(point["score"] for point in front["points"]))
    assert list(client.get(f"/v1/searches/{found['id']}/front?budget=small").json()["budgets"]) == ["small"]
    assert client.get(f"/v1/searches/{found['id']}/front?budget=large").status_code == 422
    assert "evaluations 4 of 4" in client.get(f"/v1/searches/{found['id']}/logs").text


def test_trials_are_sorted_and_chosen(finished):
    client, _, found = finished
    rows = client.get(f"/v1/searches/{found['id']}/trials?sort=-macs&limit=3").json()
    costs = [row["macs"] for row in rows]
    assert len(rows) == 3
    assert costs == sorted(costs, reverse=True)
    assert "run" not in rows[0], "a path of the server"
    small = client.get(f"/v1/searches/{found['id']}/trials", params={"where": f"macs < {costs[0]}"}).json()
    assert len(small) == 4 - costs.count(costs[0])
    wrong = client.get(f"/v1/searches/{found['id']}/trials", params={"where": "__import__('os').system('ls')"})
    assert wrong.status_code == 422
    assert client.get(f"/v1/searches/{found['id']}/trials?sort=nothing").status_code == 422


def test_events_continue_where_the_listener_stopped(finished):
    client, _, found = finished
    text = client.get(f"/v1/searches/{found['id']}/events").text
    events = [dict(line.split(": ", 1) for line in part.splitlines()) for part in text.strip().split("\n\n")]
    assert [int(event["id"]) for event in events] == list(range(1, len(events) + 1))
    kinds = [event["event"] for event in events]
    assert kinds[0] == "state" and kinds[-1] == "state"
    assert kinds.count("evaluation") == 4
    assert json.loads(events[-1]["data"])["state"] == "finished"
    rest = client.get(f"/v1/searches/{found['id']}/events", headers={"Last-Event-ID": str(len(events) - 2)}).text
    assert rest == "\n\n".join(text.split("\n\n")[-3:])


def test_artifacts_are_fetched_whole_or_in_ranges(finished):
    client, service, found = finished
    names = [one["name"] for one in client.get(f"/v1/searches/{found['id']}/artifacts").json()["artifacts"]]
    assert {"front.json", "manifest.json"} <= set(names)
    path, url = service.store.searches / found["id"] / RUN / "front.json", f"/v1/searches/{found['id']}/artifacts/front.json"
    whole = client.get(url)
    assert whole.content == path.read_bytes()
    assert whole.headers["x-sha256"] == hashlib.sha256(whole.content).hexdigest()
    part = client.get(url, headers={"Range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, whole.content[2:6])


@pytest.mark.parametrize(
    "name", ["../config.json", "..%2Fconfig.json", "/etc/passwd", "..%2F..%2F..%2Fservice.sqlite", "lock", "a%00b"]
)
def test_no_file_outside_the_run_is_served(finished, name):
    client, _, found = finished
    assert client.get(f"/v1/searches/{found['id']}/artifacts/{name}").status_code == 404


def test_a_search_is_extended(finished):
    client, _, found = finished
    overrides = {"search.evaluations": 6, "budgets.tiny": {"macs": "<= 40%"}}
    answer = client.post(f"/v1/searches/{found['id']}:resume", json={"overrides": overrides})
    assert answer.json()["state"] in ("queued", "running")
    assert client.post(f"/v1/searches/{found['id']}:resume", json={}).status_code == 422
    again = wait(client, found["id"], "finished", "failed")
    assert again["state"] == "finished", again["message"]
    front = client.get(f"/v1/searches/{found['id']}/front").json()
    assert front["evaluations"] == 6 and list(front["budgets"]) == ["small", "tiny"]
