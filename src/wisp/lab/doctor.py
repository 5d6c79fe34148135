"""`wisp doctor`: what is installed, what the engine can do here, and what to fix.

Each check is a function that returns a `Check`. Those of the engine run in a process of their own, because what
they look for may end a process: a library built for another CPU, or with another layout of its structs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wisp import __version__
from wisp.core.errors import WispError
from wisp.engines.models import PAIRS, ModelCard, cache_dir, catalogue, is_cached, resolve
from wisp.engines.models.store import final_path, is_stamped
from wisp.lab.commands import size_text

Status = Literal["ok", "warn", "fail"]

_DISTRIBUTION = "wisp-serve"
_PORTS = {"wisp serve": 8100, "wisp edge": 8200}
_ENGINE_S = 60.0  # the engine's checks take two or three seconds
_VLLM_S = 240.0  # importing it takes long, and an accelerator's kernels are compiled first
_HUB_S = 3.0
_OVERHEAD = 1.2  # memory of a model over the size of its file: KV cache, buffers, Python
_REINSTALL = f"pip install --force-reinstall {_DISTRIBUTION}"


@dataclass(frozen=True)
class Check:
    """One thing looked at. `remedy` says what to do, unless the status is ok."""

    name: str
    status: Status
    finding: str
    remedy: str = ""


def run_doctor(*, offline: bool, as_json: bool) -> int:
    """Print what was found; 1 if anything fails, else 0."""
    checks = examine(offline=offline)
    ok = all(check.status != "fail" for check in checks)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}))
    else:
        _show(checks)
    return 0 if ok else 1


def examine(*, offline: bool) -> list[Check]:
    """All checks. The slow ones, engine and network, run beside the others."""
    hub = _InBackground("model hub", lambda: hub_reachable(offline))
    engine = _InBackground("engine", engine_checks)
    vllm = _InBackground("vllm", vllm_checks)
    system = [_guarded(name, check) for name, check in SYSTEM.items()]
    models = [_guarded(f"model {card.name}", functools.partial(model_cached, card)) for card in catalogue()]
    engines = [*engine.result(_ENGINE_S + 5), *vllm.result(_VLLM_S + 5)]
    return [*system, *engines, *models, *hub.result(_HUB_S + 1)]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that breaks has found something, too."""
    try:
        return check()
    except WispError as error:
        return Check(name, "fail", str(error), _REINSTALL)
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}", "Report this as a bug of wisp doctor.")


class _InBackground:
    """Checks in a thread that nobody has to wait for: looking up a host name knows no timeout."""

    def __init__(self, name: str, check: Callable[[], Check | list[Check]]) -> None:
        self._name, self._check = name, check
        self._found: list[Check] | None = None
        self._thread = threading.Thread(target=self._run, name=f"doctor-{name}", daemon=True)
        self._thread.start()

    def result(self, timeout_s: float) -> list[Check]:
        self._thread.join(timeout_s)
        if self._found is None:
            return [Check(self._name, "warn", f"no result after {timeout_s:.0f} s", "Try again.")]
        return self._found

    def _run(self) -> None:
        try:
            found = self._check()
            self._found = found if isinstance(found, list) else [found]
        except Exception as error:
            self._found = [
                Check(self._name, "fail", f"{type(error).__name__}: {error}", "Report this as a bug.")
            ]


# --- Python and packages


def python_version() -> Check:
    from packaging.specifiers import SpecifierSet

    finding = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    wanted = importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    if platform.python_version() in SpecifierSet(wanted, prereleases=True):
        return Check("Python", "ok", finding)
    return Check("Python", "fail", finding, f"WISP needs Python {wanted}.")


def packages() -> Check:
    """Every dependency, against the range that this release was made for."""
    found = dict(_requirements(""))
    wrong = [text for text in found.values() if text]
    if wrong:
        return Check("packages", "fail", f"wisp {__version__}; {'; '.join(wrong)}", _REINSTALL)
    shown = ("xllamacpp", "numpy", "starlette", "uvicorn", "websockets", "huggingface-hub")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown)
    return Check("packages", "ok", f"wisp {__version__}; all {len(found)} as required: {versions}, ...")


def extras() -> Check:
    """Optional packages: nothing is wrong without them, unless they are there in a wrong version."""
    states, wrong = [], []
    for extra, purpose in {"lab": "training, simulation, plots", "vllm": "the vLLM engine"}.items():
        problems = [text for _, text in _requirements(extra) if text]
        missing = [text for text in problems if text.endswith("is not installed")]
        wrong += [text for text in problems if text not in missing]
        states.append(f"{extra} ({purpose}): {'not installed' if missing else 'installed'}")
    if wrong:
        return Check("extras", "warn", "; ".join(wrong), f"pip install '{_DISTRIBUTION}[lab]' (or [vllm])")
    return Check("extras", "ok", "; ".join(states))


