"""A browser, and processes for it to look at. Skips, and says why, where there is no browser to be had."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Fleet
from waiting import PATIENCE_S

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
IMAGES = Path(os.environ.get("WISP_TEST_IMAGES") or Path(__file__).parents[2] / "docs" / "images")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: `make test-ui` does it"
    )
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet")) as processes:
        yield processes


Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens addresses. Whatever they open must be quiet on the console and ask nobody but where they came from."""
    contexts, complaints = [], []

    def go(address: str, *, expected: str = " ", **context: Any) -> Any:
        """expected: what the browser itself may say on the console, where a test has it refused or cut off."""
        given = {"viewport": {"width": 1160, "height": 800}, "locale": "en-GB"} | context
        contexts.append(browser.new_context(**given))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_S * 1e3)

        def said(message: Any) -> None:
            if message.type in ("error", "warning") and not message.text.startswith(expected):
                complaints.append(message.text)

        origin = "/".join(address.split("/")[:3])
        page.on("console", said)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(origin) else complaints.append(r.url))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def picture() -> Callable[[Any, str], None]:
    """Takes a picture for the documentation: of few colours, since it is kept with the source."""

    def take(page: Any, name: str) -> None:
        from PIL import Image

        IMAGES.mkdir(parents=True, exist_ok=True)
        path = IMAGES / f"{name}.png"
        page.screenshot(path=path)
        with Image.open(path) as whole:
            small = whole.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
        assert path.stat().st_size < 150_000

    return take
