"""Prints what requests without constraints cost, by whatever wisp is on the path: median CPU milliseconds.

A script, run with the source of one version or another: it uses what all of them have. `step`: of a server with 64
sessions on a null engine, each with a draft of four, half of which sample: nothing but wisp's own work is in it.
`rule`: four rows of 152,000 logits, each chosen from in another way.
"""

from __future__ import annotations

import gc
import json
import statistics
import time

import numpy as np

from wisp.core.protocol.messages import Draft, Open
from wisp.core.protocol.sampling import Sampling, target_token
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import Limits, Received, Run, StepDone, Tick
from wisp.core.verify.verifier import Verifier
from wisp.engines.null import NullTarget, null_token

SESSIONS, STEPS, ROWS = 64, 300, 4


def main() -> None:
    """Measure and print."""
    engine = NullTarget(slots=SESSIONS, slot_tokens=4096)
    info = engine.info
    limits = Limits(
        info.n_vocab,
        info.eos,
        info.slots,
        info.slot_tokens,
        info.kv_tokens,
        info.step_tokens,
        digest=info.digest,
    )
    verifier = Verifier(limits, batching_policy("continuous"), Admission(1000))
    for i in range(SESSIONS):
        sampling = Sampling(0.7 * (i % 2), seed=i)
        message = Open(f"session-{i}", 0, [1, 2, 3], sampling, 4000, digest=info.digest)
        verifier.handle(0.0, Received(1, "", message))
    rng = np.random.default_rng(0)
    rows = (2 * rng.standard_normal((ROWS, 152_000))).astype(np.float32)
    samplings = [
        Sampling(),
        Sampling(0.7, seed=1),
        Sampling(0.7, top_p=0.9, seed=1),
        Sampling(1.0, 40, seed=2),
    ]
    said = dict.fromkeys(range(SESSIONS), 0)
    steps: list[float] = []
    rules: list[float] = []
    now = 0.0
    gc.disable()
    for step in range(STEPS):
        started = time.thread_time()
        run = next(a for a in verifier.handle(now, Tick()) if isinstance(a, Run))
        results = engine.run(run.slices)
        now += 0.02
        verifier.handle(now, StepDone(results, 20.0))
        for i in range(SESSIONS):
            said[i] = verifier.sessions[i + 1].n_committed
            draft = [null_token(i, said[i] + k) for k in range(4)]
            verifier.handle(now, Received(1, "", Draft(f"session-{i}", step + 1, said[i], draft)))
        ended = time.thread_time()
        for row, sampling in zip(rows, samplings, strict=True):
            target_token(row, sampling, step)
        steps.append((ended - started) * 1e3)
        rules.append((time.thread_time() - ended) * 1e3)
    print(json.dumps({"step": statistics.median(steps), "rule": statistics.median(rules)}))


if __name__ == "__main__":
    main()