def _requirements(extra: str) -> Iterator[tuple[str, str]]:
    """Each requirement of `extra` ("" for those that are always needed), with what is wrong, or ""."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires(_DISTRIBUTION) or []:
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


def event_loop() -> Check:
    try:
        version = importlib.metadata.version("uvloop")
    except importlib.metadata.PackageNotFoundError:
        finding = "uvloop is not installed; asyncio's own loop takes about twice the time per message"
        return Check("event loop", "warn", finding, "pip install uvloop (there is none for Windows)")
    return Check("event loop", "ok", f"uvloop {version}")


def emulated() -> Check:
    """The engine without a model: its hardware profiles."""
    from wisp.engines.emulated import HARDWARE, hardware

    names = sorted(path.stem for path in HARDWARE.glob("*.toml"))
    for name in names:
        hardware(name)  # raises where one is damaged
    return Check(
        "emulated", "ok", f"an engine for fleets and tests, timing without a model: {', '.join(names)}"
    )


# --- the machine


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
        return Check("memory", "ok", "this system does not tell how much is free")
    sizes = {card.name: card.size for card in catalogue()}
    needs = {name: int(_OVERHEAD * sum(sizes[m] for m in models)) for name, models in PAIRS.items()}
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


def available_memory() -> int | None:
    """Bytes that may still be used: what Linux calls available, or less where a control group sets a limit."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            limit = int((group / "memory.max").read_text())
            free = min(free, limit - int((group / "memory.current").read_text()))
        return max(0, free)
    return None


def disk() -> Check:
    """Room for the models that are not here yet."""
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
    return next(f for f in (folder.absolute(), *folder.absolute().parents) if f.is_dir())


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
    """Which variables are set; never what is in them."""
    names = {
        "WISP_API_KEYS": "clients of wisp serve and wisp edge",
        "WISP_API_KEY": "wisp edge to its verifier",
    }
    found = [f"{name} is set ({use})" for name, use in names.items() if os.environ.get(name)]
    nothing = "none in the environment: serve and edge listen on loopback only, unless given --api-keys"
    return Check("API keys", "ok", "; ".join(found) or nothing)


SYSTEM: dict[str, Callable[[], Check]] = {
    "Python": python_version,
    "packages": packages,
    "extras": extras,
    "event loop": event_loop,
    "emulated": emulated,
    "cores": cores,
    "idle threads": wait_policy,
    "memory": memory,
    "disk": disk,
    "model cache": cache_writable,
    "ports": ports,
    "API keys": api_keys,
}


# --- models


def model_cached(card: ModelCard) -> Check:
    name = f"model {card.name}"
    if card.bundled:
        path = resolve(card.name, offline=True)  # raises where it is missing
        return Check(name, "ok", f"bundled, {size_text(path.stat().st_size)}")
    path = final_path(card)
    if is_stamped(path, card.sha256):
        return Check(name, "ok", f"here, checked: {path}")
    if is_cached(card.name):
        finding = f"here, but not checked since it was last changed: {path}"
        return Check(
            name, "warn", finding, f"wisp pull {card.name} (reads it once, and fetches it again if need be)"
        )
    if path.exists():
        return Check(name, "warn", f"{path} is damaged", f"wisp pull {card.name}")
    return Check(name, "ok", f"not here; {size_text(card.size)} to pull")


def hub_reachable(offline: bool) -> Check:
    if offline or any(os.environ.get(name) for name in ("WISP_OFFLINE", "HF_HUB_OFFLINE")):
        return Check("model hub", "ok", "not asked: offline")
    import httpx
    from huggingface_hub import constants

    remedy = "Models can also come from the Python index or from a file; for a mirror, set HF_ENDPOINT."
    try:
        status = httpx.head(constants.ENDPOINT, timeout=_HUB_S).status_code
    except httpx.HTTPError as error:
        finding = f"{constants.ENDPOINT} cannot be reached ({error or type(error).__name__})"
        return Check("model hub", "warn", finding, remedy)
    if status >= 400:
        return Check("model hub", "warn", f"{constants.ENDPOINT} answers {status}", remedy)
    return Check("model hub", "ok", f"{constants.ENDPOINT} answers")


# --- the engine, in a process of its own


