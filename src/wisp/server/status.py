"""What a verifier's page shows: its model and state around what the recorder says."""

from __future__ import annotations

from typing import Any

from wisp import __version__
from wisp.server.host import VerifierHost


def verifier_status(host: VerifierHost, since: float) -> dict[str, Any]:
    """As things are now, with the rows after `since`."""
    info = host.info
    return {
        "kind": "verifier",
        "version": __version__,
        "state": "failed" if host.failed else "draining" if host.draining else "ok",
        "model": host.model,
        "engine": info.engine,
        "mode": info.mode,
        "digest": info.digest[:12],
        "batching": host.batching,
        "connections": host.n_edges,
        **host.recorder.snapshot(host.now, since),
    }


def loading_status(model: str, problem: str) -> dict[str, Any]:
    """While there is no verifier yet, or if there never will be."""
    return {
        "kind": "verifier",
        "version": __version__,
        "state": "failed" if problem else "loading",
        "problem": problem,
        "model": model,
    }
