"""Pages: every kind is drawn, and boxes lie on their ink also when the page is bent."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from typer.testing import CliRunner

from cogvlm.cli import app
from cogvlm.data.engine import charts, forms, ground, objects, pages, screens
from cogvlm.data.engine.corpus import read_corpus
from cogvlm.data.engine.ink import Canvas, Style, wrap
from cogvlm.data.engine.render import KINDS, Render, choose_kinds
from cogvlm.data.engine.step import Box, Piece, Refused, Reject, Sample, Truth
from cogvlm.data.engine.warp import Warp, degrade, random_warp
from cogvlm.errors import ConfigError, InputError, ResourceError
from data.engine_parts import LATIN, setting


def ink(image: Image.Image) -> npt.NDArray[np.bool_]:
    """Where a picture of dark print on white is dark."""
    return np.asarray(image.convert("L")) < 128


def outside(marks: npt.NDArray[np.bool_], boxes: list[Box], slack: int = 2) -> float:
    """The share of ink that lies in none of the boxes."""
    left = marks.copy()
    for x0, y0, x1, y1 in boxes:
        left[max(0, int(y0) - slack) : int(y1) + slack + 1,
             max(0, int(x0) - slack) : int(x1) + slack + 1] = False  # fmt: skip
    return float(left.sum() / max(1, marks.sum()))


def filled(marks: npt.NDArray[np.bool_], box: Box) -> tuple[float, float]:
    """Which share of a box's width and height its ink takes."""
    x0, y0, x1, y1 = box
    part = marks[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    if not len(rows):
        return 0.0, 0.0
    return float(np.ptp(columns) + 1) / (x1 - x0), float(np.ptp(rows) + 1) / (y1 - y0)


def printed() -> Canvas:
    """Black print on a white page, wide enough to be turned."""
    canvas = Canvas((500, 360), (255, 255, 255))
    style = Style(setting().faces.text[0].path, 16)
    canvas.block(60, 70, 380, 300, " ".join(LATIN[:6]), style)
    return canvas


def test_boxes_are_exactly_the_ink_of_a_page() -> None:
    canvas = printed()
    marks = np.asarray(canvas.image.convert("L")) < 255
    boxes = [w.box for w in canvas.words]
    assert len(boxes) > 40
    left = marks.copy()
    for x0, y0, x1, y1 in boxes:
        left[int(y0) : int(y1), int(x0) : int(x1)] = False
    assert not left.any()  # not one pixel over
    for x0, y0, x1, y1 in boxes:
        part = marks[int(y0) : int(y1), int(x0) : int(x1)]
        assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()


def test_lines_join_their_words() -> None:
    canvas = printed()
    assert " ".join(p.text for p in canvas.lines) == " ".join(p.text for p in canvas.words)
    first = canvas.lines[0]
    inside = [w for w in canvas.words if w.box[1] >= first.box[1] and w.box[3] <= first.box[3]]
    assert first.text.startswith(" ".join(w.text for w in inside)[:20])


@pytest.mark.parametrize("seed", range(8))
def test_boxes_stay_on_their_ink_when_the_page_is_bent(seed: int) -> None:
    canvas = printed()
    warp = random_warp(canvas.image.size, np.random.default_rng(seed))
    if warp is None:
        pytest.skip("this seed bends nothing")
    image = warp.image(canvas.image, (255, 255, 255))
    truth = canvas.truth().moved(warp.box)
    boxes = [w.box for w in truth.words]
    marks = ink(image)
    assert marks.sum() > 2000
    assert outside(marks, boxes) < 0.002
    shares = np.array([filled(marks, w.box) for w in truth.words if len(w.text) > 4])
    # A turned box is a little larger than what is in it; an empty or shifted one would be half.
    assert shares[:, 0].min() > 0.85 and shares[:, 1].min() > 0.6
    assert shares.mean() > 0.85


def test_a_point_goes_there_and_back() -> None:
    rng = np.random.default_rng(5)
    points = rng.uniform(20, 300, (50, 2))
    bent = 0
    for _ in range(6):
        warp = random_warp((400, 320), rng)
        if warp is not None:
            bent += bool(warp.waves)
            np.testing.assert_allclose(warp.source(warp.target(points)), points, atol=0.05)
    assert bent


def test_the_whole_page_stays_in_the_picture() -> None:
    for seed in range(20):
        warp = random_warp((400, 300), np.random.default_rng(seed))
        if warp is not None:
            still = Warp(warp.size, warp.back)  # waves may push a corner over by their depth
            corners = still.target(np.array([[0, 0], [400, 0], [400, 300], [0, 300]], float))
            assert corners.min() > -0.01 and (corners <= np.array([400.01, 300.01])).all()


def test_no_strength_changes_nothing() -> None:
    canvas = printed()
    image, truth = degrade(canvas.image, canvas.truth(), np.random.default_rng(0), 0.0)
    assert image is canvas.image and truth == canvas.truth()


def test_wrapped_rows_fit_and_lose_nothing() -> None:
    style = Style(setting().faces.text[0].path, 14)
    text = " ".join(LATIN[:3]) + " " + "x" * 120
    rows = wrap(text, style, 200)
    assert all(style.width(row) <= 200 for row in rows)
    assert "".join(rows).replace(" ", "") == text.replace(" ", "")
    assert wrap("", style, 200) == []


def test_chinese_breaks_between_signs_and_no_row_begins_with_a_stop() -> None:
    if not setting().faces.han:
        pytest.skip("no Chinese font")
    style = Style(setting().faces.han[0].path, 20)
    rows = wrap("今天我们在公园看书，天气很好。" * 4, style, 100)
    assert len(rows) > 5 and not any(row[0] in "，。" for row in rows)


def available() -> list[str]:
    return [kind for kind, _ in choose_kinds(None)[0] if kind != "screen"]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "screen"])
