"""The static files of the pages, and the status that they show."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from waiting import run, until
from wisp.api.errors import exception_handlers
from wisp.api.keys import Keyring
from wisp.api.pages.site import FLEET, HEADERS, PLAYGROUND, assets, self_contained, site_routes
from wisp.api.pages.stream import BEHIND, MOST, Json, StatusStream, admins_only, status_routes
from wisp.core.errors import UnavailableError

PAGES = (PLAYGROUND, FLEET)
KEYS = """
[keys.ann]
secret = "ann-secret"
admin = true

[keys.bob]
secret = "bob-secret"
"""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_only_files_that_ship_with_it(page: str) -> None:
    client = TestClient(Starlette(routes=list(site_routes(page))))
    index = client.get("/")
    assert index.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="([^"]+)"', index.text)
    assert len(named) > 5
    for address in named:
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert dict(answer.headers).items() >= HEADERS.items()
    assert client.get("/assets/../site.py").status_code == 404
    assert client.get("/assets/nothing.js").status_code == 404


def test_the_policy_of_content_lets_nothing_in_from_elsewhere_and_nothing_inline() -> None:
    policy = HEADERS["content-security-policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert set(directives.values()) == {"'none'", "'self'"}
    for page in PAGES:
        text = assets()[page].decode()
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", text), "inline code or style"


def test_our_files_name_no_other_server() -> None:
    for name, data in assets().items():
        if not name.startswith("vendor/"):
            addresses = set(re.findall(rb"https?://[^\s\"'`]+", data))
            assert addresses <= {b"http://www.w3.org/2000/svg"}, name


def test_vendored_files_come_with_their_licences() -> None:
    text = assets()["vendor/LICENSES.txt"].decode()
    for name in (n.removeprefix("vendor/") for n in assets() if n.startswith("vendor/") and n[-4:] != ".txt"):
        assert re.search(rf"^{re.escape(name)}\s", text, re.MULTILINE), name
    assert "Apache License" in text
    assert text.count("MIT License") >= 2


def test_a_file_that_has_not_changed_is_not_sent_again() -> None:
    client = TestClient(Starlette(routes=list(site_routes(FLEET))))
    tag = client.get("/assets/common.js").headers["etag"]
    again = client.get("/assets/common.js", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")


def test_a_page_of_a_run_holds_everything_and_may_load_nothing(tmp_path: Path) -> None:
    page = self_contained({"kind": "run", "title": "</script><script>alert(1)</script>"})
    assert "src=" not in page.replace('img src="/assets/icon.svg"', "")  # not drawn in a run
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 6
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "'self'" not in policy
    (data,) = re.findall(r'<script type="application/json" id="run">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data)["title"] == "</script><script>alert(1)</script>"


# --- status


class Counter:
    """Makes snapshots that are counted."""

    def __init__(self) -> None:
        self.since: list[float] = []

    async def make(self, since: float) -> Json:
        self.since.append(since)
        n = float(len(self.since))
        return {"now": n, "series": {"t": [n]}}


def test_ten_who_come_at_once_share_a_snapshot() -> None:
    async def main() -> None:
        stream = StatusStream(Counter().make, every_s=1e6)
        first = [await anext(stream.follow()) for _ in range(10)]
        await stream.snapshot()
        assert (len(set(first)), stream.made) == (1, 1)

    run(main())


def test_ten_who_watch_share_each_snapshot() -> None:
    async def main() -> None:
        counter = Counter()
        stream = StatusStream(counter.make, every_s=0.01)
        watching = [stream.follow() for _ in range(10)]
        for w in watching:
            await anext(w)
        rounds = [[await anext(w) for w in watching] for _ in range(3)]
        assert all(len(set(row)) == 1 for row in rounds)
        assert len({row[0] for row in rounds}) == 3
        assert counter.since[-1] >= counter.since[-2] > 0.0, "each asks for the rows after the last"
        for w in watching:
            await w.aclose()
        made = stream.made
        other = StatusStream(Counter().make, every_s=0.01).follow()  # a clock of the same pace
        for _ in range(5):
            await anext(other)
        await other.aclose()
        assert stream.made == made, "nobody watches, and nothing is made"

    run(main())


def test_a_slow_reader_misses_events_and_delays_no_other() -> None:
    async def main() -> None:
        stream = StatusStream(Counter().make, every_s=0.001)
        slow, quick = stream.follow(), stream.follow()
        await anext(slow)
        for _ in range(3 * BEHIND):
            await anext(quick)
        rest = 0
        stream.close()
        async for _ in slow:
            rest += 1
        assert rest < BEHIND

    run(main())


def test_a_stream_ends_when_the_process_stops() -> None:
    async def main() -> None:
        stream = StatusStream(Counter().make)
        following = stream.follow()
        await anext(following)
        stream.close()
        assert [e async for e in following] == []

    run(main())


def test_so_many_may_watch_and_no_more() -> None:
    async def main() -> None:
        stream = StatusStream(Counter().make)
        watching = [stream.follow() for _ in range(MOST)]
        for w in watching:
            await anext(w)
        with pytest.raises(UnavailableError, match="watch already"):
            await anext(stream.follow())
        await watching[0].aclose()
        await anext(stream.follow())
        stream.close()

    run(main())


def test_a_failing_snapshot_ends_the_streams_and_the_next_one_is_tried_again() -> None:
    async def main() -> None:
        fails = False

        async def make(since: float) -> Json:
            if fails:
                raise RuntimeError("no snapshot")
            return {"now": 0.0}

        stream = StatusStream(make, every_s=0.001)
        following = stream.follow()
        await anext(following)
        fails = True
        assert len([e async for e in following]) <= BEHIND
        fails = False
        again = stream.follow()
        await anext(again)
        await anext(again)
        stream.close()
        await until(lambda: True)

    run(main())


def test_the_fleet_is_shown_to_admins_and_to_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    keys = Keyring(path, router="token")
    stream = StatusStream(Counter().make)
    client = TestClient(
        Starlette(routes=status_routes(stream, admins_only(keys)), exception_handlers=exception_handlers())
    )

    def ask(secret: str, path: str = "/v1/status") -> tuple[int, str | None]:
        answer = client.get(path, headers={"Authorization": f"Bearer {secret}"} if secret else {})
        error = answer.json().get("error", {})
        return answer.status_code, error.get("code")

    for place in ("/v1/status", "/v1/status/events"):
        assert ask("", place) == (401, "invalid_api_key")
        assert ask("wrong", place) == (401, "invalid_api_key")
        assert ask("bob-secret", place) == (403, "not_admin")
    assert ask("ann-secret") == (200, None)
    assert ask("token/router") == (200, None)
    assert ask("ann-secret", "/v1/status?since=nan") == (400, "invalid_value")
    assert client.get("/v1/status?key=ann-secret").status_code == 401, "a key in an address is none"
