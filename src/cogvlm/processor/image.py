"""Pictures -> pixels: reading any file as RGB, and the two pixel plans.

``H, W`` are pixels, ``rows, cols`` patches.  Knows nothing about tokens except how many a grid
takes.
"""

from __future__ import annotations

import hashlib
import io
import math
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ConfigError, ImageError, refuse_unknown
from .messages import ImageSource

# Of CLIP; the released image transform (CogVLM2 and CogVLM).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

# EPS pictures are programs, which Pillow hands to Ghostscript.
_REFUSED_FORMATS = frozenset({"EPS"})


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost; the default is where Pillow itself refuses."""

    max_pixels: int = 178_956_970  # width x height


# --- reading ---------------------------------------------------------------------------------


def load_image(source: ImageSource, limits: ImageLimits | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB, upright.

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled, and
    an animation gives its first frame.  The size is checked before any pixel is decoded.

    Args:
        source: path, bytes of a file, open binary file (read from its start), or ``PIL.Image``
            (left as it is).
        limits: :class:`ImageLimits`.

    Raises:
        ImageError: missing, unreadable, empty, broken, no picture, or over a limit.
    """
    limits = limits or ImageLimits()
    if isinstance(source, Image.Image):
        return _decode(source, f"{source.width}x{source.height} {source.mode} image", limits)
    if isinstance(source, (str, Path)):
        return _open_path(Path(source), limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source), "image data", limits)
    if not hasattr(source, "read"):
        raise ImageError(
            f"image is a {type(source).__name__}; give a path, bytes, a binary file or a PIL image"
        )
    return _open_bytes(*_read_file(source), limits)


def _open_path(path: Path, limits: ImageLimits) -> Image.Image:
    name = f"image {str(path)!r}"
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder; give the file of one picture")
        if not stat.S_ISREG(mode):
            # Opening a pipe would wait for ever.
            raise ImageError(f"{name} is not a regular file; give the file of one picture")
        with path.open("rb") as file:
            return _open_stream(file, name, limits)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read; check its permissions") from None
    except (OSError, ValueError) as exc:
        raise ImageError(f"{name} cannot be opened ({first_line(exc)}); check the path") from None


def _read_file(file: Any) -> tuple[bytes, str]:
    name = f"image file {getattr(file, 'name', type(file).__name__)!r}"
    try:
        if file.seekable():
            # The same message may be encoded twice.
            file.seek(0)
        data = file.read()
    except (OSError, ValueError, AttributeError) as exc:
        raise ImageError(f"{name} cannot be read ({first_line(exc)}); open it again") from None
    if not isinstance(data, bytes):
        raise ImageError(f"{name} gives {type(data).__name__}, not bytes; open it in mode 'rb'")
    return data, name


def _open_bytes(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    return _open_stream(io.BytesIO(data), f"{name} ({len(data)} bytes)", limits)


def _open_stream(stream: Any, name: str, limits: ImageLimits) -> Image.Image:
    if not stream.read(1):
        raise ImageError(f"{name} is empty; it was perhaps not written or downloaded fully")
    Image.init()
    formats = [f for f in Image.ID if f not in _REFUSED_FORMATS]
    with decoding(name, "broken"):
        try:
            image = Image.open(stream, formats=formats)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
            why = first_line(exc)
            raise ImageError(f"{name} is over Pillow's limit ({why}); scale it down") from None
        except UnidentifiedImageError:
            raise ImageError(
                f"{name} is not a picture that can be read; give PNG, JPEG, WebP, GIF, BMP or TIFF"
            ) from None
    with image:
        return _decode(image, name, limits)


def _decode(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width}x{height} pixels; give at least 1x1")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} = {width * height} pixels, over the limit of "
            f"{limits.max_pixels}; scale it down or raise ImageLimits.max_pixels"
        )
    with decoding(name, "broken or cut off"):
        image.load()
        return _to_rgb(_upright(image), name)


