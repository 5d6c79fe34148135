"""What a router's page shows: its replicas, and what they say of themselves, as one fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec

from wisp import __version__
from wisp.api.pages.recorder import MOST
from wisp.api.pages.series import summed
from wisp.api.paths import STATUS_PATH
from wisp.router.fleet import Fleet, Replica

Json = dict[str, Any]
SETTLED_S = 1.5  # rows younger than that may be missing from some replicas


async def fleet_status(fleet: Fleet, since: float, *, draining: bool) -> Json:
    """As things are now; replicas that do not answer are left out of the sums."""
    found = [r for r in await asyncio.gather(*(_ask(fleet, r, since) for r in fleet.up())) if r is not None]
    parts = [part for part in found if "series" in part]
    welcome = fleet.welcome
    return {
        "kind": "router",
        "version": __version__,
        "state": "draining" if draining else "ok" if parts else "loading",
        "model": welcome.model if welcome else "",
        "engine": welcome.engine if welcome else "",
        "mode": welcome.mode if welcome else "",
        "digest": welcome.digest[:12] if welcome else "",
        "batching": parts[0]["batching"] if parts else "",
        "launcher": fleet.launcher.name,
        "replicas": [msgspec.to_builtins(view) for view in fleet.view()],
        **(_together(parts, since) if parts else {}),
    }


async def _ask(fleet: Fleet, replica: Replica, since: float) -> Json | None:
    try:
        page = await fleet.get(replica, f"{STATUS_PATH}?since={since}")
        status: Json = msgspec.json.decode(page)
    except (httpx.HTTPError, msgspec.MsgspecError):
        return None
    for row in (*status.get("devices", ()), *status.get("sessions", ())):
        row["replica"] = replica.name
    return status


def _together(parts: Sequence[Json], since: float) -> Json:
    width_s, now = parts[0]["width_s"], min(p["now"] for p in parts)
    series = summed([p["series"] for p in parts], width_s)
    keep = sum(t is not None and since < t <= now - SETTLED_S for t in series["t"])
    return {
        "now": now,
        "clock": "unix",
        "width_s": width_s,
        "series": {name: values[:keep] for name, values in series.items()},
        "sessions": [s for p in parts for s in p["sessions"]][:MOST],
        "n_sessions": sum(p["n_sessions"] for p in parts),
        "devices": [d for p in parts for d in p["devices"]][:MOST],
        "n_devices": sum(p["n_devices"] for p in parts),
        "connections": sum(p["connections"] for p in parts),
        "classes": _classes(parts),
        "kv": {name: sum(p["kv"][name] for p in parts) for name in ("used", "all", "slots")},
        "cost_model": {name: max(p["cost_model"][name] for p in parts) for name in ("error", "margin")},
    }


def _classes(parts: Sequence[Json]) -> list[Json]:
    found: dict[tuple[float, float], Json] = {}
    for part in parts:
        for c in part["classes"]:
            known = found.get((c["ttft_ms"], c["tpot_ms"]))
            if known is None:
                found[c["ttft_ms"], c["tpot_ms"]] = dict(c)
            else:
                known["ended"] += c["ended"]
                known["met"] += c["met"]
    return list(found.values())
