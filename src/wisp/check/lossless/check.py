"""The check itself: a pair of models, the cases, a fleet for each batching policy, and the report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from wisp.check.lossless.cases import (
    BATCHING,
    NUCLEUS,
    PLAIN_SAMPLING,
    CaseMaker,
    Scale,
    prompts,
    stand_in_for_eos,
)
from wisp.check.lossless.chi_square import ALARM, Fit, distribution, fit
from wisp.check.lossless.drafts import Drafts
from wisp.check.lossless.fleet import Fleet
from wisp.check.lossless.judge import Case, Finding, Judge, Outcome, Reference
from wisp.check.lossless.world import CALM
from wisp.core.errors import ModelError
from wisp.core.protocol.sampling import Sampling
from wisp.engines.base import EngineInfo, TargetEngine, Tokenizer
from wisp.engines.build import load_target, served_name
from wisp.engines.constrained_draft import ConstrainedDraft
from wisp.engines.llama.context import physical_cores
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.models import PAIRS, Progress, resolve
from wisp.engines.ngram import NgramDraft
from wisp.progress import Tell

# Situations that a run must provoke: without one of them, a check shows less than it claims.
PROMISED = (
    "eos_inside_draft",
    "stop_inside_draft",
    "length_inside_draft",
    "reconnects",
    "outlived_parking",
    "moves",
    "edges_ahead",
    "restarts",
    "failed_steps",
    "evictions",
    "prefixes_reused",
    "copies",
    "most_queued",
    "mixed_steps",
    "decoded_for_absent_edges",
    "stale_verdicts",
    "duplicates_answered",
    "overlapping_drafts",
    "refused_frames",
    "first_drafts",
    "cancelled",
    "silences",
    "certain_tokens",
    "own_draft_tokens_accepted",
    "reasoning_ended_inside_draft",
)
PROMISED_AHEAD = ("steps_ahead", "decoded_ahead")  # unless there is one step in flight at a time
ENOUGH_CASES = 200  # with fewer, chance may leave something out
LIKELY = 0.02  # first tokens at least this likely have their second token tested


class ChiSquare(msgspec.Struct, frozen=True):
    """The smallest p-value, the sessions behind all of them, and each test."""

    p: float
    samples: int
    tests: list[Fit]


class Report(msgspec.Struct):
    """The findings. `missing`: promised situations that did not come up. `trouble`: other problems."""

    pair: str
    mode: str
    seed: int
    cases: int = 0
    identical: int = 0
    ties: int = 0
    mismatches: int = 0
    tokens: int = 0
    acceptance: float = 0.0
    flip_gap: float = 0.0
    counts: dict[str, int] = {}
    by_drafter: dict[str, int] = {}
    by_constraint: dict[str, int] = {}
    chi_square: ChiSquare | None = None
    missing: list[str] = []
    trouble: list[str] = []
    findings: list[Finding] = []
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """No mismatch, no tie in exact mode, nothing missing, and frequencies as they should be."""
        skewed = self.chi_square is not None and self.chi_square.p < ALARM
        tied = self.mode == "exact" and self.ties
        return self.cases > 0 and not (self.mismatches or tied or self.missing or self.trouble or skewed)


class Bench:
    """A loaded pair, and the reference beside it."""

    def __init__(
        self,
        pair: str,
        mode: str,
        scale: Scale,
        *,
        engine: str = "llama.cpp",
        offline: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Raises ModelError for a pair that is not there.

        The reference is llama.cpp's whatever the engine, so other engines need a target in float32.
        """
        target, draft = _models(pair)
        threads = scale.threads or physical_cores()
        path = resolve(target, offline=offline, progress=progress)
        draft_path = resolve(draft, offline=offline, progress=progress)
        self.pair, self.scale = pair, scale
        self.engine: TargetEngine
        self.tokenizer: Tokenizer
        self.engine, self.tokenizer = load_target(
            str(path),
            engine=engine,
            mode=mode,
            slots=2 * scale.slots,
            context=scale.slot_tokens,
            threads=threads,
            offline=True,
        )
        self.info: EngineInfo = self.engine.info
        model = LlamaDraft(
            draft_path,
            n_vocab=self.info.n_vocab,
            slots=scale.at_once,
            slot_tokens=scale.slot_tokens,
            threads=threads,
            name=served_name(draft),
        )
        self.drafts = Drafts(
            {"model": ConstrainedDraft(model), "ngram": ConstrainedDraft(NgramDraft())}, self.info.n_vocab
        )
        self.drafts.constrain(self.engine.constraints.grammars)
        exact = self.info.mode == "exact" or self.info.engine != "llama.cpp"
        self.reference = Reference(
            Path(path),
            self.info.eos,
            exact=exact,
            length=scale.length,
            threads=threads,
            grammars=self.engine.constraints.grammars,
        )
        if scale.strict:
            ids = prompts(self.tokenizer, scale.chats, scale.plain)
            self.reference.eos |= stand_in_for_eos(self.reference, ids)
        self.judge = Judge(self.reference, self.tokenizer.piece, self.info.flip_gap)

    def close(self) -> None:
        self.drafts.close()
        self.engine.close()


def _models(pair: str) -> tuple[str, str]:
    if pair in PAIRS:
        return PAIRS[pair]
    target, comma, draft = pair.partition(",")
    if not comma:
        raise ModelError(
            f"There is no pair {pair!r}; take one of {', '.join(PAIRS)}, or TARGET,DRAFTER (names or paths)"
        )
    return target, draft


