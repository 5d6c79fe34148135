"""The phases of a soak, one after the other, and their report."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import os
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from benchmarks.pages import Data, render, write_data
from benchmarks.soak.faults import DEATHS, KINDS, Trouble, schedule
from benchmarks.soak.measure import Watch
from benchmarks.soak.overload import Cell, hardware, overload, profile
from benchmarks.soak.page import figures
from benchmarks.soak.parties import Device, Tally, Work, customer
from benchmarks.soak.stack import LOOK_S, Stack, a_key
from benchmarks.soak.texts import Job, Jobs, hashed
from wisp import __version__
from wisp.children import Children, serving
from wisp.core.errors import ConfigError

PHASES = ("steady", "faults", "pair", "overload")
SHARES = {"steady": 0.6, "faults": 0.39, "pair": 0.01}  # of the sessions
FEWEST = {"steady": 100, "faults": 200, "pair": 60}
ROUND = 4_000  # sessions of a phase with faults for each round of all kinds
CUSTOMERS = {"router": 32, "edge": 16}
DEVICES, SESSIONS = 6, 4  # emulated devices, and sessions of each at a time
STEP_MS, SLICE_MS, SLOTS, KV_TOKENS = 4.0, 0.02, 64, 16_384
CONTEXT = 4096
LOAD_S, QUICK_LOAD_S = 60.0, 12.0  # of each load
PAIR_PROMPTS = 40
PAIR_TOKENS = 16


class Soak:
    """One run. `quick`: shorter loads, and a smaller crowd."""

    def __init__(self, sessions: int, minutes: float, seed: int, *, quick: bool) -> None:
        self.sessions = sessions
        self.until = time.monotonic() + minutes * 60 if minutes else float("inf")
        self.seed = seed
        self.quick = quick
        self.out = Console(stderr=True)

    def count(self, phase: str) -> int:
        return max(FEWEST[phase], int(self.sessions * SHARES[phase]))

    async def phase(self, name: str, children: Children) -> Data:
        """Run it from the start of its processes to their end. Raises ChildError."""
        chance = random.Random(f"{self.seed}/{name}")
        jobs: Jobs = hashed
        if name == "pair":
            texts = await asyncio.to_thread(tiny_texts, self.seed)
            jobs = lambda chance, tokens: chance.choice(texts)  # noqa: E731
        stack = Stack(children, name, *self._flags(name, children.folder))
        tally = Tally()
        began = time.monotonic()
        await stack.start()
        watch = Watch(stack, tally)
        cells: list[Cell] = []
        one = 0.0
        async with watch:
            if name == "overload":
                one, cells = await overload(
                    stack.router, jobs, tally, chance, QUICK_LOAD_S if self.quick else LOAD_S
                )
            else:
                await self._sessions(name, stack, jobs, tally, chance)
        left = await stack.empty()
        for what, value in left.items():
            tally.find(f"left behind: {what} is {value:g}")
        for process in ("edge", "router"):
            if (status := await stack.terminate(process)) != 0:
                tally.find(f"the {process} ended with {status}")
        return {
            "phase": name,
            "date": datetime.date.today().isoformat(),
            "seed": self.seed,
            "load_average": round(os.getloadavg()[1], 1),
            "wall_s": round(time.monotonic() - began, 1),
            **msgspec.to_builtins(tally),
            "complaints": stack.complaints(),
            "left_behind": left,
            "health": watch.health,
            "lives": [_life(x) for x in watch.lives],
            "one_per_s": one,
            "cells": msgspec.to_builtins(cells),
        }

    def _flags(self, name: str, folder: Path) -> tuple[list[str], list[str]]:
        if name == "pair":
            serve = ["--target", "tiny-target", "--threads", "1", "--slots", "8", "--context", "512"]
            return serve, ["--draft", "tiny-draft", "--drafting", "fixed:4", "--threads", "1"]
        path = folder / f"{name}.toml"
        if name == "overload":
            profile(path)
        else:
            path.write_text(hardware(STEP_MS, SLICE_MS, SLOTS, KV_TOKENS))
        serve = ["--target", str(path), "--engine", "emulated", "--context", str(CONTEXT)]
        return serve, ["--draft", "ngram", "--drafting", "fixed:4"]

    async def _sessions(
        self, name: str, stack: Stack, jobs: Jobs, tally: Tally, chance: random.Random
    ) -> None:
        """All sessions of a phase, and its faults beside them."""
        work = Work(self.count(name), jobs, tally, self.until)
        sources = [random.Random(chance.getrandbits(64)) for _ in range(sum(CUSTOMERS.values()) + DEVICES)]
        doors = [stack.router] * CUSTOMERS["router"] + [stack.edge] * CUSTOMERS["edge"]
        parties = [customer(door, work, sources.pop()) for door in doors]
        if name != "pair":  # whose devices are those of the edge's process
            devices = [Device(stack, a_key(chance), n) for n in range(DEVICES)]
            parties += [device.run(work, sources.pop(), SESSIONS) for device in devices]
        kinds = {"steady": (), "faults": tuple(KINDS), "pair": DEATHS}[name]
        trouble = Trouble(stack, tally, jobs, chance, 100 if self.quick else 2_000)
        await asyncio.gather(self._harm(trouble, kinds, work, self.count(name)), *parties)

    async def _harm(self, trouble: Trouble, kinds: Sequence[str], work: Work, count: int) -> None:
        """One fault after the other, evenly over the sessions. Each kind happens at least once."""
        plan = schedule(trouble.chance, max(1, count // ROUND), kinds)
        work.held = bool(plan)
        for number, kind in enumerate(plan):
            while trouble.tally.done < count * number / len(plan) and not work.over:
                await asyncio.sleep(LOOK_S)
            if work.over and number >= len(kinds):
                break
            began = time.monotonic()
            await KINDS[kind](trouble)
            trouble.tally.faults[kind] += 1
            took = f"{kind}, {time.monotonic() - began:.1f} s"
            self.out.print(f"{trouble.tally.done:,} sessions: {took}", highlight=False)
        work.held = False


def _life(life: Any) -> Data:
    slope = life.slope()
    return {
        "process": life.process,
        "sessions": life.samples[-1][0] - life.samples[0][0],
        "mb_per_10k": round(slope, 3) if slope is not None else None,
        "first_mb": life.samples[0][1],
        "last_mb": life.samples[-1][1],
        "cpu_s": life.cpu_s,
        "files": life.files,
        "samples": life.samples[:: max(1, len(life.samples) // 40)],
    }


def tiny_texts(seed: int) -> list[Job]:
    """Requests, and what the tiny target alone answers: one verifier, one request at a time, no edge."""
    chance = random.Random(f"{seed}/texts")
    words = [
        "-m",
        "wisp.cli",
        "serve",
        "--target",
        "tiny-target",
        "--threads",
        "1",
        "--slots",
        "1",
        "--context",
        "512",
    ]
    found = []

    async def ask(port: int) -> None:
        from benchmarks.soak.http import Line

        line = Line(port, "nobody")
        for number in range(PAIR_PROMPTS):
            temperature = (0.0, 0.7, 1.0)[number % 3]
            prompt = f"Tell me {number} of Tavoku and the {chance.choice(('lamp', 'river', 'house'))}."
            job = Job(prompt, number, PAIR_TOKENS, "", temperature=temperature)
            found.append(msgspec.structs.replace(job, text=(await line.complete(job)).text))
        line.close()

    with serving("verifier", lambda port, _: [*words, "--port", str(port)]) as child:
        asyncio.run(ask(int(child.url.rsplit(":", 1)[1])))
    return found


def run_soak(
    *,
    sessions: int,
    minutes: float,
    seed: int,
    phases: Sequence[str],
    quick: bool,
    out: Path | None,
    as_json: bool,
) -> bool:
    """Run and report; with `out`, write a page and its data into that folder, beside those of other phases that are
    there. False if anything is wrong. Raises ConfigError or ChildError."""
    if unknown := set(phases) - set(PHASES):
        raise ConfigError(f"no such phase: {', '.join(sorted(unknown))}; there are: {', '.join(PHASES)}")
    logging.getLogger("wisp.link").setLevel(logging.ERROR)  # connections of devices are meant to break
    soak = Soak(sessions, minutes, seed, quick=quick)
    path = out / "soak.json" if out is not None else None
    kept: list[Data] = json.loads(path.read_text())["phases"] if path is not None and path.is_file() else []
    good, data = True, Data()
    for name in phases:
        with Children() as children:
            found = asyncio.run(soak.phase(name, children))
        soak.out.print(_line(found), highlight=False)
        good = good and not (found["lost"] or found["doubled"] or found["wrong"] or found["findings"])
        kept = sorted(
            (*(p for p in kept if p["phase"] != name), found), key=lambda p: PHASES.index(p["phase"])
        )
        data = {
            "command": "python -m benchmarks soak" + " --quick" * quick,
            "date": datetime.date.today().isoformat(),
            "wisp": __version__,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "phases": kept,
        }
        if path is not None and out is not None:  # after each phase: the next takes long
            data = write_data(path, data)
            (out / "soak.md").write_text(render("soak", data, figures(data)))
    print(json.dumps(data) if as_json else render("soak", data, figures(data)))
    return good


def _line(p: Data) -> str:
    said = f"{p['phase']}: {sum(p['sessions'].values()):,} sessions in {p['wall_s']:.0f} s, "
    said += f"{p['lost']} lost, {p['doubled']} doubled, {p['wrong']} wrong, {len(p['findings'])} findings"
    return "\n  ".join([said, *p["findings"][:10]])
