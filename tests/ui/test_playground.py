"""The edge's page, on the tiny pair."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from harness import Fleet, Process, ask
from ui_harness import REFUSED, Gate

pytestmark = pytest.mark.ui

PROMPT = "Tell me a story about Belomi."
KEYS = '[keys.ann]\nsecret = "ann-secret"\n'


@pytest.fixture(scope="module")
def server(fleet: Fleet) -> Process:
    return fleet.serve()


@pytest.fixture(scope="module")
def edge(fleet: Fleet, server: Process) -> Process:
    return fleet.edge(server.url)


def send(page: Any, prompt: str = PROMPT, **settings: str) -> None:
    """With the keyboard, as soon as there is a model."""
    page.get_by_text("connected", exact=True).wait_for()
    for label, value in {"Most tokens": "60", **settings}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Your message").fill(prompt)
    page.get_by_label("Your message").press("Enter")


def answered(page: Any) -> None:
    """Wait for the end of an answer."""
    page.locator("article[aria-busy=false]").get_by_test_id("figures").wait_for()


def figures(page: Any, nth: int = 0) -> dict[str, str]:
    """The figures under an answer, by name."""
    shown = page.get_by_test_id("figures").nth(nth)
    return dict(
        zip(shown.locator("dt").all_inner_texts(), shown.locator("dd").all_inner_texts(), strict=True)
    )


def sideways(page: Any) -> list[str]:
    """Answers with something in them that reaches beyond their edge, and does not scroll by itself."""
    beyond = "(a) => a.scrollWidth > a.clientWidth"
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('article')].filter({beyond}).map((a) => a.ariaLabel)"
    )
    return found


def number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text))


def test_a_prompt_is_answered_in_colours_with_its_figures_and_the_target_alone_says_the_same(
    edge: Process, visit: Callable[..., Any], picture: Callable[[Any, str], None]
) -> None:
    page = visit(f"{edge.url}/", viewport={"width": 1160, "height": 940})
    page.get_by_text("Nothing was asked yet").wait_for()
    assert page.get_by_role("button", name="New chat").is_disabled(), "there is none to end"
    send(page, "Good morning.")  # the first answer of processes that have just started has odd figures
    answered(page)
    page.get_by_role("button", name="New chat").click()
    page.get_by_text("Nothing was asked yet").wait_for()
    page.get_by_role("switch", name="Beside the target alone").check()
    send(page)
    verdict = page.get_by_test_id("verdict")
    verdict.wait_for()
    assert "identical" in verdict.inner_text()
    assert "60 tokens" in verdict.inner_text()
    drafted, alone = page.get_by_test_id("text").all()
    assert (
        drafted.inner_text().strip()
        == alone.inner_text().strip()
        == ask(edge.url, PROMPT, max_tokens=60).text
    )
    assert drafted.locator(".token.draft").count() > 5
    assert drafted.locator(".token.correction").count() > 0
    assert alone.locator(".token.server").count() == alone.locator(".token").count() > 0
    with_drafts, without = figures(page, 0), figures(page, 1)
    assert number(with_drafts["tokens/s"]) > 0
    assert number(with_drafts["first token"]) > 0
    assert 0 < number(with_drafts["accepted"]) <= 100
    assert number(with_drafts["draft length"]) > 1
    assert number(with_drafts["draft steps/token"]) > 0
    assert (without["accepted"], without["draft steps/token"]) == ("–", "0.00")
    assert "rounds: drafting" in page.get_by_test_id("timeline").first.get_attribute("aria-label")
    page.wait_for_function("() => /draft speed\\s+\\d/.test(document.body.innerText)")  # told once a second
    page.evaluate("scrollTo(0, 0)")
    picture(page, "playground")
    page.get_by_text("Rounds as a table").first.click()
    page.get_by_role("region", name="Rounds").first.wait_for()
    assert sideways(page) == []


def test_an_answer_that_a_busy_browser_got_at_once_has_the_speed_of_the_edge(
    edge: Process, visit: Callable[..., Any]
) -> None:
    page = visit(f"{edge.url}/")
    answer = "{ ...wisp.generation.fresh(true), tokens: Array(11), first: 5000.0, last: 5000.1, rounds }"
    speed = page.evaluate(
        f"(rounds) => wisp.generation.figures({answer}).speed", [{"at_ms": 200}, {"at_ms": 1200}]
    )
    assert speed == 10


def test_a_request_as_code_is_the_request(edge: Process, visit: Callable[..., Any]) -> None:
    page = visit(f"{edge.url}/")
    send(page, "It's a test.", Seed="7", Temperature="0.5")
    answered(page)
    text = page.get_by_test_id("text").inner_text().strip()
    page.get_by_role("button", name="Copy as Python").click()
    code = page.get_by_test_id("code").inner_text()
    told: list[str] = []
    exec(code, {"print": told.append})  # with the openai package
    assert told[0].strip() == text
    page.get_by_role("button", name="Copy as curl").click()
    code = page.get_by_test_id("code").inner_text()
    assert f"curl {edge.url}/v1/chat/completions" in code
    assert """It'\\''s a test.""" in code


