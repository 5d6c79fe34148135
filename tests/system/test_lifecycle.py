"""A process's life: configured, loading, ready, serving, draining, gone."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from harness import HTTP, MODE, MODEL, TARGET, Fleet, Process, Stream, ask, free_port
from waiting import eventually
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.engines.models import resolve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_pair")]

LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}
NULL: dict[str, Any] = {"target": "null", "engine": "null"}


@pytest.fixture(scope="module")
def server(shared: Fleet) -> Process:
    """One that may be loading its model yet."""
    return shared.serve(ready=False)


def test_health_is_200_only_once_the_model_is_loaded(server: Process) -> None:
    seen = set()

    def loaded() -> bool:
        seen.add(status := server.health())
        if status == 503:
            early = ask(server.url, "Hi", max_tokens=1)
            assert early.status in (200, 503)
            if early.status == 503:
                assert int(early.headers["retry-after"]) >= 1
        return status == 200

    eventually(loaded)
    assert seen <= {0, 503, 200}
    body = httpx.get(f"{server.url}/health", **HTTP).json()
    assert (body["status"], body["model"], body["mode"]) == ("ok", MODEL, MODE)


def test_an_edge_is_healthy_once_its_verifier_is(fleet: Fleet) -> None:
    port = free_port()
    edge = fleet.edge(f"http://127.0.0.1:{port}", draft="none", ready=False)
    eventually(lambda: edge.health() == 503)
    server = fleet.serve(port=port)
    edge.wait_ready()
    assert ask(edge.url, "Hi", max_tokens=3).status == 200
    server.terminate()
    assert server.wait() == 0
    eventually(lambda: edge.health() == 503)
    edge.terminate()
    assert edge.wait() == 0


def test_sigterm_lets_open_answers_finish_and_refuses_new_ones(fleet: Fleet) -> None:
    server = fleet.serve("--context", "1024")
    edge = fleet.edge(server.url, draft="ngram")
    alone = ask(server.url, "Tell me a story.", **LONG)
    with (
        Stream(server.url, "Tell me a story.", **LONG) as s,
        Stream(edge.url, "Tell me a story.", **LONG) as e,
    ):
        s.until(lambda answer: bool(answer.text))
        e.until(lambda answer: bool(answer.text))
        server.terminate()
        eventually(lambda: server.health() == 503)
        refused = ask(server.url, "Hi")
        assert (refused.status, refused.error["type"]) == (503, "server_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert s.rest().text == alone.text
        assert e.rest().text == alone.text
    assert server.wait() == 0
    assert "Traceback" not in server.log()


def test_a_second_sigterm_ends_at_once(fleet: Fleet) -> None:
    server = fleet.serve("--context", "1024")
    with Stream(server.url, "Tell me a story.", **LONG) as s:
        s.until(lambda answer: bool(answer.text))
        server.terminate()
        eventually(lambda: "draining" in server.log())
        server.terminate()
        assert server.wait() == 1  # an answer was cut off
    assert "Traceback" not in server.log()


def test_a_drain_is_over_after_the_stated_time(fleet: Fleet) -> None:
    server = fleet.serve("--drain-s", "0.2", "--context", "1024", "--slots", "1")
    with Stream(server.url, "Tell me a story.", **LONG) as s:
        s.until(lambda answer: bool(answer.text))
        server.terminate()
        assert server.wait() == 0


# --- configuration


@pytest.mark.modelless
def test_a_toml_file_sets_flags_and_the_command_line_wins(fleet: Fleet) -> None:
    ports = [free_port(), free_port()]
    path = fleet.folder / "wisp.toml"
    path.write_text(f'[serve]\ntarget = "null"\nengine = "null"\nport = {ports[0]}\nmax-sessions = 7\n')
    environment = fleet.environment()
    first = Process("toml", ["--config", str(path), "serve"], ports[0], environment, fleet.folder / "a.log")
    words = ["--config", str(path), "serve", "--port", str(ports[1])]
    second = Process("toml-and-flag", words, ports[1], environment, fleet.folder / "b.log")
    fleet.processes += [first, second]
    assert first.wait_ready().health() == 200
    assert second.wait_ready().health() == 200


@pytest.mark.modelless
def test_a_bad_configuration_file_is_explained(fleet: Fleet) -> None:
    path = fleet.folder / "wisp.toml"
    for text, advice in (
        ("[serve", "cannot read"),
        ("[sevre]\nport = 1\n", "is not a command"),
        ("[serve]\nprot = 1\n", "prot"),
        ('[serve]\ntarget = "null"\nport = "many"\n', "port"),
    ):
        path.write_text(text)
        ended = fleet.run("--config", str(path), "serve")
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
        assert advice in ended.stderr


@pytest.mark.modelless
def test_environment_variables_set_flags(fleet: Fleet) -> None:
    port = free_port()
    settings = {"WISP_SERVE_TARGET": "null", "WISP_SERVE_ENGINE": "null", "WISP_SERVE_PORT": str(port)}
    server = Process("environment", ["serve"], port, fleet.environment(settings), fleet.folder / "a.log")
    fleet.processes.append(server)
    server.wait_ready()


@pytest.mark.modelless
def test_help_says_how_environment_variables_are_named(fleet: Fleet) -> None:
    for command in ("serve", "edge", "generate", "pull"):
        shown = fleet.run(command, "--help").stdout
        assert len(re.findall(r"^│ \*? *(--[a-z-]+)", shown, re.MULTILINE)) >= 3 - (command == "pull")
        named = re.search(r"Each option has an environment variable: (\S+)\s+for\s+--(\S+),", shown)
        assert named is not None, shown
        assert named[1] == f"WISP_{command}_{named[2]}".replace("-", "_").upper()
    assert fleet.run("--version").stdout.startswith("wisp ")


# --- generate


def test_generate_prints_the_tokens_that_a_thin_client_gets(fleet: Fleet, server: Process) -> None:
    server.wait_ready()
    tokenizer = LlamaTokenizer.open(resolve(TARGET))
    prompt = "Write code to sort a lamp."
    sampled = ("--temperature", "0.9", "--seed", "5", "--top-p", "0.9")
    for draft in ("none", "ngram"):
        ended = fleet.run(
            "generate",
            prompt,
            "--server",
            server.url,
            "--draft",
            draft,
            *sampled,
            "--max-tokens",
            "30",
            "--json",
        )
        assert ended.returncode == 0, ended.stderr
        report = json.loads(ended.stdout)
        thin = ask(server.url, prompt, temperature=0.9, seed=5, top_p=0.9, max_tokens=30, logprobs=True)
        shown = [t for t in report["tokens"] if t not in tokenizer.eos]
        assert [tokenizer.piece(t) for t in shown] == thin.token_bytes
        assert report["text"] == thin.text
        assert report["finish_reason"] == thin.finish
        assert report["seed"] == 5
        assert report["usage"]["completion_tokens"] == thin.usage["completion_tokens"]
    tokenizer.close()
    plain = fleet.run("generate", prompt, "--server", server.url, "--max-tokens", "10")
    assert plain.returncode == 0
    assert plain.stdout.strip() == ask(server.url, prompt, max_tokens=10).text.strip()
    assert f"[{MODEL}: 10 tokens" in plain.stderr


@pytest.mark.modelless
def test_generate_explains_what_is_wrong(fleet: Fleet) -> None:
    server = fleet.serve(env={"WISP_API_KEYS": "secret"}, **NULL)
    ended = fleet.run("generate", "Hi", "--server", server.url)
    assert ended.returncode == 2
    assert "WISP_API_KEY" in ended.stderr
    assert "Traceback" not in ended.stderr
