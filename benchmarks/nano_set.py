"""Write the test set that nano is measured with; nothing of it may ever train.

    python benchmarks/nano_set.py OUT
    cogvlm eval OUT/requests.jsonl -o answers.jsonl --max-new-tokens 256

Three parts in one file of questions, by ``kind``: pictures of real documents (copied from
``examples/documents`` and ``examples/pictures``); pages that the data engine draws with what it
never shows in training (``--held-out``: fonts, texts, things; and here also names, goods and styles
of charts of their own); prompts without a picture, whose truth is what SmolLM2 answers through
transformers.
The same command gives the same set where fonts, matplotlib and Chromium are the same.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from cogvlm.data.engine import charts, words
from cogvlm.data.engine.corpus import read_corpus
from cogvlm.data.engine.faces import find_faces
from cogvlm.data.engine.objects import things
from cogvlm.data.engine.pages import Setting
from cogvlm.data.engine.questions import Ask, questions
from cogvlm.data.engine.render import Render, choose_kinds
from cogvlm.data.engine.step import Picture, Random, Sample
from cogvlm.processor.lines import place

ROOT = Path(__file__).parents[1]
FROZEN = ("documents", "pictures")  # under examples/
AREA = 448 * 448
SEED = 7_020_406
TOKENS = 256  # of an answer; paragraphs need them
SHORT = " Short answer."
YES_NO = " Answer yes or no."
Line = dict[str, Any]

PROMPTS = (
    "What is the capital of France?", "Write one sentence about the sea.",
    "Name three fruits.", "What is 12 plus 30?", "Why is the sky blue?",
    "Translate 'good morning' into Spanish.", "Who wrote Hamlet?",
    "Give a synonym of 'happy'.", "How many days has a week?", "Write a haiku about rain.",
)  # fmt: skip

# In place of the words of training.
WORDS: dict[str, Any] = {
    "FIRST": words.listed(
        """
        Agnes, Boris, Celia, Dora, Edgar, Felix, Gloria, Hugo, Irene, Jasper, Klara, Linus, Mabel,
        Nestor, Otto, Petra, Ralph, Stella, Tobias, Ursula
        """
    ),
    "LAST": words.listed(
        """
        Abbott, Bianchi, Carter, Dawson, Ellis, Foster, Gruber, Haas, Ivanov, Jansen, Keller, Lund,
        Murphy, Nilsson, Ortega, Peters, Ramos, Stone, Turner, Walsh
        """
    ),
    "CITIES": words.listed(
        """
        Athens, Basel, Cologne, Dakar, Exeter, Florence, Graz, Havana, Istanbul, Jakarta, Krakow,
        London, Milan, Naples, Odense, Porto, Riga, Sofia, Turin, York
        """
    ),
    "COUNTRIES": words.listed(
        """
        Albania, Bolivia, Cuba, Estonia, Fiji, Georgia, Hungary, Iceland, Jordan, Kuwait, Latvia,
        Malta, Nepal, Oman, Panama, Qatar, Rwanda, Serbia, Tunisia, Uganda
        """
    ),
    "STREETS": words.listed(
        """
        Birch, Cedar, Chapel, Forest, Harbour, King, Meadow, North, Orchard, Queen, School, Temple
        """
    ),
    "GOODS": words.listed(
        """
        Candles, Rope 10m, Paint, Brush, Nails, Hammer, Lamp, Basket, Scarf, Gloves, Peanuts,
        Mustard, Vinegar, Lentils, Oats, Cocoa, Raisins, Ham, Trout, Plums, Pears, Melon, Radish,
        Leek, Waffles, Cider, Tape, Glue, Stamps, Map
        """
    ),
    "SHOPS": words.listed(
        """
        Village Store, Moon Bakery, Iron Works, Fresh Field, Castle Books, White Horse,
        Sea View Cafe, Family Foods, Craft Corner, Bike Box
        """
    ),
    "COMPANIES": words.listed(
        """
        Arrow Ltd, Beacon Group, Coral Inc, Dune Labs, Ember AG, Fjord Bank, Gravel Works,
        Hollow Tree, Island Air, Jade Media
        """
    ),
    "UNITS": {
        "Members": "count", "Rent": "EUR", "Snowfall": "mm", "Tickets": "count", "Calls": "count",
        "Harvest": "tons", "Profit": "million USD", "Books": "count", "Distance": "km",
        "Waste": "tons",
    },
    "SIGNS": words.listed(
        """
        Quiet please, Lost property, Way out, Mind your head, No swimming, Deep water,
        Hard hats only, Dead end, Give way, Turn left, Pay here, No dogs allowed, Falling rocks,
        Bus stop, First aid, Meeting point, To let, Fresh bread, Open daily, Do not touch,
        Exit only, Bridge closed, Low ceiling, Bicycles, Track 9, Hot soup, School, Caution,
        No fishing, Reserved
        """
    ),
}  # fmt: skip
WORDS["TOPICS"] = tuple(WORDS["UNITS"])
WORDS["UNITS"] |= words.UNITS  # goods have topics of their own in the engine
_STYLES = ("Solarize_Light2", "seaborn-v0_8-whitegrid", "tableau-colorblind10", "seaborn-v0_8-talk")
_MEANT = re.compile("[A-Za-z0-9]")  # an answer of signs alone is none
_NO_THING = re.compile(r"letter|number|^sad$|[^a-z -]")  # in the names of stamps; sentences, too
_ORDER = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


@contextmanager
def other_words() -> Iterator[None]:
    """The engine with words and charts' styles that training never sees."""
    with patch.multiple(words, **WORDS), patch.object(charts, "_STYLES", _STYLES):
        yield


