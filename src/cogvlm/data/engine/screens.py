"""Web pages made up here, shown by a headless Chromium, with the page's own boxes.

The browser is one of this machine (on the PATH, or named by COGVLM_CHROMIUM), driven by playwright;
it runs once a process, without a network.  Buttons, fields and links are those of the page, words
where the browser drew them.
"""

from __future__ import annotations

import atexit
import html
import io
import math
import os
import shutil
import threading
from concurrent.futures import Future
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from queue import Queue
from typing import Any

from PIL import Image

from ...errors import ResourceError
from .. import surface
from . import words
from .pages import Setting
from .step import Fact, Picture, Piece, Random, Refused, Truth
from .warp import degrade

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
_FLAGS = ("--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--font-render-hinting=none")
_PATIENCE = 300_000  # milliseconds: beside a training run a browser gets little of the machine
_ROLES = {"button": "button", "link": "link", "field": "field", "checkbox": "checkbox"}

# Words as the browser broke and drew them, and what can be clicked or filled in.
_READ = """() => {
  const seen = (r) => r.width > 1 && r.height > 1 && r.left >= 0 && r.top >= 0 &&
    r.right <= innerWidth && r.bottom <= innerHeight;
  const box = (r) => [r.left, r.top, r.right, r.bottom];
  const words = [], lines = [], items = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let id = 0;
  while (walk.nextNode()) {
    const node = walk.currentNode;
    for (const m of node.data.matchAll(/\\S+/g)) {
      const range = document.createRange();
      range.setStart(node, m.index); range.setEnd(node, m.index + m[0].length);
      const rects = [...range.getClientRects()];
      if (rects.length !== 1) continue;
      if (!seen(rects[0])) continue;
      words.push([m[0], box(rects[0]), id]);
    }
    id += 1;
  }
  for (const e of document.querySelectorAll('[data-role]')) {
    const r = e.getBoundingClientRect();
    if (!seen(r)) continue;
    items.push([e.dataset.name, box(r), e.dataset.role, e.value || '', e.checked === true]);
    if (e.dataset.role === 'field' && e.value && e.tagName === 'INPUT') {
      const s = getComputedStyle(e), l = parseFloat(s.paddingLeft) + 1;
      words.push([e.value, [r.left + l, r.top, r.right, r.bottom], id, true]); id += 1;
    }
  }
  return {words, items};
}"""


_ENDS = """() => [...document.querySelectorAll('body > *')]
  .filter((e) => e.tagName !== 'STYLE').map((e) => e.getBoundingClientRect().bottom)
  .sort((a, b) => a - b)"""


def browser_path() -> str | None:
    """The Chromium of this machine."""
    named = os.environ.get("COGVLM_CHROMIUM")
    if named:
        return shutil.which(named)
    return next(filter(None, map(shutil.which, _NAMES)), None)


def missing() -> str:
    """What is lacking to show pages; nothing if they can be shown."""
    if find_spec("playwright") is None:
        return "playwright is not installed; pip install 'cogvlm[engine]'"
    if browser_path() is None:
        return "no Chromium; put one on the PATH or name it in COGVLM_CHROMIUM"
    return ""


Shot = tuple[dict[str, Any], bytes]  # what the page holds and where; the picture, PNG


class _Browser(threading.Thread):
    """A browser with one page, in a thread of its own.

    playwright keeps an asyncio loop running in the thread that started it, which would forbid any
    other loop there, asyncio's or another playwright's.
    """

    def __init__(self) -> None:
        super().__init__(name="browser", daemon=True)
        self.asked: Queue[tuple[str, tuple[int, int], Future[Shot]] | None] = Queue()
        self.ready: Future[None] = Future()

    def run(self) -> None:
        """Show what is asked for until None is."""
        play = import_module("playwright.sync_api").sync_playwright().start()
        try:
            browser = play.chromium.launch(executable_path=browser_path(), args=_FLAGS)
            page = browser.new_context(offline=True, java_script_enabled=True).new_page()
            page.set_default_timeout(_PATIENCE)
        except Exception as error:  # whatever keeps a browser from starting
            play.stop()
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        while asked := self.asked.get():
            document, size, answer = asked
            try:
                answer.set_result(_shoot(page, document, size))
            except Exception as error:
                answer.set_exception(error)
        browser.close()
        play.stop()

    def show(self, document: str, size: tuple[int, int]) -> Shot:
        """A page of this HTML; the picture is at most ``size`` pixels."""
        answer: Future[Shot] = Future()
        self.asked.put((document, size, answer))
        return answer.result()

    def end(self) -> None:
        """Also where the process ends by an error: a browser of its own would live on."""
        self.asked.put(None)
        self.join(10)


