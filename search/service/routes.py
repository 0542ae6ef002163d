"""The resources under /v1: searches, their results, and uploaded files."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open

from secateur.cost_models.core import InputError
from secateur.cost_models.device import parse_device
from secateur.cost_models.reading import parse_json
from secateur.search.config.reading import apply_overrides, load_yaml, parse_config
from secateur.search.named_code import modules_of
from secateur.search.results.document import only_budget, read_front
from secateur.search.service.access import Owned, Problem, Readable, Reader, Service, Submitter, TheService
from secateur.search.service.rules import DIGEST
from secateur.search.service.store import CONFIG, LOG, Caller, Search, State, read_json

POLL_SECONDS = 0.5
"""How often event streams look for new events."""

LARGEST_BODY = 2**20
"""Bytes of a configuration."""

SERVED = (".safetensors", ".onnx", ".json", ".md", ".csv", ".html", ".pt2", ".journal")
"""Endings of the files of a run that can be fetched."""

CHANGEABLE = ("search.evaluations", "search.time_limit", "search.workers", "finalize.top")
"""What may change when a search is resumed."""

router = APIRouter(prefix="/v1")


class Changes(BaseModel):
    """Changes of a search that is resumed."""

    overrides: dict[str, Any] = Field({}, description='Overrides of its configuration, such as {"search.evaluations": 500}.')


class AskRequest(BaseModel):
    """What to ask the agent of a finished search."""

    budget: str | dict[str, str] = Field(description='Limits such as "macs<=43%,weight_bytes<=20kB" or {"macs": "<= 43%"}.')
    preference: str | dict[str, float] | None = Field(None, description='Weights of costs such as {"macs": 0.7}.')
    evaluations: int = Field(3, ge=1, le=100, description="Number of proposals that are evaluated.")


class ExportRequest(BaseModel):
    """What to export: the winner of a budget, or any evaluation."""

    budget: str | None = None
    trial: int | None = None


# -------------------------------------------------------------------------------------------------------------- searches


@router.post("/searches", status_code=201)
async def submit(
    request: Request,
    response: Response,
    service: TheService,
    caller: Submitter,
    validate_only: bool = False,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> dict[str, Any]:
    """Start a search. The body is a configuration, as JSON or YAML."""
    service.requests.labels("submit").inc()
    values = _read_body(await request.body())
    config = await asyncio.to_thread(service.rules.accept, values)
    document = config.model_dump(mode="json", exclude={"output"})
    if validate_only:
        response.status_code = 200
        return {"valid": True, "config": document}
    found, new = await asyncio.to_thread(_add, service, caller, document, config.model.factory, idempotency_key)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/searches/{found.id}"
    return service.summaries.of(found)


def _add(service: Service, caller: Caller, document: dict[str, Any], label: str, key: str | None) -> tuple[Search, bool]:
    found, new = service.store.add(caller.owner, document, label, key)
    if new:
        waiting = [one for one in service.store.list(Caller(caller.owner, "submit")) if one.state in ("queued", "running")]
        if len(waiting) > service.limits.waiting:
            service.store.remove(found)
            limit = service.limits.waiting
            raise Problem(429, f"{limit} searches of yours wait or run already, which is the limit. Cancel one, or wait.")
    return found, new


@router.get("/searches")
async def searches(
    service: TheService,
    caller: Reader,
    page_size: Annotated[int, Query(ge=1, le=200)] = 50,
    page_token: Annotated[float | None, Query(allow_inf_nan=False, description="`next_page_token` of the page before.")] = None,
    state: State | None = None,
) -> Response:
    """List searches, newest first: {"searches": [...], "next_page_token": ...}."""
    service.requests.labels("list").inc()
    found = service.store.list(caller, float("inf") if page_token is None else page_token, page_size + 1)
    shown = [service.summaries.of(one) for one in found[:page_size]]
    page = [one for one in shown if state is None or one["state"] == state]
    more = found[-2].created if len(found) > page_size else None
    return JSONResponse({"searches": page, "next_page_token": more})


@router.get("/searches/{identifier}")
def search(service: TheService, found: Owned) -> dict[str, Any]:
    """Show a search: state, phase, evaluations done, best score per budget, time left, and its configuration."""
    service.requests.labels("show").inc()
    return service.summaries.of(found) | {"config": read_json(found.folder / CONFIG)}


@router.post("/searches/{identifier}:cancel")
def cancel(service: TheService, found: Owned, caller: Submitter) -> dict[str, Any]:
    """End a search early. What was found is kept."""
    service.processes.cancel(found)
    return service.summaries.of(found)


@router.post("/searches/{identifier}:resume")
def resume(service: TheService, found: Owned, caller: Submitter, changes: Changes) -> dict[str, Any]:
    """Continue a search that has ended, or extend it: {"overrides": {"search.evaluations": 500}}, or a further budget."""
    _check_changes(read_json(found.folder / CONFIG), changes.overrides)
    service.processes.resume(found, changes.overrides)
    again = service.store.find(found.id, caller)
    assert again is not None
    return service.summaries.of(again)


def _check_changes(config: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Raise an error unless the overrides may change a search of this configuration, and it can be used with them."""
    for key in sorted(overrides):
        section, _, name = key.partition(".")
        if section == "budgets" and name and name not in config["budgets"]:
            continue
        if key not in CHANGEABLE:
            raise Problem(422, f"`{key}` cannot be changed here. Allowed: {', '.join(CHANGEABLE)}, and further budgets.")
    apply_overrides(config, overrides)
    parse_config(config, "the configuration")


