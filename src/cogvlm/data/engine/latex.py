"""LaTeX sources and PDF documents to pictures with their text, their source and their formulae.

A LaTeX document is cut into pieces at blank lines; each piece is set on a page of its own size, so
that a picture and its source belong together exactly (PDF pages do not end where paragraphs do).
Sources come from the user's files or are made up here: sentences of a corpus and formulae.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from ...errors import InputError, ResourceError
from . import pdf, words
from .corpus import Corpus
from .formulae import formula
from .run import parts_of
from .sources import Document
from .step import Item, Picture, Random, Refused, Reject, Sample, Truth
from .warp import degrade

Found: TypeAlias = "tuple[Image.Image, Truth]"

_TIMEOUT = 120  # seconds for one run of TeX
_WIDEST = 5.0  # wider pictures get paper above and below
_BATCH = 24  # pieces in one run
_NO_PIECE = re.compile(
    r"\\(?:begin\{(?:figure|table|document|thebibliography|verbatim|lstlisting)|footnote|cite|ref\b"
    r"|eqref|label|input|include|bibliography|maketitle|tableofcontents|def\b|newcommand|write"
    r"|immediate|openout|openin|read\b|special|catcode|csname)"
)
_OVERFULL = re.compile(r"Overfull \\hbox \(([\d.]+)pt too wide")
_DISPLAY = re.compile(r"\\\[(.+?)\\\]|\\begin\{(?:equation|displaymath)\*?\}(.+?)\\end", re.DOTALL)
_MATH = re.compile(r"\$|\\\[|\\\(|\\begin\{(?:equation|align|displaymath|eqnarray|gather)")

_PREAMBLE = r"""\documentclass[%(size)dpt]{article}
\input{glyphtounicode}\pdfgentounicode=1
\usepackage{amsmath}\usepackage{amssymb}
%(more)s
\begin{document}
\newsavebox{\piecebox}\pdfhorigin=0pt\pdfvorigin=0pt
\newcommand{\shippiece}{%%
\pdfpagewidth=\dimexpr\wd\piecebox+12pt\relax
\pdfpageheight=\dimexpr\ht\piecebox+\dp\piecebox+12pt\relax
\shipout\vbox{\kern6pt\hbox{\kern6pt\box\piecebox}}}
"""
_PIECE = r"""\typeout{==piece %(number)d==}
\begin{lrbox}{\piecebox}%(text)s\end{lrbox}\shippiece
"""
_TEXT = r"\begin{minipage}{%(width)dpt}\parskip4pt%(text)s\end{minipage}"


@dataclass(frozen=True)
class Pages:
    """A maker over documents, and over made-up LaTeX.

    Attributes:
        documents: PDF and LaTeX files; their number is shared among the shards.
        shards: How many shards there are.
        seed: Of what is chosen.
        side: A picture has at most as many pixels as a square of this side.
        strength: Of damage, 0 to 1.
        parts: Pictures from one page of a PDF.
        most_pages: Pages from one PDF, spread over it.
        made_up: Pieces of made-up LaTeX in each shard.
        corpus: Their sentences.
    """

    documents: tuple[Document, ...]
    shards: int
    seed: int = 0
    side: int = 448
    strength: float = 1.0
    parts: int = 2
    most_pages: int = 40
    made_up: int = 0
    corpus: Corpus | None = None
    endless: bool = field(default=False, init=False)

    @cached_property
    def key(self) -> str:
        """All that decides what comes out."""
        names = [(str(d.path), d.path.stat().st_size, d.licence) for d in self.documents]
        corpus = self.corpus.key if self.corpus is not None else ""
        return repr(
            (
                names,
                self.shards,
                self.seed,
                self.side,
                self.strength,
                self.parts,
                self.most_pages,
                self.made_up,
                corpus,
            )
        )

    def items(self, shard: int) -> Iterator[Item]:
        """See :class:`cogvlm.data.engine.step.Maker`."""
        for number, document in parts_of(self.documents, shard, self.shards):
            rng = np.random.default_rng((self.seed, number))
            try:
                if document.path.suffix == ".tex":
                    yield from self._tex(document, number, rng)
                else:
                    yield from self._pdf(document, number, rng)
            except InputError as error:
                yield Reject(document.path.name, document.source, "latex", "unreadable", str(error))
        if self.made_up and self.corpus is not None:
            rng = np.random.default_rng((self.seed, shard, 1))
            pieces = [made_up(self.corpus, rng) for _ in range(self.made_up)]
            name = f"tex-{self.seed}-{shard:05d}"
            origin = Document(Path(name), self.corpus.source, self.corpus.licence)
            yield from self._pieces(name, origin, pieces, "", rng)

    # -- PDF ------------------------------------------------------------------------------------

    def _pdf(self, document: Document, number: int, rng: Random) -> Iterator[Item]:
        opened = pdf.open_pdf(document.path)
        total = len(opened)
        chosen = sorted(int(i) for i in rng.permutation(total)[: self.most_pages])
        for index in chosen:
            name = f"pdf-{document.path.name.split('.')[0]}-{number}-{index + 1}"
            page = opened[index]
            try:
                layer = pdf.read_layer(page)
            except Refused as refused:
                yield self._reject(name, document, refused)
                continue
            for part, found in enumerate(pdf.parts(page, layer, rng, self.side, self.parts)):
                if isinstance(found, Refused):
                    yield self._reject(f"{name}-{part}", document, found)
                else:
                    yield self._sample(f"{name}-{part}", "document", document, found, rng)
        opened.close()

    def _reject(self, name: str, document: Document, refused: Refused) -> Reject:
        return Reject(name, document.source, "latex", refused.reason, refused.detail)

    def _sample(
        self, name: str, kind: str, document: Document, found: Found, rng: Random
    ) -> Sample:
        image, truth = found
        small = min((w.box[3] - w.box[1] for w in truth.words if len(w.text) > 2), default=12.0)
        strength = self.strength * float(rng.random() < 0.6)
        image, truth = degrade(image, truth, rng, strength, text_height=1.3 * small)
        seed = int(rng.integers(2**62))
        return Sample(
            name, kind, document.source, document.licence, (Picture.of(image, truth),), seed=seed
        )

    # -- LaTeX ----------------------------------------------------------------------------------

    def _tex(self, document: Document, number: int, rng: Random) -> Iterator[Item]:
        text = document.path.read_text(encoding="utf-8", errors="replace")
        name = f"tex-{document.path.stem}-{number}"
        preamble, pieces, refused = cut_source(text)
        for place, reason in refused:
            yield Reject(f"{name}-{place}", document.source, "latex", reason)
        yield from self._pieces(name, document, pieces, preamble, rng)

    def _pieces(
        self, name: str, document: Document, pieces: Sequence[str], more: str, rng: Random
    ) -> Iterator[Item]:
        for start in range(0, len(pieces), _BATCH):
            batch = pieces[start : start + _BATCH]
            for offset, found in enumerate(self._typeset(batch, more, rng)):
                one = f"{name}-{start + offset}"
                if isinstance(found, Refused):
                    yield self._reject(one, document, found)
                    continue
                kind = "formula" if "formula" in found[1].extra else "latex"
                yield self._sample(one, kind, document, found, rng)

    def _typeset(self, batch: Sequence[str], more: str, rng: Random) -> Iterator[Found | Refused]:
        size = int(rng.choice((10, 11, 12)))
        widths = [int(rng.integers(150, 340)) for _ in batch]
        yield from self._set(batch, widths, more, size)

    def _set(
        self, batch: Sequence[str], widths: Sequence[int], more: str, size: int
    ) -> Iterator[Found | Refused]:
        """Pages of pieces; where TeX gives up over one of them, the others are set without it."""
        with tempfile.TemporaryDirectory() as folder:
            bad = typeset(Path(folder), batch, widths, more, size)
            made = Path(folder) / "pieces.pdf"
            opened = pdf.open_pdf(made) if made.exists() else None
            if opened is not None and len(opened) == len(batch):
                for number, text in enumerate(batch):
                    if number in bad:
                        yield Refused("does not compile", bad[number])
                        continue
                    try:
                        yield self._page(opened[number], text, size)
                    except Refused as refused:
                        yield refused
                opened.close()
                return
        if more:  # packages that are not installed, or fit no other document
            yield from self._set(batch, widths, "", size)
        elif len(batch) > 1:
            half = len(batch) // 2
            yield from self._set(batch[:half], widths[:half], "", size)
            yield from self._set(batch[half:], widths[half:], "", size)
        else:
            yield Refused("TeX stopped", batch[0][:60])

    def _page(self, page: Any, text: str, points: int) -> Found:
        layer = pdf.read_layer(page, strict=not _MATH.search(text))
        wide, high = layer.size
        scale = min(self.side * 0.045 / points, self.side / (wide * high) ** 0.5)
        if scale * points < 0.026 * self.side:
            raise Refused("print too small", text[:60])
        image = page.render(scale=scale).to_pil().convert("RGB")
        truth = pdf.truth_of(layer.lines).moved(
            lambda b: pdf.clip(b, (0.0, 0.0, wide, high), scale, image.size)
        )
        above = max(0, math.ceil(image.width / _WIDEST) - image.height) // 2
        if above:  # a line or two: more paper, as a reader would see it
            image = ImageOps.expand(image, (0, above, 0, above), "white")
            truth = truth.moved(lambda b: (b[0], b[1] + above, b[2], b[3] + above))
        return image, with_source(truth, text)


def with_source(truth: Truth, source: str) -> Truth:
    """A page's truth with its LaTeX; what has formulae is not asked for as plain text."""
    source = source.strip()
    display = _DISPLAY.fullmatch(source)
    if display is not None:
        return replace(truth, text="", words=(), lines=(), extra={"formula": _body(display)})
    if _MATH.search(source):
        # Signs of formulae stand in the layer in no order that a reader would know.
        plain = tuple(
            w for w in truth.words if w.text.isascii() and w.text.isalpha() and len(w.text) > 3
        )
        return replace(truth, text="", words=plain, lines=(), extra={"latex": source})
    return replace(truth, extra={"latex": source})


