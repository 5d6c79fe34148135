"""The systems that are compared: the drafting of devices, the batching and the admission of the server."""

from __future__ import annotations

import msgspec

from wisp.core.errors import ConfigError


class System(msgspec.Struct, frozen=True):
    """drafting: a drafting policy, or "" for devices that never draft; beside: the drafter runs beside the target;
    branches: devices that draft ahead do so for other outcomes, too;
    slots: sessions whose KV the server holds at once (0: as many as the hardware profile says); others wait;
    step_tokens: most tokens of a step, chunks of prompts included (0: the profile's)."""

    name: str
    drafting: str = ""
    batching: str = "continuous"
    ahead: bool = False
    server_mode: bool = False
    admission: bool = False
    beside: bool = False
    slots: int = 0
    step_tokens: int = 0
    depth: int = 1
    branches: bool = True
    about: str = ""


PAPER_MODELS = {"central-paper": "central", "sled-paper": "sled"}  # caps on throughput: see `paper`
YES_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
OLD_NAMES = {"ours": "wisp"}  # for one release
NUMBERS = {"slots": "sessions", "step_tokens": "tokens", "depth": "steps"}
CHANGEABLE = (
    "drafting",
    "batching",
    "ahead",
    "branches",
    "server_mode",
    "admission",
    "beside",
    "slots",
    "step_tokens",
    "depth",
)
SYSTEMS = {
    s.name: s
    for s in (
        System("central", about="continuous batching with chunked prefill; no drafts"),
        System("central-wisp", "", "wisp", admission=True, about="wisp batching and admission; no drafts"),
        System("sled", "fixed:4", "fcfs", about="SLED: fixed drafts, first come first served"),
        System("sled-confidence", "confidence:0.4", "fcfs", about="SLED's other reading: drafts by confidence"),
        System("paper", "predictor", "paper", about="the paper's: predictor, cost model, its scheduler"),
        System("wisp", "gain", "wisp", True, True, True, about="gain, drafting ahead, wisp batching, server mode"),
        System("central-speculative", "fixed:3", "continuous", beside=True, about="a 0.6B drafter on the same GPU"),
    )
}  # fmt: skip


def system(spec: str) -> System:
    """A system by name, with changes: "wisp,batching=continuous,ahead=no". Raises ConfigError."""
    name, *changes = spec.split(",")
    name = OLD_NAMES.get(name, name)
    if name in PAPER_MODELS:
        raise ConfigError(
            f"{name}: a figure of the paper, nothing that runs; see `wisp sim capacity --policy {name}`"
        )
    if name not in SYSTEMS:
        raise ConfigError(f"unknown system {name!r}; choose one of {', '.join(SYSTEMS)}")
    found = SYSTEMS[name]
    for change in changes:
        key, _, value = change.partition("=")
        if key not in CHANGEABLE:
            raise ConfigError(f"a system has no {key!r}; change {', '.join(CHANGEABLE)}")
        typed: str | bool | int = value
        if key in NUMBERS:
            if not value.isdecimal():
                raise ConfigError(f"{change}: give a number of {NUMBERS[key]}")
            typed = int(value)
            if key == "depth" and typed not in (1, 2):
                raise ConfigError(f"{change}: a verifier has 1 or 2 steps in flight")
        elif key not in ("drafting", "batching"):
            if value not in YES_NO:
                raise ConfigError(f"{change}: give {key}=yes or {key}=no")
            typed = YES_NO[value]
        found = msgspec.structs.replace(found, **{key: typed, "name": ",".join((name, *changes))})
    return found
