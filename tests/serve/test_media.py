"""Fetching what strangers name: what is refused, and what is fetched where it is allowed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cogvlm.errors import ImageError, InputError, MessageError
from cogvlm.serve import UrlRules, media
from cogvlm.serve.media import is_public
from serve.fakes import data_url, png

PUBLIC = "93.184.216.34"
ANY = UrlRules(frozenset({"*"}), max_bytes=100_000, seconds=5.0)


class Internet:
    """Names and what answers there; every connection goes to one local server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, list[str]] = {}
        self.answers: dict[str, bytes] = {}
        self.connected: list[tuple[str, int]] = []
        self.looked_up: list[str] = []
        self.asked: list[str] = []
        self.hold: Callable[[socket.socket], Any] = lambda sock: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        original = socket.getaddrinfo

        def look_up(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
            self.looked_up.append(host)
            if host not in self.names:
                # Numbers in any form are read by the system itself.
                return original(host, port, *rest, flags=socket.AI_NUMERICHOST, **more)
            return [(0, 0, 0, "", (address, port)) for address in self.names[host]]

        def connect(address: str, port: int, timeout: float) -> socket.socket:
            self.connected.append((address, port))
            sock = socket.socket()
            sock.settimeout(timeout)
            sock.connect(self._listener.getsockname())
            thread = threading.Thread(target=self._serve, daemon=True)
            thread.start()
            self._threads.append(thread)
            return sock

        monkeypatch.setattr(media.socket, "getaddrinfo", look_up)
        monkeypatch.setattr(media, "connect", connect)

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock:
            head = sock.recv(65536).decode()
            path = head.split()[1]
            self.asked.append(head)
            self.hold(sock)
            try:
                sock.sendall(self.answers[path])
            except OSError:
                return

    def close(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()


@contextmanager
def _closing(internet: Internet) -> Iterator[Internet]:
    try:
        yield internet
    finally:
        internet.close()


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Internet]:
    with _closing(Internet(monkeypatch)) as internet:
        yield internet


def http(body: bytes, kind: str = "image/png", status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def redirect(to: str) -> bytes:
    return http(b"", status="302 Found", more=f"Location: {to}\r\n")


def test_data_urls_are_read() -> None:
    assert media.read(data_url(b"abc"), UrlRules(), "x") == b"abc"
    assert media.read("DATA:,a%20b", UrlRules(), "x") == b"a b"
    assert media.read("data:;base64,YW\nJj", UrlRules(), "x") == b"abc"


def test_a_picture_of_an_allowed_host_is_fetched_from_the_checked_address(
    internet: Internet,
) -> None:
    internet.names["pictures.example"] = [PUBLIC, "93.184.216.35"]
    internet.answers["/a.png?b=1"] = http(png(1))
    rules = UrlRules(frozenset({"pictures.example"}))
    assert media.read("http://Pictures.example/a.png?b=1#c", rules, "x") == png(1)
    assert internet.connected == [(PUBLIC, 80)]
    assert internet.looked_up == ["pictures.example"]
    assert "Host: pictures.example\r\n" in internet.asked[0]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://0x7f.0.0.1/",
        "http://0/",
        "http://10.1.2.3/",
        "http://172.16.0.1/",
        "http://192.168.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[::127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[2001:0:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fc00::1]/",
        "http://[ff02::1]/",
        "http://127.0.0.1./",
    ],
)
def test_no_address_behind_the_internet_is_connected_to(internet: Internet, url: str) -> None:
    with pytest.raises(ImageError, match=r"is not on the public internet|has no address"):
        media.read(url, ANY, "x")
    assert internet.connected == []


@pytest.mark.parametrize("found", [["10.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1"], []])
def test_a_name_that_leads_inside_is_refused(internet: Internet, found: list[str]) -> None:
    internet.names["evil.example"] = found
    with pytest.raises(ImageError, match="is not on the public internet"):
        media.read("http://evil.example/", ANY, "x")
    assert internet.connected == []


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1/secret",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/",
        "//10.0.0.1/",
        "http://inside.example/",
    ],
)
def test_redirects_inside_are_refused(internet: Internet, to: str) -> None:
    internet.names.update({"good.example": [PUBLIC], "inside.example": ["192.168.1.1"]})
    internet.answers["/"] = redirect(to)
    with pytest.raises(ImageError, match="is not on the public internet"):
        media.read("http://good.example/", ANY, "x")
    assert internet.connected == [(PUBLIC, 80)]


