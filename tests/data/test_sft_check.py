"""``cogvlm data check`` and ``show``: every bad record named, the good ones described."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cogvlm.cli import app
from cogvlm.data.sft import open_source
from cogvlm.data.sft.check import check, lines, measure_with
from cogvlm.processor import Processor, SquarePixels, get_template
from cogvlm.processor.video import FramePixels, VideoPlan
from data.sets import llava, picture, pictures, said, sft, tar, write
from processor.standin import Bytes


def run(*words: object) -> tuple[int, str]:
    """Exit code and standard output of a command."""
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    return result.exit_code, result.stdout


def bad(path: Path, **options: Any) -> dict[str, str]:
    """What a check finds wrong, by place."""
    return {p.where: p.reason for p in check(open_source(path), **options).bad}


def test_sound_sets_of_every_kind_pass(tmp_path: Path) -> None:
    write(tmp_path / "l/a.json", llava(tmp_path / "l"))
    sft(tmp_path / "sft")
    tar(tmp_path / "a.tar", {"0.png": picture(), "0.txt": b"Grey."})
    code, out = run("check", tmp_path / "l", tmp_path / "sft", tmp_path / "a.tar", "--decode")
    assert code == 0, out
    assert "l/a.json (json): 4 good, 0 bad" in out
    assert "sft (sft): 12 good, 0 bad" in out and "Latin x 6, Han x 6" in out
    assert "a.tar (webdataset): 1 good, 0 bad" in out


def test_every_bad_record_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    rows = llava(tmp_path, 8)
    (tmp_path / "001.png").write_bytes(b"")
    (tmp_path / "002.png").write_bytes(b"GIF89a but no more")
    (tmp_path / "003.png").unlink()
    rows[4]["id"] = "r0"
    rows[5]["conversations"] = said("<image>", "")
    rows[6]["conversations"][0]["value"] += "<image>"
    path = write(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + '{"id": "r9", "image"\n')
    found = bad(path)
    assert [int(where.rpartition(":")[2]) for where in found] == [2, 3, 4, 5, 6, 7, 9]
    for line, message in (
        (2, "is empty"),
        (3, "is not a picture that can be read"),
        (4, "does not exist"),
        (5, f"id 'r0' again, first at {path}:1"),
        (6, "answer 1 is empty"),
        (7, "2 <image> in the text for 1"),
        (9, "not JSON"),
    ):
        assert message in found[f"{path}:{line}"]
    code, out = run("check", path)
    assert code == 1
    assert out.splitlines()[0].startswith(f"{path}:2: image") and f"{path}:9: not JSON" in out
    assert "(json): 2 good, 7 bad" in out
    code, out = run("check", path, "--json")
    [report] = json.loads(out)
    assert (code, report["records"], report["good"], len(report["bad"])) == (1, 9, 2, 7)
    assert report["bad"][0]["where"] == f"{path}:2"


def test_a_damaged_file_is_bad_though_its_records_are_good(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", llava(tmp_path))
    path.write_text(path.read_text()[:-1])
    code, out = run("check", path)
    assert code == 1 and "not closed by ']'" in out and "4 good, 1 bad" in out


def test_what_cannot_be_read_at_all_is_an_error_of_use(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "absent")])
    assert result.exit_code == 2 and "no such file or folder" in result.stderr
    empty = write(tmp_path / "a.json", [])
    assert run("check", empty)[0] == 1  # nothing to train on is not well


def test_headers_say_sizes_and_only_decode_finds_a_cut(tmp_path: Path) -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (700, 100)).save(out, "JPEG", exif=exif)
    (tmp_path / "0.jpg").write_bytes(out.getvalue()[:-400])
    (tmp_path / "0.txt").write_text("Black. 黑")
    report = check(open_source(tmp_path)).as_dict()
    assert (report["width"]["max"], report["height"]["max"]) == (100, 700)
    assert report["aspect"]["max"] == 0.143 and report["cjk"] == round(1 / 6, 4)
    assert any("1 pictures with sides further" in x for x in lines(check(open_source(tmp_path))))
    (tmp_path / "1.png").write_bytes(picture(0, (300, 300))[:60])
    (tmp_path / "1.txt").write_text("Grey.")
    assert not bad(tmp_path)
    assert ["broken or cut off" in why for why in bad(tmp_path, decode=True).values()] == [True] * 2


def test_numbers_of_a_report(tmp_path: Path) -> None:
    names = pictures(tmp_path, 2)
    rows = [
        {"images": names, "conversations": said("a", "bb", "ccc", "dddd"), "model": "m"},
        {"conversations": said("eeeee", "ффф")},
    ]
    report = check(open_source(write(tmp_path / "a.jsonl", rows))).as_dict()
    assert report["questions"] == {1: 1, 2: 1} and report["visuals"] == {0: 1, 2: 1}
    assert report["scripts"] == {"Latin": 1, "Cyrillic": 1} and report["pictures"] == 2
    assert report["question_chars"] == {"min": 1, "median": 3, "p95": 5, "max": 5}
    assert report["answer_chars"]["max"] == 4 and report["without_place"] == 1
    assert report["keys_not_read"] == {"model": 1}
    assert "tokens" not in report


def test_empty_films_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    path = write(tmp_path / "a.jsonl", [{"video": "a.mp4", "question": "?", "answer": "!"}])
    [why] = bad(path).values()
    assert "is empty" in why


# --- tokens ------------------------------------------------------------------------------------


def processor(template: str, **options: Any) -> Processor:
    """A token a byte, and pictures of 4 + 2."""
    options = {"pixels": SquarePixels(28, 14, 1), **options}
    return Processor(Bytes(), get_template(template), image_token_id=3, **options)


@pytest.mark.parametrize("template", ["chat", "vqa", "base", "chatml", "glm4"])
def test_lengths_are_those_of_encoding(tmp_path: Path, template: str) -> None:
    names = pictures(tmp_path, 2)
    rows = [
        {"images": names, "conversations": said("<image>a<image>?", "Two.", "And?", "More.")},
        {"conversations": said("Text?", "Alone."), "system": "Be brief."},
    ]
    one = processor(template)
    for record in open_source(write(tmp_path / "a.jsonl", rows)):
        length = measure_with(one)(record, [(40, 20)] * len(record.visuals))
        encoded = one.encode(record.messages, train=True)
        assert encoded.labels is not None
        assert length.all == len(encoded.input_ids)
        assert length.visual == int(encoded.token_type_ids.sum())
        assert length.answers == int((encoded.labels >= 0).sum())


def test_what_would_be_cut_off_is_bad(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", llava(tmp_path, 2))
    source, measure = open_source(path), measure_with(processor("chat"))
    length = measure(source[0], [(40, 20)])
    assert not bad(path, measure=measure, max_tokens=length.all)
    for why in bad(path, measure=measure, max_tokens=length.all - 3).values():
        assert f"{length.all} tokens (6 of pictures), 3 over the limit" in why
        assert f"3 of the answer's {length.answers} would be cut off" in why


def test_films_count_as_many_frames_as_the_model_takes_at_most(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"film")
    path = write(tmp_path / "a.jsonl", [{"video": "a.mp4", "question": "?", "answer": "!"}])
    pixels = FramePixels(28, 14, 1)
    video = processor("chat", pixels=pixels, video=VideoPlan("seconds", frames=12))
    length = measure_with(video)(open_source(path)[0], [])
    assert length.visual == 12 * 6
    text = len("Question: ? Answer:") + 2 + len("!")  # bos and eos
    assert length.all == 12 * 6 + 10 * 1 + 2 * 2 + text  # with the numbers 0 to 11
    [why] = bad(path, measure=measure_with(processor("chat"))).values()
    assert "takes pictures only" in why
    two = write(tmp_path / "b.jsonl", [{"images": ["0.png"] * 2, "question": "?", "answer": "!"}])
    (tmp_path / "0.png").write_bytes(picture())
    [why] = bad(two, measure=measure_with(processor("chat", max_images=1))).values()
    assert "2 pictures; this model takes at most 1" in why


# --- show --------------------------------------------------------------------------------------


def test_show_writes_records_as_they_will_be_learnt(tmp_path: Path) -> None:
    rows = llava(tmp_path, 3)
    del rows[1]["conversations"][1]
    (tmp_path / "002.png").write_bytes(b"")
    path = write(tmp_path / "a.jsonl", rows)
    code, out = run("show", path, "-n", 9)
    assert code == 0
    assert f"{path}:1  id r0\n  user      [picture 40x20 {tmp_path}/000.png]" in out
    assert "            What is 0?\n  assistant It is 0" in out
    assert f"bad: {path}:2: " in out and "[picture unreadable" in out
    code, out = run("show", path, "--json", "--count", 2)
    first, second = map(json.loads, out.splitlines())
    assert first["messages"][1] == {"role": "assistant", "content": ["It is 0"]}
    assert "message is" in second["error"]


def test_show_in_the_order_of_training(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", llava(tmp_path, 8))
    orders = [run("show", path, "-n", 8, "--seed", seed, "--json")[1] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    shown = [json.loads(line)["id"] for line in orders[0].splitlines()]
    assert sorted(shown) == [f"r{i}" for i in range(8)] != shown


@pytest.mark.slow
def test_tokens_of_nano(tmp_path: Path, language_model: Path) -> None:
    path = write(tmp_path / "a.json", llava(tmp_path, 2))
    code, out = run("check", path, "--tokens", "--json")
    assert code == 0 and json.loads(out)[0]["tokens"]["min"] > 10
    code, out = run("check", path, "--max-tokens", 12)
    assert code == 1 and "over the limit of 12" in out
