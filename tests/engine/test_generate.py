"""Generation: settings, streaming, the stop on repetition, batches, memory and context limits."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from cogvlm.engine import GenerationSettings, complete, generate, stream
from cogvlm.engine.repetition import MAX_UNIT, MIN_COPIES, MIN_TOKENS, Repetition
from cogvlm.engine.service import DRAFTS
from cogvlm.errors import ConfigError, InputError, ResourceError
from cogvlm.processor import user
from engine.toys import Bytes, scripted, toy_loaded

RED = PILImage.new("RGB", (60, 40), (220, 20, 20))
NOISE = PILImage.fromarray(
    np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8), "RGB"
)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range: give 1 or more"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True is not a whole number"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"temperature": "hot"}, "temperature='hot' is not a number"),
        ({"top_p": 1.5}, "top_p=1.5 is out of range: give 0 to 1"),
        ({"top_p": 0}, "top_p=0 leaves no token"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"repetition_stop": 1}, "repetition_stop=1 is not true or false"),
    ],
)
def test_impossible_settings_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationSettings(**values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_ends_where_the_model_ends_it() -> None:
    answer = complete(scripted("A red bus."), [user("What?")])
    assert (answer.text, answer.stop) == ("A red bus.", "end")
    assert answer.ids == tuple(Bytes().encode("A red bus."))


def test_an_answer_ends_at_the_limit() -> None:
    answer = complete(scripted("A red bus."), [user("What?")], GenerationSettings(3))
    assert (answer.text, answer.stop) == ("A r", "length")


def test_pieces_arrive_one_by_one_and_never_split_a_character() -> None:
    said = "Ein Öl-Bus 公车 🚌!"
    pieces = stream(scripted(said), [user("Was?")])
    got = list(pieces)
    assert "".join(got) == said == pieces.answer.text
    assert len(got) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in got)


def test_the_answer_of_a_stream_is_there_only_at_its_end() -> None:
    pieces = stream(scripted("Hello"), [user("Hi")])
    assert next(pieces) == "H"
    with pytest.raises(InputError, match="not at its end"):
        _ = pieces.answer
    assert "".join(pieces) == "ello"
    assert pieces.answer.stop == "end"


def test_leaving_a_stream_stops_the_model() -> None:
    loaded = scripted("x1" * 5 + "abcdefghijklmnopqrstuvwxyz" * 8, pause=0.002)
    pieces = stream(loaded, [user("Hi")], GenerationSettings(max_new_tokens=200))
    next(pieces)
    pieces.close()
    assert loaded.model.lm_head.step < 50
    assert not [t for t in threading.enumerate() if t.name == "cogvlm-engine"]


def test_an_error_in_the_thread_reaches_the_reader() -> None:
    loaded = toy_loaded()

    def broken(*_: Any) -> None:
        raise ValueError("from inside")

    loaded.model.lm_head.forward = broken
    with pytest.raises(ValueError, match="from inside"):
        list(stream(loaded, [user("Hi")]))


@pytest.mark.parametrize("unit", ["a", "ab", "<bus>", "thirty-two characters, no repeat"])
def test_repetition_is_stopped_and_one_copy_kept(unit: str) -> None:
    loaded = scripted("I see " + unit * 400)
    pieces = stream(loaded, [user("What?")], GenerationSettings(max_new_tokens=300))
    text = "".join(pieces)
    assert text == pieces.answer.text == "I see " + unit
    assert pieces.answer.stop == "repetition"
    needed = max(MIN_TOKENS, MIN_COPIES * len(unit))
    assert 0 <= loaded.model.lm_head.step - len("I see ") - needed <= DRAFTS


def test_repetition_is_let_be_when_told_so() -> None:
    settings = GenerationSettings(max_new_tokens=100, repetition_stop=False)
    answer = complete(scripted("a" * 400), [user("What?")], settings)
    assert (answer.text, answer.stop) == ("a" * 100, "length")


@pytest.mark.parametrize("text", ["ha " * 12, "=" * 40 + " title", "1, 1, 2, 1, 1, 2, 1, 1, 2!"])
def test_short_repetition_passes_whole(text: str) -> None:
    pieces = stream(scripted(text), [user("What?")])
    assert "".join(pieces) == text == pieces.answer.text
    assert pieces.answer.stop == "end"


def test_nothing_that_is_dropped_later_was_ever_shown() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, MAX_UNIT + 1))
        tokens = [*rng.integers(0, 3, 40), *list(rng.integers(0, 3, n)) * 200]
        watch, shown, count = Repetition(), 0, 0
        for token in tokens:
            watch.push(int(token))
            count += 1
            shown = max(shown, count - watch.held)
            if watch.unit is not None:
                break
        assert watch.unit is not None
        assert shown <= count - watch.surplus
        kept = tokens[: count - watch.surplus]
        assert kept + kept[-watch.unit :] == tokens[: len(kept) + watch.unit]


def test_a_batch_says_what_each_row_alone_says() -> None:
    loaded = toy_loaded()
    settings = GenerationSettings(max_new_tokens=12)
    prompts = [[user("Hi")], [user(RED, "What colour is this?")], [user(NOISE, "And this one?")]]
    singles = [complete(loaded, prompt, settings) for prompt in prompts]
    batch = loaded.processor.batch([loaded.processor.encode(prompt) for prompt in prompts])
    assert generate(loaded, batch, settings) == singles
    assert len({answer.ids for answer in singles}) == 3


def test_rows_of_a_batch_end_independently() -> None:
    loaded = scripted("short", "ab" * 100, "a longer answer")
    rows = [loaded.processor.encode([user("Hi")]) for _ in range(3)]
    answers = generate(loaded, loaded.processor.batch(rows), GenerationSettings(60))
    assert [a.text for a in answers] == ["short", "ab", "a longer answer"]
    assert [a.stop for a in answers] == ["end", "repetition", "end"]


def test_a_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    loaded = toy_loaded()
    settings = GenerationSettings(max_new_tokens=20, temperature=1.5, seed=7, top_p=0.95, top_k=50)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = complete(loaded, [user("Hi")], settings)
    assert torch.equal(before, torch.get_rng_state())
    second = complete(loaded, [user("Hi")], settings)
    assert first == second
    other = GenerationSettings(max_new_tokens=20, temperature=1.5, seed=8, top_p=0.95, top_k=50)
    assert complete(loaded, [user("Hi")], other) != first


def test_sampling_from_one_token_is_greedy() -> None:
    loaded = toy_loaded()
    greedy = complete(loaded, [user("Hi")], GenerationSettings(max_new_tokens=10))
    one = GenerationSettings(max_new_tokens=10, temperature=2.0, top_k=1, seed=0)
    assert complete(loaded, [user("Hi")], one) == greedy


def test_settings_hidden_in_a_model_change_nothing() -> None:
    loaded = toy_loaded()
    plain = complete(loaded, [user("Hi")], GenerationSettings(max_new_tokens=10))
    hidden = loaded.model.generation_config
    hidden.do_sample, hidden.temperature, hidden.repetition_penalty = True, 2.0, 5.0
    assert complete(loaded, [user("Hi")], GenerationSettings(max_new_tokens=10)) == plain


def test_a_prompt_beyond_the_context_is_refused() -> None:
    with pytest.raises(InputError, match=r"has \d+ positions, the model has 512"):
        complete(toy_loaded(), [user("x" * 600)])


def test_the_answer_stops_at_the_end_of_the_context() -> None:
    loaded = scripted("abcdefghijklmnopqrstuvwxyz0123456789" * 9)
    prompt = [user("x" * 400)]
    used = len(loaded.processor.encode(prompt).input_ids)
    answer = complete(loaded, prompt, GenerationSettings(1000, repetition_stop=False))
    assert (len(answer.ids), answer.stop) == (512 - used, "length")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_no_memory_is_one_line_with_a_remedy(error: BaseException) -> None:
    loaded = toy_loaded()

    def full(*_: Any) -> None:
        raise error

    loaded.model.lm_head.forward = full
    with pytest.raises(ResourceError, match=r"out of memory with \d+ tokens .* smaller") as caught:
        complete(loaded, [user("Hi")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pictures_reach_a_model_of_any_precision(dtype: torch.dtype) -> None:
    loaded = toy_loaded()
    loaded.model.to(dtype)  # type: ignore[arg-type]
    seen: list[torch.dtype] = []
    adapter: Any = loaded.model.model.vision.linear_proj
    adapter.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    answer = complete(loaded, [user(NOISE, "Hi?")], GenerationSettings(max_new_tokens=4))
    assert seen == [dtype] and 1 <= len(answer.ids) <= 4
