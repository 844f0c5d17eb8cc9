"""Conversations as plain values: :class:`Message`, :class:`Text`, :class:`Image`, :class:`Video`.

Knows nothing about tokens, pixels, the choice of frames or prompt formats.  Nothing is read here
except ``data:`` URLs; a server fetches ``http`` URLs itself and puts the bytes in.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image as PILImage

from ..errors import MessageError

Role = Literal["system", "user", "assistant"]
ImageSource: TypeAlias = "str | Path | bytes | PILImage.Image | BinaryIO"
VideoSource: TypeAlias = "str | Path | bytes | BinaryIO | tuple[PILImage.Image, ...]"

ROLES: tuple[str, ...] = get_args(Role)
VIDEO_SUFFIXES = frozenset(
    """
    .3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .webm .wmv
    """.split()  # noqa: SIM905
)
"""Names that end so are films wherever a path may be a picture or a film."""


@dataclass(frozen=True)
class Text:
    """A piece of text.

    Raises:
        MessageError: not a string, or half of a surrogate pair, which no tokenizer can encode.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise MessageError(f"text is a {type(self.text).__name__}; give a string")
        try:
            self.text.encode()
        except UnicodeEncodeError as exc:
            raise MessageError(
                f"text: character {exc.start} is half of a surrogate pair (not valid Unicode); "
                "remove or replace it"
            ) from None


@dataclass(frozen=True)
class Image:
    """A picture: a path, the bytes of a file, an open binary file, or a ``PIL.Image``.

    It is opened only when a processor encodes it, see :func:`cogvlm.processor.load_image`.
    """

    source: ImageSource

    def __repr__(self) -> str:
        # The bytes of a picture would fill a screen.
        if isinstance(self.source, bytes):
            return f"Image(<{len(self.source)} bytes>)"
        return f"Image({self.source!r})"


@dataclass(frozen=True)
class Video:
    """A film: a path, the bytes of a file, an open binary file, or its frames as pictures.

    Of a file the model's processor chooses the frames; frames given as pictures (a sequence of
    ``PIL.Image``, or an array ``uint8[T, H, W, 3]`` of RGB) are taken as they are.  A file is
    opened only when a processor encodes it, see :func:`cogvlm.processor.load_video`.

    Raises:
        MessageError: frames that are no pictures, or none at all.
    """

    source: VideoSource

    def __post_init__(self) -> None:
        source: Any = self.source  # callers are not all type-checked
        if isinstance(source, (str, Path, bytes)) or hasattr(source, "read"):
            return
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
                raise MessageError(
                    f"video frames are {source.dtype}{list(source.shape)}; give uint8[T, H, W, 3]"
                )
            source = [PILImage.fromarray(frame) for frame in source]
        if not isinstance(source, Sequence) or not all(
            isinstance(frame, PILImage.Image) for frame in source
        ):
            raise MessageError(
                f"video is a {type(source).__name__}; give a path, bytes, a binary file or frames "
                "(a list of PIL images or an array uint8[T, H, W, 3])"
            )
        if not source:
            raise MessageError("video has no frame; give at least one")
        object.__setattr__(self, "source", tuple(source))

    def __repr__(self) -> str:
        if isinstance(self.source, bytes):
            return f"Video(<{len(self.source)} bytes>)"
        if isinstance(self.source, tuple):
            return f"Video(<{len(self.source)} frames>)"
        return f"Video({self.source!r})"


Part: TypeAlias = "Text | Image | Video"