def test_every_kind_is_made_and_is_a_function_of_seed_and_shard(kind: str) -> None:
    if kind not in available():
        pytest.skip("cannot be made on this machine")
    maker = Render(setting(), ((kind, 1.0),), seed=4)
    made = first(maker, 0, 2)
    for sample in made:
        (picture,) = sample.pictures
        assert sample.kind == kind and sample.licence and sample.source
        assert picture.open().size == picture.size
        width, height = picture.size
        assert max(picture.size) <= 6 * min(picture.size)
        assert width * height <= 1.6 * 320**2
        truth = picture.truth
        assert truth.caption and (truth.words or truth.items)
        for piece in (*truth.words, *truth.lines, *truth.items):
            x0, y0, x1, y1 = piece.box
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, piece
    again = first(Render(setting(), ((kind, 1.0),), seed=4), 0, 2)
    assert again == made
    assert first(maker, 1, 1)[0].pictures[0].data != made[0].pictures[0].data


@pytest.mark.skipif(bool(objects.missing()), reason=objects.missing())
@pytest.mark.parametrize("kind", ["sign", "table"])
def test_pages_stand_before_things_with_their_boxes_on_their_ink(kind: str) -> None:
    plain = Render(setting(strength=0.0), ((kind, 1.0),), seed=4)
    maker = Render(setting(strength=0.0), ((kind, 1.0),), seed=4, among=1.0)
    assert maker.key != plain.key
    made = first(maker, 0, 4)
    assert made == first(maker, 0, 4)
    for sample in made:
        (picture,) = sample.pictures
        assert objects.SOURCE in sample.source and objects.LICENCE in sample.licence
        width, height = picture.size
        assert max(picture.size) <= 6 * min(picture.size)
        assert picture.truth.words
        for piece in (*picture.truth.words, *picture.truth.lines, *picture.truth.items):
            x0, y0, x1, y1 = piece.box
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, piece
    assert objects.SOURCE not in first(plain, 0, 1)[0].source


@pytest.mark.skipif(bool(objects.missing()), reason=objects.missing())
def test_a_page_before_things_is_the_page_at_another_place() -> None:
    canvas = printed()
    image, truth = ground.before_things(canvas.image, canvas.truth(), np.random.default_rng(3))
    old, new = canvas.truth().words[0].box, truth.words[0].box
    x, y = round(new[0] - old[0]), round(new[1] - old[1])
    assert (new[2] - old[2], new[3] - old[3]) == (x, y) != (0, 0)
    part = image.crop((x, y, x + canvas.image.width, y + canvas.image.height))
    assert part.tobytes() == canvas.image.tobytes()
    around = np.asarray(image.convert("L"), float)
    around[y : y + part.height, x : x + part.width] = np.nan
    assert np.nanstd(around) > 15  # things, not one colour


