"""What only `--engine vllm` has: models in Hugging Face's format, and more than one worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

import wisp.engines
from harness import ENGINE, START_S, Fleet, ask
from hf_files import tokenizer_files
from waiting import eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ENGINE != "vllm", reason="--engine vllm is not under test"),
]
TINY = Path(wisp.engines.__file__).parent / "data" / "tiny-target.gguf"
WAYS: list[dict[str, Any]] = [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}]
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target as the hub would have it: a tokenizer.json, and no GGUF file anywhere."""
    from wisp.engines.vllm.converting import TOKENIZER, convert

    folder = tmp_path_factory.mktemp("models") / "tiny-target"
    folder.mkdir()
    convert(TINY, folder)
    (folder / TOKENIZER).unlink()
    tokenizer_files(TINY, folder)
    return folder


def test_a_folder_of_the_hub_split_over_two_workers(fleet: Fleet, folder: Path) -> None:
    """Tokenizer and template come from tokenizer.json, and the edge's GGUF drafter has the same vocabulary."""
    server = fleet.serve("--tensor-parallel", "2", target=str(folder), env=TWO)
    one = fleet.serve(engine="llama.cpp")
    edge = fleet.edge(server.url)
    for parameters in WAYS:
        prompt = "Tell me a story about Belomi."
        drafted, plain = ask(edge.url, prompt, **parameters), ask(server.url, prompt, **parameters)
        assert drafted.spec["num_accepted_draft_tokens"] > 0
        assert drafted.text == plain.text == ask(one.url, prompt, **parameters).text
    assert [p.suffix for p in (fleet.folder / "cache" / "tokenizers").iterdir()] == [".json"]

    workers = psutil.Process(server.pid).children(recursive=True)
    victim = next(p for p in workers if "Worker" in p.name())
    os.kill(victim.pid, signal.SIGKILL)
    assert ask(server.url, "And then?").status >= 500
    eventually(lambda: server.popen.poll() is not None)
    assert server.popen.returncode == 2
    assert "wisp: a worker process of vLLM has died; start the verifier again" in server.log()
    assert "Belomi" not in server.log()


def test_replicas_of_it_behind_a_router(fleet: Fleet, folder: Path) -> None:
    """The router reads the hub's kind of tokenizer, and engine options reach the replicas, which have two steps in
    flight."""
    flags = ("--replicas", "2", "--gpu-memory", "0.8", "--depth", "2")
    router = fleet.serve(*flags, target=str(folder), ready=False)
    eventually(lambda: router.health() == 200, START_S)
    edge = fleet.edge(router.url)
    for parameters in WAYS:
        prompt = "Tell me a story about Belomi."
        drafted, thin = ask(edge.url, prompt, **parameters), ask(router.url, prompt, **parameters)
        assert drafted.spec["num_accepted_draft_tokens"] > 0
        assert drafted.text == thin.text
