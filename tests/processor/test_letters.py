"""Letters in photographs: found where the ground has edges everywhere, and only letters."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cogvlm.processor.ink import ink_of, letter_height, without_figures, without_rules
from cogvlm.processor.letters import beside, is_photograph, letters_of
from cogvlm.processor.lines import LinePixels, print_of
from cogvlm.score import iou

PLAN = LinePixels(14, (4, 1), 4, 64)
FONT = ImageFont.load_default(56)
WORDS = ((120, 110, "NO ENTRY"), (120, 230, "AT NIGHT"))


def leaves(size: tuple[int, int] = (640, 420), seed: int = 0) -> Image.Image:
    """Ground with edges everywhere, in all sizes."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    fine = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.2))
    small = Image.fromarray(noise[::16, ::16]).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(fine, small, 0.7)


def sign(dark: bool) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """A board among leaves, and where its two lines are."""
    image = leaves()
    draw = ImageDraw.Draw(image)
    board, print_ = ((225, 220, 90), (30, 30, 60)) if dark else ((20, 60, 110), (240, 240, 240))
    draw.rectangle((80, 90, 500, 310), fill=board)
    boxes = []
    for x, y, text in WORDS:
        draw.text((x, y), text, fill=print_, font=FONT)
        boxes.append(tuple(int(v) for v in draw.textbbox((x, y), text, font=FONT)))
    return image, boxes  # type: ignore[return-value]


@pytest.mark.parametrize("dark", [True, False])
def test_the_lines_of_a_sign_are_cut_out_of_what_is_around_it(dark: bool) -> None:
    image, truth = sign(dark)
    assert is_photograph(image)
    ink, height = letters_of(image)
    assert 30 < height < 50
    pieces = PLAN.cut(image).pieces
    assert len(pieces) == 2
    for piece, box in zip(pieces, truth, strict=True):
        assert piece.whole is not None and iou(piece.whole, box) > 0.8
    outside = ink.copy()
    for x0, y0, x1, y1 in truth:
        outside[y0:y1, x0:x1] = False
    assert outside.sum() < 0.02 * ink.sum()


def test_large_photographs_are_searched_in_small() -> None:
    image, truth = sign(True)
    large = image.resize((1920, 1260), Image.Resampling.BICUBIC)
    ink, height = letters_of(large)
    assert ink.shape == (1260, 1920) and 90 < height < 150
    ys, xs = np.nonzero(ink)
    whole = (3 * truth[0][0], 3 * truth[0][1], 3 * truth[0][2], 3 * truth[1][3])
    assert iou((xs.min(), ys.min(), xs.max(), ys.max()), whole) > 0.9


@pytest.mark.parametrize("image", [leaves(), leaves(seed=1), Image.new("RGB", (300, 200), "red")])
def test_where_nothing_is_written_there_are_no_letters(image: Image.Image) -> None:
    assert letters_of(image)[1] == 0.0
    assert not letters_of(image)[0].any()


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (90, 3)])
def test_tiny_pictures_have_no_letters(size: tuple[int, int]) -> None:
    assert letters_of(Image.new("RGB", size))[1] == 0.0
    assert print_of(Image.new("RGB", size)).shape == size[::-1]


def test_pages_are_no_photographs() -> None:
    page = Image.new("RGB", (640, 320), (235, 230, 220))
    draw = ImageDraw.Draw(page)
    for y in range(10, 300, 40):
        draw.text(
            (20, y), "A page of print, full of lines", fill=0, font=ImageFont.load_default(28)
        )
    assert not is_photograph(page)


def shaded(image: Image.Image, seed: int = 0) -> Image.Image:
    """As a camera sees it: darker to the left, and with grain."""
    ramp = np.linspace(0.5, 1, image.width)[None, :, None]
    grain = np.random.default_rng(seed).normal(0, 5, (image.height, image.width, 1))
    return Image.fromarray(np.clip(np.asarray(image) * ramp + grain, 0, 255).astype(np.uint8))


def test_small_print_in_a_photograph_is_left_to_its_edges() -> None:
    """Where nearly all edges are of letters, what is no letter may still be print."""
    image = leaves()
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 20, 620, 400), fill=(200, 200, 190))
    for y in range(30, 380, 30):
        draw.text((40, y), "Small print on a leaflet", fill=20, font=ImageFont.load_default(18))
    image = shaded(image)
    assert is_photograph(image)
    ink = print_of(image)
    letters, height = letters_of(image)
    assert (ink & beside(letters, height)).sum() > 0.9 * ink.sum()
    assert height < 2 * letter_height(ink) and not np.array_equal(ink, letters)
    assert len(PLAN.cut(image).pieces) >= 11


def test_a_sign_no_higher_than_what_is_around_it_is_found() -> None:
    image = Image.fromarray(np.full((300, 520, 3), 150, np.uint8))
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng(1)
    for x, y, wide, high in rng.integers((0, 0, 3, 14), (520, 300, 30, 60), (150, 4)):  # twigs
        draw.line((x, y, x + wide, y + high), fill=tuple(rng.integers(0, 255, 3).tolist()), width=3)
    draw.rectangle((150, 100, 400, 190), fill=(230, 230, 220))
    for y, text in ((110, "Harbour Street"), (148, "Market Place")):
        draw.text((170, y), text, fill=(30, 30, 90), font=ImageFont.load_default(28))
    image = shaded(image)
    assert is_photograph(image)
    ink = without_figures(without_rules(without_figures(ink_of(image))))
    letters, height = letters_of(image)
    assert height < 2 * letter_height(ink)
    assert (ink & beside(letters, height)).sum() < 0.9 * ink.sum()
    assert len(PLAN.cut(image).pieces) == 2


def test_beside_letters_is_as_far_as_their_height_says() -> None:
    letters = np.zeros((40, 60), np.bool_)
    letters[15:25, 20:30] = True
    ys, xs = np.nonzero(beside(letters, 10.0))
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (11, 28, 10, 39)
    assert len(ys) == 18 * 30
    assert not beside(np.zeros_like(letters), 10.0).any()
