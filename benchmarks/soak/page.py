"""The tables of docs/results/soak.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from benchmarks.pages import Data, table

MB_PER_10K = 1.0  # that memory may grow by, per 10^4 sessions after warm-up
LATE_MS = 100.0  # a load whose clients were later than that says more of the machine than of the verifiers
SHARE = 0.9  # least attainment of the admitted; least goodput, of that at 1x


def figures(data: Data) -> Data:
    """Tables, and the sums over all phases."""
    phases = data["phases"]
    by_name = {p["phase"]: p for p in phases}
    total = {
        name: sum(p[name] for p in phases)
        for name in ("lost", "doubled", "wrong", "left", "cut", "reconnects", "tokens")
    }
    faults = sum((Counter(p["faults"]) for p in phases), Counter[str]())
    loads = by_name["overload"]["cells"] if "overload" in by_name else []
    return {
        "sessions": sum(sum(p["sessions"].values()) for p in phases),
        "total": total,
        "n_faults": faults.total(),
        "faults": table(("fault", "times"), ([k, f"{n:,}"] for k, n in sorted(faults.items()))),
        "by_phase": table(PHASE_HEAD, map(_phase, phases)),
        "memory": table(MEMORY_HEAD, _memory(by_name["steady"])) if "steady" in by_name else "",
        "health": table(HEALTH_HEAD, _health(phases)),
        "loads": table(LOAD_HEAD, _loads(loads)) if loads else "",
        "findings": [f"{p['phase']}: {what}" for p in phases for what in p["findings"]],
        "complaints": [f"{p['phase']}: {what}" for p in phases for what in p["complaints"]],
        "one_per_s": by_name["overload"]["one_per_s"] if loads else 0.0,
    }


PHASE_HEAD = (
    "phase", "sessions", "at router / edge / devices", "left", "cut, asked again", "refused", "lost", "doubled",
    "wrong", "ms of CPU a session", "s", "load average", "date, seed",
)  # fmt: skip
MEMORY_HEAD = (
    "process", "sessions of all", "MB at first", "at last", "MB per 10^4 sessions", "descriptors at first", "at last",
)  # fmt: skip
HEALTH_HEAD = ("phase", "process", "looks", "p50 ms", "p99 ms", "longest ms", "nobody listened", "no answer")
LOAD_HEAD = (
    "load", "of 1x", "came", "admitted", "in time, of the admitted", "late: first token / pace", "goodput, tokens/s",
    "of 1x", "TTFT p99 ms", "TPOT p99 ms", "clients late, p99 ms",
)  # fmt: skip


def _phase(p: Data) -> tuple[str, ...]:
    sessions = sum(p["sessions"].values())
    shares = " / ".join(f"{p['sessions'].get(name, 0):,}" for name in ("router", "edge", "device"))
    cpu_ms = sum(life["cpu_s"] for life in p["lives"]) * 1e3 / max(1, sessions)
    refused = sum(p["refused"].values())
    counts = (p["left"], p["cut"], refused, p["lost"], p["doubled"], p["wrong"])
    return (
        p["phase"],
        f"{sessions:,}",
        shares,
        *(f"{n:,}" for n in counts),
        f"{cpu_ms:.1f}",
        f"{p['wall_s']:.0f}",
        f"{p['load_average']:g}",
        f"{p['date']}, {p['seed']}",
    )


def _memory(p: Data) -> Iterator[tuple[str, ...]]:
    for life in p["lives"]:
        slope = life["mb_per_10k"]
        verdict = "" if slope is None else f"{slope:+.2f}" + " (**missed**)" * (slope >= MB_PER_10K)
        first, last = life["files"]
        mb = (f"{life[name]:.1f}" for name in ("first_mb", "last_mb"))
        yield (life["process"], f"{life['sessions']:,}", *mb, verdict, str(first), str(last))


def _health(phases: list[Data]) -> Iterator[tuple[str, ...]]:
    for p in phases:
        for name, seen in p["health"].items():
            ms = (f"{seen[what]:.1f}" for what in ("p50_ms", "p99_ms", "longest_ms"))
            yield (p["phase"], name, f"{seen['looks']:,}", *ms, f"{seen['refused']:,}", f"{seen['failed']:,}")


def _loads(cells: list[Data]) -> Iterator[tuple[str, ...]]:
    base = next(c["goodput"] for c in cells if c["offered"] == 1.0)
    for c in cells:
        share = c["goodput"] / base
        part = c["load"].startswith("of these")  # of a load that stands above
        yield (
            c["load"],
            f"{c['offered']:g}",
            f"{c['arrived']:,}",
            f"{c['admitted']:,}",
            f"{c['attainment']:.1%}" + " (**missed**)" * (c["attainment"] < SHARE),
            f"{c['late_first']} / {c['late_after']}",
            f"{c['goodput']:.0f}",
            f"{share:.0%}" + " (**missed**)" * (share < SHARE and not part),
            f"{c['ttft_p99_ms']:.0f}",
            f"{c['tpot_p99_ms']:.0f}",
            f"{c['late_p99_ms']:.0f}" + " (**not valid**)" * (c["late_p99_ms"] > LATE_MS),
        )
