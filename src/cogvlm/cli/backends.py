"""Who answers: the options that choose a local model or a server, and opening it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .shared import Precision, load

if TYPE_CHECKING:
    from ..backend import Backend
    from ..remote import Endpoint

BaseUrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="COGVLM_BASE_URL",
        help="Ask this OpenAI-compatible server instead of a local model; pictures go there.",
    ),
]
KeyOption = Annotated[str, typer.Option(help="Environment variable that holds the server's key.")]
SideOption = Annotated[
    int, typer.Option(help="Scale pictures for a server down to this many pixels a side; 0: never.")
]

_LOCAL = ("precision", "device", "tokenizer", "allow_pickle", "adapter")
_REMOTE = ("api_key_env", "max_side")


@contextmanager
def opened(
    context: typer.Context,
    model: str,
    precision: Precision,
    device: str,
    tokenizer: str | None,
    allow_pickle: bool,
    base_url: str | None,
    api_key_env: str,
    max_side: int,
    adapter: Path | None = None,
) -> Iterator[Backend]:
    """The backend that the options say; a server's is closed at the end.

    Raises:
        InputError: an option of the other kind of backend was given.
    """
    if not base_url:
        refuse_remote(context)
        from ..engine import LocalBackend

        yield LocalBackend(load(model, precision, device, tokenizer, allow_pickle, adapter))
        return
    from ..remote import RemoteBackend

    endpoint = endpoint_of(context, model, base_url, api_key_env, max_side)
    backend = RemoteBackend(endpoint)
    try:
        _ = backend.name  # an address where nobody answers is told now
        yield backend
    finally:
        backend.close()


def endpoint_of(
    context: typer.Context, model: str, base_url: str, api_key_env: str, max_side: int
) -> Endpoint:
    """The server that the options say; tells where pictures go.

    Raises:
        InputError: an option of local models was given, or there is no key where it should be.
    """
    _refuse(context, _LOCAL, "is for local models; --base-url or COGVLM_BASE_URL names a server")
    from ..remote import Endpoint

    key = os.environ.get(api_key_env) or None
    if key is None and given(context, "api_key_env"):
        raise InputError(f"the environment variable {api_key_env} is not set; put the key there")
    chosen = model if given(context, "model") else None
    endpoint = Endpoint(base_url, chosen, key, key_name=api_key_env, max_side=max_side)
    open_to_all = "" if endpoint.encrypted or endpoint.here else ", unencrypted"
    typer.echo(f"pictures go to {endpoint.host}{open_to_all}", err=True)
    return endpoint


def refuse_remote(context: typer.Context) -> None:
    """Refuse options of a server, as there is none."""
    _refuse(context, _REMOTE, "is for a server: give --base-url too, or leave it out")


def given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if given(context, name):
            raise InputError(f"--{name.replace('_', '-')} {why}")