def _read_body(body: bytes) -> Any:
    """Return the values in a body of JSON or YAML; JSON is YAML too."""
    if len(body) > LARGEST_BODY:
        raise Problem(413, f"A configuration may have {LARGEST_BODY} bytes at most.")
    try:
        return load_yaml(body.decode())
    except (UnicodeDecodeError, InputError) as error:
        raise Problem(422, "The body is neither JSON nor YAML.", [f"It {error}."]) from None


# --------------------------------------------------------------------------------------------------------------- results


@router.get("/searches/{identifier}/front")
def front(found: Readable, budget: str | None = None) -> dict[str, Any]:
    """Return the Pareto front, of all budgets or of one, also while the search runs."""
    document = read_front(found.run)
    return document if budget is None else only_budget(document, budget)


@router.get("/searches/{identifier}/trials")
def trials(
    found: Readable,
    where: Annotated[str | None, Query(description="As in `secateur query`: top1 >= 0.9 and macs <= 0.5*dense.")] = None,
    sort: Annotated[str | None, Query(description="Columns; a minus before a name: largest first.")] = None,
    limit: Annotated[int, Query(ge=1, le=100_000)] = 1000,
) -> Response:
    """Return the evaluations that satisfy a condition, one object each."""
    from secateur.search.results.query import RUN, query

    table = query(found.run, where, sort or (), limit).drop(columns=RUN)  # a path of this machine
    return Response(table.to_json(orient="records"), media_type="application/json")


@router.post("/searches/{identifier}/asks")
def asks(found: Readable, wanted: AskRequest, caller: Submitter) -> dict[str, Any]:
    """Return policies for any budget from the agent of a finished search, measured, the best one first."""
    from secateur.search.ask import ask, reply_document
    from secateur.search.run.handle import load_run

    try:
        trust = modules_of(load_run(found.run).config)  # the service's rules have checked them
        return reply_document(ask(found.run, wanted.budget, wanted.preference, wanted.evaluations, trust=trust))
    except InputError as error:
        raise InputError(str(error).replace(str(found.run), f"search {found.id}")) from None  # a path of this machine


@router.post("/searches/{identifier}/exports", status_code=201)
def export(found: Readable, wanted: ExportRequest, caller: Submitter) -> dict[str, Any]:
    """Write the model of a budget's winner, or of any evaluation; `artifacts` lists its files."""
    from secateur.search.run.handle import load_run

    run = load_run(found.run)
    # The service's rules have checked the modules that the configuration names, before the search began.
    exports = replace(run, trust=modules_of(run.config)).export(budget=wanted.budget, trial=wanted.trial)
    return {"exports": [{"folder": str(one.folder.relative_to(found.run)), "budget": one.budget} for one in exports]}


