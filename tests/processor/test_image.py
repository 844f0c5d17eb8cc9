"""Reading pictures of every kind, and the two pixel plans against recorded pixels."""

from __future__ import annotations

import io
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage
from safetensors.numpy import load_file

from cogvlm.errors import ConfigError, ImageError
from cogvlm.processor import (
    ImageLimits,
    NativePixels,
    SquarePixels,
    load_image,
    pixels_from_dict,
)
from cogvlm.processor.image import MEAN, STD

DATA = Path(__file__).parent / "data"
RECORDED = load_file(DATA / "preprocess.safetensors")
PICTURES = ("a_640x480", "b_123x457", "c_1344x1344")


def encoded(image: PILImage.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width: int = 40, height: int = 30) -> PILImage.Image:
    ramp = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) * 7 % 256
    return PILImage.fromarray(ramp.astype(np.uint8))


# --- reading ---


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = gradient()
    path = tmp_path / "a.png"
    image.save(path)
    with path.open("rb") as file:
        file.read()  # read to its end: it is read from the start again
        loaded = [load_image(s) for s in (path, str(path), path.read_bytes(), file, image)]
    for one in loaded:
        assert one.mode == "RGB"
        assert np.array_equal(np.asarray(one), np.asarray(image))
    loaded[-1].paste((0, 0, 0), (0, 0, 40, 30))
    assert np.array_equal(np.asarray(image), np.asarray(gradient()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((2, 3), np.uint8)
    upright[0, 0], upright[1, 2] = 255, 128
    # How each orientation stores an upright picture (EXIF 2.3, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encoded(PILImage.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(np.asarray(load_image(data))[..., 0], upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_ignored() -> None:
    data = encoded(gradient(), "jpeg", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", quality=95)
    assert load_image(data).size == (40, 30)


def corner(image: PILImage.Image) -> tuple[int, ...]:
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return tuple(int(v) for v in value)


def test_transparency_is_laid_on_white() -> None:
    rgba = PILImage.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert corner(load_image(encoded(rgba))) == (255, 255, 255)
    half = PILImage.new("RGBA", (2, 2), (255, 0, 0, 128))
    red, green, blue = corner(load_image(encoded(half)))
    assert (red, green, blue) == (255, 127, 127)
    la = PILImage.new("LA", (2, 2), (0, 0))
    assert corner(load_image(encoded(la))) == (255, 255, 255)
    assert corner(load_image(encoded(PILImage.new("LA", (2, 2), (9, 255))))) == (9, 9, 9)


def test_palettes() -> None:
    palette = PILImage.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert corner(load_image(encoded(palette))) == (10, 20, 30)
    see_through = load_image(encoded(palette, transparency=0))
    assert corner(see_through) == (255, 255, 255)
    assert see_through.getpixel((1, 0)) == (40, 50, 60)
    assert corner(load_image(encoded(palette, "gif", transparency=0))) == (255, 255, 255)
    several = load_image(encoded(palette, transparency=bytes([0, 128])))
    assert corner(several) == (255, 255, 255)
    assert several.getpixel((1, 0)) == (147, 152, 157)


@pytest.mark.parametrize(("mode", "key", "value"), [("L", 7, 7), ("RGB", (7, 8, 9), (7, 8, 9))])
def test_a_transparent_colour_is_white(mode: str, key: object, value: Any) -> None:
    image = PILImage.new(mode, (2, 1), value)
    image.putpixel((1, 0), 1 if mode == "L" else (1, 1, 1))
    loaded = load_image(encoded(image, transparency=key))
    assert corner(loaded) == (255, 255, 255)
    assert loaded.getpixel((1, 0)) == (1, 1, 1)


def test_other_modes() -> None:
    assert corner(load_image(encoded(PILImage.new("1", (2, 2), 1)))) == (255, 255, 255)
    assert corner(load_image(encoded(PILImage.new("L", (2, 2), 77)))) == (77, 77, 77)
    cmyk = PILImage.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.allclose(corner(load_image(encoded(cmyk, "tiff"))), (255, 0, 0), atol=3)
    assert np.allclose(corner(load_image(encoded(cmyk, "jpeg"))), (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 300], [32767, 32768, 65406, 65407, 65535]], np.uint16)
    loaded = np.asarray(load_image(encoded(PILImage.fromarray(values), kind)))
    expected = np.floor(values.astype(np.float64) / 257 + 0.5)
    assert np.array_equal(loaded, np.repeat(expected[..., None], 3, axis=2))


def test_grey_of_16_bits_with_a_transparent_value() -> None:
    values = np.array([[1000, 2570]], np.uint16)
    loaded = load_image(encoded(PILImage.fromarray(values), transparency=1000))
    assert corner(loaded) == (255, 255, 255)
    assert loaded.getpixel((1, 0)) == (10, 10, 10)


@pytest.mark.parametrize(
    ("values", "say"),
    [
        (np.full((2, 2), 70000, np.int32), "outside 0..65535"),
        (np.full((2, 2), -1, np.int32), "outside 0..65535"),
        (np.full((2, 2), 0.5, np.float32), "floating-point grey"),
    ],
)
def test_grey_of_unknown_range_is_refused(values: Any, say: str) -> None:
    with pytest.raises(ImageError, match=say):
        load_image(encoded(PILImage.fromarray(values), "tiff"))


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [PILImage.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert corner(load_image(data)) == (255, 0, 0)


# --- refusing ---


def refused(source: Any, say: str, limits: ImageLimits | None = None) -> None:
    with pytest.raises(ImageError, match=say) as caught:
        load_image(source, limits)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_picture(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello, I am no picture")
    refused(tmp_path / "none.png", "none.png' does not exist; check the path")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "empty.png", "empty.png' is empty")
    refused(tmp_path / "text.png", "text.png' is not a picture that can be read; give PNG")
    refused(tmp_path / "text.png" / "x", "image '.*x' .*; check the path")
    refused("a\0b", "cannot be opened")
    refused("x" * 5000, "cannot be opened")
    refused("line\nbreak.png", "does not exist")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a regular file")


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
def test_a_picture_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    path.chmod(0)
    user_id = os.geteuid()
    if user_id == 0:
        os.seteuid(65534)  # root may read everything
    try:
        refused(path, "a.png' may not be read; check its permissions")
    finally:
        os.seteuid(user_id)


def test_sources_that_are_no_picture() -> None:
    refused(b"", "image data .0 bytes. is empty")
    refused(b"abc", "is not a picture")
    refused(io.BytesIO(), "is empty")
    refused(io.StringIO("abc"), "gives str, not bytes; open it in mode 'rb'")
    refused(3, "image is a int")
    closed = io.BytesIO(b"abc")
    closed.close()
    refused(closed, "cannot be read")
    refused(PILImage.new("RGB", (0, 3)), "0x3 pixels")


def test_a_postscript_program_is_not_run() -> None:
    eps = encoded(gradient(), "eps")
    assert PILImage.open(io.BytesIO(eps)).format == "EPS"
    refused(eps, "is not a picture")


def test_the_limit_is_checked_before_decoding() -> None:
    image = encoded(PILImage.new("RGB", (100, 50)))
    # The pixels are cut off: had they been decoded, the error would say so.
    header = image[:60]
    refused(header, "100x50 = 5000 pixels, over the limit of 4999", ImageLimits(4999))
    refused(header, "broken or cut off", ImageLimits(5000))
    assert load_image(image, ImageLimits(5000)).size == (100, 50)
    refused(PILImage.new("L", (100, 50)), "over the limit of 4999", ImageLimits(4999))


def test_limits_of_pillow_are_errors_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)
    refused(encoded(PILImage.new("RGB", (100, 50))), "over Pillow's limit .*; scale it down")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on broken TIFF tags
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "ico"])
def test_damage_gives_a_picture_or_our_error(kind: str) -> None:
    data = encoded(gradient(), kind)
    rng = np.random.default_rng(0)
    outcomes = set()
    for i in range(150):
        broken = bytearray(data)
        if i % 2:
            del broken[int(rng.integers(1, len(data))) :]
        else:
            for place in rng.integers(0, len(data), 3):
                broken[place] = int(rng.integers(256))
        try:
            outcomes.add(load_image(bytes(broken), ImageLimits(10**6)).mode)
        except ImageError as exc:
            assert "\n" not in str(exc)
            outcomes.add("error")
    assert "error" in outcomes and outcomes <= {"RGB", "error"}


