"""vLLM's engine core as it comes, and the same core under our verifier, with a stopwatch in each."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.step.stopwatch import LEFT_OUT, Stopwatch
from wisp.core.protocol.messages import Cancel, Draft, Open, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.verify.admission import Admission
from wisp.core.verify.batching import batching_policy
from wisp.core.verify.events import Limits, Received, Run, Send, StepDone, Tick
from wisp.core.verify.verifier import Verifier
from wisp.engines.vllm.starting import Wanted

DRAFT = 4  # tokens
PROMPT, CONTEXT = 24, 256  # tokens
TEMPERATURE, TOP_P, TOP = 0.7, 0.95, 5
OUTPUT = "what clients get"
IDS = 256  # that prompts are made of


def wanted(folder: str, slots: int, sequences: int) -> Wanted:
    """An engine for steps of so many sequences, with room for `slots`."""
    rows = sequences * (DRAFT + 1)
    return Wanted(
        model=folder, slots=slots, slot_tokens=CONTEXT, threads=1, offline=True, step_tokens=rows, kv_bytes=1 << 31
    )  # fmt: skip


def prompt(i: int, turn: int) -> list[int]:
    """It repeats itself, so that there are n-grams to find."""
    rng = random.Random(f"{i} {turn}")
    few = [rng.randrange(IDS) for _ in range(6)]
    return (few * PROMPT)[:PROMPT]


class Stock:
    """vLLM's engine core with its n-gram drafts."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.executor.abstract import Executor

        del settings["scheduler_cls"], settings["worker_extension_cls"]
        settings["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": DRAFT,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
        config = EngineArgs(**settings).create_engine_config()
        self._core: Any = EngineCore(config, Executor.get_class(config), log_stats=False)
        self._turn = 0
        self._requests: list[Any] = []
        self._processor = OutputProcessor(None, log_stats=False)
        self.watch = Stopwatch()
        self._watch()

    def _watch(self) -> None:
        core, watch = self._core, self.watch
        runner = core.model_executor.driver_worker.worker.model_runner
        watch.on(LEFT_OUT, runner, "_model_forward", "_sample")
        watch.on(LEFT_OUT, runner.model, "compute_logits")
        self._draft_always(runner)
        watch.on(LEFT_OUT, runner, "propose_draft_token_ids")
        watch.on("states of the batch", runner, "_update_states")
        watch.on("inputs", runner, "_prepare_inputs")
        watch.on("attention metadata", runner, "_build_attention_metadata", "_get_slot_mappings")
        watch.on("tokens back", runner, "_bookkeeping_sync")
        watch.on("scheduling", core.scheduler, "schedule", "update_draft_token_ids")
        watch.on("results", core.scheduler, "update_from_output")
        watch.on(OUTPUT, self._processor, "process_outputs")
        self.one_step = watch.timed("the rest of a step", self._one_step)

    def _draft_always(self, runner: Any) -> None:
        """Where the proposer finds no n-gram, the last token four times: both sides are to verify as much."""
        propose = runner.propose_draft_token_ids

        def proposed(scheduler_output: Any, sampled: Any, *args: Any, **kwargs: Any) -> Any:
            found = propose(scheduler_output, sampled, *args, **kwargs)
            return [
                (draft + [tokens[-1]] * DRAFT)[:DRAFT] if tokens else []
                for draft, tokens in zip(found, sampled, strict=True)
            ]

        runner.propose_draft_token_ids = proposed

    def begin(self, sequences: int) -> None:
        """New requests, each past its prompt."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.request import Request

        self._turn += 1
        for i in range(sequences):
            how = SamplingParams(
                temperature=TEMPERATURE,
                top_p=TOP_P,
                max_tokens=CONTEXT - PROMPT - DRAFT - 2,
                ignore_eos=True,
                logprobs=TOP if i % 2 else None,
                output_kind=RequestOutputKind.DELTA,
                detokenize=False,
            )
            name = f"{self._turn}-{i}"
            asked = EngineCoreRequest(
                name, prompt(i, self._turn), None, how, None, 0.0, None, None, None, external_req_id=name
            )
            self._processor.add_request(asked, None)
            self._requests.append(Request.from_engine_core_request(asked, self._core.request_block_hasher))
            self._core.add_request(self._requests[-1])
        while any(r.num_output_tokens < 2 for r in self._requests):
            self.one_step()

    def _one_step(self) -> None:
        outputs, executed = self._core.step()
        self._core.post_step(executed)
        for some in outputs.values():
            self._processor.process_outputs(some.outputs)

    def step(self) -> int:
        """One step; the tokens it committed."""
        before = sum(r.num_output_tokens for r in self._requests)
        self.watch.reset()
        self.one_step()
        return int(sum(r.num_output_tokens for r in self._requests) - before)

    def end(self) -> None:
        """No more of these requests."""
        names = [r.request_id for r in self._requests]
        self._core.abort_requests(names)
        self._core.step()
        self._processor.abort_requests(names, internal=True)
        self._requests = []


class Ours:
    """The same core under our verifier, driven as the server's event loop does it."""

    def __init__(self, folder: str, slots: int, sequences: int) -> None:
        from wisp.engines.vllm.target import VllmTarget

        self.engine = VllmTarget(wanted(folder, slots, sequences), name="model", eos=[])
        info = self.engine.info
        self._limits = Limits(
            info.n_vocab, info.eos, info.slots, info.slot_tokens, info.kv_tokens, info.step_tokens
        )
        self._slots = slots
        self._turn = 0
        self._now = 0.0
        self._said: dict[str, list[int]] = {}
        self._prompts: dict[str, list[int]] = {}
        self._rounds: dict[str, int] = {}
        self._halves: list[list[str]] = []
        self.slices: list[int] = []  # of each step since the beginning
        self.watch = Stopwatch()
        self._watch()

    def _watch(self) -> None:
        from wisp.engines.vllm import worker

        core, watch = self.engine.started.core, self.watch
        runner = core.model_executor.driver_worker.worker.model_runner
        watch.on(LEFT_OUT, runner, "_model_forward")
        watch.on(LEFT_OUT, runner.model, "compute_logits")
        watch.on("states of the batch", runner, "_update_states")
        watch.on("inputs", runner, "_prepare_inputs")
        watch.on("attention metadata", runner, "_build_attention_metadata", "_get_slot_mappings")
        watch.on("tokens back", runner, "sample_tokens")
        watch.on("tokens back", worker.Answers, "get_output")
        watch.on("scheduling", core.scheduler, "step")
        watch.on("the rest of a step", self.engine.started, "launch")
        watch.on("slices", self.engine, "run")
        self._leave_out_the_choice()

    def _leave_out_the_choice(self) -> None:
        """On a CPU, `choose` asks the rule itself, row by row; here it is to do what it does with a device."""
        from wisp.engines.vllm import choosing, worker

        choosing.begin = self.watch.timed(LEFT_OUT, choosing.begin)
        choosing._way.cache_clear()
        here = functools.partial(choosing.choose, here=False)
        setattr(worker, "choose", lambda logits, parts, **_: here(logits, parts))  # noqa: B010

    def begin(self, sequences: int) -> None:
        """New sessions, twice as many, each past its prompt and without a draft."""
        self._turn += 1
        self._verifier = Verifier(self._limits, batching_policy("wisp"), Admission(self._slots + 1))
        self.plan = self.watch.timed("planning", self._verifier.handle)
        self.commit = self.watch.timed("committing", self._verifier.handle)
        self.take_in = self.watch.timed("drafts", self._take_in)
        names = [f"session-{self._turn}-{i:05}" for i in range(2 * sequences)]
        self._halves = [names[:sequences], names[sequences:]]
        self._said = {name: [] for name in names}
        self._rounds = dict.fromkeys(names, 0)
        for half in self._halves:
            for i, name in enumerate(half):
                self._prompts[name] = prompt(i, self._turn)
                sampling = Sampling(temperature=TEMPERATURE, top_p=TOP_P, seed=i)
                opening = Open(
                    name, 1, self._prompts[name], sampling, CONTEXT - PROMPT - DRAFT - 2, ignore_eos=True,
                    logprobs=TOP if i % 2 else None,
                )  # fmt: skip
                self._verifier.handle(self._now, Received(1, "", opening))
            while any(not self._said[name] for name in half):
                self._note(self._advance())
        self.slices = []

    def step(self) -> int:
        """One step of one half; the tokens it committed."""
        self._halves.reverse()
        half = self._halves[0]
        drafts = [
            Received(1, "", Draft(name, self._rounds[name], len(self._said[name]), self._draft(name)))
            for name in half
        ]
        before = sum(len(self._said[name]) for name in half)
        self.watch.reset()
        self.take_in(drafts)
        sent = self._advance()
        self._note(sent)
        return sum(len(self._said[name]) for name in half) - before

    def _take_in(self, drafts: Sequence[Received]) -> None:
        for draft in drafts:
            self._verifier.handle(self._now, draft)

    def _advance(self) -> list[Any]:
        """What sessions are told by one step."""
        self._now += 0.05
        sent: list[Any] = []
        for action in self.plan(self._now, Tick()):
            if isinstance(action, Run):
                self.slices.append(len(action.slices))
                for copy in action.copies:
                    self.engine.copy(copy)
                results = self.engine.run(action.slices)
                sent = self.commit(self._now, StepDone(results, 20.0))
        return sent

    def _draft(self, name: str) -> list[int]:
        """By n-grams, as vLLM's; the last token four times where there are none."""
        text = self._prompts[name] + self._said[name]
        for n in (3, 2, 1):
            end = text[-n:]
            for at in range(len(text) - n):
                if text[at : at + n] == end:
                    return (text[at + n : at + n + DRAFT] + [text[-1]] * DRAFT)[:DRAFT]
        return [text[-1]] * DRAFT

    def _note(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, Verdict):
                verdict = action.message
                said = self._said[verdict.session]
                said += verdict.tokens[len(said) - verdict.base :]
                self._rounds[verdict.session] = verdict.round + 1

    def end(self) -> None:
        """No more of these sessions."""
        for name in self._said:
            self._verifier.handle(self._now, Received(1, "", Cancel(name)))
        self.engine.clear()
