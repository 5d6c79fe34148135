"""The engines, each in its own process, since a library built for another CPU, or with other struct layouts, may crash
it.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from wisp.check.doctor.check import REINSTALL, Check
from wisp.core.errors import WispError
from wisp.engines.models import resolve

ENGINE_S = 60.0  # the engine's checks take two or three seconds
VLLM_S = 240.0  # importing it takes long, and an accelerator's kernels are compiled first


def engine_checks() -> list[Check]:
    """The child's findings; and if it died, how, and in which check."""
    done = _child([], ENGINE_S)
    if done is None:
        return [_too_long("engine", ENGINE_S)]
    checks = _reported(done)
    if done.returncode == 0:
        return checks
    name = list(ENGINE)[min(len(checks), len(ENGINE) - 1)]
    return [*checks, _died(name, done)]


def vllm_checks() -> list[Check]:
    """Where vLLM is installed: its version, and then its engine's self-test on the tiny target, in a child."""
    from wisp.engines.vllm.starting import installed, require

    if not installed():
        return []
    try:
        require()
    except WispError as error:
        return [Check("vllm", "warn", str(error), "Without --engine vllm, this does not matter.")]
    done = _child(["vllm"], VLLM_S)
    if done is None:
        return [_too_long("vllm", VLLM_S)]
    finding = f"vLLM ended its process (status {done.returncode}): {_last_words(done)}"
    return _reported(done) or [Check("vllm", "fail", finding, "See docs/vllm.md.")]


def _child(words: list[str], limit_s: float) -> subprocess.CompletedProcess[str] | None:
    """`python -m wisp.check.doctor` to its end; None if that takes too long."""
    command = [sys.executable, "-m", "wisp.check.doctor", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return None


def _reported(done: subprocess.CompletedProcess[str]) -> list[Check]:
    return [Check(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"name"')]


def _too_long(name: str, limit_s: float) -> Check:
    finding = f"the checks did not end within {limit_s:.0f} s"
    return Check(name, "fail", finding, "Is the machine overloaded? Try again.")


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]


def vllm_self_test() -> Check:
    """vLLM starts with our scheduler and hooks, and drafts do not change the tiny target's text."""
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


def _died(name: str, done: subprocess.CompletedProcess[str]) -> Check:
    code = done.returncode
    if code == -getattr(signal, "SIGILL", 0):
        finding = "llama.cpp uses instructions that this CPU does not have (the wheel is built for AVX2)"
        return Check(
            name, "fail", finding, "Run the verifier on a newer machine; an edge can do with --draft ngram."
        )
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    return Check(name, "fail", f"the engine ended its process ({how}): {_last_words(done)}", REINSTALL)


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
        return Check("C API", "fail", problem, REINSTALL)
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


def accelerator() -> Check:
    """What the installed llama.cpp can use, and what this machine seems to have besides."""
    from wisp.engines.llama.devices import MORE_WHEELS, accelerators, named

    usable = [device for device in accelerators() if device.holds_layers]
    seen = graphics()
    if usable:
        finding = f"llama.cpp can use {named(usable)}, in drafters and in verifiers with --mode fast"
        return Check("accelerator", "ok", finding)
    if seen:
        finding = f"this machine has {seen}, and the installed llama.cpp can use none"
        return Check("accelerator", "warn", finding, f"To use it, {MORE_WHEELS}.")
    return Check("accelerator", "ok", "none here; llama.cpp computes on the CPU")


def graphics() -> str:
    """The graphics that the operating system shows, in words, or ""."""
    if sys.platform == "darwin":
        return "Apple's GPU" if platform.machine() == "arm64" else ""
    places = {"an NVIDIA GPU": "/dev/nvidia0", "an AMD GPU": "/dev/kfd", "a GPU": "/dev/dri/renderD128"}
    return next((name for name, path in places.items() if Path(path).exists()), "")


ENGINE: dict[str, Callable[[], Check]] = {
    "llama.cpp": library,
    "C API": build,
    "exact mode": exact_mode,
    "accelerator": accelerator,
}
