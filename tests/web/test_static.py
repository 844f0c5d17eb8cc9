"""What can be said of the page without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from web.fake import WEB

FILES = sorted(p for p in WEB.rglob("*") if p.is_file())
SCRIPTS = [p for p in FILES if p.suffix == ".js"]
HTML = (WEB / "index.html").read_text(encoding="utf-8")
# Names, not addresses: a browser does not fetch them.
NAMES = ("http://www.w3.org/2000/svg",)


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_page_is_there_and_small() -> None:
    assert {p.name for p in FILES} >= {"index.html", "style.css", "app.js", "en.js", "zh.js"}
    assert {p.suffix for p in FILES} == {".html", ".css", ".js", ".svg"}
    assert sum(p.stat().st_size for p in FILES) <= 120_000
    assert {p.name: n for p in SCRIPTS if (n := len(text(p).splitlines())) > 400} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_points_outside(path: Path) -> None:
    found = text(path)
    for name in NAMES:
        found = found.replace(name, "")
    assert re.findall(r"(?:https?:|wss?:)//\S*|[\"'(]//\w\S*|@import\b", found) == []


def test_what_the_page_refers_to_exists() -> None:
    for target in re.findall(r"(?:src|href)=\"([^\"#]+)\"", HTML):
        assert (WEB / target).is_file(), target
    for path in SCRIPTS:
        for target in re.findall(r"(?:from|import)\s+\"([^\"]+)\"", text(path)):
            assert (path.parent / target).resolve().is_file(), f"{path.name}: {target}"


def test_the_strict_policy_is_met() -> None:
    assert (
        re.findall(r"<script(?![^>]*\ssrc=)[^>]*>|<style|\sstyle=|\son\w+=|javascript:", HTML) == []
    )
    for path in SCRIPTS:
        bad = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        assert re.findall(bad + r"|DOMParser|setAttribute\(\"style\"", text(path)) == [], path.name


def test_every_id_that_scripts_ask_for_exists() -> None:
    ids = re.findall(r"\bid=\"([^\"]+)\"", HTML)
    assert len(ids) == len(set(ids))
    asked = {i for path in SCRIPTS for i in re.findall(r"\$\(\"([\w-]+)\"\)", text(path))}
    assert len(asked) > 30
    assert asked <= set(ids)
    for attribute in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
        assert set(re.findall(rf"\s{attribute}=\"([^\"]+)\"", HTML)) <= set(ids), attribute


def words(language: str) -> dict[str, str]:
    lines = text(WEB / "js" / "lang" / f"{language}.js").splitlines()[1:-1]
    found = [re.fullmatch(r'  (\w+): "(.+)",', line) for line in lines]
    assert None not in found
    pairs = [(m[1], m[2]) for m in found if m]
    assert len(pairs) == len(dict(pairs)), "a key twice"
    return dict(pairs)


def test_both_languages_say_the_same() -> None:
    english, chinese = words("en"), words("zh")
    assert list(english) == list(chinese)
    for key, said in english.items():
        blanks = re.findall(r"\{\w+\}", said)
        assert sorted(blanks) == sorted(re.findall(r"\{\w+\}", chinese[key])), key
    for said in english.values():
        assert not re.search(r"[\u4e00-\u9fff]", said) or said == english["otherLanguage"]
    plain = {"example1Text", "otherLanguage", "otherLanguageShort", "topP"}
    same = {k for k, said in chinese.items() if not re.search(r"[\u4e00-\u9fff]", said)}
    assert same <= plain


def test_every_text_that_is_asked_for_exists_and_is_used() -> None:
    keys = set(words("en"))
    code = "\n".join(text(p) for p in SCRIPTS if p.parent.name != "lang")
    asked = set(re.findall(r"\bt\(\"(\w+)\"", code))
    asked |= set(re.findall(r"\sdata-(?:text|label|hint)=\"(\w+)\"", HTML))
    assert asked <= keys
    named = set(re.findall(r"\b(\w+)\b", code + HTML))
    assert {k for k in keys - named if not k.endswith("Text")} == set()


def test_every_kind_of_problem_has_words() -> None:
    api = text(WEB / "js" / "api.js") + text(WEB / "js" / "app.js")
    kinds = set(re.findall(r"new Problem\(\"(\w+)\"", api))
    kinds |= set(re.findall(r"\d{3}: \"(\w+)\"", api)) | {"server", "refused"}
    assert {"unreachable", "key", "large", "busy", "loading", "cut"} <= kinds <= set(words("en"))