def check(
    bench: Bench, *, mode: str, cases: int, seed: int, depth: int | None = None, tell: Tell = lambda *_: None
) -> Report:
    """`depth`: steps in flight; None: 1 or 2, by chance."""
    started = time.perf_counter()
    report = Report(bench.pair, bench.info.mode, seed, flip_gap=bench.info.flip_gap)
    if bench.info.mode != mode:
        report.trouble.append(f"{mode} mode was asked for: {'; '.join(bench.info.notes)}")
    maker = CaseMaker(bench.tokenizer, bench.judge, bench.scale, seed)
    made = []
    for i in range(cases):
        tell("Decoding references", i, cases)
        made.append(maker.make())
    counts: Counter[str] = Counter()
    tally = _Tally(bench.judge, report, lambda done: tell("Checking", done, cases))
    for number, batching in enumerate(BATCHING):
        fleet = Fleet(
            bench.engine,
            bench.drafts,
            bench.tokenizer.piece,
            [c for c in made if c.batching == batching],
            eos=bench.reference.eos,
            batching=batching,
            at_once=bench.scale.at_once,
            chaos=bench.scale.chaos,
            seed=2 * seed + number,
            counts=counts,
            ended=tally.ended,
            depth=depth,
        )
        report.trouble += fleet.run()
    tally.close(made, counts)
    if bench.scale.strict and cases >= ENOUGH_CASES:
        promised = PROMISED if depth == 1 else (*PROMISED, *PROMISED_AHEAD)
        report.missing = [name for name in promised if not counts[name]]
    if bench.scale.samples:
        report.chi_square = chi_square(bench, bench.scale.samples, seed, tell)
    report.seconds = round(time.perf_counter() - started, 1)
    return report


class _Tally:
    """Judges outcomes as they come. A case counts as the worst that came of it."""

    def __init__(self, judge: Judge, report: Report, done: Callable[[int], None]) -> None:
        self.judge, self.report, self.done = judge, report, done
        self.worst: dict[int, Finding] = {}
        self.ended_cases: set[int] = set()

    def ended(self, case: Case, outcome: Outcome) -> None:
        finding = self.judge.compare(case, outcome)
        former = self.worst.get(case.number)
        if finding is not None and (former is None or former.tie):
            self.worst[case.number] = finding
        self.report.tokens += len(outcome.tokens)
        if outcome.whole:
            self.ended_cases.add(case.number)
            self.done(len(self.ended_cases))

    def close(self, cases: list[Case], counts: Counter[str]) -> None:
        """Sum up. A case that never ran is a mismatch: it has not been shown to be right."""
        report = self.report
        for case in cases:
            if case.number not in self.ended_cases:
                self.worst.setdefault(case.number, Finding(case.number, "never ran"))
        report.cases = len(cases)
        report.ties = sum(f.tie for f in self.worst.values())
        report.mismatches = len(self.worst) - report.ties
        report.identical = report.cases - len(self.worst)
        report.findings = sorted(self.worst.values(), key=lambda f: (f.tie, f.case))
        report.counts = dict(sorted(counts.items()))
        report.acceptance = round(counts["accepted"] / max(1, counts["drafted"]), 4)
        by = Counter(f"{c.drafter} {c.drafting}".strip() for c in cases)
        report.by_drafter = dict(sorted(by.items()))
        report.by_constraint = dict(sorted(Counter(c.constraint for c in cases if c.constraint).items()))


def chi_square(bench: Bench, samples: int, seed: int, tell: Tell = lambda *_: None) -> ChiSquare:
    """Two tests (first token; first two) for each of two samplings; `samples` sessions a sampling."""
    tests: list[Fit] = []
    prompt = CaseMaker(bench.tokenizer, bench.judge, bench.scale, seed).prompts[0]
    for temperature, top_p in (PLAIN_SAMPLING, NUCLEUS):
        tell(f"Sampling at T = {temperature:g}", 0, samples)
        sampling = Sampling(temperature, top_p=top_p)
        pairs = _sample(bench, prompt, sampling, samples, first_seed=1000 * seed)
        name = f"T={temperature:g} top_p={top_p:g}"
        first = distribution(bench.reference.logits(prompt, sampling, 0), sampling)
        tests.append(fit(f"{name}, token 0", [a for a, _ in pairs], dict(enumerate(first))))
        both: dict[tuple[int, int], float] = {}
        for token in (int(t) for t in (first >= LIKELY).nonzero()[0]):
            after = distribution(bench.reference.logits([*prompt, token], sampling, 0), sampling)
            both |= {(token, i): float(first[token] * p) for i, p in enumerate(after)}
        tests.append(fit(f"{name}, tokens 0 and 1", pairs, both))
    return ChiSquare(min(t.p for t in tests), 2 * samples, tests)


def _sample(
    bench: Bench, prompt: list[int], sampling: Sampling, samples: int, first_seed: int
) -> list[tuple[int, int]]:
    """The first two tokens under each of `samples` seeds (-1 after an end of sequence), by drafting."""
    pairs: dict[int, tuple[int, int]] = {}
    cases = [
        Case(i, prompt, msgspec.structs.replace(sampling, seed=first_seed + i), 3, [], ignore_eos=True)
        for i in range(samples)
    ]

    def ended(case: Case, outcome: Outcome) -> None:
        if len(outcome.tokens) >= 2:
            pairs[case.number] = (outcome.tokens[0], outcome.tokens[1])

    Fleet(
        bench.engine,
        bench.drafts,
        bench.tokenizer.piece,
        cases,
        eos=bench.reference.eos,
        batching="continuous",
        at_once=bench.scale.slots,
        chaos=CALM,
        seed=first_seed,
        counts=Counter(),
        ended=ended,
    ).run()
    if len(pairs) < samples:
        raise ModelError(f"{samples - len(pairs)} of {samples} sessions of the statistical test failed")
    return list(pairs.values())
