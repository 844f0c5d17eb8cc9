"""The maker of rendered samples: kinds of pages by weight, drawn, bent and damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec

import numpy as np

from ...errors import ConfigError, ResourceError, refuse_unknown
from . import charts, code, forms, ground, lines, objects, pages, screens
from .ink import Canvas
from .pages import Setting
from .step import Item, Picture, Random, Refused, Reject, Sample, Truth
from .warp import degrade

Layout = Callable[[Setting, Random], Canvas]

_PAGES: dict[str, Layout] = {
    "paragraph": pages.paragraph,
    "list": pages.bullets,
    "sign": pages.sign,
    "code": code.code,
    "table": forms.table,
    "form": forms.form,
    "receipt": forms.receipt,
    "diagram": forms.diagram,
}
KINDS: dict[str, float] = {
    "line": 1, "paragraph": 3, "list": 1, "sign": 1, "code": 1, "table": 2, "form": 1.5,
    "receipt": 1.5, "diagram": 0.7, "chart": 2.5, "screen": 2, "object": 2,
}  # fmt: skip
"""What is rendered, and how often when nothing is said."""

_PLAIN = ("code", "diagram")  # shown on screens rather than on paper: damaged half as often


@dataclass(frozen=True)
class Render:
    """An endless maker; sample ``n`` of a shard depends on the seed, the shard and ``n``."""

    setting: Setting
    kinds: tuple[tuple[str, float], ...]  # name and weight
    seed: int = 0
    among: float = 0.0  # chance that a page stands before a ground full of things
    endless: bool = field(default=True, init=False)

    @cached_property
    def key(self) -> str:
        """All that decides what is made."""
        s = self.setting
        fonts = [str(f.path) for f in (*s.faces.text, *s.faces.han)]
        look = (s.side, s.strength, s.held_out, s.larger)
        return repr((s.corpus.key, fonts, *look, self.kinds, self.seed, self.among))

    def items(self, shard: int) -> Iterator[Item]:
        """See :class:`cogvlm.data.engine.step.Maker`."""
        names = [name for name, _ in self.kinds]
        weights = np.array([weight for _, weight in self.kinds], np.float64)
        weights /= weights.sum()
        for number in _count():
            rng = np.random.default_rng((self.seed, shard, number))
            kind = names[int(rng.choice(len(names), p=weights))]
            name = f"{kind}-{self.seed}-{shard:05d}-{number:06d}"
            among = kind in ground.KINDS and bool(self.among) and rng.random() < self.among
            source, licence = self._source(kind)
            if among:
                source = f"{source}+{objects.SOURCE}"
                licence = f"{licence}; {objects.LICENCE}"
            try:
                picture = self._picture(kind, rng, among)
            except Refused as refused:
                yield Reject(name, source, "render", refused.reason, f"{kind}: {refused.detail}")
                continue
            seed = int(rng.integers(2**62))
            yield Sample(name, kind, source, licence, (picture,), seed=seed)

    def _picture(self, kind: str, rng: Random, among: bool) -> Picture:
        setting = self.setting
        if kind == "line":
            return lines.picture(setting, rng)
        if kind == "chart":
            image, truth = charts.chart(setting, rng)
        elif kind == "screen":
            return screens.picture(setting, rng)
        elif kind == "object":
            image, truth = objects.scene(setting, rng)
        else:
            canvas = _PAGES[kind](setting, rng)
            image, truth = canvas.image, canvas.truth()
            if among:
                image, truth = ground.before_things(image, truth, rng, setting.held_out)
        _refuse_outside(truth, image.size)
        strength = setting.strength
        if kind in _PLAIN or kind in ("chart", "object"):
            strength *= float(rng.random() < 0.5)
        small = min((w.box[3] - w.box[1] for w in truth.words if len(w.text) > 2), default=14.0)
        bend = kind not in _PLAIN or rng.random() < 0.4
        image, truth = degrade(image, truth, rng, strength, text_height=small * 1.3, bend=bend)
        return Picture.of(image, truth)

    def _source(self, kind: str) -> tuple[str, str]:
        if kind == "object":
            return objects.SOURCE, objects.LICENCE
        if kind in ("paragraph", "list", "sign", "table", "line"):
            return self.setting.corpus.source, self.setting.corpus.licence
        if kind == "code":
            return "python-stdlib", "PSF-2.0"
        return "made-up", "CC0-1.0"


def _refuse_outside(truth: Truth, size: tuple[int, int]) -> None:
    for word in truth.words:
        x0, y0, x1, y1 = word.box
        if x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]:
            raise Refused("ink over the edge", word.text[:40])
    if not truth.words and not truth.items:
        raise Refused("nothing on it")


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def choose_kinds(text: str | None) -> tuple[tuple[tuple[str, float], ...], dict[str, str]]:
    """Kinds from ``"table,chart=3"``, or all that this machine can make.

    Returns:
        Kinds with weights, and why each kind that was not asked for by name is left out.

    Raises:
        ConfigError: an unknown kind, or a weight that is no positive number.
        ResourceError: a kind asked for by name that cannot be made here.
    """
    if text is None:
        missing = {kind: reason for kind in KINDS if (reason := _missing(kind))}
        return tuple((k, w) for k, w in KINDS.items() if k not in missing), missing
    chosen = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, weight = part.partition("=")
        refuse_unknown([name], KINDS, "--kinds")
        try:
            value = float(weight) if weight else KINDS[name]
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ConfigError(f"--kinds: weight of {name!r} is {weight!r}; give a number above 0")
        if reason := _missing(name):
            raise ResourceError(f"kind {name!r} cannot be made here: {reason}")
        chosen.append((name, value))
    if not chosen:
        raise ConfigError(f"--kinds is empty; known: {', '.join(KINDS)}")
    return tuple(chosen), {}


def _missing(kind: str) -> str:
    """What a kind needs and this machine has not; nothing if it can be made."""
    if kind == "chart" and find_spec("matplotlib") is None:
        return "matplotlib is not installed; pip install 'cogvlm[engine]'"
    if kind == "screen":
        return screens.missing()
    if kind == "object":
        return objects.missing()
    return ""
