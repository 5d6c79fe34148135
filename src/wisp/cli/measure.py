"""Commands that measure, and that plan from measurements: `wisp plan`, `profile`, `trace` and `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wisp.cli.options import Jobs, Json, Model, Offline, Threads, Traces
from wisp.core.errors import ConfigError


def plan(
    hardware: Annotated[str, typer.Option(help="Profile of the verifier's engine, or a TOML file.")],
    devices: Annotated[int, typer.Option(help="How many there are.")],
    device: Annotated[str, typer.Option(help="A device profile, or drafted tokens per second.")],
    rate: Annotated[float, typer.Option(help="Tokens per second that users expect.")],
    rtt: Annotated[float, typer.Option(help="Round trip, ms.")] = 20.0,
    prompt: Annotated[str, typer.Option(help="Fewest and most tokens.")] = "60-200",
    output: Annotated[str, typer.Option(help="Fewest and most tokens.")] = "100-300",
    ttft: Annotated[float, typer.Option(help="Seconds that users wait for a first token.")] = 3.0,
    tolerance: Annotated[float, typer.Option(help="Share of requests that may miss their SLO.")] = 0.1,
    acceptance: Annotated[
        float | None, typer.Option(help="Share of draft tokens to agree (default: as recorded).")
    ] = None,
    kv: Annotated[
        int, typer.Option(help="Tokens of KV that the verifier holds (0: as the profile says).", min=0)
    ] = 0,
    slots: Annotated[int, typer.Option(help="Sessions that it holds (0: as the profile says).", min=0)] = 0,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Try it by short simulations, which overrule the estimate.")
    ] = False,
    jobs: Jobs = 2,
    json: Json = False,
) -> None:
    """Estimate how many devices a verifier carries, with WISP and without, and which of the two to run.

    Prints the commands for it, too.
    """
    from wisp.calibrate.traces.written import read_range
    from wisp.sim.commands import run_plan
    from wisp.sim.plan import scenario_for

    prompts, outputs = read_range(prompt, "--prompt"), read_range(output, "--output")
    planned = scenario_for(
        hardware, devices, device, rtt, rate, prompts, outputs, ttft, acceptance, kv, slots
    )
    run_plan(planned, tolerance=tolerance, simulate=simulate, jobs=jobs, as_json=json)


def trace(
    target: Model,
    draft: Annotated[str, typer.Option(help="A model as for --target.")],
    prompts: Annotated[Path, typer.Option(help="JSONL file of prompts, or a folder of such files.")],
    out: Annotated[Path, typer.Option(help="Folder for the trace files.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens per prompt and sampling, at most.", min=1)] = 64,
    samplings: Annotated[str, typer.Option(help="greedy, or t and a temperature.")] = "greedy,t0.7",
    depth: Annotated[int, typer.Option(help="Tokens recorded beyond a rejected one.", min=1, max=255)] = 16,
    seed: Annotated[int, typer.Option(help="From which each trace's seed is made.")] = 0,
    mode: Annotated[str, typer.Option(help="Of the target: fast or exact.")] = "fast",
    threads: Threads = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Record what target and drafter say along the target's text, for replay.

    Interrupted, it goes on where it was.
    """
    from wisp.calibrate.traces.command import run_trace
    from wisp.calibrate.traces.record import Settings

    settings = Settings.named(samplings, max_tokens, depth, seed, mode, threads)
    run_trace(target, draft, prompts, out, settings, offline=offline, as_json=json)


def profile(
    draft: Annotated[str | None, typer.Option(help="The draft model to time on this device.")] = None,
    target: Annotated[str | None, typer.Option(help="The target whose steps to time, as for serve.")] = None,
    engine: Annotated[str, typer.Option(help="Of the target: llama.cpp, vllm or emulated.")] = "llama.cpp",
    mode: Annotated[
        str | None, typer.Option(help="Of the target, as for serve: exact or fast.", show_default=False)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="As for serve: sequences held at once.", min=1, max=4096)
    ] = None,
    context: Annotated[int | None, typer.Option(help="As for serve: tokens per session.", min=64)] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="As for serve --engine emulated.", min=1024)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer kinds of steps, fewer repeats.")] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count a core's time: where others keep the machine busy.")
    ] = False,
    limit_s: Annotated[float, typer.Option(help="Seconds that timing a target may take.", min=1)] = 300.0,
    out: Annotated[
        Path | None, typer.Option(help="Write the target's cost profile here, for serve --cost.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Draft steps.", min=3)] = 64,
    threads: Threads = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """How fast this device drafts (--draft), or how long a target's steps take: the cost model (--target)."""
    if (draft is None) == (target is None):
        raise ConfigError("give --draft MODEL or --target MODEL, one of the two")
    if draft is not None and out is not None:
        raise ConfigError(
            "--out is for the cost profile of a --target; how fast a draft model is goes to the terminal"
        )
    if target is not None:
        from wisp.calibrate.profile.target import profile_target

        profile_target(
            target, engine=engine, mode=mode, slots=slots, context=context, threads=threads, kv_tokens=kv_tokens,
            quick=quick, cpu_time=cpu_time, limit_s=limit_s, out=out, offline=offline, as_json=json,
        )  # fmt: skip
        return
    from wisp.calibrate.profile.draft import profile_draft

    assert draft is not None
    profile_draft(draft, steps=steps, threads=threads, offline=offline, as_json=json)


def train(
    traces: Traces = Path("data/traces"),
    out: Annotated[
        Path | None, typer.Option(help="Write the predictor here, for `wisp edge --predictor`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of rounds and of fitting.", min=0, max=2**32 - 1)] = 0,
    json: Json = False,
) -> None:
    """Fit a predictor of acceptance to traces, and say how good it is on prompts and domains kept apart."""
    from wisp.calibrate.train import run_train

    run_train(traces, out, seed=seed, as_json=json)
