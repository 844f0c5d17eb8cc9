"""Pages with an order of their own: tables, forms, receipts, diagrams.

As :mod:`pages`: each layout is a function of a setting and an ``rng`` and returns a canvas whose
facts are what may be asked about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from . import words
from .ink import Canvas, Style, around
from .pages import Look, Setting, look, sheet
from .step import Fact, Piece, Random, Refused

_COLUMNS: dict[str, Callable[[Random], str]] = {
    "Date": words.date,
    "Amount": lambda rng: words.money(words.cents(rng, 90_000)),
    "Count": lambda rng: str(int(rng.integers(0, 1000))),
    "Share": lambda rng: f"{rng.uniform(0, 100):.1f}%",
    "City": lambda rng: words.pick(rng, words.CITIES),
    "Code": words.code,
    "Year": lambda rng: str(int(rng.integers(1950, 2031))),
    "Score": lambda rng: f"{rng.uniform(0, 10):.1f}",
    "Phone": words.phone,
    "Day": lambda rng: words.pick(rng, words.DAYS),
    "Paid": lambda rng: words.pick(rng, ("yes", "no")),
    "Contact": words.name,
    "Description": words.remark,
    "Meaning": words.remark,
    "Remark": words.remark,
}
_FIRST: dict[str, Callable[[Random, int], Sequence[str]]] = {
    "Name": lambda rng, n: [f"{a} {b}" for a, b in zip(
        words.several(rng, words.FIRST, n), words.several(rng, words.LAST, n), strict=True)],
    "Item": lambda rng, n: words.several(rng, words.GOODS, n),
    "Country": lambda rng, n: words.several(rng, words.COUNTRIES, n),
    "City": lambda rng, n: words.several(rng, words.CITIES, n),
    "Company": lambda rng, n: words.several(rng, words.COMPANIES, n),
    "Month": lambda rng, n: words.MONTHS[:n],
    "Option": lambda rng, n: [f"--{verb}" for verb in words.several(rng, words.VERBS, n)],
    "Command": lambda rng, n: words.several(rng, words.VERBS, n),
    "Field": lambda rng, n: [w.capitalize() for w in words.several(rng, words.THINGS, n)],
    "Term": lambda rng, n: [w.capitalize() for w in words.several(rng, words.COMMON, n)],
}  # fmt: skip
_NUMERIC = ("Amount", "Count", "Share", "Year", "Score")


def made_up_table(rng: Random, rows: int, columns: int) -> tuple[tuple[str, ...], ...]:
    """A table whose first row names the columns and whose first column names the rows."""
    first = words.pick(rng, tuple(_FIRST))
    names = words.several(rng, [c for c in _COLUMNS if c != first], columns - 1)
    left = _FIRST[first](rng, rows)
    body = [(name, *(_COLUMNS[c](rng) for c in names)) for name in left]
    return ((first, *names), *body)


def table(setting: Setting, rng: Random) -> Canvas:
    """A table with rules, stripes or blanks between its cells."""
    colours = look(rng, setting.strength)
    em = setting.em(rng, 0.027, 0.05)
    cells = made_up_table(rng, int(rng.integers(2, 11)), int(rng.integers(2, 6)))
    style = Style(setting.faces.pick(rng).path, em, colours.ink)
    pad = round(em * rng.uniform(0.35, 0.9))
    widths = [max(style.width(row[c]) for row in cells) + 2 * pad for c in range(len(cells[0]))]
    step = round(style.leading + em * rng.uniform(0.1, 0.9))
    margin = round(em * rng.uniform(0.7, 2))
    title = setting.corpus.phrase(rng, int(rng.integers(2, 5))) if rng.random() < 0.5 else ""
    above = round(2.2 * em) if title else 0
    size = (sum(widths) + 2 * margin, step * len(cells) + 2 * margin + above)
    if size[0] * size[1] > 1.3 * setting.side**2 or not 1 / 5 < size[0] / size[1] < 5:
        raise Refused("too large for the page", f"{len(cells)} x {len(cells[0])}")
    canvas = sheet(setting, rng, size, colours)
    if title and style.width(title) < size[0] - 2 * margin:
        canvas.line(margin, margin + em, title, style, role="title")
        canvas.facts.append(Fact("title", title))
    _draw_table(canvas, rng, cells, style, widths, (margin, margin + above, step, pad), colours)
    head = cells[0]
    for row in cells[1:]:
        canvas.facts += [Fact(head[c], row[c], row[0]) for c in range(1, len(head))]
    canvas.facts.append(Fact("number of rows", str(len(cells) - 1)))
    canvas.table = cells
    canvas.caption = (
        f"A table of {len(cells) - 1} rows with the columns {', '.join(head[:-1])} and {head[-1]}."
    )
    return canvas


def _draw_table(
    canvas: Canvas,
    rng: Random,
    cells: tuple[tuple[str, ...], ...],
    style: Style,
    widths: list[int],
    place: tuple[int, int, int, int],
    colours: Look,
) -> None:
    left, top, step, pad = place
    right = left + sum(widths)
    rules = words.pick(rng, ("all", "rows", "head", "stripes", "none"))
    shade = tuple((3 * p + f) // 4 for p, f in zip(colours.paper, colours.faint, strict=True))
    for number, row in enumerate(cells):
        y0 = top + number * step
        if (rules == "stripes" and number % 2) or (number == 0 and rules in ("all", "stripes")):
            canvas.draw.rectangle((left, y0, right, y0 + step), fill=shade)
        x, before = left, len(canvas.lines)
        for c, cell in enumerate(row):
            number_like = cells[0][c] in _NUMERIC
            at = x + widths[c] - pad if number_like else x + pad
            base = y0 + (step + round(0.7 * style.size)) // 2
            box = canvas.line(at, base, cell, style, "right" if number_like else "left", "cell")
            canvas.items.append(Piece(cell, box, "cell"))
            x += widths[c]
        boxes = [line.box for line in canvas.lines[before:]]
        del canvas.lines[before:]  # a reader takes a row for a line
        canvas.lines.append(Piece(" | ".join(row), around(boxes), "row"))
    ys = range(top, top + step * len(cells) + 1, step)
    if rules in ("all", "rows"):
        for y in ys:
            canvas.rule(left, y, right, y, colours.faint)
    if rules == "head":
        canvas.rule(left, top + step, right, top + step, colours.ink, 2)
    if rules == "all":
        x = left
        for width in (*widths, 0):
            canvas.rule(x, top, x, top + step * len(cells), colours.faint)
            x += width


_FIELDS: dict[str, Callable[[Random], str]] = {
    "Name": words.name, "Date of birth": words.date, "Address": words.address,
    "City": lambda rng: words.pick(rng, words.CITIES), "Phone": words.phone,
    "E-mail": words.email, "Customer no.": words.code, "Date": words.date,
    "Company": lambda rng: words.pick(rng, words.COMPANIES),
    "Country": lambda rng: words.pick(rng, words.COUNTRIES), "Order no.": words.code,
    "Amount due": lambda rng: words.money(words.cents(rng, 90_000), "$"),
    "Contact": words.name, "Department": lambda rng: words.pick(rng, words.TOPICS),
    "Room": lambda rng: str(int(rng.integers(1, 500))), "Reference": words.code,
}  # fmt: skip


def form(setting: Setting, rng: Random) -> Canvas:
    """Fields with their names, filled in by machine or by hand, some left empty."""
    size = setting.size(rng, 0.6, 1.3)
    colours = look(rng, setting.strength, dark=0.0)
    canvas = sheet(setting, rng, size, colours)
    em = setting.em(rng, 0.03, 0.045)
    label = Style(setting.faces.pick(rng).path, em, colours.ink)
    blue = (25, 40, 130) if rng.random() < 0.5 else colours.ink
    value = Style(setting.faces.pick(rng).path, em, blue)
    margin = round(1.3 * em)
    title = words.pick(rng, words.FORM_TITLES)
    head = Style(label.path, round(1.5 * em), colours.accent if rng.random() < 0.3 else colours.ink)
    canvas.line(margin, margin + em, title, head, role="title")
    canvas.facts.append(Fact("title", title))
    y = margin + round(3.3 * em)
    names = words.several(rng, tuple(_FIELDS), int(rng.integers(3, 9)))
    above = rng.random() < 0.4  # the name above its field, or left of it
    column = max(label.width(f"{n}:") for n in names) + em
    if margin + (0 if above else column) + 4 * em > size[0] - margin:
        raise Refused("too large for the page", f"fields beside names of {column} pixels")
    framed = rng.random() < 0.6
    filled = 0
    for name in names:
        if y + (2 if above else 1) * round(1.6 * em) > size[1] - margin:
            break
        text = _FIELDS[name](rng) if rng.random() < 0.9 else ""
        canvas.line(margin, y, f"{name}:", label, role="label")
        x, base = (margin + em // 2, y + round(1.6 * em)) if above else (margin + column, y)
        if x + value.width(text) > size[0] - margin:
            text = ""
        if text:
            canvas.line(x, base, text, value, role="value")
        frame = (x - em // 3, base - round(1.1 * em), size[0] - margin, base + round(0.45 * em))
        if framed:
            canvas.box(frame, colours.faint)
        else:
            canvas.rule(frame[0], frame[3], frame[2], frame[3], colours.faint)
        corners = (float(frame[0]), float(frame[1]), float(frame[2]), float(frame[3]))
        canvas.items.append(Piece(name, corners, "field"))
        canvas.facts.append(Fact(name, text, ""))
        filled += bool(text)
        y = base + round(em * 2.1)
    canvas.facts.append(Fact("number of filled fields", str(filled)))
    canvas.caption = f'A form, "{title}", with {filled} fields filled in.'
    return canvas


def receipt(setting: Setting, rng: Random) -> Canvas:
    """What a shop's till prints."""
    em = setting.em(rng, 0.032, 0.045)
    colours = look(rng, 0.6 * setting.strength, dark=0.0)
    kind = "mono" if rng.random() < 0.7 else "text"
    style = Style(setting.faces.pick(rng, kind).path, em, colours.ink)
    margin, step = round(1.3 * em), style.leading
    columns = int(rng.integers(24, 34))
    width = round(columns * style.font.getlength("0")) + 2 * margin
    sign = words.pick(rng, ("", "", "$", "EUR "))
    count = int(rng.integers(1, 8))
    goods = words.several(rng, words.GOODS, count)
    prices = [words.cents(rng) for _ in goods]
    shop, date = words.pick(rng, words.SHOPS), words.date(rng)
    rows: list[tuple[str, str, str]] = [("head", shop, ""), ("center", words.address(rng), "")]
    if rng.random() < 0.6:
        rows.append(("center", f"Tel. {words.phone(rng)}", ""))
    rows += [
        ("gap", "", ""),
        ("row", date, f"{int(rng.integers(7, 22))}:{int(rng.integers(60)):02}"),
    ]
    rows += [("rule", "", "")]
    rows += [("row", g, words.money(p, sign)) for g, p in zip(goods, prices, strict=True)]
    total, rest = _sums(rng, prices, sign)
    rows += [("rule", "", ""), *rest, ("gap", "", "")]
    rows.append(
        ("center", words.pick(rng, ("Thank you!", "Have a nice day", "Please come again")), "")
    )
    height = 2 * margin + step * len(rows)
    if not 0.3 < width / height < 2.5 or width * height > 1.4 * setting.side**2:
        raise Refused("too large for the page", f"{width} x {height}")
    canvas = sheet(setting, rng, (width, height), colours)
    y = margin + em
    for kind, left, right in rows:
        _receipt_row(canvas, kind, left, right, y, margin, style, colours)
        y += step
    canvas.facts += [Fact("shop", shop), Fact("date", date), Fact("total", total)]
    canvas.facts += [
        Fact("price", words.money(p, sign), g) for g, p in zip(goods, prices, strict=True)
    ]
    canvas.facts += [Fact(a.lower(), b) for k, a, b in rest if k == "row" and a != "TOTAL"]
    canvas.facts.append(Fact("number of items", str(count)))
    canvas.caption = (
        f"A receipt from {shop} of {date}: {count} item{'s' * (count != 1)}, {total} in all."
    )
    return canvas


