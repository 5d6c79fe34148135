"""Checks of the product by itself: `wisp check-lossless` and `wisp check-faults`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wisp.cli.options import Jobs, Json, Offline


def check_lossless(
    pair: Annotated[
        str, typer.Option(help="tiny, qwen2.5-coder, another pair that `wisp pull` lists, or TARGET,DRAFT.")
    ] = "tiny",
    engine: Annotated[str, typer.Option(help="llama.cpp, or vllm with the tiny pair.")] = "llama.cpp",
    mode: Annotated[
        str | None,
        typer.Option(help="exact or fast (default: llama.cpp's exact, vLLM's fast).", show_default=False),
    ] = None,
    cases: Annotated[
        int | None, typer.Option(help="How many cases (default: 560 tiny, 12 otherwise).", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random schedules.")] = 0,
    depth: Annotated[
        int | None,
        typer.Option(help="Steps in flight (default: 1 and 2 in turn).", min=1, max=2, show_default=False),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Hold the speculative path against a slow reference decoder, under interleaving, eviction and resumption."""
    from wisp.check.lossless import run_check

    raise typer.Exit(
        run_check(
            pair, engine=engine, mode=mode, cases=cases, seed=seed, depth=depth, offline=offline, as_json=json
        )
    )


def check_faults(
    seeds: Annotated[
        int | None, typer.Option(help="How many runs (default: 100; 1 with --seed alone).", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first run (default: 0).", min=0)] = None,
    minutes: Annotated[float, typer.Option(help="Begin no more after this time (0: no limit).", min=0)] = 0,
    jobs: Jobs = 1,
    resume: Annotated[
        Path | None,
        typer.Option(help="Keep the report in this file, and go on where it ends: a long check in parts."),
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="Run the plan in this file, and nothing else.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write a plan that fails (default: faults-SEED.json).")
    ] = None,
    json: Json = False,
) -> None:
    """Run whole systems in virtual time under faults of every kind, and look at every token and every count.

    A run is a function of its seed. One that fails is made shorter and written to a file for --replay.
    """
    from wisp.check import faults

    if replay is not None:
        raise typer.Exit(faults.replay(replay, as_json=json))
    many = seeds or (100 if seed is None else 1)
    raise typer.Exit(
        faults.run_check(
            first=seed or 0,
            seeds=many,
            minutes=minutes,
            jobs=jobs,
            resume=resume,
            out=out,
            as_json=json,
        )
    )
