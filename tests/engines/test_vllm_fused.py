"""The kernels that choose tokens on a device say what the rule says.

They run on a GPU, or on the CPU by Triton's interpreter: TRITON_INTERPRET=1, in a process of its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import choosing_rig
import wisp
from choosing_rig import any_edits, any_logits, any_sampling, check, random_parts
from wisp.core.protocol.sampling import Sampling
from wisp.engines.vllm.parts import Part

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED or find_spec("triton") is None, reason="TRITON_INTERPRET=1, with Triton"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, of infinities that are masked afterwards
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter replaces Triton's functions at every call of a function; once for each kernel is enough."""
    from triton.runtime import interpreter

    done: set[Any] = set()
    patch = interpreter._patch_lang

    def once(function: Any) -> Any:
        if function in done:
            return SimpleNamespace(restore=lambda: None)
        scope, first = patch(function), not done
        done.add(function)

        def restore() -> None:
            done.clear()
            for other in reversed(scopes):
                other.restore()
            scopes.clear()

        scopes.append(scope)
        return SimpleNamespace(restore=restore if first else lambda: None)

    scopes: list[Any] = []
    monkeypatch.setattr(interpreter, "_patch_lang", once)
    yield
    for scope in reversed(scopes):
        scope.restore()


def answers(rows: int, block: int, stretches: int) -> Any:
    from wisp.engines.vllm import fused

    return partial(fused.answers, tile=fused.Tile(rows, block, stretches))


