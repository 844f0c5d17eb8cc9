"""The application: routes, errors, the gate and the page, put together for one desk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from .. import __version__
from ..errors import CogVLMError
from . import ollama, openai, relay
from .desk import Desk
from .errors import problem_of
from .front import Front, Refused
from .gate import Gate

PAGE = Path(__file__).parents[1] / "web"
_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build(desk: Front, page: Path = PAGE) -> FastAPI:
    """The application of a desk; ``page`` is a folder with an ``index.html``, or there is none."""
    # FastAPI's own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="cogvlm", version=__version__, docs_url=None, redoc_url=None)
    for kind in (Refused, CogVLMError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    if isinstance(desk, Desk):
        app.include_router(openai.routes(desk))
        app.include_router(ollama.routes(desk))
    elif isinstance(desk, relay.Relay):
        app.include_router(relay.routes(desk))
    _add_health(app, desk)
    app.add_api_route("/v1/{rest:path}", _nothing, methods=_METHODS, include_in_schema=False)
    app.add_api_route("/api/{rest:path}", _nothing, methods=_METHODS, include_in_schema=False)
    if (page / "index.html").is_file():
        app.mount("/", _Page(directory=page, html=True))
    app.add_middleware(Gate, desk=desk)
    if desk.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=desk.settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


class _Page(StaticFiles):
    """The page's files, with what a browser may do with them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-cache"  # asked for again, sent only if changed
        return response


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def _add_health(app: FastAPI, desk: Front) -> None:
    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        if desk.closing or not desk.ready:
            why = "closing" if desk.closing else "starting"
            return JSONResponse({"status": why}, 503)
        return JSONResponse({"status": "ok", "model": desk.facts.name})

    @app.get("/api/about")
    async def about() -> Response:
        """For the page, which says where pictures go."""
        backend = "local" if desk.where is None else "remote"
        said = {"backend": backend, "where": desk.where, "model": desk.facts.name}
        return JSONResponse({**said, "version": __version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = desk.metrics.text(desk.stats, desk.inflight)
        return PlainTextResponse(text, media_type=_METRICS_TYPE)


async def _nothing(request: Request) -> Response:
    raise Refused(
        404, "not_found", f"no {request.method} {request.url.path[:100]} here; see /openapi.json"
    )


async def _answer_error(request: Request, error: Any) -> Response:
    return problem_of(error).response(request.url.path)
