"""Prompt formats: messages -> segments.

Knows no token ids and no pixels.  A segment is encoded as one unit, so where a template cuts the
text is part of the format.  Released layout (``chat``, one image, training)::

    segments  bos  [image]  "Question: Hi? Answer:"  "Yes"  eos
    labelled   .      .               .                x     x

Sources: the conversation builder of the released CogVLM2 code for ``base``, ``vqa`` and ``chat``;
the chat template of SmolLM2 for ``chatml``; the tokenizer code of GLM-4V-9B for ``glm4``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ..errors import ConfigError
from .messages import Image, Message, Text, Video, check_order

BOS = "bos"
EOS = "eos"


@dataclass(frozen=True)
class Plain:
    """Text in which nothing is special; ``labelled`` text is what training learns."""

    text: str
    labelled: bool = False


@dataclass(frozen=True)
class Special:
    """One special token by its string; :data:`BOS` and :data:`EOS` mean the tokenizer's own."""

    token: str
    labelled: bool = False


@dataclass(frozen=True)
class ImageSlot:
    """The place of an image block: begin marker, patches, end marker; a film has several."""

    image: Image | Video


Segment: TypeAlias = "Plain | Special | ImageSlot"


class Template(Protocol):
    """A prompt format."""

    @property
    def name(self) -> str:
        """Name in :data:`TEMPLATES`."""

    @property
    def specials(self) -> tuple[str, ...]:
        """Special tokens that the tokenizer must have."""

    def segments(self, messages: Sequence[Message], train: bool = False) -> list[Segment]:
        """Write the messages as segments; with ``train`` the last answer belongs to them."""


@dataclass(frozen=True)
class ReleasedTemplate:
    """The formats of the released models.

    The images and videos of the first turn stand right after bos, wherever the message has them;
    those of a later turn stand at the start of that turn.  (The released code takes one image in
    all.)  A format without history keeps only the last turn, and every image then stands after
    bos.

    The released code has no system message: here its text is the first line of the prompt.

    As released, training learns the last answer and eos only: earlier answers have no end token
    in this format.  With ``label_history`` they are learnt too, each with its closing newline.

    CogAgent's ``chat`` is another format than CogVLM's under the same name, so its formats have
    names of their own here.  Its released ``vqa`` drops earlier turns without a word; here they
    are kept, as ``Question: ... Short answer: ...`` and a newline each.
    """

    name: str
    question: str  # with one {} for the user's text
    history: bool = True
    label_history: bool = False
    answer: str = " {}\n"  # an earlier answer, with what separates it from its neighbours
    opening: str = ""  # what every prompt begins with

    @property
    def specials(self) -> tuple[str, ...]:
        """None: bos is left out where the tokenizer has none."""
        return ()

    def segments(self, messages: Sequence[Message], train: bool = False) -> list[Segment]:
        """Write the messages as segments.

        Raises:
            MessageError: the order is wrong, see :func:`check_order`.
        """
        check_order(messages, train)
        text = self.opening
        if messages[0].role == "system":
            text, messages = text + messages[0].text + "\n", messages[1:]
        questions, answers = list(messages[::2]), list(messages[1::2])
        if not self.history:
            front = [image for message in questions for image in message.visuals]
            questions, answers = questions[-1:], answers[-1:] if train else []
        else:
            front = list(questions[0].visuals)
        run = _Run([Special(BOS), *map(ImageSlot, front)], text)
        for i, message in enumerate(questions):
            if i:
                run.images(message.visuals)
            run.text += self.question.format(message.text)
            if i < len(questions) - 1:
                run.say(self.answer.format(answers[i].text), train and self.label_history)
        if train:
            run.say(answers[-1].text, True)
            run.done.append(Special(EOS, True))
        return run.close()


@dataclass
class _Run:
    """Segments under construction: those done, and the text not yet cut."""

    done: list[Segment]
    text: str

    def close(self) -> list[Segment]:
        if self.text:
            self.done.append(Plain(self.text))
            self.text = ""
        return self.done

    def images(self, images: Sequence[Image | Video]) -> None:
        if images:
            self.close().extend(map(ImageSlot, images))

    def say(self, text: str, labelled: bool) -> None:
        # Text that is not learnt stays joined to its neighbours: a cut could change the tokens.
        if labelled:
            self.close().append(Plain(text, True))
        else:
            self.text += text


