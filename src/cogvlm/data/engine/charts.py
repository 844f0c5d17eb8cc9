"""Charts drawn by matplotlib: bars, lines, pies, points; the table behind them is the truth.

Figures are made and drawn one by one, in no window; matplotlib's settings are put back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

from . import words
from .pages import Setting
from .step import Box, Fact, Piece, Random, Refused, Truth

_STYLES = ("default", "ggplot", "bmh", "fivethirtyeight", "grayscale", "dark_background", "classic")
_DPI = 100


def chart(setting: Setting, rng: Random) -> tuple[Image.Image, Truth]:
    """A chart of one of the kinds and what is on it."""
    matplotlib = import_module("matplotlib")
    style = words.pick(rng, _STYLES)
    kind = words.pick(rng, ("bar", "bar", "barh", "line", "line", "pie", "scatter"))
    family = words.pick(rng, ("DejaVu Sans", "DejaVu Serif"))
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # labels that do not fit are refused below
        if style != "default":
            import_module("matplotlib.style").use(style)
        matplotlib.rcParams["font.family"] = family
        matplotlib.rcParams["axes.unicode_minus"] = False
        drawn = _Chart(setting, rng, kind)
        drawn.draw()
        return drawn.finish()


class _Chart:
    """One figure while it is drawn."""

    def __init__(self, setting: Setting, rng: Random, kind: str) -> None:
        figure = import_module("matplotlib.figure")
        agg = import_module("matplotlib.backends.backend_agg")
        self.rng, self.kind = rng, kind
        width, height = setting.size(rng, 0.85, 1.7)
        self.figure = figure.Figure((width / _DPI, height / _DPI), dpi=_DPI, layout="tight")
        self.canvas = agg.FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_subplot()
        self.size = setting.side / 448 * rng.uniform(9.0, 11.5)  # points; at 100 dpi 1.39 pixels
        self.topic = words.pick(rng, words.TOPICS)
        self.unit = words.UNITS[self.topic]
        self.scale = float(rng.choice((10, 50, 100, 500, 1000)))
        self.marks: list[tuple[Any, str]] = []  # artist and what it stands for
        self.table: list[tuple[str, ...]] = []
        self.facts: list[Fact] = []
        self.title = ""

    def draw(self) -> None:
        """The marks, the axes' texts and the title."""
        {
            "bar": self._bars,
            "barh": self._bars,
            "line": self._lines,
            "pie": self._pie,
            "scatter": self._points,
        }[self.kind]()
        year = int(self.rng.integers(1980, 2031))
        forms = (f"{self.topic}", f"{self.topic} in {year}", f"{self.topic} by {self.table[0][0]}")
        self.title = words.pick(self.rng, forms)
        self.axes.set_title(self.title, fontsize=self.size * 1.2)
        self.axes.tick_params(labelsize=self.size)
        self.facts.append(Fact("title", self.title))

    # -- kinds ----------------------------------------------------------------------------------

    def _names(self, count: int) -> tuple[str, list[str]]:
        head, among = words.pick(
            self.rng,
            (
                ("Month", words.MONTHS),
                ("Country", words.COUNTRIES),
                ("City", words.CITIES),
                ("Day", [d[:3] for d in words.DAYS]),
                ("Year", []),
                ("Item", words.GOODS),
            ),
        )
        if head == "Year":
            first = int(self.rng.integers(1990, 2020))
            return head, [str(first + i) for i in range(count)]
        if head in ("Month", "Day"):
            return head, list(among[:count])
        if head == "Item":  # milk has no population
            self.topic = words.pick(self.rng, ("Sales", "Orders", "Costs", "Imports", "Exports"))
            self.unit = words.UNITS[self.topic]
        short = [name for name in among if len(name) < 9]
        return head, words.several(self.rng, short, count)

    def _values(self, count: int) -> list[float]:
        """All of a chart on one scale: what lies flat on its axis could not be read."""
        values = self.rng.uniform(0.08, 1.0, count) * self.scale
        return [float(round(v, 1) if self.scale == 10 else round(v)) for v in values]

    def _bars(self) -> None:
        rng, count = self.rng, int(self.rng.integers(3, 8))
        head, names = self._names(count)
        groups = 2 if rng.random() < 0.3 and count < 6 else 1
        series = words.several(rng, words.COMPANIES, groups) if groups > 1 else [self.topic]
        self._tabulate(head, names, series, data := [self._values(count) for _ in series])
        places = np.arange(count)
        thick = rng.uniform(0.55, 0.85) / groups
        labelled = rng.random() < 0.5
        for g, (name, values) in enumerate(zip(series, data, strict=True)):
            where = places + (g - (groups - 1) / 2) * thick
            draw = self.axes.barh if self.kind == "barh" else self.axes.bar
            bars = draw(where, values, thick, label=name, **self._paint(groups))
            for bar, row in zip(bars, names, strict=True):
                self.marks.append((bar, row if groups == 1 else f"{row}, {name}"))
            if labelled:
                self.axes.bar_label(bars, [_number(v) for v in values], fontsize=self.size * 0.9)
        turned = 0 if max(map(len, names)) * count < 34 else 45
        if self.kind == "barh":
            self.axes.set_yticks(places, names)
            self.axes.set_xlabel(self.unit, fontsize=self.size)
        else:
            self.axes.set_xticks(places, names, rotation=turned)
            self.axes.set_ylabel(self.unit, fontsize=self.size)
        if groups > 1:
            self.axes.legend(fontsize=self.size * 0.9)

    def _lines(self) -> None:
        rng, count = self.rng, int(self.rng.integers(4, 9))
        head, names = words.pick(
            rng,
            (
                ("Month", words.MONTHS[:count]),
                ("Year", [str(2010 + i) for i in range(count)]),
                ("Day", [d[:3] for d in words.DAYS][:count]),
            ),
        )
        series = words.several(rng, words.COUNTRIES, int(rng.integers(2, 4)))
        if rng.random() < 0.6:
            series = [self.topic]
        data = [self._values(len(names)) for _ in series]
        self._tabulate(head, names, series, data)
        dots = words.pick(rng, ("o", "s", "^", "o"))
        for name, values in zip(series, data, strict=True):
            self.axes.plot(range(len(names)), values, marker=dots, label=name)
            if rng.random() < 0.4 and len(series) == 1:
                for x, value in enumerate(values):
                    self.axes.annotate(
                        _number(value),
                        (x, value),
                        (0, 6),
                        fontsize=self.size * 0.85,
                        textcoords="offset points",
                        ha="center",
                    )
        self.axes.set_xticks(range(len(names)), names)
        self.axes.set_ylabel(self.unit, fontsize=self.size)
        if len(series) > 1:
            self.axes.legend(fontsize=self.size * 0.9)
        if rng.random() < 0.5:
            self.axes.grid(True, alpha=0.4)

    def _pie(self) -> None:
        count = int(self.rng.integers(3, 6))
        head, names = self._names(count)
        if len(names) != count:
            raise Refused("too few names", head)
        whole = np.maximum(6, self.rng.dirichlet(np.full(count, 2.5)) * 100).round()
        whole[int(whole.argmax())] += 100 - whole.sum()
        values = [float(v) for v in whole]
        if min(values) < 5:
            raise Refused("slice too thin")
        self.unit = "percent"
        self._tabulate(head, names, [f"{self.topic} (percent)"], [values])
        shown = words.pick(self.rng, ("%.0f%%", "%.0f %%"))  # or nobody could read the values
        found = self.axes.pie(
            values,
            labels=names,
            autopct=shown,
            startangle=int(self.rng.integers(360)),
            textprops={"fontsize": self.size},
        )
        for wedge, name in zip(found[0], names, strict=True):
            self.marks.append((wedge, name))
        for wedge, text in zip(found[0], found[2], strict=True):
            light = sum(w * c for w, c in zip((0.3, 0.6, 0.1), wedge.get_facecolor(), strict=False))
            text.set_color("black" if light > 0.5 else "white")

    def _points(self) -> None:
        count = int(self.rng.integers(4, 9))
        names = words.several(self.rng, [c for c in words.CITIES if len(c) < 7], count)
        other = words.pick(self.rng, [t for t in words.TOPICS if t != self.topic])
        x, y = self._values(count), self._values(count)
        self.table = [("City", other, self.topic)]
        self.table += [(n, _number(a), _number(b)) for n, a, b in zip(names, x, y, strict=True)]
        for name, a, b in zip(names, x, y, strict=True):
            self.facts += [Fact(other, _number(a), name), Fact(self.topic, _number(b), name)]
        self.axes.scatter(x, y, s=40)
        self.axes.margins(0.18)
        for name, a, b in zip(names, x, y, strict=True):
            self.axes.annotate(
                name,
                (a, b),
                (0, 7),
                fontsize=self.size * 0.9,
                textcoords="offset points",
                ha="center",
            )
        self.axes.set_xlabel(other, fontsize=self.size)
        self.axes.set_ylabel(self.topic, fontsize=self.size)

    # -- parts ----------------------------------------------------------------------------------

    def _note(self, text: str, x: float, y: float) -> None:
        """A text just above a point."""
        self.axes.annotate(
            text, (x, y), (0, 7), fontsize=self.size * 0.9, textcoords="offset points", ha="center"
        )

    def _paint(self, groups: int) -> dict[str, Any]:
        if groups > 1 or self.rng.random() < 0.5:
            return {}
        return {"color": tuple(self.rng.uniform(0.1, 0.85, 3)), "edgecolor": "black"}

    def _tabulate(
        self, head: str, names: Sequence[str], series: Sequence[str], data: list[list[float]]
    ) -> None:
        self.table = [(head, *series)]
        for i, name in enumerate(names):
            self.table.append((name, *(_number(values[i]) for values in data)))
            for one, values in zip(series, data, strict=True):
                what = f"value for {one}" if len(series) > 1 else one
                self.facts.append(Fact(what, _number(values[i]), name))
        for one, values in zip(series, data, strict=True):
            of = one if len(series) > 1 else ""
            order = sorted(values)
            clear = 0.03 * order[-1]  # what nobody can see is not asked for
            if order[-1] - order[-2] > clear:
                self.facts.append(Fact("highest", names[values.index(order[-1])], of))
            if order[1] - order[0] > clear:
                self.facts.append(Fact("lowest", names[values.index(order[0])], of))

    def finish(self) -> tuple[Image.Image, Truth]:
        """Drawn, with the boxes of its texts and marks.

        Raises:
            Refused: texts lie over one another or over the edge.
        """
        self.canvas.draw()
        renderer = self.canvas.get_renderer()
        width, height = self.canvas.get_width_height()
        pixels = np.asarray(self.canvas.buffer_rgba())[..., :3]
        pieces = []
        for text in _texts(self.axes):
            said = " ".join(text.get_text().split())
            extent = text.get_tightbbox(renderer) if said and text.get_visible() else None
            if extent is not None and extent.width:  # clipped ones have none
                pieces.append(Piece(said, _flip(extent, height), "label"))
        _refuse_clutter(pieces, (width, height))
        items = []
        for artist, name in self.marks:
            x0, y0, x1, y1 = _flip(artist.get_window_extent(renderer), height)
            inside = (max(0, x0), max(0, y0), min(width, x1), min(height, y1))
            items.append(Piece(name, inside, "slice" if self.kind == "pie" else "bar"))
        image = Image.fromarray(np.ascontiguousarray(pixels))
        lines = sorted(pieces, key=lambda p: (round(p.box[1] / 8), p.box[0]))
        text = "\n".join(p.text for p in lines)
        plural = {
            "bar": "bar chart",
            "barh": "horizontal bar chart",
            "line": "line chart",
            "pie": "pie chart",
            "scatter": "scatter plot",
        }[self.kind]
        rows = ", ".join(row[0] for row in self.table[1:])
        caption = f'A {plural} headed "{self.title}" with values for {rows}.'
        truth = Truth(
            text,
            tuple(lines),
            tuple(lines),
            tuple(items),
            tuple(self.facts),
            tuple(self.table),
            caption,
            {"chart": plural},
        )
        return image, truth


