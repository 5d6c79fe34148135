"""The pages and their status from whole processes; `tests/ui` looks at them in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness import HTTP, MODEL, Fleet, Process, ask
from waiting import eventually
from wisp.api.pages.site import POLICY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_pair")]

NULL: dict[str, Any] = {"target": "null", "engine": "null"}
KEYS = '[keys.root]\nsecret = "root-secret"\nadmin = true\n\n[keys.bob]\nsecret = "bob-secret"\n'


@pytest.fixture(scope="module")
def server(shared: Fleet) -> Process:
    return shared.serve()


@pytest.fixture(scope="module")
def edge(shared: Fleet, server: Process) -> Process:
    return shared.edge(server.url)


def status(process: Process, key: str = "") -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{process.url}/v1/status", headers=headers, **HTTP).json()  # type: ignore[no-any-return]


def test_a_page_is_at_the_root_of_each_port_under_a_strict_policy(server: Process, edge: Process) -> None:
    for process, title in ((server, "WISP fleet"), (edge, "WISP playground")):
        page = httpx.get(f"{process.url}/", **HTTP)
        assert f"<title>{title}</title>" in page.text
        assert page.headers["content-security-policy"] == POLICY
        stranger = httpx.get(f"{process.url}/", headers={"host": "evil.example"}, **HTTP)
        assert stranger.status_code == 403, "as everything else on a port without keys"


def test_an_answer_through_the_edge_is_seen_by_both(server: Process, edge: Process) -> None:
    assert ask(edge.url, "Hi", max_tokens=20, ignore_eos=True).status == 200
    at_edge = status(edge)
    assert at_edge["verifier"]["connected"]
    assert at_edge["verifier"]["model"] == MODEL
    assert at_edge["drafting"]["drafter"]
    seen = eventually(lambda: s if (s := status(server)).get("n_devices") else None)
    (device,) = (d for d in seen["devices"] if not d["thin"])
    assert device["tokens"] >= 20
    assert device["drafted"] >= device["accepted"]
    ask(edge.url, "Hi", max_tokens=20)  # with which it says what it has measured
    eventually(lambda: all(d["draft_per_s"] for d in status(server)["devices"]))


def test_rounds_are_told_to_those_who_ask(edge: Process) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0,
        "max_tokens": 30,
    }
    url = f"{edge.url}/v1/chat/completions"
    told = httpx.post(url, json=body | {"wisp": {"rounds": True}}, **HTTP).json()
    text = told["choices"][0]["message"]["content"]
    assert "".join(t["text"] for t in told["wisp"]["tokens"]) == text
    assert {t["from"] for t in told["wisp"]["tokens"]} & {"draft", "correction", "bonus"}
    assert sum(r["drafted"] for r in told["wisp"]["rounds"]) > 0
    alone = httpx.post(url, json=body | {"wisp": {"rounds": True, "draft": False}}, **HTTP).json()
    assert alone["choices"][0]["message"]["content"] == text
    assert {t["from"] for t in alone["wisp"]["tokens"]} == {"server"}
    assert {r["why"] for r in alone["wisp"]["rounds"]} == {"switched_off"}


def test_a_stream_of_events_ends_with_its_process_and_does_not_hold_it_up(
    fleet: Fleet, server: Process
) -> None:
    for process in (fleet.edge(server.url), fleet.serve(**NULL)):
        with httpx.stream("GET", f"{process.url}/v1/status/events", **HTTP) as stream:
            lines = stream.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["kind"] in ("edge", "verifier")
            process.terminate()
            assert [line for line in lines if line and not line.startswith("data: ")] == []
        assert process.wait() == 0


def test_a_fleets_status_is_that_of_its_replicas_for_admins(fleet: Fleet, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    router = fleet.serve("--replicas", "2", "--api-keys", str(keys), **NULL)

    def both() -> dict[str, Any] | None:
        now = status(router, "root-secret")
        return now if [r["state"] for r in now.get("replicas", ())] == ["up", "up"] else None

    eventually(both)
    model = status(router, "root-secret")["model"]
    for i in range(4):
        body = {"model": model, "prompt": f"number {i}", "max_tokens": 8}
        headers = {"Authorization": "Bearer bob-secret"}
        assert (
            httpx.post(f"{router.url}/v1/completions", json=body, headers=headers, **HTTP).status_code == 200
        )

    def four() -> dict[str, Any] | None:
        now = status(router, "root-secret")  # without figures while no replica answers in time
        return now if sum(now.get("series", {"admitted": ()})["admitted"]) >= 4 else None

    seen = eventually(four)
    assert (seen["kind"], seen["launcher"]) == ("router", "local")
    assert seen["kv"]["slots"] % 2 == 0
    for key, code in (("", 401), ("bob-secret", 403)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert httpx.get(f"{router.url}/v1/status", headers=headers, **HTTP).status_code == code
