"""What a verifier's metrics say of steps, deadlines and admissions, and what its event log holds while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from waiting import run, until
from wisp.api.attainment import Attainment, read_slo_classes
from wisp.api.observe import RequestRecord
from wisp.api.scrape import Registry
from wisp.api.slo import parse_slo
from wisp.core.draft.stats import SpecStats
from wisp.core.errors import ConfigError, RequestError
from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.messages import Cancel, Draft, Open, Refused, Verdict
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo
from wisp.core.verify.admission import Admission, KeyLimits
from wisp.core.verify.cost import Coefficients, Load
from wisp.core.verify.events import StepDone
from wisp.engines.emulated import EmulatedTarget, Hardware, hardware
from wisp.engines.null import null_token
from wisp.engines.plain import PlainTokenizer
from wisp.server.event_log import read_runs
from wisp.server.host import VerifierHost

COST = Coefficients(step=5.0, token=0.5)
FAST = msgspec.structs.replace(
    hardware("a100-qwen3-14b"), parameters=0.5, layers=4, launch_ms=4.0, noise=0.0, straggle=0.0, slots=8
)


def text(seed: int, position: int) -> int:
    return null_token(seed, position)


class Client:
    """A connection to a host."""

    def __init__(self, host: VerifierHost, key: str = "alice") -> None:
        self.host = host
        self.inbox: asyncio.Queue[Verdict | Refused] = asyncio.Queue()
        self.connection = host.attach(key, self.inbox.put_nowait)

    async def ask(self, message: Open | Draft) -> Verdict | Refused:
        self.host.receive(self.connection, message)
        return await self.inbox.get()


def opening(session: str, **fields: object) -> Open:
    given = {"epoch": 0, "prompt": [1] * 30, "sampling": Sampling(seed=7), "max_tokens": 50} | fields
    return Open(session, **given)  # type: ignore[arg-type]


class StepClock:
    """A host's loop on which time passes while the engine is at work, and only then."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._now = loop.time()

    def time(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)


def with_host(
    scenario: Callable[[VerifierHost], Awaitable[None]],
    log: Path | None = None,
    cost: Coefficients = COST,
    profile: Hardware = FAST,
    park_s: float = 60.0,
) -> None:
    async def main() -> None:
        clock = StepClock(asyncio.get_running_loop())
        host = VerifierHost(
            EmulatedTarget("fast", profile, text, now=clock.time, sleep=clock.sleep),
            PlainTokenizer(),
            Admission(3, {"alice": KeyLimits(sessions=3)}),
            model="fast",
            batching="continuous",
            cost=cost,
            event_log=log,
            park_s=park_s,
        )
        host._loop = clock  # type: ignore[assignment]
        try:
            await scenario(host)
        finally:
            host.stop()

    run(main())


def samples(host: VerifierHost) -> dict[str, float]:
    lines = generate_latest(host.metrics.registry).decode().splitlines()
    return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x and x[0] != "#")}


def test_a_step_is_told_by_what_it_held_and_what_it_cost_each_slice() -> None:
    async def scenario(host: VerifierHost) -> None:
        assert host.verifier.cost.now == COST
        client = Client(host)
        slow = Slo(60_000.0, 5_000.0)
        first = await client.ask(opening("session-1", slo=slow, draft=[]))
        assert isinstance(first, Verdict)
        known = len(first.tokens)
        draft = [text(7, known + i) for i in range(4)]
        verdict = await client.ask(Draft("session-1", 1, known, draft))
        assert isinstance(verdict, Verdict)
        assert verdict.accepted == 4
        seen = samples(host)
        assert seen['wisp:engine_step_slices_sum{kind="prefill"}'] == 1
        assert seen['wisp:engine_step_rows_sum{kind="prefill"}'] == 30
        assert seen['wisp:engine_step_slices_sum{kind="verify"}'] == 1
        assert seen['wisp:engine_step_rows_sum{kind="verify"}'] == 5
        assert seen['wisp:engine_step_slices_sum{kind="decode"}'] == 0
        assert seen['wisp:engine_step_slices_count{kind="decode"}'] == 2
        assert seen["wisp:verification_interference_seconds_count"] == 2
        # Each was alone: what is beyond the cost model is what this knows too little of.
        assert seen["wisp:verification_interference_seconds_sum"] < 0.01
        assert seen["wisp:cost_model_predicted_seconds_total"] > 0.005
        # 60 s for the first token, 5 s for each that follows: far in hand, but never behind
        assert seen['wisp:slack_at_dispatch_seconds_bucket{le="0.0"}'] == 0
        assert seen['wisp:slack_at_dispatch_seconds_bucket{le="+Inf"}'] == 2
        assert seen["wisp:num_requests_slo_lost"] == 0
        assert seen["wisp:draft_token_price"] == 0.0

    with_host(scenario)


