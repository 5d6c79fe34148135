"""A worker: what steps without constraints cost, by whatever wisp is first on the path.

A script that uses what all versions have (`benchmarks.constraints_before` starts it). For each line that it
reads it does some work and prints CPU milliseconds as JSON. `step`: one of a server with 64 sessions on a null
engine, each with a draft of four, half of which sample: nothing but wisp's own work is in it. `rule`: four rows
of 152,000 logits, each chosen from in another way.
"""

from __future__ import annotations

import gc
import json
import sys
import time

import numpy as np

from wisp.core.protocol.messages import Draft, Open
from wisp.core.protocol.sampling import Sampling, target_token
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import Limits, Received, Run, StepDone, Tick
from wisp.core.verify.verifier import Verifier
from wisp.engines.null import NullTarget, null_token

SESSIONS, ROWS = 64, 4
STEPS, LIFE = 10, 80  # of a turn, and of the sessions
SAMPLINGS = (Sampling(), Sampling(0.7, seed=1), Sampling(0.7, top_p=0.9, seed=1), Sampling(1.0, 40, seed=2))


class Server:
    """A verifier with its engine, and devices that always draft well."""

    def __init__(self) -> None:
        self._engine = NullTarget(slots=SESSIONS, slot_tokens=4096)
        info = self._engine.info
        limits = Limits(
            info.n_vocab,
            info.eos,
            info.slots,
            info.slot_tokens,
            info.kv_tokens,
            info.step_tokens,
            digest=info.digest,
        )
        self._verifier = Verifier(limits, batching_policy("continuous"), Admission(1000))
        self._now = 0.0
        self._round = 0
        for i in range(SESSIONS):
            sampling = Sampling(0.7 * (i % 2), seed=i)
            message = Open(f"session-{i}", 0, [1, 2, 3], sampling, 4000, digest=info.digest)
            self._verifier.handle(0.0, Received(1, "", message))

    def step(self) -> None:
        """A step, its verdicts, and the next drafts."""
        verifier = self._verifier
        run = next(a for a in verifier.handle(self._now, Tick()) if isinstance(a, Run))
        results = self._engine.run(run.slices)
        self._now += 0.02
        self._round += 1
        verifier.handle(self._now, StepDone(results, 20.0))
        for i in range(SESSIONS):
            said = verifier.sessions[i + 1].n_committed
            draft = [null_token(i, said + k) for k in range(4)]
            verifier.handle(self._now, Received(1, "", Draft(f"session-{i}", self._round, said, draft)))


def main() -> None:
    """Work for each line of the standard input, to its end."""
    rng = np.random.default_rng(0)
    rows = (2 * rng.standard_normal((ROWS, 152_000))).astype(np.float32)
    gc.disable()
    server, steps = Server(), 0
    for _ in sys.stdin:
        if steps % LIFE == 0:  # so that every turn is about sessions as old as in the other version
            server = Server()
            server.step()  # their prompts
            gc.collect()
        started = time.thread_time()
        for _ in range(STEPS):
            server.step()
        stepped = time.thread_time()
        for position in range(STEPS // 5):
            for row, sampling in zip(rows, SAMPLINGS, strict=True):
                target_token(row, sampling, position)
        ruled = time.thread_time()
        steps += STEPS
        costs = {"step": (stepped - started) / STEPS, "rule": (ruled - stepped) / (STEPS // 5)}
        print(json.dumps({name: 1e3 * s for name, s in costs.items()}), flush=True)


if __name__ == "__main__":
    main()