@dataclass(frozen=True)
class Message:
    """What one side says: a role and its parts, in order.

    Raises:
        MessageError: an unknown role, no part at all, a part that is not text, image or video,
            or an image or video that is not in a user message.
    """

    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise MessageError(f"unknown role {self.role!r}; known roles: {', '.join(ROLES)}")
        parts: object = self.parts  # callers are not all type-checked
        if isinstance(parts, str) or not isinstance(parts, Sequence):
            raise MessageError(
                f"{self.role} message: parts is a {type(parts).__name__}; "
                "give a tuple of Text, Image and Video"
            )
        object.__setattr__(self, "parts", tuple(parts))
        if not self.parts:
            raise MessageError(f"{self.role} message is empty; give it a text or an image")
        for part in self.parts:
            if not isinstance(part, (Text, Image, Video)):
                raise MessageError(
                    f"{self.role} message: a part is a {type(part).__name__}; "
                    "give Text, Image or Video"
                )
            if isinstance(part, Image) and self.role != "user":
                raise MessageError(f"{self.role} message has an image; only users send images")
            if isinstance(part, Video) and self.role != "user":
                raise MessageError(f"{self.role} message has a video; only users send videos")

    @property
    def text(self) -> str:
        """The text parts, each on a line of its own."""
        return "\n".join(p.text for p in self.parts if isinstance(p, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        """The image parts, in order."""
        return tuple(p for p in self.parts if isinstance(p, Image))

    @property
    def visuals(self) -> tuple[Image | Video, ...]:
        """The image and video parts, in order."""
        return tuple(p for p in self.parts if isinstance(p, (Image, Video)))


def user(*parts: str | Part | Path | bytes | PILImage.Image | BinaryIO) -> Message:
    """Build a user message: a ``str`` is text; a ``Path``, bytes, file or PIL image is a picture.

    A ``Path`` with the suffix of a film (``.mp4``, ...) is a video; write :class:`Video` around
    other sources of one.

    >>> from pathlib import Path
    >>> user(Path("bus.png"), "What is this?").text
    'What is this?'
    """
    return Message("user", tuple(_part(p) for p in parts))


def assistant(text: str) -> Message:
    """Build an assistant message."""
    return Message("assistant", (Text(text),))


def system(text: str) -> Message:
    """Build a system message."""
    return Message("system", (Text(text),))


def _part(value: Any) -> Part:
    if isinstance(value, (Text, Image, Video)):
        return value
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, Path) and value.suffix.lower() in VIDEO_SUFFIXES:
        return Video(value)
    if isinstance(value, (Path, bytes, PILImage.Image)) or hasattr(value, "read"):
        return Image(value)
    raise MessageError(
        f"a part is a {type(value).__name__}; give str (text), Path, bytes, PIL.Image or a file"
    )


def check_order(messages: Sequence[Message], train: bool = False) -> None:
    """Refuse a conversation whose order no template can write.

    At most one system message, first; then user and assistant in turn, beginning with the user.
    The last one is the user's question, or with ``train`` the assistant's answer.

    Raises:
        MessageError: any other order; the message number (from 1) is named.
    """
    start = 1 if messages and messages[0].role == "system" else 0
    if len(messages) == start:
        raise MessageError("the conversation has no user message; add one")
    for i, message in enumerate(messages[start:]):
        expected = "assistant" if i % 2 else "user"
        if message.role != expected:
            raise MessageError(
                f"message {start + i + 1} has the role {message.role!r} where {expected!r} is due; "
                "the order is: system (at most once, first), then user and assistant in turn"
            )
    last, wanted = messages[-1].role, "assistant" if train else "user"
    if last != wanted:
        purpose = "for training" if train else "for an answer"
        raise MessageError(f"the last message is the {last}'s; {purpose} it must be the {wanted}'s")


def parse_messages(items: Sequence[Mapping[str, Any]], *, files: bool = True) -> list[Message]:
    """Read messages in the form of the OpenAI chat API.

    Args:
        items: ``{"role": ..., "content": ...}`` each; ``content`` is a string or a list of
            ``{"type": "text", "text": ...}``,
            ``{"type": "image_url", "image_url": {"url": "data:..."}}``,
            ``{"type": "image", "image": path}`` and ``{"type": "video", "video": path}``.
        files: whether ``{"type": "image"}`` and ``{"type": "video"}``, which name a file of this
            machine, are allowed; a server that reads requests of strangers says no.

    Raises:
        MessageError: an unknown field, role or part type, a URL that is not ``data:``, or
            undecodable data; the message number (from 1) is named.
    """
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Sequence):
        raise MessageError(f"messages is a {type(items).__name__}; give a list of messages")
    return [_parse_one(item, f"message {i}", files) for i, item in enumerate(items, 1)]


