"""What breaks while text is being generated: clients, edges, lines, verifiers. The text is never wrong."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from harness import DRAFT, Answer, Cutter, Fleet, Process, Stream, ask, body_of
from waiting import PATIENCE_S, eventually

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_pair")]

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
ENDLESS: dict[str, Any] = {"max_tokens": 950, "ignore_eos": True}  # longer than it takes to look at metrics


def longer_than(n: int) -> Callable[[Answer], bool]:
    return lambda answer: len(answer.text) > n


def lost_more_than(edge: Process, n: int) -> bool:
    return edge.metrics()["wisp:verifier_connections_lost"] > n


def idle(server: Process) -> bool:
    """Nothing runs, waits or is parked, and no live session holds KV."""
    m = server.metrics()
    names = ("num_requests_running", "num_requests_waiting", "num_requests_parked", "kv_cache_usage_perc")
    return all(m[f"wisp:{name}"] == 0 for name in names)


def running(server: Process) -> float:
    return server.metrics()["wisp:num_requests_running"]


@pytest.fixture(scope="module")
def server(tiny_pair: None, shared: Fleet) -> Process:
    return shared.serve("--park-s", "1", "--context", "1024")


@pytest.fixture(scope="module")
def edge(shared: Fleet, server: Process) -> Process:
    return shared.edge(server.url)


@pytest.mark.parametrize("at", ["server", "edge"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_work_along(
    server: Process, edge: Process, at: str, stream: bool
) -> None:
    asked = server if at == "server" else edge
    committed = server.metrics()["wisp:generation_tokens_total"]
    if stream:
        with Stream(asked.url, "Tell me a story.", **ENDLESS) as s:
            s.until(lambda answer: len(answer.text) > 5)
    else:
        body = json.dumps(body_of("Tell me a story.", **ENDLESS))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", asked.port)) as client:
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            eventually(lambda: server.metrics()["wisp:generation_tokens_total"] > committed)
    eventually(lambda: idle(server))
    assert server.metrics()["wisp:generation_tokens_total"] - committed < ENDLESS["max_tokens"]
    assert asked.health() == 200


@pytest.mark.parametrize("park_s", ["600", "0.1"])
def test_an_edge_that_is_killed_leaves_parked_sessions_that_are_freed(fleet: Fleet, park_s: str) -> None:
    server = fleet.serve("--park-s", park_s)
    edge = fleet.edge(server.url)
    with Stream(edge.url, "Tell me a story.", **LONG) as one, Stream(edge.url, "Another.", **LONG) as two:
        one.until(lambda answer: len(answer.text) > 5)
        two.until(lambda answer: len(answer.text) > 5)
        edge.kill()
    if float(park_s) > PATIENCE_S:
        eventually(lambda: server.metrics()["wisp:num_requests_parked"] == 2)
    else:
        eventually(lambda: idle(server))


def test_a_line_that_drops_in_the_middle_of_a_round_loses_nothing(fleet: Fleet, server: Process) -> None:
    sampled: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": 0.8, "seed": 5}
    alone = ask(server.url, "Tell me a story about Belomi.", **sampled)
    with Cutter(server.port, seed=1, budget=(10**9, 10**9)) as line:
        edge = fleet.edge(line.url)
        with Stream(edge.url, "Tell me a story about Belomi.", **sampled) as s:
            for cuts, length in enumerate((20, 60, 100)):
                s.until(longer_than(length))
                eventually(lambda: edge.health() == 200)
                line.cut()
                eventually(partial(lost_more_than, edge, cuts))
            answer = s.rest()
    assert (answer.text, answer.finish) == (alone.text, alone.finish)
    assert answer.usage["completion_tokens"] == 300
    eventually(lambda: idle(server))


def test_a_verifier_killed_and_restarted_goes_on_where_it_was(fleet: Fleet) -> None:
    server = fleet.serve()
    edge = fleet.edge(server.url)
    prompts = [(f"Story number {i}.", {"temperature": 0.3 * i, "seed": i}) for i in range(4)]
    alone = [ask(server.url, prompt, **LONG | p) for prompt, p in prompts]
    streams = [Stream(edge.url, prompt, **LONG | p) for prompt, p in prompts]
    for s in streams:
        s.until(lambda answer: len(answer.text) > 10)
    server.kill()
    for s in streams:  # nothing comes but signs of life
        s.until(lambda answer: answer.comments >= 2)
    assert edge.health() == 503
    server.start()
    answers = [s.rest() for s in streams]
    assert [a.text for a in answers] == [a.text for a in alone]
    assert all(a.done and a.usage["completion_tokens"] == 400 for a in answers)
    eventually(lambda: idle(server))


def test_without_a_verifier_answers_fail_clearly_and_in_time(fleet: Fleet) -> None:
    server = fleet.serve()
    edge = fleet.edge(server.url, "--give-up-s", "1", draft="none")
    with Stream(edge.url, "Tell me a story.", **LONG) as s:
        s.until(lambda answer: len(answer.text) > 10)
        server.kill()
        begun = s.rest()
    assert begun.error["code"] == "verifier_unavailable"
    assert begun.error["type"] == "server_error"
    assert not begun.done
    fresh = ask(edge.url, "Anyone?")
    assert (fresh.status, fresh.error["code"]) == (503, "verifier_unavailable")
    assert int(fresh.headers["retry-after"]) >= 1
    assert "wisp serve" in fresh.error["message"]
    server.start()
    eventually(lambda: edge.health() == 200)
    assert ask(edge.url, "Anyone?").status == 200


def test_more_sessions_than_kv_holds_are_all_right(fleet: Fleet) -> None:
    server = fleet.serve("--slots", "2")
    edge = fleet.edge(server.url)
    jobs: list[tuple[str, dict[str, Any]]] = [
        (f"Make a list for {i}.", {"temperature": 0.8 * (i % 2), "seed": i}) for i in range(12)
    ]
    alone = [ask(server.url, prompt, **p) for prompt, p in jobs]
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda j: ask((edge, server)[j[1]["seed"] % 3 == 0].url, j[0], stream=True, **j[1]), jobs
            )
        )
    assert [(a.status, a.text) for a in answers] == [(200, a.text) for a in alone]
    eventually(lambda: idle(server))


def test_many_sessions_on_several_edges_survive_broken_lines_and_a_dead_verifier(fleet: Fleet) -> None:
    """8 sessions on one edge, 3 edges, random disconnects in mid-frame, one kill -9 of the verifier."""
    server = fleet.serve("--slots", "8")
    sampling: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_p": 0.9},
    ]
    jobs: list[tuple[str, dict[str, Any]]] = [
        (f"Tell me {i} of Tavoku.", {"max_tokens": 100, "seed": i, "ignore_eos": True, **sampling[i % 3]})
        for i in range(24)
    ]
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda job: ask(server.url, job[0], **job[1]), jobs))
    ask(
        fleet.edge(server.url, draft="none").url, "Hello"
    )  # the tokenizer is here before lines begin to break
    lines = [Cutter(server.port, seed=n) for n in range(3)]
    edges = [
        fleet.edge(line.url, draft=kind, drafting=drafting, ready=False)
        for line, kind, drafting in zip(
            lines, (DRAFT, DRAFT, "ngram"), ("fixed:4", "gain", "predictor"), strict=True
        )
    ]
    for edge in edges:
        edge.wait_ready()

    begun = threading.Semaphore(0)

    def work(number: int) -> Answer:
        prompt, parameters = jobs[number]
        with Stream(edges[number // 8].url, prompt, **parameters) as s:
            s.until(lambda answer: len(answer.text) > random.Random(number).randint(1, 60))
            begun.release()
            return s.rest()

    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(work, n) for n in range(24)]
        for _ in range(6):
            assert begun.acquire(timeout=PATIENCE_S)
        server.kill()
        server.start()
        texts = [answer.result(PATIENCE_S).text for answer in answers]
    assert texts == [answer.text for answer in alone]
    assert sum(line.broken for line in lines) >= 10
    assert all(edge.metrics()["wisp:verifier_connections_lost"] >= 2 for edge in edges)
    eventually(lambda: idle(server))
    for line in lines:
        line.__exit__()


@pytest.mark.modelless
def test_an_edge_with_another_vocabulary_is_told_so(fleet: Fleet) -> None:
    server = fleet.serve("--max-sessions", "8", engine="null", target="null")
    edge = fleet.edge(server.url, ready=False)
    answer = eventually(
        lambda: a if (a := _asked(edge)) and a.error.get("code") == "vocabulary_mismatch" else None
    )
    assert answer.status == 502
    assert "ngram or none" in answer.error["message"]
    assert edge.health() == 503


def _asked(edge: Process) -> Answer | None:
    return ask(edge.url, "Hi") if edge.health() else None
