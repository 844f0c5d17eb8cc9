"""Questions and answers out of what is known of a picture.

For each picture the questions that its truth can answer are drawn up, a few are taken at random,
each in one of several wordings, with a short or a full answer.  Places are ``[[x0,y0,x1,y1]]`` in
thousandths of the picture, 000 to 999, as the grounding models of the family write them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from . import words
from .questions import Ask, about, questions
from .step import Each, Item, Picture, Random, Refused, Reject, Sample, Turn
from .wording import ABSENT, FULL, SHORT

ALL = ("read", "table", "code", "latex")
"""Tasks whose answer is everything that is printed."""


@dataclass(frozen=True)
class Compose:
    """The settings of :meth:`step`.

    Attributes:
        turns: Most questions about a picture; from 1 on, fewer are likelier.
        negatives: Chance that a question about something that is not there is among them.
        text_only: Chance of one more sample that has the text instead of the picture.
        pairs: Chance that two pictures come together, with questions about which is which.
        held_out: Things that are asked for and not there are held-out ones too.
        without: Tasks that are never set.
        first: Chance that everything that is printed is asked for first, not last.
    """

    turns: int = 4
    negatives: float = 0.15
    text_only: float = 0.05
    pairs: float = 0.08
    held_out: bool = False
    without: frozenset[str] = frozenset()
    first: float = 0.0

    def __call__(self, items: Iterable[Item]) -> Iterator[Item]:
        """The step: samples without turns get some; pictures may be joined in pairs."""
        before: Sample | None = None
        for item in Each("compose", self.ask)(items):
            yield item
            if isinstance(item, Reject) or len(item.pictures) != 1:
                continue
            if before is not None and item.rng("pair").random() < self.pairs:
                if (pair := join(_paired(before, item))) is not None:
                    yield pair
                before = None
            else:
                before = item

    def ask(self, sample: Sample) -> Iterator[Sample]:
        """A sample with its turns, and perhaps one of text alone.

        Raises:
            Refused: nothing can be asked.
        """
        if sample.turns:
            yield sample
            return
        rng = sample.rng("compose")
        picture = sample.pictures[0]
        pool = [ask for ask in questions(picture, rng) if ask.task not in self.without]
        if not pool:
            raise Refused("nothing to ask")
        count = 1 + int(rng.binomial(max(0, self.turns - 1), 0.4))
        chosen = _several_tasks(rng, pool, count)
        if (
            rng.random() < self.negatives
            and (no := _absent(picture, rng, self.held_out)) is not None
        ):
            chosen.append(no)
        # All of the text mostly comes last: whatever is asked after it could be answered from it.
        first = bool(self.first) and rng.random() < self.first
        chosen.sort(key=lambda ask: ask.task in ALL, reverse=first)
        yield _with_turns(sample, chosen, rng, "<image>\n")
        if rng.random() < self.text_only and (text := _text_only(sample, rng)) is not None:
            yield text


def _paired(first: Sample, second: Sample) -> Sample:
    return replace(
        second,
        id=f"{second.id}+pair",
        kind=f"{first.kind} and {second.kind}",
        pictures=(*first.pictures, *second.pictures),
        turns=(),
        tasks=(),
        source="+".join(sorted({first.source, second.source})),
        licence="; ".join(sorted({first.licence, second.licence})),
    )


def join(sample: Sample) -> Sample | None:
    """Questions about two pictures; none where nothing tells them apart."""
    rng = sample.rng("join")
    first, second = sample.kind.split(" and ")
    one, two = sample.pictures
    pool = []
    for number, (name, kind, other) in enumerate(
        (("first", first, second), ("second", second, first))
    ):
        truth = sample.pictures[number].truth
        if kind != other:
            pool.append(
                Ask(
                    "which picture",
                    f"Which picture shows {_a(kind)}, the first or the second?",
                    name,
                    f"The {name} picture shows {_a(kind)}.",
                )
            )
        if truth.text and len(truth.text) < 300:
            pool.append(Ask("read one of two", f"What does the {name} picture say?", truth.text))
        if truth.caption:
            pool.append(Ask("caption one of two", f"Describe the {name} picture.", truth.caption))
    if one.truth.caption and two.truth.caption:
        both = f"First: {one.truth.caption} Second: {two.truth.caption}"
        pool.append(Ask("caption both", "What do the two pictures show?", both))
    if not pool:
        return None
    chosen = _several_tasks(rng, pool, int(rng.integers(1, 4)))
    return _with_turns(sample, chosen, rng, "<image><image>\n")


def _a(kind: str) -> str:
    kind = {
        "paragraph": "page of text",
        "line": "line of print",
        "screen": "web page",
        "code": "piece of a program",
        "document": "page of a document",
    }.get(kind, kind)
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _several_tasks(rng: Random, pool: list[Ask], count: int) -> list[Ask]:
    """So many, of different tasks as far as there are any."""
    left = words.several(rng, pool, len(pool))
    chosen: list[Ask] = []
    while left and len(chosen) < count:
        done = {ask.task for ask in chosen}
        best = next((a for a in left if a.task not in done), None)
        if best is None:
            best = left[0]
        left.remove(best)
        chosen.append(best)
    return chosen


def _with_turns(sample: Sample, chosen: list[Ask], rng: Random, pictures: str) -> Sample:
    turns: list[Turn] = []
    for number, ask in enumerate(chosen):
        answer, cue = ask.short, ""
        if ask.full and rng.random() < 0.5:
            answer, cue = ask.full, words.pick(rng, FULL)
        elif ask.full and not ask.short.startswith("[["):
            # A question that wants a short answer mostly says so.
            cue = words.pick(rng, SHORT)
        question = f"{ask.question}{cue}"
        if "<image>" in question or "<video>" in question:
            raise Refused("holds a picture mark", question[:60])
        turns.append(Turn("user", (pictures if number == 0 else "") + question))
        turns.append(Turn("assistant", answer))
    return replace(sample, turns=tuple(turns), tasks=tuple(ask.task for ask in chosen))


# --- what is not there -------------------------------------------------------------------------


def _absent(picture: Picture, rng: Random, held_out: bool = False) -> Ask | None:
    """A question whose answer is that it is not in the picture."""
    truth = picture.truth
    roles = {p.role for p in truth.items}
    said = f"{truth.text} {truth.caption} {' '.join(p.text for p in truth.items)}".lower()
    if "object" in roles:
        from .objects import things

        # A machine without drawings may still read samples that have some.
        name = words.pick(rng, [t.name for t in things(held_out)] or words.THINGS)
        question = words.pick(rng, ("Where is the {}?", "Is there a {} in the picture?")).format(
            name
        )
    elif "button" in roles:
        name = words.pick(
            rng, ("Upload", "Print", "Undo", "Help", "Play", "Refresh", "Export", "Mute")
        )
        question = f'Where is the button "{name}"?'
    elif truth.table:
        name = words.pick(rng, (*words.COUNTRIES, *words.CITIES))
        question = f"What is the value for {name}?"
    elif truth.facts:
        name = words.pick(
            rng, ("discount", "invoice number", "telephone number", "expiry date", "weight")
        )
        question = f"What is the {name}?"
    elif truth.words:
        name = words.pick(rng, words.GOODS).split()[0]
        question = f'Where is the word "{name}"?'
    else:
        return None
    if any(part in said for part in name.lower().split()) or (
        name == "telephone number" and "tel" in said
    ):
        return None
    if question.startswith("Is there"):
        return Ask("not there", question, "no", f"No, there is no {name} in the picture.")
    return Ask("not there", question, words.pick(rng, ABSENT))


def _text_only(sample: Sample, rng: Random) -> Sample | None:
    """The same questions about the text itself: the language side learns to quote."""
    truth = sample.pictures[0].truth
    facts = [f for f in truth.facts if f.value and f.value in truth.text]
    facts = [f for f in facts if f.name not in ("ticked", "object", "count")]
    asks = [ask for fact in words.several(rng, facts, 3) if (ask := about(fact, rng)) is not None]
    if not asks or not 20 < len(truth.text) < 800 or "<image>" in truth.text:
        return None
    bare = replace(sample, id=f"{sample.id}+text", kind="text", pictures=())
    return _with_turns(bare, asks, rng, f"Read this:\n{truth.text}\n\n")
