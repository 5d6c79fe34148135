"""`wisp sim`: simulated and emulated fleets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wisp.cli.options import (
    SYSTEM_HELP,
    Jobs,
    Json,
    Limit,
    PredictorFile,
    Price,
    Rate,
    ScenarioName,
    Seed,
    System,
    Traces,
)
from wisp.cli.renamed import Page, today

app = typer.Typer(
    help="Simulated and emulated fleets: how a system does, and how many devices it carries.",
    no_args_is_help=True,
)


@app.command()
def run(
    scenario: ScenarioName,
    system: System = "wisp",
    rate: Rate = None,
    devices: Annotated[int | None, typer.Option(help="Default: the scenario's.", min=1)] = None,
    seed: Seed = None,
    chrome_trace: Annotated[Path | None, typer.Option(help="Write a trace for chrome://tracing.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to look at the run in, as one file for a browser.")
    ] = None,
    json: Json = False,
) -> None:
    """A fleet and its verifier in virtual time: the live decisions, modelled time."""
    from wisp.sim.commands import run_simulate

    run_simulate(
        scenario,
        system,
        rate=rate,
        devices=devices,
        seed=seed,
        chrome=chrome_trace,
        plot=plot,
        html=html,
        as_json=json,
    )


@app.command()
def log(
    file: Annotated[Path, typer.Argument(help="An event log of `wisp serve --event-log`.")],
    html: Annotated[Path, typer.Option(help="Write the page into this file.")],
) -> None:
    """Replay an event log, and write the page of its last run, as one file for a browser."""
    from wisp.outputs import writable
    from wisp.server.log_page import write_log_page

    writable(html)
    events = write_log_page(file, html)
    typer.echo(f"{html}: {events:,} events")


@app.command()
def fleet(
    scenario: ScenarioName,
    system: System = "wisp",
    server: Annotated[
        str, typer.Option(help="A verifier that serves the scenario (default: one is started).")
    ] = "",
    policies: Annotated[
        str, typer.Option(help="Batching policies to compare in turn, by comma.", callback=today)
    ] = "",
    rate: Annotated[
        float | None, typer.Option(help="Tokens per second that all users want.", min=0.1)
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices at work.", min=1)] = None,
    seed: Seed = None,
    window: Annotated[float | None, typer.Option(help="Seconds that count.", min=1)] = None,
    warmup: Annotated[float | None, typer.Option(help="Seconds before them.", min=0)] = None,
    against_simulator: Annotated[
        bool, typer.Option("--against-simulator", help="Simulate the same, and compare.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures into this JSON file.")] = None,
    json: Json = False,
) -> None:
    """Emulated devices by the hundred against a live verifier, in real time; every token is checked."""
    from wisp.sim.fleet import run_fleet

    code = run_fleet(
        scenario,
        of=system,
        server=server,
        policies=[p for p in policies.split(",") if p],
        rate=rate,
        devices=devices,
        seed=seed,
        window_s=window,
        warmup_s=warmup,
        against_simulator=against_simulator,
        as_json=json,
        out=out,
    )
    raise typer.Exit(code)


@app.command()
def capacity(
    scenario: ScenarioName,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            "--system",
            help="central-paper or sled-paper (the paper's figures, nothing is simulated), or a system: "
            + SYSTEM_HELP,
            callback=today,
        ),
    ] = "wisp",
    rate: Rate = None,
    tolerance: Annotated[
        float, typer.Option(help="Share of requests that may miss their SLO.", min=0.001, max=0.9)
    ] = 0.1,
    seeds: Annotated[
        int | None,
        typer.Option(help="Runs per number of devices (default: the scenario's seeds).", min=1, max=20),
    ] = None,
    jobs: Jobs = 2,
    json: Json = False,
) -> None:
    """The most devices that a system serves in time, with its interval, and how far that is from the fluid bound.

    Baselines are tuned first. Runs are remembered.
    """
    from wisp.sim.commands import run_capacity

    run_capacity(scenario, policy, rate=rate, tolerance=tolerance, seeds=seeds, jobs=jobs, as_json=json)


@app.command()
def compare(
    scenarios: Annotated[
        list[str] | None, typer.Argument(help="Scenarios to compare in, instead of a suite.")
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(help="TOML file that lists scenarios (default: the suite that ships).")
    ] = None,
    systems: Annotated[
        str,
        typer.Option(
            help="By comma, each with its changes: wisp,ahead=no,paper are two. Baselines are tuned in each cell; "
            "central is always there. Default: all but sled-confidence; with --quick central, central-wisp, wisp.",
            callback=today,
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few requests under one seed: for a first impression.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the figures into this JSON file after each cell; go on with it if it is there."
        ),
    ] = None,
    scenario_files: Annotated[
        Path | None, typer.Option(help="Only write the suite's scenarios as files into this folder.")
    ] = None,
    jobs: Jobs = 2,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if wisp is worse than central serving in a cell.")
    ] = False,
    json: Json = False,
) -> None:
    """Systems over a suite of scenarios: is wisp ever worse than central serving at its best?

    Every system sees the same requests under the same seeds. A verdict for each cell; cells that fail are listed.
    """
    from wisp.sim.compare.command import run_compare

    code = run_compare(
        scenarios or [],
        suite=suite,
        systems=systems,
        quick=quick,
        out=out,
        scenario_files=scenario_files,
        jobs=jobs,
        check=check,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command()
def replay(
    traces: Traces = Path("data/traces"),
    policies: Annotated[str, typer.Option(help="Which to compare, by comma; default: all.")] = "",
    predictor: PredictorFile = None,
    price: Price = 0.0,
    limit: Limit = 40,
    out: Page = None,
    json: Json = False,
) -> None:
    """Replay traces under drafting policies, over a grid of devices, links and verifiers, in virtual time."""
    from wisp.sim.replay_grid import run_replay

    names = [p for p in policies.split(",") if p]
    run_replay(traces, names, predictor, price=price, limit=limit, as_json=json)
