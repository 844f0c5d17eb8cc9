"""A file of requests to a file of answers, batch by batch; may be killed at any time.

::

    {"id": 7, "image": "a.png", "question": "..."}  ->  {"id": 7, "prediction": "...", "seconds": 1}
    {"id": "x", "images": ["a.png", "b.png"], ...}  ->  {"id": "x", "error": "...", "seconds": 0}
    {"id": "y", "video": "clip.mp4", "question": "..."}     with a model that takes videos

Answers are appended in the order of the requests and are on the disk after every batch. A new
start cuts off a torn last line and goes on behind the answers that are there, errors included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend import Backend, Reply
from ..errors import CogVLMError, InputError, RemoteError, refuse_unknown
from ..journal import append, one_line, open_journal, read_object
from ..processor import Image, Message, Text, Video
from ..settings import GenerationSettings
from .local import LocalBackend

if TYPE_CHECKING:
    from ..load import Loaded

Progress = Callable[[int, int], None]
"""Called with (answered, all) at the start and after every batch."""

# The last three are for `cogvlm eval`.
_FIELDS = ("id", "image", "images", "video", "question", "truth", "metric", "kind")


@dataclass(frozen=True)
class Summary:
    """What a run did: requests in the file, and of those what became of them now."""

    requests: int
    answered: int
    failed: int
    skipped: int  # had an answer before
    seconds: float


@dataclass(frozen=True)
class _Request:
    """One line: usable, or with the reason why not. ``key`` is what its answer is known by."""

    key: str
    head: dict[str, Any]  # the beginning of the answer's line: the id, or null and the line
    message: Message | None
    error: str | None = None


def run_file(
    requests: str | Path,
    answers: str | Path,
    loaded: Loaded | Backend,
    settings: GenerationSettings | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Summary:
    """Answer every request that has no answer yet.

    ``seconds`` of an answer is its share of the time of its batch. A line that is no request, a
    picture that cannot be read, or a prompt that is too long becomes an answer with ``error``; a
    line without a usable id is answered under ``"id": null`` and its ``line``.

    Args:
        requests: JSON lines; relative pictures are looked for beside this file.
        answers: JSON lines, appended to.
        loaded: Model and processor, or another backend.
        settings: How answers are chosen; default greedy, 256 tokens.
        batch_size: Prompts at once, halved where memory does not suffice; of a remote backend,
            requests at once.
        progress: Called as the work goes on.

    Raises:
        InputError: files that cannot be read or written, an id given twice, an answers file that
            is not one, another process writing it, or ``batch_size`` below 1.
        RemoteError: the server answers no request now; what it answered before is kept.
    """
    started = time.monotonic()
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is out of range: give 1 or more")
    requests, answers = Path(requests), Path(answers)
    todo = _read_requests(requests)
    answered = failed = 0
    backend = loaded if isinstance(loaded, Backend) else LocalBackend(loaded)
    settings = settings or GenerationSettings()
    if answers.exists() and answers.samefile(requests):
        raise InputError(f"{answers}: the answers would be written into the requests; name another")
    with open_journal(answers, _answer_key, "an answer") as (file, known):
        left = [request for request in todo if request.key not in known]
        done = len(todo) - len(left)
        for start in range(0, len(left), batch_size):
            if progress is not None:
                progress(done + start, len(todo))
            found = list(_answer(left[start : start + batch_size], backend, settings))
            lines = [line for line in found if isinstance(line, dict)]
            append(file, lines)
            wrong = sum("error" in line for line in lines)
            failed, answered = failed + wrong, answered + len(lines) - wrong
            for line in found:
                if isinstance(line, RemoteError):
                    raise line
    if progress is not None:
        progress(len(todo), len(todo))
    return Summary(len(todo), answered, failed, done, time.monotonic() - started)


def _answer(
    requests: Sequence[_Request], backend: Backend, settings: GenerationSettings
) -> Iterator[dict[str, Any] | RemoteError]:
    """For each request of a batch its line, or why the server will answer none."""
    started = time.monotonic()
    prepared: list[Any] = []
    outcomes: list[Reply | Exception | None] = []  # none: the next one of the replies
    for request in requests:
        try:
            prepared.append(_prepare(request, backend))
            outcomes.append(None)
        except (CogVLMError, OSError) as error:
            outcomes.append(error)
    replies = iter(backend.answer_batch(prepared, settings) if prepared else [])
    share = round((time.monotonic() - started) / max(1, len(prepared)), 3)
    for request, outcome in zip(requests, outcomes, strict=True):
        seconds = share if outcome is None else 0.0
        outcome = outcome or next(replies)
        if isinstance(outcome, RemoteError) and outcome.stops:
            yield outcome
        elif isinstance(outcome, Exception):
            yield request.head | {"error": one_line(outcome), "seconds": seconds}
        else:
            yield request.head | {"prediction": outcome.text, "seconds": seconds}


def _prepare(request: _Request, backend: Backend) -> Any:
    if request.message is None:
        raise InputError(request.error)
    return backend.prepare([request.message])


def _read_requests(path: Path) -> list[_Request]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    seen: dict[str, int] = {}
    requests = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        request = _read_request(line, number, path)
        if request.key in seen:
            raise InputError(
                f"{path}: id {request.head['id']!r} is on line {seen[request.key]} and on line "
                f"{number}; every id once"
            )
        seen[request.key] = number
        requests.append(request)
    return requests


def _read_request(line: str, number: int, path: Path) -> _Request:
    where = f"{path.name}:{number}"
    head: dict[str, Any] = {"id": None, "line": number}
    try:
        values = read_object(line, where)
        name = values.get("id")
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise InputError(f"{where}: 'id' is {_json(name)}; give a text or a whole number")
        head = {"id": name}
        return _Request(_key(head), head, _message(values, where, path.parent))
    except InputError as error:
        return _Request(_key(head), head, None, str(error))


def _message(values: dict[str, Any], where: str, folder: Path) -> Message:
    refuse_unknown(values, _FIELDS, where)
    question = values.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: 'question' is {_json(question)}; give a text")
    given = [key for key in ("image", "images", "video") if key in values]
    if len(given) > 1:
        raise InputError(f"{where}: both {given[0]!r} and {given[1]!r}; give one of them")
    if "video" in values:
        if not isinstance(values["video"], str) or not values["video"]:
            raise InputError(f"{where}: 'video' is {_json(values['video'])}; give one path")
        return Message("user", (Video(folder / values["video"]), Text(question)))
    images = [values["image"]] if "image" in values else values.get("images", [])
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise InputError(f"{where}: 'image' is one path, 'images' a list of paths")
    return Message("user", (*(Image(folder / image) for image in images), Text(question)))


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _key(head: dict[str, Any]) -> str:
    """``7`` and ``"7"`` are two ids; a line without one is known by its number."""
    return json.dumps(head["id"]) if head.get("id") is not None else f"line {head.get('line')}"


def _answer_key(values: dict[str, Any]) -> str | None:
    is_answer = "id" in values and ("prediction" in values or "error" in values)
    return _key(values) if is_answer else None
