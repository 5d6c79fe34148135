"""`wisp serve --engine emulated`: a verifier without a model, as thin clients and edges meet it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import DefaultHttpxClient, OpenAI

from harness import HTTP, Fleet, Peer, Process, ask, free_port
from waiting import eventually
from wisp.core.protocol.sampling import Sampling
from wisp.engines.emulated import fold
from wisp.engines.null import null_token

pytestmark = [pytest.mark.slow, pytest.mark.modelless]

NAME = "quick"
HARDWARE = """
about = "a model of nothing on hardware that is nearly not there"
parameters = 0.5
layers = 24
heads = 14
kv_heads = 2
head_dim = 64
bandwidth = 1000
tflops = 100
launch_ms = 1.0
kv_tokens = 20000
slots = 16
slot_tokens = 2048
"""
CLASSES = """
[patient]
ttft_ms = 30000
tpot_ms = 10000

[impossible]
tpot_ms = 0.001
"""


@pytest.fixture
def hardware(fleet: Fleet) -> str:
    path = fleet.folder / f"{NAME}.toml"
    path.write_text(HARDWARE)
    return str(path)


def test_a_thin_client_is_answered_and_its_slo_is_counted(fleet: Fleet, hardware: str) -> None:
    classes = fleet.folder / "classes.toml"
    classes.write_text(CLASSES)
    server = fleet.serve("--slo-classes", str(classes), target=hardware, engine="emulated")
    wire = DefaultHttpxClient(**HTTP)
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=wire)

    def complete(**headers: str) -> str:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = client.completions.create(
            model=NAME, prompt="abc", max_tokens=20, seed=7, extra_headers=named, logprobs=None
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 20
        return answer.choices[0].text

    texts = {
        complete(),
        complete(x_slo_class="patient"),
        complete(x_slo_class="impossible"),
        complete(x_slo_class="impossible", x_slo_tpot_ms="20000"),
        complete(x_slo_ttft_ms="30000"),
    }
    prompt_seed = fold(b"abc", 7)
    expected = bytes(null_token(prompt_seed, i) for i in range(20)).decode("utf-8", "replace")
    assert texts == {expected}
    with pytest.raises(Exception, match=r"x-slo-class.*this server has impossible, patient"):
        complete(x_slo_class="nobody")
    wire.close()

    def all_counted() -> dict[str, float]:
        metrics = server.metrics()
        return metrics if metrics['wisp:admission_total{outcome="admitted"}'] == 5 else {}

    seen = eventually(all_counted)
    slo = 'wisp:request_slo_total{outcome="%s",slo_class="%s"}'
    assert seen[slo % ("met", "patient")] == 1
    assert seen[slo % ("missed", "impossible")] == 1
    assert seen[slo % ("met", "impossible")] == 1  # the header's target was kept
    assert seen[slo % ("met", "")] == 1
    assert seen['wisp:request_goodput_tokens_total{slo_class="patient"}'] == 20
    assert seen['wisp:engine_step_slices_count{kind="decode"}'] > 60
    assert seen["wisp:verification_interference_seconds_count"] >= 60
    assert seen["wisp:request_slo_lost_total"] >= 1
    assert 0.0 <= seen["wisp:cost_model_relative_error"] < 5.0
    assert 1.0 <= seen["wisp:cost_model_margin"] <= 2.0
    assert seen['wisp:slack_at_dispatch_seconds_bucket{le="+Inf"}'] > 20
    assert "wisp:draft_token_price" in seen


def test_a_front_hands_engine_and_slo_classes_to_its_replicas(fleet: Fleet, hardware: str) -> None:
    classes = fleet.folder / "classes.toml"
    classes.write_text(CLASSES)
    flags = ("--replicas", "2", "--slo-classes", str(classes), "--kv-tokens", "5000")
    router = fleet.serve(*flags, target=hardware, engine="emulated", ready=False)
    eventually(lambda: router.health() == 200)
    edge = fleet.edge(router.url, draft="ngram")
    job: dict[str, Any] = {"seed": 7, "model": NAME, "max_tokens": 20}
    thin, drafted = ask(router.url, "abc", **job), ask(edge.url, "abc", **job)
    assert thin.text == drafted.text
    assert thin.usage["completion_tokens"] == 20
    body = {"model": NAME, "prompt": "abc", "max_tokens": 5}

    def status(of: str) -> int:
        url = f"{router.url}/v1/completions"
        return httpx.post(url, json=body, headers={"x-slo-class": of}, **HTTP).status_code

    assert [status("patient"), status("nobody")] == [200, 400]
    assert router.metrics()['wisp:request_slo_total{outcome="met",slo_class="patient"}'] == 1


def test_an_edge_with_ngrams_says_what_the_verifier_alone_says(fleet: Fleet, hardware: str) -> None:
    server = fleet.serve(target=hardware, engine="emulated")
    edge = fleet.edge(server.url, draft="ngram")
    ours = ask(edge.url, "count to three", seed=11, model=NAME, max_tokens=40)
    alone = ask(server.url, "count to three", seed=11, model=NAME, max_tokens=40)
    assert ours.text == alone.text
    assert ours.finish == alone.finish == "length"
    for count in ("prompt_tokens", "completion_tokens"):  # what was cached depends on who asked first
        assert ours.usage[count] == alone.usage[count]


def test_traces_are_the_text_and_numbers_its_letters(fleet: Fleet, hardware: str) -> None:
    traces = Path(__file__).parents[2] / "data" / "traces"
    flags = ("--traces", str(traces), "--output-tokens", "30-60", "--acceptance", "0.8")
    server = fleet.serve(*flags, "--kv-tokens", "5000", target=hardware, engine="emulated")
    edge = fleet.edge(server.url, draft="ngram")
    ours = ask(edge.url, "17 4 anything", seed=3, model=NAME, max_tokens=200)
    alone = ask(server.url, "something else entirely", seed=3, model=NAME, max_tokens=200)
    assert ours.text == alone.text  # scripts go by seed
    assert ours.finish == "stop"
    assert 30 <= ours.usage["completion_tokens"] <= 60
    words = ours.text.split()
    assert len(words) == ours.usage["completion_tokens"] - 1
    assert all(word.isdigit() for word in words)
    with Peer(server.url) as peer:
        heard = peer.open("session-by-hand", sampling=Sampling(seed=3), max_tokens=10, draft=[int(words[0])])
        assert heard.accepted == 1
        assert heard.tokens == [int(w) for w in words[:2]]


def test_mistakes_are_named(fleet: Fleet, hardware: str) -> None:
    def said(*flags: str) -> str:
        done = fleet.run("serve", "--port", "0", *flags)
        assert done.returncode == 2, done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "unknown hardware profile 'a200'" in said("--target", "a200", "--engine", "emulated")
    assert "--kv-tokens is for --engine emulated" in said("--target", "tiny-target", "--kv-tokens", "100")
    assert "--traces and --acceptance are for" in said("--target", "tiny-target", "--acceptance", "0.5")
    emulated = ("--target", hardware, "--engine", "emulated")
    assert "give --traces too" in said(*emulated, "--acceptance", "0.5")
    assert "--output-tokens 9-3" in said(*emulated, "--traces", "data/traces", "--output-tokens", "9-3")
    from_traces = (*emulated, "--traces", str(Path(__file__).parents[2] / "data" / "traces"))
    assert "--traces does not go with replicas" in said(*from_traces, "--replicas", "2")
    bad = fleet.folder / "cost.json"
    bad.write_text('{"step": 1.0}')
    assert "no cost profile: look at 'token'" in said(*emulated, "--cost", str(bad))
    bad.write_text("[nobody]\nttft = 3\n")
    assert "[nobody]: Object contains unknown field `ttft`" in said(*emulated, "--slo-classes", str(bad))


def test_slo_classes_may_be_tables_of_the_config(fleet: Fleet, hardware: str) -> None:
    config = fleet.folder / "wisp.toml"
    tables = '[serve]\ntarget = "%s"\nengine = "emulated"\n[serve.slo-classes.hurry]\ntpot_ms = 5000\n'
    config.write_text(tables % hardware)
    port = free_port()
    words = ["--config", str(config), "serve", "--port", str(port)]
    server = Process("configured", words, port, fleet.environment(), fleet.folder / "configured.log")
    fleet.processes.append(server)
    server.wait_ready()
    headers = {"x-slo-class": "hurry"}
    body = {"model": NAME, "prompt": "abc", "max_tokens": 5}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, **HTTP).status_code == 200
    assert server.metrics()['wisp:request_slo_total{outcome="met",slo_class="hurry"}'] == 1


def test_an_edge_knows_classes_of_its_own(fleet: Fleet, hardware: str) -> None:
    classes = fleet.folder / "classes.toml"
    classes.write_text(CLASSES)
    server = fleet.serve(target=hardware, engine="emulated")
    edge = fleet.edge(server.url, "--slo-classes", str(classes), draft="none")

    def complete(slo_class: str) -> httpx.Response:
        body = {"model": NAME, "prompt": "abc", "max_tokens": 5}
        return httpx.post(f"{edge.url}/v1/completions", json=body, headers={"x-slo-class": slo_class}, **HTTP)

    assert complete("patient").status_code == 200
    slo = 'wisp:request_slo_total{outcome="met",slo_class="patient"}'
    eventually(lambda: edge.metrics().get(slo) == 1)
    refused = complete("nobody")
    assert refused.status_code == 400
    assert "impossible, patient" in refused.json()["error"]["message"]


def test_an_edge_finds_its_drafter_by_itself(fleet: Fleet, hardware: str) -> None:
    server = fleet.serve(target=hardware, engine="emulated")
    edge = fleet.edge(server.url, draft="auto")
    assert "drafter: not tiny-draft: its vocabulary is not that of quick" in edge.log()
    assert "drafter: n-grams, since no model on this device will do" in edge.log()
    assert ask(edge.url, "count", seed=11, model=NAME, max_tokens=5).status == 200
