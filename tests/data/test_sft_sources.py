"""Every format is read as what it says, and what is damaged is named by file and line."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cogvlm.data.sft import Options, RecordError, open_source
from cogvlm.data.sft.media import FileSlice
from cogvlm.errors import ConfigError, InputError
from cogvlm.processor import Image, Video, load_image
from data.sets import llava, picture, pictures, said, sft, tar, write


def flat(record: Any) -> list[tuple[str, list[str]]]:
    """Roles, and the parts as text or the kind of a picture."""
    return [
        (m.role, [getattr(p, "text", None) or type(p).__name__ for p in m.parts])
        for m in record.messages
    ]


def reason(path: Path, index: int = 0, **options: Any) -> str:
    """Why a record is refused."""
    with pytest.raises(RecordError) as caught:
        open_source(path, options=Options(**options))[index]
    return caught.value.reason


def outcomes(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Ids that are good, where the bad ones are, and where nothing can be read."""
    source = open_source(path)
    good, bad = [], []
    for index in range(len(source)):
        try:
            good.append(source[index].id)
        except RecordError as error:
            bad.append(error.where)
    return good, bad, [problem.where for problem in source.problems]


# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_llava(tmp_path: Path, name: str, indent: int | None) -> None:
    path = write(tmp_path / name, llava(tmp_path), indent)
    source = open_source(path)
    assert [r.id for r in source] == ["r0", "r1", "r2", "r3"]
    record = source[2]
    assert flat(record) == [("user", ["Image", "What is 2?"]), ("assistant", ["It is 2"])]
    assert record.visuals[0].source == tmp_path / "002.png"
    assert (record.source, record.answers) == (str(path), ("It is 2",))
    line = path.read_text().splitlines()[int(record.where.rpartition(":")[2]) - 1]
    assert record.where.startswith(str(path)) and ("{" in line)
    # The same from the folder, and where the format is forced.
    assert open_source(tmp_path)[1].messages == source[1].messages
    assert open_source(path, "llava")[1].messages == source[1].messages
    with pytest.raises(RecordError, match="none of the keys 'messages'"):
        open_source(path, "openai")[0]


def test_several_pictures_turns_and_places(tmp_path: Path) -> None:
    a, b = pictures(tmp_path, 2)
    turns = said("Compare <image> with", "One.", "this: <image>\nand say.", "Two.")
    path = write(tmp_path / "a.json", [{"images": [a, b], "conversations": turns, "system": "Be."}])
    record = open_source(path)[0]
    assert flat(record) == [
        ("system", ["Be."]),
        ("user", ["Compare", "Image", "with"]),
        ("assistant", ["One."]),
        ("user", ["this:", "Image", "and say."]),
        ("assistant", ["Two."]),
    ]
    assert [v.source for v in record.visuals] == [tmp_path / a, tmp_path / b]
    assert (record.id, record.unplaced) == ("a.json#0", False)


def test_without_marks_pictures_stand_in_front_and_text_alone_is_a_record(tmp_path: Path) -> None:
    [name] = pictures(tmp_path, 1)
    rows = [
        {"image": name, "conversations": said("What?", "That.")},
        {"conversations": said("How do I write ä?", "With <image> in HTML.")},
    ]
    first, second = open_source(write(tmp_path / "a.jsonl", rows))
    assert flat(first)[0] == ("user", ["Image", "What?"]) and first.unplaced
    assert flat(second)[1] == ("assistant", ["With <image> in HTML."])
    assert not second.unplaced and not second.visuals


def test_sharegpt_with_roles_and_content(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write(tmp_path / "a.jsonl", [{"conversations": turns, "model": "x"}])
    record = open_source(path, "sharegpt")[0]
    assert flat(record) == [("user", ["Hi"]), ("assistant", ["Ho"])]
    assert record.unread == {"model"}


def test_openai_messages(tmp_path: Path) -> None:
    [name] = pictures(tmp_path, 1)
    url = "data:image/png;base64," + base64.b64encode(picture(3)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": name}},
        {"type": "image", "image": name},
        {"type": "text", "text": "What is <image>?"},
    ]
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": "A word."}]},
            ]
        },
        {  # as TRL and LLaMA-Factory write it
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "So?"}]},
                {"role": "assistant", "content": "So."},
            ],
            "images": [name],
        },
    ]
    first, second = open_source(write(tmp_path / "a.jsonl", rows), "openai")
    assert flat(first)[1] == ("user", ["Image", "Image", "Image", "What is <image>?"])
    assert [type(v.source) for v in first.visuals[:1]] == [bytes]
    assert load_image(first.visuals[0].source).size == (40, 20)  # type: ignore[arg-type]
    assert flat(second)[0] == ("user", ["Image", "So?"])


