"""One training record, and why a record is not usable.  Knows no file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InputError, MessageError
from ...processor.messages import Image, Message, Video, check_order


class RecordError(InputError):
    """A record that cannot be used: ``where`` it stands and the ``reason``."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)  # both, so that it survives being sent between processes
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """A conversation to learn from; it ends with an answer.  Pictures are opened when encoded."""

    messages: tuple[Message, ...]
    id: str  # its own, else one made of the place
    source: str  # name of the source
    where: str  # file and line, or file and member
    unread: frozenset[str] = frozenset()  # keys that the record has and nobody reads
    unplaced: bool = False  # pictures named, but no <image> in the text: they stand in front

    @property
    def visuals(self) -> tuple[Image | Video, ...]:
        """The pictures and videos, in order."""
        return tuple(part for message in self.messages for part in message.visuals)

    @property
    def answers(self) -> tuple[str, ...]:
        """What is learnt: the text of every answer."""
        return tuple(m.text for m in self.messages if m.role == "assistant")


def check_turns(messages: Sequence[Message]) -> None:
    """Refuse what cannot be trained on.

    Raises:
        MessageError: a wrong order of roles, or a question or answer with nothing in it.
    """
    check_order(messages, train=True)
    turns = [m for m in messages if m.role != "system"]
    for number, message in enumerate(turns):
        if not message.text.strip() and not message.visuals:
            what = "answer" if message.role == "assistant" else "question"
            raise MessageError(f"{what} {number // 2 + 1} is empty; write it or drop the turn")
