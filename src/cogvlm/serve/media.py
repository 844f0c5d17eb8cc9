"""The only place of the server that reads URLs: ``data:`` always, ``http(s):`` where allowed.

A server that fetches what strangers name can be sent against its own network.  So a host must be
on the list, every address that it resolves to must be public, the connection goes to one of the
very addresses that were checked (a second look-up could give another), and every redirect starts
from the beginning.  Knows nothing of what is inside a picture.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

from ..errors import ImageError, MessageError

_PORTS = {"http": 80, "https": 443}
_HOW = "start the server with --allow-url HOST, or give the picture's bytes as a data: URL"


@dataclass(frozen=True)
class UrlRules:
    """Which ``http(s)`` URLs are fetched, and how much of them.

    ``hosts`` holds ``name`` (ports 80 and 443), ``name:port``, or ``*`` for every public host.
    """

    hosts: frozenset[str] = frozenset()
    max_bytes: int = 20 * 2**20
    seconds: float = 20.0  # all redirects together
    redirects: int = 3

    def allow(self, host: str, port: int) -> bool:
        """Whether the list names this host and port."""
        usual = port in _PORTS.values()
        return f"{host}:{port}" in self.hosts or (
            usual and (host in self.hosts or "*" in self.hosts)
        )


def from_base64(text: str, where: str) -> bytes:
    """The bytes of a picture sent as base64; line breaks are allowed.

    Raises:
        MessageError: empty, or not base64.
    """
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MessageError(f"{where}: not valid base64 ({error}); encode it again") from None
    if not data:
        raise MessageError(f"{where}: the picture is empty; put its bytes in")
    return data


def read(url: str, rules: UrlRules, where: str) -> bytes:
    """The bytes behind a URL; takes its time, so call it in a worker thread.

    Raises:
        MessageError: a scheme that is not supported or not allowed, a broken ``data:`` URL.
        ImageError: the picture could not be fetched, or may not be.
    """
    scheme = url.partition(":")[0].lower()[:20] if ":" in url else ""
    if scheme == "data":
        return _data(url, where)
    if scheme not in _PORTS:
        raise MessageError(
            f"{where}: scheme {scheme!r} is not supported; give a data: URL "
            "(data:image/png;base64,...)"
        )
    if not rules.hosts:
        raise MessageError(f"{where}: {scheme} URLs are not fetched here; {_HOW}")
    return _Fetch(rules, where).run(url)


def _data(url: str, where: str) -> bytes:
    header, comma, payload = url[5:].partition(",")
    if not comma:
        raise MessageError(f"{where}: the data: URL has no comma; give data:image/png;base64,...")
    data = unquote_to_bytes(payload)
    if header.lower().endswith(";base64"):
        return from_base64(data.decode("latin-1"), where)
    if not data:
        raise MessageError(f"{where}: the data: URL is empty; put the picture's bytes in")
    return data


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet, and not to some network behind it.

    >>> [is_public(a) for a in ("93.184.216.34", "10.0.0.1", "::ffff:127.0.0.1", "2002:7f00:1::")]
    [True, False, False, False]
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found.sixtofour is not None or found.teredo is not None:
            return False  # carries a v4 address that would have to be checked again
    return found.is_global and not (
        found.is_private
        or found.is_loopback
        or found.is_link_local
        or found.is_multicast
        or found.is_reserved
        or found.is_unspecified
    )


def resolve(host: str, port: int) -> list[str]:
    """Every address of a host, in the system's order.

    Raises:
        OSError: there is none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(address: str, port: int, timeout: float) -> socket.socket:
    """A connection to an address that has been checked."""
    return socket.create_connection((address, port), timeout)


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Fetch:
    """One picture, over up to ``redirects`` redirects, before one deadline."""

    def __init__(self, rules: UrlRules, where: str) -> None:
        self.rules, self.where = rules, where
        self.deadline = time.monotonic() + rules.seconds

    def run(self, url: str) -> bytes:
        for _ in range(self.rules.redirects + 1):
            answer = self._once(url)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise self._error(f"more than {self.rules.redirects} redirects; give the last URL itself")

    def _once(self, url: str) -> bytes | str:
        """The picture, or where a redirect leads."""
        parts, host, port = self._split(url)
        address = self._address(host, port)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        connection = kinds[parts.scheme](host, port)
        try:
            sock = connection.sock = self._socket(parts.scheme, host, address, port)
            # A time-out of the socket starts anew with every byte; this one does not.
            watch = threading.Timer(self._left(), _hang_up, [sock])
            watch.daemon = True
            watch.start()
        except OSError as error:
            connection.close()
            raise self._error(f"{host} cannot be reached ({type(error).__name__})") from None
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "cogvlm"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return urljoin(url, str(response.getheader("Location") or ""))
            return self._body(response)
        except (OSError, http.client.HTTPException) as error:
            self._left()
            raise self._error(f"{host} did not deliver ({type(error).__name__})") from None
        finally:
            watch.cancel()
            connection.close()

    def _split(self, url: str) -> tuple[SplitResult, str, int]:
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".")
            port = parts.port or _PORTS.get(parts.scheme, 0)
            url.encode("ascii")  # a path goes over the wire as it is
        except ValueError:
            raise self._error("the URL is not valid; percent-encode it") from None
        if parts.scheme not in _PORTS:
            raise self._error(f"scheme {parts.scheme[:20]!r} is not fetched; give http or https")
        if not host or parts.username is not None or parts.password is not None:
            raise self._error("the URL has no host, or a user name; give https://host/path")
        if any(sign <= " " or sign == "\x7f" for sign in url):
            raise self._error("the URL holds a space or control character; percent-encode it")
        if not self.rules.allow(host, port):
            raise self._error(f"host {host[:100]!r} (port {port}) is not on the list; {_HOW}")
        return parts, host, port

    def _address(self, host: str, port: int) -> str:
        try:
            found = resolve(host, port)
        except (OSError, UnicodeError):
            raise self._error(f"host {host[:100]!r} has no address; check the name") from None
        # One private address among public ones is what an attack looks like.
        if not found or not all(map(is_public, found)):
            raise self._error(f"host {host[:100]!r} is not on the public internet; it is refused")
        return found[0]

    def _socket(self, scheme: str, host: str, address: str, port: int) -> socket.socket:
        plain = connect(address, port, self._left())
        if scheme == "http":
            return plain
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise self._error(f"the host answered {response.status}")
        kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind not in ("", "application/octet-stream"):
            raise self._error(f"the host sent {kind[:50]!r}, which is no picture")
        data = bytearray()
        while chunk := response.read1(65536):
            data += chunk
            if len(data) > self.rules.max_bytes:
                raise self._error(f"the picture is larger than {self.rules.max_bytes} bytes")
        self._left()
        if response.length:
            raise self._error("the picture was cut off on the way; try again")
        return bytes(data)

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self._error(f"the host took longer than {self.rules.seconds:g} s")
        return left

    def _error(self, what: str) -> ImageError:
        return ImageError(f"{self.where}: {what}")
