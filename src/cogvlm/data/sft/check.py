"""Look at every record of a source: what is bad and why, and what the good ones are like.

Goes on to the end whatever it meets.  Of pictures the header alone is read unless all is asked
for.  Knows nothing about models except what a processor says of lengths.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage

from ...errors import ImageError, InputError
from ...processor.image import ImageLimits, load_image
from ...processor.messages import Image, Video
from .index import Problem
from .record import Record, RecordError
from .sources import Source

if TYPE_CHECKING:
    from ...processor import Encoded, Processor

Size = tuple[int, int]
"""Width and height of a picture, in pixels."""

WIDE = 6.0
"""Pictures with sides further apart than this were left out of CogVLM's own training."""

_SCRIPTS = {
    "Han": re.compile("[\u3400-\u9fff\uf900-\ufaff]"),
    "Kana": re.compile("[\u3040-\u30ff]"),
    "Hangul": re.compile("[\uac00-\ud7af]"),
    "Latin": re.compile("[A-Za-z\u00c0-\u024f]"),
    "Cyrillic": re.compile("[\u0400-\u04ff]"),
    "Arabic": re.compile("[\u0600-\u06ff]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Devanagari": re.compile("[\u0900-\u097f]"),
}
_CJK = ("Han", "Kana", "Hangul")


@dataclass(frozen=True)
class Length:
    """Tokens of one record."""

    all: int
    visual: int  # places of pictures
    answers: int  # that training learns


Measure = Callable[[Record, Sequence[Size]], Length]
"""Tokens of a record whose pictures have these sizes."""


@dataclass
class Report:
    """What was found in one source."""

    path: str
    kind: str
    records: int = 0
    bad: list[Problem] = field(default_factory=list)
    pictures: int = 0
    videos: int = 0
    unplaced: int = 0  # records with pictures and no <image>
    questions: Counter[int] = field(default_factory=Counter)  # turns -> records
    visuals: Counter[int] = field(default_factory=Counter)  # pictures and videos -> records
    scripts: Counter[str] = field(default_factory=Counter)  # of answers -> records
    unread: Counter[str] = field(default_factory=Counter)  # key -> records
    letters: int = 0
    cjk: int = 0
    numbers: dict[str, list[float]] = field(default_factory=dict)

    @property
    def good(self) -> int:
        """Records that can be trained on."""
        return sum(self.questions.values())

    def note(self, name: str, *values: float) -> None:
        """Collect numbers of a kind."""
        self.numbers.setdefault(name, []).extend(values)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {
            "path": self.path,
            "format": self.kind,
            "records": self.records,
            "good": self.good,
            "bad": [{"where": p.where, "reason": p.reason} for p in self.bad],
            "pictures": self.pictures,
            "videos": self.videos,
            "without_place": self.unplaced,
            "questions": dict(sorted(self.questions.items())),
            "visuals": dict(sorted(self.visuals.items())),
            "scripts": dict(self.scripts.most_common()),
            "cjk": round(self.cjk / max(1, self.letters), 4),
            "keys_not_read": dict(self.unread.most_common()),
            **{name: spread(values) for name, values in self.numbers.items()},
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, middle, the one that 95 of 100 do not exceed, and greatest.

    >>> spread([3, 1, 2])
    {'min': 1, 'median': 2, 'p95': 3, 'max': 3}
    """
    rows = sorted(values)
    last = len(rows) - 1
    return {
        "min": rows[0],
        "median": rows[last // 2],
        "p95": rows[-(-last * 95 // 100)],
        "max": rows[-1],
    }


def check(
    source: Source,
    measure: Measure | None = None,
    max_tokens: int | None = None,
    decode: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at every record.

    Args:
        source: of the records.
        measure: counts tokens; see :func:`measure_with`.
        max_tokens: what is longer is bad, since its answer would be cut.
        decode: read every picture to its last pixel.
        progress: called with (done, all).
    """
    report = Report(str(source.path), source.kind, len(source), list(source.problems))
    seen: dict[int, int] = {}
    for index in range(len(source)):
        if progress is not None and index % 64 == 0:
            progress(index, len(source))
        where = source.where(index)
        try:
            record = source[index]
            _refuse_twice(record, index, source, seen)
            sizes = [size_of(v, decode) for v in record.visuals if isinstance(v, Image)]
            _look_at_films(record)
            length = measure(record, sizes) if measure is not None else None
            if length is not None and max_tokens is not None and length.all > max_tokens:
                over = length.all - max_tokens
                raise InputError(
                    f"{length.all} tokens ({length.visual} of pictures), {over} over the limit "
                    f"of {max_tokens}: {min(over, length.answers)} of the answer's "
                    f"{length.answers} would be cut off"
                )
        except RecordError as error:
            report.bad.append(Problem(error.where, error.reason))
        except (InputError, OSError) as error:
            report.bad.append(Problem(where, " ".join(str(error).split())))
        else:
            _count(report, record, sizes, length)
    if progress is not None:
        progress(len(source), len(source))
    return report


def _refuse_twice(record: Record, index: int, source: Source, seen: dict[int, int]) -> None:
    digest = hashlib.blake2b(record.id.encode(errors="surrogatepass"), digest_size=8).digest()
    first = seen.setdefault(int.from_bytes(digest, "little"), index)
    if first != index:
        raise InputError(f"id {record.id!r} again, first at {source.where(first)}; every id once")


def size_of(image: Image, decode: bool) -> Size:
    """Width and height as shown."""
    if not decode:
        # Decoders raise nearly anything; the full reader then says what it is.
        with suppress(Exception):
            return _header(image.source)
    return load_image(image.source).size


def describe(visual: Image | Video) -> str:
    """A picture or video in words: its kind, size and name; never an error."""
    kind = "video" if isinstance(visual, Video) else "picture"
    size = ""
    if isinstance(visual, Image):
        try:
            size = " {}x{}".format(*size_of(visual, False))
        except ImageError:
            size = " unreadable"
    source = visual.source
    name = f"{len(source)} bytes" if isinstance(source, bytes) else getattr(source, "name", "")
    return f"[{kind}{size} {source if isinstance(source, (str, Path)) else name}]"


def _header(source: Any) -> Size:
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with PILImage.open(source) as picture:
            if picture.format == "EPS" or picture.width * picture.height > ImageLimits().max_pixels:
                raise ImageError("for the full reader to say")
            # Asking a PNG that has none would decode it to the end.
            tags = picture.getexif() if "exif" in picture.info or picture.format == "TIFF" else {}
            turned = tags.get(0x0112, 1) >= 5  # EXIF orientation on its side
            return (picture.height, picture.width) if turned else picture.size


def _look_at_films(record: Record) -> None:
    for visual in record.visuals:
        source = visual.source
        film = isinstance(visual, Video) and isinstance(source, (str, Path))
        if film and not Path(str(source)).stat().st_size:
            raise ImageError(f"video {str(source)!r} is empty")


def _count(report: Report, record: Record, sizes: Sequence[Size], length: Length | None) -> None:
    films = sum(isinstance(v, Video) for v in record.visuals)
    report.pictures += len(sizes)
    report.videos += films
    report.unplaced += record.unplaced
    report.questions[len(record.answers)] += 1
    report.visuals[len(sizes) + films] += 1
    report.unread.update(record.unread)
    for width, height in sizes:
        report.note("width", width)
        report.note("height", height)
        report.note("aspect", round(width / height, 3))
    text = "\n".join(record.answers)
    letters = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    report.scripts[max(letters, key=letters.__getitem__) if any(letters.values()) else "none"] += 1
    report.letters += sum(letters.values())
    report.cjk += sum(letters[name] for name in _CJK)
    report.note("question_chars", *(len(m.text) for m in record.messages if m.role == "user"))
    report.note("answer_chars", *map(len, record.answers))
    if length is not None:
        report.note("tokens", length.all)
        report.note("answer_tokens", length.answers)


# --- tokens ------------------------------------------------------------------------------------


def measure_with(processor: Processor) -> Measure:
    """Count tokens as ``processor.encode(..., train=True)`` would, without reading a pixel; by it
    where pictures are cut into lines.

    A video counts as many frames as its model takes at most.
    """
    from ...processor.lines import LinePixels
    from ...processor.template import BOS, ImageSlot, Plain

    if isinstance(processor.pixels, LinePixels):
        return lambda record, _: length_of(processor.encode(record.messages, train=True))
    words, plan = processor.tokenizer, processor.video

    def block(size: Size) -> int:
        return processor.pixels.tokens(*processor.pixels.grid(*size))

    def measure(record: Record, sizes: Sequence[Size]) -> Length:
        left = iter(sizes)
        text = visual = answers = 0
        shown = 0
        for segment in processor.template.segments(record.messages, True):
            if isinstance(segment, ImageSlot):
                film = isinstance(segment.image, Video)
                if film and plan is None:
                    raise InputError("a video, and this model takes pictures only")
                frames = plan.frames if film and plan is not None else 1
                shown += frames
                visual += frames * block((1, 1) if film else next(left))
                if plan is not None and plan.numbered:
                    text += sum(len(words.encode(str(i))) for i in range(frames))
                continue
            if isinstance(segment, Plain):
                new = len(words.encode(segment.text))
            else:
                new = int(segment.token != BOS or words.bos_id is not None)
            text += new
            answers += new if segment.labelled else 0
        if processor.max_images is not None and shown > processor.max_images:
            raise InputError(f"{shown} pictures; this model takes at most {processor.max_images}")
        return Length(text + visual, visual, answers)

    return measure


def length_of(row: Encoded) -> Length:
    """Tokens of an encoded record."""
    learnt = 0 if row.labels is None else int((row.labels >= 0).sum())
    return Length(len(row.input_ids), int((row.token_type_ids == 1).sum()), learnt)


# --- for people --------------------------------------------------------------------------------


def lines(report: Report) -> Iterator[str]:
    """The report as text: every bad record, then what the good ones are like."""
    for problem in report.bad:
        yield f"{problem.where}: {problem.reason}"
    yield f"{report.path} ({report.kind}): {report.good} good, {len(report.bad)} bad"
    if not report.good:
        return
    yield f"  pictures        {report.pictures}, videos {report.videos}"
    yield f"  in a record     {_few(report.visuals)}"
    yield f"  turns           {_few(report.questions)}"
    yield (
        f"  answers         {_few(report.scripts)}; "
        f"{100 * report.cjk / max(1, report.letters):.0f} % of letters are CJK"
    )
    units = {"width": " px", "height": " px", "aspect": " w/h"}
    for name, values in report.numbers.items():
        found = spread(values)
        row = "  ".join(f"{key} {value:g}" for key, value in found.items())
        yield f"  {name:<16}{row}{units.get(name, '')}"
    wide = sum(max(a, 1 / max(a, 1e-9)) > WIDE for a in report.numbers.get("aspect", ()))
    if wide:
        yield f"  note: {wide} pictures with sides further apart than {WIDE:g} : 1"
    if report.unplaced:
        yield f"  note: {report.unplaced} records without <image>; their pictures stand in front"
    if report.unread:
        yield f"  note: keys not read: {_few(report.unread)}"


def _few(counts: Counter[Any], most: int = 8) -> str:
    """``1 x 20, 2 x 3`` and so on, the frequent ones first."""
    shown = [f"{key} x {count}" for key, count in counts.most_common(most)]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f", {rest} more" if rest > 0 else "")
