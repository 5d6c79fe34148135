"""vLLM's scheduler without a will of its own: it schedules the parts it was given, and nothing else.

vLLM's own queues stay empty. What is used of it is the KV cache manager: blocks, prefix hashes, eviction of what
nobody holds. A sequence is a vLLM `Request` of which only the tokens that are no guesses are known here, so that
drafts never enter the prefix cache. Who runs, how far, and who gives up his blocks is decided by `VllmTarget`.

    open(id, tokens, salt)    a sequence; how much of it the prefix cache holds
    add(id, part) -> bool     put a part into the next step, if there are blocks for it
    close(id)                 give its blocks back; they stay in the prefix cache until someone needs the room
    step                      the engine's own: schedule -> workers -> update_from_output, which fills `chosen`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request

from wisp.engines.vllm.parts import Chosen, Part


class StepScheduler(Scheduler):
    """See above. The target sets `hasher` once the engine is there."""

    finished_req_ids: set[str]  # of sequences that the workers may forget

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hasher: Callable[[Request], list[Any]] | None = None
        self.chosen: dict[str, Chosen] = {}
        self.steps = 0
        self.rows = 0  # fed so far
        self._sequences: dict[str, Request] = {}
        self._hits: dict[str, Any] = {}  # blocks found in the prefix cache and not taken yet
        self._known: set[str] = set()  # to the workers
        self._parts: dict[str, Part] = {}
        self._blocks: dict[str, Any] = {}  # newly allocated for the parts at hand
        # Places that a sequence has blocks for, and how many of its blocks are hashed
        self._room: dict[str, tuple[int, int]] = {}

    # -- the target's side

    def open(self, sequence: str, tokens: list[int], salt: str) -> int:
        """A new sequence that begins with `tokens`; how many of them the prefix cache holds (never all).

        Only sequences of the same `salt` share blocks.
        """
        request = Request(
            sequence,
            list(tokens),
            SamplingParams(max_tokens=1),
            None,
            arrival_time=0.0,
            cache_salt=salt,
            block_hasher=self.hasher,
        )
        self._sequences[sequence] = request
        blocks, found, _ = self.kv_cache_manager.get_computed_blocks(request)
        self._hits[sequence] = (blocks, found)
        return int(found)

    def cut(self, sequence: str, tokens: int) -> None:
        """Forget what the sequence has behind its first `tokens` tokens. None of it may be in a hashed block."""
        request = self._sequences[sequence]
        if request.num_tokens > tokens:
            del request._all_token_ids[tokens:]
            del request.block_hashes[tokens // self.hash_block_size :]

    def firm(self, sequence: str, tokens: list[int]) -> None:
        """`tokens` follow in the sequence, and are no guesses any more."""
        request = self._sequences[sequence]
        request._all_token_ids.extend(tokens)
        if len(request._all_token_ids) // self.hash_block_size > len(request.block_hashes):
            request.update_block_hashes()

    def length(self, sequence: str) -> int:
        return int(self._sequences[sequence].num_tokens)

    def add(self, sequence: str, part: Part) -> bool:
        """Take `part` into the next step; False, and nothing done, if there are no blocks for it."""
        end, whole = part.start + len(part.tokens), part.firm // self.hash_block_size
        room, hashed = self._room.get(sequence, (0, 0))
        if end <= room and whole <= hashed:  # most steps stay in the blocks there are, and fill none
            self._parts[sequence] = part
            return True
        request = self._sequences[sequence]
        blocks, found = self._hits.get(sequence, (None, 0))
        request.num_computed_tokens = part.start - found
        new = self.kv_cache_manager.allocate_slots(
            request, len(part.tokens), num_new_computed_tokens=found, new_computed_blocks=blocks
        )
        if new is None:
            return False
        self._hits.pop(sequence, None)
        request.num_computed_tokens = part.start
        self._parts[sequence] = part
        self._blocks[sequence] = new
        self._room[sequence] = (max(room, end + -end % self.hash_block_size), whole)
        return True

    def close(self, sequence: str) -> None:
        """Give back its blocks. Not while it has a part in the next step."""
        request = self._sequences.pop(sequence)
        self._hits.pop(sequence, None)
        self._room.pop(sequence, None)
        self.kv_cache_manager.free(request)
        if sequence in self._known:
            self._known.discard(sequence)
            self.finished_req_ids.add(sequence)

    def reset(self) -> None:
        """Forget every sequence and the prefix cache: after a step that failed, blocks hold anything."""
        self._parts, self._blocks = {}, {}
        for sequence in list(self._sequences):
            self.close(sequence)
        self.kv_cache_manager.reset_prefix_cache()

    # -- the engine's side

    def has_requests(self) -> bool:
        return bool(self._parts)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.steps += 1
        parts, self._parts = self._parts, {}
        blocks, self._blocks = self._blocks, {}
        finished, self.finished_req_ids = self.finished_req_ids, set()
        counts = {sequence: len(part.tokens) for sequence, part in parts.items()}
        old = [sequence for sequence in parts if sequence in self._known]
        new = [
            self._introduction(sequence, part)
            for sequence, part in parts.items()
            if sequence not in self._known
        ]
        self._known.update(parts)
        total = sum(counts.values())
        self.rows += total
        output = SchedulerOutput(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=CachedRequestData(
                req_ids=old,
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[
                    blocks[sequence].get_block_ids(allow_none=True) if sequence in blocks else None
                    for sequence in old
                ],
                num_computed_tokens=[parts[sequence].start for sequence in old],
                num_output_tokens=[0] * len(old),
            ),
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=total,
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids=finished,
            free_encoder_mm_hashes=[],
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
        )
        output.wisp_parts = parts  # pickled along with the rest
        return output

    def _introduction(self, sequence: str, part: Part) -> NewRequestData:
        """What a worker keeps of a sequence: its blocks. Tokens come with each part, so its prompt is a stand-in."""
        request = self._sequences[sequence]
        return NewRequestData(
            req_id=sequence,
            prompt_token_ids=[0],
            mm_features=[],
            sampling_params=request.sampling_params,
            pooling_params=None,
            block_ids=self.kv_cache_manager.get_blocks(sequence).get_block_ids(),
            num_computed_tokens=part.start,
            lora_request=None,
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        self.chosen = model_runner_output.wisp_chosen
        return {}
