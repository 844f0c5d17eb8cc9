"""Material that may be had on any Debian machine, and under which terms.

Each licence is that of the package, as its ``copyright`` file has it.  None forbids to train on
the material and to pass on the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path("/usr/share/doc")
TEX = Path("/usr/share/texmf/doc"), Path("/usr/share/texlive/texmf-dist/doc")


@dataclass(frozen=True)
class Origin:
    """A place of documents and their licence."""

    name: str
    licence: str
    folder: Path
    pattern: str = "**/*.pdf*"


ORIGINS = (
    Origin("lm-fonts", "GUST-Font-License", DOCS / "fonts-lmodern"),
    Origin("tex-gyre-fonts", "GUST-Font-License", DOCS / "fonts-texgyre"),
    Origin("tex-gyre-tests", "GUST-Font-License", TEX[0] / "fonts"),
    Origin("valgrind-manual", "GFDL-1.2-or-later", DOCS / "valgrind"),
    Origin("bzip2-manual", "bzip2-1.0.6", DOCS / "bzip2"),
    Origin("nettle-manual", "GAP (public domain text)", DOCS / "nettle-dev"),
    Origin("libtasn1-manual", "GFDL-1.3-or-later", DOCS / "libtasn1-doc"),
    Origin("zlib-crc", "Zlib", DOCS / "zlib1g-dev"),
    Origin("fontconfig-manual", "HPND", DOCS / "fontconfig"),
    Origin("mime-info-spec", "GPL-2.0-or-later", DOCS / "shared-mime-info"),
    Origin("texlive-docs", "LPPL-1.3c and others that are free, see texlive-doc",
           TEX[1] / "latex"),
    Origin("texlive-docs", "LPPL-1.3c and others that are free, see texlive-doc",
           TEX[1] / "generic"),
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A file to read pages from."""

    path: Path
    source: str
    licence: str


def find_documents(paths: Sequence[Path], licence: str) -> list[Document]:
    """Documents of the user's files and folders; without any, those of :data:`ORIGINS` here."""
    if not paths:
        return [
            Document(path, origin.name, origin.licence)
            for origin in ORIGINS
            if origin.folder.is_dir()
            for path in sorted(origin.folder.glob(origin.pattern))
            if _is_document(path)
        ]
    found = []
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        name = path.name if path.is_dir() else path.parent.name or "documents"
        found += [Document(f, name, licence or "not stated") for f in files if _is_document(f)]
    return found


def _is_document(path: Path) -> bool:
    return path.name.lower().endswith((".pdf", ".pdf.gz", ".tex"))
