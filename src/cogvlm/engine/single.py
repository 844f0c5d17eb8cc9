"""One conversation, answered as a whole or piece by piece: an engine for one.

::

    Engine (its thread) --Ticket--> Stream --text--> caller
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import InputError
from ..processor import Encoded, Message
from ..settings import GenerationSettings
from .generate import Answer, room_left
from .sampling import Sampling
from .service import Engine

if TYPE_CHECKING:
    from ..load import Loaded


def complete(
    loaded: Loaded, messages: Sequence[Message], settings: GenerationSettings | None = None
) -> Answer:
    """Answer one conversation.

    Raises:
        InputError: the conversation or a picture is not usable, or too long.
        ResourceError: not enough memory.
    """
    return stream(loaded, messages, settings).rest()


def stream(
    loaded: Loaded, messages: Sequence[Message], settings: GenerationSettings | None = None
) -> Stream:
    """Answer one conversation piece by piece; the prompt is checked before this returns.

    Raises:
        InputError: the conversation or a picture is not usable, or too long.
    """
    return Stream(loaded, loaded.processor.encode(messages), settings)


class Stream:
    """Pieces of text as they are generated; afterwards :attr:`answer` is the whole.

    The pieces joined are ``answer.text``: what might be the surplus of a repetition is held back
    until that is decided. Leaving the loop early, or :meth:`close`, stops the model.

    Args:
        loaded: model and processor.
        prompt: of that processor.
        settings: how to answer; default greedy, 256 tokens.
        engine: that is open already, of this model; none: one for this answer.

    Raises:
        InputError: the prompt is too long.
    """

    def __init__(
        self,
        loaded: Loaded,
        prompt: Encoded,
        settings: GenerationSettings | None = None,
        engine: Engine | None = None,
    ) -> None:
        room_left(loaded, loaded.processor.batch([prompt]))
        settings = settings or GenerationSettings()
        if settings.seed is None and (getattr(loaded.model, "tp_size", None) or 1) > 1:
            settings = replace(settings, seed=0)  # all processes must draw the same
        self._answer: Answer | None = None
        self._pieces = self._read(loaded, prompt, sampling_of(settings), engine)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer, once the pieces are used up."""
        if self._answer is None:
            raise InputError("the stream is not at its end; read all pieces first")
        return self._answer

    def rest(self) -> Answer:
        """The whole answer, read to its end."""
        for _ in self._pieces:
            pass
        return self.answer

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()

    def _read(
        self, loaded: Loaded, prompt: Encoded, sampling: Sampling, engine: Engine | None
    ) -> Generator[str, None, None]:
        with engine_for_one(loaded) if engine is None else contextlib.nullcontext(engine) as own:
            ticket = own.submit(prompt, sampling)
            try:
                for piece in ticket:
                    if piece.text:
                        yield piece.text
            except BaseException:  # the caller leaves early, or Ctrl-C
                ticket.cancel()
                raise
            finally:
                ticket.wait()  # the model stops after the step that it is in
        self._answer = ticket.answer


def engine_for_one(loaded: Loaded, prefix_bytes: int = 0, image_bytes: int = 0) -> Engine:
    """An engine that answers one conversation at a time."""
    return Engine(loaded, slots=1, prefix_bytes=prefix_bytes, image_bytes=image_bytes)


def sampling_of(settings: GenerationSettings) -> Sampling:
    """What an engine calls the same settings."""
    return Sampling(**vars(settings))