@pytest.mark.parametrize(
    ("size", "tile"), [(40, (32, 64, 1)), (300, (64, 64, 4)), (300, (1, 128, 2)), (1000, (32, 256, 1))]
)
def test_rows_of_all_kinds_are_chosen_as_the_rule_does(size: int, tile: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(size)
    rows = 64 if tile[0] > 1 else 8
    check(answers(*tile), any_logits(rng, rows, size), random_parts(rng, rows, size, 16, logprobs=True))


def test_drafts_are_accepted_as_far_as_they_agree() -> None:
    rng = np.random.default_rng(5)
    logits = any_logits(rng, 60, 50)
    logits[np.isinf(logits)] = -30.0
    logits[17, 3], logits[44, 5], logits[59, 0] = np.nan, np.inf, -np.inf
    parts, first = [], 0
    plain = check(answers(64, 64, 1), logits, [Part([1] * 59, True, 0, Sampling(0.9, seed=2))])
    while first < 60:
        n = min(60 - first, int(rng.integers(1, 7)))
        draft = [t if rng.random() < 0.8 else (t + 1) % 50 for t in plain.tokens[first : first + n - 1]]
        parts.append(Part(draft, True, first, Sampling(0.9, seed=2)))
        parts.append(Part([], False, 0, Sampling()))  # a prefill: no rows
        first += n
    said = check(answers(64, 64, 1), logits, parts)
    assert said.tokens == plain.tokens
    assert set(said.said) > {0, 1, 2, 3}
    assert said.sound.count(False) >= 1


def test_constraints_are_the_rule_row_by_row() -> None:
    rng = np.random.default_rng(4)
    size = 300
    edits = any_edits(rng, size) * 3
    logits = any_logits(rng, len(edits) + 11, size)
    logits[np.isinf(logits)] = -30.0
    parts = [Part([], True, i, any_sampling(rng), [None, 4][i % 2], False, [e]) for i, e in enumerate(edits)]
    parts.append(Part([5] * 10, True, 9, Sampling(1.0, 0, 0.8, seed=3), 2, False, edits[:11]))
    check(answers(64, 256, 2), logits, parts)


def test_min_tokens_delays_the_end() -> None:
    rng = np.random.default_rng(6)
    logits = (3.0 * rng.standard_normal((12, 40))).astype(np.float32)
    logits[:, [3, 39]] += 50.0
    how = [Sampling(t, seed=1, min_tokens=4, ends=(3, 39)) for t in (0.0, 1.0)]
    said = check(answers(16, 64, 1), logits, [Part([0] * 5, True, 0, s) for s in how])
    assert not {3, 39} & {*said.tokens[:4], *said.tokens[6:10]}
    assert {said.tokens[4], said.tokens[10]} <= {3, 39}


def test_more_candidates_than_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the row itself is read again: the same tokens."""
    from wisp.engines.vllm import fused

    monkeypatch.setattr(fused, "MOST", 16)
    rng = np.random.default_rng(8)
    check(answers(32, 128, 1), any_logits(rng, 64, 300), random_parts(rng, 64, 300, 16, logprobs=True))


def test_float64_decides_what_float32_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin that leaves many instead of one or two."""
    from triton.language import constexpr

    from wisp.engines.vllm.kernels import arithmetic, scan

    for module in (arithmetic, scan):
        monkeypatch.setattr(module, "MARGIN", constexpr(3.0))
    rng = np.random.default_rng(10)
    check(answers(64, 128, 1), any_logits(rng, 64, 300), random_parts(rng, 64, 300, 16))


def test_logits_in_half_precision_are_widened_first() -> None:
    import torch

    rng = np.random.default_rng(9)
    for dtype in (torch.bfloat16, torch.float16):
        logits = any_logits(rng, 32, 200)
        logits[np.abs(logits) > 1000] = 3.0
        check(answers(32, 256, 1), logits, random_parts(rng, 32, 200, 8, logprobs=True), dtype)


@pytest.mark.parametrize("kind", ["typical", "flat"])
def test_logits_are_read_at_most_twice_by_four_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the device's own tile, counted where the interpreter loads: 16 bits wide is only what logits are read from."""
    import torch

    rows, parts = typical(kind, 20_000, 6)
    counted = Counted(monkeypatch)
    from wisp.engines.vllm import fused

    check(fused.answers, rows, parts, torch.bfloat16)
    assert counted.kernels == ["scan_kernel", "gather_kernel", "select_kernel", "accept_kernel"]
    assert 1.0 <= counted.bytes / (2 * rows.size) <= 2.0
    counted.clear()
    check(
        fused.answers,
        rows,
        [msgspec.structs.replace(p, sampling=Sampling(0.8, seed=3), logprobs=0) for p in parts],
        torch.bfloat16,
    )
    assert counted.kernels == ["scan_kernel", "accept_kernel"]
    assert 1.0 <= counted.bytes / (2 * rows.size) <= 1.01


def typical(kind: str, size: int, n: int) -> tuple[np.ndarray, list[Part]]:
    rng = np.random.default_rng(3)
    rows = (2.5 * rng.standard_normal((n, size))).astype(np.float32)
    if kind == "typical":
        for row in rows:
            row[rng.integers(0, size, 40)] += np.linspace(4, 14, 40)
    else:
        rows *= 0.02
    how = [
        Sampling(0.7, 0, 0.95, seed=1),
        Sampling(0.7, 20, 0.8, seed=2),
        Sampling(1.0, 0, 1.0, 0.05, seed=3),
    ]
    if kind == "flat":  # as far as a bound prunes at all
        how = [Sampling(0.7, 20, 0.8, seed=2), Sampling(1.0, 50, seed=3)]
    return rows, [Part([], True, i, how[i % len(how)], 20 if i % 2 else None) for i in range(n)]


class Counted:
    """The kernels that are launched, and the bytes that they read of 16 bits wide numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        self.clear()
        load, launch = interpreter.InterpreterBuilder.create_masked_load, interpreter.GridExecutor.__call__

        def loading(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            if ptrs.get_element_ty().primitive_bitwidth == 16:
                self.bytes += 2 * int(np.count_nonzero(mask.data))
            return load(builder, ptrs, mask, *rest)

        def launching(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels.append(executor.fn.__name__)
            return launch(executor, *args, **kwargs)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", loading)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launching)

    def clear(self) -> None:
        self.kernels: list[str] = []
        self.bytes = 0


@pytest.mark.extended
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("size", [5, 33, 64, 127, 256])
def test_two_thousand_random_rows(size: int, part: int) -> None:
    """Ten times, of each of five vocabularies: a hundred thousand in all. The file WISP_TEST_PARTS, if there is one,
    keeps those that passed with this very code, so that a run can be stopped and go on another time."""
    rng = np.random.default_rng((size, part))
    block = 1 << (size - 1).bit_length()
    with once(f"{size} {part}"):
        check(answers(1024, block, 1), any_logits(rng, 2048, size), random_parts(rng, 2048, size, 256))


@contextmanager
def once(part: str) -> Iterator[None]:
    """Skips what has passed before."""
    passed = Path(os.environ.get("WISP_TEST_PARTS") or os.devnull)
    line = f"{part} {code()}"
    if passed.is_file() and line in passed.read_text().splitlines():
        pytest.skip("passed before")
    yield
    with passed.open("a") as file:
        file.write(line + "\n")


@cache
def code() -> str:
    """A digest of all that decides about a row: the kernels, what calls them, the rule, and these rows."""
    package = Path(wisp.__file__).parent
    files = sorted(package.glob("engines/vllm/kernels/*.py"))
    files += [package / "engines/vllm" / name for name in ("fused.py", "rows.py", "parts.py")]
    files += [*sorted(package.glob("core/protocol/*.py")), Path(__file__), Path(choosing_rig.__file__)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


@pytest.mark.extended
def test_a_vocabulary_of_152_thousand() -> None:
    rng = np.random.default_rng(152)
    size = 151_936
    for _ in range(4):
        check(answers(4, 1 << 14, 2), any_logits(rng, 8, size), random_parts(rng, 8, size, 4, logprobs=True))