def _sums(rng: Random, prices: list[int], sign: str) -> tuple[str, list[tuple[str, str, str]]]:
    rows, total = [], sum(prices)
    if rng.random() < 0.5:
        tax = round(total * float(rng.choice((0.05, 0.07, 0.1, 0.19))))
        rows += [
            ("row", "Subtotal", words.money(total, sign)),
            ("row", "Tax", words.money(tax, sign)),
        ]
        total += tax
    rows.append(("row", "TOTAL", words.money(total, sign)))
    if rng.random() < 0.6:
        paid = math.ceil(total / 500) * 500
        rows.append(("row", "Cash", words.money(paid, sign)))
        rows.append(("row", "Change", words.money(paid - total, sign)))
    return words.money(total, sign), rows


def _receipt_row(
    canvas: Canvas,
    kind: str,
    left: str,
    right: str,
    y: int,
    margin: int,
    style: Style,
    colours: Look,
) -> None:
    if kind == "rule":
        middle = y - style.size // 3
        for x in range(margin, canvas.width - margin, style.size // 2):
            canvas.rule(x, middle, x + style.size // 4, middle, colours.ink)
    elif kind in ("head", "center"):
        larger = Style(style.path, round(1.25 * style.size), style.colour)
        set_in = (
            larger if kind == "head" and larger.width(left) < canvas.width - 2 * margin else style
        )
        canvas.line(
            canvas.width // 2, y, left, set_in, "center", "title" if kind == "head" else "line"
        )
    elif kind == "row":
        before = len(canvas.lines)
        room = canvas.width - 2 * margin - style.width(left) - style.width(right)
        if room < style.size // 2:
            raise Refused("too long for its place", left)
        a = canvas.line(margin, y, left, style)
        b = canvas.line(canvas.width - margin, y, right, style, "right")
        del canvas.lines[before:]
        canvas.lines.append(Piece(f"{left} {right}", around([a, b]), "line"))


_STEPS = words.listed(
    """
    Start, Read file, Check size, Sort list, Save result, Send mail, Wait, Open door, Count
    items, Ask user, Log in, Pay, Ship order, Pack box, Print label, Review, Approve, Archive,
    Clean up, Build, Test, Deploy, Measure, Heat water, Stop, Refund, Update stock, Write
    report
    """
)


def diagram(setting: Setting, rng: Random) -> Canvas:
    """Boxes in a row or a column with arrows from each to the next."""
    down = rng.random() < 0.6
    colours = look(rng, setting.strength)
    em = setting.em(rng, 0.032, 0.05)
    style = Style(setting.faces.pick(rng).path, em, colours.ink)
    count = int(rng.integers(3, 7 if down else 5))
    names = words.several(rng, _STEPS, count)
    wide = max(style.width(n) for n in names) + 2 * em
    high, gap, margin = round(2.4 * em), round(em * rng.uniform(1.4, 2.4)), round(1.2 * em)
    size = (wide + 2 * margin, count * high + (count - 1) * gap + 2 * margin)
    if not down:
        size = (count * wide + (count - 1) * gap + 2 * margin, high + 2 * margin)
    if not 1 / 5.5 < size[0] / size[1] < 5.5 or size[0] * size[1] > 1.4 * setting.side**2:
        raise Refused("too large for the page", f"{size[0]} x {size[1]}")
    canvas = sheet(setting, rng, size, colours)
    fill = tuple((4 * p + a) // 5 for p, a in zip(colours.paper, colours.accent, strict=True))
    filled = fill if rng.random() < 0.4 else None
    radius = round(rng.choice((0, 0.3, 1.1)) * em)
    for number, name in enumerate(names):
        x = margin + (0 if down else number * (wide + gap))
        y = margin + (number * (high + gap) if down else 0)
        canvas.box((x, y, x + wide, y + high), colours.ink, filled, 2, radius)  # type: ignore[arg-type]
        canvas.line(
            x + wide // 2, y + (high + round(0.7 * em)) // 2, name, style, "center", "label"
        )
        canvas.items.append(Piece(name, (x, y, x + wide + 1.0, y + high + 1.0), "box"))
        if number + 1 < count:
            start = (x + wide // 2, y + high) if down else (x + wide, y + high // 2)
            _arrow(canvas, start, gap, down, em, colours)
            canvas.facts.append(Fact("next step", names[number + 1], name))
    canvas.facts += [Fact("first step", names[0]), Fact("last step", names[-1])]
    canvas.facts.append(Fact("number of steps", str(count)))
    canvas.caption = f"A diagram of {count} steps: {', then '.join(names)}."
    return canvas


def _arrow(
    canvas: Canvas, start: tuple[int, int], gap: int, down: bool, em: int, colours: Look
) -> None:
    x, y = start
    end = (x, y + gap) if down else (x + gap, y)
    canvas.rule(x, y, *end, colours.ink, 2)
    w = max(3, em // 3)
    if down:
        head = [(end[0] - w, end[1] - 2 * w), (end[0] + w, end[1] - 2 * w), end]
    else:
        head = [(end[0] - 2 * w, end[1] - w), (end[0] - 2 * w, end[1] + w), end]
    canvas.draw.polygon(head, fill=colours.ink)
