"""A folder of pictures to captions: what is found, asked, written, and what a kill may not do."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image as PILImage
from typer.testing import CliRunner, Result

import cogvlm.load
from answering import Echo, open_echo, serving, status
from cogvlm.backend import Backend
from cogvlm.caption import (
    Failure,
    Job,
    Lines,
    Picture,
    Prompt,
    Shards,
    Sidecars,
    Summary,
    caption_folder,
    find,
    spread,
    work,
)
from cogvlm.cli import app
from cogvlm.errors import ConfigError, InputError, MessageError, RemoteError, ResourceError
from engine.toys import scripted
from test_family import toy_folder

ROOT = Path(__file__).parents[2]


def picture(path: Path, width: int = 30, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (width, height), (width % 256, 90, height % 256)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures in three folders, and what is none."""
    home = tmp_path / "pictures"
    for i, name in enumerate(["b.png", "a 文.jpg", "sub/c.webp", "sub/deep/d.GIF", "sub/e.f.bmp"]):
        picture(home / name, 30 + i)
    for name in (".hidden.png", ".git/x.png"):
        picture(home / name)
    (home / "notes.md").write_text("none")
    return home


NAMES = ["a 文.jpg", "b.png", "sub/c.webp", "sub/e.f.bmp", "sub/deep/d.GIF"]


def caption(job: Job, sink: Any, backend: Backend | None = None, **more: Any) -> Summary:
    return caption_folder(job, sink, partial(work, backend=backend or Echo()), **more)


