"""From models to figures to policies: `wisp trace`, `profile`, `train` and `replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wisp.cli.options import Json, Model, Offline, PredictorFile, Threads
from wisp.core.errors import ConfigError


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
    """Record what target and drafter say along the target's text, for replay. Interrupted, it goes on where it was."""
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
    traces: Annotated[Path, typer.Option(help="Folder or file of traces.")] = Path("data/traces"),
    out: Annotated[
        Path | None, typer.Option(help="Write the predictor here, for `wisp edge --predictor`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of rounds and of fitting.", min=0, max=2**32 - 1)] = 0,
    json: Json = False,
) -> None:
    """Fit a predictor of acceptance to traces, and say how good it is on prompts and domains kept apart."""
    from wisp.calibrate.train import run_train

    run_train(traces, out, seed=seed, as_json=json)


def replay(
    traces: Annotated[Path, typer.Option(help="Folder or file of traces.")] = Path("data/traces"),
    policies: Annotated[str, typer.Option(help="Which to compare, by comma; default: all.")] = "",
    predictor: PredictorFile = None,
    price: Annotated[
        float, typer.Option(help="What the verifier asks per draft token, in tokens.", min=0)
    ] = 0.0,
    limit: Annotated[int, typer.Option(help="Generations per cell of the grid.", min=1)] = 40,
    out: Annotated[
        Path | None, typer.Option(help="Write a page, its data and a plot into this folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay traces under drafting policies, over a grid of devices, links and verifiers, in virtual time."""
    from wisp.sim.replay_grid import run_grid

    names = [p for p in policies.split(",") if p]
    run_grid(traces, names, predictor, price=price, limit=limit, out=out, as_json=json)
