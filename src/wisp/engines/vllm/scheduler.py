"""A vLLM scheduler that decides nothing: it schedules exactly the parts that WISP chose.

vLLM's own queues stay empty. Only its KV cache manager is used: blocks, prefix hashes, eviction of unused blocks. A
sequence is a vLLM `Request` that knows committed tokens alone, so drafts never enter the prefix cache; it learns of
tokens when a block is full, and not before. `VllmTarget` decides which sequences run, how far, and which give up their
blocks.

    open(slot, tokens, salt) -> Held, and how much of it the prefix cache holds
    fits(sequence, end, firm)  are its blocks enough, with none to be hashed? Most steps stay in the blocks there are
    grow(sequence, ...)        blocks for more; False if there are none
    close(sequence)            give its blocks back; they stay in the prefix cache until someone needs the room
    step(batch)                what the workers are told of a step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from wisp.engines.vllm.parts import Batch, Blocks


class Held:
    """One sequence's blocks.

    room:  tokens that its blocks are enough for
    full:  firm tokens from which on another of its blocks is full, and is to be hashed
    known: how many of its blocks the workers have been told
    """

    __slots__ = ("full", "hits", "known", "request", "room", "slot")

    def __init__(self, slot: int, request: Request, hits: tuple[Any, int]) -> None:
        self.slot, self.request = slot, request
        self.hits: tuple[Any, int] | None = hits  # blocks found in the prefix cache and not taken yet
        self.room = self.full = self.known = 0

    def fits(self, end: int, firm: int) -> bool:
        """Are there blocks for tokens up to `end`, and none that `firm` tokens fill?"""
        return end <= self.room and firm < self.full

    def cut(self, tokens: int, block: int) -> None:
        """Forget what is known behind its first `tokens` tokens. None of it may be in a hashed block."""
        request = self.request
        if len(request._all_token_ids) > tokens:
            del request._all_token_ids[tokens:]
            del request.block_hashes[tokens // block :]
            self.full = min(self.full, (tokens // block + 1) * block)


class StepScheduler(Scheduler):
    """See above. The target sets `hasher` once the engine is there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hasher: Callable[[Request], list[Any]] | None = None
        self.steps = 0
        self.rows = 0  # fed so far
        self._opened = 0
        self._sequences: set[Held] = set()
        self._names = [str(slot) for slot in range(self.max_num_running_reqs)]
        self._news: list[tuple[int, int, Blocks]] = []  # blocks that the workers are to be told of

    def open(self, slot: int, tokens: list[int], salt: str) -> tuple[Held, int]:
        """A new sequence that begins with `tokens`; how many of them the prefix cache holds (never all).

        Only sequences of the same `salt` share blocks.
        """
        self._opened += 1
        request = Request(
            f"{slot}.{self._opened}",
            list(tokens),
            SamplingParams(max_tokens=1),
            None,
            arrival_time=0.0,
            cache_salt=salt,
            block_hasher=self.hasher,
        )
        blocks, found, _ = self.kv_cache_manager.get_computed_blocks(request)
        sequence = Held(slot, request, (blocks, int(found)))
        self._sequences.add(sequence)
        return sequence, int(found)

    def grow(self, sequence: Held, start: int, count: int, tokens: list[int], firm: int) -> bool:
        """Blocks for `count` tokens from place `start` on; False, and nothing done, if there are none.

        `tokens` are the sequence's, of which the first `firm` are no guesses.
        """
        request = sequence.request
        request._all_token_ids.extend(tokens[len(request._all_token_ids) : firm])
        if firm // self.hash_block_size > len(request.block_hashes):
            request.update_block_hashes()
        blocks, found = sequence.hits or (None, 0)
        request.num_computed_tokens = start - found
        new = self.kv_cache_manager.allocate_slots(
            request, count, num_new_computed_tokens=found, new_computed_blocks=blocks
        )
        if new is None:
            return False
        if sequence.hits is not None:  # the first time: those that were found, too
            new, sequence.hits = self.kv_cache_manager.get_blocks(request.request_id), None
        request.num_computed_tokens = start
        block = self.hash_block_size
        sequence.room = max(sequence.room, -(-(start + count) // block) * block)
        sequence.full = (firm // block + 1) * block
        ids = new.get_block_ids(allow_none=True)
        if ids is not None:
            self._news.append((sequence.slot, sequence.known, ids))
            sequence.known += len(ids[0])
        return True

    def close(self, sequence: Held) -> None:
        """Give back its blocks. Steps that have been launched may use them: what others write there comes later."""
        self._sequences.discard(sequence)
        self.kv_cache_manager.free(sequence.request)

    def reset(self) -> None:
        """Forget every sequence and the prefix cache: after a step that failed, blocks hold anything."""
        self._news = []
        for sequence in list(self._sequences):
            self.close(sequence)
        self.kv_cache_manager.reset_prefix_cache()

    def take_news(self) -> list[tuple[int, int, Blocks]]:
        """Blocks that the workers have not been told of."""
        news, self._news = self._news, []
        return news

    def step(self, batch: Batch) -> SchedulerOutput:
        """What the workers are told of a step."""
        self.steps += 1
        self.rows += len(batch.tokens)
        names = self._names
        output = SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData.make_empty(),
            num_scheduled_tokens={
                names[slot]: count
                for slot, count in zip(batch.slots.tolist(), batch.counts.tolist(), strict=True)
            },
            total_num_scheduled_tokens=len(batch.tokens),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids=set(),
            free_encoder_mm_hashes=[],
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
        )
        output.wisp_batch = batch  # pickled along with the rest
        return output
