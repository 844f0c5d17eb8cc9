"""PDF text layers, LaTeX pieces, and what an OCR engine reads."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cogvlm.cli import app
from cogvlm.data.engine import latex
from cogvlm.data.engine.formulae import formula
from cogvlm.data.engine.ink import Canvas, Style
from cogvlm.data.engine.label import Label
from cogvlm.data.engine.latex import Pages, cut_source, with_source
from cogvlm.data.engine.sources import Document, find_documents
from cogvlm.data.engine.step import Reject, Sample, Truth
from cogvlm.data.sft import open_source
from cogvlm.data.sft.check import check
from cogvlm.errors import ConfigError, ResourceError
from data.engine_parts import LATIN, setting

needs_pdf = pytest.mark.skipif(find_spec("pypdfium2") is None, reason="pypdfium2 is not installed")
needs_tex = pytest.mark.skipif(latex.find_tex() is None, reason="no TeX is installed")


def write_pdf(path: Path, rows: list[str], size: tuple[int, int] = (420, 600)) -> None:
    """A PDF of one page in Helvetica, with no library: its text layer is known."""
    text = " ".join(f"1 0 0 1 40 {size[1] - 60 - 16 * i} Tm ({r}) Tj" for i, r in enumerate(rows))
    content = f"BT /F1 11 Tf {text} ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 /MediaBox [0 0 %d %d] >>" % size,
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"xref\n0 6\n0000000000 65535 f \n" + table
    out += b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(out) - len(table) - 29
    )
    path.write_bytes(out)


def samples(maker: Pages) -> tuple[list[Sample], list[Reject]]:
    items = list(maker.items(0))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Reject)]


@needs_pdf
def test_pages_of_a_pdf_have_the_words_of_its_layer(tmp_path: Path) -> None:
    rows = [text[:60] for text in LATIN[:20]]
    write_pdf(tmp_path / "a.pdf", rows)
    document = Document(tmp_path / "a.pdf", "tests", "CC0-1.0")
    maker = Pages((document,), 1, strength=0.0, parts=6)
    made, refused = samples(maker)
    assert made and {r.reason for r in refused} <= {"wider than 6:1", "print too small"}
    every = "\n".join(rows)
    for sample in made:
        picture = sample.pictures[0]
        assert picture.truth.text and picture.truth.text in every
        dark = np.asarray(picture.open().convert("L")) < 160
        left = dark.copy()
        for word in picture.truth.words:
            x0, y0, x1, y1 = (int(v) for v in word.box)
            assert dark[y0 : y1 + 1, x0 : x1 + 1].any(), word
            left[max(0, y0 - 1) : y1 + 2, max(0, x0 - 1) : x1 + 2] = False
        assert left.sum() < 0.01 * dark.sum()  # whatever is printed is in the truth
    assert samples(maker)[0] == made


@needs_pdf
def test_packed_broken_and_empty_documents(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [t[:60] for t in LATIN[:12]])
    (tmp_path / "b.pdf.gz").write_bytes(gzip.compress((tmp_path / "a.pdf").read_bytes()))
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.4 no")
    write_pdf(tmp_path / "d.pdf", ["x"])
    found = find_documents([tmp_path], "mine")
    assert [d.path.name for d in found] == ["a.pdf", "b.pdf.gz", "c.pdf", "d.pdf"]
    made, refused = samples(Pages(tuple(found), 1, parts=8))
    assert {s.licence for s in made} == {"mine"}
    assert {s.id.split("-")[1] for s in made} == {"a", "b"}
    reasons = {r.id: r.reason for r in refused}
    assert reasons["c.pdf"] == "unreadable" and "no text layer" in reasons.values()


@needs_pdf
def test_the_command_reads_documents_and_refuses_none(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [t[:60] for t in LATIN[:20]])
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["data", "latex", str(out), str(tmp_path / "a.pdf"), "--parts", "6"]
    )
    assert result.exit_code == 0, result.output
    report = check(open_source(out), decode=True)
    assert report.good and not report.bad
    for arguments, said in (([str(tmp_path / "no.pdf")], "no such file"), ([str(out)], "no PDF")):
        bad = CliRunner().invoke(app, ["data", "latex", str(tmp_path / "x"), *arguments])
        assert bad.exit_code == 2 and said in bad.output


def test_a_source_is_cut_where_its_paragraphs_end() -> None:
    text = (
        "\\documentclass{book}\n\\usepackage{amsmath}\n\\newcommand{\\R}{R}\n\\begin{document}\n"
        "One paragraph of $x$ here. % a remark\n\nAnother one\nwith 50\\% of all.\n\n"
        "\\begin{figure} no \\end{figure}\n\nshort\n\n\\[ a = b + c + d \\]\n\n\\input{secrets}\n"
        "\\end{document}\nnever"
    )
    preamble, pieces, refused = cut_source(text)
    assert preamble == "\\usepackage{amsmath}\n\\newcommand{\\R}{R}"
    assert pieces == [
        "One paragraph of $x$ here.",
        "Another one\nwith 50\\% of all.",
        "\\[ a = b + c + d \\]",
    ]
    assert [reason for _, reason in refused] == [
        "cannot stand alone",
        "not a whole piece",
        "cannot stand alone",
    ]


def test_what_has_formulae_is_not_asked_for_as_text() -> None:
    truth = Truth("a b", extra={})
    assert with_source(truth, "\\[ x^2 \\]").extra == {"formula": "x^2"}
    assert with_source(truth, "\\[ x^2 \\]").text == ""
    assert with_source(truth, "so $x$ is").text == "" and with_source(truth, "plain").text == "a b"
    assert with_source(truth, "plain").extra == {"latex": "plain"}


def test_made_up_formulae_are_whole() -> None:
    rng = np.random.default_rng(0)
    made = [formula(rng) for _ in range(300)]
    assert len(set(made)) > 250
    for text in made:
        assert text.count("{") == text.count("}") and text.count("\\left") == text.count("\\right")


@needs_pdf
@needs_tex
@pytest.mark.slow
def test_latex_is_set_and_paired_with_its_source(tmp_path: Path) -> None:
    body = [
        "A paragraph about the river and its boats, long enough to be broken into lines.",
        "\\[ E = m c^2 + \\frac{a}{b} \\]",
        "Here \\undefinedcommand stands alone in this text.",
        "The sum $\\sum_{i=1}^n i$ is known since long ago to everyone.",
    ]
    text = "\n\n".join(body)
    (tmp_path / "a.tex").write_text(f"\\begin{{document}}\n{text}\n\\end{{document}}")
    document = Document(tmp_path / "a.tex", "tests", "CC0-1.0")
    maker = Pages((document,), 1, strength=0.0, made_up=4, corpus=setting().corpus)
    made, refused = samples(maker)
    kinds = {s.id: s for s in made}
    assert kinds["tex-a-0-1"].kind == "formula"
    assert kinds["tex-a-0-1"].pictures[0].truth.extra == {"formula": "E = m c^2 + \\frac{a}{b}"}
    assert (
        kinds["tex-a-0-0"].pictures[0].truth.text.replace("-\n", "").replace("\n", " ") == body[0]
    )
    assert [r.reason for r in refused if r.id == "tex-a-0-2"] == ["does not compile"]
    assert kinds["tex-a-0-3"].pictures[0].truth.extra == {"latex": body[3]}
    assert any(s.id.startswith("tex-0-00000") for s in made)
    again = samples(maker)[0]
    assert [s.pictures[0].data for s in again] == [s.pictures[0].data for s in made]


def test_without_a_tex_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(latex, "find_tex", lambda: None)
    with pytest.raises(ResourceError, match="no pdflatex on the PATH"):
        latex.need_tex()
    (tmp_path / "a.tex").write_text("text")
    result = CliRunner().invoke(
        app, ["data", "latex", str(tmp_path / "o"), str(tmp_path / "a.tex")]
    )
    assert result.exit_code == 1 and "pdflatex" in result.output


# --- label -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_ocr_engine_labels_what_it_is_sure_of(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    canvas = Canvas((640, 240), (255, 255, 255))
    style = Style(setting().faces.text[0].path, 28)
    canvas.line(30, 70, "The river runs to the sea", style)
    canvas.line(30, 150, "Platform 4, track 17", style)
    canvas.image.save(tmp_path / "text.png")
    Image.new("RGB", (200, 200), "white").save(tmp_path / "blank.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    items = {item.id: item for item in Label(tmp_path, 1, "mine").items(0)}
    sample = items["label-text.png"]
    assert isinstance(sample, Sample) and sample.licence == "mine"
    truth = sample.pictures[0].truth
    assert truth.text == "The river runs to the sea\nPlatform 4, track 17"
    for line, own in zip(truth.lines, canvas.lines, strict=True):
        np.testing.assert_allclose(line.box, own.box, atol=14)
    refused = {k: item.reason for k, item in items.items() if isinstance(item, Reject)}
    assert refused == {"blank.jpg": "no text", "broken.png": "unreadable"}


class Reader:
    """Answers as the OCR engine does."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def __call__(self, pixels: Any) -> Any:
        count = len(self.scores)
        boxes = [np.array([[0, i], [50, i], [50, i + 9], [0, i + 9]]) for i in range(count)]
        texts = [f"line {i}" for i in range(count)]
        return SimpleNamespace(boxes=boxes or None, txts=texts, scores=self.scores)


@pytest.mark.parametrize(
    ("scores", "lines", "reason"),
    [
        ([0.99, 0.95], 2, ""),
        ([0.99, 0.95, 0.99, 0.5], 3, ""),
        ([0.99, 0.5], 0, "unsure of its text"),
        ([], 0, "no text"),
    ],
)
def test_rules_of_confidence(
    scores: list[float], lines: int, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cogvlm.data.engine.label._engine", lambda: Reader(scores))
    Image.new("RGB", (100, 60), "white").save(tmp_path / "a.png")
    (item,) = Label(tmp_path, 1).items(0)
    if isinstance(item, Reject):
        assert item.reason == reason
        return
    truth = item.pictures[0].truth
    assert len(truth.lines) == lines and bool(truth.text) == (lines == len(scores))


def test_impossible_confidences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sure is 7"):
        Label(tmp_path, 1, sure=7)
    result = CliRunner().invoke(app, ["data", "label", str(tmp_path), str(tmp_path / "o")])
    assert result.exit_code == 2 and "no pictures" in result.output
