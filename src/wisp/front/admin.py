"""`wisp replicas`: look at the replicas of a front, drain, restart and scale them."""

from __future__ import annotations

import json
import os
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from wisp.core.errors import ConfigError, RequestError
from wisp.edge.link import http_url, is_local

PATH = "/v1/replicas"
TIMEOUT_S = 600.0  # a drain waits for sessions that cannot move


def ask(server: str, action: str = "", body: dict[str, object] | None = None) -> dict[str, Any]:
    """What the front at `server` answers to `action`. Raises WispError."""
    url = http_url(server, f"{PATH}{action}")
    key = os.environ.get("WISP_API_KEY", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(timeout=TIMEOUT_S, trust_env=not is_local(url), headers=headers) as client:
            response = client.post(url, json=body) if body is not None else client.get(url)
    except httpx.HTTPError as error:
        raise ConfigError(f"cannot reach {url}: {error}; is `wisp serve` running there?") from None
    try:
        answer: dict[str, Any] = response.json()
    except ValueError:
        answer = {}
    if response.is_success and "replicas" in answer:
        return answer
    error_ = answer.get("error") or {}
    if response.status_code == 404 and error_.get("code") == "not_found":
        raise ConfigError(
            f"the verifier at {server} has no replicas; start it with --replicas N or --launcher"
        )
    if response.status_code == 401:
        raise ConfigError(f"{error_.get('message', 'the key was refused')}; set WISP_API_KEY")
    raise RequestError(response.status_code, error_.get("message") or f"status {response.status_code}")


def show(answer: dict[str, Any], *, as_json: bool) -> None:
    """Print the replicas."""
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