# --- square pixels ---


def undo(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values * STD[:, None, None] + MEAN[:, None, None]


@pytest.mark.parametrize("picture", PICTURES)
def test_square_pixels_equal_the_recorded_ones(picture: str) -> None:
    image = load_image(DATA / f"image_{picture}.png")
    small = SquarePixels(84)(image)
    assert small.dtype == np.float32 and small.shape == (3, 84, 84)
    # One step of 8 bits, since versions of Pillow may round differently.
    assert np.abs(undo(small) - undo(RECORDED[f"{picture}.size84"])).max() <= 1 / 255 + 1e-6

    large = SquarePixels()(image)
    assert large.shape == (3, 1344, 1344)
    crop = RECORDED[f"{picture}.size1344.crop"].astype(np.float32)
    # The recorded crop is in half precision: 2**-10 of values below 2.
    close = 1 / 255 + 2**-10
    assert np.abs(undo(large[:, 640:672, 512:544]) - undo(crop)).max() <= close
    for what, ours in (("mean", large.mean((1, 2))), ("std", large.std((1, 2)))):
        assert np.allclose(ours, RECORDED[f"{picture}.size1344.{what}"], atol=2e-3)


def test_square_grid_and_tokens() -> None:
    cogvlm2, cogvlm = SquarePixels(), SquarePixels(490, merge=1)
    assert cogvlm2.grid(7, 5000) == (96, 96) and cogvlm2.tokens(96, 96) == 2304 + 2
    assert cogvlm.grid(640, 480) == (35, 35) and cogvlm.tokens(35, 35) == 1225 + 2
    assert SquarePixels(224).tokens(16, 16) == 64 + 2


def test_a_plan_wants_rgb() -> None:
    with pytest.raises(ImageError, match="needs an RGB image, got L"):
        SquarePixels(28)(PILImage.new("L", (5, 5)))


# --- native pixels ---

SIZES = [(w, h) for w in (1, 2, 13, 28, 100, 641, 5000) for h in (1, 7, 28, 56, 99, 480, 4000)]


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (56, 56, (4, 4)),  # fits exactly
        (28, 28, (4, 4)),  # scaled up
        (560, 560, (4, 4)),  # scaled down
        (672, 56, (4, 48)),
        (1344, 56, (4, 96)),  # both limits met
        (2688, 56, (2, 96)),  # columns bind, rows are halved
        (100_000, 10, (2, 96)),  # a hair line keeps one row of tokens
        (10, 100_000, (4, 2)),
        (70, 56, (4, 6)),  # 2.5 units: halves go up
        (69, 56, (4, 4)),
    ],
)
def test_native_grid(width: int, height: int, grid: tuple[int, int]) -> None:
    assert NativePixels().grid(width, height) == grid