@dataclass(frozen=True)
class ChatMLTemplate:
    """The format of SmolLM2, without its default system message.

    ::

        <|im_start|>user\\nHi?<|im_end|>\\n<|im_start|>assistant\\nYes<|im_end|>
        .................................................................xxxxxxxxxxxxx  labelled

    Images stand where the message has them.  Training learns every answer and its end token.
    """

    name: str = "chatml"
    start: str = "<|im_start|>"
    end: str = "<|im_end|>"

    @property
    def specials(self) -> tuple[str, ...]:
        """The two tokens around every message."""
        return (self.start, self.end)

    def segments(self, messages: Sequence[Message], train: bool = False) -> list[Segment]:
        """Write the messages as segments.

        Raises:
            MessageError: the order is wrong, see :func:`check_order`.
        """
        check_order(messages, train)
        out: list[Segment] = []
        for i, message in enumerate(messages):
            if i:
                out.append(Plain("\n"))
            out.append(Special(self.start))
            if message.role == "assistant":
                # The answer is cut from its header, as it is when the model writes it.
                out += [Plain("assistant\n"), Plain(message.text, train), Special(self.end, train)]
            else:
                out += [*_in_place(f"{message.role}\n", message), Special(self.end)]
        if not train:
            out += [Plain("\n"), Special(self.start), Plain("assistant\n")]
        return out


def _in_place(header: str, message: Message) -> list[Segment]:
    out: list[Segment] = [Plain(header)]
    after_text = False
    for part in message.parts:
        if isinstance(part, Text):
            last = out[-1]
            if isinstance(last, Plain):
                out[-1] = Plain(last.text + ("\n" if after_text else "") + part.text)
            else:
                out.append(Plain(part.text))
        else:
            out.append(ImageSlot(part))
        after_text = isinstance(part, Text)
    return out


@dataclass(frozen=True)
class GLM4Template:
    """The format of GLM-4V and CogAgent-9B.

    ::

        [gMASK]<sop><|user|>\\n[image]Hi?<|assistant|>\\nYes<|user|>
        ............................................xxxxxxxxxxxxx  labelled

    The pictures of a message stand before its text.  (The released code takes one in all.)  A
    role, its newline and its text are encoded apart, as released; a prompt ends with the role, so
    an answer begins with the newline.  Training learns every answer, its newline and the
    ``<|user|>`` that ends it, as the released fine-tuning code does.
    """

    name: str = "glm4"
    opening: tuple[str, ...] = ("[gMASK]", "<sop>")
    end: str = "<|user|>"

    @property
    def specials(self) -> tuple[str, ...]:
        """The two tokens of the opening and the three roles."""
        return (*self.opening, "<|system|>", "<|user|>", "<|assistant|>")

    def segments(self, messages: Sequence[Message], train: bool = False) -> list[Segment]:
        """Write the messages as segments.

        Raises:
            MessageError: the order is wrong, see :func:`check_order`.
        """
        check_order(messages, train)
        out: list[Segment] = [Special(name) for name in self.opening]
        learnt = False
        for message in messages:
            out.append(Special(f"<|{message.role}|>", learnt))  # after an answer it is its end
            learnt = train and message.role == "assistant"
            out += [Plain("\n", learnt), *map(ImageSlot, message.visuals)]
            if message.text:
                out.append(Plain(message.text, learnt))
        return [*out, Special(self.end, True) if train else Special("<|assistant|>")]


TEMPLATES: dict[str, Template] = {
    "base": ReleasedTemplate("base", "{}", history=False),
    "vqa": ReleasedTemplate("vqa", "Question: {} Short answer:"),
    "chat": ReleasedTemplate("chat", "Question: {} Answer:"),
    "chatml": ChatMLTemplate(),
    "glm4": GLM4Template(),
    "cogagent-base": ReleasedTemplate("cogagent-base", "{}", history=False),
    "cogagent-vqa": ReleasedTemplate("cogagent-vqa", "Question: {} Short answer:", opening="<EOI>"),
    "cogagent-chat": ReleasedTemplate("cogagent-chat", " [INST] {} [/INST] ", answer="{}"),
    "cogagent-chat_old": ReleasedTemplate(
        "cogagent-chat_old", "Question: {} Answer:", opening="<EOI>"
    ),
}


def get_template(name: str) -> Template:
    """Return a template by name.

    Raises:
        ConfigError: no such template; the known names are listed.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"unknown template {name!r}; known templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