def test_question_and_answer_and_videos(tmp_path: Path) -> None:
    [name] = pictures(tmp_path / "in", 1)
    (tmp_path / "clip.mp4").write_bytes(b"film")
    rows = [
        {"image": f"in/{name}", "question": "What?", "answer": "That."},
        {"images": [f"in/{name}"] * 2, "question": "<image> and <image>?", "truth": "Both."},
        {"video": "clip.mp4", "question": "<image>\nWhat happens?", "answer": "It moves."},
        {"videos": ["clip.mp4"], "question": "See <video>", "answer": "Yes."},
        {"file_name": f"in/{name}", "text": "一片灰色。"},
    ]
    path = write(tmp_path / "labels.jsonl", rows)
    source = open_source(tmp_path)
    assert [flat(r)[0][1] for r in source] == [
        ["Image", "What?"],
        ["Image", "and", "Image", "?"],
        ["Video", "What happens?"],
        ["See", "Video"],
        ["Image", "描述这张图片。"],
    ]
    asked = open_source(path, options=Options(question="Title?"))
    assert flat(asked[4])[0][1] == ["Image", "Title?"]


def test_folder_with_texts_beside_the_pictures(tmp_path: Path) -> None:
    pictures(tmp_path / "a", 2)
    (tmp_path / "a/000.txt").write_bytes(b"\xef\xbb\xbfA grey field.\r\n")
    (tmp_path / "a/001.json").write_text('{"question": "Sky?", "answer": "No."}')
    (tmp_path / "README.txt").write_text("not a record")
    first, second = open_source(tmp_path)
    assert flat(first) == [
        ("user", ["Image", "Describe this picture."]),
        ("assistant", ["A grey field."]),
    ]
    assert (first.id, first.where) == ("a/000", str(tmp_path / "a/000.txt"))
    assert flat(second)[0][1] == ["Image", "Sky?"]
    (tmp_path / "a/lost.txt").write_text("no picture")
    (tmp_path / "a/000.txt").unlink()
    assert reason(tmp_path, 0) == "no text a/000.txt beside it"
    assert reason(tmp_path, 2) == "no picture a/lost.* beside it"


def test_sft_folders(tmp_path: Path) -> None:
    root = sft(tmp_path / "set")
    every = open_source(root)
    assert (len(every), every.kind) == (12, "sft")
    assert len({r.id for r in every}) == 12
    zh = open_source(root / "single/labels_zh", "sft")
    assert flat(zh[0]) == [
        ("user", ["Image", "这是什么？"]),
        ("assistant", ["一片灰色的田野。"]),
    ]
    assert flat(open_source(root / "details")[0])[0][1] == ["Image", "Describe this picture."]
    # One language of all folders by a pattern; a picture is held out in both or in neither.
    pattern = open_source(f"{root}/*/labels_zh")
    assert [r.id.split("/")[1] for r in pattern] == ["labels_zh"] * 6
    assert zh.key(1) == open_source(root / "single/labels_en").key(1) == "single/001"
    (root / "single/images/001.jpg").unlink()
    assert "no pictures 001.*" in reason(root / "single/labels_en", 1)


