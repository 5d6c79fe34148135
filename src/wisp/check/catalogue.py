"""`wisp pull`: fetch a model, or list the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wisp.engines.models import PAIRS, ModelCard, cache_dir, catalogue, is_cached, pull
from wisp.engines.models.store import sha256_of, stamp_path


def list_models(*, as_json: bool) -> None:
    """Print the catalogue: models, their sizes and licences, and whether they are here."""
    rows = [_row(card) for card in catalogue()]
    if as_json:
        pairs = {name: {"target": target, "draft": draft} for name, (target, draft) in PAIRS.items()}
        print(json.dumps({"models": rows, "pairs": pairs, "cache": str(cache_dir())}))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("model")
    table.add_column("size", justify="right", no_wrap=True)
    for name in ("licence", "here", "pair"):
        table.add_column(name)
    for card, row in zip(catalogue(), rows, strict=True):
        here = "bundled" if card.bundled and row["cached"] else "yes" if row["cached"] else "no"
        size = size_text(card.size) if card.size else "-"
        table.add_row(card.name, card.title, size, card.licence, here, ", ".join(_roles(card.name)))
    console = Console()
    console.print(table)
    console.print(
        "Without a size: from the hub alone, and its digest is the hub's word.\n"
        f"Models are kept in {cache_dir()}. Also: a path, or hf:user/repo/file.gguf.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def pull_model(name: str, *, offline: bool, as_json: bool) -> None:
    """Make sure that a model is on this machine, and say where. Raises ModelError."""
    path = pull(name, offline=offline)
    if as_json:
        about = {"name": name, "path": str(path), "bytes": path.stat().st_size, "sha256": _digest(path)}
        print(json.dumps(about))


def size_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _row(card: ModelCard) -> dict[str, object]:
    return {
        "name": card.name,
        "title": card.title,
        "bytes": card.size,
        "licence": card.licence,
        "bundled": card.bundled,
        "checked": card.bundled or card.checked,
        "cached": is_cached(card.name),
        "roles": _roles(card.name),
    }


def _roles(name: str) -> list[str]:
    """The roles of a model in pairs, e.g. ["target of tiny"]."""
    return [
        f"{role} of {pair}"
        for pair, models in PAIRS.items()
        for role, model in zip(("target", "draft"), models, strict=True)
        if model == name
    ]


def _digest(path: Path) -> str:
    """SHA-256 of a file: from the stamp beside it where that is of the file as it is now, else by reading it."""
    try:
        stamp = json.loads(stamp_path(path).read_text())
        stat = path.stat()
        if (stamp["size"], stamp["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            return str(stamp["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return sha256_of(path)
