"""Models: which are here and whole, and whether more could be had."""

from __future__ import annotations

import os

from wisp.check.catalogue import size_text
from wisp.check.doctor.check import Check
from wisp.engines.models import ModelCard, is_cached, resolve
from wisp.engines.models.store import final_path, is_stamped

HUB_S = 3.0


def model_cached(card: ModelCard) -> Check:
    name = f"model {card.name}"
    if card.bundled:
        path = resolve(card.name, offline=True)  # raises where it is missing
        return Check(name, "ok", f"bundled, {size_text(path.stat().st_size)}")
    if not card.checked:
        path = resolve(card.name, offline=True)
        return Check(name, "ok", f"here, unchecked (its digest is not known): {path}")
    path = final_path(card)
    if is_stamped(path, card.sha256):
        return Check(name, "ok", f"here, checked: {path}")
    if is_cached(card.name):
        finding = f"here, but not checked since it was last changed: {path}"
        return Check(
            name, "warn", finding, f"wisp pull {card.name} (reads it once, and fetches it again if need be)"
        )
    if os.path.exists(path):
        return Check(name, "warn", f"{path} is damaged", f"wisp pull {card.name}")
    return Check(name, "ok", f"not here; {size_text(card.size)} to pull")


def hub_reachable(offline: bool) -> Check:
    if offline or any(os.environ.get(name) for name in ("WISP_OFFLINE", "HF_HUB_OFFLINE")):
        return Check("model hub", "ok", "not asked: offline")
    import httpx
    from huggingface_hub import constants

    remedy = "Models can also come from the Python index or from a file; for a mirror, set HF_ENDPOINT."
    try:
        status = httpx.head(constants.ENDPOINT, timeout=HUB_S).status_code
    except httpx.HTTPError as error:
        finding = f"{constants.ENDPOINT} cannot be reached ({error or type(error).__name__})"
        return Check("model hub", "warn", finding, remedy)
    if status >= 400:
        return Check("model hub", "warn", f"{constants.ENDPOINT} answers {status}", remedy)
    return Check("model hub", "ok", f"{constants.ENDPOINT} answers")