def names(folder: Path, recursive: bool = True) -> list[str]:
    return [found.name for found in find(folder, recursive)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what is found ---


def test_pictures_are_found_in_one_order(folder: Path) -> None:
    assert names(folder) == NAMES
    assert names(folder, recursive=False) == NAMES[:2]
    assert not (folder / "empty").exists() and names(folder / "sub" / "deep") == ["d.GIF"]


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_links_neither_loop_nor_double(folder: Path, tmp_path: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "sub")
    outside = picture(tmp_path / "outside" / "o.png").parent
    (folder / "out1").symlink_to(outside)
    (folder / "out2").symlink_to(outside)
    (folder / "link.png").symlink_to(folder / "b.png")
    (folder / "z.png").hardlink_to(folder / "b.png")
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    found = {f.name: f.link for f in find(folder) if isinstance(f, Picture)}
    own = [name for name, link in found.items() if not link]
    assert own == [*NAMES[:2], "broken.png", "self.png", "out1/o.png", *NAMES[2:]]
    assert {name for name, link in found.items() if link} == {"link.png", "z.png"}
    with Sidecars.open(folder) as sidecars:
        summary = caption(Job(folder, Prompt("?")), sidecars)
    assert (summary.captioned, summary.failed, summary.links) == (8, 2, 0)
    assert (folder / "link.txt").exists() and (folder / "z.txt").exists()
    with Lines.open(folder / "m.jsonl") as lines:
        summary = caption(Job(folder, Prompt("?")), lines)
    assert (summary.pictures, summary.captioned, summary.failed, summary.links) == (10, 6, 2, 2)


# --- what is asked ---


def test_the_template_has_the_fields_of_the_picture(folder: Path) -> None:
    (folder / "b.tags").write_text("red,\n bus", encoding="utf-8-sig")
    turned = PILImage.Exif()
    turned[0x0112] = 8
    PILImage.new("RGB", (40, 20)).save(folder / "t.jpg", exif=turned)
    (folder / "t.tags").write_text("")
    prompt = Prompt("{{{name}|{stem}|{folder}|{width}x{height}|{tags}}}", ".tags")
    asked = {f.name: f for f in find(folder) if isinstance(f, Picture)}
    assert prompt.fill(asked["b.png"], folder) == "{b.png|b|pictures|30x20|red, bus}"
    assert prompt.fill(asked["t.jpg"], folder) == "{t.jpg|t|pictures|20x40|}"
    assert Prompt("{stem} {folder}").fill(asked["sub/e.f.bmp"], folder) == "e.f sub"
    with pytest.raises(InputError, match=r"c.tags' cannot be read"):
        prompt.fill(asked["sub/c.webp"], folder)


@pytest.mark.parametrize(
    ("text", "suffix", "said"),
    [
        ("{nmae}", None, r"unknown field {nmae}; did you mean {name}\?; known: {name} {stem}"),
        ("{}", None, r"unknown field {}"),
        ("{0}", None, r"unknown field {0}"),
        ("{name.__class__}", None, r"unknown field {name.__class__}"),
        ("{width:9}", None, "a name alone"),
        ("{name!r}", None, "a name alone"),
        ("a { b", None, "write {{ and }} for braces"),
        (" ", None, "the prompt is empty"),
        ("{tags}", None, "needs --tags-suffix"),
        ("What?", ".tags", "is of no use"),
    ],
)
def test_templates_that_cannot_be_filled(text: str, suffix: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Prompt(text, suffix)


def test_a_job_that_cannot_be_done(folder: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        Job(folder, Prompt("?"), batch_size=0)
    with pytest.raises(MessageError, match="surrogate"):
        Job(folder, Prompt("?"), prefix="\udcff")


# --- what is written ---


def test_sidecars_beside_the_pictures(folder: Path) -> None:
    backend = Echo()
    seen: list[tuple[int, int, int]] = []
    job = Job(folder, Prompt("{stem}\nsays"), prefix="sks, ", suffix=".", batch_size=2)
    with Sidecars.open(folder) as sink:
        summary = caption(job, sink, backend, progress=lambda *at: seen.append(at))
    assert (folder / "sub" / "e.f.txt").read_text() == "sks, e.f says 34x20.\n"
    assert (folder / "a 文.txt").read_text(encoding="utf-8") == "sks, a 文 says 31x20.\n"
    assert (summary.pictures, summary.captioned, summary.failed, summary.skipped) == (5, 5, 0, 0)
    assert (backend.batches, seen) == ([2, 2, 1], [(2, 0, 5), (4, 0, 5), (5, 0, 5)])
    (folder / "b.txt").write_text("by hand")
    (folder / "a 文.txt").unlink()
    with Sidecars.open(folder) as sink:
        summary = caption(job, sink)
    assert (summary.captioned, summary.skipped) == (1, 4)
    assert (folder / "b.txt").read_text() == "by hand"
    with Sidecars.open(folder, overwrite=True) as sink:
        assert caption(job, sink).captioned == 5
    assert (folder / "b.txt").read_text() == "sks, b says 30x20.\n"
    assert not list(folder.rglob("*.part"))


def test_sidecars_in_a_mirror(folder: Path, tmp_path: Path) -> None:
    with Sidecars.open(tmp_path / "mirror") as sink:
        caption(Job(folder, Prompt("?"), recursive=False), sink)
    made = sorted(p.name for p in (tmp_path / "mirror").rglob("*.txt"))
    assert made == ["a 文.txt", "b.txt"] and not list(folder.glob("*.txt"))


def test_pictures_that_share_a_name_do_not_share_a_caption(folder: Path) -> None:
    picture(folder / "b.webp")
    with Sidecars.open(folder) as sink:
        summary = caption(Job(folder, Prompt("{name}")), sink)
    assert (folder / "b.txt").read_text() == "b.png 30x20\n"
    (failure,) = read(folder / "_failed.jsonl")
    assert failure["file_name"] == "b.webp" and "that of b.png" in failure["reason"]
    assert (summary.captioned, summary.failed, summary.skipped) == (5, 1, 0)
    with Lines.open(folder / "m.jsonl") as lines:
        assert caption(Job(folder, Prompt("{name}")), lines).captioned == 6


def test_lines_are_those_of_a_dataset(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "metadata.jsonl"
    with Lines.open(out) as sink:
        caption(Job(folder, Prompt("{stem}"), prefix="x "), sink)
    assert [line["file_name"] for line in read(out)] == NAMES
    assert read(out)[1] == {
        "file_name": "b.png",
        "text": "x b 30x20",
        "prompt": "b",
        "stop": "end",
    }
    out.write_bytes(out.read_bytes()[:-9])  # torn: the last one is done again
    with Lines.open(out) as sink:
        summary = caption(Job(folder, Prompt("{stem}")), sink)
    assert (summary.captioned, summary.skipped, len(read(out))) == (1, 4, 5)
    with Lines.open(out, overwrite=True) as sink:
        assert caption(Job(folder, Prompt("{stem}")), sink).captioned == 5
    assert len(read(out)) == 5


def test_what_holds_no_captions_is_not_touched(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "answers.jsonl"
    other.write_text('{"id": 1, "prediction": "x"}\ntorn')
    for overwrite in (False, True):
        with (
            pytest.raises(InputError, match=r"answers.jsonl:1: not a caption"),
            Lines.open(other, overwrite),
        ):
            pass
    assert other.read_text().endswith("torn")
    with (
        FileLock(folder / ".caption.lock"),
        pytest.raises(InputError, match="another run"),
        Sidecars.open(folder),
    ):
        pass


def shards(out: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found[path.name] = {
                m.name: source.read() for m in tar if (source := tar.extractfile(m)) is not None
            }
    return found


def test_shards_hold_picture_text_and_json(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    job = Job(folder, Prompt("{stem}"), batch_size=3)
    with Shards.open(out, folder, size=2) as sink:
        assert caption(job, sink).captioned == 5
    found = shards(out)
    assert {name: len(members) for name, members in found.items()} == {
        "00000.tar": 6,
        "00001.tar": 6,
        "00002.tar": 3,
    }
    assert found["00000.tar"]["000000001.png"] == (folder / "b.png").read_bytes()
    assert found["00000.tar"]["000000001.txt"] == b"b 30x20"
    assert json.loads(found["00001.tar"]["000000002.json"])["file_name"] == "sub/c.webp"
    assert sorted(found["00002.tar"]) == ["000000004.json", "000000004.png", "000000004.txt"]

    before = {p.name: p.stat().st_ino for p in out.glob("*.tar")}
    with Shards.open(out, folder, size=2) as sink:
        assert caption(job, sink).captioned == 0
    assert {p.name: p.stat().st_ino for p in out.glob("*.tar")} == before

    # More pictures: the last shard is filled; a lost one is made again from what is known.
    picture(folder / "z1.png"), picture(folder / "z2.png")
    (out / "00000.tar").unlink()
    with Shards.open(out, folder, size=2) as sink:
        assert caption(job, sink).captioned == 2
    assert shards(out)["00000.tar"] == found["00000.tar"]
    assert [len(members) for members in shards(out).values()] == [6, 6, 6, 3]
    with pytest.raises(InputError, match="--shard-size 2"), Shards.open(out, folder, size=3):
        pass
    with Shards.open(out, folder, size=3, overwrite=True) as sink:
        assert caption(job, sink).captioned == 7
    assert [len(members) for members in shards(out).values()] == [9, 9, 3]


def test_a_shard_that_was_not_finished_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"
    job = Job(folder, Prompt("{stem}"), batch_size=1)

    def killed() -> None:
        raise KeyboardInterrupt

    with Shards.open(out, folder, size=2) as sink:
        monkeypatch.setattr(sink, "_pack", killed)
        with pytest.raises(KeyboardInterrupt):
            caption(job, sink)
    assert not list(out.glob("*.tar")) and len(read(out / "captions.jsonl")) == 2
    (folder / "a 文.jpg").unlink()
    with Shards.open(out, folder, size=2) as sink:
        summary = caption(job, sink)
    (lost,) = read(out / "_failed.jsonl")
    assert lost["file_name"] == "a 文.jpg" and "not in 00000.tar" in lost["reason"]
    assert summary.failed == 1
    stored = [name for members in shards(out).values() for name in members if ".json" in name]
    assert stored == [f"{i:09d}.json" for i in range(1, 5)]


# --- what goes wrong ---


def test_what_is_broken_is_listed_and_the_rest_done(folder: Path) -> None:
    whole = (folder / "a 文.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("I am no picture")
    PILImage.new("1", (20000, 10000)).save(folder / "huge.png")
    frames = [PILImage.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    PILImage.new("I;16", (9, 9)).save(folder / "deep.png")
    (folder / "folder.png").mkdir()
    if os.name == "posix":
        os.mkfifo(folder / "pipe.png")
    with Sidecars.open(folder) as sink:
        summary = caption(Job(folder, Prompt("?"), batch_size=3), sink)
    failed = {line["file_name"]: line["reason"] for line in read(folder / "_failed.jsonl")}
    expected = {"cut.jpg", "empty.png", "text.png", "huge.png"}
    assert set(failed) == expected | ({"pipe.png"} if os.name == "posix" else set())
    assert "broken" in failed["cut.jpg"] and "over" in failed["huge.png"]
    assert summary.captioned == 7 and summary.failed == len(failed)
    assert summary.failures == str(folder / "_failed.jsonl")
    for name in failed:
        (folder / name).unlink()
    with Sidecars.open(folder) as sink:
        assert caption(Job(folder, Prompt("?")), sink).failures is None
    assert not (folder / "_failed.jsonl").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_access_is_listed(folder: Path) -> None:
    (folder / "sub").chmod(0)
    try:
        assert Failure("sub/", "folder cannot be read (Permission denied)") in find(folder)
    finally:
        (folder / "sub").chmod(0o700)


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("such names exist on Linux alone")
    folder = tmp_path / "odd"
    path = picture(folder / "x.png")
    path.rename(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png"))
    with Sidecars.open(folder) as sink:
        assert caption(Job(folder, Prompt("{stem}?")), sink).captioned == 1
    assert (folder / os.fsdecode(b"\xff\xfe.txt")).read_text() == "��? 30x20\n"
    for _ in range(2):
        with Lines.open(tmp_path / "m.jsonl") as lines:
            caption(Job(folder, Prompt("?")), lines)
    assert [line["file_name"] for line in read(tmp_path / "m.jsonl")] == ["\udcff\udcfe.png"]


def test_a_picture_that_gets_no_words_failed(folder: Path) -> None:
    class Mute(Echo):
        def prepare(self, messages: Any) -> str:
            return "" if "b.png" in super().prepare(messages) else "words"

    with Lines.open(folder / "m.jsonl") as sink:
        summary = caption(Job(folder, Prompt("{name}"), suffix="!"), sink, Mute())
    assert (summary.captioned, summary.failed) == (4, 1)
    assert "the answer is empty" in read(folder / "m_failed.jsonl")[0]["reason"]


def test_reading_ahead_is_bounded(folder: Path) -> None:
    for i in range(40):
        picture(folder / f"p{i}.png")
    read_ahead: list[int] = []

    class Counting(Echo):
        prepared = answered = 0

        def prepare(self, messages: Any) -> str:
            self.prepared += 1
            return super().prepare(messages)

        def answer_batch(self, prepared: Any, settings: Any) -> Any:
            time.sleep(0.02)
            read_ahead.append(self.prepared - self.answered)
            self.answered += len(prepared)
            return super().answer_batch(prepared, settings)

    backend = Counting()
    results = list(work(Job(folder, Prompt("?"), batch_size=4), backend))
    assert sum(map(len, results)) == 45 and max(read_ahead) <= 4 + 2 * 4


def test_a_server_that_stops_keeps_what_it_answered(folder: Path) -> None:
    class Short(Echo):
        def answer_batch(self, prepared: Any, settings: Any) -> Any:
            found = super().answer_batch(prepared, settings)
            return [
                *found[:1],
                RemoteError("this one", stops=False),
                RemoteError("quota"),
                *found[3:],
            ]

    with Lines.open(folder / "m.jsonl") as sink, pytest.raises(RemoteError, match="quota"):
        caption(Job(folder, Prompt("?")), sink, Short())
    assert [line["file_name"] for line in read(folder / "m.jsonl")] == [NAMES[0], *NAMES[3:]]
    assert [line["reason"] for line in read(folder / "m_failed.jsonl")] == ["this one"]


# --- several processes ---


def test_shares_are_all_and_none_twice(folder: Path) -> None:
    for i in range(60):
        picture(folder / f"p{i}.png")
    whole = set(names(folder))
    parts = [
        {name for name in whole if Job(folder, Prompt("?"), share=(i, 3)).mine(name)}
        for i in range(3)
    ]
    assert set.union(*parts) == whole and sum(map(len, parts)) == len(whole)
    assert min(map(len, parts)) > 10
    pickle.loads(pickle.dumps(Job(folder, Prompt("?"))))


def test_one_process_that_dies_does_not_take_the_others_work(folder: Path) -> None:
    for i in range(30):
        picture(folder / f"p{i}.png")
    job = Job(folder, Prompt("{stem}"), batch_size=2)
    several = partial(spread, opener=open_echo, devices=["cpu", "dies", "breaks"])
    with (
        Sidecars.open(folder) as sink,
        pytest.raises(ResourceError) as caught,
    ):
        caption_folder(job, sink, several)
    assert "2 of 3 processes failed" in str(caught.value)
    assert "process 1 on dies: was killed" in str(caught.value)
    assert "process 2 on breaks: no such device" in str(caught.value)
    first = {p.relative_to(folder).as_posix() for p in folder.rglob("*.txt")}
    share = Job(folder, Prompt("?"), share=(0, 3))
    assert first == {os.path.splitext(n)[0] + ".txt" for n in names(folder) if share.mine(n)}
    with Sidecars.open(folder) as sink:
        rest = caption_folder(job, sink, partial(spread, opener=open_echo, devices=["a", "b"]))
    assert (rest.captioned, rest.skipped) == (35 - len(first), len(first))


# --- the command ---


@pytest.fixture(autouse=True)
def _scripted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGVLM_BASE_URL", raising=False)
    monkeypatch.setattr(
        cogvlm.load, "load", lambda *a, **k: scripted("A bus.", "A cat.", "A line.")
    )


def cogvlm_(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["caption", *map(str, arguments)])


def test_the_command_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.png").write_text("x")
    result = cogvlm_(folder, "--flat", "--prompt", "Describe {name}.", "--prefix", "sks ")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (folder / "b.txt").read_text() == "sks A cat.\n"
    assert "2 captioned, 1 failed, 0 there before, of 3 pictures" in result.stderr
    assert "bad.png: image" in result.stderr and "_failed.jsonl" in result.stderr
    (tmp_path / "p.txt").write_text("What is {stem}?\n")
    out = tmp_path / "m.jsonl"
    options = ("--format", "jsonl", "-o", out, "--prompt-file", tmp_path / "p.txt", "--json")
    result = cogvlm_(folder, "--strict", "--flat", *options)
    values = json.loads(result.stdout)
    assert (result.exit_code, values["captioned"], values["failed"]) == (1, 2, 1)
    assert read(out)[0]["prompt"] == "What is a 文?"
    again = cogvlm_(folder, "--flat", *options, "--model", "never loaded")
    assert json.loads(again.stdout)["skipped"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "{nme}"], "unknown field {nme}"),
        (["--prompt", "a", "--prompt-file", __file__], "give one of them"),
        (["--prompt-file", "none.txt"], "none.txt: cannot be read"),
        (["--format", "webdataset"], "give --output"),
        (["--shard-size", "3"], "--shard-size is for --format webdataset"),
        (["-o", __file__], "is a file"),
        (["--prompt", "{tags}", "--tags-suffix", ".txt"], "captions go to"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--base-url", "http://127.0.0.1:9/v1", "--processes", "2"], "are for local models"),
        (["--base-url", "http://127.0.0.1:9/v1", "--device", "cpu"], "is for local models"),
    ],
)
def test_bad_options_are_one_line(folder: Path, arguments: list[str], said: str) -> None:
    result = cogvlm_(folder, *arguments)
    assert result.exit_code == 2 and said in result.stderr
    assert cogvlm_(folder / "none").exit_code == 2


def test_a_server_captions_too(folder: Path) -> None:
    with serving() as server:
        result = cogvlm_(folder, "--base-url", server.url, "--prompt", "{stem}")
        assert result.exit_code == 0 and f"pictures go to {server.url[7:-3]}" in result.stderr
    assert (folder / "b.txt").read_text() == "b (1 pictures)\n"
    with serving(status(401)) as server:
        result = cogvlm_(folder, "--overwrite", "--base-url", server.url)
        assert result.exit_code == 1 and "wants a key" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("form", ["txt", "jsonl", "webdataset"])
def test_killed_half_way_every_picture_is_captioned_once(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_folder(tmp_path / "toy", "cogvlm2")
    folder = tmp_path / "pictures"
    for i in range(40):
        picture(folder / f"s{i % 3}" / f"p{i}.png", 30 + i)
    out = tmp_path / "out" / ("m.jsonl" if form == "jsonl" else "")
    more = ["--shard-size", "6"] if form == "webdataset" else []
    command = [sys.executable, "-m", "cogvlm.cli", "caption", str(folder), "-o", str(out)]
    command += ["--format", form, "--model", str(model), "--device", "cpu", "--batch-size", "1"]
    command += ["--max-new-tokens", "24", "--no-repetition-stop", "--prefix", "p ", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    def count() -> int:
        if form == "txt":
            return len(list(out.rglob("*.txt")))
        file = out if form == "jsonl" else out / "captions.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while count() < 8:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = count()
    assert 8 <= before < 40
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["captioned"] + summary["failed"] + summary["skipped"] == 40
    assert summary["failed"] == 0 and summary["skipped"] in (before - 1, before)
    assert not list(tmp_path.rglob("*.part"))
    if form == "txt":
        texts = [path.read_text() for path in out.rglob("*.txt")]
        assert len(texts) == 40 and all(t.startswith("p ") and t.endswith("\n") for t in texts)
    else:
        lines = read(out if form == "jsonl" else out / "captions.jsonl")
        assert len({line["file_name"] for line in lines}) == len(lines) == 40
    if form == "webdataset":
        stored = [name for members in shards(out).values() for name in members]
        assert len(set(stored)) == len(stored) == 120 and len(shards(out)) == 7
