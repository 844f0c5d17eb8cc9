"""The backend that is a model of this process."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ..backend import Reply
from ..errors import CogVLMError, InputError, ResourceError
from ..processor import Encoded, Message
from ..settings import GenerationSettings
from .generate import Answer, generate
from .runner import takes_masks
from .service import MIB, Engine
from .single import Stream, engine_for_one

if TYPE_CHECKING:
    from ..load import Loaded


class LocalBackend:
    """A loaded model behind :class:`cogvlm.backend.Backend`.

    What is streamed goes through one engine: the next turn of a conversation begins with the keys
    and values of the last one.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    @cached_property
    def _engine(self) -> Engine:
        prefixes = 512 * MIB if takes_masks(self._loaded) else 0
        engine = engine_for_one(self._loaded, prefixes, image_bytes=256 * MIB)
        weakref.finalize(self, engine.close)  # its thread would hold the model
        return engine

    @property
    def name(self) -> str:
        """Of the model, as it was asked for."""
        return self._loaded.name

    def prepare(self, messages: Sequence[Message]) -> Encoded:
        """Ids and pixels; threads can do it while the model runs."""
        return self._loaded.processor.encode(messages)

    def answer_batch(
        self, prepared: Sequence[Encoded], settings: GenerationSettings
    ) -> list[Reply | CogVLMError]:
        """Answer all at once; halves, where the memory does not suffice or one is too long."""
        if not prepared:
            return []
        reason: CogVLMError
        try:
            batch = self._loaded.processor.batch(prepared)
            return [_reply(answer) for answer in generate(self._loaded, batch, settings)]
        except (InputError, ResourceError) as error:
            reason = type(error)(str(error))
        # Outside the handler, whose traceback would keep the tensors of the failed try alive.
        if len(prepared) == 1:
            return [reason]
        middle = len(prepared) // 2
        return [
            *self.answer_batch(prepared[:middle], settings),
            *self.answer_batch(prepared[middle:], settings),
        ]

    def stream(self, messages: Sequence[Message], settings: GenerationSettings) -> LocalPieces:
        """Answer one conversation piece by piece; the prompt is checked before this returns."""
        prompt = self.prepare(messages)
        return LocalPieces(Stream(self._loaded, prompt, settings, self._engine))


class LocalPieces:
    """A :class:`Stream` behind :class:`cogvlm.backend.Pieces`."""

    def __init__(self, source: Stream) -> None:
        self._source = source

    def __iter__(self) -> LocalPieces:
        return self

    def __next__(self) -> str:
        return next(self._source)

    @property
    def reply(self) -> Reply:
        """The whole answer, once the pieces are used up."""
        return _reply(self._source.answer)

    def close(self) -> None:
        """Stop generating."""
        self._source.close()


def _reply(answer: Answer) -> Reply:
    return Reply(answer.text, len(answer.ids), answer.stop)
