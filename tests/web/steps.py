"""What a person does on the page, as steps for the tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from PIL import Image

Visit = Callable[..., Any]


def png(width: int = 200, height: int = 100, colour: str = "teal", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, kind)
    return out.getvalue()


def give(page: Any, *pictures: bytes, mime: str = "image/png") -> None:
    before = page.locator("#pictures li").count()
    files = [
        {"name": f"p{before + i}.png", "mimeType": mime, "buffer": p}
        for i, p in enumerate(pictures)
    ]
    page.set_input_files("#file", files)
    page.locator("#pictures li").nth(before + len(pictures) - 1).wait_for()


def ask(page: Any, question: str, wait: bool = True) -> None:
    done = page.locator(".answer footer").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        page.locator(".answer footer").nth(done).wait_for()


def answer(page: Any) -> str:
    return str(page.locator(".answer .text").last.inner_text())


def problem(page: Any) -> str:
    return str(page.locator(".problem").last.inner_text())
