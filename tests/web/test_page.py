"""The page in headless Chromium against a canned server: asking, answers, errors."""

from __future__ import annotations

import re

import pytest

from web.fake import ANSWERS, Fake
from web.steps import Visit, answer, ask, give, png, problem


def test_a_question_with_a_picture_streams_an_answer(visit: Visit, server: Fake) -> None:
    page = visit()
    assert page.locator("#empty").is_visible()
    give(page, png())
    ask(page, "held one two three four five six", wait=False)
    page.locator(".answer.writing .text", has_text="one two").wait_for()
    assert "six" not in answer(page)
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    server.go_on.set()
    page.locator(".answer footer").wait_for()
    assert answer(page) == "one two three four five six"
    assert page.locator(".answer").get_attribute("aria-busy") == "false"
    (body,) = server.asked
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "held one two three four five six"}
    assert body["model"] == "nano" and body["stream"] is True
    assert set(body) == {"model", "messages", "stream", "stream_options"}
    assert body["stream_options"] == {"include_usage": True}
    measures = page.locator(".measures").inner_text()
    assert "to the first token" in measures and "7 tokens in, 6 out" in measures
    assert "tokens/s" in measures
    assert "one two three four five six" in page.locator("#live").inner_text().replace("\n", " ")


def test_the_next_turn_carries_the_conversation(visit: Visit, server: Fake) -> None:
    page = visit()
    give(page, png())
    ask(page, "say first")
    ask(page, "fail 500")
    ask(page, "say second")
    roles = [m["role"] for m in server.asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]  # the question that failed is left out
    assert server.asked[-1]["messages"][1]["content"] == "first"
    assert server.asked[-1]["messages"][2]["content"] == "say second"


def test_stop_ends_the_answer_and_the_server_sees_it(visit: Visit, server: Fake) -> None:
    page = visit()
    ask(page, "endless", wait=False)
    page.locator(".answer .text", has_text="on and on").wait_for()
    page.keyboard.press("Escape")
    page.locator(".notice", has_text="Stopped.").wait_for()
    assert server.gone.wait(10)
    assert answer(page).startswith("on and on.")
    assert page.locator("#send").is_visible()


def test_retry_replaces_the_answer(visit: Visit, server: Fake) -> None:
    page = visit()
    ask(page, "say same")
    page.get_by_role("button", name="Try again").click()
    page.locator(".answer footer").wait_for()
    assert page.locator(".answer").count() == 1
    assert len(server.asked) == 2 and server.asked[0] == server.asked[1]


def test_editing_a_question_cuts_what_follows(visit: Visit, server: Fake) -> None:
    page = visit()
    give(page, png())
    for question in ("say one", "say two", "say three"):
        ask(page, question)
    page.get_by_role("button", name="Edit").nth(1).click()
    assert page.locator("#editing").inner_text().startswith("Editing question 2")
    assert page.locator("#turns > li.replaced").count() == 2
    page.keyboard.press("Escape")
    assert not page.locator("#editing").is_visible() and page.locator(".answer").count() == 3
    page.get_by_role("button", name="Edit").nth(0).click()
    assert page.locator("#pictures li").count() == 1  # its picture comes along
    page.fill("#question", "say other")
    page.press("#question", "Enter")
    page.locator(".answer .text", has_text="other").wait_for()
    page.locator(".answer footer").wait_for()
    assert page.locator(".answer").count() == 1
    assert [m["role"] for m in server.asked[-1]["messages"]] == ["user"]
    assert len(server.asked[-1]["messages"][0]["content"]) == 2


def test_boxes_are_drawn_where_they_say(visit: Visit) -> None:
    page = visit()
    give(page, png(400, 300))
    ask(page, "boxes")
    assert answer(page) == "A cat 1 and two birds 23."
    frame = page.locator(".frame img").bounding_box()
    wanted = [(100, 200, 500, 600), (0, 0, 250, 250), (750, 500, 999, 999)]
    assert page.locator(".box").count() == page.locator(".chip").count() == 3
    for i, (x0, y0, x1, y1) in enumerate(wanted):
        box = page.locator(".box").nth(i).bounding_box()
        assert box["x"] == pytest.approx(frame["x"] + x0 / 1000 * frame["width"], abs=1)
        assert box["y"] == pytest.approx(frame["y"] + y0 / 1000 * frame["height"], abs=1)
        assert box["width"] == pytest.approx((x1 - x0) / 1000 * frame["width"], abs=1)
        assert box["height"] == pytest.approx((y1 - y0) / 1000 * frame["height"], abs=1)
    page.locator(".chip").nth(1).hover()
    assert re.search(r"\blit\b", page.locator(".box").nth(1).get_attribute("class"))
    assert re.search(r"\bdim\b", page.locator(".box").nth(0).get_attribute("class"))
    page.locator(".box").nth(2).focus()
    assert re.search(r"\blit\b", page.locator(".chip").nth(2).get_attribute("class"))
    label = page.locator(".box").nth(0).get_attribute("aria-label")
    assert label == "Box 1: from 10.0 %, 20.0 % to 50.0 %, 60.0 % of width and height"


def test_boxes_choose_among_pictures_and_need_one(visit: Visit) -> None:
    page = visit()
    ask(page, "boxes")
    assert "no picture to draw them on" in page.locator(".answer").inner_text()
    give(page, png(400, 300), png(300, 400, "navy"))
    ask(page, "boxes")
    assert page.locator(".frame img").get_attribute("alt") == "p0.png"
    page.get_by_role("button", name="Draw the boxes on picture 2").click()
    assert page.locator(".frame img").get_attribute("alt") == "p1.png"


