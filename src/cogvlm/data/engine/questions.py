"""What can be asked about a picture whose truth is known, with short and full answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from ...processor.lines import place
from . import words
from .step import Fact, Picture, Piece, Random
from .wording import ASK, YES_NO

LONGEST = 1200  # characters of an answer
PLACES = (
    "read a place", "where is", "what is at", "click", "where is text", "where is a line",
    "where are",
)  # fmt: skip
"""Tasks of boxes."""
_NAMED = ("button", "field", "link", "bar", "slice", "object", "box")


@dataclass(frozen=True)
class Ask:
    """A question with its answers."""

    task: str
    question: str
    short: str
    full: str = ""  # the short one again where there is no other


def questions(picture: Picture, rng: Random) -> list[Ask]:
    """All kinds of questions that a picture answers; of each kind, one or a few."""
    truth = picture.truth
    pool: list[Ask] = []
    if truth.text.strip() and len(truth.text) <= LONGEST and not truth.table:
        # In the language of the text, half of the time.
        han = any("\u4e00" <= sign <= "\u9fff" for sign in truth.text) and rng.random() < 0.5
        pool += [Ask("read", words.pick(rng, ASK["read zh" if han else "read"]), truth.text)] * 2
    if truth.caption:
        pool.append(Ask("caption", words.pick(rng, ASK["caption"]), truth.caption))
        if zh := truth.extra.get("zh"):
            pool.append(Ask("caption", "描述这张图片。", f"{zh}。"))
    pool += _read_part(picture, rng)
    pool += _where(picture, rng)
    pool += [
        ask for fact in words.several(rng, truth.facts, 6) if (ask := about(fact, rng)) is not None
    ]
    if truth.table:
        pool += _about_table(picture, rng)
    pool += _about_extra(picture, rng)
    return [a for a in pool if a.short.strip() and len(a.full or a.short) <= LONGEST]


def about(fact: Fact, rng: Random) -> Ask | None:
    """A fact as a question."""
    if fact.name == "ticked":
        yes = fact.value == "yes"
        full = f"Yes, {fact.of} is ticked." if yes else f"No, {fact.of} is not ticked."
        return Ask("tick box", f'Is "{fact.of}" ticked?', "yes" if yes else "no", full)
    if fact.name == "object":
        return None  # its caption and place say it
    if fact.name == "count":
        verb = "is" if fact.value == "1" else "are"
        question = f"How many of these are in the picture: {fact.of}?"
        return Ask("count", question, fact.value, f"There {verb} {fact.value}.")
    if fact.name.startswith("number of "):
        what = fact.name.removeprefix("number of ")
        some = f"is 1 {what.removesuffix('s')}" if fact.value == "1" else f"are {fact.value} {what}"
        full = f"There {some}."
        return Ask("count", f"How many {what} are there?", fact.value, full)
    if fact.name in ("highest", "lowest"):
        of = f" for {fact.of}" if fact.of else ""
        return Ask(
            "compare",
            f"Which has the {fact.name} value{of}?",
            fact.value,
            f"{fact.value} has the {fact.name} value{of}.",
        )
    if fact.name == "next step":
        return Ask(
            "diagram",
            f'What comes after "{fact.of}"?',
            fact.value,
            f'After "{fact.of}" comes "{fact.value}".',
        )
    name = fact.name if fact.name != fact.name.title() or fact.of else fact.name.lower()
    if not fact.value:
        return Ask(
            "empty field",
            f'What is written in the field "{fact.name}"?',
            "nothing",
            f'The field "{fact.name}" is empty.',
        )
    if fact.of:
        question = words.pick(rng, ASK["value"]).format(n=name, o=fact.of)
        return Ask("value", question, fact.value, f"The {name} of {fact.of} is {fact.value}.")
    question = words.pick(rng, ASK["fact"]).format(n=name, N=name[0].upper() + name[1:])
    return Ask("document", question, fact.value, f"The {name} is {fact.value}.")


def _read_part(picture: Picture, rng: Random) -> list[Ask]:
    truth, pool = picture.truth, []
    lines = [p for p in truth.lines if p.role in ("line", "title", "code", "row")]
    if len(lines) > 2:
        for name, line in (("first", lines[0]), ("second", lines[1]), ("last", lines[-1])):
            full = f'The {name} line is "{line.text}".'
            pool.append(Ask("read a line", f"What is the {name} line?", line.text, full))
        line = words.pick(rng, lines)
        pool.append(
            Ask(
                "read a place",
                words.pick(rng, ASK["read a place"]).format(place(line.box, picture.size)),
                line.text,
            )
        )
    pool += _about_words([word for line in lines for word in line.text.split()], rng)
    pool += _next_line(picture, rng)
    once = _once(truth.words)
    if len(once) > 4:
        word = words.pick(rng, once)
        pool.append(
            Ask(
                "read a place",
                words.pick(rng, ASK["read a place"]).format(place(word.box, picture.size)),
                word.text,
            )
        )
    return pool


def _about_words(text: list[str], rng: Random) -> list[Ask]:
    """Questions about the words of a running text: its ends, neighbours, what is in it."""
    if len(text) < 4:
        return []
    pool = [
        Ask("read a word", f"What is the {name} word?", word, f'The {name} word is "{word}".')
        for name, word in (("first", text[0]), ("last", text[-1]))
    ]
    counts = Counter(text)
    once = [i for i, word in enumerate(text) if counts[word] == 1 and word.isalnum()]
    for side, step in (("after", 1), ("before", -1)):
        known = [i for i in once if 0 <= i + step < len(text) and text[i + step].isalnum()]
        for i in words.several(rng, known, 2):
            word, found = text[i], text[i + step]
            question = f'Which word comes {side} "{word}"?'
            pool.append(Ask("next word", question, found, f'"{found}" comes {side} "{word}".'))
    asked = [text[i] for i in words.several(rng, once, 1)] + [words.pick(rng, words.COMMON)]
    for word in asked:  # one that is there, and one that hardly is
        there = any(word.lower() in other.lower() for other in text)
        question = f'Is the word "{word}" in the picture?{YES_NO}'
        pool.append(Ask("word there", question, "yes" if there else "no"))
    return pool


def _next_line(picture: Picture, rng: Random) -> list[Ask]:
    """What stands right above and below a short line."""
    lines = [line for line in _once(picture.truth.lines) if line.role != "row"]
    pool: list[Ask] = []
    if any(fact.name == "next step" for fact in picture.truth.facts):
        return pool  # of a diagram, arrows say what comes after what
    pairs = [pair for pair in pairwise(lines) if _below(*pair)]
    for upper, lower in words.several(rng, pairs, 2):
        for side, known, found in (("below", upper, lower), ("above", lower, upper)):
            question = words.pick(rng, ASK[side]).format(known.text)
            full = f'"{found.text}" stands {side} "{known.text}".'
            pool.append(Ask("next line", question, found.text, full))
    return pool


def _below(upper: Piece, lower: Piece) -> bool:
    """Whether a line stands right under another, and both are short enough to be named."""
    high = upper.box[3] - upper.box[1]
    gap = lower.box[1] - upper.box[3]
    beside = min(upper.box[2], lower.box[2]) - max(upper.box[0], lower.box[0])
    short = max(len(upper.text), len(lower.text)) <= 40
    return short and -0.5 * high < gap < 2 * high and beside > 0


def _read_at(piece: Piece, picture: Picture, rng: Random) -> Ask:
    at = place(piece.box, picture.size)
    return Ask("read a place", words.pick(rng, ASK["read a place"]).format(at), piece.text)


def _where(picture: Picture, rng: Random) -> list[Ask]:
    """Grounding: from a name to its place and back."""
    pool = []
    things = [p for p in _once(picture.truth.items) if p.role in _NAMED and p.text]
    for thing in words.several(rng, things, 3):
        name = thing.text if thing.role == "object" else f'the {thing.role} "{thing.text}"'
        at = place(thing.box, picture.size)
        pool.append(
            Ask(
                "where is",
                words.pick(rng, ASK["where"]).format(name),
                at,
                f"{name[0].upper()}{name[1:]} is at {at}.",
            )
        )
        pool.append(Ask("what is at", words.pick(rng, ASK["what"]).format(at), name))
    if buttons := [p for p in things if p.role in ("button", "link")]:
        button = words.pick(rng, buttons)
        pool.append(
            Ask(
                "click",
                f'Where do I click to choose "{button.text}"?',
                place(button.box, picture.size),
            )
        )
    texts = [p for p in _once(picture.truth.words) if len(p.text) > 3 and p.text.isalnum()]
    if texts:
        word = words.pick(rng, texts)
        pool.append(
            Ask(
                "where is text",
                words.pick(rng, ASK["where"]).format(f'the word "{word.text}"'),
                place(word.box, picture.size),
            )
        )
    if whole := [p for p in _once(picture.truth.lines) if p.role != "row" and len(p.text) <= 40]:
        line = words.pick(rng, whole)
        question = words.pick(rng, ASK["where"]).format(f'the line "{line.text}"')
        pool.append(Ask("where is a line", question, place(line.box, picture.size)))
    twice = [name for name, n in Counter(p.text for p in picture.truth.items).items() if n > 1]
    if twice and picture.truth.items[0].role == "object":
        boxes = [p.box for p in picture.truth.items if p.text == twice[0]]
        inside = ";".join(place(box, picture.size)[2:-2] for box in sorted(boxes))
        pool.append(Ask("where are", f"Where is every {twice[0]}?", f"[[{inside}]]"))
    return pool


def _once(pieces: tuple[Piece, ...]) -> list[Piece]:
    """Those whose text no other has: what has two places has no place."""
    counts = Counter(p.text for p in pieces)
    return [p for p in pieces if counts[p.text] == 1]


def _about_table(picture: Picture, rng: Random) -> list[Ask]:
    table = picture.truth.table
    head, rows = table[0], table[1:]
    plain = "\n".join(" | ".join(row) for row in table)
    pool = [
        Ask("table", words.pick(rng, ASK["table"]), plain),
        Ask("columns", "Which columns does the table have?", ", ".join(head))
        if "chart" not in picture.truth.extra
        else Ask(
            "chart kind",
            "What kind of chart is this?",
            picture.truth.extra["chart"],
            f"This is a {picture.truth.extra['chart']}.",
        ),
    ]
    column = int(rng.integers(1, len(head)))
    pool += _about_row(table, column, rng)
    numbers = [_as_number(row[column]) for row in rows]
    if len(rows) > 1 and all(n is not None for n in numbers):
        i, j = (int(v) for v in rng.permutation(len(rows))[:2])
        a, b = numbers[i] or 0.0, numbers[j] or 0.0
        if a != b:
            more = rows[i][0] if a > b else rows[j][0]
            pool.append(
                Ask(
                    "compare",
                    f"Which has more {head[column]}, {rows[i][0]} or {rows[j][0]}?",
                    more,
                    f"{more} has more {head[column]}.",
                )
            )
            gap = f"{abs(a - b):.10g}"
            pool.append(
                Ask(
                    "difference",
                    f"By how much do {rows[i][0]} and {rows[j][0]} differ in {head[column]}?",
                    gap,
                    f"They differ by {gap}.",
                )
            )
        total = f"{sum(n or 0.0 for n in numbers):.10g}"
        pool.append(
            Ask("sum", f"What is the sum of {head[column]}?", total, f"The sum is {total}.")
        )
    return pool


def _about_row(table: tuple[tuple[str, ...], ...], column: int, rng: Random) -> list[Ask]:
    """From a value back to its row, and what stands under and beside a cell."""
    head, rows = table[0], table[1:]
    pool = []
    counts = Counter(cell for row in rows for cell in row)
    known = [row for row in rows if counts[row[column]] == counts[row[0]] == 1]
    if known:
        name, value = (words.pick(rng, known)[c] for c in (0, column))
        question = words.pick(rng, ASK["row"]).format(h=head[0], n=head[column], v=value)
        pool.append(Ask("which row", question, name, f"{name} has the {head[column]} {value}."))
    alone = [row for row in rows if counts[row[0]] == 1]
    if alone:
        row = words.pick(rng, alone)
        question = words.pick(rng, ASK["beside"]).format(o=row[0])
        pool.append(Ask("beside", question, row[1], f'"{row[1]}" stands beside "{row[0]}".'))
    return pool


def _as_number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").rstrip("%"))
    except ValueError:
        return None


def _about_extra(picture: Picture, rng: Random) -> list[Ask]:
    extra, pool = picture.truth.extra, []
    if "latex" in extra:
        pool += [Ask("latex", words.pick(rng, ASK["latex"]), extra["latex"])] * 2
    if "formula" in extra:
        pool += [Ask("formula", words.pick(rng, ASK["formula"]), extra["formula"])] * 2
    if "code" in extra:
        pool.append(Ask("code", "Write out the program code.", extra["code"]))
    return pool
