"""Pages in a real browser: Chromium as the system has it, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def opened(path: Path, width: int = 1440, height: int = 900, dark: bool = False) -> Iterator:
    """A page of Playwright with the file ``path`` in it. At the end, nothing may have been requested or written to the console.

    Without a browser the test is skipped, but not in CI.
    """
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Chromium is not installed")
    api = pytest.importorskip("playwright.sync_api")
    wrong = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda request: wrong.append(f"request: {request.url[:100]}"))
        page.goto(path.resolve().as_uri())
        assert wrong.pop(0).startswith("request: file:"), "the page itself"
        yield page
        browser.close()
    wrong = [each for each in wrong if not each.startswith(("request: data:", "request: blob:"))]
    assert not wrong, "\n".join(wrong)


def until(page, expression: str, seconds: float = 10) -> None:
    """Wait until a JavaScript expression is true; Playwright's own waiting breaks the policy of our pages."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"not true within {seconds} seconds: {expression}"
        page.wait_for_timeout(50)


def serious_faults(page) -> list[str]:
    """What axe-core finds that keeps people out."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {each['help']}: {each['nodes'][0]['html'][:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