def test_webdataset_shards(tmp_path: Path) -> None:
    record = {"conversations": said("<image>\n<image>\nSame?", "No.")}
    tar(
        tmp_path / "00.tar",
        {
            "s/000.jpg": picture(0, format="JPEG"),
            "s/000.txt": b"Grey.",
            "s/001.0.png": picture(1),
            "s/001.1.png": picture(2),
            "s/001.json": json.dumps(record).encode(),
        },
    )
    named = {"image": "002.png", "question": "What?", "answer": "It."}
    tar(tmp_path / "01.tar", {"002.png": picture(2), "002.json": json.dumps(named).encode()})
    source = open_source(tmp_path)
    assert [r.id for r in source] == ["s/000", "s/001", "002"]
    assert flat(source[1])[0][1] == ["Image", "Image", "Same?"]
    assert source[0].where == f"{tmp_path}/00.tar: member s/000"
    data = pickle.loads(pickle.dumps(source))[2].visuals[0].source
    assert isinstance(data, FileSlice) and data.read() == picture(2)
    assert load_image(data).size == (40, 20)
    assert len(open_source(f"{tmp_path}/*.tar", "webdataset")) == 3


def test_members_of_an_archive_cannot_name_files_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    value = {"image": str(tmp_path / "secret.png"), "question": "What?", "answer": "It."}
    path = tar(tmp_path / "a.tar", {"0.png": picture(), "0.json": json.dumps(value).encode()})
    assert "not in the record's group" in reason(path, allow_outside=True)


def test_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "id": ["x", "y"],
        "images": [[{"bytes": picture(0), "path": None}], []],
        "texts": [[{"user": "What?", "assistant": "That.", "source": "s"}]] * 2,
    }
    table = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {
                "id": datasets.Value("string"),
                "images": datasets.Sequence(datasets.Image()),
                "texts": [{k: datasets.Value("string") for k in ("user", "assistant", "source")}],
            }
        ),
    )
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        source = open_source(path, "datasets")
        assert [(r.id, len(r.visuals)) for r in source] == [("x", 1), ("y", 0)]
        assert flat(source[0])[0] == ("user", ["Image", "What?"])
        assert load_image(source[0].visuals[0].source).size == (40, 20)  # type: ignore[arg-type]
        assert (source.key(1), source.where(1)) == ("y", f"{path}: row 1")
        assert pickle.loads(pickle.dumps(source))[0].id == "x"
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(InputError, match="give one of train"):
        open_source(tmp_path / "splits")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"rows\.parquet: cannot be read"):
        open_source(tmp_path / "rows.parquet")


# --- damage ------------------------------------------------------------------------------------


def test_a_damaged_list_gives_what_is_whole_and_names_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", llava(tmp_path, 5), indent=1)
    whole = path.read_text()
    lines = whole.splitlines()
    begins = [n for n, line in enumerate(lines, 1) if line == " {"]
    third = f"{path}:{begins[2]}"
    others = ["r0", "r1", "r3", "r4"]
    end = '"It is 2"\n   }\n  ]\n }'

    def spoil(old: str, new: str) -> tuple[list[str], list[str], list[str]]:
        assert whole.count(old) == 1
        path.write_text(whole.replace(old, new))
        return outcomes(path)

    assert spoil('"It is 2"', '"It is 2') == (others, [third], [])  # no quotation mark
    assert spoil(end, end[:-1]) == (others, [], [third])  # no brace
    assert spoil(end, end.replace("]", "")) == (others, [], [third])  # no bracket
    good, bad, problems = spoil(end, end + "}")  # one brace too many
    assert (good, bad, len(problems)) == (["r0", "r1", "r2", "r3", "r4"], [], 1)
    assert spoil(end + ",", end)[2] == [f"{path}:{begins[3]}"]  # no comma
    assert spoil('"id": "r0"', '"id": r0')[1] == [f"{path}:{begins[0]}"]
    path.write_text(whole[: whole.index("It is 4")])
    assert outcomes(path) == (["r0", "r1", "r2", "r3"], [], [f"{path}:{begins[4]}"])
    path.write_text(whole[:-1])
    assert len(outcomes(path)[0]) == 5 and len(outcomes(path)[2]) == 1
    path.write_text(whole + "{}")
    assert len(outcomes(path)[0]) == 5 and outcomes(path)[2]
    path.write_text("[null, 3]")
    assert outcomes(path) == ([], [], [f"{path}:1"])


