"""The machine: cores, memory, disk, ports, and environment variables."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

from wisp.check.catalogue import size_text
from wisp.check.doctor.check import Check
from wisp.engines.memory import available_memory
from wisp.engines.models import PAIRS, cache_dir, catalogue, is_cached

_PORTS = {"wisp serve": 8100, "wisp edge": 8200}
_OVERHEAD = 1.2  # memory of a model over the size of its file: KV cache, buffers, Python


def cores() -> Check:
    from wisp.engines.llama.context import physical_cores

    usable, total = physical_cores(), os.cpu_count() or 1
    finding = (
        f"{usable} usable physical cores of {total} logical ones; an engine takes {usable} threads by default"
    )
    if usable == 1:
        return Check("cores", "warn", finding, "Run verifier and edge on different machines.")
    return Check(
        "cores", "ok", f"{finding}. With a verifier and an edge on one machine, use --threads {usable // 2}"
    )


def wait_policy() -> Check:
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "passive":
        return Check(
            "idle threads", "ok", "OMP_WAIT_POLICY is passive: idle threads leave the cores to others"
        )
    return Check(
        "idle threads",
        "warn",
        f"OMP_WAIT_POLICY is {policy or 'not set'}: idle threads of one engine may spin and slow down the other",
        "Unset OMP_WAIT_POLICY, or set it to passive.",
    )


def memory() -> Check:
    free = available_memory()
    if free is None:
        return Check("memory", "ok", "this system does not report free memory")
    sizes = {card.name: card.size for card in catalogue()}
    needs = {
        name: int(_OVERHEAD * sum(sizes[m] for m in models))
        for name, models in PAIRS.items()
        if name == "tiny" or all(sizes[m] for m in models)  # of the others no size is known
    }
    short = [f"{name} (about {size_text(need)})" for name, need in needs.items() if need > free]
    if short:
        remedy = "Close other programs, or take a smaller pair."
        return Check(
            "memory", "warn", f"{size_text(free)} available; too little for {', '.join(short)}", remedy
        )
    return Check(
        "memory",
        "ok",
        f"{size_text(free)} available; the largest pair needs {size_text(max(needs.values()))}",
    )


def disk() -> Check:
    """Space for the models that are not here yet."""
    folder = _existing(cache_dir())
    free = shutil.disk_usage(folder).free
    missing = sum(card.size for card in catalogue() if not is_cached(card.name))
    finding = f"{size_text(free)} free in {folder}"
    if free >= missing:
        needed = f"the models not here yet take {size_text(missing)}" if missing else "every model is here"
        return Check("disk", "ok", f"{finding}; {needed}")
    remedy = "Free some space, or set WISP_CACHE to a folder on another disk."
    return Check("disk", "warn", f"{finding}; all models would take {size_text(missing)} more", remedy)


def cache_writable() -> Check:
    folder = _existing(cache_dir())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check("model cache", "ok", f"{cache_dir()} can be written to")
    except OSError as error:
        remedy = "Set WISP_CACHE to a folder that you may write to."
        return Check("model cache", "warn", f"{folder}: {error.strerror}; nothing can be pulled", remedy)


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(f for f in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(f))


def ports() -> Check:
    taken = [f"{port} ({command})" for command, port in _PORTS.items() if not _is_free(port)]
    if taken:
        remedy = "Stop what listens there (perhaps WISP itself), or choose another with --port."
        return Check("ports", "warn", f"in use: {', '.join(taken)}", remedy)
    return Check("ports", "ok", f"{' and '.join(map(str, _PORTS.values()))} are free")


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def api_keys() -> Check:
    """The names of the variables that are set, never their values."""
    names = {
        "WISP_API_KEYS": "clients of wisp serve and wisp edge",
        "WISP_API_KEY": "wisp edge to its verifier",
    }
    found = [f"{name} is set ({use})" for name, use in names.items() if os.environ.get(name)]
    nothing = "none in the environment: serve and edge listen on loopback only, unless given --api-keys"
    return Check("API keys", "ok", "; ".join(found) or nothing)
