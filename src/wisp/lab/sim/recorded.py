"""Devices whose verifier has a real model: they ask what was recorded of it, and know what it has to say.

A text is a function of target, prompt, sampling and seed. So what `wisp trace` recorded of a target alone is what a
verifier of it must say to the same prompt, whatever drafts, replicas and crashes there are between; and a trace has
the drafter's proposals and signals, too. Only greedy traces are used, each as often as it is drawn.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from wisp.core.errors import ConfigError
from wisp.core.messages import Welcome
from wisp.engines.build import read_predictor
from wisp.lab.sim.figures import Watched
from wisp.lab.sim.scenario import SloClass
from wisp.lab.sim.scripts import Library, Script, Scripts
from wisp.lab.sim.simulate import Fleet
from wisp.lab.sim.world import Handset, Request
from wisp.lab.traces.format import TraceSet, trace_folder


class Recorded(Scripts):
    """Scripts that are whole traces, each with the prompt that it answers."""

    def __init__(self, traces: TraceSet) -> None:
        """Raises ConfigError where there is no greedy trace."""
        self.traces = traces.select(label="greedy").traces
        if not self.traces:
            raise ConfigError("a real model is held against greedy traces, and there are none; record some")
        super().__init__(Library(self.traces, read_predictor()))
        ends = itertools.accumulate(map(len, self.traces), initial=0)
        self._scripts = [
            Script(self.library, list(range(first, after - 1)), after - 1)
            for first, after in itertools.pairwise(ends)
        ]

    def script(self, seed: int) -> Script:
        """The trace that a seed stands for."""
        return self._scripts[seed % len(self._scripts)]

    def prompt(self, seed: int) -> list[int]:
        """What it is an answer to."""
        return [int(token) for token in self.traces[seed % len(self.traces)].prompt]


class Asking(Fleet):
    """A fleet that asks what the traces ask."""

    handset = Watched
    scripts: Recorded

    def _request(self, handset: Handset, slo: SloClass, n_prompt: int, source: random.Random) -> None:
        seed = source.getrandbits(32)
        most = len(self.scripts.script(seed))
        request = Request(seed, self.scripts.prompt(seed), slo.slo, handset.index, self.env.now, most)
        self.requests.append(request)
        handset.start(request)


def recorded_of(welcome: Welcome, folder: Path) -> Recorded:
    """What was recorded of the model that a verifier serves. Raises ConfigError if that is another."""
    traces = TraceSet.load(trace_folder(folder))
    for header in traces.headers:
        of, vocabulary = header["target"]["name"], header["vocabulary"]
        if (of, vocabulary) != (welcome.model, welcome.fingerprint):
            raise ConfigError(
                f"{folder} was recorded of {of}, and the verifier serves {welcome.model} with {welcome.engine}; "
                "record traces of its own with `wisp trace`, or start it with --engine emulated"
            )
    return Recorded(traces)