@lru_cache(maxsize=1)
def _browser() -> _Browser:
    """Started once a process."""
    if reason := missing():
        raise ResourceError(f"screens cannot be made here: {reason}")
    browser = _Browser()
    browser.start()
    try:
        browser.ready.result()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ResourceError(f"{browser_path()} does not start ({reason})") from None
    atexit.register(browser.end)
    return browser


def _shoot(page: Any, document: str, size: tuple[int, int]) -> Shot:
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.set_content(document)
    # The picture ends where a part of the page does: no half lines, no large empty rest.
    ends = [end for end in page.evaluate(_ENDS) if end <= size[1]]
    if ends and ends[-1] > 0.2 * size[0]:
        page.set_viewport_size({"width": size[0], "height": math.ceil(ends[-1]) + 6})
    return page.evaluate(_READ), page.screenshot(type="png")


def picture(setting: Setting, rng: Random) -> Picture:
    """A page of one of the kinds as it is shown.

    Raises:
        Refused: nothing to read or click on it.
        ResourceError: there is no browser.
    """
    size = setting.size(rng, 0.6, 1.7)
    kind = words.pick(rng, tuple(_KINDS))
    body, facts, caption = _KINDS[kind](setting, rng)
    found, png = _browser().show(_document(rng, body, setting), size)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    truth = _truth(found, facts, caption, kind)
    if len(truth.words) < 3 or not truth.items:
        raise Refused("nothing to click in view", kind)
    strength = 0.6 * setting.strength * float(rng.random() < 0.3)
    image, truth = degrade(image, truth, rng, strength, text_height=12, bend=False)
    return Picture.of(image, truth)


def _truth(found: dict[str, Any], facts: list[Fact], caption: str, kind: str) -> Truth:
    rows: dict[tuple[int, int], list[Piece]] = {}
    pieces = []
    for text, box, node, *value in found["words"]:
        piece = Piece(text, tuple(box), "value" if value else "word")
        pieces.append(piece)
        rows.setdefault((node, round(box[1] + box[3])), []).append(piece)
    lines = tuple(
        Piece(
            " ".join(p.text for p in row),
            (row[0].box[0], row[0].box[1], row[-1].box[2], row[-1].box[3]),
            "line",
        )
        for row in rows.values()
    )
    lines = tuple(sorted(lines, key=lambda p: (round(p.box[1] / 6), p.box[0])))
    items = []
    for name, box, role, _, checked in found["items"]:
        shown = ("ticked box" if checked else "empty box") if role == "checkbox" else _ROLES[role]
        items.append(Piece(name, tuple(box), shown))
    text = "\n".join(p.text for p in lines)
    kept = tuple(fact for fact in facts if _shown(fact, text, items))
    return Truth(
        text, tuple(pieces), lines, tuple(items), kept, caption=caption, extra={"page": kind}
    )


def _shown(fact: Fact, text: str, items: list[Piece]) -> bool:
    """Whether a fact of the page can be seen in the part that is shown."""
    boxes = [item.text for item in items if item.role in ("ticked box", "empty box")]
    if fact.name == "ticked":
        return fact.of in boxes
    if fact.name == "number of options":
        return fact.value == str(len(boxes))
    return fact.value in text and fact.of in text


# --- the pages ---------------------------------------------------------------------------------

