"""What the tests of the vLLM engine share: the tiny target in Hugging Face's format, an engine, a view into its steps.

They run where vLLM is installed (`make test-vllm`), and are skipped elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import wisp.engines
from wisp.core.protocol.edits import Matchers
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice, SliceResult
from wisp.engines.llama.reference import reference_tokens
from wisp.engines.vllm.starting import Wanted

TINY = Path(os.environ.get("WISP_TEST_MODEL") or Path(wisp.engines.__file__).parent / "data/tiny-target.gguf")
RUNNER = os.environ.get("WISP_TEST_RUNNER", "v1")  # vLLM's
EOS = 511
GREEDY = Sampling()
BLOCK_BYTES = 5 * 2 * 2 * 32 * 4 * 32  # layers, K and V, heads, their size, float32, tokens a block

with_vllm = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("default"),  # vLLM's own
]

_reference: dict[tuple[tuple[int, ...], Sampling, int], list[int]] = {}


def reference(
    prompt: Sequence[int], sampling: Sampling, n: int, matchers: Matchers | None = None
) -> list[int]:
    """The target alone, by llama.cpp's slow decoder. `matchers`: for a grammar, the first time it is asked for."""
    key = (tuple(prompt), sampling, n)
    if key not in _reference:
        _reference[key] = reference_tokens(TINY, prompt, sampling, n, matchers=matchers)
    return _reference[key]


def folder_of_tiny(parent: Path) -> Path:
    from wisp.engines.vllm.converting import converted

    return converted(TINY, parent / "tiny-target")


_common: list[Any] = []  # the engine that most tests share, while it is there


def common_engine(folder: Path) -> Any:
    """Started with the first test that wants it (that takes seconds), and again after one had an engine of its own."""
    if not _common:
        _common.append(_started(folder))
    return _common[0]


def without_triton() -> None:
    """vLLM's CPU build refuses Model Runner V2 where Triton has no CPU backend. Our hooks use none of V2's kernels."""
    import vllm.config.vllm
    import vllm.v1.worker.gpu_worker

    for module in (vllm.config.vllm, vllm.v1.worker.gpu_worker):  # 0.32 asks in the first, 0.33 in the second
        module.HAS_TRITON = True


def close_common() -> None:
    while _common:
        _common.pop().close()


@contextmanager
def engine_of(folder: Path, **settings: Any) -> Iterator[Any]:
    """A VllmTarget of 8 slots of 256 tokens on the tiny target. The common one ends: a process has room for one."""
    close_common()
    engine = _started(folder, **settings)
    try:
        yield engine
    finally:
        engine.close()


def _started(folder: Path, **settings: Any) -> Any:
    from wisp.engines.vllm.target import VllmTarget

    if RUNNER == "v2":
        without_triton()
    settings = {"slots": 8, "slot_tokens": 256, "threads": 1, "runner": RUNNER, **settings}
    return VllmTarget(Wanted(model=str(folder), offline=True, **settings), name="tiny", eos=[EOS])


@contextmanager
def steps_of(engine: Any) -> Iterator[list[dict[str, int]]]:
    """What vLLM's workers are given while this lasts: for each step, {sequence: tokens}, in order."""
    seen: list[dict[str, int]] = []
    executor = engine.started.core.model_executor
    execute = executor.execute_model

    def watched(output: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(dict(output.num_scheduled_tokens))
        return execute(output, *args, **kwargs)

    executor.execute_model = watched
    try:
        yield seen
    finally:
        del executor.execute_model


class Device:
    """An edge without a network: it drafts well, badly or not at all, and checks nothing."""

    def __init__(
        self,
        slot: int,
        prompt: list[int],
        sampling: Sampling,
        n: int,
        rng: random.Random,
        ahead: list[int] | None = None,
    ) -> None:
        """`ahead`: what it will be told, where that is not the reference's."""
        self._ahead = ahead
        self.slot, self.prompt, self.sampling, self.n, self.rng = slot, prompt, sampling, n, rng
        self.said: list[int] = []
        self.held = 0

    @property
    def done(self) -> bool:
        return len(self.said) >= self.n

    def next(self) -> Slice:
        """What it wants next: a chunk of its prompt, a draft of some kind, or a single step."""
        chain = self.prompt + self.said
        if len(chain) - self.held > 8 and self.rng.random() < 0.7:  # a chunk, the last token left
            end = self.rng.randint(self.held + 1, len(chain) - 1)
            return Slice(self.slot, self.slot, self.held, chain[self.held : end], sample=False)
        draft, constraints = self._draft(), self.sampling.constraints
        return Slice(
            self.slot,
            self.slot,
            self.held,
            chain[self.held :] + draft,
            len(draft),
            True,
            len(self.said),
            self.sampling,
            None,
            chain if constraints is not None and constraints.repetition_penalty != 1.0 else list(self.said),
        )

    def _draft(self) -> list[int]:
        whole = self._ahead or reference(self.prompt, self.sampling, self.n + 8)
        ahead = whole[len(self.said) :][: self.rng.randint(0, 6)]
        kind = self.rng.choice(("right", "wrong", "garbage", "stale", "empty"))
        if kind == "wrong" and ahead:
            at = self.rng.randrange(len(ahead))
            ahead[at] = (ahead[at] + 1) % 512
        elif kind == "garbage":
            ahead = [self.rng.randrange(512) for _ in ahead]
        elif kind == "stale":
            ahead = self.said[-3:]
        elif kind == "empty":
            ahead = []
        return ahead

    def take(self, work: Slice, result: SliceResult) -> None:
        assert not result.error, result.error
        self.held = work.start + len(work.tokens) - work.n_draft + result.accepted
        self.said += result.tokens

    def forget(self) -> None:
        """Parked and evicted: all its KV is to be computed again."""
        self.held = 0


def prompts(n: int, rng: random.Random, longest: int = 90) -> list[list[int]]:
    """`n` prompts; some share their beginning."""
    common = [rng.randrange(256) for _ in range(40)]
    return [
        (common if rng.random() < 0.5 else [])
        + [rng.randrange(256) for _ in range(rng.randint(2, longest - 40))]
        for _ in range(n)
    ]


def drive(engine: Any, devices: list[Device], rng: random.Random, mishap: Callable[[Device], None]) -> None:
    """Random ones of them take part in each step, in random order, until all are done."""
    while going := [d for d in devices if not d.done]:
        some = rng.sample(going, rng.randint(1, len(going)))
        work = [d.next() for d in some]
        for device, slice_, result in zip(some, work, engine.run(work), strict=True):
            device.take(slice_, result)
            mishap(device)


def fleet(rng: random.Random, samplings: list[Sampling], n: int = 40) -> list[Device]:
    return [
        Device(slot, prompt, samplings[slot % len(samplings)], n, rng)
        for slot, prompt in enumerate(prompts(8, rng))
    ]


def check_all(devices: list[Device]) -> None:
    for device in devices:
        assert device.said[: device.n] == reference(device.prompt, device.sampling, device.n + 8)[: device.n]
