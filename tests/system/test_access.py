"""Who may use a verifier or an edge: keys, limits, addresses, TLS."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from harness import HTTP, MODEL, Fleet, Peer, Process, Stream, ask, free_port, opening
from waiting import eventually
from wisp.core.protocol.messages import Refused

pytestmark = pytest.mark.slow

NULL: dict[str, Any] = {"target": "null", "engine": "null"}  # enough for keys
KEYS = """
[keys.alice]
secret = "alice-secret"

[keys.bob]
secret = "bob-secret"
requests_per_minute = 2

[keys.carol]
secret = "carol-secret"
sessions = 1
tokens_per_minute = 60
"""


@pytest.fixture(scope="module")
def key_file(shared: Fleet) -> Path:
    path = shared.folder / "keys.toml"
    path.write_text(KEYS)
    return path


@pytest.fixture(scope="module")
def server(tiny_pair: None, shared: Fleet, key_file: Path) -> Process:
    return shared.serve("--api-keys", str(key_file))


def test_everything_but_health_metrics_and_pages_needs_a_key(server: Process) -> None:
    for path in ("/health", "/metrics", "/"):
        assert httpx.get(f"{server.url}{path}", **HTTP).status_code == 200
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/tokenizers/x"):
        response = httpx.get(f"{server.url}{path}", **HTTP)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("", "wrong", "alice-secret "[:-2]):
        answer = ask(server.url, "Hi", key=key)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert ask(server.url, "Hi", key="alice-secret", max_tokens=2).status == 200


def test_the_sdk_reports_a_wrong_key_as_such(server: Process) -> None:
    http = openai.DefaultHttpxClient(trust_env=False)
    with (
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="wrong", max_retries=0, http_client=http
        ) as client,
        pytest.raises(openai.AuthenticationError, match="not known here"),
    ):
        client.models.list()


@pytest.mark.parametrize("key", ["", "wrong"])
def test_an_upgrade_without_the_right_key_is_refused_with_401(server: Process, key: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        Peer(server.url, key=key)
    assert refused.value.response.status_code == 401


@pytest.mark.parametrize("env", [{"WISP_API_KEY": "wrong"}, {}], ids=["wrong", "none"])
def test_an_edge_with_a_wrong_key_says_so_to_its_user(
    fleet: Fleet, server: Process, env: dict[str, str]
) -> None:
    edge = fleet.edge(server.url, draft="none", env=env, ready=False)
    eventually(lambda: "refused our key" in edge.log() or edge.health() == 503)
    answer = eventually(lambda: a if (a := ask(edge.url, "Hi")).error.get("code") else None)
    assert (answer.status, answer.error["code"]) == (502, "verifier_unauthorized")
    assert "WISP_API_KEY" in answer.error["message"]
    assert "Authorization" not in answer.error["message"] or not env


def test_limits_are_429_with_retry_after_for_thin_clients_and_through_an_edge(
    fleet: Fleet, server: Process
) -> None:
    edge = fleet.edge(server.url, draft="none", env={"WISP_API_KEY": "bob-secret"})
    for _ in range(2):
        assert ask(server.url, "Hi", key="bob-secret", max_tokens=2).status == 200
    for answer in (  # well before half a minute brings another request
        ask(server.url, "Hi", key="bob-secret"),
        ask(server.url, "Hi", key="bob-secret", stream=True),
        ask(edge.url, "Hi"),
        ask(edge.url, "Hi", stream=True),
    ):
        assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert "2 requests a minute" in answer.error["message"]


def test_a_key_may_have_so_many_sessions_and_tokens(server: Process) -> None:
    long: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "key": "carol-secret"}
    began = time.monotonic()
    with Stream(server.url, "Tell me a story.", **long) as first:
        first.until(lambda answer: bool(answer.text))
        second = ask(server.url, "Hi", key="carol-secret")
        assert (second.status, second.error["code"]) == (429, "rate_limit_exceeded")
        assert first.rest().usage["completion_tokens"] == 300  # what was admitted is finished
    overdrawn = ask(server.url, "Hi", key="carol-secret")
    assert overdrawn.status == 429
    took_s = time.monotonic() - began  # in which some of it was given back
    assert int(overdrawn.headers["retry-after"]) + took_s > 60


def test_limits_of_an_edges_own_keys_hold_at_the_edge_and_its_customers_share_no_prefix(
    fleet: Fleet, server: Process
) -> None:
    path = fleet.folder / "customers.toml"
    customers = [f'[keys.{name}]\nsecret = "{name}-pays"\n' for name in ("dave", "erin")]
    path.write_text(f"{customers[0]}requests_per_minute = 1\n{customers[1]}")
    edge = fleet.edge(server.url, "--api-keys", str(path), draft="none", env={"WISP_API_KEY": "alice-secret"})
    prompt = "What did the others ask? " * 4

    def read(key: str) -> float:
        """Prompt tokens that the verifier had to read for an answer."""
        before = server.metrics()["wisp:prompt_tokens_total"]
        assert ask(edge.url, prompt, key=key, max_tokens=2).status == 200
        return server.metrics()["wisp:prompt_tokens_total"] - before

    whole = read("dave-pays")
    for stream in (False, True, False):
        refused = ask(edge.url, prompt, key="dave-pays", stream=stream)
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert read("erin-pays") == whole
    assert read("erin-pays") < whole


def test_a_revoked_key_is_refused_everywhere_and_others_are_not(
    fleet: Fleet, server: Process, key_file: Path
) -> None:
    edge = fleet.edge(server.url, draft="none", env={"WISP_API_KEY": "alice-secret"})
    assert ask(edge.url, "Hi", max_tokens=2).status == 200
    key_file.write_text(KEYS.replace('"alice-secret"', '"another-secret"'))
    eventually(lambda: ask(server.url, "Hi", key="alice-secret", max_tokens=2).status == 401)
    answer = eventually(lambda: a if (a := ask(edge.url, "Hi", max_tokens=2)).status != 200 else None)
    assert answer.error["code"] == "verifier_unauthorized"
    assert ask(server.url, "Hi", key="another-secret", max_tokens=2).status == 200
    key_file.write_text("not TOML [")
    eventually(lambda: "the old keys stay in force" in server.log())
    assert ask(server.url, "Hi", key="another-secret", max_tokens=2).status == 200
    assert "ERROR   uvicorn" not in server.log()


@pytest.mark.modelless
def test_sessions_belong_to_the_key_that_opened_them(fleet: Fleet) -> None:
    path = fleet.folder / "two.toml"
    path.write_text('[keys.a]\nsecret = "a"\n[keys.b]\nsecret = "b"\n')
    server = fleet.serve("--api-keys", str(path), **NULL)
    with Peer(server.url, key="a") as mine, Peer(server.url, key="b") as theirs:
        mine.open("session-1")
        theirs.say(opening("session-1", epoch=1))
        assert theirs.refused().code == "forbidden"
        path.write_text('[keys.b]\nsecret = "b"\n')
        eventually(lambda: "read again" in server.log())
        mine.say(opening("session-2"))
        with pytest.raises(ConnectionClosed):  # the connection had outlived its key
            mine.hear()
        assert mine.socket.close_code == 4401
        theirs.open("session-3")


@pytest.mark.modelless
def test_a_single_key_from_the_environment_and_an_edges_own_key(fleet: Fleet) -> None:
    server = fleet.serve(env={"WISP_API_KEYS": "shared"}, **NULL)
    assert httpx.get(f"{server.url}/v1/models", **HTTP).status_code == 401
    with Peer(server.url, key="shared") as peer:
        assert not isinstance(peer.open("session-1"), Refused)
    path = fleet.folder / "edge.toml"
    path.write_text('[keys.me]\nsecret = "mine"\n')
    for flags, env in ((("--api-keys", str(path)), {}), ((), {"WISP_API_KEYS": "mine"})):
        edge = fleet.edge(server.url, *flags, draft="none", env={"WISP_API_KEY": "shared", **env})
        assert models(edge, "") == 401
        assert models(edge, "shared") == 401
        assert models(edge, "mine") != 401
    path.write_text('[keys.you]\nsecret = "yours"\n')
    edge = fleet.processes[1]
    eventually(lambda: models(edge, "mine") == 401)


def models(process: Process, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{process.url}/v1/models", headers=headers, **HTTP).status_code


# --- what cannot work ends at once, with one line that says what to do


@pytest.mark.modelless
def test_nobody_listens_beyond_loopback_without_a_key(fleet: Fleet) -> None:
    for command in (("serve", "--target", "null", "--engine", "null"), ("edge", "--draft", "none")):
        for host in ("0.0.0.0", "::"):
            ended = fleet.run(*command, "--host", host, "--port", str(free_port()))
            assert ended.returncode == 2
            assert "without an API key" in ended.stderr
            assert "--api-keys" in ended.stderr
            assert "Traceback" not in ended.stderr


@pytest.mark.modelless
def test_a_web_page_gets_nothing_from_a_process_without_keys(fleet: Fleet) -> None:
    server = fleet.serve(**NULL)
    edge = fleet.edge(server.url, draft="none")
    named = fleet.serve("--allowed-hosts", "wisp.example", **NULL)
    for process in (server, edge, named):
        for header in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            refused = httpx.get(f"{process.url}/v1/models", headers=header, **HTTP)
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] in ("host_not_allowed", "origin_not_allowed")
        assert httpx.get(f"{process.url}/v1/models", **HTTP).status_code == 200
    assert httpx.get(f"{named.url}/v1/models", headers={"host": "wisp.example"}, **HTTP).status_code == 200
    with pytest.raises(InvalidStatus) as refused_upgrade:
        connect(
            f"ws://127.0.0.1:{server.port}/v1/sessions", origin=Origin("https://evil.example"), proxy=None
        )
    assert refused_upgrade.value.response.status_code == 403


@pytest.mark.modelless
def test_mistakes_end_with_status_2_and_advice(fleet: Fleet, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    serve = ("serve", "--engine", "null", "--target", "null", "--port", str(free_port()))
    cases = [
        (("serve", "--target", "no-such-model"), "no model 'no-such-model'"),
        (("serve", "--target", "./no-such.gguf"), "no file"),
        ((*serve, "--tls-cert", str(junk)), "--tls-key"),
        ((*serve, "--tls-cert", str(junk), "--tls-key", str(tmp_path / "none")), "no such TLS file"),
        ((*serve, "--tls-cert", str(junk), "--tls-key", str(junk)), "TLS"),
        ((*serve, "--batching", "magic"), "magic"),
        ((*serve, "--log-level", "loud"), "loud"),
        ((*serve, "--api-keys", str(tmp_path / "none.toml")), "cannot read the API keys"),
        (("serve", "--engine", "abacus", "--target", "null"), "abacus"),
        (("edge", "--draft", "none", "--drafting", "wild"), "wild"),
        (("edge", "--draft", "none", "--server", "ftp://x"), "not an address"),
        (
            (
                "serve",
                "--no-such-flag",
            ),
            "no-such-flag",
        ),
    ]
    for command, advice in cases:
        ended = fleet.run(*command)
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), (command, ended.stderr)
        assert advice in ended.stderr, command


@pytest.mark.modelless
def test_a_taken_port_is_named(fleet: Fleet) -> None:
    server = fleet.serve(**NULL)
    for command in (("serve", "--target", "null", "--engine", "null"), ("edge", "--draft", "none")):
        ended = fleet.run(*command, "--port", str(server.port))
        assert ended.returncode == 2
        assert f"127.0.0.1:{server.port}" in ended.stderr
        assert "--port" in ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
@pytest.mark.modelless
def test_tls_from_client_to_edge_to_verifier(fleet: Fleet) -> None:
    cert, key = fleet.folder / "cert.pem", fleet.folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key)]
    subprocess.run([*new, "-out", str(cert), *subject], check=True, capture_output=True)
    server = fleet.serve("--tls-cert", str(cert), "--tls-key", str(key), ready=False, **NULL)
    url = f"https://127.0.0.1:{server.port}"
    edge = fleet.edge(url, draft="ngram", env={"SSL_CERT_FILE": str(cert)})
    answer = ask(edge.url, "Tell me a story about Belomi.", stream=True, model="null")
    assert answer.status == 200
    assert answer.text
    stranger = fleet.edge(url, "--give-up-s", "0.5", draft="none", ready=False)
    failed = eventually(lambda: a if stranger.health() and (a := ask(stranger.url, "Hi")) else None)
    assert failed.status == 503
    assert "certificate" in failed.error["message"]
