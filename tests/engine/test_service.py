"""The engine with real models of toy size: together as alone, reused as computed, never mixed up.

Tolerance: tokens are compared, all of them, and text; logits differ by rounding only.
"""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cogvlm.engine import (
    Answer,
    Busy,
    Engine,
    GenerationSettings,
    Grammar,
    LocalBackend,
    Sampling,
    Ticket,
    complete,
    generate,
    service,
)
from cogvlm.engine.drafts import Drafts
from cogvlm.engine.service import MIB
from cogvlm.errors import ConfigError, InputError
from cogvlm.load import Loaded
from cogvlm.processor import Encoded, FastTokenizer, Processor, assistant, get_template, user
from engine.families import FAMILIES, family, picture, prompts
from engine.toys import EOS, Bytes, scripted
from processor.standin import toy_tokenizer

TOKENS = 12


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return family(request.param)


@pytest.fixture(scope="module")
def toy() -> Loaded:
    return family("cogvlm2")


@pytest.fixture
def engine(toy: Loaded) -> Iterator[Engine]:
    with Engine(toy) as made:
        yield made


def read(ticket: Ticket) -> Answer:
    """The answer; the pieces must be it."""
    pieces = list(ticket)
    answer = ticket.answer
    assert "".join(piece.text for piece in pieces) == answer.text
    assert tuple(i for piece in pieces for i in piece.ids) == answer.ids
    return answer


def alone(loaded: Loaded, prompt: Encoded, tokens: int = TOKENS) -> tuple[int, ...]:
    """What transformers' own loop gives."""
    settings = GenerationSettings(tokens, repetition_stop=False)
    return generate(loaded, loaded.processor.batch([prompt]), settings)[0].ids


def greedy(tokens: int = TOKENS, **more: Any) -> Sampling:
    return Sampling(tokens, repetition_stop=False, **more)


def test_together_as_alone_whenever_they_join(loaded: Loaded) -> None:
    asked = prompts(loaded)
    expected = [alone(loaded, prompt, TOKENS - i % 3) for i, prompt in enumerate(asked)]
    assert len(set(expected)) >= 7  # the answers tell the prompts apart
    with Engine(loaded, slots=5, prefix_bytes=0) as engine:
        tickets = []
        for i, prompt in enumerate(asked):
            tickets.append(engine.submit(prompt, greedy(TOKENS - i % 3)))
            if i in (2, 5):  # the others come while these are on their way
                next(iter(tickets[i]))
        for ticket, ids in zip(tickets, expected, strict=True):
            for _ in ticket:
                pass
            assert ticket.answer.ids == ids
        stats = engine.stats
    assert stats.batched_tokens > stats.steps  # they did go together
    assert (stats.finished, stats.running, stats.queued) == (8, 0, 0)


def test_eager_attention_gives_the_same(toy: Loaded) -> None:
    model = family("cogvlm2")
    model.model.set_attn_implementation("eager")
    asked = prompts(toy)[:4]
    with Engine(model) as engine:
        for _ in range(2):  # the second time from what was kept
            tickets = [engine.submit(prompt, greedy()) for prompt in asked]
            assert [read(t).ids for t in tickets] == [alone(toy, p) for p in asked]


def test_a_kernel_without_our_masks_is_refused(toy: Loaded) -> None:
    model = family("cogvlm2")
    model.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="'flash_attention_2' takes no mask"):
        Engine(model)
    with LocalBackend(model)._engine as engine:  # one alone needs none
        assert not engine._drafts


def test_the_next_turn_reuses_the_first(loaded: Loaded) -> None:
    processor, question = loaded.processor, user(picture(0), "What is in this picture, please?")
    first = processor.encode([question])
    with Engine(loaded) as engine:
        answer = read(engine.submit(first, greedy()))
        turns = [question, assistant(answer.text), user("And what else is there?")]
        second = processor.encode(turns)
        again = read(engine.submit(second, greedy()))
        stats = engine.stats
    assert answer.cached_tokens == 0
    assert again.ids == alone(loaded, second)
    if loaded.name == "cogagent":  # its large picture is read with the first tokens
        assert again.cached_tokens == 0
        return
    assert len(first.input_ids) - 2 <= again.cached_tokens < len(second.input_ids)
    assert stats.reused_tokens == again.cached_tokens
    assert (stats.image_misses, stats.image_hits) == (1, 1)


