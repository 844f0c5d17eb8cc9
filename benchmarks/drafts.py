"""What guessing the next tokens gains while one answer is alone: the engine on nano, and without.

* ``read``: real paragraphs are written out, which the prompt has as nano's head read them.
* ``ask``: questions about words, tables and screens, with answers of a few tokens.
* ``chat``: questions without a picture; little of an answer stood anywhere before.

Seconds of the steps behind the first token, with the same weights in one process; the greedy tokens
of both are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from cogvlm.engine import Answer, Engine, Sampling
from cogvlm.load import load
from cogvlm.processor import Encoded, Processor, user
from common import CLOCKS, Clock, Goal, commit, interleave, machine, ratio, spread

REQUESTS = Path(__file__).parents[1] / "examples" / "documents" / "requests.jsonl"
CHAT = (
    "What is a lighthouse?",
    "Write two sentences about rain.",
    "Why is the sky blue?",
    "Name five animals that live in the sea.",
)
GOALS = {
    "read": Goal("at_least", 1.5),
    "ask": Goal("at_least", 1.0),
    "chat": Goal("at_least", 0.95),
}


def prompts(processor: Processor, file: Path, count: int) -> dict[str, list[Encoded]]:
    """Some prompts of each kind, spread over the file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    read = [row for row in rows if row["kind"] == "real paragraph"]
    ask = [row for row in rows if row["metric"] == "anls"]
    chosen = {
        kind: of_kind[:: max(1, len(of_kind) // count)][:count]
        for kind, of_kind in (("read", read), ("ask", ask))
    }
    found = {
        kind: [
            processor.encode([user(file.parent / row["image"], row["question"])]) for row in some
        ]
        for kind, some in chosen.items()
    }
    return found | {"chat": [processor.encode([user(question)]) for question in CHAT[:count]]}


def answer(engine: Engine, prompt: Encoded, tokens: int, clock: Clock) -> tuple[Answer, float]:
    """An answer, and the seconds behind its first token."""
    ticket = engine.submit(prompt, Sampling(tokens))
    started = 0.0
    for _ in ticket:
        started = started or clock()
    return ticket.answer, clock() - (started or clock())


def measure(
    engines: dict[str, Engine], asked: Sequence[Encoded], tokens: int, repeats: int, clock: Clock
) -> dict[str, Any]:
    """Both engines on the same prompts."""
    said: dict[str, list[tuple[int, ...]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in engines}

    def side(name: str) -> Any:
        def work(_: int) -> None:
            found = [answer(engines[name], prompt, tokens, clock) for prompt in asked]
            said[name] = [one.ids for one, _ in found]
            seconds[name].append(sum(s for _, s in found))

        return work

    before = engines["drafts"].stats
    interleave({name: side(name) for name in engines}, repeats, clock=clock)
    after = engines["drafts"].stats
    rounds = len(seconds["drafts"])
    counted = {
        name: round((getattr(after, name) - getattr(before, name)) / rounds)
        for name in ("generated_tokens", "steps", "draft_tokens", "accepted_tokens")
    }
    times = {name: some[-repeats:] for name, some in seconds.items()}
    return {
        "prompts": len(asked),
        "agree": said["drafts"] == said["plain"],
        "same_answers": sum(a == b for a, b in zip(said["drafts"], said["plain"], strict=True)),
        **counted,
        "milliseconds": {name: spread(some) for name, some in times.items()},
        "ratio": ratio(times["plain"], times["drafts"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--requests", type=Path, default=REQUESTS)
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="see README.md")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    about = machine()
    loaded = load(given.model, dtype=given.precision)
    asked = prompts(loaded.processor, given.requests, given.prompts)
    clock = CLOCKS[given.clock]
    # One engine waits while the other runs.
    with Engine(loaded, slots=1, drafts=0) as plain, Engine(loaded, slots=1) as drafts:
        engines = {"plain": plain, "drafts": drafts}
        kinds = {
            kind: measure(engines, some, given.tokens, given.repeats, clock)
            for kind, some in asked.items()
        }
    goals = {
        name: {goal.bound: goal.value, "met": goal.met(kinds[name]["ratio"]["ratio"])}
        for name, goal in GOALS.items()
    }
    agree = all(kind["agree"] for kind in kinds.values())
    found = {
        "name": "drafts",
        "commit": commit(),
        "machine": about,
        "clock": given.clock,
        "model": given.model,
        "precision": given.precision,
        "agree": agree,
        "kinds": kinds,
        "ratio_is": "without guesses over with them",
        "goals": goals,
        "ok": agree and all(goal["met"] for goal in goals.values()),
    }
    print(json.dumps(found), flush=True)
    # Quantised kernels round otherwise for several rows: there answers may part.
    return 0 if agree or given.precision != "float32" else 1


if __name__ == "__main__":
    raise SystemExit(main())
