"""The models that are on this device already. Nothing is fetched, and no file is read whole."""

from __future__ import annotations

import re
from pathlib import Path

from wisp.engines.models.cards import catalogue
from wisp.engines.models.pulling import is_cached, resolve
from wisp.engines.models.store import cache_dir, final_path, is_gguf

_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_NO_TEXT = re.compile(r"(^|[-_.])mmproj", re.IGNORECASE)  # of a model that sees; it writes nothing


def here() -> dict[str, Path]:
    """Name or path -> file: the catalogue's models that are here, WISP's own folder, and the hub's cache."""
    found: dict[str, Path] = {}
    for card in catalogue():
        if is_cached(card.name):
            found[card.name] = final_path(card) if card.checked else resolve(card.name, offline=True)
    known = {path.resolve() for path in found.values()}
    for folder in (cache_dir() / "models", _hub_cache()):
        for path in sorted(folder.rglob("*.gguf")) if folder.is_dir() else ():
            if _SPLIT.search(path.name) or _NO_TEXT.search(path.name) or path.resolve() in known:
                continue
            if is_gguf(path):
                known.add(path.resolve())
                found[str(path)] = path
    return found


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