def test_a_picture_more_after_what_is_kept(loaded: Loaded) -> None:
    """Image tokens behind reused ones: positions, experts and attention within the block."""
    if loaded.name == "cogagent":
        pytest.skip("takes one picture")
    processor = loaded.processor
    one, two, three = picture(0), picture(1), picture(2)
    first = processor.encode([user("Look closely at this: ", one, " Well?")])
    second = processor.encode([user("Look closely at this: ", one, " Well?", two, " Both?")])
    third = processor.encode([user("Look closely at this: ", one, three, " Both?")])
    fourth = processor.encode([user("Look closely at this: ", one, " Nothing?")])
    with Engine(loaded) as engine:
        for prompt in (first, second, third, fourth, third):
            answer = read(engine.submit(prompt, greedy()))
            assert answer.ids == alone(loaded, prompt)
    assert answer.cached_tokens > 20


def test_another_picture_is_another_prompt(toy: Loaded, engine: Engine) -> None:
    processor = toy.processor
    asked = [processor.encode([user("So: ", picture(i), "What is it?")]) for i in range(3)]
    answers = [read(engine.submit(prompt, greedy())) for prompt in (*asked, asked[0])]
    assert [a.ids for a in answers[:3]] == [alone(toy, prompt) for prompt in asked]
    assert len({a.ids for a in answers[:3]}) == 3
    assert answers[3].ids == answers[0].ids
    assert answers[1].cached_tokens < 20 < answers[3].cached_tokens


def test_what_is_kept_is_bounded(toy: Loaded) -> None:
    asked = [toy.processor.encode([user(picture(i), "What?")]) for i in range(6)]
    with Engine(toy, prefix_bytes=100_000, image_bytes=3000) as engine:
        for prompt in (*asked, *asked):
            assert read(engine.submit(prompt, greedy(4))).ids == alone(toy, prompt, 4)
        prefixes, features = engine._runner.prefixes, engine._runner.features
        assert 0 < prefixes.bytes <= 100_000
        assert 0 < features.bytes <= 3000
        assert sum(e[2] for e in prefixes._entries.values()) == prefixes.bytes
        assert engine.stats.image_misses > 6
    with Engine(toy, prefix_bytes=0, image_bytes=0) as engine:
        for _ in range(2):
            assert read(engine.submit(asked[0], greedy(4))).cached_tokens == 0
        assert (engine.stats.image_misses, engine.stats.image_hits) == (2, 0)


def test_long_answers_grow_their_room(toy: Loaded) -> None:
    model = family("cogvlm2")
    with torch.no_grad():  # never ends
        model.model.lm_head.weight[EOS] = 0
    prompt, other = prompts(toy)[1], prompts(toy)[2]
    with Engine(model, slots=3) as engine:
        tickets = [engine.submit(p, greedy(n)) for p, n in ((prompt, 300), (other, 20))]
        answers = [read(t) for t in tickets]
    assert answers[0].ids == alone(model, prompt, 300)
    assert answers[1].ids == alone(model, other, 20)
    assert [a.stop for a in answers] == ["length", "length"]


def test_a_seed_means_the_same_in_any_company(toy: Loaded) -> None:
    asked = prompts(toy)
    settings = Sampling(TOKENS, temperature=1.5, top_p=0.95, seed=7, repetition_stop=False)
    with Engine(toy, prefix_bytes=0) as engine:
        single = read(engine.submit(asked[1], settings)).ids
        others = [engine.submit(p, Sampling(20, temperature=1.0)) for p in asked[2:]]
        company = read(engine.submit(asked[1], settings)).ids
        another = Sampling(TOKENS, temperature=1.5, top_p=0.95, seed=8, repetition_stop=False)
        different = read(engine.submit(asked[1], another)).ids
        for ticket in others:
            read(ticket)
    assert single == company != different
    assert single != alone(toy, asked[1])


