"""OpenAI's own client against a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from cogvlm.serve import Settings
from serve.fakes import HTTP, MODEL, FakeEngine, data_url, image_part, make_desk, png, running, seen


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with running(make_desk(engine)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, content: Any, **more: Any) -> Any:
    messages = content if isinstance(content, list) and "role" in content[0] else None
    messages = messages or [{"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, **more)


def test_a_question_is_answered(client: openai.OpenAI) -> None:
    answer = ask(client, "Hi?")
    text = "Question: Hi? Answer:|none"
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len("Question: Hi? Answer:") + 1  # bos
    assert answer.usage.completion_tokens == len(text)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(text)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_a_stream_joins_to_the_whole_and_counts_at_its_end(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "Hi?", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == "Question: Hi? Answer:|none"
    assert len([p for p in pieces if p]) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("".join(pieces))
    assert len({c.id for c in chunks}) == 1


def test_a_stream_gives_no_usage_unasked(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "Hi?", stream=True))
    assert all(c.usage is None for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_stream_on_the_wire_is_server_sent_events(url: str) -> None:
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "é中"}]}
    response = HTTP.post(f"{url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert json.loads(events[0][6:])["object"] == "chat.completion.chunk"


def test_parts_come_in_any_order_and_pictures_are_several(client: openai.OpenAI) -> None:
    first, second = png(1), png(2)
    parts = [image_part(first), {"type": "text", "text": "What?"}, image_part(second)]
    assert ask(client, parts).choices[0].message.content.endswith(seen(first, second))
    assert seen(first, second) != seen(second, first)


def test_history_and_system_messages_reach_the_model(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [image_part(png(1)), {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
        {"role": "user", "content": "Colour?"},
    ]
    text = ask(client, messages).choices[0].message.content
    assert text.startswith("Be short.\nQuestion: What? Answer: A bus.\nQuestion: Colour? Answer:|")
    assert len(engine.asked[-1][0].pixel_values) == 1


def test_an_answer_of_ours_can_be_sent_back_as_it_is(client: openai.OpenAI) -> None:
    first = ask(client, "One?").choices[0].message
    messages = [
        {"role": "user", "content": "One?"},
        first.model_dump(),
        {"role": "user", "content": "Two?"},
    ]
    assert "Two?" in ask(client, messages).choices[0].message.content


def test_every_setting_reaches_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    ask(
        client,
        "Hi?",
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["a", "b"],
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"12": -100, "13": 2},
        logprobs=True,
        top_logprobs=2,
        n=1,
        user="somebody",
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "repetition_stop": False,
            "regex": "[a-z]+",
        },
    )
    sampling = engine.asked[-1][1]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (5, 0.5, 0.9)
    assert (sampling.seed, sampling.stop) == (7, ("a", "b"))
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
    assert (dict(sampling.logit_bias), sampling.logprobs) == ({12: -100, 13: 2}, 2)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (4, 0.1, 1.1)
    assert sampling.repetition_stop is False
    assert sampling.grammar is not None
    assert (sampling.grammar.kind, sampling.grammar.value) == ("regex", "[a-z]+")


@pytest.mark.parametrize(
    ("form", "kind", "value"),
    [
        ({"type": "json_object"}, "json_object", None),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}},
            "json_schema",
            {"type": "array"},
        ),
    ],
)
def test_forms_of_answers_reach_the_engine(
    client: openai.OpenAI, engine: FakeEngine, form: Any, kind: str, value: Any
) -> None:
    ask(client, "Hi?", response_format=form)
    grammar = engine.asked[-1][1].grammar
    assert grammar is not None
    assert (grammar.kind, grammar.value) == (kind, value)


def test_a_limit_ends_with_length(client: openai.OpenAI) -> None:
    answer = ask(client, "Hi?", max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "Ques"
    assert answer.usage.completion_tokens == 4


def test_logprobs_are_given_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = ask(client, "Hi?", max_tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert [t.token for t in whole.content] == ["Q", "u", "e"]
    assert whole.content[0].bytes == [81]
    assert [(t.token, t.logprob) for t in whole.content[0].top_logprobs] == [("a", -1), ("b", -2)]
    chunks = ask(client, "Hi?", max_tokens=3, logprobs=True, top_logprobs=2, stream=True)
    streamed = [t for c in chunks if (p := c.choices[0].logprobs) for t in p.content]
    assert streamed == whole.content


def test_completions_take_the_prompt_as_it_is(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", logprobs=1, max_tokens=6)
    assert answer.choices[0].text == "Once|n"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list("Once|n")
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    chunks = list(client.completions.create(model=MODEL, prompt=["Once"], stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "Once|none"


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "cogvlm"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other' here") as caught:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no POST /v1/embeddings here"):
        client.embeddings.create(model=MODEL, input="x")


USER = {"role": "user", "content": "Hi?"}
BAD = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "'tool'"),
    ({"messages": [{**USER, "name": "Bob"}]}, "messages[0].name", "is not supported here"),
    ({"messages": [USER, USER]}, "messages", "message 2 has the role 'user'"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "is due"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0]",
        "input_audio",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages[0].content[0].text",
        "valid string",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}}
                    ],
                }
            ]
        },
        "messages[0].content[0].image_url.detail",
        "'auto' or 'high'",
    ),
    ({"temperature": "0.5"}, "temperature", "valid number"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 9999}, "max_tokens", "give 1024 or less"),
    ({"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens", "give one of them"),
    ({"n": 2}, "n", "leave it out or give null or 1"),
    ({"n": True}, "n", "is not supported here"),
    ({"tools": [{"type": "function"}]}, "tools", "is not supported here"),
    ({"tool_choice": "auto"}, "tool_choice", "is not supported here"),
    ({"store": True}, "store", "is not supported here"),
    ({"temprature": 0.5}, "temprature", "did you mean 'temperature'?"),
    ({"zzz": 1}, "zzz", "no such field is supported; remove it"),
    ({"stop": [""]}, "stop", "none of them empty"),
    ({"logit_bias": {"word": 1}}, "logit_bias", "not the id of a token"),
    ({"logit_bias": {"1": 1000}}, "logit_bias.1", "less than or equal to 100"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
    ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
    (
        {"response_format": {"type": "json_object"}, "regex": "a"},
        "regex",
        "an answer has one form",
    ),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**64}, "seed", "less than"),
]


@pytest.mark.parametrize(("change", "param", "says"), BAD, ids=lambda v: str(v)[:50])
def test_what_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, Any], param: str, says: str
) -> None:
    body = {"model": MODEL, "messages": [USER], **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    error: Any = caught.value.body
    assert says in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "x"}, "suffix"),
        ({}, "prompt"),
    ],
)
def test_completions_refuse_by_name_too(
    client: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": MODEL, **change}, cast_to=object)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("http://example.com/a.png", "--allow-url"),
        ("file:///etc/passwd", "scheme 'file' is not supported"),
        ("/etc/passwd", "scheme '' is not supported"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,é", "not valid base64"),
        (data_url(b"this is no picture"), "is not a picture"),
        (data_url(png(1)[:60]), "broken"),
        ("data:,%89PNG", "is not a picture"),
    ],
)
def test_pictures_that_cannot_be_read_are_refused(
    client: openai.OpenAI, given: str, says: str
) -> None:
    part = {"type": "image_url", "image_url": {"url": given}}
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, [part])


def test_api_keys_are_asked_for() -> None:
    with running(make_desk(FakeEngine(), Settings(api_keys=("one", "two")))) as url:
        for key in ("one", "two"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
                assert client.models.list().data
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="three") as client,
            pytest.raises(openai.AuthenticationError, match="the API key is wrong") as caught,
        ):
            client.models.list()
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert HTTP.get(f"{url}/v1/models").status_code == 401
        assert HTTP.get(f"{url}/metrics").status_code == 401
        assert HTTP.get(f"{url}/api/tags").json() == {
            "error": "the API key is missing; send Authorization: Bearer KEY"
        }
        assert HTTP.get(f"{url}/health").status_code == 200
        assert HTTP.get(f"{url}/ready").status_code == 200


def test_a_full_queue_says_when_to_come_back() -> None:
    engine = FakeEngine()
    with running(make_desk(engine)) as url:
        engine.full = True
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.RateLimitError) as caught,
        ):
            ask(client, "Hi?")
        assert int(caught.value.response.headers["retry-after"]) > 0
        assert caught.value.code == "queue_full"
