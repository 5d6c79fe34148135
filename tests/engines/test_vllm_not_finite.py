"""vLLM with weights that are not finite: refused at start; later it fails the sessions concerned, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gguf_files import Weights
from vllm_rig import TINY, engine_of, with_vllm
from wisp.core.errors import ModelError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import NOT_FINITE, Slice

pytestmark = with_vllm

POISON = 300  # the token whose embedding is no number
LONG = [int(t) for t in np.random.default_rng(1).integers(0, 250, 100)]


def folder(parent: Path, token: int, tensor: str) -> Path:
    from wisp.engines.vllm.converting import converted

    weights = Weights(TINY)
    weights.untie()
    weights.tensors[tensor][token, 5] = np.nan
    return converted(weights.write(parent / "bad.gguf"), parent / "bad")


def test_a_model_that_computes_nan_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, 7, "output.weight")
    with pytest.raises(ModelError, match="computes NaN or infinity"), engine_of(path):
        pass


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)])
def test_one_of_a_batch_fails_and_the_others_say_what_they_would_alone(
    tmp_path: Path, sampling: Sampling
) -> None:
    with engine_of(folder(tmp_path, POISON, "token_embd.weight")) as engine:
        [alone] = engine.run([Slice(9, 0, 0, LONG, sampling=sampling)])
        engine.clear()
        batch = [
            Slice(1, 1, 0, [*LONG, POISON, 5], sampling=sampling),
            Slice(2, 0, 0, LONG, sampling=sampling),
        ]
        bad, good = engine.run(batch)
        assert (bad.code, bad.tokens, engine.held(1)) == (NOT_FINITE, [], 0)
        assert (good.error, good.tokens) == ("", alone.tokens)
        for slot in (1, 2):  # in the very slot of the one that failed, and elsewhere
            [later] = engine.run([Slice(2 + slot, slot, 0, LONG, sampling=sampling)])
            assert (later.error, later.tokens) == ("", alone.tokens)


@pytest.mark.parametrize("here", [True, False], ids=["on the CPU", "as on a device"])
def test_rows_behind_a_rejected_draft_token_may_be_anything(here: bool) -> None:
    import torch

    from wisp.engines.vllm.choosing import choose
    from wisp.engines.vllm.parts import Part

    logits = torch.zeros(6, 10)
    logits[:, 4] = 1.0
    logits[1, 2] = logits[5, 2] = torch.nan
    greedy = Sampling()
    wrong, right = Part([2], True, 0, greedy), Part([4], True, 0, greedy)
    rejected, fine, lost = choose(logits, [wrong, right, right], here=here).chosen()
    assert (rejected.finite, rejected.tokens) == (True, [4])
    assert (fine.finite, fine.tokens) == (True, [4, 4])
    assert (lost.finite, lost.tokens) == (False, [4])
