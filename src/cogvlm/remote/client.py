"""The backend that is a server elsewhere: any that speaks OpenAI's chat completions.

Knows HTTP and that protocol, no model of ours.  Pictures leave this machine here and nowhere else:
they are checked to be pictures, and sent as ``data:`` URLs to the one host of the endpoint, which
nothing that the host answers (a redirect, say) can change.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..backend import Reply
from ..errors import CogVLMError, ConfigError, InputError, RemoteError, ResourceError
from ..processor import Message, check_order
from ..settings import GenerationSettings
from .wire import Waits, events, model_names, refusal, to_json, whole

if TYPE_CHECKING:
    import httpx

MOST = 16_000_000  # bytes of an answer that is read


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and how it is asked.

    Raises:
        ConfigError: the address is no http address, or holds a password.
    """

    url: str  # to where /chat/completions is appended; most end in /v1
    model: str | None = None  # none: the only one that the server has
    key: str | None = field(default=None, repr=False)
    key_name: str = "OPENAI_API_KEY"  # the variable that the key came from, for messages
    max_side: int = 2048  # pixels; larger pictures are scaled down to it, 0: never
    timeout: float = 600.0  # seconds without a byte
    tries: int = 5  # times a request is sent before it is given up

    def __post_init__(self) -> None:
        url = self.url.strip().rstrip("/").removesuffix("/chat/completions")
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"base URL: {error}; give one like https://host/v1") from None
        if "@" in parts.netloc:
            raise ConfigError(
                "base URL: it holds a user or password, which others can read; put a key into an "
                "environment variable and name that"
            )
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise ConfigError(f"base URL {url!r} is not usable; give one like https://host/v1")
        if self.max_side < 0:
            raise ConfigError(f"max_side={self.max_side} is out of range: give 1 or more, or 0")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ConfigError(f"the key in {self.key_name} has a line break or a foreign sign")
        object.__setattr__(self, "url", url)

    @property
    def host(self) -> str:
        """Host and, where one is given, port."""
        return urlsplit(self.url).netloc

    @property
    def encrypted(self) -> bool:
        """Whether nobody between here and there can read along."""
        return self.url.startswith("https:")

    @property
    def here(self) -> bool:
        """Whether it is this machine by its name or address."""
        name = urlsplit(self.url).hostname or ""
        return name in ("localhost", "::1") or name.startswith("127.")


