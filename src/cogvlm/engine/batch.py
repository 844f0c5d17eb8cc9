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
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import CogVLMError, InputError, ResourceError, refuse_unknown
from ..processor import Encoded, Image, Message, Text, Video
from .generate import GenerationSettings, generate

if TYPE_CHECKING:
    from ..load import Loaded

Progress = Callable[[int, int], None]
"""Called with (answered, all) at the start and after every batch."""

_FIELDS = ("id", "image", "images", "video", "question", "truth")  # "truth" is for `cogvlm eval`


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
    loaded: Loaded,
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
        loaded: Model and processor.
        settings: How answers are chosen; default greedy, 256 tokens.
        batch_size: Prompts at once, halved where memory does not suffice.
        progress: Called as the work goes on.

    Raises:
        InputError: files that cannot be read or written, an id given twice, an answers file that
            is not one, another process writing it, or ``batch_size`` below 1.
    """
    started = time.monotonic()
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is out of range: give 1 or more")
    requests, answers = Path(requests), Path(answers)
    todo = _read_requests(requests)
    answered = failed = 0
    with _open_answers(answers, requests) as (file, known):
        left = [request for request in todo if request.key not in known]
        done = len(todo) - len(left)
        for start in range(0, len(left), batch_size):
            if progress is not None:
                progress(done + start, len(todo))
            lines = _answer(left[start : start + batch_size], loaded, settings)
            _append(file, lines)
            wrong = sum("error" in line for line in lines)
            failed, answered = failed + wrong, answered + len(lines) - wrong
    if progress is not None:
        progress(len(todo), len(todo))
    return Summary(len(todo), answered, failed, done, time.monotonic() - started)


def _answer(
    requests: Sequence[_Request], loaded: Loaded, settings: GenerationSettings | None
) -> list[dict[str, Any]]:
    """Answer lines for one batch of requests, in their order."""
    started = time.monotonic()
    lines: list[dict[str, Any]] = []
    rows: list[tuple[dict[str, Any], Encoded]] = []
    for request in requests:
        line = dict(request.head)
        lines.append(line)
        try:
            rows.append((line, _encode(request, loaded)))
        except (CogVLMError, OSError) as error:
            line["error"] = _one_line(error)
            line["seconds"] = 0.0
    _generate(rows, loaded, settings or GenerationSettings())
    share = (time.monotonic() - started) / max(1, len(rows))
    for line, _ in rows:
        line["seconds"] = round(share, 3)
    return lines


def _encode(request: _Request, loaded: Loaded) -> Encoded:
    if request.message is None:
        raise InputError(request.error)
    return loaded.processor.encode([request.message])


def _generate(
    rows: Sequence[tuple[dict[str, Any], Encoded]], loaded: Loaded, settings: GenerationSettings
) -> None:
    """Put a prediction, or why there is none, into the line of every row."""
    if not rows:
        return
    try:
        answers = generate(loaded, loaded.processor.batch([row for _, row in rows]), settings)
    except (InputError, ResourceError) as error:
        reason = _one_line(error)
    else:
        for (line, _), answer in zip(rows, answers, strict=True):
            line["prediction"] = answer.text
        return
    # Outside the handler, whose traceback would keep the tensors of the failed try alive.
    if len(rows) == 1:
        rows[0][0]["error"] = reason
        return
    # One row is too long, or all together are: the halves find out which.
    middle = len(rows) // 2
    _generate(rows[:middle], loaded, settings)
    _generate(rows[middle:], loaded, settings)


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
        values = _read_object(line, where)
        name = values.get("id")
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise InputError(f"{where}: 'id' is {_json(name)}; give a text or a whole number")
        head = {"id": name}
        return _Request(_key(head), head, _message(values, where, path.parent))
    except InputError as error:
        return _Request(_key(head), head, None, str(error))


def _read_object(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: {type(values).__name__} where a JSON object is expected")
    return values


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


@contextmanager
def _open_answers(path: Path, requests: Path) -> Iterator[tuple[BinaryIO, set[str]]]:
    """The answers file, locked and ready to append to, and the keys it has answers for."""
    from filelock import FileLock, Timeout

    if path.exists() and path.samefile(requests):
        raise InputError(f"{path}: the answers would be written into the requests; name another")
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{path}: another run is writing it; wait, or name another") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with _open(path) as file:
            yield file, _resume(file, path)
    finally:
        lock.release()


def _open(path: Path) -> BinaryIO:
    try:
        path.touch()
        return path.open("r+b")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _resume(file: BinaryIO, path: Path) -> set[str]:
    """Cut a torn last line; leave ``file`` at its end and return the keys of its lines."""
    keys: set[str] = set()
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        if line.strip():
            keys.add(_answer_key(line, f"{path}:{number}"))
    file.seek(end)
    file.truncate()
    return keys


def _answer_key(line: bytes, where: str) -> str:
    try:
        values = _read_object(line.decode(), where)
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not an answer; repair the file or name another") from error
    if "id" not in values or not ("prediction" in values or "error" in values):
        raise InputError(f"{where}: not an answer; repair the file or name another")
    return _key(values)


def _append(file: BinaryIO, lines: Iterable[dict[str, Any]]) -> None:
    """Put lines on the disk before anything else is done."""
    text = b"".join(map(_dump, lines))
    try:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise ResourceError(
            f"{file.name}: cannot be written ({error.strerror}); make room and run it again, it "
            "goes on where it stopped"
        ) from error


def _dump(line: dict[str, Any]) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in an id: legal in JSON, not in UTF-8
        return json.dumps(line).encode() + b"\n"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
