"""`python -m benchmarks NAME`: one command for each benchmark. What it needs is imported when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `wisp.cli`

import typer

from wisp.cli.options import Jobs, Json, Limit, Offline, PredictorFile, Price, Traces
from wisp.core.errors import WispError

Figures = Annotated[Path | None, typer.Option(help="Write the figures into this JSON file.")]
Page = Annotated[Path | None, typer.Option(help="Write a page with its data and plots into this folder.")]

app = typer.Typer(
    help="Benchmarks and experiments: they make the figures and pages of docs/results.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def overhead(
    sessions: Annotated[int, typer.Option(help="Sessions, each on a connection of its own.", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="Length of each measurement.", min=0.5)] = 5.0,
    json: Json = False,
) -> None:
    """What a verification costs beside the engine: a null engine, real sockets, and a bare echo for comparison."""
    from benchmarks.overhead import run_bench

    raise typer.Exit(run_bench(sessions=sessions, seconds=seconds, as_json=json))


@app.command()
def policy(
    pending: Annotated[
        int, typer.Option(help="Candidates of a step, and sessions of a server.", min=1)
    ] = 1000,
    json: Json = False,
) -> None:
    """What one decision of each batching policy costs, how that grows, and what a server pays for a step."""
    from benchmarks.policy import run_bench_policy

    run_bench_policy(pending, as_json=json)


@app.command()
def constants(json: Json = False, out: Figures = None) -> None:
    """What each constant of the `wisp` policy is for: cells of the suite without it."""
    from benchmarks.constants import run_bench_constants

    run_bench_constants(out, as_json=json)


@app.command()
def depth(
    live: Annotated[bool, typer.Option(help="Run servers, too: some eight minutes.")] = True,
    json: Json = False,
    out: Figures = None,
) -> None:
    """What a second step in flight is worth: simulated, and on live servers in turn."""
    from benchmarks.depth import run_bench_depth

    run_bench_depth(live=live, out=out, as_json=json)


@app.command()
def history(traces: Traces = Path("data/traces"), json: Json = False, out: Figures = None) -> None:
    """Drafts without a model, from earlier texts: recorded texts as sessions of one key."""
    from benchmarks.history import run_bench_history

    run_bench_history(traces, out, as_json=json)


@app.command()
def constraints(
    pair: Annotated[str, typer.Option(help="Whose vocabulary, and who answers.")] = "qwen2.5-coder",
    before: Annotated[
        str, typer.Option(help="Version in git to compare requests without constraints with.")
    ] = "80af4c8",  # the last one without constraints
    out: Figures = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """What constraints cost: masks along a draft, requests without any; and what drafting gains from grammars."""
    from benchmarks.constraints import run_bench

    run_bench(pair, before, out=out, as_json=json, offline=offline)


@app.command()
def vllm(
    target: Annotated[str, typer.Option(help="As for `wisp serve --engine vllm`.")] = "tiny-target",
    out: Figures = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """The cost of WISP deciding the steps of vLLM: its decode steps beside vLLM's own, in turn."""
    from benchmarks.vllm import run_bench

    run_bench(target, out, as_json=json, offline=offline)


