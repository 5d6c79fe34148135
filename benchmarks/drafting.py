"""`make bench-drafting`: a replay of all drafting policies, as a page with its data and a picture of one generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages import Data, render, table, write_data
from wisp.calibrate.traces.format import Trace
from wisp.core.draft.predictor import Predictor
from wisp.sim.devices import Device, Link
from wisp.sim.plots import ACCEPTED, OWN, REJECTED, WASTED, pyplot
from wisp.sim.replay import Bench, Round
from wisp.sim.replay_grid import FIXED, SERVERS, Study, Variant, in_words, show

SHOWN = ("fixed:4", "fixed:8", "confidence:0.4", "predictor", "gain")
FIRST_TOKENS = 48


def run_drafting(
    traces: Path, predictor: Path | None, *, price: float, limit: int, out: Path | None, as_json: bool
) -> None:
    """Replay and print; with `out`, write the page into that folder. Raises ConfigError."""
    if out is not None:
        pyplot()  # is it there at all?
    study = Study.load(traces, (), predictor, limit)
    result = study.run(price)
    if out is not None:
        write_page(result, study, out)
    print(json.dumps(result)) if as_json else show(result)


def write_page(result: dict[str, Any], study: Study, out: Path) -> None:
    """Write drafting.md, drafting.json and drafting.png into the folder `out`."""
    result = write_data(out / "drafting.json", result)
    shown = {v.label: v for v in study.variants if v.label in SHOWN}
    trace = min(study.traces, key=lambda t: abs(float(t.accepted.mean()) - 0.82))
    bench = Bench(Device("68", 68.0), Link(20.0), SERVERS[1])
    draw_generation(shown, trace, bench, study.predictor, out / "drafting.png")
    (out / "drafting.md").write_text(render("drafting", result, figures(result)))


def figures(result: Data) -> Data:
    labels = [label for label in result["cells"][0]["policies"] if label not in FIXED]
    speeds = []
    for cell in result["cells"]:
        of = cell["policies"]
        best = max(FIXED, key=lambda name: of[name]["tokens_per_s"])
        row = [f"{cell['device_tokens_per_s']:g}", f"{cell['rtt_ms']:g}", cell["server"]]
        row.append(f"{of[best]['tokens_per_s']:.1f} ({best.removeprefix('fixed:')})")
        speeds.append(
            row + [f"{of[n]['tokens_per_s']:.1f} ({of[n]['wasted_ms_per_token']:.1f})" for n in labels]
        )
    sent = result["high_price"]
    return {
        "in_short": list(in_words(result["summary"])),
        "sent": table(list(sent), [[f"{v:.2f}" for v in sent.values()]]),
        "speeds": table(("device", "RTT", "verifier", "best fixed", *labels), speeds),
    }


def draw_generation(
    variants: dict[str, Variant], trace: Trace, bench: Bench, predictor: Predictor, path: Path
) -> None:
    """One lane a policy: above what was committed, below what was drafted in vain."""
    plt = pyplot()
    figure, axes = plt.subplots(len(variants), 1, figsize=(11, 1.05 * len(variants) + 0.9), sharex=True)
    for axis, (label, variant) in zip(axes, variants.items(), strict=True):
        tally = variant.run([trace], bench, predictor)
        _lane(axis, tally.rounds)
        axis.set_title(
            f"{label}: {tally.tokens_per_s:.1f} tokens/s, {tally.wasted_ms / tally.tokens:.1f} ms wasted a token",
            loc="left",
            fontsize=9,
        )
    axes[-1].set_xlabel(
        "position in the text (tokens); a gap in the lower row is where a policy stopped in time"
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (ACCEPTED, OWN, REJECTED, WASTED)]
    names = ["draft, accepted", "the target's own", "draft, first rejected", "draft, wasted beyond it"]
    figure.legend(handles, names, ncol=4, loc="upper center", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lane(axis: Any, rounds: list[Round]) -> None:
    for round_ in rounds:
        for i in range(round_.drafted):
            at = round_.base + i
            if i < round_.accepted:
                _cell(axis, at, 1, ACCEPTED)
            else:
                _cell(axis, at, 0, REJECTED if i == round_.accepted else WASTED)
        _cell(axis, round_.base + round_.accepted, 1, OWN)
        axis.axvline(round_.base, color="black", lw=0.6, alpha=0.5)
    axis.set_xlim(0, FIRST_TOKENS)
    axis.set_ylim(0, 2)
    axis.set_yticks([])


def _cell(axis: Any, x: int, row: int, colour: str) -> None:
    axis.add_patch(pyplot().Rectangle((x + 0.05, row + 0.1), 0.9, 0.8, color=colour))