def test_company_is_interference() -> None:
    """Two prompts in one step: each waits for the other, and for what the model does not foresee."""

    async def scenario(host: VerifierHost) -> None:
        client = Client(host)
        for i in range(2):
            host.receive(client.connection, opening(f"session-{i}", prompt=[i] * 300))
        for _ in range(2):
            assert isinstance(await client.inbox.get(), Verdict)
        seen = samples(host)
        assert seen['wisp:engine_step_slices_sum{kind="prefill"}'] == 2
        assert seen['wisp:engine_step_rows_sum{kind="prefill"}'] == 600
        took = FAST.step_ms(Load().plus(300, 0).plus(300, 0)) / 1e3
        alone = (1.0 + 300 * 0.001) / 1e3
        waited = seen["wisp:verification_interference_seconds_sum"]
        assert waited == pytest.approx(2 * (took - alone))

    with_host(scenario, cost=Coefficients(step=1.0, token=0.001))


def test_a_session_that_gives_its_place_to_another_is_not_the_others_refusal() -> None:
    async def scenario(host: VerifierHost) -> None:
        alice, bob = Client(host), Client(host, "bob")
        for n in range(3):
            assert isinstance(await alice.ask(opening(f"session-{n}")), Verdict)
        assert isinstance(await bob.ask(opening("session-b")), Verdict)
        ended = await alice.inbox.get()
        assert isinstance(ended, Refused)
        seen = samples(host)
        assert seen['wisp:admission_total{outcome="admitted"}'] == 4
        assert 'wisp:admission_total{outcome="overloaded"}' not in seen
        assert seen['wisp:request_refused_total{code="overloaded"}'] == 1

    with_host(scenario)


def test_admissions_are_counted_by_what_became_of_them() -> None:
    async def scenario(host: VerifierHost) -> None:
        client = Client(host)
        for i in range(3):
            assert isinstance(await client.ask(opening(f"session-{i}")), Verdict)
        refused = await client.ask(opening("session-3"))
        assert isinstance(refused, Refused)
        again = await client.ask(opening("session-1", epoch=1))
        assert isinstance(again, Verdict)
        stale = await client.ask(opening("session-1", epoch=1))
        assert isinstance(stale, Refused)
        host.draining = True
        assert isinstance(await client.ask(opening("session-4")), Refused)
        seen = {k: v for k, v in samples(host).items() if k.startswith("wisp:admission_total")}
        outcomes = {"admitted": 3, "resumed": 1, "stale_epoch": 1, "shutting_down": 1, refused.code: 1}
        assert seen == {f'wisp:admission_total{{outcome="{k}"}}': v for k, v in outcomes.items()}

    with_host(scenario)


def test_what_a_draining_verifier_refuses_is_counted() -> None:
    async def scenario(host: VerifierHost) -> None:
        client = Client(host)
        host.draining = True
        assert isinstance(await client.ask(opening("session-1")), Refused)
        seen = samples(host)
        assert seen['wisp:request_refused_total{code="shutting_down"}'] == 1
        assert seen['wisp:admission_total{outcome="shutting_down"}'] == 1
        assert host.recorder._now.refused == 1

    with_host(scenario)


def test_a_bad_grammar_is_one_refused_session_however_much_waits_behind_it() -> None:
    async def scenario(host: VerifierHost) -> None:
        client = Client(host)
        bad = Sampling(constraints=Constraints(grammar=Grammar("regex", "(a")))
        host.receive(client.connection, opening("session-1", sampling=bad))
        for round_ in (1, 2):
            host.receive(client.connection, Draft("session-1", round_, 0, [3]))
        for _ in range(3):
            assert isinstance(await client.inbox.get(), Refused)
        seen = samples(host)
        assert seen['wisp:request_refused_total{code="invalid_grammar"}'] == 3
        assert seen['wisp:admission_total{outcome="invalid_grammar"}'] == 1
        assert host.recorder._now.refused == 1

    with_host(scenario)


def test_what_is_too_much_behind_an_open_is_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wisp.server.compiling.MOST_MESSAGES", 1)

    async def scenario(host: VerifierHost) -> None:
        client = Client(host)
        grammar = Sampling(constraints=Constraints(grammar=Grammar("regex", "[a-z]{9}")))
        host.receive(client.connection, opening("session-1", sampling=grammar))
        assert isinstance(await client.ask(Draft("session-1", 1, 0, [3])), Refused)
        seen = samples(host)
        assert seen['wisp:request_refused_total{code="overloaded"}'] == 1
        assert 'wisp:admission_total{outcome="overloaded"}' not in seen

    with_host(scenario)


