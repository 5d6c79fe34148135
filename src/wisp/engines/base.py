"""The three small protocols behind which models live: target, drafter, tokenizer.

Engines are synchronous and used from one thread at a time; their owner provides the thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec

from wisp.core.draft.signals import Signal
from wisp.core.protocol.edits import Edit
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Copy, Slice, SliceResult
from wisp.core.verify.events import Run, StepDone
from wisp.engines.constraining import SlotTrackers
from wisp.engines.special import NO_STAND_INS, StandIns

Check = Callable[[], object]  # raises where the work is not wanted any more


def unasked() -> None:
    """A `Check` of work that goes on to its end."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What a verifier and its operator need to know of an engine.

    slots:       sequences whose KV can be held at once
    slot_tokens: context length of each slot, tokens
    kv_tokens:   KV tokens in all (slots * slot_tokens where slots are separate)
    step_tokens: tokens to put into one step before it becomes too long to be interactive
    n_vocab:     ids 0 <= id < n_vocab are valid
    eos:         ids that end a generation
    digest:      of all that decides the text (`engines.identity`): engines of equal digests write equal texts
    flip_gap:    in fast mode, two scores closer than this may swap between batch shapes; 0.0 in exact mode
    """

    engine: str
    model: str
    mode: Literal["exact", "fast"]
    n_vocab: int
    eos: frozenset[int]
    slots: int
    slot_tokens: int
    kv_tokens: int
    step_tokens: int
    digest: str
    flip_gap: float = 0.0
    notes: tuple[str, ...] = ()


class StepQueue(Protocol):
    """Up to `depth` steps at a time, in order. One thread submits them, and one collects them."""

    depth: int

    def submit(self, run: Run) -> None:
        """Take over the next step. Never waits for the steps before it, and leaves it to `collect` to raise."""

    def collect(self) -> StepDone:
        """Wait for the oldest step and return what became of it. Called once for each step, after its `submit`.

        Raises EngineError, for that step, if it failed as a whole; then every slot is to be taken as empty. Steps that
        were planned before the failure became known (`Run.epoch`) fail, too.
        """


class TargetEngine(Protocol):
    """Runs the target model over batches of slices."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def constraints(self) -> SlotTrackers:
        """By these it constrains choices. Their `grammars` are set by the code that knows the tokenizer."""
        ...

    def run(self, batch: Sequence[Slice]) -> list[SliceResult]:
        """One step. Results in the order of the slices; at most one slice per slot in a batch.

        Raises EngineError if the step failed as a whole; then every slot is to be taken as empty.
        """

    def copy(self, copy: Copy) -> None:
        """Carry out a copy between slots. Called before `run`, in the order of the step."""

    def queue(self, depth: int) -> StepQueue:
        """Where a verifier leaves its steps. An engine that can only `run` has `OneAtATime`."""

    def close(self) -> None: ...


@runtime_checkable
class OwnThread(Protocol):
    """An engine that works in a thread of its own, to which each call from another one has to change; or its queue, as
    far as `submit` is concerned."""

    def occupy(self, main: Callable[[], None]) -> Callable[[], None]:
        """Run `main` in that thread, where calls change nothing. Returns a function that waits for its end."""
        ...


class Proposal(msgspec.Struct, frozen=True, array_like=True):
    """A drafted token and the statistics a drafting policy decides by. `then`: tokens that follow it for certain, as
    constraints leave no others. `other`: the second choice in its place, if the engine has one."""

    token: int
    signal: Signal
    then: tuple[int, ...] = ()
    other: int | None = None


class DraftEngine(Protocol):
    """Proposes one token after another. Holds KV for several sessions and keeps it in step by itself."""

    name: str

    def propose(
        self,
        session: str,
        context: Sequence[int],
        position: int,
        sampling: Sampling,
        edit: Edit | None = None,
    ) -> Proposal | None:
        """The drafter's token after `context` (prompt, committed and drafted tokens, in order).

        Whatever KV the engine has for `session` is rolled back to the longest common prefix with
        `context` and caught up; so rejections, stale drafts and tokens decoded elsewhere need no call
        of their own. `position` is the index of the proposed token among the generated ones, for the
        shared noise, `edit` what the session's constraints make of its logits. None means "nothing to
        propose" (an n-gram drafter without a match).
        Sessions share KV only if their names are alike up to the last "/" (see `messages.Open`, salt).
        """

    def forget(self, session: str) -> None:
        """The session is over; its KV may be reused."""

    def close(self) -> None: ...


class Tokenizer(Protocol):
    """Text to ids and back. One per target; edges use the target's."""

    @property
    def fingerprint(self) -> str:
        """Hash of id -> bytes over real tokens (`core.protocol.messages.vocabulary_fingerprint`)."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def eos(self) -> frozenset[int]: ...

    @property
    def bos_token(self) -> str: ...

    @property
    def eos_token(self) -> str: ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def controls(self) -> frozenset[str]:
        """The texts of control tokens."""

    def encode(
        self,
        text: str,
        *,
        add_bos: bool,
        parse_special: bool,
        stand_ins: StandIns = NO_STAND_INS,
        check: Check = unasked,
    ) -> list[int]:
        """Ids of `text`, in time linear in its length. Lone surrogates become "?".

        add_bos: the beginning-of-sequence token comes first, if the model is one that has it so and the text
        does not begin with it. parse_special: the text of control tokens is read as those tokens, but not where
        one of its characters has a stand-in (`engines.special`). `check` is called every now and then.
        """

    def fewest(self, text: str) -> int:
        """A number of tokens that `text` has at least, found at next to no cost."""

    def piece(self, token: int) -> bytes:
        """The bytes of one token; b"" for control tokens, which are never shown."""

    def blob(self) -> bytes:
        """A self-contained file from which an edge can build the same tokenizer."""
