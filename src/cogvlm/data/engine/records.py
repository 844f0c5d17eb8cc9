"""The maker that reads what exists: every format of :mod:`cogvlm.data.sft`, shuffled, in shards."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from ...errors import CogVLMError, InputError
from ...processor.image import load_image
from ...processor.messages import Image, Message, Video
from ..sft import Options, Record, Source, open_source
from ..sft.mix import permuted
from .step import Item, Picture, Refused, Reject, Sample, Truth, Turn, encode, truth_from_json

_AS_THEY_ARE = ("JPEG", "PNG")  # of which every loader of webdatasets reads


@dataclass(frozen=True)
class Records:
    """Records of several sources, one after another or in an order that depends on the seed.

    Attributes:
        paths: What :func:`cogvlm.data.sft.open_source` opens.
        shards: How many shards share them.
        seed: Of the order; none for that of the files.
        licence: Of records that do not say their own.
        options: How the sources are read.
        left_out: Places in the files' order whose pictures were found to be double.
    """

    paths: tuple[str, ...]
    shards: int
    seed: int | None = None
    licence: str = ""
    options: Options = field(default_factory=Options)
    left_out: frozenset[int] = frozenset()
    endless: bool = field(default=False, init=False)

    @cached_property
    def sources(self) -> list[Source]:
        """The opened sources; each process opens its own."""
        return [open_source(path, None, self.options) for path in self.paths]

    @property
    def key(self) -> str:
        """All that decides what comes out."""
        return repr((self.paths, len(self), self.seed, self.licence, self.options,
                     sorted(self.left_out)))  # fmt: skip

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getstate__(self) -> dict[str, Any]:
        """Without the opened sources."""
        return {k: v for k, v in self.__dict__.items() if k != "sources"}

    def items(self, shard: int) -> Iterator[Item]:
        """See :class:`cogvlm.data.engine.step.Maker`."""
        count = len(self)
        for place in range(shard, count, self.shards):
            index = place if self.seed is None else permuted(place, count, self.seed)
            item = self.item(index)
            if index in self.left_out and isinstance(item, Sample):
                item = Reject(item.id, item.source, "duplicate", "like another picture")
            yield item

    def item(self, index: int) -> Item:
        """The sample at a place of the files' order, or why there is none."""
        for source in self.sources:
            if index < len(source):
                break
            index -= len(source)
        where, name = source.where(index), Path(source.path).name
        try:
            # An id of a record that many sources may share needs its source's name.
            return self._sample(source[index], source.raw(index).values, name)
        except Refused as refused:
            return Reject(where, name, "read", refused.reason, refused.detail)
        except (CogVLMError, OSError) as error:
            return Reject(where, name, "read", "unusable", " ".join(str(error).split()))

    def _sample(self, record: Record, values: Any, name: str) -> Sample:
        values = values if isinstance(values, dict) else {}
        truths = values.get("truth") if isinstance(values.get("truth"), list) else []
        pictures = []
        for number, visual in enumerate(record.visuals):
            if isinstance(visual, Video):
                raise Refused("a video", str(visual))
            data, size = _read(visual)
            truth = truth_from_json(truths[number]) if number < len(truths) else Truth()
            pictures.append(Picture(data, size, truth))
        return Sample(
            f"{name}/{record.id}" if len(self.paths) > 1 else record.id,
            str(values.get("kind", "record")),
            str(values.get("source", name)),
            str(values.get("licence", self.licence)) or "not stated",
            tuple(pictures),
            tuple(_turn(m) for m in record.messages),
            tuple(map(str, values.get("tasks", ()))),
        )


def _turn(message: Message) -> Turn:
    said = []
    for part in message.parts:
        if isinstance(part, Image):
            said.append("<image>")
        elif not isinstance(part, Video):
            if message.role == "user" and ("<image>" in part.text or "<video>" in part.text):
                raise Refused("holds a picture mark", part.text[:60])
            said.append(part.text)
    joined = "\n".join(said) if message.role == "user" else "".join(said)
    return Turn(message.role, joined)


def _read(visual: Image) -> tuple[bytes, tuple[int, int]]:
    """Bytes of a JPEG or PNG file, and width and height as shown."""
    source = visual.source
    image = load_image(source)
    if not isinstance(source, PILImage.Image):
        data = _bytes(source)
        with PILImage.open(io.BytesIO(data)) as opened:
            upright = opened.getexif().get(0x0112, 1) == 1
            if opened.format in _AS_THEY_ARE and upright:
                return data, image.size
    return encode(image), image.size


def _bytes(source: Any) -> bytes:
    if isinstance(source, bytes):
        return source
    if hasattr(source, "read"):
        source.seek(0)
        return bytes(source.read())
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from error
