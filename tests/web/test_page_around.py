"""The page in headless Chromium: pictures, history, languages, colours, keyboard, phone."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from pathlib import Path
from typing import Any

from PIL import Image

from web.fake import Fake
from web.steps import Visit, answer, ask, give, png, problem

# Gives the page a file as a drop or a paste does: in a DataTransfer.
TRANSFER = """([kind, name, mime, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: mime }));
  const target = document.querySelector("#question");
  if (kind === "paste") {
    target.dispatchEvent(new ClipboardEvent("paste",
      { clipboardData: transfer, bubbles: true, cancelable: true }));
    return;
  }
  for (const step of ["dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(step,
      { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }
}"""


def transfer(page: Any, kind: str, name: str, data: bytes, mime: str = "image/png") -> None:
    page.evaluate(TRANSFER, [kind, name, mime, base64.b64encode(data).decode()])


def names(page: Any) -> list[str]:
    return [t.get_attribute("title") for t in page.locator("#pictures li").all()]


def sent(server: Fake) -> list[Image.Image]:
    """The pictures of the last question, as the server got them."""
    parts = server.asked[-1]["messages"][-1]["content"][:-1]
    urls = [part["image_url"]["url"] for part in parts]
    return [Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))) for u in urls]


def test_pictures_are_dropped_and_pasted_and_others_refused(visit: Visit, server: Fake) -> None:
    page = visit()
    transfer(page, "drop", "a.png", png(10, 20))
    page.locator("#pictures li").nth(0).wait_for()
    assert not page.locator("#drop").is_visible()
    transfer(page, "paste", "b.png", png(30, 40))
    page.locator("#pictures li").nth(1).wait_for()
    transfer(page, "drop", "notes.txt", b"hello", "text/plain")
    page.get_by_text("notes.txt is not a picture").wait_for()
    transfer(page, "drop", "broken.png", b"hello")
    page.get_by_text("broken.png: this browser cannot read it").wait_for()
    ask(page, "look")
    assert [p.size for p in sent(server)] == [(10, 20), (30, 40)]


def test_large_pictures_are_shrunk_and_said_so(visit: Visit, server: Fake) -> None:
    page = visit()
    give(page, png(1000, 1000), png(4000, 2000))
    page.locator("#notes p").wait_for()
    note = page.locator("#notes").inner_text()
    assert note == (
        "p1.png: made smaller in this browser, 4,000 × 2,000 → 2,828 × 1,414 "
        "(above 4 megapixels or 8 MB)."
    )
    ask(page, "look")
    assert [p.size for p in sent(server)] == [(1000, 1000), (2828, 1414)]
    give(page, png(20, 20, kind="BMP"), mime="image/bmp")
    assert "turned into image/png" in page.locator("#notes").inner_text()
    ask(page, "look")
    assert [(p.size, p.format) for p in sent(server)] == [((20, 20), "PNG")]


def test_pictures_are_ordered_and_removed_by_key_and_mouse(visit: Visit, server: Fake) -> None:
    page = visit()
    give(page, png(11, 10), png(12, 10), png(13, 10), png(14, 10))
    assert names(page) == ["p0.png", "p1.png", "p2.png", "p3.png"]
    page.locator(".thumb").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert names(page) == ["p1.png", "p2.png", "p0.png", "p3.png"]
    page.keyboard.press("Delete")
    assert names(page) == ["p1.png", "p2.png", "p3.png"]
    page.locator(".thumb").nth(2).drag_to(page.locator(".thumb").nth(0))
    assert names(page) == ["p3.png", "p1.png", "p2.png"]
    page.locator(".thumb").nth(1).hover()
    page.locator(".thumb").nth(1).get_by_role("button", name="Move to the left").click()
    assert names(page) == ["p1.png", "p3.png", "p2.png"]
    page.locator(".thumb").nth(2).get_by_role("button", name="Remove").click()
    assert names(page) == ["p1.png", "p3.png"]
    page.locator(".thumb").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator("#viewer-name").inner_text() == "p3.png · 14 × 10"
    page.keyboard.press("Escape")
    ask(page, "look")
    assert [p.size for p in sent(server)] == [(12, 10), (14, 10)]


def test_history_survives_a_reload(visit: Visit, server: Fake) -> None:
    page = visit()
    give(page, png(50, 40))
    ask(page, "say one")
    page.click("#new")
    ask(page, "say two")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert answer(page) == "two"
    page.locator("#conversations .open", has_text="say one").click()
    page.locator(".answer .text", has_text="one").wait_for()
    shown = page.locator(".shown img")
    assert shown.evaluate("async (i) => { await i.decode(); return i.naturalWidth; }") == 50
    ask(page, "say more")
    assert len(server.asked[-1]["messages"]) == 3
    assert server.asked[-1]["messages"][0]["content"][0]["type"] == "image_url"


def test_an_answer_that_a_reload_broke_off_is_kept(visit: Visit, server: Fake) -> None:
    page = visit()
    ask(page, "endless", wait=False)
    page.locator(".answer .text", has_text="on and on").wait_for()
    page.wait_for_timeout(1500)  # it is saved once a second
    page.reload()
    page.locator(".notice", has_text="Stopped.").wait_for()
    assert answer(page).startswith("on and on.")


def test_conversations_are_renamed_exported_deleted(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    give(page, png(50, 40))
    ask(page, "say one")
    item = page.locator("#conversations li")
    item.hover()
    item.get_by_role("button", name="Rename").click()
    assert page.input_value("#prompt-input") == "say one"
    page.fill("#prompt-input", "Kitchen / plan")
    page.keyboard.press("Enter")
    page.locator("#conversations .open", has_text="Kitchen / plan").wait_for()
    assert page.locator("#title").inner_text() == "Kitchen / plan"
    with page.expect_download() as waiting:
        item.get_by_role("button", name="Export as JSON").click()
    assert waiting.value.suggested_filename == "Kitchen-plan.json"
    waiting.value.save_as(tmp_path / "out.json")
    out = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (out["format"], out["title"]) == ("cogvlm-conversation", "Kitchen / plan")
    (turn,) = out["turns"]
    assert turn["answer"]["text"] == "one"
    picture = turn["question"]["pictures"][0]
    data = base64.b64decode(picture["data"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (50, 40) == (picture["width"], picture["height"])
    item.get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    assert item.count() == 1
    item.get_by_role("button", name="Delete").click()
    page.locator("#prompt").get_by_role("button", name="Delete").click()
    item.wait_for(state="detached")
    assert page.locator("#empty").is_visible()
    left = """async () => {
      const base = await new Promise((done) => {
        const r = indexedDB.open("cogvlm"); r.onsuccess = () => done(r.result); });
      const store = base.transaction("pictures").objectStore("pictures");
      return new Promise((done) => {
        const r = store.count(); r.onsuccess = () => { base.close(); done(r.result); }; });
    }"""
    assert page.evaluate(left) == 0


def test_another_conversation_can_be_read_while_one_is_answered(visit: Visit, server: Fake) -> None:
    page = visit()
    ask(page, "say one")
    page.click("#new")
    ask(page, "held a long answer that waits", wait=False)
    page.locator(".answer.writing").wait_for()
    page.locator("#conversations .open", has_text="say one").click()
    page.locator(".answer .text", has_text="one").wait_for()
    assert page.locator("#send").is_visible()
    server.go_on.set()
    page.locator("#conversations .open", has_text="held").click()
    page.locator(".answer footer").wait_for()
    assert answer(page) == "a long answer that waits"


def test_the_language_follows_the_browser_and_the_switch(visit: Visit) -> None:
    page = visit(locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("#invite strong").inner_text() == "把图片拖到这里"
    page.click("#language")
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_attribute("#question", "placeholder") == "Ask about the picture"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#place").inner_text() == "Pictures stay on this machine."


def brightness(page: Any) -> int:
    shot = Image.open(io.BytesIO(page.screenshot())).convert("L")
    return int(shot.getpixel((shot.width - 5, shot.height // 2)))


def test_colours_follow_the_system_and_the_switch(visit: Visit) -> None:
    page = visit(color_scheme="dark")
    assert brightness(page) < 60
    page.click("#theme")
    assert brightness(page) > 200
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert brightness(page) > 200
    page.click("#theme")
    assert brightness(page) < 60
    page.click("#theme")
    assert page.locator("html").get_attribute("data-theme") is None


def test_a_phone_needs_no_sideways_scrolling(visit: Visit) -> None:
    page = visit(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    wide = """() => [...document.querySelectorAll("body, body *")].filter((n) => {
      const r = n.getBoundingClientRect(), s = getComputedStyle(n);
      const scrolls = n.closest(".unseen, .text pre, .table, .skip");
      return s.visibility === "visible" && r.width > 1 && !scrolls
        && (r.right > 361 || r.left < -1);
    }).map((n) => n.outerHTML.slice(0, 80))"""
    fits = "[document.documentElement.scrollWidth, document.querySelector('#scroll').scrollWidth]"
    assert page.evaluate(wide) == []
    give(page, png(900, 100), png(100, 900))
    assert page.evaluate(wide) == []
    ask(page, "boxes " + "w" * 200)
    ask(page, "markdown")
    ask(page, "say " + "x" * 300)
    ask(page, "fail 413 " + "y" * 300)
    assert page.evaluate(wide) == []
    assert page.evaluate(wide) == []
    assert max(page.evaluate(fits)) <= 360
    page.click("#open-history")
    page.locator("#history.open").wait_for()
    page.keyboard.press("Escape")
    page.click("#open-settings")
    assert page.evaluate(wide) == []
    assert page.locator("#settings").evaluate("(d) => d.scrollWidth <= d.clientWidth")


def test_everything_is_reached_by_keyboard(visit: Visit, server: Fake) -> None:
    page = visit()
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("say one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    page.locator(".answer footer").wait_for()
    assert server.asked[-1]["messages"][0]["content"] == "say one\nline two"
    page.locator(".skip").focus()
    reached: list[str] = []
    seen = """() => { const n = document.activeElement, s = getComputedStyle(n);
      const field = n.closest(".field");
      const ring = (field && getComputedStyle(field).boxShadow !== "none")
        || s.outlineStyle !== "none";
      if (n === document.body) return ["", true];
      return [n.id || n.getAttribute("aria-label") || n.textContent, ring]; }"""
    for _ in range(30):
        page.keyboard.press("Tab")
        name, ring = page.evaluate(seen)
        if name == "" or name in reached:
            break
        reached.append(name)
        assert ring, f"no visible focus on {name}"
    wanted = {"new", "language", "theme", "open-settings", "question", "pick", "send"}
    wanted |= {"Edit", "Copy", "Try again", "Copy as curl", "Rename", "Export as JSON", "Delete"}
    assert wanted <= set(reached)
    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    assert page.locator("#settings").is_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_everything_has_a_name(visit: Visit) -> None:
    page = visit()
    give(page, png(), png())
    ask(page, "boxes")
    give(page, png(), png())
    nameless = """() => {
      const kinds = "button, input, select, textarea, dialog, img";
      const name = (n) => n.getAttribute("aria-label") || n.getAttribute("aria-labelledby")
        || n.labels?.length || n.textContent.trim() || n.hasAttribute("alt");
      return [...document.querySelectorAll(kinds)].filter((n) => !name(n)).map((n) => n.outerHTML);
    }"""
    assert page.evaluate(nameless) == []


def test_reduced_motion_is_honoured(visit: Visit) -> None:
    page = visit(reduced_motion="reduce")
    ask(page, "held long enough to look", wait=False)
    page.locator(".answer.writing").wait_for()
    moving = "document.getAnimations().filter((a) => a.playState === 'running').length"
    assert page.evaluate(moving) == 0


def test_an_empty_question_says_what_is_missing(visit: Visit, server: Fake) -> None:
    page = visit()
    give(page, png())
    page.click("#send")
    assert "Write a question first." in page.locator("#notes").inner_text()
    assert server.asked == []


def test_the_page_says_where_pictures_go(visit: Visit, server: Fake) -> None:
    page = visit()
    assert page.locator("#place.local").inner_text() == "Pictures stay on this machine."
    server.about = {"backend": "remote", "where": "api.elsewhere.example", "model": "big"}
    give(page, png())
    ask(page, "look")  # the place changed since the person was told: nothing is sent
    assert "would now leave for api.elsewhere.example" in problem(page)
    assert server.asked == []
    assert "leave for api.elsewhere.example" in page.locator("#place.remote").inner_text()
    page.locator(".problem").get_by_role("button", name="Try again").click()
    page.locator(".answer .text", has_text="You said: look").wait_for()
    assert len(server.asked) == 1
    server.about = {"backend": "novel"}  # what does not say local is not local
    page.reload()
    page.locator("#place.remote", has_text="another service").wait_for()


def test_the_copied_command_is_good_shell(visit: Visit, server: Fake) -> None:
    """The shell reads back the very request that was sent."""
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    give(page, png())
    ask(page, "say $HOME `id` 'quoted' \"double\" \\ JSON")
    page.get_by_role("button", name="curl with pictures").click()
    page.locator(".action", has_text="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    script = 'curl() { for last; do :; done; [ "$last" = @- ] && cat; }\n' + command
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == server.asked[0]