@pytest.mark.parametrize("most", [None, 4, 5, 16, 30, 64, 97])
@pytest.mark.parametrize(("rows", "cols"), [(4, 96), (2, 2), (16, 16), (32, 8)])
def test_native_grid_is_the_rounded_largest_scale(rows: int, cols: int, most: int | None) -> None:
    plan = NativePixels(max_rows=rows, max_cols=cols, max_patches=most)
    for width, height in SIZES:
        r, c = plan.grid(width, height)
        assert r % 2 == c % 2 == 0 and 2 <= r <= rows and 2 <= c <= cols
        assert r * c <= (most or r * c)
        # The sides in patches at the scale where the first limit is met, and rounded.
        scales = [rows / height, cols / width]
        if most:
            scales.append(math.sqrt(most / (width * height)))
        exact = [side * min(scales) for side in (height, width)]
        rounded = [max(2, 2 * math.floor(side / 2 + 0.5)) for side in exact]
        if most is None or rounded[0] * rounded[1] <= most:
            assert [r, c] == rounded
        else:  # the longer side gives way, by no more than it must
            short, long = sorted(rounded)
            assert min(r, c) == short or max(r, c) == short
            other = r * c // short
            assert other < long and (other + 2) * short > most


def test_native_pixels_follow_the_grid() -> None:
    plan = NativePixels(max_patches=64)
    for width, height in SIZES[::5]:
        image = gradient(width, height)
        rows, cols = plan.grid(width, height)
        values = plan(image)
        assert values.shape == (3, rows * 14, cols * 14) and values.dtype == np.float32
        assert values.flags.c_contiguous
        assert plan.tokens(rows, cols) == rows * cols // 4 + 2


