"""Prompts that are scored side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from api_fakes import ScriptedBackend
from waiting import run
from wisp.api.backend import Committed, Generation
from wisp.api.prepare import prepare
from wisp.api.requests import parse_completion
from wisp.api.scoring import echoes
from wisp.core.errors import RequestError


class OneRefused(ScriptedBackend):
    """Refuses the second session, and works on the others for ever."""

    async def generate(self, generation: Generation) -> AsyncIterator[Committed]:
        self.asked.append(generation)
        self.running += 1
        try:
            if len(self.asked) == 2:
                raise RequestError(429, "full")
            await asyncio.Event().wait()
            yield Committed([])
        finally:
            self.running -= 1


def test_where_one_prompt_is_refused_the_others_are_not_worked_on() -> None:
    async def scenario() -> None:
        backend = OneRefused()
        ask = parse_completion({"prompt": ["abc", "def", "ghi"], "prompt_logprobs": 1, "max_tokens": 0}, {})
        target = await backend.target()
        with pytest.raises(RequestError, match="full"):
            await echoes(backend, ask, prepare(ask, target), target)
        assert (len(backend.asked), backend.running) == (3, 0)

    run(scenario())