def test_logprobs_are_the_models_own(toy: Loaded, engine: Engine) -> None:
    prompt = prompts(toy)[1]
    answer = read(engine.submit(prompt, greedy(5, logprobs=3, logit_bias={40: 50.0})))
    assert answer.ids == (40,) * 5
    ids = torch.from_numpy(prompt.input_ids)
    types = torch.from_numpy(prompt.token_type_ids)
    for place, found in enumerate(answer.logprobs):
        with torch.no_grad():
            logits = toy.model(
                input_ids=torch.cat((ids, torch.full((place,), 40)))[None],
                token_type_ids=torch.nn.functional.pad(types, (0, place))[None],
                pixel_values=[torch.from_numpy(p) for p in prompt.pixel_values],
            ).logits[0, -1]
        logs = logits.log_softmax(0)
        assert (found.id, found.text) == (40, Bytes().decode([40]))
        assert found.logprob == pytest.approx(float(logs[40]), abs=1e-4)
        assert [i for i, _, _ in found.top] == logs.topk(3).indices.tolist()
        assert [p for *_, p in found.top] == pytest.approx(logs.topk(3).values.tolist(), abs=1e-4)


def test_the_chosen_tokens_logprob_without_alternatives(toy: Loaded, engine: Engine) -> None:
    answer = read(engine.submit(prompts(toy)[0], greedy(3, logprobs=0)))
    assert len(answer.logprobs) == len(answer.ids)
    assert all(p.top == () and p.logprob <= 0 for p in answer.logprobs)


def test_a_stop_string_of_several_tokens_is_never_shown() -> None:
    with Engine(scripted("One, two. STOP here")) as engine:
        prompt = engine._loaded.processor.encode([user("Count")])
        pieces = []
        ticket = engine.submit(prompt, Sampling(stop=("nothing", "STOP")))
        for piece in ticket:
            pieces.append(piece.text)
    assert "".join(pieces) == ticket.answer.text == "One, two. "
    assert ticket.answer.stop == "stop"


