"""The state of an edge for its page: its verifier, its drafter, and the reason if it does not draft."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from wisp import __version__
from wisp.core.draft.policies import LONGEST
from wisp.edge.backend import EdgeBackend
from wisp.edge.rounds import WHY


def edge_status(backend: EdgeBackend, problem: str, url: str = "") -> dict[str, Any]:
    """As things are now. problem: why there is no verifier. url: where it is looked for."""
    welcome, times, drafter = backend.link.welcome, backend.times, backend.drafter
    serve_ms, best = times.serve_ms, times.best_speed(LONGEST)
    return {
        "kind": "edge",
        "version": __version__,
        "verifier": {
            "connected": welcome is not None,
            "address": urlsplit(url).netloc,
            "problem": problem if welcome is None else "",
            "model": welcome.model if welcome else "",
            "engine": welcome.engine if welcome else "",
            "mode": welcome.mode if welcome else "",
            "digest": welcome.digest[:12] if welcome else "",
            "context": welcome.context if welcome else 0,
            "lost": backend.link.reconnects,
        },
        "drafting": {
            "drafter": drafter.name if drafter is not None else "",
            "policy": backend.policies.spec,
            "ahead": backend.ahead is not None,
            "draft_per_s": round(1e3 / times.draft.value, 1) if times.draft.n and times.draft.value else None,
            "acceptance": round(times.acceptance.value, 3) if times.acceptance.n else None,
            "line_ms": round(times.line.value, 1) if times.line.n else None,
            "price": round(times.price, 4),
            "served_per_s": round(1e3 / serve_ms, 1) if serve_ms > 0 else None,
            "drafted_per_s": round(1e3 * best, 1) if best else None,
            "why": backend.why,
        },
        "reasons": WHY,
        "sessions": backend.sessions,
    }