@app.command()
def step(
    target: Annotated[str, typer.Option(help="As for `wisp serve --engine vllm`.")] = "tiny-target",
    sequences: Annotated[str, typer.Option(help="Of a step, by comma.")] = "64,256,512",
    out: Figures = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """What the host does for a verification step, beside what vLLM's own does, and where each millisecond goes."""
    from benchmarks.step.compare import run_bench_step

    wanted = tuple(int(n) for n in sequences.split(","))
    run_bench_step(target, wanted, out, as_json=json, offline=offline)


@app.command()
def logprobs(out: Figures = None, json: Json = False) -> None:
    """What one client that asks for log probabilities costs 63 others, emulated and on vLLM's CPU build."""
    from benchmarks.logprobs import run_bench_logprobs

    run_bench_logprobs(out, as_json=json)


@app.command()
def ahead(
    out: Page = None,
    repeats: Annotated[int, typer.Option(help="Runs with and without, in turn.", min=1)] = 3,
    json: Json = False,
) -> None:
    """Drafting ahead on real processes over a delayed line, and what a replay predicts of it. Takes minutes."""
    from benchmarks.reality.ahead import run_ahead

    run_ahead(out, repeats=repeats, as_json=json)


@app.command()
def simulator(
    minutes: Annotated[float, typer.Option(help="Simulated, of a hundred devices.", min=0.05, max=60)] = 10.0,
    most: Annotated[int, typer.Option(help="Leave out runs of more devices than these.", min=10)] = 2000,
    out: Figures = None,
    json: Json = False,
) -> None:
    """CPU time of simulated runs, and what a token costs from ten devices to two thousand."""
    from benchmarks.simulator import run_bench_simulator

    run_bench_simulator(minutes, most, out, as_json=json)


@app.command()
def experiments(
    names: Annotated[list[str] | None, typer.Argument(help="Which pages; default: all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cells, short runs: does it work at all?")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for pages, data and plots.")] = Path("docs/results"),
    jobs: Jobs = 2,
    json: Json = False,
) -> None:
    """Simulated experiments, each a page with its data and a plot. --json prints the data, by page."""
    from benchmarks.experiments import run_experiments

    run_experiments(names or [], quick=quick, out=out, jobs=jobs, as_json=json)


@app.command()
def suite(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few requests, one seed: does it work at all?")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for page and figures; goes on with the figures there.")
    ] = Path("docs/results"),
    systems: Annotated[str, typer.Option(help="By comma; default: those of `wisp sim compare`.")] = "",
    jobs: Jobs = 2,
    json: Json = False,
) -> None:
    """All systems over the suite of scenarios that ships: `wisp sim compare`, as a page. Takes hours."""
    from benchmarks.suite import run_suite

    run_suite(out, quick=quick, systems=systems, jobs=jobs, as_json=json)


@app.command()
def soak(
    sessions: Annotated[
        int, typer.Option(help="Of phases steady, faults and pair together.", min=1)
    ] = 100_000,
    minutes: Annotated[
        float, typer.Option(help="Begin no more sessions after that time; 0: no limit.", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of everything that is left to chance.")] = 1,
    phases: Annotated[
        str, typer.Option(help="By comma: steady, faults, pair, overload.")
    ] = "steady,faults,pair,overload",
    quick: Annotated[
        bool, typer.Option("--quick", help="Short loads, a small crowd: does it work at all?")
    ] = False,
    out: Page = None,
    json: Json = False,
) -> None:
    """Many short sessions through real processes that are killed, starved and overloaded; every text is checked."""
    from benchmarks.soak.run import run_soak

    wanted = tuple(phases.split(","))
    good = run_soak(
        sessions=sessions, minutes=minutes, seed=seed, phases=wanted, quick=quick, out=out, as_json=json
    )
    raise typer.Exit(0 if good else 1)


@app.command()
def drafting(
    traces: Traces = Path("data/traces"),
    predictor: PredictorFile = None,
    price: Price = 0.0,
    limit: Limit = 40,
    out: Page = None,
    json: Json = False,
) -> None:
    """All drafting policies over a grid of devices, links and verifiers: `wisp sim replay`, as a page."""
    from benchmarks.drafting import run_drafting

    run_drafting(traces, predictor, price=price, limit=limit, out=out, as_json=json)


@app.command()
def pages(
    folder: Annotated[Path, typer.Option(help="With the data; the pages are written there.")] = Path(
        "docs/results"
    ),
) -> None:
    """Make the pages anew from the data beside them, after a change of a template. Nothing is measured."""
    from benchmarks.pages import SOURCES, remade

    for name in SOURCES:
        if not (folder / f"{name}.json").is_file():
            typer.echo(f"{name}: no data in {folder}", err=True)
            continue
        (folder / f"{name}.md").write_text(remade(name, folder))


if __name__ == "__main__":
    try:
        app()
    except WispError as error:
        typer.echo(f"benchmarks: {error}", err=True)
        sys.exit(2)
