"""`wisp bench-...`: what serving costs beside the model, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wisp.cli.options import Json, Offline


def bench_overhead(
    sessions: Annotated[int, typer.Option(help="Sessions, each on a connection of its own.", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="Length of each measurement.", min=0.5)] = 5.0,
    json: Json = False,
) -> None:
    """What a verification costs beside the engine: a null engine, real sockets, and a bare echo for comparison."""
    from benchmarks.overhead import run_bench

    raise typer.Exit(run_bench(sessions=sessions, seconds=seconds, as_json=json))


def bench_policy(
    pending: Annotated[int, typer.Option(help="Pieces of work, and sessions of a server.", min=1)] = 1000,
    json: Json = False,
) -> None:
    """What one decision of each batching policy costs, how that grows, and what a server pays for a step."""
    from benchmarks.policy import run_bench_policy

    run_bench_policy(pending, as_json=json)


def bench_vllm(
    target: Annotated[str, typer.Option(help="As for `wisp serve --engine vllm`.")] = "tiny-target",
    out: Annotated[Path | None, typer.Option(help="Write the figures into this JSON file.")] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """What it costs that WISP decides the steps of vLLM: decode steps beside vLLM's own, in turn."""
    from benchmarks.vllm_overhead import run_bench

    run_bench(target, out, as_json=json, offline=offline)


def bench_ahead(
    out: Annotated[Path | None, typer.Option(help="Write a page and its data into this folder.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs with and without, in turn.", min=1)] = 3,
    json: Json = False,
) -> None:
    """Drafting ahead on real processes over a delayed line, and what a replay predicts of it. Takes minutes."""
    from benchmarks.reality.ahead import run_ahead

    run_ahead(out, repeats=repeats, as_json=json)


def bench_simulator(
    minutes: Annotated[float, typer.Option(help="Simulated, of a hundred devices.", min=0.05, max=60)] = 10.0,
    most: Annotated[int, typer.Option(help="Leave out runs of more devices than these.", min=10)] = 2000,
    out: Annotated[Path | None, typer.Option(help="Write the figures into this JSON file.")] = None,
    json: Json = False,
) -> None:
    """CPU time of simulated runs, and what a token costs from ten devices to two thousand."""
    from benchmarks.simulator import run_bench_simulator

    run_bench_simulator(minutes, most, out, as_json=json)
