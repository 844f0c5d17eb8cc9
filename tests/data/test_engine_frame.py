"""Samples, rejects, shards, the index and the contact sheet; one process, several, and Ray."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cogvlm.cli import app
from cogvlm.data.engine.compose import Compose
from cogvlm.data.engine.pack import write_shard
from cogvlm.data.engine.records import Records
from cogvlm.data.engine.run import Job, run
from cogvlm.data.engine.sheet import write_sheet
from cogvlm.data.engine.step import (
    Each,
    Item,
    Refused,
    Reject,
    Sample,
    chain,
    truth_as_json,
    truth_from_json,
)
from cogvlm.data.sft import open_source
from cogvlm.data.sft.check import check
from cogvlm.errors import InputError
from data.engine_parts import Dots, dot


def job(out: Path, count: int = 7, size: int = 4) -> Job:
    shards = -(-count // size)
    return Job(
        Dots(), (Compose(pairs=0.3, text_only=0.3),), out, shards, size, count, {"by": "test"}
    )


def test_a_step_counts_what_it_refuses_and_passes_on_what_was_refused_before() -> None:
    def odd(sample: Sample) -> Sample:
        if sample.id.endswith("1"):
            raise Refused("odd", "why")
        return sample

    def seen(sample: Sample) -> list[Sample]:
        return [sample, replace(sample, id=sample.id + "b")]

    before = Reject("x", "tests", "make", "no luck")
    items: list[Item] = [dot("0"), before, dot("1")]
    out = list(chain(items, (Each("parity", odd), Each("twice", seen))))
    assert [item.id for item in out] == ["0", "0b", "x", "1"]
    assert out[2] is before
    assert out[3] == Reject("1", "tests", "parity", "odd", "why")


def test_truth_survives_its_json() -> None:
    picture = dot("a", 3).pictures[0]
    assert truth_from_json(json.loads(json.dumps(truth_as_json(picture)))) == picture.truth


def test_shards_read_back_as_the_same_records(tmp_path: Path) -> None:
    out = tmp_path / "set"
    stats = run(job(out), 1)
    assert stats.samples == 7
    source = open_source(out)
    report = check(source, decode=True)
    assert report.good == 7 and not report.bad
    assert not {"truth", "kind", "source", "licence", "tasks"} - set(report.unread)
    items = chain(Dots().items(0), (Compose(pairs=0.3, text_only=0.3),))
    made: list[Sample] = []
    for item in items:
        if isinstance(item, Sample):
            made.append(item)
        if len(made) == 4:
            break
    for index, sample in enumerate(made):
        record, own = source[index], sample.record()
        assert [m.role for m in record.messages] == [m.role for m in own.messages]
        assert record.answers == own.answers
        assert len(record.visuals) == len(sample.pictures)
        again = Records((str(out),), 1).item(index)
        assert isinstance(again, Sample)
        assert replace(again, seed=sample.seed) == sample


def test_the_index_adds_up(tmp_path: Path) -> None:
    stats = run(replace(job(tmp_path), maker=Dots(refused=2)), 1)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["samples"] == sum(index["kinds"].values()) == stats.samples == 7
    assert [s["samples"] for s in index["shards"]] == [4, 3]
    assert index["licences"] == {"CC0-1.0": 7} and index["made"] == {"by": "test"}
    lists = sorted((tmp_path / "rejects").iterdir())
    refused = [line for path in lists for line in path.read_text().splitlines()]
    assert len(refused) == sum(index["rejects"]["make"].values()) > 0
    assert json.loads(refused[0])["reason"] == "no luck"
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = tar.getmembers()
    assert {m.mtime for m in members} == {0} and {m.uname for m in members} == {""}


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    run(job(tmp_path / "a"), 1)
    run(job(tmp_path / "b"), 1)
    first = (tmp_path / "b/00000.tar").stat().st_mtime_ns
    (tmp_path / "b/stats/00001.json").unlink()
    (tmp_path / "b/00001.tar").write_bytes(b"half")
    run(job(tmp_path / "b"), 1)
    assert (tmp_path / "b/00000.tar").stat().st_mtime_ns == first
    for name in ("00000.tar", "00001.tar", "index.json", "rejects/00001.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_other_settings_are_refused_and_so_are_strangers(tmp_path: Path) -> None:
    run(job(tmp_path / "a"), 1)
    with pytest.raises(InputError, match="begun with other settings"):
        run(job(tmp_path / "a", count=9), 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.tar").write_bytes(b"")
    with pytest.raises(InputError, match="not of this run"):
        run(job(tmp_path / "b"), 1)


def test_an_endless_maker_that_is_always_refused_ends_with_the_reason(tmp_path: Path) -> None:
    maker = Dots(refused=1)
    with pytest.raises(InputError, match=r"make: no luck"):
        write_shard(tmp_path, 0, maker.items(0), 5, True)
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*"))


def test_processes_give_the_same_bytes(tmp_path: Path) -> None:
    run(job(tmp_path / "in"), 1)
    for name, processes in (("one", 1), ("two", 2)):
        maker = Records((str(tmp_path / "in"),), 2, seed=5)
        run(Job(maker, (), tmp_path / name, 2, made={}), processes)
    for shard in ("00000.tar", "00001.tar", "index.json"):
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()
    order = [Records((str(tmp_path / "in"),), 1, seed=s).items(0) for s in (5, 6)]
    ids = [[item.id for item in items] for items in order]
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray warns of its own settings
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run(job(tmp_path / "in"), 1)
    for name, ray in (("here", None), ("there", "local")):
        maker = Records((str(tmp_path / "in"),), 2, seed=5)
        run(Job(maker, (), tmp_path / name, 2, made={}), 1, ray)
    for shard in ("00000.tar", "00001.tar", "index.json"):
        assert (tmp_path / "here" / shard).read_bytes() == (tmp_path / "there" / shard).read_bytes()


def test_the_sheet_needs_no_other_file_and_escapes_what_it_shows(tmp_path: Path) -> None:
    run(job(tmp_path / "set", 3, 3), 1)
    sheet = tmp_path / "sheet.html"
    assert write_sheet(sheet, open_source(tmp_path / "set"), 50) == 3
    text = sheet.read_text()
    assert text.count("<article>") == 3 and "data:image/jpeg;base64," in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "<co>" not in text
    x0 = dot("dot-0-0", 0).pictures[0].truth.items[0].box[0]
    assert f'<rect x="{x0:.1f}"' in text


def test_the_sheet_of_a_broken_set_says_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text('{"image": "no.png", "question": "a", "answer": "b"}\n')
    result = CliRunner().invoke(
        app, ["data", "show", str(tmp_path), "--sheet", str(tmp_path / "s.html"), "-n", "9"]
    )
    assert result.exit_code == 0, result.output
    assert "does not exist" in (tmp_path / "s.html").read_text()


def test_pack_joins_formats(tmp_path: Path) -> None:
    picture = dot("a").pictures[0]
    (tmp_path / "a.png").write_bytes(picture.data)
    row = {"image": "a.png", "question": "What is this?", "answer": "A dot."}
    (tmp_path / "one.jsonl").write_text(json.dumps({**row, "id": "q"}) + "\n")
    said = (("user", "Say it is <not> a cat."), ("assistant", "It is."))
    talk = {"id": "q", "messages": [{"role": r, "content": c} for r, c in said]}
    (tmp_path / "two.jsonl").write_text(json.dumps(talk) + "\n" + '{"id": "bad"}\n')
    out = tmp_path / "out"
    arguments = ["data", "pack", str(out), str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    result = CliRunner().invoke(app, [*arguments, "--licence", "mine"])
    assert result.exit_code == 0, result.output
    assert "2 samples, 1 pictures" in result.output and "read: unusable 1" in result.output
    report = check(open_source(out), decode=True)
    assert report.good == 2 and not report.bad
    assert json.loads((out / "index.json").read_text())["licences"] == {"mine": 2}
    again = CliRunner().invoke(app, ["data", "pack", str(tmp_path / "x"), str(tmp_path / "none")])
    assert again.exit_code == 2 and "no such file" in again.output
