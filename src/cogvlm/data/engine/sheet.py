"""A contact sheet: records as a page of HTML to look at, with the boxes of their truth drawn.

One file that needs nothing else: thumbnails are in it, boxes are SVG over them and say their text
when pointed at.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from ...errors import CogVLMError
from ...journal import write_whole
from ...processor.image import load_image
from ...processor.messages import Image, Text
from ..sft import Record, Source
from ..sft.mix import permuted

_SIDE = 460  # pixels of a thumbnail's longer side
_COLOURS = {"words": "#1a9641", "lines": "#e08214", "items": "#d7191c"}
_PLACE = re.compile(r"\[\[(\d{3}(?:,\d{3}){3}(?:;\d{3}(?:,\d{3}){3})*)\]\]")
_STYLE = """
body { font: 14px/1.4 sans-serif; margin: 16px; background: #f2f2f4; color: #222 }
main { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start }
article { background: #fff; border: 1px solid #ccc; border-radius: 6px; padding: 8px; width: 480px }
svg { width: 100%; height: auto; max-height: 480px; background: #ddd; display: block;
  margin: 4px 0 }
h2 { font-size: 13px; margin: 0; color: #666; font-weight: normal; overflow-wrap: anywhere }
p { margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere } .q { font-weight: 600 }
.bad { color: #b00 }
table { border-collapse: collapse } td, th { padding: 1px 10px; text-align: left }
rect { fill: transparent; stroke-width: 1; vector-effect: non-scaling-stroke }
.key { font-size: 13px }
"""


def write_sheet(
    path: Path, source: Source, count: int, seed: int = 0, index: Mapping[str, Any] | None = None
) -> int:
    """Write a sheet of records chosen at random; returns how many.

    Args:
        path: the HTML file.
        source: of the records.
        count: at most so many.
        seed: chooses them.
        index: counts of the whole set, shown above, as ``index.json`` has them.
    """
    total = len(source)
    chosen = sorted(permuted(i, total, seed) for i in range(min(count, total)))
    body = "\n".join(_article(source, i) for i in chosen)
    keys = " ".join(f'<span style="color:{c}">&#9632; {k}</span>' for k, c in _COLOURS.items())
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{html.escape(str(source.path))}</title>
<style>{_STYLE}</style></head><body><h1>{html.escape(source.path.name)}</h1>
<p class="key">{len(chosen)} of {total} records. {keys}
<span style="color:#2166ac">&#9632; in an answer</span></p>
{_counts(index or {})}<main>{body}</main></body></html>
"""
    write_whole(path, page.encode(errors="replace"))
    return len(chosen)


def _counts(index: Mapping[str, Any]) -> str:
    rows = []
    for name in ("kinds", "tasks", "sources", "licences"):
        if index.get(name):
            counts = Counter(index[name]).most_common()
            rows.append((name, ", ".join(f"{k} {n}" for k, n in counts)))
    for step, reasons in index.get("rejects", {}).items():
        rows.append((f"refused: {step}", ", ".join(f"{k} {n}" for k, n in reasons.items())))
    cells = "".join(f"<tr><th>{_e(a)}</th><td>{_e(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>" if rows else ""


_e = html.escape


def _article(source: Source, index: int) -> str:
    try:
        record = source[index]
        values = source.raw(index).values
    except CogVLMError as error:
        return f'<article><p class="bad">{_e(str(error))}</p></article>'
    values = values if isinstance(values, dict) else {}
    head = " · ".join(str(values[k]) for k in ("kind", "source", "licence") if values.get(k))
    parts = [f"<h2>{_e(record.id)} {_e(head)}</h2>"]
    parts += _pictures(record, values)
    for message in record.messages:
        said = "\n".join(p.text for p in message.parts if isinstance(p, Text))
        mark = {"user": "q", "assistant": "a"}.get(message.role, "s")
        parts.append(f'<p class="{mark}">{_e(_short(said))}</p>')
    return f"<article>{''.join(parts)}</article>"


def _pictures(record: Record, values: Mapping[str, Any]) -> Iterator[str]:
    truths = values.get("truth")
    answers = " ".join(record.answers)
    asked = " ".join(p.text for m in record.messages for p in m.parts if isinstance(p, Text))
    alone = len(record.visuals) == 1
    for number, visual in enumerate(record.visuals):
        if not isinstance(visual, Image):
            yield "<p>[video]</p>"
            continue
        try:
            image = load_image(visual.source)
        except CogVLMError as error:
            yield f'<p class="bad">{_e(str(error))}</p>'
            continue
        known = isinstance(truths, list) and number < len(truths)
        truth = truths[number] if known and isinstance(truths, list) else {}
        yield _drawn(image, truth, _places(answers + asked, image.size) if alone else ())


def _places(text: str, size: tuple[int, int]) -> Iterator[list[float]]:
    for match in _PLACE.finditer(text):
        for four in match[1].split(";"):
            sides = [int(v) / 1000 for v in four.split(",")]
            yield [side * size[i % 2] for i, side in enumerate(sides)]


def _drawn(image: PILImage.Image, truth: Mapping[str, Any], marked: Iterable[list[float]]) -> str:
    width, height = image.size
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    boxes = []
    for name, colour in _COLOURS.items():
        for text, box, role in truth.get(name, ()):
            boxes.append(_rect(box, colour, f"{role}: {text}"))
    boxes += [_rect(box, "#2166ac", "in an answer", 3) for box in marked]
    return (
        f'<svg viewBox="0 0 {width} {height}"><image width="{width}" height="{height}" '
        f'href="data:image/jpeg;base64,{data}"/>{"".join(boxes)}</svg>'
    )


def _rect(box: Iterable[float], colour: str, text: str, thick: int = 1) -> str:
    x0, y0, x1, y1 = box
    return (
        f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{max(0.0, x1 - x0):.1f}" '
        f'height="{max(0.0, y1 - y0):.1f}" stroke="{colour}" style="stroke-width:{thick}">'
        f"<title>{_e(text)}</title></rect>"
    )


def _short(text: str) -> str:
    return text if len(text) <= 700 else text[:700] + " ..."
