"""Ollama's own client against a running server."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from serve.fakes import HTTP, MODEL, FakeEngine, make_desk, png, running, seen


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with running(make_desk(engine)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=url) as client:
        yield client


USER = {"role": "user", "content": "Hi?"}
TEXT = "Question: Hi? Answer:|none"


def test_chat_answers_with_true_counts(client: ollama.Client) -> None:
    answer = client.chat(MODEL, [USER])
    assert answer.message.content == TEXT
    assert (answer.message.role, answer.done, answer.done_reason) == ("assistant", True, "stop")
    assert answer.prompt_eval_count == len("Question: Hi? Answer:") + 1
    assert answer.eval_count == len(TEXT)
    assert answer.total_duration is not None
    assert answer.prompt_eval_duration is not None
    assert answer.total_duration >= answer.prompt_eval_duration > 0


def test_chat_streams(client: ollama.Client) -> None:
    lines = list(client.chat(f"{MODEL}:latest", [USER], stream=True))
    assert "".join(line.message.content or "" for line in lines) == TEXT
    assert [line.done for line in lines[-2:]] == [False, True]
    assert lines[-1].eval_count == len(TEXT)
    assert len(lines) > 5


def test_the_stream_on_the_wire_is_json_lines_and_the_default(url: str) -> None:
    # As curl -d sends it: JSON that is called a form.
    form = {"content-type": "application/x-www-form-urlencoded"}
    body = json.dumps({"model": MODEL, "prompt": "Hi?"}).encode()
    response = HTTP.post(f"{url}/api/generate", content=body, headers=form)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["response"] for line in lines) == TEXT
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]


def test_pictures_come_as_base64(client: ollama.Client) -> None:
    answer = client.generate(MODEL, "What?", images=[png(1), png(2)], system="Be short.")
    assert answer.response == f"Be short.\nQuestion: What? Answer:|{seen(png(1), png(2))}"
    chat = client.chat(MODEL, [{**USER, "images": [png(3)]}])
    assert (chat.message.content or "").endswith(seen(png(3)))


def test_options_and_forms_reach_the_engine(client: ollama.Client, engine: FakeEngine) -> None:
    options = {
        "num_predict": 4,
        "num_ctx": 512,
        "seed": 3,
        "stop": ["x"],
        "temperature": 0.5,
        "top_k": 2,
        "top_p": 0.5,
        "min_p": 0.25,
        "repeat_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
    }
    schema = {"type": "object"}
    more: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "keep_alive": "5m"}
    answer = client.chat(MODEL, [USER], options=options, format=schema, **more)
    assert (answer.message.content, answer.done_reason) == ("Ques", "length")
    assert answer.logprobs is not None
    assert [t.token for t in answer.logprobs] == list("Ques")
    sampling = engine.asked[-1][1]
    assert (sampling.max_new_tokens, sampling.seed, sampling.stop) == (4, 3, ("x",))
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 2, 0.5)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logprobs) == (0.25, 1.2, 1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
    assert sampling.grammar is not None
    assert (sampling.grammar.kind, sampling.grammar.value) == ("json_schema", schema)
    client.generate(MODEL, "Hi?", format="json", options={"num_predict": -1, "seed": -1})
    sampling = engine.asked[-1][1]
    assert sampling.grammar is not None
    assert (sampling.grammar.kind, sampling.seed, sampling.max_new_tokens) == (
        "json_object",
        None,
        1024,
    )


def test_raw_prompts_have_no_format(client: ollama.Client) -> None:
    assert client.generate(MODEL, "Once", raw=True).response == "Once|none"


def test_a_request_without_a_question_says_that_the_model_is_loaded(client: ollama.Client) -> None:
    assert client.generate(MODEL).done_reason == "load"
    assert client.chat(MODEL).done_reason == "load"


def test_the_model_is_listed_and_shown(client: ollama.Client, url: str) -> None:
    assert [m.model for m in client.list().models] == [MODEL]
    shown = client.show(MODEL)
    assert shown.capabilities == ["completion", "vision"]
    assert shown.modelinfo == {
        "general.architecture": "cogvlm",
        "general.parameter_count": 1_000_000,
        "cogvlm.context_length": 512,
    }
    assert HTTP.get(f"{url}/api/version").json()["version"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"options": {"num_gpu": 1}}, "options.num_gpu: no such field is supported"),
    ("chat", {"options": {"mirostat": 1}}, "options.mirostat: is not supported here"),
    ("chat", {"options": {"num_ctx": 4096}}, "more than the model's context of 512"),
    ("chat", {"options": {"num_predict": 0}}, "asks for no answer"),
    ("chat", {"options": {"num_predict": 5000}}, "give 1024 or less"),
    ("chat", {"options": {"temperature": "1"}}, "options.temperature: Input should be"),
    ("chat", {"tools": [{}]}, "tools: is not supported here"),
    ("chat", {"think": True}, "think: is not supported here"),
    ("chat", {"keep_alive": 0}, "keep_alive: asks to unload"),
    ("chat", {"keep_alive": "0s"}, "keep_alive: asks to unload"),
    ("chat", {"format": "xml"}, "format"),
    ("chat", {"messages": [{**USER, "images": ["@@"]}]}, "messages[0].images[0]: not valid base64"),
    ("chat", {"messages": [{**USER, "images": ["aGk="]}]}, "is not a picture"),
    ("chat", {"messages": [{"role": "assistant", "content": "x"}]}, "message 1 has the role"),
    ("generate", {"context": [1, 2]}, "context: is not supported here"),
    ("generate", {"suffix": "x"}, "suffix: is not supported here"),
    ("generate", {"raw": True, "system": "x"}, "raw: "),
    ("generate", {"top_logprobs": 1}, "top_logprobs: needs logprobs=true"),
    ("generate", {"promt": "x"}, "promt: no such field is supported; did you mean 'prompt'?"),
    ("show", {"name": "toy"}, "name: no such field"),
]


@pytest.mark.parametrize(("route", "change", "says"), BAD, ids=lambda v: str(v)[:50])
def test_what_cannot_be_honoured_is_refused_by_name(
    url: str, route: str, change: dict[str, Any], says: str
) -> None:
    asked = {"chat": {"messages": [USER]}, "generate": {"prompt": "Hi?"}, "show": {}}[route]
    response = HTTP.post(f"{url}/api/{route}", json={"model": MODEL, **asked, **change})
    assert response.status_code == 400
    assert says in response.json()["error"]


def test_errors_have_ollamas_form(client: ollama.Client, url: str) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'other' not found") as caught:
        client.chat("other", [USER])
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="no POST /api/pull here"):
        client.pull("nano")
    broken = base64.b64encode(png(1)[:50]).decode()
    with pytest.raises(ollama.ResponseError, match="broken"):
        client.generate(MODEL, "x", images=[broken])


def test_an_error_in_mid_stream_is_told() -> None:
    engine = FakeEngine(error=RuntimeError("secret of the house"), error_at=3)
    lines = []
    with running(make_desk(engine)) as url, ollama.Client(host=url) as client:
        with pytest.raises(ollama.ResponseError, match="the server failed on this request"):
            for line in client.chat(MODEL, [USER], stream=True):
                lines.append(line.message.content)
        assert "".join(filter(None, lines)) == TEXT[:3]
