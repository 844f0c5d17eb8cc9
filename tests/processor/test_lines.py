"""Pictures cut into their lines: drawn print, tilted, on rules, in columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cogvlm.data.sft.check import measure_with
from cogvlm.data.sft.record import Record
from cogvlm.errors import ConfigError, ImageError
from cogvlm.processor import Processor, assistant, user
from cogvlm.processor.encode import Strips
from cogvlm.processor.image import pixels_from_dict
from cogvlm.processor.ink import Runs, frames_of, ink_of, without_figures, without_rules
from cogvlm.processor.lines import LinePixels, find_lines, guessed, print_of, slant
from cogvlm.processor.template import TEMPLATES
from cogvlm.score import boxes, iou
from train.bars import Bytes

PLAN = LinePixels(14, (4, 1), 4, 64)
FONT = ImageFont.load_default(28)


def drawn(*texts: tuple[int, int, str], size: tuple[int, int] = (640, 320)) -> Image.Image:
    image = Image.new("RGB", size, (235, 230, 220))
    draw = ImageDraw.Draw(image)
    for x, y, text in texts:
        draw.text((x, y), text, fill=(40, 30, 60), font=FONT)
    return image


def spoken(plan: LinePixels, image: Image.Image) -> str:
    """What stands between the pieces, a piece as its place from the left in hundreds of pixels."""
    pieces = plan.cut(image).pieces
    return "".join(f"{round(p.box[0] / 100)}{p.behind}" for p in pieces)


def test_lines_gaps_and_long_lines_are_told_apart() -> None:
    image = drawn(
        (20, 20, "Milk"), (500, 20, "1.20"), (20, 90, "Bread"), (500, 90, "2.40"),
        (20, 160, "A line that is far too long to be a single strip"),
    )  # fmt: skip
    said = spoken(PLAN, image)
    assert said.startswith("0\t5\n0\t5\n0 ") and said.count("\n") == 3
    long = [p.box for p in PLAN.cut(image).pieces[4:]]
    assert len(long) > 1 and all(b[2] - b[0] <= PLAN.longest * (b[3] - b[1]) for b in long)


def test_all_ink_is_in_some_piece() -> None:
    image = drawn((20, 20, "gypsy Quay, jog"), (40, 100, "over one summer"))
    ink = ink_of(image)
    for x0, y0, x1, y1 in (p.box for p in PLAN.cut(image).pieces):
        ink[y0:y1, x0:x1] = False
    assert not ink.any()


def test_a_line_cut_out_of_its_page_stays_whole() -> None:
    image = drawn((6, 4, "one line alone"), size=(220, 44))
    (piece,) = PLAN.cut(image).pieces
    assert piece.box == (0, 0, 220, 44) and piece.behind == ""
    image = drawn((6, 4, "a line as long as a strip can be, whole"), size=(520, 40))
    (piece,) = PLAN.cut(image).pieces
    assert piece.box == (0, 0, 520, 40)


def test_dots_far_above_belong_to_their_line() -> None:
    ink = np.zeros((68, 79), np.bool_)
    ink[28:50, 10:50] = np.arange(40) % 4 == 0  # strokes of letters
    ink[16:21, 20:23] = True  # the dot of a slanted i
    assert find_lines(ink) == [[(10, 16, 47, 50)]]


def test_an_arrow_does_not_join_two_boxes() -> None:
    ink = np.zeros((200, 80), np.bool_)
    for top in (20, 120):
        ink[top : top + 60, 10:70] = np.arange(60) % 4 == 0
    ink[81:119, 40:42] = True
    assert [(y0, y1) for ((_, y0, _, y1),) in find_lines(ink) if y1 - y0 > 50] == [
        (20, 80),
        (120, 180),
    ]


@pytest.mark.parametrize("value", [0, 255])
def test_a_picture_without_print_stays_whole(value: int) -> None:
    image = Image.new("RGB", (120, 90), (value,) * 3)
    (piece,) = PLAN.cut(image).pieces
    assert piece.box == (0, 0, 120, 90)
    (piece,) = PLAN.cut(Image.new("RGB", (1, 1))).pieces
    assert piece.box == (0, 0, 1, 1)


def test_noise_gives_at_most_so_many_pieces() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 300, 3)).astype(np.uint8)
    pieces = LinePixels(14, (4, 1), 4, 64, max_strips=5).cut(Image.fromarray(noise)).pieces
    assert 1 <= len(pieces) <= 5


@pytest.mark.parametrize("angle", [-4.0, -1.0, 2.5])
def test_tilted_lines_are_straightened(angle: float) -> None:
    rows = [(60, 60 + 50 * i, "Straight lines of print, all") for i in range(4)]
    image = drawn(*rows).rotate(-angle, fillcolor=(235, 230, 220))
    assert slant(without_rules(ink_of(image))) == pytest.approx(angle, abs=0.31)
    straight = PLAN.cut(image)
    assert straight.angle == pytest.approx(angle, abs=0.31)
    assert sum(p.behind == "\n" for p in straight.pieces) == 4


def inked(image: Image.Image, part: tuple[int, int, int, int]) -> tuple[float, ...]:
    """The box of the ink in a part of a picture, in thousandths."""
    ys, xs = np.nonzero(np.asarray(image.convert("L").crop(part)) < 120)
    x, y = (xs.min() + part[0], xs.max() + part[0]), (ys.min() + part[1], ys.max() + part[1])
    width, height = image.size
    return (1000 * x[0] / width, 1000 * y[0] / height, 1000 * x[1] / width, 1000 * y[1] / height)


@pytest.mark.parametrize("angle", [0.0, 4.0])
def test_the_place_of_a_strip_stands_behind_it(angle: float) -> None:
    rows = [(60, 60 + 50 * i, f"Line {i} of print, all") for i in range(4)]
    image = drawn(*rows)
    part = 40, image.height // 2, image.width, image.height  # the two lower lines
    turned = image.rotate(angle, fillcolor=(235, 230, 220))
    plan = replace(PLAN, places=True)
    pieces = plan.cut(turned).pieces
    assert [p.behind for p in pieces] == ["\n"] * 4
    places = [boxes(p.place)[0] for p in pieces]
    # Each is where its own ink is, to a pixel or two: seen in the picture as it was given.
    x0, y0, x1, y1 = (1000 * v for v in places[3])
    left, _, right, bottom = inked(turned, part)
    assert x0 - 6 < left < x0 + 30 and x1 - 30 < right < x1 + 6
    assert y1 - 60 < bottom < y1 + 9 and y0 < bottom
    plain = PLAN.cut(turned).pieces
    assert [p.box for p in plain] == [p.box for p in pieces]
    one = drawn((10, 10, "one line")).crop((0, 0, 200, 50))
    assert plan.cut(one).pieces[0].behind == ""


def test_the_place_of_a_button_is_its_frame() -> None:
    rows = (60, 60, "Save"), (300, 60, "Cancel"), (60, 180, "Plain"), (60, 300, "One")
    image = drawn(*rows, size=(640, 440))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((40, 46, 200, 104), 9, outline=(60, 60, 60))
    dark = image.crop((280, 46, 480, 104))
    image.paste(ImageOps.invert(dark), (280, 46))  # filled
    draw.rectangle((30, 280, 500, 400), outline=(60, 60, 60))  # about two lines: no button
    draw.text((60, 350), "Two", fill=(20, 20, 20), font=ImageFont.load_default(28))
    pieces = replace(PLAN, places=True).cut(image).pieces
    found = [boxes(p.place)[0] for p in pieces]
    size = image.width, image.height
    for box, (x0, y0, x1, y1) in zip(
        found, ((40, 46, 200, 104), (280, 46, 480, 104)), strict=False
    ):
        truth = x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1]
        assert iou(box, truth) > 0.9
    assert len(found) == 5 and all((b[3] - b[1]) * size[1] < 45 for b in found[2:])


@pytest.mark.parametrize("gap", [-1, 0, 1])
def test_buttons_that_touch_have_a_frame_each(gap: int) -> None:
    image = drawn((52, 20, "Back"), (180, 20, "Next"))
    draw = ImageDraw.Draw(image)
    truth = [(30, 14, 150, 60), (150 + gap, 14, 270, 60)]
    for box in truth:
        draw.rectangle(box, outline=(90, 90, 90))
    draw.rectangle((30, 100, 400, 150), outline=(90, 90, 90))
    draw.line((200, 107, 200, 143), fill=(0, 0, 0))  # a text cursor in a field
    frames = frames_of(image)
    for box in truth:
        assert max(iou(box, frame) for frame in frames) > 0.9
    assert not [f for f in frames if f[1] > 80 and f[2] - f[0] < 300]
    placed = replace(PLAN, places=True).cut(image).pieces
    first, second = (boxes(piece.place)[0] for piece in placed[:2])
    assert first[2] * 640 < 160 and second[0] * 640 > 140


def test_rules_and_frames_are_no_lines() -> None:
    image = drawn((30, 24, "Name"), (30, 124, "Place"))
    draw = ImageDraw.Draw(image)
    draw.line((10, 80, 630, 80), fill=(0, 0, 0), width=2)
    draw.rectangle((300, 20, 600, 60), outline=(90, 90, 90))
    lines = find_lines(without_rules(ink_of(image)))
    assert [len(line) for line in lines] == [1, 1]


def test_large_pictures_are_made_smaller_first() -> None:
    straight = PLAN.cut(Image.new("RGB", (4096, 30)))
    assert straight.image.size == (2048, 15) and straight.scale == 0.5


def test_a_page_is_encoded_line_by_line() -> None:
    page = drawn((20, 20, "Milk"), (500, 20, "1.20"), (20, 90, "Thank you"))
    processor = Processor(Bytes(), TEMPLATES["chatml"], PLAN, 3)
    messages = (user(page, "All?"), assistant("Milk"))
    encoded = processor.encode(messages, train=True)
    types = encoded.token_type_ids
    edges = np.flatnonzero(np.diff(types, prepend=0, append=0))
    blocks = list(zip(edges[::2], edges[1::2], strict=True))
    sizes = [PLAN.tokens(*(side // 14 for side in p.shape[1:])) for p in encoded.pixel_values]
    assert [b - a for a, b in blocks] == sizes and len(blocks) == 3
    behind = [encoded.input_ids[b] for _, b in blocks]
    assert behind == [ord("\t"), ord("\n"), ord("\n")]
    length = measure_with(processor)(Record(messages, "a", "b", "c"), [page.size])
    assert (length.all, length.visual) == (len(types), int((types == 1).sum()))


def test_the_plan_of_a_file() -> None:
    values = {"kind": "lines", "merge": [4, 1], "max_cols": 64, "longest": 8}
    plan = pixels_from_dict(values, "here", {"lines": LinePixels})
    assert plan == LinePixels(14, (4, 1), 4, 64, longest=8)
    with pytest.raises(ConfigError, match="kind 'lines' is not known"):
        pixels_from_dict(values, "here")
    with pytest.raises(ConfigError, match="max_strips is 0"):
        LinePixels(max_strips=0)
    with pytest.raises(ConfigError, match="places is 1; give true or false"):
        pixels_from_dict({"kind": "lines", "places": 1}, "here", {"lines": LinePixels})


def test_pieces_are_read_and_only_the_first_are_shown() -> None:
    image = drawn((20, 20, "Milk"), (500, 20, "1.20"), (20, 90, "Bread"), (500, 90, "2.40"))
    asked: list[int] = []

    def reader(strips: Strips) -> list[str]:
        asked.append(len(strips))
        return ["Milk", "", "Bread", "2.40"][: len(strips)]

    plan = replace(PLAN, shown=2, places=True)
    processor = Processor(Bytes(), TEMPLATES["chatml"], plan, 3, reader=reader)
    made = processor.encode([user(image, "Where?")])
    assert asked == [4] and len(made.pixel_values) == 2
    text = processor.decode(made.input_ids)
    milk, bread, price = (p.place for i, p in enumerate(plan.cut(image).pieces) if i != 1)
    # The second has no text, so it has no place either.
    assert f"Milk{milk}\t\nBread{bread}\t2.40{price}\nWhere?" in text and milk.startswith("[[")
    # No place is told where none is asked for, in no turn.
    turns = [user(image, "How much?"), assistant("1.20"), user("And all?")]
    text = processor.decode(processor.encode(turns).input_ids)
    assert "Milk\t\nBread\t2.40\nHow much?" in text
    turns[2] = user("Find it.")
    assert f"Milk{milk}\t\nBread" in processor.decode(processor.encode(turns).input_ids)
    starts = np.flatnonzero(np.diff(made.token_type_ids) == 1)
    assert len(starts) == 2  # image blocks
    with pytest.raises(ConfigError, match=r"cogvlm\.open_model"):
        replace(processor, reader=None).encode([user(image, "How much?")])


def test_a_picture_is_written_out_as_it_is_read(tmp_path: Path) -> None:
    image = drawn((20, 20, "Milk"), (500, 20, "1.20"), (20, 90, "Bread"), (20, 160, "-o-o-"))
    plan = replace(PLAN, shown=1, places=True)
    read = ["Milk", "1.20", "Bread", ""]
    processor = Processor(Bytes(), TEMPLATES["chatml"], plan, 3, reader=lambda _: read)
    assert processor.transcribe(image) == "Milk\t1.20\nBread"
    with pytest.raises(ConfigError, match="no head that reads"):
        replace(processor, pixels=PLAN).transcribe(image)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"a\.png"):
        processor.transcribe(tmp_path / "a.png")


def test_a_line_alone_is_read_too() -> None:
    image = drawn((6, 4, "one line alone"), size=(220, 44))
    plan = replace(PLAN, shown=1)
    processor = Processor(Bytes(), TEMPLATES["chatml"], plan, 3, reader=lambda _: ["one"])
    made = processor.encode([user(image, "What?")])
    assert "one\nWhat?" in processor.decode(made.input_ids) and len(made.pixel_values) == 1


def test_tokens_are_counted_without_a_head() -> None:
    widths = [28, 112, 560]
    texts = guessed([np.zeros((3, 56, width), np.float32) for width in widths])
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    assert texts[0] == "" and len(texts[2]) > 20


def test_what_is_drawn_is_no_print() -> None:
    image = drawn((200, 60, "20 %"), (200, 220, "80 %"), (480, 140, "Slices"))
    draw = ImageDraw.Draw(image)
    draw.ellipse((100, 20, 380, 300), outline=(0, 0, 0), width=2)
    draw.line((100, 160, 240, 160, 330, 60), fill=(0, 0, 0), width=2)
    boxes = [p.box for p in PLAN.cut(image).pieces]
    places = (200, 60), (480, 140), (200, 220)
    for (x0, y0, x1, y1), (x, y) in zip(boxes, places, strict=True):
        assert x - 20 < x0 < x and y - 12 < y0 < y + 12 and x1 < x + 110 and y1 < y + 48


@pytest.mark.parametrize("radius", [0, 14])
def test_boxes_with_arrows_are_left_out(radius: int) -> None:
    image = Image.new("RGB", (300, 330), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for y, text in ((10, "Start"), (130, "Check"), (250, "Stop")):
        draw.rounded_rectangle((60, y, 240, y + 60), radius, outline=(90, 90, 90), width=2)
        draw.text((110, y + 10), text, fill=(0, 0, 0), font=FONT)
    for y in (70, 190):
        draw.line((150, y, 150, y + 60), fill=(90, 90, 90), width=2)
    boxes = [p.box for p in PLAN.cut(image).pieces]
    assert len(boxes) == 3 and all(x0 > 90 and x1 < 210 for x0, _, x1, _ in boxes)


def test_labels_out_of_step_are_lines_of_their_own() -> None:
    image = drawn((10, 30, "50"), (300, 44, "Kyoto"), (10, 90, "40"), (150, 75, "Bergen"))
    said = [[b[0] // 10 for b in line] for line in find_lines(print_of(image))]
    assert said == [[1], [30], [15], [1]]
    assert find_lines(np.zeros((20, 20), bool)) == []


def test_shapes_that_touch_by_a_corner_are_one() -> None:
    ink = np.zeros((8, 20), bool)
    ink[0, 0:3] = ink[1, 3:5] = ink[2, 1:3] = True  # a step down to the right, and back below
    ink[5, 10:12] = True
    runs = Runs.of(ink)
    assert runs.shape.tolist() == [0, 0, 0, 1]
    shapes = runs.shapes()
    assert (shapes.x0.tolist(), shapes.x1.tolist()) == ([0, 10], [5, 12])
    assert (shapes.y0.tolist(), shapes.y1.tolist(), shapes.ink.tolist()) == ([0, 5], [3, 6], [7, 2])
    full = np.ones((3, 4), bool)
    assert Runs.of(full).shape.tolist() == [0, 0, 0]
    assert without_figures(np.zeros((3, 4), bool)).sum() == 0