def test_damaged_lines(tmp_path: Path) -> None:
    rows = [json.dumps(row, ensure_ascii=False) for row in llava(tmp_path, 3)]
    path = tmp_path / "a.jsonl"
    text = [rows[0], rows[1][:40], "", "[1]", rows[2].replace("What", "Wäs"), '{"id": "cut", "con']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(text).encode("utf-8"))
    good, bad, problems = outcomes(path)
    assert (good, bad) == (["r0", "r2"], [f"{path}:2", f"{path}:4", f"{path}:6"])
    assert not problems
    assert "line 2, column" in reason(path, 1)
    path.write_bytes("\n".join(text).encode("latin-1"))
    assert reason(path, 3) == "not UTF-8 (byte 0xe4 in line 5); save it as UTF-8"
    path.write_text("{" * 100_000)
    assert "not JSON" in reason(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty; it was perhaps"),
        (b"\xef\xbb\xbf \n", "empty; it was perhaps"),
        ('[{"id": 1}]'.encode("utf-16"), "UTF-16"),
        (b'{\n "data": []\n}', "one object over several lines"),
    ],
)
def test_files_that_are_no_list_of_records(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_source(path)


def test_damaged_archives(tmp_path: Path) -> None:
    members = {}
    for i in range(3):
        members |= {f"{i}.png": picture(i, (400, 300)), f"{i}.txt": b"Grey."}
    path = tar(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    header = whole.index(b"2.png")
    for cut in (header, header + 300):  # between two members, and inside a header
        path.write_bytes(whole[:cut])
        good, bad, problems = outcomes(path)
        assert (good, bad, problems) == (["0", "1"], [], [str(path)]), cut
    path.write_bytes(whole[: header + 700])  # inside a picture
    assert outcomes(path) == (["0", "1"], [f"{path}: member 2"], [str(path)])
    assert "member '2.png' is cut off" in reason(path, 2)
    path.write_bytes(whole[:header] + b"\x01" * 600)
    assert outcomes(path)[2] == [str(path)]
    path.write_bytes(b"no archive at all" * 100)
    with pytest.raises(InputError, match="not a tar file"):
        open_source(path)
    tar(path, {"0.png": picture(), "1.txt": b"x", "2.png": picture(), "2.txt": b"\xff\xfe"})
    assert [reason(path, i)[:14] for i in range(3)] == [
        "no text 0.txt ",
        "a caption but ",
        "text is not UT",
    ]
    with pytest.raises(InputError, match="compressed"):
        (tmp_path / "a.tar.gz").write_bytes(b"")
        open_source(tmp_path / "a.tar.gz")


def test_pictures_stay_inside_their_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    [name] = pictures(home / "set", 1)
    [outer] = pictures(home / "other", 1)
    (home / "set/link.png").symlink_to(home / "other" / outer)
    (home / "set/inner.png").symlink_to(home / "set" / name)
    (home / "set/loop.png").symlink_to(home / "set/loop.png")

    def named(image: Any) -> Path:
        row = {"image": image, "question": "What?", "answer": "It."}
        return write(home / "set/a.jsonl", [row])

    outside = ["../other/000.png", str(home / "other/000.png"), "link.png", "../../../etc/passwd"]
    outside += [(home / "other/000.png").as_uri(), "/dev/null"]
    for image in outside:
        assert "is outside of" in reason(named(image)), image
    for image in outside[:3]:
        assert reason_or_none(named(image), allow_outside=True) is None
    assert reason_or_none(named("../other/000.png"), images=home / "set/..") is not None
    assert reason_or_none(named("other/000.png"), images=home) is None
    for image in ("inner.png", str(home / "set/000.png"), "./000.png"):
        assert reason_or_none(named(image)) is None, image
    assert "does not exist" in reason(named("absent.png"))
    assert "is not a file" in reason(named("."))
    for image in ("loop.png", "a\0b.png", "x" * 5000):
        assert reason(named(image))
    assert "is a URL" in reason(named("https://example.com/a.png"))
    assert "not valid base64" in reason(named("data:image/png;base64,!!"))
    for image in (7, "", {"bytes": b"".decode(), "path": None}, [["000.png"]]):
        assert "give a path" in reason(named(image)), image


def reason_or_none(path: Path, **options: Any) -> str | None:
    """Why a record is refused, if it is."""
    try:
        open_source(path, options=Options(**options))[0]
    except RecordError as error:
        return error.reason
    return None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": said("<image>\nA?", "B.")}, "1 <image> in the text for 0"),
        ({"image": "000.png", "conversations": said("<image><image>", "B.")}, "2 <image>.* for 1"),
        ({"images": ["000.png"] * 2, "conversations": said("<image>?", "B.")}, "1 <image>.* for 2"),
        ({"conversations": said("A?", " \n")}, "answer 1 is empty"),
        ({"conversations": said("A?", "B", "", "C")}, "question 2 is empty"),
        ({"conversations": said("A?")}, "for training it must be the assistant's"),
        ({"conversations": said("A?", "B.")[::-1]}, "message 1 has the role 'assistant'"),
        ({"conversations": []}, "no user message"),
        ({"conversations": {}}, "is a dict; give a list"),
        ({"conversations": ["A?"]}, "turn 1 is a str"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown role 'tool'"),
        ({"conversations": [{"from": "human"}]}, "has a 'from' but no 'value'"),
        ({"conversations": [{"who": "human"}]}, "neither 'from' nor 'role'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "the content is a int"),
        ({"conversation": said("A?", "B.")}, "'conversation' is near 'conversations'"),
        ({"imgae": "000.png", "question": "A?", "answer": "B"}, "did you mean 'image'"),
        ({"img": "000.png", "question": "A?", "answer": "B"}, "did you mean 'image'"),
        ({"question": "A?", "anwser": "B"}, "did you mean 'answer'"),
        ({"question": "A?"}, "no 'answer'"),
        ({"answer": "A?"}, "no 'question'"),
        ({"question": "A?", "answer": "B", "truth": "B"}, "both 'answer' and 'truth'"),
        ({"question": ["A?"], "answer": "B"}, "'question' is a list"),
        ({"id": True, "question": "A?", "answer": "B"}, "'id' is True"),
        ({"text": "a text of nothing"}, "a caption but no picture"),
        ({"captions": [], "image": "000.png"}, "the first caption has no 'content'"),
        ({"texts": [{"user": "A?"}]}, "no 'user' and 'assistant'"),
        ({}, "found nothing"),
        ({"question": "\ud800", "answer": "B"}, "half of a surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "part type 'audio'"),
        (
            {"conversations": [{"from": "gpt", "value": [{"type": "image", "image": "000.png"}]}]},
            "only users send images",
        ),
    ],
)
def test_records_that_cannot_be_trained_on(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    pictures(tmp_path, 1)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(RecordError, match=message) as caught:
        open_source(path)[0]
    assert str(caught.value).startswith(f"{path}:1: ")
    assert pickle.loads(pickle.dumps(caught.value)).where == caught.value.where


def test_paths_that_hold_no_records(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent", "no such file"),
        (tmp_path / "*.tar", "nothing has such a name"),
        (tmp_path, "no records; known are"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(path)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"\.csv is not known"):
        open_source(tmp_path / "a.csv")
    write(tmp_path / "a.json", [])
    write(tmp_path / "b.json", [])
    with pytest.raises(InputError, match=r"give one of a\.json, b\.json"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="not a source of format 'webdataset'"):
        open_source(tmp_path / "a.json", "webdataset")
    with pytest.raises(ConfigError, match="format 'llama' is not known"):
        open_source(tmp_path / "a.json", "llama")


def test_a_slice_of_a_file_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    part = FileSlice(path, 2, 5, "a[2:7]")
    assert (part.read(), part.read(), part.tell()) == (b"23456", b"", 5)
    assert (part.seek(-2, os.SEEK_END), part.read(1), part.read(9)) == (3, b"5", b"6")
    with pytest.raises(ValueError, match="seek to -1"):
        part.seek(-1)


def test_reading_data_brings_no_torch_and_no_datasets() -> None:
    code = (
        "import sys, cogvlm.data.sft, cogvlm.data.sft.check, cogvlm.cli.data; "
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or None)"
    )
    root = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"]
    )
    assert done.returncode == 0


def test_values_of_messages_are_those_of_the_processor(tmp_path: Path) -> None:
    record = open_source(write(tmp_path / "a.json", llava(tmp_path)))[0]
    assert isinstance(record.visuals[0], Image) and not isinstance(record.visuals[0], Video)
