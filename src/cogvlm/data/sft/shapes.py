"""Objects as people write them -> conversations.  Knows nothing about the files they come from.

=============  =====================================================================
``messages``   OpenAI: ``role`` and ``content``, a text or parts
``conversations``  LLaVA and ShareGPT ``from``/``value``, CogVLM-SFT ``role``/``content``
``texts``      The Cauldron, FineVision: ``user`` and ``assistant`` in each
``captions``   CogVLM-SFT descriptions: ``{"role": "caption", "content"}``, the first is taken
``question``   with ``answer`` (or ``truth``): one turn
``caption``    or ``text``: the answer to a question that all records share
=============  =====================================================================

``<image>`` and ``<video>`` in the user's text are the places of ``image``, ``images``, ``video``
and ``videos``, in order; where the text has none, they stand in front of the first question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from ...errors import InputError
from ...processor.messages import Image, Message, Part, Role, Text, Video
from ...score import edit_distance
from .media import Files
from .record import check_turns

Shape: TypeAlias = (
    'Literal["messages", "conversations", "texts", "captions", "question", "caption"]'
)

Kind = Literal["image", "video"]

_KEYS: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "texts": ("texts",),
    "captions": ("captions",),
    "question": ("question", "answer", "truth"),
    "caption": ("caption", "text"),
}
_VISUALS = ("image", "images", "file_name", "video", "videos")
_ALWAYS = ("id", "system", *_VISUALS)
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Names that others use for what we would otherwise take for a record without a picture.
_FOREIGN = {
    "img": "image",
    "img_path": "image",
    "image_path": "image",
    "image_paths": "images",
    "image_file": "image",
    "image_url": "image",
    "picture": "image",
    "photo": "image",
    "video_path": "video",
}
_MARK = re.compile("<(image|video)>")
_HAN = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Mark:
    """The place of a picture or video that is given beside the text."""

    kind: Kind


Item: TypeAlias = "str | Mark | Image | Video"
Turn: TypeAlias = "tuple[Role, list[Item]]"


@dataclass(frozen=True)
class Conversation:
    """What an object says."""

    messages: tuple[Message, ...]
    id: str | None
    unread: frozenset[str]
    unplaced: bool


def shape_of(values: Mapping[str, Any], only: Sequence[Shape] = ()) -> Shape:
    """How the object is written.

    Args:
        values: the object.
        only: shapes that may be; none for all.

    Raises:
        InputError: no key of a known shape.
    """
    allowed: Iterable[Shape] = only or _KEYS
    for shape in allowed:
        if any(key in values for key in _KEYS[shape]):
            return shape
    wanted = [keys[0] for shape, keys in _KEYS.items() if shape in allowed]
    every = [key for keys in _KEYS.values() for key in keys]
    hints = [f"{k!r} is near {near[0]!r}" for k in values if (near := get_close_matches(k, every))]
    raise InputError(
        f"none of the keys {', '.join(map(repr, wanted))}"
        + (f"; {hints[0]}" if hints else f"; found {', '.join(map(repr, values)) or 'nothing'}")
    )


def read_object(
    values: Any,
    files: Files,
    question: str | None = None,
    only: Sequence[Shape] = (),
    given: Sequence[Image | Video] = (),
) -> Conversation:
    """The conversation that an object holds.

    Args:
        values: the object, as parsed from JSON or a row of a table.
        files: finds its pictures.
        question: of records that have none of their own.
        only: shapes that may be; none for all.
        given: pictures that the record's place gives it, where it names none itself.

    Raises:
        InputError: what is wrong with it.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"a {type(values).__name__} where an object is expected")
    # Tables have every column in every row: nothing in it is as good as no column.
    values = {key: value for key, value in values.items() if value is not None}
    shape = shape_of(values, only)
    unread = _unread(values, shape, bool(given))
    images, videos = _visuals(values, files)
    if not images and not videos:
        images = [v for v in given if isinstance(v, Image)]
        videos = [v for v in given if isinstance(v, Video)]
    if shape in ("caption", "captions") and question is None and not images and not videos:
        raise InputError("a caption but no picture; name it with 'image'")
    turns = _TURNS[shape](values, files, _Question(question, bool(videos)))
    if "system" in values:
        turns.insert(0, ("system", [_text(values["system"], "'system'")]))
    # Only where marks are the custom is their absence worth a word.
    unplaced = (
        _place(turns, images, videos) and not given and shape in ("messages", "conversations")
    )
    messages = tuple(Message(role, _parts(items)) for role, items in turns)
    check_turns(messages)
    return Conversation(messages, _id(values), unread, unplaced)


