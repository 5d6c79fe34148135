"""`wisp edge` without --draft: the best drafter that is on this device already, or n-grams. Nothing is fetched.

The largest model drafts best. It must differ from the target, share its vocabulary, fit into free memory, and draft
fast enough, which is measured.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from wisp.core.errors import RequestError, WispError
from wisp.core.protocol.messages import Welcome
from wisp.core.protocol.sampling import Sampling
from wisp.edge.link import VerifierLink
from wisp.engines.base import DraftEngine
from wisp.engines.build import load_drafter, served_name
from wisp.engines.memory import available_memory
from wisp.engines.models import drafter_for, here, is_cached
from wisp.engines.options import USUAL, EngineOptions

log = logging.getLogger("wisp.edge")

# Drafted tokens/s; a device that is slower waits for its own drafts longer than for the verifier
LEAST_RATE = 10.0
MOST_BYTES = 8_000_000_000  # of a file: no processor reads more of them LEAST_RATE times a second
OVERHEAD = 1.2  # memory of a model over the size of its file
START_S = 10.0  # for a verifier. Nobody is answered here meanwhile, so it is shorter than an answer may wait
STEPS = 8  # that are timed
_PROMPT = range(1, 9)  # token ids; any text takes as long

Loaded = tuple[DraftEngine, str]  # with its vocabulary's fingerprint


@dataclass(frozen=True)
class Candidate:
    """A model on this device. name: as --draft takes it."""

    name: str
    size: int  # bytes


def find_drafter(
    server: str,
    api_key: str | None,
    *,
    slots: int,
    threads: int | None,
    options: EngineOptions = USUAL,
) -> tuple[DraftEngine, str]:
    """The drafter and its vocabulary's fingerprint; the log says which, and why. Waits for a verifier, for START_S."""
    try:
        welcome = asyncio.run(_welcome(server, api_key))
    except RequestError as error:
        log.warning(
            "drafter: n-grams, until this is started again: no verifier has said which vocabulary it needs, "
            "and no model is named with --draft. %s",
            error,
        )
        return _ngrams()

    def load(name: str) -> Loaded:
        engine, fingerprint = load_drafter(name, slots=slots, threads=threads, offline=True, options=options)
        assert engine is not None
        return engine, fingerprint

    models = {name: Candidate(name, path.stat().st_size) for name, path in here().items()}
    found, said = choose(models, welcome, available_memory(), fingerprint_of, load, drafted_per_s)
    for line in said:
        log.info("drafter: %s", line)
    if found is not None:
        return found
    log.info("drafter: n-grams, since no model on this device will do%s", _advice(welcome.model))
    return _ngrams()


def choose(
    models: Mapping[str, Candidate],
    welcome: Welcome,
    memory: int | None,
    vocabulary: Callable[[str], str],
    load: Callable[[str], Loaded],
    rate: Callable[[DraftEngine], float],
) -> tuple[Loaded | None, list[str]]:
    """The first that will do, largest first; and what to say of it and of those before it.

    memory: free bytes, None where that is not known. vocabulary: a model's fingerprint, without its weights.
    rate: tokens an engine drafts per second.
    """
    said = []
    for model in sorted(models.values(), key=lambda m: (-m.size, m.name)):
        try:
            if problem := _unfit(model, welcome, memory, vocabulary):
                said.append(f"not {model.name}: {problem}")
                continue
            engine, fingerprint = load(model.name)
        except WispError as error:
            said.append(f"not {model.name}: {error}")
            continue
        measured = rate(engine)
        if measured < LEAST_RATE:
            engine.close()
            said.append(f"not {model.name}: it drafts {measured:.1f} tokens/s here, too slow")
            continue
        said.append(
            f"{model.name}, the largest on this device that fits: its vocabulary is the target's, "
            f"{model.size / 1e6:.0f} MB, {measured:.0f} tokens/s"
        )
        return (engine, fingerprint), said
    return None, said


def fingerprint_of(name: str) -> str:
    """A model's vocabulary, without its weights. Raises ModelError."""
    from wisp.engines.llama.tokenizer import LlamaTokenizer
    from wisp.engines.models import resolve

    tokenizer = LlamaTokenizer.open(resolve(name, offline=True))
    try:
        return tokenizer.fingerprint
    finally:
        tokenizer.close()


def drafted_per_s(engine: DraftEngine) -> float:
    """Tokens that `engine` drafts per second, alone."""
    context = list(_PROMPT)
    times = []
    for position in range(STEPS + 1):
        started = time.perf_counter()
        proposal = engine.propose("finding", context, position, Sampling())
        times.append(time.perf_counter() - started)
        if proposal is None:
            return 0.0
        context.append(proposal.token)
    engine.forget("finding")
    return 1.0 / max(median(times[1:]), 1e-9)  # the first reads the prompt


def _unfit(
    model: Candidate, welcome: Welcome, memory: int | None, vocabulary: Callable[[str], str]
) -> str | None:
    """Why it will not do, as far as can be told without loading it."""
    if served_name(model.name).lower() == welcome.model.lower():
        return "it is the target"
    if model.size > MOST_BYTES:
        return f"{model.size / 1e9:.1f} GB are too many to be read {LEAST_RATE:.0f} times a second"
    if memory is not None and model.size * OVERHEAD > memory:
        return f"it needs {model.size * OVERHEAD / 1e6:.0f} MB of memory, and {memory / 1e6:.0f} MB are free"
    if vocabulary(model.name) != welcome.fingerprint:
        return f"its vocabulary is not that of {welcome.model}"
    return None


def _advice(target: str) -> str:
    """What would help."""
    name = drafter_for(target)
    if name is None or is_cached(name):
        return ""
    return f". `wisp pull {name}` would get one for {target}"


def _ngrams() -> Loaded:
    engine, fingerprint = load_drafter("ngram")
    assert engine is not None
    return engine, fingerprint


async def _welcome(server: str, api_key: str | None) -> Welcome:
    """What a verifier says of itself. Raises RequestError if none is there in time, or it does not let us in."""
    link = VerifierLink(server, api_key, give_up_s=START_S)
    link.start()
    try:
        return await link.connected()
    finally:
        await link.close()