def test_what_has_print_on_it_is_no_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = Path("/stamps/symbols/alphabets/a.png"), Path("/stamps/town/roadsigns/stop.png")
    known = tuple(objects.Thing(path.stem, f"a {path.stem}", path) for path in stamps)
    monkeypatch.setattr(ground, "things", lambda _: known)
    with pytest.raises(Refused, match="no objects"):
        ground.covered((200, 100), np.random.default_rng(0))


def first(maker: Render, shard: int, count: int) -> list[Sample]:
    found: list[Sample] = []
    refused: list[Reject] = []
    for item in maker.items(shard):
        if isinstance(item, Sample):
            found.append(item)
        else:
            refused.append(item)
        assert len(refused) < 60, refused[-1]
        if len(found) == count:
            break
    return found


def test_a_receipt_adds_up() -> None:
    for seed in range(6):
        try:
            canvas = forms.receipt(setting(448), np.random.default_rng(seed))
        except Refused:
            continue
        facts = {(f.name, f.of): f.value for f in canvas.facts}

        def number(text: str) -> int:
            return round(100 * float(text.replace("$", "").replace("EUR", "").replace(",", "")))

        prices = sum(number(v) for (name, _), v in facts.items() if name == "price")
        total = number(facts[("total", "")])
        assert total == prices + number(facts.get(("tax", ""), "0"))
        if ("change", "") in facts:
            assert number(facts[("cash", "")]) - number(facts[("change", "")]) == total
        said = canvas.truth().text
        assert facts[("total", "")] in said and facts[("shop", "")] in said


def test_a_table_is_on_the_page_as_its_truth_has_it() -> None:
    canvas = forms.table(setting(640), np.random.default_rng(3))
    said = [" | ".join(row) for row in canvas.table]
    assert [p.text for p in canvas.lines if p.role == "row"] == said
    assert {f.value for f in canvas.facts if f.of} <= {c for row in canvas.table for c in row}


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_bars_are_as_high_as_their_values() -> None:
    checked = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        try:
            truth = charts.chart(replace(setting(), side=448), rng)[1]
        except Refused:
            continue
        if truth.extra["chart"] != "bar chart" or len(truth.table[0]) != 2:
            continue
        checked += 1
        if checked > 2:
            break
        values = [float(row[1]) for row in truth.table[1:]]
        heights = [p.box[3] - p.box[1] for p in truth.items]
        scale = max(heights) / max(values)
        np.testing.assert_allclose(heights, np.array(values) * scale, atol=2.5)
        said = {f.name: f.value for f in truth.facts}
        top = truth.table[1 + values.index(max(values))][0]
        assert said.get("highest", top) == top
    assert checked


@pytest.mark.skipif(bool(screens.missing()), reason="no Chromium or playwright")
def test_a_web_page_has_the_boxes_of_its_buttons_and_words() -> None:
    maker = Render(setting(400, strength=0.0), (("screen", 1.0),), seed=1)
    made = first(maker, 0, 3)
    assert first(Render(setting(400, strength=0.0), (("screen", 1.0),), seed=1), 0, 3) == made
    for sample in made:
        truth, image = sample.pictures[0].truth, sample.pictures[0].open()
        grey = np.asarray(image.convert("L"), np.int16)
        assert truth.items and truth.words
        for word in truth.words:
            x0, y0, x1, y1 = (int(v) for v in word.box)
            assert np.ptp(grey[y0 : y1 + 1, x0 : x1 + 1]) > 60, word  # something is drawn there
        for item in truth.items:
            if item.role in ("button", "link"):
                inside = [w.text for w in truth.words if within(w, item)]
                assert " ".join(inside) == item.text
    asyncio.run(asyncio.sleep(0))  # the browser's loop does not run in this thread


def within(word: Piece, item: Piece) -> bool:
    a, b = word.box, item.box
    return a[0] >= b[0] - 1 and a[1] >= b[1] - 1 and a[2] <= b[2] + 1 and a[3] <= b[3] + 1


