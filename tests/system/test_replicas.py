"""Several verifiers behind one router: every text is the target's own, whatever becomes of the replicas.

The same scenarios with replicas as child processes and, marked `ray`, as Ray actors.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from harness import (
    DRAFT,
    ENGINE,
    HTTP,
    TARGET,
    Answer,
    Fleet,
    Peer,
    Process,
    Stream,
    ask,
    free_port,
    opening,
)
from waiting import PATIENCE_S, eventually
from wisp.api.backend import Generation
from wisp.calibrate.traces.prompts import Prompt
from wisp.calibrate.traces.record import Recording, Settings
from wisp.core.draft.policies import Policies
from wisp.core.protocol.messages import VERSION, Cancel, Draft, Hello, Redirect, Refused
from wisp.core.protocol.sampling import Sampling
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.engines.base import Tokenizer
from wisp.engines.build import served_name
from wisp.engines.models import resolve
from wisp.engines.null import null_token
from wisp.sim.fleet import run_live
from wisp.sim.report import Report
from wisp.sim.scenario import Kit, Scenario, SloClass
from wisp.sim.systems import system

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("tiny_pair"),
    pytest.mark.skipif(ENGINE != "llama.cpp", reason="another engine is under test, which starts too slowly"),
]

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
NULL: dict[str, Any] = {"target": "null", "engine": "null"}
TOKENS = 800  # of a session without a model: seconds of work for three hundred
LAUNCHERS = ["local", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Router:
    """A router and what one does to it."""

    def __init__(
        self,
        fleet: Fleet,
        *flags: str,
        replicas: int = 2,
        launcher: str = "local",
        key: str = "",
        **more: Any,
    ) -> None:
        self.key = key
        words = ("--replicas", str(replicas), "--launcher", launcher)
        self.process: Process = fleet.serve(*words, *flags, ready=False, **more)
        eventually(lambda: self.process.health() == 200)
        self.wait_up(replicas)

    @property
    def url(self) -> str:
        return self.process.url

    def admin(self, action: str = "", body: dict[str, Any] | None = None, key: str = "") -> httpx.Response:
        key = key or self.key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.url}/v1/replicas{action}"
        if body is None:
            return httpx.get(url, headers=headers, **HTTP)
        return httpx.post(url, json=body, headers=headers, **HTTP)

    def replicas(self) -> dict[str, dict[str, Any]]:
        return {r["name"]: r for r in self.admin().json()["replicas"]}

    def up(self) -> list[str]:
        return [name for name, r in self.replicas().items() if r["state"] == "up"]

    def wait_up(self, count: int) -> None:
        eventually(lambda: len(self.up()) == count)

    def pid(self, name: str) -> int:
        """Of the replica's process."""
        return int(re.findall(rf"replica {name} is process (\d+)", self.process.log())[-1])

    def kill(self, name: str) -> None:
        """kill -9."""
        os.kill(self.pid(name), signal.SIGKILL)

    def placed(self, **labels: str) -> dict[str, float]:
        """Placements by replica, of those with these labels."""
        found: dict[str, float] = {}
        for sample, value in self.process.metrics().items():
            if sample.startswith("wisp:placements_total") and all(
                f'{k}="{v}"' in sample for k, v in labels.items()
            ):
                replica = re.findall(r'replica="(\w+)"', sample)[0]
                found[replica] = found.get(replica, 0.0) + value
        return found

    def idle(self) -> bool:
        return all(r["sessions"] == 0 for r in self.replicas().values())


def jobs_of(count: int) -> list[tuple[str, dict[str, Any]]]:
    sampling = [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9}]
    return [
        (f"Tell me {i} of Tavoku.", {"max_tokens": 120, "seed": i, "ignore_eos": True, **sampling[i % 3]})
        for i in range(count)
    ]


