"""What the tests of the engine share: a few fonts, a small corpus, a maker of plain pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogvlm.data.engine.corpus import Corpus
from cogvlm.data.engine.faces import Faces
from cogvlm.data.engine.pages import Setting
from cogvlm.data.engine.step import Fact, Item, Picture, Piece, Reject, Sample, Truth
from cogvlm.data.fonts import FontFile, default_folders

_WANTED = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "LiberationSans-Regular.ttf",
           "Arial.ttf", "arial.ttf", "Verdana.ttf")  # fmt: skip
_HAN = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc")
LATIN = tuple(
    f"Paragraph {n} tells of the river, of {n + 3} boats and of the people on its banks who wait."
    for n in range(30)
)


@lru_cache(maxsize=1)
def _fonts() -> dict[str, FontFile]:
    every = (p for folder in default_folders() for p in folder.rglob("*.tt?"))
    return {p.name: FontFile(p, p.stem, "Regular") for p in every if p.name in (*_WANTED, *_HAN)}


def setting(side: int = 320, strength: float = 1.0, held_out: bool = False) -> Setting:
    """Few fonts, so that nothing has to be looked for."""
    found = _fonts()
    text = tuple(found[name] for name in _WANTED if name in found)
    if not text:
        pytest.skip("this machine has none of the common fonts")
    mono = tuple(f for f in text if "Mono" in f.family) or text
    han = tuple(found[name] for name in _HAN if name in found)
    corpus = Corpus(
        LATIN, ("今天我们在公园看书，天气很好。", "老师写完了报告。"), "tests", "CC0-1.0"
    )
    return Setting(corpus, Faces(text, mono, han), side, strength, held_out)


@dataclass(frozen=True)
class Dots:
    """Black rectangles on white; every fifth one is refused."""

    endless: bool = True
    count: int = 10**9
    refused: int = 5

    @property
    def key(self) -> str:
        """See the makers of the engine."""
        return f"dots {self.count} {self.refused}"

    def items(self, shard: int) -> Iterator[Item]:
        """See the makers of the engine."""
        for number in range(self.count):
            name = f"dot-{shard}-{number}"
            if number % self.refused == self.refused - 1:
                yield Reject(name, "tests", "make", "no luck", str(number))
            else:
                yield dot(name, seed=shard * 1000 + number)


def dot(name: str, seed: int = 0, size: tuple[int, int] = (80, 60)) -> Sample:
    """A sample with one picture and no turns."""
    rng = np.random.default_rng(seed)
    x, y = (int(v) for v in rng.integers(4, 30, 2))
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((x, y, x + 19, y + 9), fill="black")
    box = (float(x), float(y), x + 20.0, y + 10.0)
    truth = Truth(
        f"shop {name} & <co>\nmilk 1.20\ntotal 1.20",
        words=(Piece(name, box),),
        lines=(Piece(name, box, "line"),),
        items=(Piece("dot", box, "object"),),
        facts=(Fact("total", "1.20"), Fact("price", "1.20", "milk")),
        caption="A black dot.",
    )
    return Sample(name, "dot", "tests", "CC0-1.0", (Picture.of(image, truth),), seed=seed)
