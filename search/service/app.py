"""The HTTP application: routes, errors, metrics, the page, and the task that starts waiting searches.

Its OpenAPI document is at /openapi.json, a reference to try it at /docs. Errors are problem documents (RFC 9457,
application/problem+json) with every mistake in `errors`, in the words of the command.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import get_args

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import Gauge, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from secateur import __version__
from secateur.cost_models.core import InputError
from secateur.search.service.access import Problem, Service
from secateur.search.service.processes import Processes
from secateur.search.service.routes import router
from secateur.search.service.store import State

PAGE = Path(__file__).parent / "page.html"
START_SECONDS = 0.5
"""How often waiting searches are started."""

PAGE_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; frame-ancestors 'none'"


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        starter = asyncio.create_task(_start_waiting(service.processes))
        yield
        starter.cancel()
        with suppress(asyncio.CancelledError):
            await starter

    app = FastAPI(title="secateur", version=__version__, lifespan=life, description=__doc__)
    app.state.service = service
    app.include_router(router)
    _add_errors(app)
    _add_metrics(app, service)

    @app.get("/healthz")
    def health() -> dict[str, str]:
        """Tell that the server lives."""
        return {"status": "ok", "version": __version__}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    return app


async def _start_waiting(processes: Processes) -> None:
    """Start waiting searches, for ever."""
    while True:
        with suppress(OSError):  # a full disk, for example: the next attempt may succeed
            await asyncio.to_thread(processes.start_waiting)
        await asyncio.sleep(START_SECONDS)


def _problem(status: int, title: str, errors: list[str]) -> JSONResponse:
    document = {"type": "about:blank", "title": title, "status": status, "errors": errors}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(document, status, headers, media_type="application/problem+json")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        return _problem(error.status, error.title, error.errors)

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> JSONResponse:
        return _problem(422, "The request cannot be used.", str(error).splitlines())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [f"`{'.'.join(map(str, one['loc']))}`: {one['msg']}" for one in error.errors()]
        return _problem(422, "The request cannot be used.", errors)

    @app.exception_handler(StarletteHTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, str(error.detail), [])


def _add_metrics(app: FastAPI, service: Service) -> None:
    searches = Gauge("secateur_searches", "Searches by state.", ["state"], registry=service.registry)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Return counts in Prometheus' text format."""
        states = [service.summaries.of(search)["state"] for search in service.store.list(None, count=10_000)]
        for state in get_args(State):
            searches.labels(state).set(states.count(state))
        return Response(generate_latest(service.registry), media_type="text/plain; version=0.0.4")
