"""Files of the Hugging Face hub, through its own client, which reads HF_ENDPOINT, HF_HOME and HF_TOKEN.

The client is patient: with no network it would retry for a long time. So the hub is asked for the file's
particulars first, under a deadline, which also tells before a gigabyte is fetched that it is the wrong file.
"""

from __future__ import annotations

import queue
import re
import threading
from pathlib import Path

from wisp.engines.models import store
from wisp.engines.models.cards import HubFile
from wisp.engines.models.store import SourceError

CONNECT_S = 3.0  # for each step of the first exchange
DEADLINE_S = 6.0  # for all of it; looking up a name knows no timeout of its own

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(wanted: HubFile, sha256: str, folder: Path) -> Path:
    """Download `wanted` below `folder`, where an interrupted download goes on; does not check the bytes.

    Raises SourceError if the hub is out of reach, refuses, or has other contents than `sha256`;
    OSError if the disk is full.
    """
    there = _etag(wanted)
    # Of a large file the hub gives the SHA-256 as its etag; anything else tells nothing.
    if _SHA256.fullmatch(there) and there != sha256:
        raise SourceError(f"the hub's {wanted.file} is another build (sha256 {there[:12]}...)")
    return _download(wanted, folder)


def fetch_any(wanted: HubFile) -> Path:
    """Download `wanted` into the hub's own cache, as every tool of the hub would. Raises SourceError."""
    _etag(wanted)
    return _download(wanted, None)


def cached(wanted: HubFile) -> Path | None:
    """The file in the hub's own cache, without any network; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(wanted.repo, wanted.file)
    return Path(found) if isinstance(found, str) else None


def _etag(wanted: HubFile) -> str:
    """What the hub says identifies the file. Raises SourceError, after DEADLINE_S at the latest."""
    answer: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            from huggingface_hub import get_hf_file_metadata, hf_hub_url

            about = get_hf_file_metadata(hf_hub_url(wanted.repo, wanted.file), timeout=CONNECT_S)
            answer.put(about.etag or "")
        except Exception as error:  # the client's errors differ between its versions
            answer.put(error)

    threading.Thread(target=ask, name="wisp-hub", daemon=True).start()
    try:
        got = answer.get(timeout=DEADLINE_S)
    except queue.Empty:
        raise SourceError(f"the Hugging Face hub did not answer within {DEADLINE_S:.0f} s") from None
    if isinstance(got, Exception):
        raise SourceError(_reason(got)) from got
    return got


def _download(wanted: HubFile, folder: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(wanted.repo, wanted.file, local_dir=folder))
    except Exception as error:  # the client's errors differ between its versions
        if isinstance(error, OSError) and error.errno in store.DISK_FULL:
            raise
        raise SourceError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """One line on why the hub gave nothing."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return f"the Hugging Face hub answered {status}: no such file, or HF_TOKEN may not read it"
    if status is not None:
        return f"the Hugging Face hub answered {status}"
    lines = str(error).strip().splitlines()
    return f"the Hugging Face hub cannot be reached ({lines[0] if lines else type(error).__name__})"