_FAMILIES = (
    "Arial, sans-serif", "Georgia, serif", "Verdana, sans-serif", "'Noto Sans'", "Roboto", "Lato",
    "'Liberation Sans'", "'DejaVu Sans'", "'Open Sans'", "Inter",
)  # fmt: skip
_OPTIONS = words.listed(
    """
    Dark mode, Notifications, Auto save, Sounds, Wi-Fi, Bluetooth, Location, Large text, Updates,
    Night light, Share data
    """
)
_DIALOGS = (
    ("Delete this file?", "Delete", "Keep"),
    ("Save changes before closing?", "Save", "Discard"),
    ("Send the message now?", "Send", "Later"),
    ("Restart to finish the update?", "Restart", "Not now"),
    ("Your session has ended.", "Sign in again", "Close"),
    ("Allow access to the camera?", "Allow", "Block"),
)
Made = tuple[str, list[Fact], str]
_e = html.escape


def _document(rng: Random, body: str, setting: Setting) -> str:
    dark = rng.random() < 0.2
    ground, ink = ("#1c1e22", "#e8e8e8") if dark else ("#ffffff", "#202020")
    if not dark and rng.random() < 0.4:
        level = rng.uniform(225, 250)
        ground = _css(level + (surface.tint(level, rng) - level) * 0.25)
    accent = _css(surface.tint(rng.uniform(60, 120), rng))
    size = setting.side / 448 * rng.uniform(12.5, 15.5)
    radius = int(rng.integers(0, 12))
    button = (
        f"background:{accent};color:#fff;border:0"
        if rng.random() < 0.7
        else (f"background:transparent;color:{ink};border:1px solid {ink}")
    )
    line = f"border:1px solid {'#666' if dark else '#aaa'}"
    return f"""<!doctype html><html><body><style>
* {{ box-sizing: border-box }}
body {{ margin: 0; padding: {int(rng.integers(6, 22))}px; background: {ground}; color: {ink};
  font: {size:.1f}px/1.4 {words.pick(rng, _FAMILIES)} }}
h1 {{ font-size: 1.45em; margin: .2em 0 .5em }} p {{ margin: .3em 0 .6em }}
a {{ color: {"#8ab4f8" if dark else "#0b57d0"} }}
button {{ font: inherit; padding: .35em .9em; margin: .3em .3em .3em 0;
  border-radius: {radius}px; {button} }}
input:not([type=checkbox]) {{ font: inherit; display: block; width: 90%; padding: .3em .5em;
  margin: .15em 0 .6em; border-radius: {radius // 2}px; {line};
  background: {"#2a2d33" if dark else "#fff"};
  color: {ink} }}
nav a {{ margin-right: .9em }}
nav {{ padding-bottom: .4em; margin-bottom: .5em; border-bottom: 1px solid #8884 }}
.card {{ {line}; border-radius: {radius}px; padding: .4em .7em; margin: .4em 0; max-width: 100% }}
label {{ display: block }}
</style>{body}</body></html>"""


def _css(values: Any) -> str:
    return "#" + "".join(f"{int(min(255, max(0, v))):02x}" for v in values)


def _click(role: str, name: str) -> str:
    tag, more = ("a", ' href="#"') if role == "link" else ("button", "")
    return f'<{tag}{more} data-role="{role}" data-name="{_e(name)}">{_e(name)}</{tag}>'


def _input(name: str, value: str, kind: str = "text") -> str:
    return (
        f'<label>{_e(name)}<input type="{kind}" data-role="field" data-name="{_e(name)}" '
        f'value="{_e(value)}"></label>'
    )


def _check(name: str, on: bool) -> str:
    state = " checked" if on else ""
    return (
        f'<label><input type="checkbox" data-role="checkbox" data-name="{_e(name)}"{state}> '
        f"{_e(name)}</label>"
    )


def _nav(rng: Random) -> str:
    names = words.several(
        rng,
        ["Home", "News", "Shop", "About", "Help", "Contact", "Blog", "Prices", "Jobs", "Team"],
        4,
    )
    return (
        "<nav>" + " ".join(_click("link", n) for n in names[: int(rng.integers(2, 5))]) + "</nav>"
    )