def test_kv_that_is_taken_from_a_session_is_counted() -> None:
    async def scenario(host: VerifierHost) -> None:
        clients = [Client(host) for _ in range(2)]
        for i, client in enumerate(clients):
            host.receive(client.connection, opening(f"session-{i}", serve=True))
        for client in clients:
            while not (await client.inbox.get()).finish:  # type: ignore[union-attr]
                pass
        assert samples(host)["wisp:num_preemptions_total"] == host.verifier.evicted > 0

    with_host(scenario, profile=msgspec.structs.replace(FAST, slot_tokens=100, kv_tokens=100))


@pytest.mark.parametrize("feasible", [True, False])
def test_a_lost_slo_is_counted_once(*, feasible: bool) -> None:
    async def scenario(host: VerifierHost) -> None:
        client = Client(host)
        first = await client.ask(opening("session-1", slo=Slo(0.0, 1000.0)))
        assert isinstance(first, Verdict)
        [session] = host.verifier.sessions.values()
        if feasible:
            session.relax(asyncio.get_running_loop().time())
        else:
            session.targets.drop()  # as when it is opened
        assert samples(host)["wisp:num_requests_slo_lost"] == 1
        for round_ in (1, 2):
            known = session.n_committed
            assert isinstance(await client.ask(Draft("session-1", round_, known, [3])), Verdict)
        assert samples(host)["wisp:request_slo_lost_total"] == 1

    with_host(scenario)


def test_every_session_that_ends_is_counted_once_by_how_it_ended() -> None:
    """Also those that end without a word: cancelled, or left by their edge for too long, or finished meanwhile."""

    async def scenario(host: VerifierHost) -> None:
        def ended() -> dict[str, float]:
            names = ("length", "abort", "expired", "stop")
            value = host.metrics.registry.get_sample_value
            counts = {n: value("wisp:request_success_total", {"finished_reason": n}) for n in names}
            return {name: count for name, count in counts.items() if count}

        client, stranger = Client(host), Client(host)
        assert isinstance(await client.ask(opening("session-1")), Verdict)
        host.receive(stranger.connection, Cancel("session-1"))  # it is not theirs
        host.receive(stranger.connection, Cancel("session-9"))
        assert ended() == {}
        host.receive(client.connection, Cancel("session-1"))
        host.receive(client.connection, Cancel("session-1"))
        assert ended() == {"abort": 1}
        assert isinstance(await client.ask(opening("session-2", max_tokens=1)), Verdict)
        assert ended() == {"abort": 1, "length": 1}
        assert isinstance(await client.ask(opening("session-3")), Verdict)
        host.receive(client.connection, opening("session-4", max_tokens=1))
        await asyncio.sleep(0)  # its step begins
        host.detach(client.connection)
        while host.n_sessions:
            await asyncio.sleep(0.001)
        assert ended() == {"abort": 1, "length": 1, "expired": 2}
        assert not host.metrics._seen

    with_host(scenario, park_s=0.0)


def test_the_event_log_is_readable_while_it_is_written_and_rebuilds_the_verifier(tmp_path: Path) -> None:
    path = tmp_path / "events.log"

    async def scenario(host: VerifierHost) -> None:
        client = Client(host)
        await client.ask(opening("session-1"))
        await until(lambda: any(isinstance(e, StepDone) for _, events in read_runs(path) for _, e in events))

    with_host(scenario, path)
    with_host(scenario, path)  # a second run goes behind the first
    runs = read_runs(path)
    assert len(runs) == 2
    header = runs[0][0]
    assert (header.model, header.engine, header.policy) == ("fast", "emulated", "continuous")
    verifier = header.verifier()
    assert verifier.cost.now == COST
    assert verifier.limits.slots == 8
    assert verifier.admission.limits == {"alice": KeyLimits(sessions=3)}
    steps = 0
    for now, event in runs[0][1]:
        verifier.handle(now, event)
        steps += isinstance(event, StepDone)
    assert steps == verifier.cost.steps > 0
    assert [s.id for s in verifier.sessions.values()] == ["session-1"]


def test_a_log_that_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    async def scenario(host: VerifierHost) -> None:
        raise AssertionError("there should be no host")

    with pytest.raises(ConfigError, match="cannot write the event log"):
        with_host(scenario, tmp_path / "nowhere" / "events.log")
    (tmp_path / "other").write_bytes(b"\x03\x00\x00\x00abcdef")
    with pytest.raises(ConfigError, match="not an event log"):
        read_runs(tmp_path / "other")