def _parse_one(item: Any, where: str, files: bool) -> Message:
    _fields(item, ("role", "content"), (), where)
    content = item["content"]
    try:
        if isinstance(content, str):
            return Message(item["role"], (Text(content),))
        if not isinstance(content, (list, tuple)):
            raise MessageError(f"content is a {type(content).__name__}; give a string or a list")
        return Message(item["role"], tuple(_parse_part(part, files) for part in content))
    except MessageError as exc:
        raise MessageError(f"{where}: {exc}") from None


def _parse_part(part: Any, files: bool) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        _fields(part, ("type", "text"), (), "text part")
        return Text(part["text"])
    if kind == "image_url":
        _fields(part, ("type", "image_url"), (), "image_url part")
        image_url = part["image_url"]
        _fields(image_url, ("url",), ("detail",), "image_url")
        if image_url.get("detail", "auto") != "auto":
            raise MessageError(
                f"image_url: detail {image_url['detail']!r} is not supported; "
                "leave it out or give 'auto'"
            )
        return Image(_decode_url(image_url["url"]))
    if kind == "image":
        _fields(part, ("type", "image"), (), "image part")
        return _local_image(part["image"], files)
    if kind == "video":
        _fields(part, ("type", "video"), (), "video part")
        return _local_video(part["video"], files)
    raise MessageError(f"unknown part type {kind!r}; known types: text, image_url, image, video")


def _local_image(source: Any, files: bool) -> Image:
    if not files:
        raise MessageError("part type 'image' names a local file, which is off here; use image_url")
    if not isinstance(source, (str, Path, bytes, PILImage.Image)):
        raise MessageError(f"image is a {type(source).__name__}; give the path of a file")
    return Image(source)


def _local_video(source: Any, files: bool) -> Video:
    if not files:
        raise MessageError("part type 'video' names a local file, which is off here")
    return Video(source)


def _fields(item: Any, needed: Sequence[str], optional: Sequence[str], where: str) -> None:
    if not isinstance(item, Mapping):
        raise MessageError(f"{where} is a {type(item).__name__}; give an object")
    for key in needed:
        if key not in item:
            raise MessageError(f"{where} has no {key!r}; add it")
    for key in item:
        if key not in needed and key not in optional:
            known = ", ".join((*needed, *optional))
            raise MessageError(f"{where}: field {key!r} is not supported; known fields: {known}")


def _decode_url(url: Any) -> bytes:
    if not isinstance(url, str):
        raise MessageError(f"image_url: url is a {type(url).__name__}; give a string")
    scheme = url.partition(":")[0].lower()[:20] if ":" in url else ""
    if scheme in ("http", "https"):
        raise MessageError(
            f"image_url: {scheme} URLs are not fetched here; download the picture and give its "
            "bytes as a data: URL"
        )
    if scheme != "data":
        raise MessageError(
            f"image_url: scheme {scheme!r} is not supported; give a data: URL"
            " (data:image/png;base64,...)"
        )
    header, comma, payload = url[5:].partition(",")
    if not comma:
        raise MessageError("image_url: the data: URL has no comma; give data:image/png;base64,...")
    data = unquote_to_bytes(payload)
    if header.lower().endswith(";base64"):
        try:
            # Line breaks are common in hand-made URLs; any other foreign character is an error.
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error as exc:
            raise MessageError(f"image_url: not valid base64 ({exc}); encode it again") from None
    if not data:
        raise MessageError("image_url: the data: URL is empty; put the picture's bytes in")
    return data