@dataclass(frozen=True)
class _Question:
    """The question of records that have none of their own."""

    given: str | None
    video: bool

    def asking(self, answer: str) -> str:
        if self.given is not None:
            return self.given
        if len(_HAN.findall(answer)) * 3 > len(answer):
            return "描述这段视频。" if self.video else "描述这张图片。"
        return "Describe this video." if self.video else "Describe this picture."


def _id(values: Mapping[str, Any]) -> str | None:
    found = values.get("id")
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (str, int)) or found == "":
        raise InputError(f"'id' is {found!r}; give a text or a whole number")
    return str(found)


def _unread(values: Mapping[str, Any], shape: Shape, given: bool) -> frozenset[str]:
    known = {*_ALWAYS, *_KEYS[shape]}
    unread = {str(key) for key in values} - known
    seen = given or any(key in values for key in _VISUALS)
    for key in sorted(unread):
        near = _FOREIGN.get(key.lower()) if not seen else None
        near = near or next((k for k in known - values.keys() if _typo(key, k)), None)
        if near is not None:
            raise InputError(f"key {key!r} is not read; did you mean {near!r}?")
    return frozenset(unread)


def _typo(key: str, known: str) -> bool:
    if len(known) < 4 or key == known + "s" or known == key + "s":
        return False
    limit = 1 if len(known) < 5 else 2
    return abs(len(key) - len(known)) <= limit and edit_distance(key.lower(), known) <= limit


def _visuals(values: Mapping[str, Any], files: Files) -> tuple[list[Image], list[Video]]:
    images: list[Image] = []
    videos: list[Video] = []
    for key in _VISUALS:
        if key not in values:
            continue
        value = values[key]
        for one in value if isinstance(value, (list, tuple)) else [value]:
            found = files.open(one, key.startswith("video"))
            if isinstance(found, Video):
                videos.append(found)
            else:
                images.append(found)
    return images, videos


# --- shapes ------------------------------------------------------------------------------------


def _conversations(values: Mapping[str, Any], files: Files, question: _Question) -> list[Turn]:
    return [
        (role, _content(content, files, role, number))
        for number, turn in enumerate(_list(values, "conversations"), 1)
        for role, content in [_said(turn, number)]
    ]


def _messages(values: Mapping[str, Any], files: Files, question: _Question) -> list[Turn]:
    return [
        (role, _content(content, files, role, number))
        for number, turn in enumerate(_list(values, "messages"), 1)
        for role, content in [_said(turn, number)]
    ]


def _texts(values: Mapping[str, Any], files: Files, question: _Question) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate(_list(values, "texts"), 1):
        if not isinstance(pair, Mapping) or not {"user", "assistant"} <= pair.keys():
            raise InputError(f"text {number} has no 'user' and 'assistant'")
        turns.append(("user", _split(_text(pair["user"], f"question {number}"))))
        turns.append(("assistant", [_text(pair["assistant"], f"answer {number}")]))
    return turns


def _captions(values: Mapping[str, Any], files: Files, question: _Question) -> list[Turn]:
    captions = _list(values, "captions")
    if not captions or not isinstance(captions[0], Mapping) or "content" not in captions[0]:
        raise InputError("the first caption has no 'content'")
    answer = _text(captions[0]["content"], "the caption")
    return [("user", _split(question.asking(answer))), ("assistant", [answer])]


def _question(values: Mapping[str, Any], files: Files, question: _Question) -> list[Turn]:
    if "answer" in values and "truth" in values:
        raise InputError("both 'answer' and 'truth'; give one of them")
    key = "truth" if "truth" in values else "answer"
    if key not in values:
        raise InputError("a 'question' but no 'answer'; add it")
    answer = _text(values[key], f"{key!r}")
    asked = values.get("question", question.given)
    if asked is None:
        raise InputError(f"{key!r} but no 'question'; add it, or one for all with --question")
    return [("user", _split(_text(asked, "'question'"))), ("assistant", [answer])]


