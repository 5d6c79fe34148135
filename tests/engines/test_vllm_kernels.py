"""The kernels that choose tokens can be built for a GPU, whether there is one or not."""

from __future__ import annotations

import inspect
import os
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore"),  # Triton's, about its own defaults
]

KERNELS: dict[str, dict[str, int]] = {
    "edit": {"B": 1024},
    "scan": {"R": 1, "B": 1024, "G": 128, "S": 16},
    "gather": {"R": 1, "B": 1024, "G": 128, "N": 2048, "S": 16, "MOST": 4096},
    "select": {"R": 1, "B": 1024, "S": 16, "MOST": 4096},
    "accept": {"P": 8, "S": 16},
}
TYPES = {
    "*bf16": "logits",
    "*fp32": "edited scale_of peaks tempered plain tops values other_values own_out",
    "*fp64": "temperature_of p_of biases factors penalties",
    "*i64": "key_of",
    "i32": "stride size views tasks groups stretch width words blocks_of_row",
}
KINDS = {name: kind for kind, names in TYPES.items() for name in names.split()}  # others: pointers to int32


@pytest.mark.extended
@pytest.mark.parametrize("name", KERNELS)
def test_it_is_built_down_to_machine_code(name: str) -> None:
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wisp.engines.vllm import kernels

    function: Any = getattr(kernels, f"{name}_kernel")
    constants = KERNELS[name]
    names = inspect.signature(function.fn).parameters
    signature = {n: "constexpr" if n in constants else KINDS.get(n, "*i32") for n in names}
    built = build(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(built.asm["cubin"]) > 1000
    assert ".f64" in built.asm["ptx"] or name == "gather"