def alone(server: Process, jobs: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What a single verifier says."""
    with ThreadPoolExecutor(4) as pool:
        return [a.text for a in pool.map(lambda job: ask(server.url, job[0], **job[1]), jobs)]


def all_of(
    urls: list[str], jobs: list[tuple[str, dict[str, Any]]], meanwhile: Callable[[], None]
) -> list[str]:
    """Every job as a stream, all at once, while something happens: that begins before the last is open."""

    def answer(number: int) -> Answer:
        prompt, parameters = jobs[number]
        return Stream(urls[number % len(urls)], prompt, **parameters).rest()

    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = [pool.submit(answer, number) for number in range(len(jobs))]
        meanwhile()
        done = [answer.result(PATIENCE_S) for answer in answers]
    assert [a.status for a in done] == [200] * len(jobs)
    assert all(a.done and not a.error for a in done), [a.error for a in done if a.error]
    return [a.text for a in done]


def balanced(counts: dict[str, float]) -> bool:
    """Within 20 % of the mean."""
    mean = sum(counts.values()) / len(counts)
    return all(0.8 * mean <= n <= 1.2 * mean for n in counts.values())


def test_a_replica_killed_in_the_middle_costs_no_session_and_no_token(fleet: Fleet, launcher: str) -> None:
    jobs = jobs_of(20)
    single = fleet.serve()
    truth = alone(single, jobs)
    single.terminate()
    router = Router(fleet, launcher=launcher)
    edges = [fleet.edge(router.url, draft=kind) for kind in (DRAFT, "ngram", "none")]

    def meanwhile() -> None:
        eventually(lambda: sum(router.placed().values()) >= 12)
        router.kill("r1")

    texts = all_of([*(edge.url for edge in edges), router.url], jobs, meanwhile)  # the last are thin clients
    assert texts == truth
    router.wait_up(2)
    assert router.replicas()["r1"]["restarts"] == 1
    assert router.process.metrics()['wisp:replica_restarts_total{replica="r1"}'] == 1
    assert sum(router.placed().values()) > len(jobs)  # some were placed twice
    eventually(router.idle)
    assert ask(edges[0].url, "Hi", max_tokens=3).status == 200


def test_a_drain_moves_sessions_and_a_scale_up_takes_new_ones(fleet: Fleet, launcher: str) -> None:
    jobs = jobs_of(16)
    single = fleet.serve()
    truth = alone(single, jobs)
    single.terminate()
    router = Router(fleet, launcher=launcher)
    edges = [fleet.edge(router.url, draft=kind) for kind in (DRAFT, "ngram")]

    def meanwhile() -> None:
        eventually(lambda: sum(router.placed().values()) >= 12)
        assert router.admin("/scale", {"replicas": 3}).status_code == 200
        router.wait_up(3)
        drained = router.admin("/r1/drain", {})
        assert [r["name"] for r in drained.json()["replicas"]] == ["r2", "r3"]

    assert all_of([*(edge.url for edge in edges), router.url], jobs, meanwhile) == truth
    assert len(re.findall(r"replica r1: \d+ sessions moved", router.process.log())) == 1
    before = router.placed()
    assert all_of([edges[0].url], jobs[:6], lambda: None) == truth[:6]
    assert router.placed()["r1"] == before["r1"]
    assert router.placed()["r3"] > 0
    assert router.admin("/scale", {"replicas": 1}).status_code == 200
    assert len(router.replicas()) == 1
    last = router.up()[0]
    refused = router.admin(f"/{last}/drain", {})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "last_replica")
    router.process.terminate()
    assert router.process.wait() == 0
    assert "Traceback" not in router.process.log()


CLUSTER = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
other = cluster.add_node(**node)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(other, allow_graceful=False)
sys.stdin.readline()
cluster.add_node(**node)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.ray
def test_a_machine_of_a_cluster_dies_and_another_takes_its_place(fleet: Fleet) -> None:
    """Two nodes on this machine, which claim a GPU each."""
    key = "of-the-cluster"
    jobs = [(prompt, {**parameters, "key": key}) for prompt, parameters in jobs_of(12)]
    single = fleet.serve()
    truth = alone(single, jobs)
    single.terminate()
    environment = fleet.environment({"RAY_USAGE_STATS_ENABLED": "0"})
    command = [sys.executable, "-c", CLUSTER]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes, stderr=subprocess.DEVNULL, env=environment) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            address = cluster.stdout.readline().strip()
            flags = ("--gpus-per-replica", "1")
            env = {"RAY_ADDRESS": address, "WISP_API_KEYS": key}
            router = Router(fleet, *flags, launcher="ray", key=key, env=env)
            edge = fleet.edge(router.url, env={"WISP_API_KEY": key})

            def meanwhile() -> None:
                eventually(lambda: sum(router.placed().values()) >= 12)
                cluster.stdin.write("\n")  # type: ignore[union-attr]
                eventually(lambda: len(router.up()) == 1)

            assert all_of([edge.url, router.url], jobs, meanwhile) == truth
            cluster.stdin.write("\n")
            router.wait_up(2)
            router.process.terminate()
            assert router.process.wait() == 0
        finally:
            cluster.stdin.close()
            cluster.wait()


@pytest.mark.ray
def test_a_ray_of_the_fronts_own_listens_on_loopback_alone(fleet: Fleet) -> None:
    router = Router(fleet, launcher="ray", replicas=1, **NULL)
    family = psutil.Process(router.process.popen.pid)
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), process.name())
        for process in (family, *family.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {"gcs_server", "raylet"} <= {name for _, name in listening}
    assert {ip for ip, _ in listening} <= {"127.0.0.1", "::1"}, listening


def test_restarting_every_replica_in_turn_disturbs_nobody(fleet: Fleet) -> None:
    jobs = jobs_of(10)
    single = fleet.serve()
    truth = alone(single, jobs)
    router = Router(fleet)
    edge = fleet.edge(router.url)

    def meanwhile() -> None:
        for name in ("r1", "r2"):
            assert router.admin(f"/{name}/restart", {}).status_code == 200
            router.wait_up(2)

    assert all_of([edge.url, router.url], jobs, meanwhile) == truth
    assert [r["restarts"] for r in router.replicas().values()] == [0, 0]  # none of them died
    assert [r["last_end"] for r in router.replicas().values()] == ["exit status 0"] * 2


def test_without_any_replica_edges_and_thin_clients_wait_for_one(fleet: Fleet) -> None:
    jobs = jobs_of(4)
    single = fleet.serve()
    truth = alone(single, jobs)
    router = Router(fleet)
    edge = fleet.edge(router.url)

    def meanwhile() -> None:
        eventually(lambda: sum(router.placed().values()) >= 4)
        router.kill("r1")
        router.kill("r2")
        eventually(lambda: router.process.health() == 503)

    assert all_of([edge.url, router.url], jobs, meanwhile) == truth
    router.wait_up(2)


def test_sessions_outlive_a_front_that_is_killed(fleet: Fleet) -> None:
    prompt, parameters = "Tell me a story.", {**LONG, "temperature": 0.8, "seed": 3}
    single = fleet.serve()
    truth = alone(single, [(prompt, parameters)])
    router = Router(fleet)
    edge = fleet.edge(router.url)
    with Stream(edge.url, prompt, **parameters) as s:
        s.until(lambda answer: len(answer.text) > 10)
        router.process.kill()  # its replicas finish what they have, and end
        assert s.rest().text == truth[0]
    router.process.start()
    edge.wait_ready()
    assert alone(edge, [(prompt, parameters)]) == truth


def test_a_front_that_is_asked_to_stop_lets_answers_finish(fleet: Fleet) -> None:
    single = fleet.serve()
    truth = alone(single, [("Tell me a story.", LONG)])
    router = Router(fleet)
    edge = fleet.edge(router.url, draft="ngram")
    with (
        Stream(edge.url, "Tell me a story.", **LONG) as e,
        Stream(router.url, "Tell me a story.", **LONG) as s,
    ):
        e.until(lambda answer: bool(answer.text))
        s.until(lambda answer: bool(answer.text))
        router.process.terminate()
        eventually(lambda: router.process.health() == 503)
        refused = ask(router.url, "Hi")
        assert (refused.status, refused.error["type"]) == (503, "server_error")
        assert [e.rest().text, s.rest().text] == truth * 2
    assert router.process.wait() == 0
    assert "Traceback" not in router.process.log()


def test_a_thin_client_that_leaves_takes_its_work_along(fleet: Fleet) -> None:
    router = Router(fleet)
    with Stream(router.url, "Tell me a story.", **LONG) as s:
        s.until(lambda answer: len(answer.text) > 5)
        eventually(lambda: not router.idle())
    eventually(router.idle)


def test_equal_prefixes_go_to_one_replica_within_one_key(fleet: Fleet) -> None:
    keys = fleet.folder / "keys.toml"
    keys.write_text('[keys.a]\nsecret = "key-a"\n[keys.b]\nsecret = "key-b"\nadmin = true\n')
    flags = ("--api-keys", str(keys))
    process = fleet.serve("--replicas", "3", *flags, ready=False, **NULL)
    eventually(lambda: process.health() == 200)

    def up() -> int:
        return int(httpx.get(f"{process.url}/health", **HTTP).json()["replicas"]["up"])

    eventually(lambda: up() == 3)
    same = list(range(64))

    def where(peer: RedirectedPeer, n: int) -> str:
        peer.say(opening(f"session-{peer.key}-{n}", prompt=[*same, n]))
        redirect = peer.hear()
        assert isinstance(redirect, Redirect)
        return redirect.address

    a, b = (RedirectedPeer(process.url, key=key) for key in ("key-a", "key-b"))
    with a, b:
        first = where(a, 0)
        eventually(lambda: not any(v for k, v in process.metrics().items() if "replica_sessions" in k))
        assert where(a, 1) == first  # drawn there, though the others are empty
        assert where(b, 2) != first  # and this one knows of nothing
        m = process.metrics()
        assert sum(v for k, v in m.items() if k.startswith("wisp:placements_total") and "prefix" in k) == 1
        assert m["wisp:placement_prefix_tokens_total"] == 64
        places = [where(a, n) for n in range(3, 30)]
    assert len(set(places)) == 3  # nor does it crowd one replica
    response = httpx.get(f"{process.url}/v1/replicas", headers={"Authorization": "Bearer key-a"}, **HTTP)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "not_admin")
    assert httpx.get(f"{process.url}/v1/replicas", **HTTP).status_code == 401
    allowed = httpx.get(f"{process.url}/v1/replicas", headers={"Authorization": "Bearer key-b"}, **HTTP)
    assert allowed.status_code == 200
    for replica in allowed.json()["replicas"]:
        direct = f"http://127.0.0.1{replica['address']}"
        assert httpx.get(f"{direct}/v1/models", **HTTP).status_code == 401
        assert httpx.get(f"{direct}/v1/replica", **HTTP).status_code == 404
        assert (
            httpx.post(
                f"{direct}/v1/replica/move", headers={"Authorization": "Bearer key-b"}, **HTTP
            ).status_code
            == 404
        )


class RedirectedPeer(Peer):
    """One that follows redirects, or says so."""

    def __init__(self, url: str, *, key: str = "") -> None:
        self.key = key
        super().__init__(url, key=key, hello=Hello(VERSION, redirects=True))


def test_a_chats_turns_are_read_once_though_there_are_three_replicas(fleet: Fleet) -> None:
    router = Router(fleet, replicas=3)
    edge = fleet.edge(router.url, draft="none")
    messages: list[dict[str, str]] = []
    read = 0
    for turn in range(6):
        messages.append({"role": "user", "content": f"Tell me {turn} of Belomi, who lives by the sea."})
        answer = ask((edge, router)[turn % 2].url, "", messages=messages, max_tokens=24)
        messages.append({"role": "assistant", "content": answer.text})
        read += answer.usage["prompt_tokens"]
        eventually(router.idle)
    assert sum(router.placed(reason="prefix").values()) == 5
    assert len([n for n in router.placed().values() if n]) == 1
    computed = 0.0
    for replica in router.replicas().values():
        lines = httpx.get(f"http://127.0.0.1{replica['address']}/metrics", **HTTP).text.splitlines()
        computed += sum(
            float(line.split()[1]) for line in lines if line.startswith("wisp:prompt_tokens_total")
        )
    assert computed < 0.5 * read


def test_limits_of_a_key_hold_for_all_replicas_together(fleet: Fleet) -> None:
    keys = fleet.folder / "keys.toml"
    keys.write_text('[keys.a]\nsecret = "key-a"\nrequests_per_minute = 2\n')
    router = fleet.serve("--replicas", "2", "--api-keys", str(keys))
    answers = [ask(router.url, "Hi", key="key-a", max_tokens=2) for _ in range(4)]
    assert [a.status for a in answers] == [200] * 2 + [429] * 2  # half a minute would bring another
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_a_key_has_its_sessions_over_all_replicas_and_each_as_soon_as_another_ends(fleet: Fleet) -> None:
    keys = fleet.folder / "keys.toml"
    keys.write_text('[keys.a]\nsecret = "key-a"\nsessions = 2\n')
    hardware = "a100-llama-70b-w4"
    flags = ("--replicas", "2", "--api-keys", str(keys), "--context", "32768")
    router = fleet.serve(*flags, target=hardware, engine="emulated")
    eventually(lambda: httpx.get(f"{router.url}/health", **HTTP).json()["replicas"]["up"] == 2)
    lasting = {"model": hardware, "max_tokens": 30_000, "ignore_eos": True}  # eleven minutes of its steps

    def short() -> int:
        return ask(router.url, "Hi", key="key-a", model=hardware, max_tokens=2).status

    one = Stream(router.url, "Tell me a story.", key="key-a", **lasting)
    two = Stream(router.url, "Tell me another.", key="key-a", **lasting)
    for stream in (one, two):
        stream.until(lambda answer: bool(answer.text))
    third = ask(router.url, "Hi", key="key-a", model=hardware, max_tokens=2)
    assert (third.status, third.error["code"]) == (429, "rate_limit_exceeded")
    one.leave()
    eventually(lambda: short() == 200)
    for _ in range(6):  # one after the other is two at a time at most
        assert short() == 200
    two.leave()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls_from_edges_to_front_and_replicas(fleet: Fleet) -> None:
    cert, key = fleet.folder / "cert.pem", fleet.folder / "key.pem"
    subject = [
        "-subj",
        "/CN=router",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]  # not what the router itself dials
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key)]
    subprocess.run([*new, "-out", str(cert), *subject], check=True, capture_output=True)
    router = fleet.serve("--replicas", "2", "--tls-cert", str(cert), "--tls-key", str(key), ready=False)
    router.scheme = "https"
    router.wait_ready()
    url = f"https://localhost:{router.port}"
    edge = fleet.edge(url, draft="ngram", env={"SSL_CERT_FILE": str(cert)})
    answers = [ask(at, "Tell me a story about Belomi.", stream=True) for at in (edge.url, url)]
    assert [a.status for a in answers] == [200, 200]
    assert answers[0].text == answers[1].text != ""


def test_a_replica_that_does_not_answer_gets_nothing_new(fleet: Fleet) -> None:
    router = Router(fleet, **NULL)
    os.kill(router.pid("r1"), signal.SIGSTOP)
    eventually(lambda: router.replicas()["r1"]["state"] == "silent")
    before = router.placed()
    with RedirectedPeer(router.url) as peer:
        for n in range(10):
            peer.say(opening(f"session-{n}"))
            assert isinstance(peer.hear(), Redirect)
    assert router.placed().get("r1") == before.get("r1")
    os.kill(router.pid("r1"), signal.SIGCONT)
    router.wait_up(2)
    os.kill(router.pid("r1"), signal.SIGSTOP)
    eventually(lambda: router.replicas()["r1"]["state"] == "silent")
    assert router.admin("/r1/restart", {}).status_code == 200  # which does not wait for what does not hear
    router.wait_up(2)


def test_ctrl_c_reaches_the_front_alone_and_answers_finish(fleet: Fleet, launcher: str) -> None:
    """A terminal sends it to every process of the group."""
    single = fleet.serve()
    truth = alone(single, [("Tell me a story.", LONG)])
    router = Router(fleet, launcher=launcher)
    edge = fleet.edge(router.url, draft="ngram")
    with Stream(edge.url, "Tell me a story.", **LONG) as s:
        s.until(lambda answer: bool(answer.text))
        os.killpg(router.process.pid, signal.SIGINT)
        assert [s.rest().text] == truth
    assert router.process.wait() == 0


def test_a_replica_that_cannot_start_ends_with_advice(fleet: Fleet) -> None:
    torn = fleet.folder / "torn.gguf"
    torn.write_bytes(resolve(TARGET).read_bytes()[:50_000])
    port = str(free_port())
    null = ("serve", "--target", "null", "--engine", "null")
    for words, advice in (
        (("serve", "--target", str(torn), "--replicas", "2", "--port", port), "could not start"),
        ((*null, "--replicas", "2", "--port", "0"), "--port"),
        ((*null, "--replicas", "2", "--host", "0.0.0.0"), "without an API key"),
        ((*null, "--launcher", "abacus"), "choose one of: local, ray"),
        ((*null, "--gpus-per-replica", "1"), "--launcher ray"),
        ((*null, "--replicas", "2", "--gpus-per-replica", "1"), "--launcher ray"),
    ):
        ended = fleet.run(*words)
        assert ended.returncode == 2, ended.stderr
        assert advice in ended.stderr
        assert "Traceback" not in ended.stderr


def test_operators_are_told_what_is_wrong(fleet: Fleet) -> None:
    plain, router = fleet.serve(**NULL), Router(fleet, **NULL)
    shown = fleet.run("replicas", "list", "--server", router.url)
    assert shown.returncode == 0
    assert "r1" in shown.stdout
    assert "r2" in shown.stdout
    for words, advice in (
        (("list", "--server", plain.url), "--replicas"),
        (("list", "--server", "http://127.0.0.1:1"), "wisp serve"),
        (("drain", "r7", "--server", router.url), "r1, r2"),
        (("scale", "99", "--server", router.url), "from 1 to 64"),
    ):
        ended = fleet.run("replicas", *words)
        assert ended.returncode == 2, ended.stderr
        assert advice in ended.stderr
        assert "Traceback" not in ended.stderr
    ended = fleet.run("replicas", "scale", "3", "--server", router.url, "--json")
    assert len(json.loads(ended.stdout)["replicas"]) == 3


def test_an_edge_that_does_not_know_redirects_is_told_so(fleet: Fleet) -> None:
    router = Router(fleet, **NULL)
    with Peer(router.url, hello=None) as old:
        old.say(Hello(VERSION))
        refused = old.refused()
    assert (refused.code, refused.fatal) == ("version_mismatch", True)
    assert "same release" in refused.message


def test_the_front_itself_verifies_nothing_and_survives_nonsense(fleet: Fleet) -> None:
    router = Router(fleet, **NULL)
    with RedirectedPeer(router.url) as peer:
        peer.say(Draft("session-1", 1, 0, [5]))
        assert peer.refused().code == "unknown_session"
        peer.say(Cancel("session-1"))
        peer.say(b"\xc1")
        assert peer.refused().code == "malformed"
        for prompt in ([], [-1], [2**63], [10**6] * 10):
            peer.say(opening("session-2", prompt=prompt))
            redirect = peer.hear()
            assert isinstance(redirect, Redirect)
            with RedirectedPeer(f"http://127.0.0.1{redirect.address}") as replica:
                replica.say(opening("session-2", prompt=prompt))
                assert isinstance(replica.hear(), Refused)
    for body in ({}, {"replicas": 0}, {"replicas": 65}, {"replicas": "2"}, {"replicas": True}):
        assert router.admin("/scale", body).status_code == 400
    assert router.admin("/r9/drain", {}).status_code == 404
    page = httpx.post(f"{router.url}/v1/replicas/r1/drain", content="{}", **HTTP)
    assert page.status_code == 415  # a web page could send that
    assert len(router.up()) == 2


# --- load, without a model


class _NoTokenizers:
    async def get(self, fingerprint: str) -> Tokenizer:
        raise AssertionError("token ids are enough here")


async def _load(url: str, sessions: int, tokens: int, meanwhile: Callable[[], None]) -> list[list[int]]:
    """Sessions of three devices without drafters, all at once: their tokens."""
    links = [VerifierLink(url) for _ in range(3)]
    devices = [EdgeBackend(link, _NoTokenizers(), None, Policies("fixed:1")) for link in links]
    for link in links:
        link.start()

    async def one(n: int) -> list[int]:
        prompt = [n % 256, n // 256, *range(30)]
        generation = Generation(prompt, Sampling(seed=n), tokens)
        return [t async for item in devices[n % 3].generate(generation) for t in item.tokens]

    try:
        happening = asyncio.ensure_future(asyncio.to_thread(meanwhile))
        found = await asyncio.gather(*(one(n) for n in range(sessions)))
        await happening
    finally:
        await asyncio.gather(*(link.close() for link in links))
        for device in devices:
            device.close()
    return found


@pytest.mark.parametrize("sessions", [90, pytest.param(300, marks=pytest.mark.extended)])
def test_three_replicas_share_sessions_evenly_and_lose_none(
    fleet: Fleet, launcher: str, sessions: int
) -> None:
    router = Router(fleet, replicas=3, launcher=launcher, **NULL)
    seen: dict[str, float] = {}

    def meanwhile() -> None:
        eventually(lambda: sum(router.placed().values()) >= sessions)
        seen.update(router.placed())
        router.kill("r2")
        router.wait_up(3)
        assert router.admin("/r1/drain", {}).status_code == 200
        assert router.admin("/scale", {"replicas": 3}).status_code == 200

    found = asyncio.run(_load(router.url, sessions, TOKENS, meanwhile))
    assert found == [[null_token(n, position) for position in range(TOKENS)] for n in range(sessions)]
    assert balanced(seen), seen
    assert router.placed()["r3"] > seen["r3"]  # it took over from the others


# --- a fleet of emulated devices, whose texts were recorded of the target alone


@pytest.fixture(scope="module")
def recorded(tiny_pair: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers to prompts of a few hundred bytes, of which each four begin alike."""
    out = tmp_path_factory.mktemp("recorded")
    books = [f"Book {book} of {who}. " + f"{who} lives by the sea. " * 4
             for book, who in enumerate(("Belomi", "Tavoku", "Sarelu"))]  # fmt: skip
    prompts = [
        Prompt(f"{book}-{n}", "story", "test_prompts", f"{books[book]}What of {n}?")
        for n in range(4)
        for book in range(len(books))
    ]
    models = [(served_name(name), resolve(name)) for name in (TARGET, DRAFT)]
    settings = Settings(samplings=("greedy",), max_tokens=90, depth=8, mode="exact", group=12)
    Recording(models[0], models[1], prompts, settings, out).run()
    return out


DEVICES = 18


async def _play(url: str, traces: Path, meanwhile: Callable[[], None], window_s: float = 4.0) -> list[Report]:
    """So many devices, a few seconds at a time, until all that happens has happened."""
    scenario = Scenario(
        "replicas",
        "a100-qwen3-32b",
        (SloClass(1.0, ttft_s=60.0),),
        devices=(Kit("400", rtt_ms=4.0), Kit("150", rtt_ms=20.0, jitter_ms=5.0)),
        devices_n=DEVICES,
        output_tokens=(50, 150),
        traces=str(traces),
        warmup_s=0.1,
        window_s=window_s,
        drain_s=PATIENCE_S,
    )
    happening = asyncio.ensure_future(asyncio.to_thread(meanwhile))
    found: list[Report] = []
    while not happening.done():
        found.append(await run_live(scenario, system("wisp,server_mode=no"), len(found), url))
    await happening
    return found


def all_right(runs: list[Report]) -> bool:
    """Every device got every token, and each the target's own."""
    found = [(f.mismatches, f.failed, f.refused, f.unfinished) for f in runs]
    assert found == [(0, 0, 0, 0)] * len(runs)  # says which
    # How many answers fall into the windows, if any, is up to the machine; tokens are checked outside of them, too.
    assert [f.completed for f in runs] == [f.arrived for f in runs]
    return sum(f.tokens_checked for f in runs) > 0


def test_a_fleet_of_devices_outlives_a_replica(fleet: Fleet, recorded: Path) -> None:
    router = Router(fleet)

    def meanwhile() -> None:
        eventually(lambda: min(router.placed().get(name, 0.0) for name in ("r1", "r2")) >= 5)
        router.kill("r2")
        eventually(lambda: router.replicas()["r2"]["restarts"] == 1)
        router.wait_up(2)

    assert all_right(asyncio.run(_play(router.url, recorded, meanwhile, 1.0)))


@pytest.mark.extended
@pytest.mark.parametrize("replicas", [2, 3])
def test_a_fleet_of_devices_gets_the_targets_texts_whatever_becomes_of_the_replicas(
    fleet: Fleet, launcher: str, replicas: int, recorded: Path
) -> None:
    router = Router(fleet, replicas=replicas, launcher=launcher)

    def meanwhile() -> None:
        at_once: list[dict[str, float]] = []  # sessions, by replica

        def seen_enough() -> bool:
            sessions = {name: float(r["sessions"]) for name, r in router.replicas().items()}
            if sum(sessions.values()) > DEVICES / 2:  # not between two runs
                at_once.append(sessions)
            return len(at_once) >= 200 and sum(router.placed().values()) >= 40 * replicas

        eventually(seen_enough)
        mean = {name: sum(seen[name] for seen in at_once) / len(at_once) for name in at_once[0]}
        assert balanced(mean), mean
        router.kill("r2")
        eventually(lambda: router.replicas()["r2"]["restarts"] == 1)
        router.wait_up(replicas)
        assert router.admin("/scale", {"replicas": replicas + 1}).status_code == 200
        router.wait_up(replicas + 1)
        new = f"r{replicas + 1}"
        eventually(lambda: router.placed().get(new, 0.0) >= 10)  # it takes its share
        assert router.admin("/r1/drain", {}).status_code == 200
        before = router.placed()
        eventually(lambda: sum(router.placed().values()) >= sum(before.values()) + 40)
        assert router.placed()["r1"] == before["r1"]

    runs = asyncio.run(_play(router.url, recorded, meanwhile))
    assert all_right(runs)
    assert sum(f.tokens_checked for f in runs) > 50 * sum(f.completed for f in runs)
    assert len(re.findall(r"replica r1: \d+ sessions moved", router.process.log())) == 1
    placed = sum(router.placed().values())
    assert sum(router.placed(reason="prefix").values()) > 0.5 * placed
    assert router.process.metrics()["wisp:placement_prefix_tokens_total"] > 50 * placed
    assert "Traceback" not in router.process.log()