def engine_checks() -> list[Check]:
    """What the child found; and if it was killed, by what, in which check."""
    command = [sys.executable, "-m", "wisp.lab.doctor"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ENGINE_S, check=False)
    except subprocess.TimeoutExpired:
        finding = f"the engine's checks did not end within {_ENGINE_S:.0f} s"
        return [Check("engine", "fail", finding, "Is the machine overloaded? Try again.")]
    checks = [Check(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0:
        return checks
    name = list(ENGINE)[min(len(checks), len(ENGINE) - 1)]
    return [*checks, _died(name, done.returncode, done.stderr)]


def vllm_checks() -> list[Check]:
    """Where vLLM is installed: its version, and then its engine's self-test on the tiny target, in a child."""
    from wisp.engines.vllm.starting import installed, require

    if not installed():
        return []
    try:
        require()
    except WispError as error:
        return [Check("vllm", "warn", str(error), "Without --engine vllm, this does not matter.")]
    command = [sys.executable, "-m", "wisp.lab.doctor", "vllm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_VLLM_S, check=False)
    except subprocess.TimeoutExpired:
        finding = f"the self-test did not end within {_VLLM_S:.0f} s"
        return [Check("vllm", "fail", finding, "Is the machine overloaded? Try again.")]
    found = [Check(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    if found:
        return found
    last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
    return [
        Check(
            "vllm", "fail", f"vLLM ended its process (status {done.returncode}): {last}", "See docs/vllm.md."
        )
    ]


def vllm_self_test() -> Check:
    """vLLM starts with our scheduler and hooks, and drafts do not change what the tiny target says."""
    from wisp.engines.build import load_target

    try:
        engine, _ = load_target("tiny-target", engine="vllm", slots=2, context=128, offline=True)
    except WispError as error:
        return Check("vllm", "fail", str(error), "See docs/vllm.md.")
    gap = engine.info.flip_gap
    engine.close()
    finding = (
        f"the self-test passed: with and without drafts the same tokens (but for scores within {gap:.2g})"
    )
    return Check("vllm", "ok", finding)


def _died(name: str, code: int, stderr: str) -> Check:
    if code == -getattr(signal, "SIGILL", 0):
        finding = "llama.cpp uses instructions that this CPU does not have (the wheel is built for AVX2)"
        return Check(
            name, "fail", finding, "Run the verifier on a newer machine; an edge can do with --draft ngram."
        )
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    last = (stderr.strip().splitlines() or ["nothing on standard error"])[-1]
    return Check(name, "fail", f"the engine ended its process ({how}): {last}", _REINSTALL)


def library() -> Check:
    """The shared object loads, is the pinned build, and its default parameters read back as that build's."""
    from wisp.engines.llama.capi import PIN, api

    loaded = api()
    features = loaded.ffi.string(loaded.lib.llama_print_system_info()).decode().split("|")
    on = [f.split(":")[-1].removesuffix("= 1 ").strip() for f in features if f.endswith("= 1 ")]
    return Check("llama.cpp", "ok", f"build b{PIN.rsplit('.', 1)[1]}, its C API as declared; {' '.join(on)}")


def build() -> Check:
    """Two sequences, rollback and copied prefixes agree with decoding one by one."""
    from wisp.engines.llama.proof import check_build

    problem = check_build(resolve("tiny-target", offline=True))
    if problem:
        return Check("C API", "fail", problem, _REINSTALL)
    return Check("C API", "ok", "two sequences, rollback and copied prefixes agree with decoding one by one")


def exact_mode() -> Check:
    """Random schedules on the tiny model, every logit compared with the reference decoder's."""
    from wisp.engines.llama.proof import prove_exact

    path = resolve("tiny-target", offline=True)
    proof = prove_exact(path, sessions=3, prompt_tokens=(2, 24), new_tokens=16, threads=(1, 2))
    if proof.exact:
        finding = f"{proof.positions} positions have the reference decoder's logits, bit for bit, on 1 and 2 threads"
        return Check("exact mode", "ok", finding)
    finding = f"{proof.differing} of {proof.positions} positions differ, {proof.wrong} tokens are wrong"
    if proof.errors:
        finding += f"; {len(proof.errors)} errors, the first: {proof.errors[0]}"
    remedy = "Servers will fall back to fast mode, where near-ties may flip; please report the machine."
    return Check("exact mode", "fail", finding, remedy)


ENGINE: dict[str, Callable[[], Check]] = {"llama.cpp": library, "C API": build, "exact mode": exact_mode}


def _report_engine() -> None:
    """Print each check as it is done, so that the parent knows which one was the last."""
    for name, check in ENGINE.items():
        print(json.dumps(asdict(_guarded(name, check))), flush=True)


# --- showing


def _show(checks: list[Check]) -> None:
    marks = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
    table = Table("", "check", "finding", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.columns[1].no_wrap = True
    for check in checks:
        finding = Text(check.finding, overflow="fold")
        if check.remedy:
            finding.append(f"\n-> {check.remedy}", style=marks[check.status][1])
        table.add_row(Text(*marks[check.status]), check.name, finding)
    console = Console()
    console.print(table)
    failed = sum(check.status == "fail" for check in checks)
    warned = sum(check.status == "warn" for check in checks)
    console.print(f"{failed} failed, {warned} with a warning, of {len(checks)} checks.", highlight=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["vllm"]:
        print(json.dumps(asdict(_guarded("vllm", vllm_self_test))), flush=True)
    else:
        _report_engine()