# --- questions ---------------------------------------------------------------------------------

Make = Callable[[Picture, Random], "Line | None"]  # of a picture


def truths(short: str) -> list[str]:
    """What is right: with the sign of money or without."""
    bare = short.lstrip("$").removeprefix("EUR ")
    return list(dict.fromkeys((short, bare)))


def asks(metric: str, *tasks: str) -> Make:
    """One question of the engine's own, of one of the tasks, with the short answer."""

    def make(shown: Picture, rng: Random) -> Line | None:
        pool = [a for a in questions(shown, rng) if a.task in tasks and _MEANT.search(a.short)]
        if not pool:
            return None
        if metric == "yes_no":  # as many of the one as of the other
            pool = [a for a in pool if a.short == ("no", "yes")[int(rng.integers(2))]] or pool
        ask: Ask = pool[int(rng.integers(len(pool)))]
        cue = SHORT if metric in ("anls", "relaxed") else YES_NO if metric == "yes_no" else ""
        return {"question": ask.question + cue, "truth": truths(ask.short), "metric": metric}

    return make


def read(shown: Picture, rng: Random) -> Line:
    """All of the text."""
    text = shown.truth.text
    right = list(dict.fromkeys((text, text.replace("\n", " "))))
    return {"question": "What does the picture say?", "truth": right, "metric": "cer"}


def listed_item(shown: Picture, rng: Random) -> Line | None:
    """What stands at a place of a list."""
    items = [fact.value for fact in shown.truth.facts if fact.name == "item"]
    if len(items) < 2:
        return None
    at = int(rng.integers(len(items)))
    question = f"What is the {_ORDER[at]} item of the list?{SHORT}"
    return {"question": question, "truth": items[at], "metric": "anls"}


def caption(shown: Picture, rng: Random) -> Line:
    """What is shown; with and without the full stop."""
    said = shown.truth.caption
    right = [said.rstrip("."), said]
    return {"question": "What does the picture show?", "truth": right, "metric": "jaccard"}


def is_there(shown: Picture, rng: Random) -> Line:
    """Whether a held-out thing is there: half of the time it is."""
    here = [p.text for p in shown.truth.items]
    yes = bool(rng.random() < 0.5)
    near = {word for name in here for word in name.split()}
    known = [t.name for t in things(True) if not _NO_THING.search(t.name)]
    away = [name for name in known if not near & set(name.split())]
    name = words.pick(rng, here if yes else away)
    return {"question": f'Is this in the picture: {name}?{YES_NO}',
            "truth": "yes" if yes else "no", "metric": "yes_no"}  # fmt: skip


def where(shown: Picture, rng: Random) -> Line | None:
    """The box of something that stands there once."""
    counts = Counter(p.text for p in shown.truth.items)
    roles = ("button", "link", "field", "object")
    pool = [p for p in shown.truth.items if p.role in roles and p.text and counts[p.text] == 1]
    if not pool:
        return None
    thing = words.pick(rng, pool)
    name = thing.text if thing.role == "object" else f'{thing.role} "{thing.text}"'
    return {"question": f"Where is the {name}?", "truth": place(thing.box, shown.size),
            "metric": "box"}  # fmt: skip