def _body(display: re.Match[str]) -> str:
    return str(next(filter(None, display.groups()))).strip()


def cut_source(text: str) -> tuple[str, list[str], list[tuple[int, str]]]:
    """Preamble, pieces, and places and reasons of what cannot stand alone."""
    head, mark, body = text.partition(r"\begin{document}")
    if not mark:
        head, body = "", text
    body = body.partition(r"\end{document}")[0]
    body = re.sub(r"(?<!\\)%.*", "", body)
    keep = re.findall(r"\\(?:usepackage|newcommand|DeclareMathOperator|newtheorem)\b[^\n]*", head)
    pieces, refused = [], []
    for place, piece in enumerate(re.split(r"\n\s*\n", body)):
        piece = piece.strip()
        if not piece:
            continue
        if _NO_PIECE.search(piece):
            refused.append((place, "cannot stand alone"))
        elif len(piece) < 12 or piece.count("{") != piece.count("}"):
            refused.append((place, "not a whole piece"))
        elif len(piece) > 1200:
            refused.append((place, "too long"))
        else:
            pieces.append(piece)
    return "\n".join(keep), pieces, refused


def made_up(corpus: Corpus, rng: Random) -> str:
    """A piece of LaTeX: a formula alone, or sentences with formulae."""
    if rng.random() < 0.4:
        return f"\\[{formula(rng)}\\]"
    said = [_escaped(corpus.paragraph(rng, int(rng.integers(50, 180))))]
    for _ in range(int(rng.integers(0, 3))):
        if rng.random() < 0.5:
            said.append(f"${formula(rng, small=True)}$ {_escaped(corpus.paragraph(rng, 60))}")
        else:
            said.append(f"\\[{formula(rng)}\\]")
    head = ""
    if rng.random() < 0.25:
        head = f"\\section*{{{_escaped(corpus.phrase(rng, 4))}}}\n"
    if rng.random() < 0.2:
        items = "\n".join(f"\\item {_escaped(corpus.phrase(rng, 5))}" for _ in range(3))
        kind = words.pick(rng, ("itemize", "enumerate"))
        said.append(f"\\begin{{{kind}}}\n{items}\n\\end{{{kind}}}")
    return head + "\n".join(said)