@pytest.mark.skipif(bool(objects.missing()), reason="no drawings on this machine")
def test_held_out_things_are_others() -> None:
    train, held = ({t.name for t in objects.things(side)} for side in (False, True))
    assert train and held and not train & held


def test_texts_of_every_kind_and_every_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(LATIN))
    (tmp_path / "b.jsonl").write_text('{"text": "今天我们在公园看书，天气很好。"}\n' * 3)
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    sides = [read_corpus(files, held_out=held) for held in (False, True)]
    assert set(sides[0].latin) | set(sides[1].latin) == set(LATIN)
    assert not set(sides[0].latin) & set(sides[1].latin)
    assert any("今天我们在公园" in text for side in sides for text in side.han)
    (tmp_path / "c.jsonl").write_text('{"words": "no"}\n')
    (tmp_path / "d.jsonl").write_text("{\n")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "f.doc").write_text("x")
    for name, said in (("c.jsonl", "c.jsonl:1: no text"), ("d.jsonl", "not JSON"),
                       ("e.txt", "not UTF-8"), ("f.doc", ".doc is not known"),
                       ("g.txt", "cannot be read")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            read_corpus([tmp_path / name])


def test_parquet_texts_are_read(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"text": list(LATIN)}), tmp_path / "t.parquet")
    assert set(read_corpus([tmp_path / "t.parquet"]).latin) <= set(LATIN)
    parquet.write_table(arrow.table({"other": [1]}), tmp_path / "u.parquet")
    with pytest.raises(InputError, match="no column"):
        read_corpus([tmp_path / "u.parquet"])


def test_unknown_kinds_and_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'table'"):
        choose_kinds("tabel")
    with pytest.raises(ConfigError, match="weight of 'table' is '-1'"):
        choose_kinds("table=-1")
    with pytest.raises(ConfigError, match="is empty"):
        choose_kinds(",")
    assert choose_kinds("table=3, form")[0] == (("table", 3.0), ("form", KINDS["form"]))
    monkeypatch.setattr(screens, "browser_path", lambda: None)
    with pytest.raises(ResourceError, match="cannot be made here"):
        choose_kinds("screen")
    assert "screen" in choose_kinds(None)[1]


def test_the_command_makes_a_set_that_checks(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(LATIN))
    folder = setting().faces.text[0].path.parent
    out = tmp_path / "out"
    arguments = ["data", "render", str(out), "-n", "6", "--shard-size", "4", "--side", "256"]
    arguments += ["--kinds", "form,diagram,receipt", "--texts", str(text), "--fonts", str(folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "6 samples" in result.output and (out / "contact.html").exists()
    checked = CliRunner().invoke(app, ["data", "check", str(out), "--decode"])
    assert checked.exit_code == 0 and "6 good, 0 bad" in checked.output
    bad = CliRunner().invoke(app, ["data", "render", str(tmp_path / "x"), "--fonts", "/no/such"])
    assert bad.exit_code == 2 and "does not exist" in bad.output


def test_a_page_says_what_is_on_it() -> None:
    canvas = pages.bullets(setting(448), np.random.default_rng(2))
    items = [f for f in canvas.facts if f.name == "item"]
    count = next(f.value for f in canvas.facts if f.name == "number of items")
    assert int(count) == len(items) > 0
    said = canvas.truth().text.replace("\n", " ")
    assert all(f.value.split()[0] in said for f in items)
    assert isinstance(canvas.truth(), Truth)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_every_text_of_a_chart_is_drawn() -> None:
    """Ticks beyond the axis keep a text that nobody sees: it is no truth."""
    checked = 0
    for seed in range(50, 70):
        try:
            image, truth = charts.chart(replace(setting(), side=448), np.random.default_rng(seed))
        except Refused:
            continue
        if truth.extra["chart"] == "pie chart":
            continue
        grey = np.asarray(image.convert("L"), np.int16)
        for label in truth.words:
            x0, y0, x1, y1 = (int(v) for v in label.box)
            assert np.ptp(grey[y0:y1, x0:x1]) > 60, label
        checked += 1
        if checked == 4:
            return
    raise AssertionError("too few charts")