def test_native_pixels_that_need_no_scaling_are_the_picture() -> None:
    image = gradient(84, 56)
    values = undo(NativePixels()(image)).transpose(1, 2, 0) * 255
    assert np.allclose(values, np.asarray(image), atol=1e-3)
    with pytest.raises(ImageError, match="0x5 pixels has no grid"):
        NativePixels().grid(0, 5)


# --- plans from numbers ---


def test_plans_from_dicts() -> None:
    assert pixels_from_dict({"kind": "square", "size": 84}, "x") == SquarePixels(84)
    values = {"kind": "native", "max_rows": 8, "max_patches": None}
    assert pixels_from_dict(values, "x") == NativePixels(max_rows=8)


def test_a_token_may_be_taller_than_wide() -> None:
    plan = pixels_from_dict({"kind": "native", "merge": [4, 1], "max_rows": 4, "max_cols": 9}, "x")
    assert plan == NativePixels(merge=(4, 1), max_rows=4, max_cols=9)
    assert plan.grid(300, 100) == (4, 9)  # 126 x 42 pixels, the rows made a whole token
    assert plan.grid(70, 56) == (4, 5)
    assert plan.tokens(4, 5) == 5 + 2
    assert plan(PILImage.new("RGB", (70, 56))).shape == (3, 56, 70)


@pytest.mark.parametrize(
    ("values", "say"),
    [
        ([], "^here is a list; give an object"),
        ({}, "^here: kind None is not known; known kinds: square, native"),
        ({"kind": "native", "max_row": 4}, "unknown key 'max_row'; did you mean 'max_rows'"),
        ({"kind": "square", "max_rows": 4}, "unknown key 'max_rows'"),
        ({"kind": "square", "size": 85}, "here: size 85 is no multiple of patch . merge = 28"),
        ({"kind": "square", "size": "84"}, "size is '84'"),
        ({"kind": "square", "size": True}, "size is True"),
        ({"kind": "square", "patch": 0}, "patch is 0; give a whole number of at least 1"),
        ({"kind": "square", "size": None}, "size is None"),
        ({"kind": "native", "max_rows": 3}, "max_rows 3 is no multiple of merge = 2"),
        ({"kind": "native", "max_patches": 3}, "max_patches 3 is less than one token, 4 patches"),
        ({"kind": "native", "max_patches": -1}, "max_patches is -1"),
        ({"kind": "native", "merge": [4, 0]}, r"merge is \(4, 0\)"),
        ({"kind": "native", "merge": [4, 1, 1]}, r"merge is \(4, 1, 1\)"),
        ({"kind": "native", "merge": [3, 1]}, "max_rows 4 is no multiple of merge = 3"),
    ],
)
def test_impossible_plans_are_refused(values, say) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=say):
        pixels_from_dict(values, "here")