def _escaped(text: str) -> str:
    signs = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': "''",
    }
    return "".join(signs.get(c, "\\" + c if c in "#$%&_{}" else c) for c in text)


# --- TeX ---------------------------------------------------------------------------------------


def find_tex() -> str | None:
    """The compiler, if a TeX is installed."""
    return shutil.which("pdflatex")


def need_tex() -> str:
    """The compiler.

    Raises:
        ResourceError: no TeX is installed.
    """
    if (compiler := find_tex()) is None:
        raise ResourceError("no pdflatex on the PATH; install a TeX (texlive-latex-recommended)")
    return compiler


def typeset(
    folder: Path, pieces: Sequence[str], widths: Sequence[int], more: str, size: int
) -> dict[int, str]:
    """Write ``pieces.pdf`` with one page a piece; returns the pieces that have errors, and which.

    Commands cannot be run from within, and files only be written in ``folder``.

    Raises:
        ResourceError: no TeX is installed.
    """
    compiler = need_tex()
    body = ""
    for number, (text, width) in enumerate(zip(pieces, widths, strict=True)):
        # A formula alone is as wide as it is; text is broken into lines.
        alone = _DISPLAY.fullmatch(text.strip())
        inner = (
            f"$\\displaystyle {_body(alone)}$"
            if alone
            else _TEXT % {"width": width, "text": f"\n{text}\n"}
        )
        body += _PIECE % {"number": number, "text": inner}
    source = _PREAMBLE % {"size": size, "more": more} + body + "\\end{document}\n"
    (folder / "pieces.tex").write_text(source, encoding="utf-8")
    command = [compiler, "-no-shell-escape", "-interaction=nonstopmode", "pieces.tex"]
    environment = {
        "PATH": str(Path(compiler).parent) + ":/usr/bin:/bin",
        "openin_any": "p",
        "openout_any": "p",
        "HOME": str(folder),
        "SOURCE_DATE_EPOCH": "0",
    }
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=environment,
            timeout=_TIMEOUT,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {}
    log = folder / "pieces.log"
    return _errors(log.read_text(encoding="latin-1")) if log.exists() else {}


def _errors(log: str) -> dict[int, str]:
    found: dict[int, str] = {}
    number = -1
    for line in log.splitlines():
        if match := re.match(r"==piece (\d+)==", line):
            number = int(match[1])
        elif number < 0:
            continue
        elif line.startswith("!"):
            found.setdefault(number, line[:100])
        elif (match := _OVERFULL.match(line)) and float(match[1]) > 3:
            found.setdefault(number, line[:100])  # it would stand over the edge
    return found
