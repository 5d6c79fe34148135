"""The library is the one these declarations were written for, or it is not used at all."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from wisp.core.errors import EngineError
from wisp.engines.llama import capi


def test_the_shared_object_loads_without_its_python_module() -> None:
    capi.api()
    assert "xllamacpp" not in sys.modules
    assert capi.api() is capi.api()


def test_another_version_is_refused_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2027.1.1")
    with pytest.raises(EngineError, match=rf"2027\.1\.1.*pip install xllamacpp=={capi.PIN}"):
        capi._shared_object()


@pytest.mark.parametrize("field", ["use_extra_bufts", "load_mode", "n_gpu_layers", "devices"])
def test_defaults_that_read_back_wrong_are_refused(field: str) -> None:
    ffi, lib = capi.api().ffi, capi.api().lib
    params = lib.llama_model_default_params()
    setattr(
        params,
        field,
        ffi.cast("void *", 8) if field == "devices" else 5 if field != "use_extra_bufts" else False,
    )
    with pytest.raises(EngineError, match=rf"llama_model_params\.{field} reads"):
        capi._check_defaults(ffi, "llama_model_params", params, capi._MODEL_DEFAULTS)


def test_warnings_and_errors_are_kept_and_continued_lines_joined() -> None:
    log = capi.Log()
    for level, text in [
        (2, "loading\n"),
        (5, "...\n"),
        (4, "cannot "),
        (5, "open\n"),
        (3, "careful\n"),
        (1, "x\n"),
    ]:
        log.add(level, text)
    assert log.tail() == "cannot open; careful"
    log.clear()
    assert log.tail() == ""