@router.get("/searches/{identifier}/artifacts")
def artifacts(found: Owned) -> dict[str, Any]:
    """List the files of a search that can be fetched."""
    files = [path for path in sorted(found.run.rglob("*")) if isfile(path) and path.suffix in SERVED]
    return {"artifacts": [{"name": str(path.relative_to(found.run)), "bytes": path.stat().st_size} for path in files]}


@router.get("/searches/{identifier}/artifacts/{name:path}")
def artifact(found: Owned, name: str) -> FileResponse:
    """Fetch a file, or a range of it. The header X-SHA256 has the digest of the whole file."""
    run = found.run.resolve()
    path = None if "\0" in name else (run / name).resolve()
    if path is None or not path.is_relative_to(run) or not isfile(path) or path.suffix not in SERVED:
        raise Problem(404, "There is no such file; `artifacts` lists them.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileResponse(path, headers={"X-SHA256": digest}, filename=path.name)


@router.get("/searches/{identifier}/logs")
def logs(found: Owned) -> PlainTextResponse:
    """Return what the search has printed."""
    path = found.folder / LOG
    return PlainTextResponse(path.read_text(encoding="utf-8", errors="replace") if isfile(path) else "")


@router.get("/searches/{identifier}/events")
async def events(found: Owned, request: Request, last_event_id: Annotated[int, Header(ge=0)] = 0) -> StreamingResponse:
    """Stream server-sent events until the search ends: state, phase, evaluation, front, note. `Last-Event-ID` continues."""
    return StreamingResponse(_stream(found, request, last_event_id), media_type="text/event-stream")


async def _stream(search: Search, request: Request, after: int) -> AsyncIterator[str]:
    """Yield events as text until the search has ended and all are sent, or the listener has gone."""
    while not await request.is_disconnected():
        active = search.state in ("queued", "running")  # before the events, so that none is missed
        for event in search.events(after):
            after = event["id"]
            yield f"id: {after}\nevent: {event['event']}\ndata: {json.dumps(event)}\n\n"
        if not active:
            return
        await asyncio.sleep(POLL_SECONDS)


# ----------------------------------------------------------------------------------------------------------------- files


@router.post("/models", status_code=201)
async def upload_weights(request: Request, service: TheService, caller: Submitter) -> dict[str, Any]:
    """Upload weights, a safetensors file as the body; the answer's `name` goes into `model.weights`."""
    return await _receive(request, service, _check_weights)


@router.post("/devices", status_code=201)
async def upload_device(request: Request, service: TheService, caller: Submitter) -> dict[str, Any]:
    """Upload a device file of `secateur profile`; the answer's `name` goes into `device`."""
    return await _receive(request, service, _check_device)


@router.get("/data")
def data(service: TheService, caller: Reader) -> dict[str, Any]:
    """List the data folders of the server, for `data.root`."""
    return {"roots": sorted(service.rules.data)}


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, "np"):
            pass
    except SafetensorError as error:
        raise InputError(f"The body is no safetensors file: {error}. safetensors.torch.save_file writes one.") from None


def _check_device(file: Path) -> None:
    what = "The body"
    parse_device(parse_json(file.read_bytes().decode("utf-8", errors="replace"), what), what)


async def _receive(request: Request, service: Service, check: Callable[[Path], None]) -> dict[str, Any]:
    """Store the body of a request under its SHA-256; `check` raises InputError if it is no such file."""
    service.requests.labels("upload").inc()
    draft, digest, size = service.store.files / f".{secrets.token_hex(8)}", hashlib.sha256(), 0
    try:
        with draft.open("wb") as file:
            async for piece in request.stream():
                size += len(piece)
                if size > service.limits.upload:
                    raise Problem(413, f"A file may have {service.limits.upload} bytes at most.")
                digest.update(piece)
                file.write(piece)
        if not size:
            raise Problem(422, "The body is empty: send the file itself.")
        try:
            check(draft)
        except InputError as error:
            raise Problem(422, str(error)) from None
        os.replace(draft, service.store.files / digest.hexdigest())
    finally:
        draft.unlink(missing_ok=True)
    return {"name": DIGEST + digest.hexdigest(), "bytes": size}