KINDS: dict[str, tuple[str, float, float, Make]] = {
    # kind: the engine's kind, how much larger the print is, damage, the question
    "sign": ("sign", 1.0, 0.5, read),
    "receipt": ("receipt", 1.4, 0.4, asks("anls", "document", "value", "count")),
    "form": ("form", 1.5, 0.4, asks("anls", "document")),
    "table": ("table", 1.6, 0.4, asks("anls", "value")),
    "list": ("list", 1.6, 0.4, listed_item),
    "chart": ("chart", 1.0, 0.3, asks("relaxed", "value", "compare")),
    "screen": ("screen", 1.0, 0.3, asks("anls", "document", "value")),
    "screen place": ("screen", 1.0, 0.3, where),
    "ticked": ("screen", 1.0, 0.3, asks("yes_no", "tick box")),
    "caption": ("object", 1.0, 0.4, caption),
    "object place": ("object", 1.0, 0.4, where),
    "object there": ("object", 1.0, 0.4, is_there),
}


def drawn(kind: str, count: int, out: Path, corpus: Any, faces: Any) -> Iterator[Line]:
    """Questions of a kind, each about a picture of its own."""
    name, larger, strength, make = KINDS[kind]
    setting = Setting(corpus, faces, 448, strength, True, larger)
    seed = SEED + list(KINDS).index(kind)
    made = 0
    for item in Render(setting, ((name, 1.0),), seed).items(0):
        if not isinstance(item, Sample):
            continue
        shown = item.pictures[0]
        if shown.size[0] * shown.size[1] > AREA or not shown.truth.text.isascii():
            continue
        if name == "object" and any(_NO_THING.search(p.text) for p in shown.truth.items):
            continue
        asked = make(shown, np.random.default_rng(item.seed))
        if asked is None:
            continue
        file = f"{kind.replace(' ', '-')}-{made:03d}.{shown.suffix}"
        (out / file).write_bytes(shown.data)
        yield {"id": file.partition(".")[0], "image": file, **asked, "kind": kind}
        made += 1
        if made == count:
            return


def copied(out: Path) -> Iterator[Line]:
    """The frozen part: real pictures, with their files."""
    for folder in (ROOT / "examples" / name for name in FROZEN):
        for line in (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines():
            asked = json.loads(line)
            shutil.copyfile(folder / asked["image"], out / asked["image"])
            yield asked


def without_picture() -> Iterator[Line]:
    """What SmolLM2 alone answers, greedily; nano without a picture must say the same."""
    import torch
    from transformers import LlamaForCausalLM

    from cogvlm import hub, open_model, user

    nano = open_model("nano", device="cpu")
    llama = LlamaForCausalLM.from_pretrained(hub.language_model(), dtype=torch.float32).eval()
    for number, prompt in enumerate(PROMPTS):
        ids = torch.from_numpy(nano.processor.encode([user(prompt)]).input_ids)[None]
        seen = torch.ones_like(ids)
        said = llama.generate(ids, attention_mask=seen, max_new_tokens=TOKENS, do_sample=False)
        text = nano.processor.decode(said[0, ids.shape[1] :].tolist()).strip()
        yield {"id": f"text-{number}", "question": prompt, "truth": text, "metric": "cer",
               "kind": "text only"}  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder for pictures and requests.jsonl")
    parser.add_argument("--each", type=int, default=50, help="questions of each kind drawn here")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--no-text", action="store_true", help="leave out prompts without picture")
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = list(copied(options.out))
    corpus = replace(read_corpus(held_out=True), han=())  # English alone
    faces = find_faces(held_out=True)
    with other_words():
        for kind in options.kinds if options.each else ():
            choose_kinds(KINDS[kind][0])  # an error where it cannot be made
            lines += drawn(kind, options.each, options.out, corpus, faces)
            print(f"{kind}: {options.each}", file=sys.stderr, flush=True)
    if not options.no_text:
        lines += without_picture()
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (options.out / "requests.jsonl").write_text(text, encoding="utf-8")
    kinds = dict(sorted(Counter(line["kind"] for line in lines).items()))
    print(json.dumps({"name": "nano_set", "lines": len(lines), "kinds": kinds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
