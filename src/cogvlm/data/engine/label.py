"""Pictures that hold text but no truth: RapidOCR reads them, and rules say what to believe.

Its PP-OCR models come with its package; nothing is fetched.  What it is sure of becomes lines with
boxes; a picture of which it is unsure on the whole is refused, and one with a few unsure lines is
never asked for all of its text.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from ...errors import ConfigError, ImageError, ResourceError
from ...processor.image import load_image
from ..sft.media import PICTURE_SUFFIXES
from .run import parts_of
from .step import Item, Picture, Piece, Refused, Reject, Sample, Truth, encode

_LARGEST = 2048  # pixels of the longer side that is read and kept


@dataclass(frozen=True)
class Label:
    """A maker over the pictures of a folder.

    Attributes:
        folder: Pictures in it and below.
        shards: How many shards share them.
        licence: Of the pictures.
        sure: Confidence from which a line is believed, 0 to 1.
        share: Of all lines that must be, for the picture to be kept.
        seed: Of what later steps choose.

    Raises:
        ConfigError: a confidence or share outside 0 to 1.
    """

    folder: Path
    shards: int
    licence: str = ""
    sure: float = 0.9
    share: float = 0.7
    seed: int = 0
    endless: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name in ("sure", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")

    @property
    def key(self) -> str:
        """All that decides what comes out."""
        return repr((str(self.folder.resolve()), len(find_pictures(self.folder)), self.shards,
                     self.licence, self.sure, self.share, self.seed))  # fmt: skip

    def items(self, shard: int) -> Iterator[Item]:
        """See :class:`cogvlm.data.engine.step.Maker`."""
        for number, path in parts_of(find_pictures(self.folder), shard, self.shards):
            name = path.relative_to(self.folder).as_posix()
            try:
                picture = self.read(load_image(path), path.read_bytes())
            except (ImageError, OSError) as error:
                yield Reject(name, self.folder.name, "label", "unreadable", str(error))
            except Refused as refused:
                yield Reject(name, self.folder.name, "label", refused.reason, refused.detail)
            else:
                seed = int(np.random.default_rng((self.seed, number)).integers(2**62))
                yield Sample(f"label-{name}", "photo", self.folder.name,
                             self.licence or "not stated", (picture,), seed=seed)  # fmt: skip

    def read(self, image: PILImage.Image, data: bytes = b"") -> Picture:
        """A picture with the lines that are believed.

        Args:
            image: upright, RGB.
            data: its file, kept as it is where that is possible.

        Raises:
            Refused: no text, or too many lines that are unsure.
        """
        if max(image.size) > _LARGEST:
            image.thumbnail((_LARGEST, _LARGEST))
            data = b""
        found = _engine()(np.asarray(image)[..., ::-1])  # BGR
        if found.boxes is None or not len(found.boxes):
            raise Refused("no text")
        lines, unsure = [], 0
        for corners, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
            said = " ".join(text.split())
            if score < self.sure or not said:
                unsure += 1
                continue
            low = np.maximum(corners.min(0), 0)
            high = np.minimum(corners.max(0), image.size)
            box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
            lines.append(Piece(said, box, "line"))
        if len(lines) < self.share * (len(lines) + unsure) or not lines:
            raise Refused("unsure of its text", f"{unsure} of {len(lines) + unsure} lines")
        text = "" if unsure else "\n".join(line.text for line in lines)
        truth = Truth(text, lines=tuple(lines))
        return Picture(_kept(data) or encode(image), image.size, truth)


def find_pictures(folder: Path) -> list[Path]:
    """Files that are pictures by their names, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)


def _kept(data: bytes) -> bytes:
    """The file itself, where loaders read it as it is shown."""
    if not data:
        return b""
    with PILImage.open(io.BytesIO(data)) as opened:
        upright = opened.getexif().get(0x0112, 1) == 1
        return data if opened.format in ("JPEG", "PNG") and upright else b""


@lru_cache(maxsize=1)
def _engine() -> Any:
    """Loaded once a process; one thread, since there are as many processes as wanted."""
    try:
        library = import_module("rapidocr")
    except ImportError:
        raise ResourceError("RapidOCR is not installed; pip install 'cogvlm[engine]'") from None
    settings = {
        "Global.log_level": "critical",
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
    return library.RapidOCR(params=settings)