def _caption(values: Mapping[str, Any], files: Files, question: _Question) -> list[Turn]:
    answer = _text(values.get("caption", values.get("text")), "the caption")
    return [("user", _split(question.asking(answer))), ("assistant", [answer])]


_TURNS: dict[Shape, Callable[[Mapping[str, Any], Files, _Question], list[Turn]]] = {
    "messages": _messages,
    "conversations": _conversations,
    "texts": _texts,
    "captions": _captions,
    "question": _question,
    "caption": _caption,
}


def _list(values: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = values[key]
    if not isinstance(found, (list, tuple)):
        raise InputError(f"{key!r} is a {type(found).__name__}; give a list")
    return found


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is a {type(value).__name__}; give a text")
    return value


def _said(turn: Any, number: int) -> tuple[Role, Any]:
    """Role and content of a turn, by either pair of names."""
    if not isinstance(turn, Mapping):
        raise InputError(f"turn {number} is a {type(turn).__name__}; give an object")
    for who, what in (("from", "value"), ("role", "content")):
        if turn.get(who) is not None:
            if turn.get(what) is None:
                raise InputError(f"turn {number} has a {who!r} but no {what!r}")
            role = turn[who]
            if not isinstance(role, str) or role.lower() not in _ROLES:
                raise InputError(
                    f"turn {number}: unknown role {role!r}; known: {', '.join(sorted(_ROLES))}"
                )
            return _ROLES[role.lower()], turn[what]
    raise InputError(f"turn {number} has neither 'from' nor 'role'")


def _content(content: Any, files: Files, role: Role, number: int) -> list[Item]:
    if isinstance(content, str):
        return _split(content) if role == "user" else [content]
    if not isinstance(content, (list, tuple)):
        raise InputError(f"turn {number}: the content is a {type(content).__name__}; give a text")
    return [_part(part, files, f"turn {number}") for part in content]


def _part(part: Any, files: Files, where: str) -> Item:
    kind = part.get("type") if isinstance(part, Mapping) else None
    # Tables give every part all keys of all parts.
    value = part.get(kind) if kind is not None else None
    if kind == "text":
        return _text(value, f"{where}: a text part")
    if kind in ("image", "video"):
        return Mark(kind) if value is None else files.open(value, kind == "video")
    if kind in ("image_url", "video_url"):
        return files.open(
            value.get("url") if isinstance(value, Mapping) else value, kind == "video_url"
        )
    raise InputError(
        f"{where}: part type {kind!r} is not known; known: text, image, image_url, video, video_url"
    )


# --- places ------------------------------------------------------------------------------------


def _split(text: str) -> list[Item]:
    """Text and the marks in it; what white space lies around a mark is layout, not text."""
    items: list[Item] = []
    at = 0
    for mark in _MARK.finditer(text):
        if before := text[at : mark.start()].strip():
            items.append(before)
        items.append(Mark("image" if mark[1] == "image" else "video"))
        at = mark.end()
    rest = text[at:] if not at else text[at:].strip()
    return [*items, rest] if rest or not items else items


def _place(turns: list[Turn], images: list[Image], videos: list[Video]) -> bool:
    """Put pictures where their marks are; whether there were pictures and no mark at all."""
    marks = [item.kind for _, items in turns for item in items if isinstance(item, Mark)]
    first = next((items for role, items in turns if role == "user"), None)
    if not marks and first is not None:
        first[:0] = [*images, *videos]
        return bool(images or videos)
    # LLaVA writes <image> for a video too.
    if "video" not in marks and not images:
        left: dict[Kind, list[Image | Video]] = {
            "image": [*videos],
            "video": [],
        }
    else:
        left = {"image": [*images], "video": [*videos]}
    for kind, there in left.items():
        if marks.count(kind) != len(there):
            raise InputError(
                f"{marks.count(kind)} <{kind}> in the text for {len(there)} of '{kind}'; "
                "give as many of one as of the other"
            )
    for _, items in turns:
        items[:] = [left[i.kind].pop(0) if isinstance(i, Mark) else i for i in items]
    return False


def _parts(items: Sequence[Item]) -> tuple[Part, ...]:
    return tuple(Text(item) if isinstance(item, str) else item for item in items)  # type: ignore[misc]
