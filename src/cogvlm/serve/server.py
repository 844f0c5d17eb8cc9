"""Runs the application: the socket, the line that says where, and an end without loss."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..errors import ResourceError
from .front import Front

_AFTER = 10  # seconds that answers cut off have to be delivered
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """A socket for the server; taken before the model is loaded, so that failing is quick.

    Args:
        host: name or address to listen on.
        port: 0 takes any free one.

    Raises:
        ResourceError: the port is taken, or the host is not this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
    except OSError as error:
        raise ResourceError(f"host {host!r} is no address of this machine ({error})") from None
    try:
        if hasattr(signal, "SIGKILL"):  # elsewhere the option means that two may share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            what = f"port {port} on {host} is taken; give another one with --port"
        elif error.errno == errno.EACCES:
            what = f"port {port} on {host} is not allowed to this user; give one above 1023"
        else:
            what = f"{host}:{port} cannot be listened on ({error.strerror})"
        raise ResourceError(what) from None
    return sock


class Server(uvicorn.Server):
    """One application on one socket.

    At the first SIGTERM or Ctrl-C nothing new is taken and what runs has ``grace`` seconds; then,
    or at the second signal, it ends where it is and is delivered.

    Args:
        app: from :func:`cogvlm.serve.build`.
        desk: of the application.
        sock: from :func:`bind`.
        announce: called with the URL once requests are taken.
    """

    def __init__(
        self,
        app: FastAPI,
        desk: Front,
        sock: socket.socket,
        announce: Callable[[str], None] = lambda url: None,
    ) -> None:
        grace = desk.settings.grace
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(grace) + _AFTER,
            )
        )
        self._desk, self._sock, self._announce = desk, sock, announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cut: asyncio.TimerHandle | None = None

    @property
    def url(self) -> str:
        """Where the server is."""
        host, port = self._sock.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, sockets: Any = None) -> None:
        """Serve until a signal or :meth:`stop`."""
        super().run(sockets=[self._sock])

    def stop(self) -> None:
        """Begin to close, from any thread."""
        self._desk.closing = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Warm up, then take requests and say so."""
        self._loop = asyncio.get_running_loop()
        url = self.url
        await self._desk.warm()
        await super().startup(sockets)
        if self.started:
            self._announce(url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish, within the grace."""
        self._desk.closing = True
        loop = asyncio.get_running_loop()
        self._cut = loop.call_later(self._desk.settings.grace, self._desk.cut)
        await super().shutdown(sockets)
        self._cut.cancel()
        await self._desk.close()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but a signal that was obeyed is not raised again: the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one closes, the second one hurries."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._desk.cut)
        self.stop()
