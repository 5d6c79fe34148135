"""`wisp sim run`, `wisp sim capacity` and `wisp plan`: the simulator on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from wisp.core.errors import ConfigError
from wisp.outputs import writable
from wisp.progress import progress_bar
from wisp.sim.capacity import Capacity, capacity
from wisp.sim.page import RunPage, row_s
from wisp.sim.plan import plan
from wisp.sim.plan.advice import overlap_told
from wisp.sim.plan.estimate import Estimate
from wisp.sim.report import report
from wisp.sim.report_table import number, table
from wisp.sim.run_trace import chrome_trace, draw
from wisp.sim.runs import Runs
from wisp.sim.scenario import Scenario, load_scenario
from wisp.sim.simulate import Simulation
from wisp.sim.systems import system


def chosen(name: str, rate: float | None, devices: int | None) -> Scenario:
    """A scenario by name, with other users or another number of devices. Raises ConfigError."""
    scenario = load_scenario(name)
    if rate is not None:
        scenario = one_class(scenario, rate)
    if devices is None:
        return scenario
    if scenario.open:
        raise ConfigError(
            f"the requests of {name} come by themselves, each from a device of its own: leave out --devices, or "
            "change arrivals_per_s or arrivals in a scenario of your own"
        )
    return scenario.with_devices(devices)


def one_class(scenario: Scenario, rate: float) -> Scenario:
    """With one class of users at this rate; says so where there were several."""
    if len(scenario.slo) > 1:
        names = ", ".join(c.name or f"{c.rate:g} tokens/s" for c in scenario.slo)
        Console(stderr=True, highlight=False).print(
            f"--rate {rate:g}: all users are like those of the first class, at this rate; the scenario has {names}"
        )
    return scenario.at_rate(rate)


def run_simulate(
    name: str,
    spec: str,
    *,
    rate: float | None,
    devices: int | None,
    seed: int | None,
    chrome: Path | None,
    plot: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """One run; by default under the scenario's first seed. Raises ConfigError."""
    scenario = chosen(name, rate, devices)
    seed = scenario.seeds[0] if seed is None else seed
    for path in (chrome, plot, html):
        if path is not None:
            writable(path)
    if plot is not None:
        from wisp.sim.plots import pyplot

        plt = pyplot()  # is it there at all?
        kinds = plt.figure().canvas.get_supported_filetypes()
        plt.close()
        if plot.suffix[1:] not in kinds:
            raise ConfigError(f"cannot draw {plot}: give it one of the endings {', '.join(sorted(kinds))}")
    trace, width_s = chrome is not None or plot is not None, row_s(scenario) if html is not None else 0.0
    simulation = Simulation(scenario, system(spec), seed, trace=trace, row_s=width_s)
    page = RunPage(simulation) if html is not None else None
    with progress_bar() as tell:

        def step(running: Simulation) -> bool:
            tell("simulating", running.env.now, scenario.warmup_s + scenario.window_s)
            return False

        simulation.run(step)
    found = report(simulation)
    if chrome is not None:
        chrome.write_text(chrome_trace(simulation))
    if plot is not None:
        draw(simulation, plot)
    if page is not None and html is not None:
        page.write(html, found)
    if as_json:
        print(json.dumps(found.benchmark()))
    else:
        Console().print(table([found]))


def run_capacity(
    name: str,
    policy: str,
    *,
    rate: float | None,
    tolerance: float,
    seeds: int | None,
    jobs: int,
    as_json: bool,
) -> None:
    """A search; `seeds` is how many, by default the scenario's. Raises ConfigError."""
    scenario = chosen(name, rate, None)
    which = scenario.seeds if seeds is None else range(1, seeds + 1)
    with Runs(jobs) as runs, Console(stderr=True).status("searching") as status:
        found = capacity(
            scenario,
            policy,
            tolerance=tolerance,
            seeds=which,
            runs=runs,
            watch=status.update,
        )
    if as_json:
        print(json.dumps(msgspec.to_builtins(found)))
    else:
        Console().print(_shown(found, overlap_told(scenario.profile)))


def _shown(c: Capacity, overlap: str) -> Table:
    rate = f", {c.rate:g} tokens/s" if c.rate else ""
    title = f"{c.scenario}{rate}: {c.system}"
    out = Table(title=title, min_width=len(title), show_header=False)
    out.add_column()
    out.add_column(justify="right")
    out.add_row(f"devices with {c.tolerance:.0%} violations (95 %)", f"{c.capacity} ({c.low} to {c.high})")
    out.add_row("devices with 1 % violations", number(c.capacity_at_1_percent, "d"))
    out.add_row("goodput at capacity", f"{c.goodput:.0f} tokens/s")
    out.add_row(
        "violations; their p99 TPOT", f"{c.violation_rate:.1%}; {number(c.violators_tpot_p99_ms, '.0f')} ms"
    )
    out.add_row("fluid bound, and our share", f"{c.bound:g}, {c.fraction:.0%}")
    out.add_row("  waiting for a first token counted", f"{c.bound_waiting:g}, {c.fraction_waiting:.0%}")
    if overlap:
        out.add_row("overlap of a step's reading and arithmetic", overlap)
    if c.variant != c.system:
        out.add_row("tuned to", c.variant)
    if c.about:
        out.add_row("what it is", c.about)
    out.add_row("runs, seeds, seconds", f"{c.runs}, {len(c.seeds)}, {c.seconds:.0f}")
    return out


def run_plan(scenario: Scenario, *, tolerance: float, simulate: bool, jobs: int, as_json: bool) -> None:
    with Runs(jobs if simulate else 1) as runs, progress_bar() as tell:

        def watch(tried: str, done: int, of: int) -> None:
            tell(f"simulating {tried}, {done} of {of} runs", done, of)

        found = plan(scenario, tolerance=tolerance, simulate=simulate, runs=runs, watch=watch)
    if as_json:
        print(json.dumps(msgspec.to_builtins(found)))
        return
    out = Table(title=scenario.title, min_width=len(scenario.title))
    for name in ("", "fluid bound", "expect", "limited by", f"violations of {found.devices}, simulated"):
        out.add_column(name, justify="right" if name else "left")
    for name, e in (("with WISP", found.wisp), ("centrally", found.central)):
        out.add_row(name, f"{e.bound:g}", _expected(e, found.devices), e.limit, _violations(e))
    console = Console(highlight=False, markup=False)
    console.print(out)
    console.print(found.verdict.value, style="bold")
    for reason in found.reasons:
        console.print(f"- {reason}")
    console.print("Assumed")
    for one in found.assumed:
        console.print(f"- {one}")
    if found.commands:
        console.print("Run")
    for command in found.commands:
        console.print(f"  {command}", soft_wrap=True)


def _expected(e: Estimate, n: int) -> str:
    return f"at least {n}" if e.tried and e.carries(n) else f"about {e.devices}"


def _violations(e: Estimate) -> str:
    return "-" if e.simulated is None else f"{e.simulated:.1%}"