def test_what_the_model_writes_stays_text(visit: Visit) -> None:
    page = visit()
    ask(page, "script")
    assert answer(page) == ANSWERS["script"]
    assert page.locator(".answer .text :is(img, script, a, b)").count() == 0
    assert page.evaluate("window.hit") is None


def test_markdown_is_a_small_safe_subset(visit: Visit) -> None:
    page = visit()
    ask(page, "markdown")
    text = page.locator(".answer .text")
    assert text.get_by_role("heading").inner_text() == "Title"
    assert text.locator("strong").inner_text() == "bold"
    assert text.locator("em").inner_text() == "slanted"
    assert "2 * 3 * 4." in text.inner_text()
    assert text.locator("ul > li").count() == 2 and text.locator("ul ol li").count() == 1
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    assert text.locator("pre").inner_text() == "<i>raw</i>\n  kept"
    assert text.locator("blockquote").inner_text() == "said"


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("fail 400 no such field", ["refused", "no such field"]),
        ("fail 401", ["API key"]),
        ("fail 413 31 MB", ["too large", "31 MB"]),
        ("fail 404 who", ["does not know this model", "who"]),
        ("fail 503", ["not ready"]),
        ("fail 500 oops", ["The server failed", "oops"]),
        ("cut some words", ["connection broke"]),
        ("inside words", ["The server failed", "the model failed"]),
    ],
)
def test_errors_are_shown_where_they_happen(visit: Visit, question: str, words: list[str]) -> None:
    page = visit()
    ask(page, question)
    assert [word for word in words if word not in problem(page)] == []
    retry = page.locator(".problem").get_by_role("button", name="Try again")
    assert retry.is_visible()
    wants_settings = "401" in question or "404" in question
    assert page.locator(".problem").get_by_role("button", name="Settings").count() == int(
        wants_settings
    )


def test_a_busy_server_is_asked_again(visit: Visit, server: Fake) -> None:
    server.busy = 1
    page = visit()
    ask(page, "busy then fine", wait=False)
    page.locator(".notice", has_text="Trying again in 1 s").wait_for()
    page.locator(".answer footer").wait_for()
    assert answer(page) == "then fine"
    assert len(server.asked) == 2


def test_waiting_for_a_busy_server_can_be_stopped(visit: Visit, server: Fake) -> None:
    server.busy = 99
    page = visit()
    ask(page, "busy", wait=False)
    page.locator(".notice", has_text="Trying again").wait_for()
    page.click("#stop")
    page.locator(".notice", has_text="Stopped.").wait_for()
    page.get_by_role("button", name="Try again").click()
    page.locator(".problem").wait_for()
    assert "busy" in problem(page)


def test_an_answer_at_the_limit_says_so(visit: Visit) -> None:
    page = visit()
    ask(page, "long words")
    assert "Cut off at the limit of tokens" in page.locator(".notice").inner_text()


def test_a_server_that_is_gone(visit: Visit, server: Fake) -> None:
    page = visit()
    page.context.set_offline(True)
    ask(page, "hello")
    assert "does not answer" in problem(page)
    page.locator("#place.unknown", has_text="not known").wait_for()
    page.context.set_offline(False)
    page.locator(".problem").get_by_role("button", name="Try again").click()
    page.locator(".answer .text", has_text="You said: hello").wait_for()


def test_the_key_is_asked_for_and_kept_only_where_chosen(visit: Visit, server: Fake) -> None:
    server.key = "secret"
    page = visit()
    ask(page, "hello")
    assert "API key" in problem(page)
    page.locator(".problem").get_by_role("button", name="Settings").click()
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.locator(".problem").get_by_role("button", name="Try again").click()
    page.locator(".answer footer").wait_for()
    page.locator(".answer .text", has_text="You said: hello").wait_for()
    assert server.headers[-1]["Authorization"] == "Bearer secret"
    stored = "JSON.stringify([{...localStorage}, {...sessionStorage}])"
    assert "secret" not in page.evaluate(stored)
    page.click("#open-settings")
    page.check("#keep-key")
    page.keyboard.press("Escape")
    assert page.evaluate("sessionStorage.getItem('cogvlm.key')") == "secret"
    assert "secret" not in page.evaluate("JSON.stringify({...localStorage})")


def test_settings_are_sent_and_kept(visit: Visit, server: Fake) -> None:
    page = visit()
    page.click("#open-settings")
    page.select_option("#model", "other")
    values = {"temperature": "0.5", "top_p": "0.9", "max_tokens": "64", "seed": "7"}
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.fill("#system", "Be brief.")
    page.fill("#top_p", "3")  # out of range: refused, said, and the last good value stays
    assert page.locator("#top_p").get_attribute("aria-invalid") == "true"
    assert page.locator("#top_p-note.wrong").inner_text() != ""
    page.get_by_role("button", name="Done").click()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    ask(page, "hello")
    (body,) = server.asked
    got = {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")}
    want = {"model": "other", "temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 7}
    assert got == want
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_copying_the_answer_and_the_request(visit: Visit, server: Fake) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.click("#open-settings")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    give(page, png(900, 900))
    ask(page, "boxes isn't")
    for name in ("Copy", "Copy as curl", "curl with pictures"):
        page.get_by_role("button", name=name, exact=True).click()
        page.locator(".action", has_text="Copied").wait_for()
        copied = page.evaluate("navigator.clipboard.readText()")
        page.locator(".action", has_text="Copied").wait_for(state="detached")
        if name == "Copy":
            assert copied == ANSWERS["boxes"]
            continue
        assert "secret" not in copied and "Bearer $OPENAI_API_KEY" in copied
        full = name == "curl with pictures"
        assert (server.asked[0]["messages"][0]["content"][0]["image_url"]["url"] in copied) is full
        assert copied.startswith("# Pictures are shortened") is not full
        assert f"curl -sN '{server.url}v1/chat/completions'" in copied
