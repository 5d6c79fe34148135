"""The paper's results (arXiv 2601.11652), and the two throughput caps that describe its baselines.

Devices times rate is nearly constant in its rows for centralised serving and for SLED: what each carries is a number of
tokens per second, whatever the rate. `CAPS` are fitted to those rows alone (geometric mean at 4, 6 and 8 tokens/s; at
2 the centralised server runs into another limit, 97 sessions). Where only goodput was published, the cap is goodput,
with which it agrees within 3 % where both were. The row of WISP is used for nothing but comparison.
"""

from __future__ import annotations

from typing import NamedTuple

from wisp.core.errors import ConfigError


class PaperRow(NamedTuple):
    """Capacity at 2, 4, 6 and 8 tokens/s (empty: not published), and goodput in tokens/s."""

    capacity: tuple[int, ...]
    goodput: float


RATES = (2.0, 4.0, 6.0, 8.0)
PAPER: dict[str, dict[str, PaperRow]] = {
    "a100-qwen3-32b": {
        "paper": PaperRow((164, 142, 103, 86), 631.86),
        "central": PaperRow((97, 80, 54, 41), 326.12),
        "sled": PaperRow((83, 42, 27, 21), 170.82),
    },
    "a100-qwen3-14b": {
        "paper": PaperRow((), 1044.92),
        "central": PaperRow((), 552.34),
        "sled": PaperRow((), 276.38),
    },
    "a100-llama-70b-w4": {
        "paper": PaperRow((), 348.40),
        "central": PaperRow((), 191.52),
        "sled": PaperRow((), 103.25),
    },
}


def cap(hardware: str, system: str) -> float:
    """Tokens per second that the paper's `system` ("central" or "sled") carries, whatever the profile's overlap. Raises
    ConfigError."""
    hardware = hardware.partition("@")[0]
    if hardware not in PAPER:
        raise ConfigError(f"the paper has no row for {hardware}; it has {', '.join(PAPER)}")
    row = PAPER[hardware][system]
    if not row.capacity:
        return row.goodput
    product = 1.0
    for n, rate in zip(row.capacity[1:], RATES[1:], strict=True):
        product *= n * rate
    return float(product ** (1 / (len(RATES) - 1)))


def paper_capacity(hardware: str, system: str, rate: float) -> int:
    """Devices at `rate` by the cap; never more than the sessions that the centralised rows stop at."""
    row = PAPER.get(hardware.partition("@")[0], {}).get("central")
    devices = cap(hardware, system) / rate
    if system == "central" and row is not None and row.capacity:
        devices = min(devices, row.capacity[0])
    return int(devices)
