"""Python, packages, and the engine that needs neither a model nor a library."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from wisp import __version__
from wisp.check.doctor.check import DISTRIBUTION, REINSTALL, Check
from wisp.engines.grammar_library import available


def python_version() -> Check:
    from packaging.specifiers import SpecifierSet

    finding = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    if platform.python_version() in SpecifierSet(wanted, prereleases=True):
        return Check("Python", "ok", finding)
    return Check("Python", "fail", finding, f"WISP needs Python {wanted}.")


# Not there on every platform; each has a check of its own.
_DISPENSABLE = {"llguidance", "uvloop"}


def packages() -> Check:
    """Every dependency that nothing works without, against the range that this release was made for."""
    found = {name: problem for name, problem in _requirements("") if name not in _DISPENSABLE}
    wrong = [text for text in found.values() if text]
    if wrong:
        return Check("packages", "fail", f"wisp {__version__}; {'; '.join(wrong)}", REINSTALL)
    shown = ("xllamacpp", "numpy", "starlette", "uvicorn", "websockets", "huggingface-hub")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown)
    return Check("packages", "ok", f"wisp {__version__}; all {len(found)} as required: {versions}, ...")


def extras() -> Check:
    """Optional packages: nothing is wrong without them, unless they are there in a wrong version."""
    states, wrong = [], []
    for extra, purpose in {"sim": "training, plots", "vllm": "the vLLM engine"}.items():
        problems = [text for _, text in _requirements(extra) if text]
        missing = [text for text in problems if text.endswith("is not installed")]
        wrong += [text for text in problems if text not in missing]
        states.append(f"{extra} ({purpose}): {'not installed' if missing else 'installed'}")
    if wrong:
        return Check("extras", "warn", "; ".join(wrong), f"pip install '{DISTRIBUTION}[sim]' (or [vllm])")
    return Check("extras", "ok", "; ".join(states))


def _requirements(extra: str) -> Iterator[tuple[str, str]]:
    """Each requirement of `extra` ("" for those that are always needed), with its problem, or ""."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        wanted = always if not extra else requirement.marker and requirement.marker.evaluate({"extra": extra})
        if not wanted or (extra and always):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield requirement.name, f"{requirement.name} is not installed"
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        wrong = f"{requirement.name} is {version}, not {requirement.specifier}"
        yield requirement.name, "" if fits else wrong


def _missing(name: str) -> str:
    """What is wrong with a dispensable package, or ""."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed"
    return dict(_requirements("")).get(name, "")


def event_loop() -> Check:
    if problem := _missing("uvloop"):
        finding = f"{problem}; asyncio's own loop takes about twice the time per message"
        return Check("event loop", "warn", finding, "pip install uvloop (there is none for Windows)")
    return Check("event loop", "ok", f"uvloop {importlib.metadata.version('uvloop')}")


def grammars() -> Check:
    """A device drafts without them, too."""
    if problem := _missing("llguidance") or ("" if available() else "llguidance does not load"):
        finding = f"{problem}; an edge drafts without grammars, which is slower, and a verifier refuses them"
        return Check("grammars", "warn", finding, "pip install 'llguidance>=1.7.6' (there is none for musl)")
    return Check("grammars", "ok", f"llguidance {importlib.metadata.version('llguidance')}")


def emulated() -> Check:
    """The engine without a model: its hardware profiles."""
    from wisp.engines.emulated import HARDWARE, hardware

    names = sorted(path.stem for path in HARDWARE.glob("*.toml"))
    for name in names:
        hardware(name)  # raises where one is damaged
    return Check(
        "emulated", "ok", f"an engine for fleets and tests, timing without a model: {', '.join(names)}"
    )