def test_a_killed_verifier_is_told_of_and_the_answer_goes_on_when_it_is_back(
    fleet: Fleet, visit: Callable[..., Any]
) -> None:
    server = fleet.serve("--context", "1024")
    with Gate(server.port) as line:
        edge = fleet.edge(line.url)
        alone = ask(edge.url, PROMPT, max_tokens=900, ignore_eos=True)
        page = visit(f"{edge.url}/")
        page.get_by_label("Go on past the end").check()
        line.hold(after=5_000)  # so that the answer is not over before the verifier is
        send(page, **{"Most tokens": "900"})
        page.locator(".token").first.wait_for()
        server.kill()
        line.open()
        page.get_by_test_id("trouble").get_by_text(f"No verifier at 127.0.0.1:{line.port}").wait_for()
        page.get_by_text("no verifier", exact=True).wait_for()
        assert page.get_by_role("button", name="Stop").count() == 1, "it is in the middle of its answer"
        server.start()
        page.get_by_text("connected", exact=True).wait_for()
        page.get_by_test_id("trouble").wait_for(state="detached")
        page.get_by_role("button", name="Send").wait_for()
    assert page.get_by_test_id("text").inner_text().strip() == alone.text.strip()
    assert figures(page)["tokens"] == "900"


def test_a_schema_is_kept_and_what_it_leaves_no_choice_for_is_shown(
    edge: Process, visit: Callable[..., Any]
) -> None:
    pytest.importorskip("llguidance", reason="grammars need it")
    page = visit(f"{edge.url}/")
    send(page, **{"JSON schema of the answer": json.dumps({"const": "all is well"})})
    answered(page)
    text = page.get_by_test_id("text")
    assert json.loads(text.inner_text()) == "all is well"
    assert text.locator(".token.forced").count() > 0


def test_an_edge_without_a_drafter_says_why_it_does_not_draft(
    fleet: Fleet, server: Process, visit: Callable[..., Any]
) -> None:
    plain = fleet.edge(server.url, draft="none")
    page = visit(f"{plain.url}/")
    send(page)
    page.get_by_test_id("why").get_by_text("without a drafter").wait_for()
    page.get_by_test_id("edge-why").get_by_text("without a drafter").wait_for()


def test_a_wrong_setting_is_answered_with_what_is_wrong(edge: Process, visit: Callable[..., Any]) -> None:
    page = visit(f"{edge.url}/", expected=REFUSED)
    send(page, Temperature="-3")
    page.get_by_role("alert").get_by_text("temperature").wait_for()
    page.get_by_label("Tools (JSON list)").fill("[{")
    page.get_by_label("Your message").fill("again")
    page.get_by_role("button", name="Send", disabled=True).wait_for()
    page.get_by_label("Tools (JSON list)").fill("")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Try again").click()
    answered(page)


def test_a_key_is_asked_for_refused_and_kept_out_of_addresses(
    fleet: Fleet, server: Process, visit: Callable[..., Any]
) -> None:
    keys = fleet.folder / "edge-keys.toml"
    keys.write_text(KEYS)
    keyed = fleet.edge(server.url, "--api-keys", str(keys))
    page = visit(f"{keyed.url}/", expected=REFUSED)
    page.get_by_role("textbox", name="API key").fill("wrong")
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("alert").get_by_text("not known here").wait_for()
    page.get_by_role("textbox", name="API key").fill("ann-secret")
    page.get_by_role("button", name="Continue").click()
    send(page)
    answered(page)
    assert page.url == f"{keyed.url}/"
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [0, 0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_works_on_a_narrow_screen_and_every_field_has_a_name(
    edge: Process, visit: Callable[..., Any], scheme: str
) -> None:
    page = visit(f"{edge.url}/", viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page.get_by_text("Request", exact=True).click()  # folded where there is little room
    page.get_by_role("switch").check()
    send(page)
    page.get_by_test_id("verdict").wait_for()
    page.get_by_text("Rounds as a table").first.click()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 400
    assert sideways(page) == []
    fields = "[...document.querySelectorAll('input, textarea, button')]"
    unnamed = f"{fields}.filter((e) => !(e.labels || []).length && !e.textContent.trim()).length"
    assert page.evaluate(unnamed) == 0
