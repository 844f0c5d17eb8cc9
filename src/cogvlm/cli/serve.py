"""``cogvlm serve``: a model behind the APIs of OpenAI and Ollama."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, ResourceError
from .backends import BaseUrlOption, KeyOption, SideOption, endpoint_of, refuse_remote
from .shared import (
    DeviceOption,
    ModelOption,
    PickleOption,
    Precision,
    PrecisionOption,
    TokenizerOption,
    app,
    load,
    plain_errors,
    quiet_libraries,
)

if TYPE_CHECKING:
    from ..load import Loaded
    from ..remote import Endpoint
    from ..serve import Settings

_KEYS = "COGVLM_API_KEYS"


@app.command()
@plain_errors
def serve(
    context: typer.Context,
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER", help="What was tuned on the model, as MODEL:NAME; repeatable."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8000,
    slots: Annotated[int, typer.Option(help="Answers under way at once.", min=1)] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=1)] = 256,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    max_images: Annotated[int, typer.Option(help="Pictures of one request.")] = 16,
    max_pixels: Annotated[int, typer.Option(help="Width x height of a picture.")] = 40_000_000,
    max_body_mb: Annotated[int, typer.Option(help="Size of a request.")] = 32,
    max_seconds: Annotated[float, typer.Option(help="Time of a request, waiting included.")] = 600,
    api_key: Annotated[
        list[str] | None, typer.Option(help=f"Who has none is refused; or {_KEYS}, with commas.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may ask; '*': all.")
    ] = None,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch pictures from there; '*': any public host."),
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds to finish answers at the end.")] = 30.0,
    precision: PrecisionOption = Precision.auto,
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
    base_url: BaseUrlOption = None,
    api_key_env: KeyOption = "OPENAI_API_KEY",
    max_side: SideOption = 2048,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for every request.")] = False,
) -> None:
    """Serve a model to OpenAI's and Ollama's clients, and to a browser.

    With --base-url no model is loaded: requests are handed on to the server there.
    """
    quiet_libraries()
    try:
        from ..serve import Limits, Settings, UrlRules, bind
    except ImportError as error:
        raise ResourceError(
            f"serving needs {error.name}; install it with: pip install 'cogvlm[serve]'"
        ) from None
    limits = Limits(
        body_bytes=max_body_mb * 2**20,
        pixels=max_pixels,
        images=max_images,
        tokens=max_tokens,
        seconds=max_seconds,
        requests=slots + queue,
    )
    urls = UrlRules(frozenset(host.lower() for host in allow_url or ()))
    settings = Settings(limits, urls, _keys(api_key), tuple(cors or ()), grace)
    _plain_logs(quiet)
    if not base_url:
        refuse_remote(context)
    tuned = _named(adapter or ())
    sock = bind(host, port)
    _warn_if_open(host, settings)
    if base_url:
        endpoint = endpoint_of(context, model, base_url, api_key_env, max_side)
        _serve_remote(endpoint, name, settings, slots, sock)
        return
    loaded = load(model, precision, device, tokenizer, allow_pickle)
    _serve_local(loaded, name, tuned, settings, slots, queue, sock)


def _named(given: Sequence[str]) -> dict[str, Path]:
    """Adapter folders by their names; a folder's own where none is given.

    Raises:
        InputError: two of one name, or a name that cannot be asked for.
    """
    found: dict[str, Path] = {}
    for one in given:
        name, _, folder = one.rpartition("=")
        path = Path(folder)
        name = name or path.resolve().name
        if name in found or not name or set(name) & set(" :/\\"):
            raise InputError(f"--adapter {one}: give each a name of its own, NAME=FOLDER")
        found[name] = path
    return found


def _serve_local(
    loaded: Loaded,
    name: str | None,
    tuned: dict[str, Path],
    settings: Settings,
    slots: int,
    queue: int,
    sock: socket,
) -> None:
    from .. import adapter
    from ..engine.service import MIB, Engine
    from ..serve import Desk, Server, build, facts_of

    facts = facts_of(loaded, name)
    all_ = {facts.name: loaded}
    for short, folder in tuned.items():
        full = f"{facts.name}:{short}"
        all_[full] = replace(loaded, model=adapter.beside(loaded.model, folder), name=full)
    # Each has its own memory of prompts and pictures; together they have what one would have.
    share = {"prefix_bytes": 512 * MIB // len(all_), "image_bytes": 256 * MIB // len(all_)}
    with ExitStack() as stack:
        made = []
        for full, one in all_.items():
            engine = Engine(one, slots=slots, queue=queue, **share)
            made.append((stack.enter_context(closing(engine)), facts_of(one, full)))
        engine, _ = made[0]
        desk = Desk(engine, loaded.processor, facts, settings, made[1:])
        said = ", ".join(desk.models)
        Server(build(desk), desk, sock, lambda url: _announce(said, url)).run()


def _serve_remote(
    endpoint: Endpoint, name: str | None, settings: Settings, slots: int, sock: socket
) -> None:
    from ..remote import Forwarder, RemoteBackend
    from ..serve import Relay, Server, build

    with closing(RemoteBackend(endpoint)) as backend:
        endpoint = replace(endpoint, model=backend.name)  # where nobody answers, that is told now
    relay = Relay(Forwarder(endpoint), name or str(endpoint.model), settings, slots)
    said = f"{relay.facts.name} at {endpoint.host}"
    Server(build(relay), relay, sock, lambda url: _announce(said, url, ollama=False)).run()


def _keys(given: list[str] | None) -> tuple[str, ...]:
    there = os.environ.get(_KEYS, "")
    return (*(given or ()), *(key.strip() for key in there.split(",") if key.strip()))


def _plain_logs(quiet: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("cogvlm.serve").setLevel(logging.WARNING if quiet else logging.INFO)


def _announce(name: str, url: str, ollama: bool = True) -> None:
    other = f", Ollama: {url}" if ollama else ""
    typer.echo(f"{name} is ready at {url}  (OpenAI: {url}/v1{other}; Ctrl-C stops)")


def _warn_if_open(host: str, settings: Settings) -> None:
    if host not in ("127.0.0.1", "::1", "localhost") and not settings.api_keys:
        logging.getLogger("cogvlm.serve").warning(
            "anybody who reaches %s may ask: there is no --api-key", host
        )