def test_a_histogram_is_one_that_prometheus_reads() -> None:
    registry = Registry()
    slack = registry.histogram("slack_seconds", "Slack.", (-1.0, 0.0, 1.0), signed=True)
    rows = registry.histograms("rows", "Rows.", (1, 4), "kind", ("a", "b"))
    source = np.random.default_rng(1)
    values = [*source.uniform(-3, 3, 200).tolist(), -1.0, 0.0, 1.0]
    for value in values:
        slack.observe(value)
    for value in (1, 2, 5):
        rows[1].observe(value)
    signed, labelled = text_string_to_metric_families(generate_latest(registry).decode())
    assert (signed.type, labelled.type) == ("histogram", "histogram")
    found = {s.labels["le"]: s.value for s in signed.samples if s.name.endswith("_bucket")}
    expected = {le: sum(v <= float(le) for v in values) for le in ("-1.0", "0.0", "1.0", "+Inf")}
    assert found == expected
    assert not any(s.name.endswith("_sum") for s in signed.samples)
    assert {s.value for s in labelled.samples if s.labels["kind"] == "a"} == {0.0}
    b = {s.name[10:] + s.labels.get("le", ""): s.value for s in labelled.samples if s.labels["kind"] == "b"}
    assert b == {"bucket1.0": 1, "bucket4.0": 2, "bucket+Inf": 3, "count": 3, "sum": 8}


def test_a_counter_is_one_that_prometheus_reads() -> None:
    registry = Registry()
    steps = registry.counter("steps", "Steps.")
    ends = registry.counter("ends", "Ends.", "reason")
    assert {s.name: s.value for f in registry.collect() for s in f.samples} == {"wisp:steps_total": 0}
    steps.add()
    steps.add(2.5)
    ends.add(1, "stop")
    ends.add(1, "length")
    ends.add(1, "stop")
    families = text_string_to_metric_families(generate_latest(registry).decode())
    assert {(s.name, *s.labels.values()): s.value for f in families for s in f.samples} == {
        ("wisp:steps_total",): 3.5,
        ("wisp:ends_total", "stop"): 2,
        ("wisp:ends_total", "length"): 1,
    }


# --- SLO classes and attainment


def test_classes_come_from_a_file_or_from_tables(tmp_path: Path) -> None:
    path = tmp_path / "classes.toml"
    path.write_text("[fast]\nttft_ms = 500\ntpot_ms = 50\n[any-time]\ntpot_ms = 1000.5\n")
    classes = read_slo_classes(path)
    assert classes == {"fast": Slo(500.0, 50.0), "any-time": Slo(0.0, 1000.5)}
    assert read_slo_classes({"fast": {"ttft_ms": 500, "tpot_ms": 50}}) == {"fast": Slo(500.0, 50.0)}
    for text_, said in {
        "[a]": "needs ttft_ms, tpot_ms or both",
        "[a]\ntpot_ms = -1": "Expected `float` >= 0",
        "a = 3": r"\[a\]: Expected `object`",
        '["a b"]\ntpot_ms = 1': "no name for an SLO class",
        "x": "cannot read the SLO classes",
    }.items():
        path.write_text(text_)
        with pytest.raises(ConfigError, match=said):
            read_slo_classes(path)


def test_a_request_takes_its_targets_from_its_headers_and_then_from_its_class() -> None:
    classes = {"fast": Slo(500.0, 50.0)}
    assert parse_slo({"x-slo-class": "fast"}, classes) == Slo(500.0, 50.0)
    assert parse_slo({"x-slo-class": "fast", "x-slo-tpot-ms": "80"}, classes) == Slo(500.0, 80.0)
    assert parse_slo({"x-slo-tpot-ms": "80"}, classes) == Slo(0.0, 80.0)
    assert parse_slo({}, classes) is None
    with pytest.raises(RequestError, match="this server has fast"):
        parse_slo({"x-slo-class": "slow"}, classes)
    with pytest.raises(RequestError, match="this server has none"):
        parse_slo({"x-slo-class": "fast"})


def record(slo: Slo | None, *, tokens: int = 11, status: int = 200, tpot_s: float = 0.05) -> RequestRecord:
    last = 100.2 + (tokens - 1) * tpot_s
    return RequestRecord(
        "completions", "id", "key", status, "stop", "", False, 5, tokens, 100.0, 100.2, last, last, [],
        SpecStats(), slo, "fast" if slo else "",
    )  # fmt: skip


def test_attainment_counts_met_missed_and_the_tokens_of_the_met() -> None:
    registry = Registry()
    attainment = Attainment(registry)
    slo = Slo(300.0, 60.0)
    for one in (
        record(slo), record(slo, tokens=21), record(slo, tpot_s=0.07), record(slo, status=503), record(None)
    ):  # fmt: skip
        attainment.count(one)
    got = {
        (s.name, *s.labels.values()): s.value
        for family in registry.collect()
        for s in family.samples
        if s.name.endswith("_total")
    }
    assert got == {
        ("wisp:request_slo_total", "met", "fast"): 2,
        ("wisp:request_slo_total", "missed", "fast"): 2,
        ("wisp:request_goodput_tokens_total", "fast"): 32,
    }
