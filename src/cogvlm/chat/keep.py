"""Conversations in files: ``.jsonl`` to go on with, ``.md`` to read."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from ..errors import InputError, MessageError
from ..journal import dump, read_object, write_whole
from ..processor import Image, Message, Text, parse_messages

_MOST = 200_000_000  # bytes; pictures may be in it


def save_messages(path: Path, messages: Sequence[Message]) -> None:
    """Write a conversation: all of it is there, or what was there before.

    Raises:
        InputError: another suffix than ``.jsonl`` or ``.md``.
        ResourceError: the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        data = b"".join(dump({"role": m.role, "content": _content(m)}) for m in messages)
    elif kind == ".md":
        data = "\n".join(f"## {m.role}\n\n{_markdown(m)}\n" for m in messages).encode()
    else:
        raise InputError(f"{path}: end the name in .jsonl (to load again) or .md (to read)")
    write_whole(path, data)


def load_messages(path: Path) -> list[Message]:
    """Read what :func:`save_messages` wrote as ``.jsonl``.

    Raises:
        InputError: it is something else; the line is named.
    """
    if path.suffix.lower() == ".md":
        raise InputError(f"{path}: .md is for reading; only .jsonl can be loaded")
    try:
        if path.stat().st_size > _MOST:
            raise InputError(f"{path}: over {_MOST // 1_000_000} MB, no conversation")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from error
    messages: list[Message] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            values = read_object(line, f"{path}:{number}")
            try:
                messages += parse_messages([values])
            except MessageError as error:
                raise InputError(f"{path}:{number}: {error}") from None
    if not messages:
        raise InputError(f"{path}: holds no message")
    return messages


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not message.visuals:
        return message.text
    return [_part(part) for part in message.parts]


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    kind = "image" if isinstance(part, Image) else "video"
    if isinstance(part.source, (str, Path)):
        return {"type": kind, kind: str(Path(part.source).absolute())}
    if kind == "image" and isinstance(part.source, bytes):  # it was fetched
        url = f"data:image;base64,{base64.b64encode(part.source).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}
    raise InputError(f"a {kind} that is no file cannot be saved")


def _markdown(message: Message) -> str:
    return "\n\n".join(
        part.text if isinstance(part, Text) else f"![{shown(part)}](<{shown(part)}>)"
        for part in message.parts
    )


def shown(part: Any) -> str:
    """A picture or video by its path, or by what it is."""
    source = part.source
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, PILImage.Image):
        return f"picture, {source.width}x{source.height}"
    size = f", {len(source)} bytes" if isinstance(source, bytes) else ""
    return f"picture{size}"
