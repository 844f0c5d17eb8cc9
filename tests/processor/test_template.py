"""Prompt formats against the recorded strings, and where images and labels go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cogvlm.errors import ConfigError, MessageError
from cogvlm.processor import (
    TEMPLATES,
    Image,
    Message,
    Template,
    assistant,
    get_template,
    system,
    user,
)
from cogvlm.processor.template import (
    BOS,
    EOS,
    ImageSlot,
    Plain,
    ReleasedTemplate,
    Segment,
    Special,
)

RECORDED = json.loads((Path(__file__).parent / "data" / "tokens.json").read_text())
RELEASED = ("base", "vqa", "chat")
A, B, C = Image("a.png"), Image("b.png"), Image("c.png")


def turns(count: int) -> list[Message]:
    messages = []
    for question, answer in RECORDED["history"][:count]:
        messages += [user(question), assistant(answer)]
    return [*messages, user(RECORDED["query"])]


def show(segments: Sequence[Segment]) -> str:
    """Segments as one string: specials and images in braces, cuts as |, labelled text in [ ]."""
    out = []
    for s in segments:
        if isinstance(s, ImageSlot):
            out.append(f"{{{s.image.source!s}}}")
        else:
            text = f"{{{s.token}}}" if isinstance(s, Special) else s.text
            out.append(f"[{text}]" if s.labelled else text)
    return "|".join(out)


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("family", ["cogvlm", "cogvlm2", "cogvlm2_video"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_released_prompts_equal_the_recorded_ones(family: str, name: str, count: int) -> None:
    prompt = RECORDED["prompts"][family][name][str(count)]
    assert get_template(name).segments(turns(count)) == [Special(BOS), Plain(prompt)]


def test_released_images_stand_after_bos() -> None:
    chat = get_template("chat")
    expected = "{bos}|{a.png}|{b.png}|Question: x\ny Answer:"
    for message in (user(A, B, "x", "y"), user("x", A, "y", B), user("x", "y", A, B)):
        assert show(chat.segments([message])) == expected


def test_released_images_of_a_later_turn_stand_at_its_start() -> None:
    messages = [user("x", A), assistant("y"), user("z", B, C)]
    assert show(get_template("chat").segments(messages)) == (
        "{bos}|{a.png}|Question: x Answer: y\n|{b.png}|{c.png}|Question: z Answer:"
    )
    # base drops the history, but no image is lost.
    assert show(get_template("base").segments(messages)) == "{bos}|{a.png}|{b.png}|{c.png}|z"


def test_released_training_learns_the_last_answer() -> None:
    messages = [user(A, "x"), assistant("y"), user("z"), assistant("w")]
    assert show(get_template("chat").segments(messages, train=True)) == (
        "{bos}|{a.png}|Question: x Answer: y\nQuestion: z Answer:|[w]|[{eos}]"
    )
    assert show(get_template("vqa").segments(messages[2:], train=True)) == (
        "{bos}|Question: z Short answer:|[w]|[{eos}]"
    )
    assert show(get_template("base").segments(messages, train=True)) == (
        "{bos}|{a.png}|z|[w]|[{eos}]"
    )


def test_released_training_can_learn_every_answer() -> None:
    chat = get_template("chat")
    assert isinstance(chat, ReleasedTemplate)
    messages = [user("x"), assistant("y"), user("z"), assistant("w")]
    every = replace(chat, label_history=True)
    assert show(every.segments(messages, train=True)) == (
        "{bos}|Question: x Answer:|[ y\n]|Question: z Answer:|[w]|[{eos}]"
    )
    # Prompts stay as they are.
    assert every.segments(messages[:3]) == chat.segments(messages[:3])


@pytest.mark.parametrize("name", RELEASED)
def test_released_system_text_is_the_first_line(name: str) -> None:
    alone = get_template(name).segments([user(A, "x")])
    with_system = get_template(name).segments([system("Be brief."), user(A, "x")])
    assert show(with_system) == show(alone).replace("{a.png}|", "{a.png}|Be brief.\n")


def test_braces_of_a_user_are_text() -> None:
    assert show(get_template("chat").segments([user("{0} {x} {}")])) == (
        "{bos}|Question: {0} {x} {} Answer:"
    )


def test_chatml() -> None:
    chatml = get_template("chatml")
    assert show(chatml.segments([user("Hi?")])) == (
        "{<|im_start|>}|user\nHi?|{<|im_end|>}|\n|{<|im_start|>}|assistant\n"
    )
    messages = [system("s"), user("x", "y"), assistant("a"), user("z")]
    s, e = "{<|im_start|>}|", "|{<|im_end|>}|\n|"
    prompt = f"{s}system\ns{e}{s}user\nx\ny{e}{s}assistant\n|a{e}{s}user\nz{e}{s}assistant\n"
    assert show(chatml.segments(messages)) == prompt


def test_chatml_images_stand_where_they_are() -> None:
    segments = get_template("chatml").segments([user("x", A, "y", "z", B), assistant("w"), user(C)])
    assert show(segments) == (
        "{<|im_start|>}|user\nx|{a.png}|y\nz|{b.png}|{<|im_end|>}|\n|"
        "{<|im_start|>}|assistant\n|w|{<|im_end|>}|\n|"
        "{<|im_start|>}|user\n|{c.png}|{<|im_end|>}|\n|{<|im_start|>}|assistant\n"
    )


def test_chatml_learns_every_answer_and_its_end() -> None:
    messages = [user("x"), assistant("y"), user("z"), assistant("w")]
    segments = get_template("chatml").segments(messages, train=True)
    labelled = [s for s in segments if not isinstance(s, ImageSlot) and s.labelled]
    end = Special("<|im_end|>", True)
    assert labelled == [Plain("y", True), end, Plain("w", True), end]
    assert segments[-2:] == labelled[-2:]


def test_chatml_training_row_continues_its_prompt() -> None:
    # What is learnt must be what is asked: a row without its labels is the prompt.
    chatml = get_template("chatml")
    prompt = chatml.segments([user(A, "x")])
    row = chatml.segments([user(A, "x"), assistant("y")], train=True)
    assert row[: len(prompt)] == prompt
    assert show(row[len(prompt) :]) == "[y]|[{<|im_end|>}]"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_end_of_the_row_and_order_errors(template: Template) -> None:
    end = {"chatml": "<|im_end|>", "glm4": "<|user|>"}.get(template.name, EOS)
    row = template.segments([user("x"), assistant("y")], train=True)
    assert row[-1] == Special(end, True)
    with pytest.raises(MessageError, match="last message"):
        template.segments([user("x"), assistant("y")])
    with pytest.raises(MessageError, match="no user message"):
        template.segments([])


def test_no_text_is_lost_or_doubled() -> None:
    # Every text of a conversation is in the segments once, for any number of turns and images.
    for name, template in TEMPLATES.items():
        for count in range(1, 5):
            for images in range(3):
                messages = []
                for i in range(count):
                    messages += [user(*[A] * images, f"<q{i}>"), assistant(f"<a{i}>")]
                for train, given in ((False, messages[:-1]), (True, messages)):
                    shown = show(template.segments(given, train))
                    kept = given[-2:] if name.endswith("base") and train else given
                    kept = given[-1:] if name.endswith("base") and not train else kept
                    for message in kept:
                        assert shown.count(message.text) == 1
                    assert shown.count("{a.png}") == images * count


def test_unknown_template() -> None:
    with pytest.raises(ConfigError, match="unknown template 'other'; known templates: base, vqa"):
        get_template("other")
