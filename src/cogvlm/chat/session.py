"""The state of a conversation and the commands that change it.

Knows neither model nor terminal: a line of input becomes either an :class:`Ask`, which somebody
answers, or something :class:`Said`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..processor import Image, Message, Text, Video, assistant, system
from ..processor.messages import VIDEO_SUFFIXES, Part
from ..settings import GenerationSettings
from .keep import load_messages, save_messages, shown
from .pictures import leading_pictures, picture, typed_path

COMMANDS = {
    "/image": ("PATH|URL", "add a picture to the next question; a path alone does too"),
    "/images": ("", "the pictures of the conversation"),
    "/undo": ("", "take back the last question and its answer"),
    "/retry": ("", "answer the last question again"),
    "/reset": ("", "forget everything, the pictures too"),
    "/system": ("[TEXT]", "a system message for the conversation; without TEXT none"),
    "/save": ("FILE", "write the conversation: .jsonl to load again, .md to read"),
    "/load": ("FILE", "go on with a saved .jsonl"),
    "/set": ("[NAME VALUE]", "change how answers are chosen, such as: /set temperature 0.5"),
    "/help": ("", "this list"),
    "/quit": ("", "end; Ctrl-D does too"),
}


@dataclass(frozen=True)
class Ask:
    """The conversation wants an answer: give it to :meth:`Session.answered`."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Said:
    """Something to tell the person; ``end``: and that was all."""

    text: str = ""
    end: bool = False


class Session:
    """One conversation.

    Args:
        settings: How answers are chosen.
        system_text: A system message.
    """

    def __init__(
        self, settings: GenerationSettings | None = None, system_text: str | None = None
    ) -> None:
        self.settings = settings or GenerationSettings()
        self._system = system_text
        self._turns: list[Message] = []  # user and assistant in turn
        self._pending: list[Image | Video] = []  # for the next question
        self._asked: Message | None = None  # the question that waits for its answer
        self._before: list[Message] = []  # what a retry is to replace

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that was said, answered questions only."""
        first = [] if self._system is None else [system(self._system)]
        return (*first, *self._turns)

    def add(self, typed: str) -> str:
        """Add a picture or a video to the next question; returns how it is shown.

        Raises:
            InputError, DownloadError: it cannot be read.
        """
        part = _part(typed)
        self._pending.append(part)
        return shown(part)

    def take(self, line: str) -> Ask | Said:
        """One line of input, which may itself have several.

        Raises:
            CogVLMError: it cannot be done; the conversation is as before.
        """
        line = line.strip()
        if not line:
            return Said()
        paths, rest = leading_pictures(line)
        if paths:
            parts = [_part(str(path)) for path in paths]
            self._pending += parts
            if rest:
                return self._ask(rest)
            return Said("\n".join(f"added {shown(part)}" for part in parts))
        if not line.startswith("/"):
            return self._ask(line)
        name, value = (*line.split(maxsplit=1), "")[:2]
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            raise InputError(f"{name}: no such command or file; {hint}")
        if value and not COMMANDS[name][0]:
            raise InputError(f"{name} takes nothing behind it, got {value!r}")
        return self._acts()[name](value)

    def answered(self, text: str) -> None:
        """Note the answer; without one all is as before the question, its pictures kept."""
        assert self._asked is not None
        asked, self._asked = self._asked, None
        before, self._before = self._before, []
        if text.strip():
            self._turns += [asked, assistant(text)]
        elif before:
            self._turns += before
        else:
            self._pending = [*asked.visuals, *self._pending]

    def _ask(self, question: str) -> Ask:
        parts: list[Part] = [*self._pending, Text(question)]
        self._asked = Message("user", tuple(parts))
        self._pending = []
        return Ask((*self.messages, self._asked))

    def _acts(self) -> dict[str, Callable[[str], Ask | Said]]:
        return {
            "/image": self._image,
            "/images": self._images,
            "/undo": self._undo,
            "/retry": self._retry,
            "/reset": self._reset,
            "/system": self._system_text,
            "/save": self._save,
            "/load": self._load,
            "/set": self._set,
            "/help": self._help,
            "/quit": self._quit,
        }

    # --- commands ----------------------------------------------------------------------------

    def _image(self, value: str) -> Said:
        return Said(f"added {self.add(value)}")

    def _images(self, _: str) -> Said:
        asked = [f"asked   {shown(part)}" for turn in self._turns for part in turn.visuals]
        next_ = [f"next    {shown(part)}" for part in self._pending]
        return Said("\n".join([*asked, *next_]) or "no picture yet; /image PATH adds one")

    def _undo(self, _: str) -> Said:
        if self._pending:
            return Said(f"took back {shown(self._pending.pop())}")
        question = self._last()
        del self._turns[-2:]
        return Said(f"took back: {question.text}")

    def _retry(self, _: str) -> Ask:
        question = self._last()
        self._before = self._turns[-2:]
        del self._turns[-2:]
        self._asked = question
        return Ask((*self.messages, question))

    def _last(self) -> Message:
        if not self._turns:
            raise InputError("nothing was asked yet")
        return self._turns[-2]

    def _reset(self, _: str) -> Said:
        self._turns, self._pending = [], []
        return Said("forgotten")

    def _system_text(self, value: str) -> Said:
        self._system = value or None
        return Said("no system message" if self._system is None else "noted")

    def _save(self, value: str) -> Said:
        path = _named(value)
        if not self._turns:
            raise InputError("nothing was asked yet, so there is nothing to save")
        save_messages(path, self.messages)
        return Said(f"saved as {path}")

    def _load(self, value: str) -> Said:
        path = _named(value)
        messages: Sequence[Message] = load_messages(path)
        first = messages[0].text if messages[0].role == "system" else None
        turns = list(messages[1:] if first is not None else messages)
        roles = [turn.role for turn in turns]
        if roles != ["user", "assistant"] * (len(turns) // 2):
            raise InputError(f"{path}: questions and answers are not in turn; nothing was loaded")
        self._system, self._turns, self._pending = first, turns, []
        return Said(f"loaded {len(turns) // 2} questions with their answers")

    def _set(self, value: str) -> Said:
        known = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        if not value:
            return Said("\n".join(f"{name} {_spelt(known[name])}" for name in known))
        name, _, text = value.replace("=", " ").partition(" ")
        if name not in known:
            raise InputError(f"no setting {name!r}; there are: {', '.join(known)}")
        self.settings = replace(self.settings, **{name: _value(name, text.strip())})
        return Said(f"{name} {_spelt(getattr(self.settings, name))}")

    def _help(self, _: str) -> Said:
        lines = [f"{name + ' ' + value:22} {what}" for name, (value, what) in COMMANDS.items()]
        lines.append("A line that ends in \\ goes on in the next; Ctrl-C stops an answer.")
        return Said("\n".join(lines))

    def _quit(self, _: str) -> Said:
        return Said(end=True)


def _part(typed: str) -> Image | Video:
    path = typed_path(typed)
    return Video(path) if path.suffix.lower() in VIDEO_SUFFIXES else picture(typed)


def _named(value: str) -> Path:
    if not value:
        raise InputError("which file? give its name")
    return typed_path(value)


def _spelt(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _value(name: str, text: str) -> Any:
    words = {"none": None, "on": True, "true": True, "off": False, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InputError(f"{name}: {text!r} is no number, on, off or none")
