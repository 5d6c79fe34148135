"""Fleets on hardware that one does not have: `wisp fleet`, `simulate`, `capacity`, `plan` and `experiments`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wisp.cli.options import SYSTEM_HELP, Jobs, Json, Rate, ScenarioName, Seed, System


def fleet(
    scenario: Annotated[str, typer.Argument(help="A scenario that ships, or a TOML file.")],
    system: System = "wisp",
    server: Annotated[
        str, typer.Option(help="A verifier that serves the scenario (default: one is started).")
    ] = "",
    policies: Annotated[str, typer.Option(help="Batching policies to compare in turn, by comma.")] = "",
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


def simulate(
    scenario: ScenarioName,
    system: System = "wisp",
    rate: Rate = None,
    devices: Annotated[int | None, typer.Option(help="Default: the scenario's.", min=1)] = None,
    seed: Seed = None,
    chrome_trace: Annotated[Path | None, typer.Option(help="Write a trace for chrome://tracing.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    json: Json = False,
) -> None:
    """A fleet and its verifier in virtual time: the live decisions, modelled time."""
    from wisp.sim.commands import run_simulate

    run_simulate(
        scenario, system, rate=rate, devices=devices, seed=seed, chrome=chrome_trace, plot=plot, as_json=json
    )


def capacity(
    scenario: ScenarioName,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            "--system",
            help="central-paper or sled-paper (the paper's figures, nothing is simulated), or a system: "
            + SYSTEM_HELP,
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
    Baselines are tuned first. Runs are remembered."""
    from wisp.sim.commands import run_capacity

    run_capacity(scenario, policy, rate=rate, tolerance=tolerance, seeds=seeds, jobs=jobs, as_json=json)


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
    """About how many devices to expect a verifier to carry, whether WISP or serving centrally is the way, and the
    commands for it."""
    from wisp.sim.commands import run_plan
    from wisp.sim.plan import scenario_for
    from wisp.calibrate.traces.written import read_range

    prompts, outputs = read_range(prompt, "--prompt"), read_range(output, "--output")
    planned = scenario_for(
        hardware, devices, device, rtt, rate, prompts, outputs, ttft, acceptance, kv, slots
    )
    run_plan(planned, tolerance=tolerance, simulate=simulate, jobs=jobs, as_json=json)


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