def connection(endpoint: Endpoint) -> dict[str, Any]:
    """What a client of httpx for this endpoint is made with, whether it waits or has a loop.

    Raises:
        ResourceError: httpx is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise ResourceError(
            'asking a server needs the package httpx: pip install "cogvlm[remote]"'
        ) from error
    return {
        "headers": {} if endpoint.key is None else {"Authorization": f"Bearer {endpoint.key}"},
        "timeout": httpx.Timeout(endpoint.timeout, connect=min(30.0, endpoint.timeout)),
        "limits": httpx.Limits(max_connections=None),  # the callers bound it
        "trust_env": not endpoint.here,  # no proxy stands between a machine and itself
    }


class RemoteBackend:
    """A server behind :class:`cogvlm.backend.Backend`.

    Raises:
        ResourceError: httpx is not installed.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        options = connection(endpoint)
        import httpx

        self.endpoint = endpoint
        self._client = httpx.Client(**options)
        self._waits = Waits(endpoint.tries)
        self._model = endpoint.model
        self._limit = "max_tokens"
        self._met = False

    @property
    def name(self) -> str:
        """Of the model; asks the server what it has if none was named.

        Raises:
            RemoteError: the server cannot be reached or has not exactly one.
        """
        if self._model is None:
            self._model = self._only_model()
        return self._model

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def prepare(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as they are sent.

        Raises:
            MessageError: their order is wrong, or there is a video.
            ImageError: a picture cannot be read.
        """
        check_order(messages)
        return [to_json(message, self.endpoint.max_side) for message in messages]

    def answer_batch(
        self, prepared: Sequence[list[dict[str, Any]]], settings: GenerationSettings
    ) -> list[Reply | CogVLMError]:
        """Ask all at once, each in a request of its own."""
        outcomes: list[Reply | BaseException | None] = [None] * len(prepared)

        def work(row: int) -> None:
            try:
                outcomes[row] = self._ask(prepared[row], settings)
            except BaseException as error:  # handed to the caller
                outcomes[row] = error

        # Daemons, so that Ctrl-C need not wait for answers that nobody will read.
        threads = [
            threading.Thread(target=work, args=(row,), daemon=True) for row in range(len(prepared))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)
        return [_outcome(outcome) for outcome in outcomes]

    def stream(self, messages: Sequence[Message], settings: GenerationSettings) -> RemotePieces:
        """Answer one conversation piece by piece."""
        return RemotePieces(self, self._body(self.prepare(messages), settings, stream=True))

    # --- requests ----------------------------------------------------------------------------

    def _body(
        self, messages: list[dict[str, Any]], settings: GenerationSettings, stream: bool
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.name, "messages": messages, "stream": stream}
        body["temperature"] = settings.temperature
        body[self._limit] = settings.max_new_tokens
        # Not every server knows these; a value that the caller chose is sent, for it to refuse.
        if settings.top_p != 1.0:
            body["top_p"] = settings.top_p
        if settings.top_k:
            body["top_k"] = settings.top_k
        if settings.seed is not None:
            body["seed"] = settings.seed
        return body

    def _ask(self, messages: list[dict[str, Any]], settings: GenerationSettings) -> Reply:
        body = self._body(messages, settings, stream=False)
        with self.opened(body) as response:
            return whole(self._read(response), self.endpoint.host)

    def _only_model(self) -> str:
        with self.opened(None) as response:
            names = model_names(self._read(response), self.endpoint.host)
        if len(names) != 1:
            has = f"has {', '.join(names[:20])}" if names else "names no model"
            raise RemoteError(f"{self.endpoint.host} {has}; say which with --model")
        return names[0]

    @contextmanager
    def opened(self, body: dict[str, Any] | None) -> Iterator[httpx.Response]:
        """A good response, its body not yet read; none asks for the list of models.

        Raises:
            RemoteError: the server refused, or kept failing.
        """
        import httpx

        response = self._persist(body)
        try:
            yield response
        except httpx.HTTPError as error:
            raise RemoteError(
                f"{self.endpoint.host}: the connection broke inside the answer "
                f"({type(error).__name__}); ask again"
            ) from error
        finally:
            response.close()

    def _persist(self, body: dict[str, Any] | None) -> httpx.Response:
        for attempt in self._waits:
            try:
                response = self._send(body)
            except RemoteError:
                # Who never answered is more likely misspelt than busy.
                if not self._met or not attempt.wait():
                    raise
                continue
            self._met = True
            if response.status_code == 200:
                return response
            error = refusal(response, self.endpoint)
            response.close()
            if body and "max_completion_tokens" in str(error) and "max_tokens" in body:
                # OpenAI's newer models know the limit under this name alone.
                self._limit = "max_completion_tokens"
                body[self._limit] = body.pop("max_tokens")
                continue
            if not attempt.wait(response):
                raise error
        raise AssertionError("the last attempt returns or raises")

    def _send(self, body: dict[str, Any] | None) -> httpx.Response:
        import httpx

        path = "models" if body is None else "chat/completions"
        url, host = f"{self.endpoint.url}/{path}", self.endpoint.host
        try:
            content = None if body is None else json.dumps(body).encode()
            kind = {"Content-Type": "application/json"}
            request = self._client.build_request(
                "GET" if body is None else "POST", url, content=content, headers=kind
            )
            return self._client.send(request, stream=True)
        except httpx.TimeoutException as error:
            raise RemoteError(
                f"{host} did not answer in time ({type(error).__name__}); try again later"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(
                f"{host} cannot be reached ({' '.join(str(error).split())}); check the base URL "
                "and that the server runs"
            ) from error

    def _read(self, response: httpx.Response) -> bytes:
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > MOST:
                raise RemoteError(f"{self.endpoint.host} sent more than {MOST} bytes; check it")
        return bytes(data)


class RemotePieces:
    """An answer of a server as it comes; see :class:`cogvlm.backend.Pieces`."""

    def __init__(self, backend: RemoteBackend, body: dict[str, Any]) -> None:
        self._backend, self._body = backend, body
        self._reply: Reply | None = None
        self._pieces = self._run()

    def __iter__(self) -> RemotePieces:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def reply(self) -> Reply:
        """The whole answer, once the pieces are used up."""
        if self._reply is None:
            raise InputError("the stream is not at its end; read all pieces first")
        return self._reply

    def close(self) -> None:
        """Close the connection, by which the server learns that nobody listens."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        with self._backend.opened(self._body) as response:
            source = events(response, self._backend.endpoint.host)
            self._reply = yield from source


def _outcome(outcome: Reply | BaseException | None) -> Reply | CogVLMError:
    assert outcome is not None
    if isinstance(outcome, (Reply, CogVLMError)):
        return outcome
    raise outcome
