"""One request from outside: where its answer arrives, whoever waits for it and however.

Knows threads, nothing of models.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator

from ..errors import InputError
from .generate import Answer
from .transcript import Piece


class Ticket:
    """A request that the engine has taken; made by ``Engine.submit``.

    Iterating gives the pieces of the answer as they come; joined they are ``answer.text``.

    Attributes:
        id: of this request, unique.
        prompt_tokens: length of the prompt.
        created: when it was taken, in seconds of ``time.monotonic``.
    """

    def __init__(self, prompt_tokens: int, on_cancel: Callable[[Ticket], None]) -> None:
        self.id = uuid.uuid4().hex
        self.prompt_tokens = prompt_tokens
        self.created = time.monotonic()
        self.cancelled = False
        self._on_cancel = on_cancel
        self._change = threading.Condition()
        self._pieces: list[Piece] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Piece]:
        """Wait for the pieces, each once.

        Raises:
            CogVLMError: what went wrong; also whatever else the model raised.
        """
        while True:
            with self._change:
                while not self._pieces and not self.complete:
                    self._pause()
            pieces = self.poll()
            if pieces is None:
                return
            yield from pieces

    @property
    def complete(self) -> bool:
        """Whether nothing more will come."""
        return self._answer is not None or self._error is not None

    def wait(self) -> None:
        """Wait until nothing more will come; the pieces stay where they are."""
        with self._change:
            while not self.complete:
                self._pause()

    def _pause(self) -> None:
        # A wait without limit could not be interrupted by Ctrl-C on Windows.
        self._change.wait(timeout=1.0)

    def on_event(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, in any thread, when there is something new.

        It is called at once if there is already. It must return quickly: the model waits.
        """
        with self._change:
            self._callbacks.append(callback)
            ready = bool(self._pieces) or self.complete
        if ready:
            callback()

    def poll(self) -> list[Piece] | None:
        """What is new, without waiting; none once everything was given out.

        Raises:
            CogVLMError: what went wrong, after the last piece.
        """
        with self._change:
            pieces, self._pieces = self._pieces, []
            if pieces or not self.complete:
                return pieces
            if self._error is not None:
                raise self._error
            return None

    def cancel(self) -> None:
        """Stop; the answer is then what there is, with ``stop="cancelled"``."""
        self.cancelled = True
        self._on_cancel(self)

    @property
    def answer(self) -> Answer:
        """The whole answer, once it is complete.

        Raises:
            InputError: it is not complete.
            CogVLMError: what went wrong.
        """
        if self._error is not None:
            raise self._error
        if self._answer is None:
            raise InputError("the answer is not complete; read all pieces first")
        return self._answer

    def give(self, piece: Piece) -> None:
        """Of the engine: something is new."""
        with self._change:
            self._pieces.append(piece)
        self._tell()

    def close(self, answer: Answer | None, error: BaseException | None = None) -> None:
        """Of the engine: nothing more will come."""
        with self._change:
            if self.complete:
                return
            self._answer, self._error = answer, error
        self._tell()

    def _tell(self) -> None:
        with self._change:
            self._change.notify_all()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            try:
                callback()
            except Exception:  # the listener's own trouble, for example a closed event loop
                with self._change:
                    self._callbacks.remove(callback)
