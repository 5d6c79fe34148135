"""The overlap of memory and arithmetic in a step: what measurements allow, and the main comparison over that range.

Capacities hang on it: the more of the arithmetic hides behind reading weights, the less a row costs, so centralised
serving fills its steps at a lower price, and drafts gain less over it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.experiments.page import Cell, of_bound, ratio, scenario_of, search_all
from benchmarks.pages import Data, table
from benchmarks.published import (
    BEFORE,
    OUR_SHARE,
    PUBLISHED,
    SOURCE,
    TENSORRT_LLM,
    balanced,
    found,
    prefill_share,
)
from wisp.core.verify.cost import Load
from wisp.engines.emulated import HARDWARE, hardware
from wisp.sim.capacity import Capacity
from wisp.sim.fluid import bound
from wisp.sim.plots import picture
from wisp.sim.runs import Runs

MAIN = "a100-qwen3-32b"
RATES = (8.0, 12.0, 16.0, 20.0)
SYSTEMS = ("wisp", "central")
BETWEEN = (3.0,)  # further overlaps of which the bounds are shown
STEPS = ((16, 1), (64, 1), (64, 5))  # sequences, rows of each
CONTEXT = 300


def run(quick: bool, runs: Runs) -> Data:
    """Fit what is published, and search both systems at every overlap and rate. One seed, short windows."""
    profile = hardware(MAIN)
    assert profile.overlap_measured is not None
    overlaps = (BEFORE,) if quick else (BEFORE, *profile.overlap_measured)
    bounds = [_bounds(p, r) for r in RATES for p in sorted({*overlaps, *BETWEEN})]
    at = [(p, s, r) for r in (RATES[-1:] if quick else RATES) for p in overlaps for s in SYSTEMS]
    capacities = search_all([_cell(*key, quick) for key in at], runs)
    return {
        "published": [
            msgspec.to_builtins(found(m, share)) for m in PUBLISHED for share in (OUR_SHARE, prefill_share(m))
        ],
        "large_batches": [msgspec.to_builtins(b) for b in balanced()],
        "step_times": [_steps(name, n, rows) for name in (MAIN, "h200-qwen3-32b") for n, rows in STEPS],
        "shipped": [_profile(path.stem) for path in sorted(HARDWARE.glob("*.toml"))],
        "bounds": bounds,
        "capacities": [
            {"overlap": key[0], **msgspec.to_builtins(c)} for key, c in zip(at, capacities, strict=True)
        ],
    }


def _cell(overlap: float, policy: str, rate: float, quick: bool) -> Cell:
    scenario = scenario_of(MAIN, rate)
    brief = (8.0, 8.0, 15.0) if quick else (200.0 / rate, 20.0, 40.0)
    return Cell(
        msgspec.structs.replace(scenario.brief(*brief), overlap=overlap), policy, grain=0.2 if quick else 0.06
    )


def _bounds(overlap: float, rate: float) -> Data:
    """The fluid bounds: devices of a perfect scheduler, with drafts and without."""
    scenario = msgspec.structs.replace(scenario_of(MAIN, rate), overlap=overlap)
    ours, central = bound(scenario).devices, bound(scenario, central=True).devices
    return {"overlap": overlap, "rate": rate, "wisp": ours, "central": central}


def _steps(name: str, sequences: int, rows: int) -> Data:
    n = sequences * rows
    load = Load(n, n * CONTEXT, sequences * CONTEXT, sequences)
    profile = hardware(name)
    overlaps = sorted({BEFORE, *(profile.overlap_measured or ())})
    ms = {f"{p:g}": msgspec.structs.replace(profile, overlap=p).step_ms(load) for p in overlaps}
    return {"profile": name, "sequences": sequences, "rows": rows, "ms": ms}


def _profile(name: str) -> Data:
    profile = hardware(name)
    return {
        "name": name,
        "overlap": profile.overlap,
        "measured": profile.overlap_measured,
        "source": profile.overlap_source.partition(": docs/")[0],
    }


# --- the page


def figures(data: Data) -> Data:
    """The tables of the page."""
    return {
        "fits": _fits(data),
        "balanced": _balanced(data),
        "profiles": table(
            ("profile", "p", "likeliest", "range", "source"),
            (
                (
                    f"`{p['name']}`",
                    f"{p['overlap']:g}",
                    f"{p['measured'][1]:g}",
                    _span(p["measured"][0], p["measured"][2]),
                    p["source"],
                )
                for p in data["shipped"]
            ),
        ),
        "steps": table(
            ("profile", "sequences x rows", "step in ms, by p"),
            (
                (
                    s["profile"],
                    f"{s['sequences']} x {s['rows']}",
                    ", ".join(f"{p}: {ms:.1f}" for p, ms in s["ms"].items()),
                )
                for s in data["step_times"]
            ),
        ),
        "headline": _headline(data),
        "fluid": _fluid(data),
        "found": _found(data),
        "profiles_of_main": _said(data),
        "context": CONTEXT,
        "source": SOURCE,
        "tensorrt_llm": TENSORRT_LLM,
    }


def _fits(data: Data) -> str:
    head = (
        "model",
        "GPUs",
        "share of arithmetic",
        "p",
        "p nearly as good",
        "error",
        "error at 1.3",
        "bandwidth",
    )
    rows = (
        (
            f["model"],
            str(f["gpus"]),
            f"{f['share']:.2f}",
            f"{f['p']:g}",
            _span(f["low"], f["high"]),
            f"{f['error']:.1%}",
            f"{f['error_before']:.1%}",
            f"{f['bandwidth']:.2f}",
            f"{f['launch_ms']:.1f}",
        )
        for f in data["published"]
    )
    return table((*head, "launch ms"), rows)


def _balanced(data: Data) -> str:
    head = ("model", "device", "batch", "share of arithmetic", "step ms", "memory ms", "arithmetic ms", "p")
    rows = (
        (
            b["model"],
            b["device"],
            str(b["batch"]),
            f"{b['share']:.2f}",
            *(f"{b[part]:.1f}" for part in ("step_ms", "memory_ms", "compute_ms")),
            "any" if b["p"] is None else f"{b['p']:.2f}",
        )
        for b in data["large_batches"]
    )
    return table(head, rows)


def _span(low: float, high: float | None) -> str:
    return f"{low:g} and more" if high is None else f"{low:g} to {high:g}"


def _by(data: Data) -> dict[tuple[float, str, float], Capacity]:
    return {(c["overlap"], c["system"], c["rate"]): msgspec.convert(c, Capacity) for c in data["capacities"]}


def _overlaps(data: Data) -> list[float]:
    return sorted({c["overlap"] for c in data["capacities"]})


def _rates(data: Data) -> list[float]:
    return sorted({c["rate"] for c in data["capacities"]})


def _headline(data: Data) -> str:
    """Rows by overlap, columns by rate: devices of both, and how many times as many."""
    by = _by(data)
    rows = []
    for p in _overlaps(data):
        cells = []
        for rate in _rates(data):
            ours, central = by[p, "wisp", rate].capacity, by[p, "central", rate].capacity
            cells.append(f"{ours} / {central}: **{ratio(ours, central)}**")
        rows.append((f"{p:g}", *cells))
    return table(("p", *(f"{rate:g} tok/s" for rate in _rates(data))), rows)


def _fluid(data: Data) -> str:
    by = {(b["overlap"], b["rate"]): b for b in data["bounds"]}
    rates = sorted({b["rate"] for b in data["bounds"]})
    rows = []
    for p in sorted({b["overlap"] for b in data["bounds"]}):
        at = [by[p, rate] for rate in rates]
        cells = (f"{b['wisp']:.0f} / {b['central']:.0f}: {ratio(b['wisp'], b['central'])}" for b in at)
        rows.append((f"{p:g}", *cells))
    return table(("p", *(f"{rate:g} tok/s" for rate in rates)), rows)


def _said(data: Data) -> str:
    """What the profile says of its own overlap."""
    of = next(p for p in data["shipped"] if p["name"] == MAIN)
    least, likeliest, most = of["measured"]
    allowed = f"{_span(least, most)}, and {likeliest:g} is likeliest"
    return f"Measurements allow {allowed}: the profile has p = {of['overlap']:g}. It had {BEFORE:g}."


def _found(data: Data) -> str:
    """What was found in each cell, and the bound beside it."""
    head = ("tokens/s", "p", "system", "devices", "goodput", "bound: share")
    rows = (
        (
            f"{c.rate:g}",
            f"{p:g}",
            c.variant,
            f"{c.capacity} ({c.low}–{c.high})",
            f"{c.goodput:.0f}",
            of_bound(c),
        )
        for (p, _, _), c in sorted(_by(data).items(), key=lambda item: (item[0][2], item[0][0]))
    )
    return table(head, rows)


def draw(data: Data, path: Path) -> None:
    """How many times as many devices, by overlap, a line for each rate: found, and of the fluid bounds (dotted)."""
    by, overlaps = _by(data), _overlaps(data)
    with picture(path, figsize=(7, 4)) as axis:
        for i, rate in enumerate(sorted({b["rate"] for b in data["bounds"]})):
            at = sorted((b for b in data["bounds"] if b["rate"] == rate), key=lambda b: float(b["overlap"]))
            limits = [b["wisp"] / b["central"] for b in at]
            axis.plot(
                [b["overlap"] for b in at], limits, color=f"C{i}", ls=":", label=f"{rate:g} tok/s, bounds"
            )
            if rate in _rates(data):
                found = [
                    by[p, "wisp", rate].capacity / max(by[p, "central", rate].capacity, 1) for p in overlaps
                ]
                axis.plot(overlaps, found, color=f"C{i}", marker="o", label=f"{rate:g} tok/s")
        axis.axhline(1.0, color="k", lw=0.8, ls=":")
        axis.set_xlabel("overlap p of the hardware profile")
        axis.set_ylabel("devices, wisp over central")
        axis.legend()
