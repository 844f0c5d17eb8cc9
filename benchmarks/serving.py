"""What answering together and remembering gain: the engine on nano, against itself.

* ``together``: tokens a second of 8 conversations at once, over those of one alone.
* ``second_turn``: seconds to the first token of a first question about a picture, over those of
  the second question, whose picture and history the engine has from before.
* ``large_picture``: the same with a random CogVLM2 whose picture takes 2,306 tokens as the released
  one's does; its width and depth are small, so that it takes seconds.

Both sides are the same weights in one process; greedy tokens of both are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from PIL import Image

from cogvlm.config import preset
from cogvlm.engine import Answer, Engine, Sampling, Ticket
from cogvlm.load import Loaded, load
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.processor import Encoded, Processor, SquarePixels, assistant, get_template, user
from common import CLOCKS, Clock, Goal, commit, interleave, machine, ratio, spread

PICTURES = Path(__file__).parents[1] / "examples"
ASKED = "Read the text in this picture, please."
THEN = "And how many words are that?"
GOALS = {
    "together": Goal("at_least", 3.0),
    "second_turn": Goal("at_least", 5.0),
    "large_picture": Goal("at_least", 5.0),
}
LARGE_SIDE = 1344  # pixels
LARGE: dict[str, Any] = {  # the rest is as released, 2x2 patches a token too
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_multi_query_heads": 2,
}
LARGE_TOWER = {"hidden_size": 256, "num_heads": 4, "intermediate_size": 768, "num_hidden_layers": 4}


def settings(tokens: int) -> Sampling:
    """Greedy, and never an end: answers of one length."""
    return Sampling(tokens, repetition_stop=False, logit_bias={2: -1000.0})


def large(small: Loaded) -> Loaded:
    """A random CogVLM2 with a small one's words."""
    torch.manual_seed(0)
    words = small.model.config.vocab_size
    sides = {"image_size": LARGE_SIDE, "num_positions": (LARGE_SIDE // 14) ** 2 + 1}
    config = preset("cogvlm2", vocab_size=words, vision_config=LARGE_TOWER | sides, **LARGE)
    processor = Processor(
        small.processor.tokenizer,
        get_template("chat"),
        SquarePixels(LARGE_SIDE),
        image_token_id=small.processor.image_token_id,
    )
    return Loaded(CogVLMForCausalLM(config).eval().requires_grad_(False), processor, "large")


def finish(ticket: Ticket) -> Answer:
    for _ in ticket:
        pass
    return ticket.answer


def conversations(loaded: Loaded, pictures: list[Path], count: int) -> list[Encoded]:
    """Different prompts, each with a picture."""
    return [
        loaded.processor.encode([user(pictures[i % len(pictures)], f"{ASKED} ({i})")])
        for i in range(count)
    ]


def measure_together(
    loaded: Loaded, prompts: list[Encoded], tokens: int, repeats: int, clock: Clock
) -> Any:
    """Seconds a token, alone and together; prompts are reused, so that steps are what is timed."""
    asked = settings(tokens)
    # Of one alone the engine also guesses tokens (drafts.py); here a token is a step on both sides.
    with Engine(loaded, slots=len(prompts), drafts=0) as engine:

        def alone(_: int) -> list[Answer]:
            return [finish(engine.submit(prompts[0], asked))]

        def together(_: int) -> list[Answer]:
            return [finish(t) for t in [engine.submit(p, asked) for p in prompts]]

        agree = alone(0)[0].ids == together(0)[0].ids
        before = engine.stats
        times = interleave({"alone": alone, "together": together}, repeats, clock=clock)
        after = engine.stats
    batch = (after.batched_tokens - before.batched_tokens) / (after.steps - before.steps)
    seconds = {
        "alone": [t / tokens for t in times["alone"]],
        "together": [t / tokens / len(prompts) for t in times["together"]],
    }
    return seconds, agree, batch


def page(pictures: list[Path], first: int) -> Image.Image:
    """A picture as large as nano reads, full of lines: 64 tokens; every ``first`` another."""
    whole = Image.new("RGB", (64 * 28, 4 * 28), "white")
    for i in range(4):
        line = Image.open(pictures[(first + i) % len(pictures)]).convert("RGB")
        whole.paste(line.resize((64 * 28, 28)), (0, 28 * i))
    return whole


def measure_turns(loaded: Loaded, pictures: list[Path], repeats: int, clock: Clock) -> Any:
    """Seconds to the first token: of a new picture, and of the turn after."""
    seconds: dict[str, list[float]] = {"first_turn": [], "second_turn": []}
    agree, asked = True, settings(1)
    for number in range(repeats + 1):
        question = user(page(pictures, number), ASKED)
        with Engine(loaded) as engine:

            def answer(turn: str, prompt: Encoded, engine: Engine = engine) -> Answer:
                start = clock()
                found = finish(engine.submit(prompt, asked))
                seconds[turn].append(clock() - start)
                return found

            finish(engine.submit(loaded.processor.encode([user("Hello")]), asked))
            first = answer("first_turn", loaded.processor.encode([question]))
            turns = loaded.processor.encode([question, assistant(first.text), user(THEN)])
            second = answer("second_turn", turns)
        with Engine(loaded, prefix_bytes=0) as engine:
            agree &= finish(engine.submit(turns, asked)).ids == second.ids
    counts = {"prompt": len(turns.input_ids), "reused": second.cached_tokens}
    # The first round warms up.
    return {turn: times[1:] for turn, times in seconds.items()}, agree, counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="a folder with PNG files")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="see README.md")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    pictures = sorted(given.pictures.rglob("*.png"))
    if not pictures:
        parser.error(f"{given.pictures} has no PNG file")
    about, started = machine(), time.perf_counter()
    loaded = load(given.model, dtype=given.precision)
    loading = time.perf_counter() - started
    prompts = conversations(loaded, pictures, given.conversations)
    repeats, clock = given.repeats, CLOCKS[given.clock]
    steps, same_steps, batch = measure_together(loaded, prompts, given.tokens, repeats, clock)
    turns, same_turns, counts = measure_turns(loaded, pictures, repeats, clock)
    wide, same_wide, wide_counts = measure_turns(large(loaded), pictures, repeats, clock)
    same = same_steps and same_turns and same_wide
    ratios = {
        "together": ratio(steps["alone"], steps["together"]),
        "second_turn": ratio(turns["first_turn"], turns["second_turn"]),
        "large_picture": ratio(wide["first_turn"], wide["second_turn"]),
    }
    times = {**steps, **turns, **{f"large_{turn}": t for turn, t in wide.items()}}
    goals = {
        name: {goal.bound: goal.value, "met": goal.met(ratios[name]["ratio"])}
        for name, goal in GOALS.items()
    }
    found = {
        "name": "serving",
        "commit": commit(),
        "machine": about,
        "clock": given.clock,
        "model": given.model,
        "precision": given.precision,
        "conversations": given.conversations,
        "tokens": given.tokens,
        "prompt_tokens": len(prompts[0].input_ids),
        "agree": same,
        "milliseconds": {name: spread(t) for name, t in times.items()},
        "tokens_a_second": {name: round(1 / median(t), 1) for name, t in steps.items()},
        "second_turn_tokens": counts,
        "large_picture_tokens": wide_counts,
        "mean_batch": round(batch, 2),
        "load_seconds": round(loading, 1),
        "ratios": ratios,
        "ratio_is": "one alone over together, per token; first turn over second",
        "goals": goals,
        "ok": same and all(goal["met"] for goal in goals.values()),
    }
    print(json.dumps(found), flush=True)
    return 0 if found["agree"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