def _number(value: float) -> str:
    return f"{value:g}"


def _texts(axes: Any) -> Iterator[Any]:
    """The texts that are drawn: ticks beyond the ends of their axis keep theirs, unseen."""
    yield from (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
    if (legend := axes.get_legend()) is not None:
        yield from legend.get_texts()
    if not axes.axison:  # of pies
        return
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        close = 1e-6 * (high - low)
        for tick in axis.get_major_ticks():
            if low - close <= tick.get_loc() <= high + close:
                yield tick.label1


def _flip(extent: Any, height: int) -> Box:
    return (
        math.floor(extent.x0),
        math.floor(height - extent.y1),
        math.ceil(extent.x1),
        math.ceil(height - extent.y0),
    )


def _refuse_clutter(pieces: Sequence[Piece], size: tuple[int, int]) -> None:
    for number, one in enumerate(pieces):
        x0, y0, x1, y1 = one.box
        if x0 < -1 or y0 < -1 or x1 > size[0] + 1 or y1 > size[1] + 1:
            raise Refused("ink over the edge", one.text)
        for other in pieces[:number]:
            a0, b0, a1, b1 = other.box
            across = min(x1, a1) - max(x0, a0)
            down = min(y1, b1) - max(y0, b0)
            if across > 2 and down > 2:
                raise Refused("labels overlap", f"{one.text} / {other.text}")
