"""Conversations as values: construction, order, the OpenAI form."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image as PILImage

import cogvlm.processor
from cogvlm.errors import MessageError
from cogvlm.processor import (
    Image,
    Message,
    Text,
    assistant,
    check_order,
    parse_messages,
    system,
    user,
)

PNG = io.BytesIO()
PILImage.new("RGB", (2, 3), (255, 0, 0)).save(PNG, "png")
URL = "data:image/png;base64," + base64.b64encode(PNG.getvalue()).decode()


def test_importing_the_processor_imports_no_torch() -> None:
    code = (
        "import sys, cogvlm.processor\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'safetensors'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(cogvlm.processor.__file__).parents[2])}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_user_tells_text_from_pictures() -> None:
    pil, stream = PILImage.new("RGB", (1, 1)), io.BytesIO(b"x")
    message = user("a.png", Path("a.png"), b"bytes", pil, stream, Text("t"), Image("b.png"))
    kinds = [type(p).__name__ for p in message.parts]
    assert kinds == ["Text", "Image", "Image", "Image", "Image", "Text", "Image"]
    assert message.text == "a.png\nt"
    assert [i.source for i in message.images] == [Path("a.png"), b"bytes", pil, stream, "b.png"]


def test_messages_are_values() -> None:
    assert user("a", Path("b")) == Message("user", (Text("a"), Image(Path("b"))))
    assert hash(assistant("a")) == hash(Message("assistant", (Text("a"),)))
    with pytest.raises(AttributeError):
        user("a").role = "system"  # type: ignore[misc]


def test_repr_does_not_print_a_picture() -> None:
    assert repr(Image(b"x" * 10**6)) == "Image(<1000000 bytes>)"


@pytest.mark.parametrize(
    ("make", "say"),
    [
        (lambda: Message("tool", (Text("a"),)), "unknown role 'tool'"),  # type: ignore[arg-type]
        (lambda: user(), "user message is empty"),
        (lambda: Message("user", "abc"), "parts is a str"),  # type: ignore[arg-type]
        (lambda: Message("user", ("abc",)), "a part is a str"),  # type: ignore[arg-type]
        (lambda: Message("assistant", (Image("a.png"),)), "only users send images"),
        (lambda: Message("system", (Image("a.png"),)), "only users send images"),
        (lambda: user(3), "a part is a int"),  # type: ignore[arg-type]
        (lambda: Text(3), "text is a int"),  # type: ignore[arg-type]
        (lambda: Text("ab\ud800"), "character 2 is half of a surrogate pair"),
    ],
)
def test_impossible_values_are_refused(make, say) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MessageError, match=say) as caught:
        make()
    assert "\n" not in str(caught.value)


U, A, S = user("q"), assistant("a"), system("s")


@pytest.mark.parametrize("messages", [[U], [S, U], [U, A, U], [S, U, A, U, A, U]])
def test_good_orders_pass(messages: list[Message]) -> None:
    check_order(messages)
    check_order([*messages, A], train=True)
    with pytest.raises(MessageError, match="the last message is the user's"):
        check_order(messages, train=True)
    with pytest.raises(MessageError, match="the last message is the assistant's"):
        check_order([*messages, A])


@pytest.mark.parametrize(
    ("messages", "say"),
    [
        ([], "no user message"),
        ([S], "no user message"),
        ([A], "message 1 has the role 'assistant' where 'user'"),
        ([S, A], "message 2 has the role 'assistant' where 'user'"),
        ([U, U], "message 2 has the role 'user' where 'assistant'"),
        ([U, S], "message 2 has the role 'system' where 'assistant'"),
        ([S, S, U], "message 2 has the role 'system' where 'user'"),
        ([U, A, A], "message 3 has the role 'assistant' where 'user'"),
    ],
)
def test_bad_orders_are_refused(messages: list[Message], say: str) -> None:
    for train in (False, True):
        with pytest.raises(MessageError, match=say):
            check_order(messages, train)


def test_the_openai_form_is_read() -> None:
    parsed = parse_messages(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What?"},
                    {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
                    {"type": "image", "image": "a.png"},
                ],
            },
            {"role": "assistant", "content": "A bus."},
        ]
    )
    assert parsed == [
        system("Be brief."),
        user("What?", PNG.getvalue(), Image("a.png")),
        assistant("A bus."),
    ]


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("DATA:image/png;BASE64,aGk=", b"hi"),
        ("data:;base64,aG\n k=", b"hi"),
        ("data:text/plain,h%69,", b"hi,"),
        ("data:image/png;base64,aGk%3D", b"hi"),
    ],
)
def test_data_urls_are_decoded(url: str, data: bytes) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    assert parse_messages([{"role": "user", "content": content}]) == [user(data)]


def part(**fields: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": [fields]}]


def url(value: object) -> list[dict[str, object]]:
    return part(type="image_url", image_url={"url": value})


@pytest.mark.parametrize(
    ("items", "say"),
    [
        ("hello", "messages is a str"),
        ({"role": "user"}, "messages is a dict"),
        (["hello"], "message 1 is a str"),
        ([{"role": "user"}], "message 1 has no 'content'"),
        ([{"content": "a"}], "message 1 has no 'role'"),
        ([{"role": "user", "content": "a", "name": "x"}], "field 'name' is not supported"),
        ([{"role": "user", "content": None}], "message 1: content is a NoneType"),
        ([{"role": "user", "content": []}], "message 1: user message is empty"),
        ([{"role": ["user"], "content": "a"}], "unknown role"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}], "message 2: .*tool"),
        (part(type="input_audio"), "unknown part type 'input_audio'"),
        (part(text="a"), "unknown part type None"),
        ([{"role": "user", "content": ["a"]}], "unknown part type None"),
        (part(type="text", text=3), "text is a int"),
        (part(type="text"), "text part has no 'text'"),
        (part(type="text", text="a", cache=1), "field 'cache' is not supported"),
        (part(type="image_url", image_url=URL), "image_url is a str"),
        (part(type="image_url", image_url={"url": URL, "detail": "high"}), "detail 'high'"),
        (part(type="image", image=3), "image is a int"),
        (url("https://example.org/a.png"), "https URLs are not fetched here; download"),
        (url("HTTP://example.org/a.png"), "http URLs are not fetched here"),
        (url("file:///etc/passwd"), "scheme 'file' is not supported"),
        (url("/etc/passwd"), "scheme '' is not supported"),
        (url(3), "url is a int"),
        (url("data:image/png;base64"), "has no comma"),
        (url("data:image/png;base64,"), "is empty"),
        (url("data:image/png;base64,a"), "not valid base64"),
        (url("data:image/png;base64,aG!k"), "not valid base64"),
    ],
)
def test_the_openai_form_is_refused_by_name(items, say) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MessageError, match=say) as caught:
        parse_messages(items)
    assert "\n" not in str(caught.value)


def test_local_files_can_be_switched_off() -> None:
    items = part(type="image", image="/some/file.png")
    assert parse_messages(items) == [user(Image("/some/file.png"))]
    with pytest.raises(MessageError, match="names a local file, which is off"):
        parse_messages(items, files=False)
    with pytest.raises(MessageError, match="scheme '' is not supported"):
        parse_messages(url("/some/file.png"), files=False)
