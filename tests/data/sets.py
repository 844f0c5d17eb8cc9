"""Small training sets of every format, made anew by each test."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (40, 20), format: str = "PNG") -> bytes:
    """The bytes of a picture that differs by seed."""
    out = io.BytesIO()
    Image.new("RGB", size, (seed * 40 % 256, seed * 7 % 256, 90)).save(out, format)
    return out.getvalue()


def pictures(folder: Path, count: int, suffix: str = ".png") -> list[str]:
    """Write so many pictures; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03}{suffix}" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(picture(i, format="JPEG" if suffix == ".jpg" else "PNG"))
    return names


def said(*texts: str) -> list[dict[str, str]]:
    """Turns as LLaVA writes them."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def llava(folder: Path, count: int = 4) -> list[dict[str, Any]]:
    """Records with a picture each, and the pictures."""
    return [
        {
            "id": f"r{i}",
            "image": name,
            "conversations": said(f"<image>\nWhat is {i}?", f"It is {i}"),
        }
        for i, name in enumerate(pictures(folder, count))
    ]


def write(path: Path, rows: list[Any], indent: int | None = None) -> Path:
    """Rows as JSON lines, or as a list where the name says .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """An archive of these members, in order."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sft(folder: Path, count: int = 3) -> Path:
    """A folder in the layout of CogVLM-SFT-311K: captions and dialogues, English and Chinese."""
    details, single = folder / "details", folder / "single"
    for part in (details, single):
        for name in pictures(part / "images", count, ".jpg"):
            for language, question, answer in (
                ("en", "What is it?", "A grey field."),
                ("zh", "这是什么？", "一片灰色的田野。"),
            ):
                if part is details:
                    value: Any = {"captions": [{"role": "caption", "content": answer}]}
                else:
                    turns = [("user", question), ("assistant", answer)]
                    value = {"conversations": [{"role": r, "content": c} for r, c in turns]}
                target = part / f"labels_{language}" / f"{Path(name).stem}.json"
                target.parent.mkdir(exist_ok=True)
                target.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return folder
