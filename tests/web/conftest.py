"""The page in a real browser, where there is one: COGVLM_CHROMIUM or chromium on the PATH."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from web.fake import Fake

NAMES = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)


def chromium() -> str | None:
    named = os.environ.get("COGVLM_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


# One browser a module, not a session: while it runs, its event loop occupies this thread, and
# tests of other folders want one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install 'cogvlm[web-test]'"
    )
    path = chromium()
    if path is None:
        pytest.skip("no Chromium: put one on the PATH or name it in COGVLM_CHROMIUM")
    # As root, which is how containers run, Chromium starts without its sandbox only.
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync.sync_playwright() as play:
        started = play.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if root else [], timeout=60_000
        )
        yield started
        started.close()


@pytest.fixture
def server() -> Iterator[Fake]:
    fake = Fake()
    thread = threading.Thread(target=fake.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield fake
    fake.go_on.set()
    fake.shutdown()
    fake.server_close()
    thread.join()


@pytest.fixture
def visit(browser: Any, server: Fake) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing may have left the origin and no script have failed."""
    contexts: list[Any] = []
    requests: list[str] = []
    faults: list[str] = []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"locale": "en-GB", **options})
        contexts.append(context)
        context.set_default_timeout(60_000)  # long, for machines that are busy
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if wrong(message) else None)
        page.goto(server.url)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert len(requests) > 10
    assert [url for url in requests if not url.startswith((server.url, "data:", "blob:"))] == []
    assert faults == []


def wrong(message: Any) -> bool:
    """A refusal by the policy or an error of ours; an answer with 4xx is logged by the browser."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")
