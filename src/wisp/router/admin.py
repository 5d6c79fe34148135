"""`wisp replicas`: look at the replicas of a router, drain, restart and scale them."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from wisp.api.paths import REPLICAS_PATH
from wisp.core.errors import ConfigError, RequestError
from wisp.edge.address import http_url, is_local
from wisp.edge.answers import error_in, reason, stranger

TIMEOUT_S = 600.0  # a drain waits for sessions that cannot move


def ask(server: str, action: str = "", body: dict[str, object] | None = None) -> dict[str, Any]:
    """What the router at `server` answers to `action`. Raises WispError."""
    url = http_url(server, f"{REPLICAS_PATH}{action}")
    key = os.environ.get("WISP_API_KEY", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(timeout=TIMEOUT_S, trust_env=not is_local(url), headers=headers) as client:
            response = client.post(url, json=body) if body is not None else client.get(url)
    except Exception as error:  # a proxy of the environment may be wrong in ways of its own
        raise ConfigError(
            f"cannot reach {url}: {reason(error, url)}; is `wisp serve` running there?"
        ) from None
    if response.is_success:
        with contextlib.suppress(ValueError):
            answer = response.json()
            if isinstance(answer, dict) and "replicas" in answer:
                return answer
    refused = error_in(response.content)
    if refused is None:
        why = stranger(response.status_code, response.headers.get("location"))
        raise ConfigError(f"cannot use {url}: {why}")
    if response.status_code == 404 and refused.code == "not_found":
        raise ConfigError(
            f"the verifier at {server} has no replicas; start it with --replicas N or --launcher"
        )
    if response.status_code == 401:
        raise ConfigError(f"{refused.message}; set WISP_API_KEY")
    raise RequestError(response.status_code, refused.message)


def show(answer: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer))
        return
    table = Table(title=f"launcher: {answer['launcher']}")
    for heading in ("replica", "state", "address", "sessions", "restarts", "last end"):
        table.add_column(heading)
    for r in answer["replicas"]:
        cells = (r["name"], r["state"], r["address"], str(r["sessions"]), str(r["restarts"]), r["last_end"])
        table.add_row(*cells)
    Console().print(table)