def byte_level(vocabulary: int = 320) -> Loaded:
    """A toy with a real tokenizer, as a grammar needs it."""
    loaded = family("cogvlm2")
    tokens = toy_tokenizer()
    words = FastTokenizer(tokens, bos_id=None, eos_id=tokens.token_to_id("<|im_end|>"))
    assert tokens.get_vocab_size() < vocabulary
    processor = Processor(words, get_template("chat"), loaded.processor.pixels, image_token_id=4)
    return Loaded(loaded.model, processor, "bytes")


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_a_grammar_is_kept_to_beside_free_answers() -> None:
    loaded = byte_level()
    prompt = loaded.processor.encode([user("the red bus")])
    free = alone(loaded, prompt)
    with Engine(loaded) as engine:
        kept = (
            Grammar("json_schema", SCHEMA),
            Grammar("json_schema", json.dumps(SCHEMA)),
            Grammar("regex", "(red|blue) bus [0-9]{2}"),
        )
        tickets = [engine.submit(prompt, Sampling(120, grammar=grammar)) for grammar in kept]
        tickets.append(engine.submit(prompt, greedy()))
        warm = Sampling(60, temperature=1.0, seed=1, grammar=Grammar("regex", "a(b|c){3,5}d"))
        tickets.append(engine.submit(prompt, warm))
        answers = [read(t) for t in tickets]
    for answer in answers[:2]:
        value = json.loads(answer.text)
        assert set(value) == {"colour", "count"}
        assert value["colour"] in ("red", "blue") and 0 <= value["count"] <= 99
        assert answer.stop == "end"
    assert re.fullmatch("(red|blue) bus [0-9]{2}", answers[2].text)
    assert answers[3].ids == free
    assert re.fullmatch("a(b|c){3,5}d", answers[4].text)


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        (Grammar("json_schema", {"type": "nope"}), "Invalid type: nope"),
        (Grammar("json_schema", "{not json"), "not JSON"),
        (Grammar("json_schema", {"$ref": "#/nowhere"}), "nowhere"),
        (Grammar("json_schema", {"a": {1, 2}}), "not JSON"),
        (Grammar("regex", "(a"), "unclosed group"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused(grammar: Grammar, named: str) -> None:
    loaded = byte_level()
    prompt = loaded.processor.encode([user("the red bus")])
    with Engine(loaded) as engine:
        with pytest.raises(InputError) as caught:
            engine.submit(prompt, Sampling(grammar=grammar))
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_no_grammar_can_read(toy: Loaded, engine: Engine) -> None:
    with pytest.raises(InputError, match="the tokenizer is a Bytes"):
        engine.submit(prompts(toy)[0], Sampling(grammar=Grammar("json_object")))


def test_prompts_without_room_are_refused(toy: Loaded) -> None:
    prompt = prompts(toy)[2]
    with Engine(toy, context=len(prompt.input_ids) + 3) as engine:
        assert len(read(engine.submit(prompt, greedy())).ids) == 3
    with (
        Engine(toy, context=len(prompt.input_ids)) as engine,
        pytest.raises(InputError, match="the engine takes"),
    ):
        engine.submit(prompt)
    short = family("cogvlm2")
    short.model.config.max_position_embeddings = 20
    with Engine(short) as engine, pytest.raises(InputError, match="the model has 20"):
        engine.submit(prompt)


def test_a_token_that_does_not_exist_cannot_be_wished_for(toy: Loaded, engine: Engine) -> None:
    with pytest.raises(ConfigError, match="there is no token 320; the model has 320"):
        engine.submit(prompts(toy)[0], Sampling(logit_bias={320: 1.0}))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"slots": 0}, "slots=0 is out of range"),
        ({"queue": 0}, "queue=0 is out of range"),
        ({"context": 1}, "context=1 is out of range"),
        ({"prefix_bytes": -1}, "prefix_bytes=-1 is out of range"),
        ({"image_bytes": 1.5}, "image_bytes=1.5 is not a whole number"),
    ],
)
def test_impossible_engines_are_refused(toy: Loaded, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        Engine(toy, **values)


def test_pictures_that_do_not_fit_their_prompt_fail_alone(toy: Loaded, engine: Engine) -> None:
    good = prompts(toy)[1]
    bad = Encoded(good.input_ids, good.token_type_ids, good.pixel_values * 2)
    broken = engine.submit(bad, greedy())
    fine = engine.submit(good, greedy())
    with pytest.raises(InputError, match="image tokens"):
        list(broken)
    assert read(fine).ids == alone(toy, good)
    assert engine.stats.failed == 1


def slow(toy_text: str = "abcdefghijklmnop" * 12) -> Loaded:
    return scripted(toy_text, pause=0.01)


def test_a_full_queue_says_so_and_cancelling_makes_room() -> None:
    loaded = slow()
    prompt = loaded.processor.encode([user("Hi")])
    with Engine(loaded, slots=1, queue=1) as engine:
        running = engine.submit(prompt)
        next(iter(running))
        waiting = engine.submit(prompt)
        with pytest.raises(Busy, match="1 requests are waiting already"):
            engine.submit(prompt)
        assert engine.stats.queued == 1
        waiting.cancel()
        last = engine.submit(prompt)
        running.cancel()
        last.cancel()
        for ticket in (running, waiting, last):
            list(ticket)
            assert ticket.answer.stop == "cancelled"
        assert engine.stats.cancelled == 3


def test_closing_cancels_what_runs_and_waits_and_refuses_newcomers() -> None:
    loaded = slow()
    prompt = loaded.processor.encode([user("Hi")])
    engine = Engine(loaded, slots=1)
    tickets = [engine.submit(prompt) for _ in range(3)]
    next(iter(tickets[0]))
    engine.close()
    engine.close()
    for ticket in tickets:
        list(ticket)
        assert ticket.answer.stop == "cancelled"
    assert tickets[0].answer.text
    with pytest.raises(Busy, match="closing"):
        engine.submit(prompt)
    assert not [t for t in threading.enumerate() if t.name == "cogvlm-engine"]


def test_closing_may_wait_for_what_runs(toy: Loaded) -> None:
    engine = Engine(toy)
    tickets = [engine.submit(prompt, greedy()) for prompt in prompts(toy)]
    engine.close(wait=600.0)
    assert {t.answer.stop for t in tickets} <= {"end", "length"}
    assert engine.stats.finished == 8


def test_closing_waits_no_longer_than_told() -> None:
    loaded = slow("abcdefghijklmnop" * 400)
    prompt = loaded.processor.encode([user("Hi")])
    engine = Engine(loaded, slots=1)
    ticket = engine.submit(prompt, Sampling(10_000))
    next(iter(ticket))
    started = time.monotonic()
    engine.close(wait=0.2)
    assert time.monotonic() - started < 60  # the answer would take longer
    assert ticket.answer.stop in ("cancelled", "length")


@pytest.mark.slow
def test_200_people_with_200_pictures_get_their_own_answers(toy: Loaded) -> None:
    many = [toy.processor.encode([user(picture(i), f"What is it, {i}?")]) for i in range(200)]
    expected = [alone(toy, prompt, 6) for prompt in many]
    assert len(set(expected)) > 150
    found: dict[int, tuple[int, ...]] = {}

    def ask(numbers: range) -> None:
        for number in numbers:
            while True:
                try:
                    ticket = engine.submit(many[number], greedy(6))
                    break
                except Busy:
                    time.sleep(0.001)
            found[number] = read(ticket).ids

    with Engine(toy, prefix_bytes=MIB, image_bytes=MIB, queue=8) as engine:
        threads = [threading.Thread(target=ask, args=(range(i, 200, 20),)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats
    assert [found[i] for i in range(200)] == expected
    assert (stats.finished, stats.failed) == (200, 0)
    assert stats.batched_tokens > 2 * stats.steps


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(40, repetition_stop=False),
        Sampling(40, temperature=0.7, top_p=0.9, seed=3),
        Sampling(40, temperature=0.2, seed=1, logprobs=2),
        Sampling(40, repetition_penalty=1.2, presence_penalty=0.3),
    ],
)
def test_guessing_changes_no_token(
    toy: Loaded, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked for: every token is chosen as without guesses, from the same scores."""
    prompt = toy.processor.encode([user(picture(1), "what bus?")])
    with Engine(toy, drafts=0) as engine:
        without = read(engine.submit(prompt, sampling))
        assert not engine.stats.draft_tokens
    told = [*without.ids]  # most of it right
    told[len(told) // 2] += 1
    monkeypatch.setattr(service, "Drafts", lambda ids, most: Drafts([*told, *ids], most))
    with Engine(toy) as engine:
        given = read(engine.submit(prompt, sampling))
        stats = engine.stats
    assert (given.ids, given.text, given.stop) == (without.ids, without.text, without.stop)
    for one, two in zip(given.logprobs, without.logprobs, strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
    assert len(told) / 2 < stats.accepted_tokens < stats.draft_tokens
    assert stats.steps < len(told) / 2


def test_the_next_turn_of_a_talk_begins_with_the_last_one(toy: Loaded) -> None:
    backend, settings = LocalBackend(toy), GenerationSettings(6)
    talk = [user(picture(0), "What is in this picture, please?")]
    first = backend.stream(talk, settings)
    talk += [assistant("".join(first)), user("And what else is there?")]
    second = backend.stream(talk, settings)
    assert "".join(second) == second.reply.text == complete(toy, talk, settings).text
    stats = backend._engine.stats
    assert stats.image_misses == 1
    assert stats.reused_tokens >= len(toy.processor.encode(talk[:1]).input_ids) - 2
    thread = backend._engine._thread
    del backend, first, second
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()  # and lets the model go
