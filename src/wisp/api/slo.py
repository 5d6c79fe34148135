"""The headers that state a request's SLO."""

from __future__ import annotations

from collections.abc import Mapping

from wisp.api.fields import refuse
from wisp.core.protocol.slo import LONGEST_MS, Slo

SloClasses = Mapping[str, Slo]
NO_CLASSES: SloClasses = {}


def parse_slo(headers: Mapping[str, str], classes: SloClasses = NO_CLASSES) -> Slo | None:
    """Targets from `x-slo-ttft-ms` and `x-slo-tpot-ms`, and where these say nothing from the class that `x-slo-class`
    names; None where none is given."""
    ttft, tpot = (_target_ms(headers, name) for name in ("x-slo-ttft-ms", "x-slo-tpot-ms"))
    if name := headers.get("x-slo-class"):
        if name not in classes:
            known = (
                f"; this server has {', '.join(sorted(classes))}"
                if classes
                else "; this server has none: start it with --slo-classes FILE"
            )
            refuse("x-slo-class", f"no such SLO class{known}")
        ttft, tpot = ttft or classes[name].ttft_ms, tpot or classes[name].tpot_ms
    return Slo(ttft, tpot) if ttft or tpot else None


def _target_ms(headers: Mapping[str, str], name: str) -> float:
    text = headers.get(name)
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= LONGEST_MS:  # also false for nan
        refuse(name, f"expected milliseconds, more than 0 and at most {LONGEST_MS:.0e}")
    return value