@contextmanager
def decoding(name: str, state: str) -> Iterator[None]:
    """Make what a decoder raises an error of ours; ours, and a lack of memory, pass.

    Args:
        name: of the file.
        state: what it is then, such as ``"broken"``.

    Raises:
        ImageError: instead of whatever was raised inside.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as exc:  # decoders raise nearly anything on a broken file
        why = first_line(exc)
        raise ImageError(f"{name} is {state} ({why}); save or download it again") from None


def first_line(exc: BaseException) -> str:
    """First line of an exception, since an error of ours is one line."""
    lines = str(getattr(exc, "strerror", None) or exc).splitlines()
    return lines[0][:200] if lines and lines[0] else type(exc).__name__


def _upright(image: Image.Image) -> Image.Image:
    # Cameras and editors write broken EXIF around sound pixels: such a picture stays as stored.
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey16(image, name)
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point grey of unknown range; save it as 8-bit")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _grey16(image: Image.Image, name: str) -> Image.Image:
    """Scale 0..65535 to 0..255; Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{name} holds grey values outside 0..65535; save it as 8-bit")
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        values[values == see_through] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


# --- pixel plans -----------------------------------------------------------------------------


class Pixels(Protocol):
    """How a picture becomes the vision tower's input."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """``(rows, cols)`` in patches for a picture of this size."""

    def tokens(self, rows: int, cols: int) -> int:
        """Places that a grid takes among the tokens, begin and end marker included."""

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Pixels ``float32[3, H, W]``, normalised."""