def _sign_in(setting: Setting, rng: Random) -> Made:
    site = words.pick(rng, words.COMPANIES)
    user = words.email(rng)
    title = words.pick(rng, ("Sign in", "Log in", "Create account", "Welcome back"))
    body = (
        f"<h1>{title}</h1>"
        + _input("E-mail", user)
        + _input("User name", words.pick(rng, words.FIRST))
    )
    body += _check("Remember me", remember := bool(rng.random() < 0.5))
    body += _click("button", title) + _click("button", "Cancel") + "<br>"
    body += _click("link", "Forgot password?")
    facts = [
        Fact("title", title),
        Fact("e-mail", user),
        Fact("ticked", "yes" if remember else "no", "Remember me"),
    ]
    head = f"<p><b>{_e(site)}</b></p>" if rng.random() < 0.6 else ""
    return head + body, facts, f"A web page to {title.lower()}, with fields and buttons."


def _settings(setting: Setting, rng: Random) -> Made:
    names = words.several(rng, _OPTIONS, int(rng.integers(3, 8)))
    states = [bool(rng.random() < 0.5) for _ in names]
    body = "<h1>Settings</h1>" + "".join(_check(n, s) for n, s in zip(names, states, strict=True))
    body += _click("button", "Save") + _click(
        "button", words.pick(rng, ("Reset", "Cancel", "Back"))
    )
    facts = [Fact("ticked", "yes" if s else "no", n) for n, s in zip(names, states, strict=True)]
    facts.append(Fact("number of options", str(len(names))))
    return body, facts, "A settings page with options to tick."


def _shop(setting: Setting, rng: Random) -> Made:
    goods = words.several(rng, words.GOODS, int(rng.integers(2, 6)))
    prices = [words.money(words.cents(rng), "$") for _ in goods]
    shop = words.pick(rng, words.SHOPS)
    body = _nav(rng) + f"<h1>{_e(shop)}</h1>"
    for good, price in zip(goods, prices, strict=True):
        buy = _click("button", f"Buy {good}")
        body += f'<div class="card">{_e(good)} <b>{price}</b><br>{buy}</div>'
    facts = [Fact("title", shop)]
    facts += [Fact("price", p, g) for g, p in zip(goods, prices, strict=True)]
    return body, facts, f"The web shop of {shop}, with goods and their prices."


def _article(setting: Setting, rng: Random) -> Made:
    title = setting.corpus.phrase(rng, int(rng.integers(3, 7)))
    author, date = words.name(rng), words.date(rng)
    body = _nav(rng) + f"<h1>{_e(title)}</h1><p><i>By {author}, {date}</i></p>"
    body += "".join(f"<p>{_e(setting.corpus.paragraph(rng, 260))}</p>" for _ in range(2))
    body += _click("button", "Share") + _click(
        "button", words.pick(rng, ("Subscribe", "Print", "Save"))
    )
    facts = [Fact("title", title), Fact("author", author), Fact("date", date)]
    return body, facts, f'A web article, "{title}", by {author}.'


def _results(setting: Setting, rng: Random) -> Made:
    query = setting.corpus.phrase(rng, 2)
    names = list(
        dict.fromkeys(setting.corpus.phrase(rng, 3) for _ in range(int(rng.integers(3, 6))))
    )
    body = f"<h1>Search</h1>{_input('Query', query)}{_click('button', 'Search')}"
    for name in names:
        body += f"<p>{_click('link', name)}<br>{_e(setting.corpus.paragraph(rng, 70))}</p>"
    facts = [Fact("query", query), Fact("first result", names[0])]
    return body, facts, f'A page of search results for "{query}".'


def _dialog(setting: Setting, rng: Random) -> Made:
    message, yes, no = words.pick(rng, _DIALOGS)
    text = setting.corpus.paragraph(rng, 120)
    body = f'<p>{_e(text)}</p><div class="card"><h1>{_e(message)}</h1>'
    body += _click("button", yes) + _click("button", no) + "</div>"
    return body, [Fact("message", message)], f'A dialog that says "{message}".'


_KINDS = {
    "sign in": _sign_in,
    "settings": _settings,
    "shop": _shop,
    "article": _article,
    "results": _results,
    "dialog": _dialog,
}
