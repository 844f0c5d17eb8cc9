"""Who answers: a model of this machine or a server elsewhere, behind one interface.

:class:`cogvlm.engine.LocalBackend` and :class:`cogvlm.remote.RemoteBackend` are the two; commands
do not know which one they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from .errors import CogVLMError
from .processor import Message
from .settings import GenerationSettings


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: What was said.
        tokens: How many tokens it has; none where a server does not say.
        stop: ``end``, ``length``, ``repetition`` or ``cancelled``; another word of a server's.
    """

    text: str
    tokens: int | None
    stop: str


class Pieces(Protocol):
    """An answer as it comes; leaving the loop early, or :meth:`close`, stops it."""

    def __iter__(self) -> Pieces:
        """Itself."""

    def __next__(self) -> str:
        """The next piece of text."""

    @property
    def reply(self) -> Reply:
        """The whole answer, once the pieces are used up.

        Raises:
            InputError: they are not.
        """

    def close(self) -> None:
        """Stop."""


@runtime_checkable
class Backend(Protocol):
    """What answers conversations."""

    @property
    def name(self) -> str:
        """Of the model."""

    def prepare(self, messages: Sequence[Message]) -> Any:
        """Read the pictures of a conversation; threads may do this ahead of the answers.

        Raises:
            InputError: the conversation or a picture is not usable.
        """

    def answer_batch(
        self, prepared: Sequence[Any], settings: GenerationSettings
    ) -> list[Reply | CogVLMError]:
        """For each prepared conversation its answer, or why it has none."""

    def stream(self, messages: Sequence[Message], settings: GenerationSettings) -> Pieces:
        """Answer one conversation piece by piece.

        Raises:
            InputError: the conversation or a picture is not usable.
        """