@dataclass(frozen=True)
class SquarePixels:
    """The released plan: a square of fixed size, aspect ratio not kept.

    ``merge`` is how many patches a side the adapter joins to one token: 2 for CogVLM2, whose
    1344 pixels take 48 x 48 + 2 tokens; 1 for the first generation.

    Raises:
        ConfigError: a number below 1, or a size that is no multiple of ``patch * merge``.
    """

    size: int = 1344  # pixels a side
    patch: int = 14  # pixels
    merge: int = 2  # patches

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.size % (self.patch * self.merge):
            raise ConfigError(
                f"size {self.size} is no multiple of patch * merge = {self.patch * self.merge}"
            )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """``(rows, cols)`` in patches: the same for every picture."""
        return self.size // self.patch, self.size // self.patch

    def tokens(self, rows: int, cols: int) -> int:
        """Places that a grid takes among the tokens, begin and end marker included."""
        return (rows // self.merge) * (cols // self.merge) + 2

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Pixels ``float32[3, size, size]`` of an RGB image, normalised as CLIP's."""
        return normalise(image, self.size, self.size)


@dataclass(frozen=True)
class NativePixels:
    """A plan that keeps the aspect ratio.

    The picture is scaled by the largest factor that keeps it within ``max_rows`` x ``max_cols``
    patches, and within ``max_patches`` in all; each side is then rounded to the nearest multiple
    of ``patch * merge`` pixels, at least one.  Where that rounding breaks ``max_patches``, the
    longer side gives way.  With ``max_scale`` a picture is enlarged by that factor at most, or to
    ``min_rows`` of patches where it would be lower.

    Raises:
        ConfigError: a number below 1, a maximum that is no multiple of ``merge``, or fewer patches
            than one token takes.
    """

    patch: int = 14  # pixels
    merge: int | tuple[int, int] = 2  # patches that make a token: a side, or rows and columns
    max_rows: int = 4  # patches
    max_cols: int = 96  # patches
    max_patches: int | None = None  # patches; None: rows and columns are the only limits
    max_scale: float | None = None  # pixels it is given for one of its own; None: no limit
    min_rows: int = 1  # patches

    def __post_init__(self) -> None:
        _check_positive(self)
        for name, merge in zip(("max_rows", "max_cols"), self.cell, strict=True):
            if getattr(self, name) % merge:
                raise ConfigError(f"{name} {getattr(self, name)} is no multiple of merge = {merge}")
        if self.max_patches is not None and self.max_patches < math.prod(self.cell):
            raise ConfigError(
                f"max_patches {self.max_patches} is less than one token, "
                f"{math.prod(self.cell)} patches"
            )

    @property
    def cell(self) -> tuple[int, int]:
        """Rows and columns of patches that make a token."""
        return (self.merge, self.merge) if isinstance(self.merge, int) else self.merge

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """``(rows, cols)`` in patches for a picture of ``width`` x ``height`` pixels.

        Raises:
            ImageError: a side below 1.
        """
        if width < 1 or height < 1:
            raise ImageError(f"a picture of {width}x{height} pixels has no grid; give 1x1 or more")
        tall, wide = self.cell
        factor = min(self.max_rows * self.patch / height, self.max_cols * self.patch / width)
        if self.max_patches is not None:
            factor = min(factor, self.patch * math.sqrt(self.max_patches / (width * height)))
        if self.max_scale is not None:
            least = self.min_rows * self.patch / height
            factor = min(factor, max(self.max_scale, least))
        rows = max(1, math.floor(height * factor / (self.patch * tall) + 0.5))
        cols = max(1, math.floor(width * factor / (self.patch * wide) + 0.5))
        if self.max_patches is not None:
            most = self.max_patches // (tall * wide)
            if rows <= cols:
                cols = min(cols, most // rows)
            else:
                rows = min(rows, most // cols)
        return rows * tall, cols * wide

    def tokens(self, rows: int, cols: int) -> int:
        """Places that a grid takes among the tokens, begin and end marker included."""
        return (rows // self.cell[0]) * (cols // self.cell[1]) + 2

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Pixels ``float32[3, rows * patch, cols * patch]`` of an RGB image, normalised."""
        rows, cols = self.grid(*image.size)
        return normalise(image, cols * self.patch, rows * self.patch)


def pixels_from_dict(
    values: Mapping[str, Any], where: str, more: Mapping[str, type[NativePixels]] | None = None
) -> SquarePixels | NativePixels:
    """Build a plan from ``{"kind": "square" | "native", ...its fields}``; ``more`` are other kinds.

    Raises:
        ConfigError: an unknown kind or key, or an impossible value.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is a {type(values).__name__}; give an object with a 'kind'")
    kinds: dict[str, type[SquarePixels] | type[NativePixels]]
    kinds = {"square": SquarePixels, "native": NativePixels, **(more or {})}
    kind = values.get("kind")
    if kind not in kinds:
        raise ConfigError(f"{where}: kind {kind!r} is not known; known kinds: {', '.join(kinds)}")
    numbers = {key: value for key, value in values.items() if key != "kind"}
    if kind != "square" and isinstance(numbers.get("merge"), list):
        numbers["merge"] = tuple(numbers["merge"])
    refuse_unknown(numbers, [field.name for field in fields(kinds[kind])], where)
    try:
        return kinds[kind](**numbers)
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from None


def _check_positive(plan: SquarePixels | NativePixels) -> None:
    for field in fields(plan):
        value = getattr(plan, field.name)
        if value is None and field.default is None:
            continue
        if field.name == "max_scale":
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ConfigError(f"max_scale is {value!r}; give a number above 0")
            continue
        if type(field.default) is bool:
            if type(value) is not bool:
                raise ConfigError(f"{field.name} is {value!r}; give true or false")
            continue
        pair = field.name == "merge" and isinstance(value, tuple) and len(value) == 2
        numbers: tuple[Any, ...] = value if pair else (value,)
        if any(type(number) is not int or number < 1 for number in numbers):
            raise ConfigError(f"{field.name} is {value!r}; give a whole number of at least 1")


def normalise(image: Image.Image, width: int, height: int) -> NDArray[np.float32]:
    """Resize an RGB image and normalise it for the tower: ``float32[3, height, width]``."""
    if image.mode != "RGB":
        raise ImageError(f"a pixel plan needs an RGB image, got {image.mode}; use load_image")
    # Resized as 8-bit values, like the released transform.
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32) / np.float32(255)  # [H, W, 3]
    return np.ascontiguousarray(((values - MEAN) / STD).transpose(2, 0, 1))  # [3, H, W]


def digest(pixels: NDArray[np.float32]) -> bytes:
    """Sixteen bytes that stand for a picture's pixels ``float32[3, H, W]``."""
    found = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    found.update(np.ascontiguousarray(pixels).data)
    return found.digest()