def test_redirects_leave_neither_list_nor_scheme(internet: Internet) -> None:
    internet.names.update({"good.example": [PUBLIC], "other.example": [PUBLIC]})
    rules = UrlRules(frozenset({"good.example"}))
    internet.answers["/a"] = redirect("http://other.example/")
    with pytest.raises(ImageError, match=r"'other.example' .port 80. is not on the list"):
        media.read("http://good.example/a", rules, "x")
    internet.answers["/b"] = redirect("file:///etc/passwd")
    with pytest.raises(ImageError, match="scheme 'file' is not fetched"):
        media.read("http://good.example/b", rules, "x")


def test_three_redirects_are_followed_and_no_more(internet: Internet) -> None:
    internet.names["good.example"] = [PUBLIC]
    internet.answers |= {f"/{i}": redirect(f"/{i + 1}") for i in range(4)}
    internet.answers["/4"] = http(png(1))
    assert media.read("http://good.example/1", ANY, "x") == png(1)
    with pytest.raises(ImageError, match="more than 3 redirects"):
        media.read("http://good.example/0", ANY, "x")


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        ({"a.example"}, "http://a.example/", True),
        ({"a.example"}, "http://b.a.example/", False),
        ({"a.example"}, "http://a.example:8080/", False),
        ({"a.example:8080"}, "http://a.example:8080/", True),
        ({"*"}, "http://a.example:8080/", False),
        ({"a.example"}, "http://a.example@b.example/", False),
        ({"a.example"}, "http://a.example:pass@a.example/", False),
        ({"a.example"}, "http://a.example:99999/", False),
        ({"a.example"}, "http://a.example /", False),
        ({"a.example"}, "http://a.example/a\r\nX: y", False),
        ({"a.example"}, "http:///x", False),
        ({"a.example"}, "http://a.example/é", False),
    ],
)
def test_the_list_is_exact(internet: Internet, hosts: set[str], url: str, allowed: bool) -> None:
    internet.names |= {name: [PUBLIC] for name in ("a.example", "b.example", "b.a.example")}
    internet.answers["/"] = http(png(1))
    rules = UrlRules(frozenset(hosts))
    if allowed:
        assert media.read(url, rules, "x") == png(1)
    else:
        with pytest.raises(ImageError):
            media.read(url, rules, "x")
        assert internet.connected == []


def test_nothing_is_fetched_unless_allowed(internet: Internet) -> None:
    with pytest.raises(MessageError, match="start the server with --allow-url HOST"):
        media.read("http://a.example/", UrlRules(), "x")
    assert internet.looked_up == []


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http(b"x" * 100_001), "larger than 100000 bytes"),
        (http(b"<html>", "text/html"), "'text/html', which is no picture"),
        (http(b"", status="404 Not Found"), "answered 404"),
        (http(png(1))[:-10], "was cut off on the way"),
        (b"SSH-2.0-OpenSSH\r\n", "did not deliver"),
        (b"", "did not deliver"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
            "did not deliver",
        ),
    ],
)
def test_what_is_no_whole_picture_is_refused(internet: Internet, answer: bytes, says: str) -> None:
    internet.names["a.example"] = [PUBLIC]
    internet.answers["/"] = answer
    with pytest.raises(ImageError, match=says):
        media.read("http://a.example/", ANY, "x")


def test_a_host_that_drips_is_hung_up_on(internet: Internet) -> None:
    """Each byte comes within the time-out of a socket; all of them do not."""
    internet.names["a.example"] = [PUBLIC]
    internet.answers["/"] = b""

    def drip(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n")
        sock.settimeout(0.05)
        for _ in range(400):
            try:
                sock.sendall(b"X")
                if sock.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
        raise AssertionError("nobody hung up")

    internet.hold = drip
    rules = UrlRules(frozenset({"*"}), seconds=0.4)
    with pytest.raises(ImageError, match=r"took longer than 0\.4 s"):
        media.read("http://a.example/", rules, "x")


def test_only_global_addresses_are_public() -> None:
    assert is_public("8.8.8.8")
    assert is_public("2606:4700::1111")
    assert not is_public("fe80::1%eth0")
    assert not is_public("::ffff:10.0.0.1")


@pytest.mark.parametrize("text", ["", "  ", "@", "abc", "é"])
def test_base64_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"not valid base64|is empty"):
        media.from_base64(text, "x")
