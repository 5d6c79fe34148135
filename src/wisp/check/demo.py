"""`wisp demo`: a verifier and an edge show that drafts change nothing but speed.

pull the pair
start `wisp serve` and `wisp edge`, two processes on loopback
for each prompt, greedy and sampled:
    ask the edge (it drafts, the verifier decides), and the verifier (the target decodes alone)
    compare the two answers token for token
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wisp.check.comparison import Answer, Comparison, Token, measure, remark, short
from wisp.children import Child, ChildError, Children, free_ports
from wisp.core.errors import ConfigError
from wisp.engines.build import drafting_policies, fetch_target
from wisp.engines.models import PAIRS, pull

# Between two tokens; the first waits for the prompt to be read.
_ANSWER_TIMEOUT = httpx.Timeout(180.0, connect=5.0)
_ENGINES = ("llama.cpp", "vllm")
# A process that ends is noticed at once: this is for slow disks and busy machines.
_LOAD_S = 600.0

PROMPTS = {
    "tiny": (
        "Tell me a story about Belomi.",
        "Write code to sort a lamp.",
        "Make a list for Tavoku.",
        "What happened at the river?",
    ),
    "": (
        "Write a Python function that tells whether a string is a palindrome.",
        "Explain what a hash table is.",
        "SQL: the three best-paid employees of each department.",
        "Fix the bug: def mean(xs): return sum(xs) / len(x)",
    ),
}
SAMPLINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "seed": 7},
}


def run_demo(
    pair: str, *, engine: str = "llama.cpp", drafting: str, max_tokens: int, offline: bool, as_json: bool
) -> int:
    """Run the demo; 0 if every answer is identical, else 1. Raises WispError, e.g. where a process dies."""
    if pair not in PAIRS:
        raise ConfigError(f"there is no pair {pair!r}; choose one of: {', '.join(PAIRS)}")
    if engine not in _ENGINES:
        raise ConfigError(f"there is no engine {engine!r} for the demo; choose one of: {', '.join(_ENGINES)}")
    drafting_policies(drafting)
    console = Console(quiet=as_json, highlight=False)
    for name in PAIRS[pair]:
        pull(name, offline=offline)
    with console.status("fetching the target..."):
        fetch_target(PAIRS[pair][0], engine=engine, offline=offline)  # for vLLM, turned into another format
    began = time.monotonic()
    with Children() as children, httpx.Client(timeout=_ANSWER_TIMEOUT, trust_env=False) as client:
        server, edge, health = _start(children, client, console, pair, engine, drafting, max_tokens)
        try:
            compared = _compare_all(client, console, server, edge, health["model"], pair, max_tokens)
        except httpx.TransportError as error:
            raise _explained(children, edge, error) from None
        except ChildError:
            children.check()  # an edge without a verifier says so; that the verifier died says more
            raise
    wall_s = time.monotonic() - began
    ok = all(c.differs_at is None for c in compared)
    if as_json:
        about = {
            "pair": pair,
            "engine": engine,
            "drafting": drafting,
            "max_tokens": max_tokens,
            "mode": health["mode"],
        }
        print(json.dumps(_report(about, compared, ok, wall_s)))
    else:
        _conclude(console, compared, pair, engine, health, wall_s)
    return 0 if ok else 1


def _explained(children: Children, edge: Child, error: Exception) -> ChildError:
    """The reason for a broken request: usually, that a process is gone."""
    time.sleep(0.2)  # the connection breaks a moment before the process has ended
    try:
        children.check()
    except ChildError as reason:
        return reason
    return edge.failed(f"or the verifier broke off an answer ({type(error).__name__}: {error})")


# --- the two processes


def _start(
    children: Children,
    client: httpx.Client,
    console: Console,
    pair: str,
    engine: str,
    drafting: str,
    max_tokens: int,
) -> tuple[Child, Child, dict[str, Any]]:
    """A verifier and an edge, ready, and the verifier's /health."""
    target, draft = PAIRS[pair]
    console.print(
        f"\n[bold]Starting a verifier[/] ({target}) and [bold]an edge[/] ({draft}), one thread each."
    )
    common = ["--threads", "1", "--offline"]  # more threads than cores ruin both; and the models are here
    ports = free_ports(2)
    context = str(512 + max_tokens)
    serve = ["-m", "wisp.cli", "serve", "--target", target, "--engine", engine, "--port", str(ports[0])]
    # The target alone is asked the same again: no draft must come of the first answer.
    size = ["--slots", "4", "--context", context, "--history-tokens", "0"]
    server = children.start("verifier", [*serve, *size, *common], ports[0])
    with console.status("loading the target and checking that it does what it promises..."):
        health = server.wait_healthy(client, _LOAD_S)
    address = ["--server", server.url, "--port", str(ports[1]), "--give-up-s", "5"]
    # Two processes on the same cores: drafting ahead would take time from the verifier.
    guess = ["-m", "wisp.cli", "edge", "--draft", draft, "--drafting", drafting, "--no-ahead"]
    edge = children.start("edge", [*guess, *address, *common], ports[1])
    with console.status("loading the drafter..."):
        edge.wait_healthy(client)
    console.print(f"The verifier is at {server.url} ({health['mode']} mode), the edge at {edge.url}.")
    return server, edge, health


# --- asking


def _compare_all(
    client: httpx.Client, console: Console, server: Child, edge: Child, model: str, pair: str, max_tokens: int
) -> list[Comparison]:
    console.print("Accepted draft tokens are [green]green[/]; the target's own are plain.")
    compared = []
    for prompt in PROMPTS.get(pair, PROMPTS[""]):
        # Read once beforehand, so that neither side's first token pays for reading the prompt.
        _ask(client, edge, _body(model, prompt, "greedy", 1), lambda *_: None)
        for sampling in SAMPLINGS:
            console.print(Text(f"\n> {prompt}", style="bold"), Text(f"[{sampling}]", style="dim"))
            body = _body(model, prompt, sampling, max_tokens)
            drafted = _ask(client, edge, body, _printer(console))
            console.print()
            with console.status("the same from the target alone..."):
                alone = _ask(client, server, body, lambda *_: None)
            compared.append(Comparison(prompt, sampling, drafted, alone))
            console.print(_verdict(compared[-1]))
    return compared


def _body(model: str, prompt: str, sampling: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **SAMPLINGS[sampling],
    }


Show = Callable[[list[Token], list[bool]], None]


def _ask(client: httpx.Client, child: Child, body: dict[str, Any], show: Show) -> Answer:
    """Stream one answer; `show` is told of tokens as they come. Raises ChildError, httpx.TransportError."""
    answer = Answer()
    sent = time.monotonic()
    with client.stream("POST", f"{child.url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            reason = response.read().decode("utf-8", "replace")
            raise child.failed(f"answered {response.status_code}: {reason}")
        for events in _events(response):
            _take(answer, events, time.monotonic() - sent, child, show)
    if not answer.finish:
        raise child.failed("broke off an answer")
    return answer


def _events(response: httpx.Response) -> Iterator[list[dict[str, Any]]]:
    """The events of a stream, in the groups in which they arrived."""
    rest = ""
    for text in response.iter_text():
        *whole, rest = (rest + text).split("\n\n")
        events = [json.loads(e[6:]) for e in whole if e.startswith("data: ") and e != "data: [DONE]"]
        if events:
            yield events


def _take(answer: Answer, events: list[dict[str, Any]], at: float, child: Child, show: Show) -> None:
    """Each event with tokens is one verdict: accepted draft tokens, and then one of the target's own.

    Only a verdict that ends with an end-of-sequence token, which is not shown, has none of the target's to show.
    """
    groups: list[list[Token]] = []
    for event in events:
        if "error" in event:
            raise child.failed(f"gave up an answer: {event['error'].get('message')}")
        for choice in event["choices"]:
            entries = (choice.get("logprobs") or {}).get("content") or []
            groups += [[Token(e["token"], tuple(e["bytes"] or ()), e["logprob"]) for e in entries]]
            answer.finish = choice["finish_reason"] or answer.finish
        answer.spec = (event.get("metrics") or {}).get("speculative_decoding", answer.spec)
    groups = [tokens for tokens in groups if tokens]
    for number, tokens in enumerate(groups, 1):
        ended = answer.finish == "stop" and number == len(groups)
        origin = [ended or index < len(tokens) - 1 for index in range(len(tokens))]
        answer.first, answer.last = answer.first or at, at
        answer.tokens += tokens
        answer.from_draft += origin
        show(tokens, origin)


# --- showing


def _printer(console: Console) -> Show:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over tokens

    def show(tokens: list[Token], origin: list[bool]) -> None:
        for token, drafted in zip(tokens, origin, strict=True):
            text = decoder.decode(bytes(token.data))
            console.print(Text(text, style="green" if drafted else ""), end="", soft_wrap=True)

    return show


def _verdict(comparison: Comparison) -> Text:
    if comparison.differs_at is None:
        bits = (
            "logprobs included" if comparison.same_logprobs else "though not in the last bits of its logprobs"
        )
        return Text(
            f"= identical to the target alone, all {len(comparison.alone.tokens)} tokens, {bits}", "cyan"
        )
    line = Text(f"! {comparison.verdict}; the target alone says:\n", "bold red")
    return line.append(comparison.alone.text, style="")


def _conclude(
    console: Console,
    compared: list[Comparison],
    pair: str,
    engine: str,
    health: dict[str, Any],
    wall_s: float,
) -> None:
    console.print()
    console.print(_table(compared))
    console.print(
        "tokens/s, TTFT (time to the first token): through the edge|the target alone, as a client sees them; "
        "the prompt was read once before. length: tokens gained per verification. accepted: of the drafted tokens.",
        style="dim",
    )
    same = sum(c.differs_at is None for c in compared)
    style = "bold green" if same == len(compared) else "bold red"
    console.print(
        f"\n{same} of {len(compared)} answers are identical, token for token. ({wall_s:.0f} s)", style=style
    )
    if health["mode"] != "exact" and engine == "llama.cpp":
        console.print(
            "This model or machine does not pass the check for exact mode: see `wisp doctor`.", style="red"
        )
    console.print(f"\n{remark(measure(compared))}")
    console.print(
        f"\n[bold]Next[/], each in a terminal of its own:\n{_next_steps(pair, engine, health['model'])}",
        soft_wrap=True,
    )


def _table(compared: list[Comparison]) -> Table:
    """Fits 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, max_width=16)
    table.add_column("sampling", no_wrap=True)
    for name in ("tokens", "tokens/s", "TTFT ms", "length", "accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for c in compared:
        spec = c.edge.spec
        table.add_row(
            Text(c.prompt),
            c.sampling,
            str(len(c.edge.tokens)),
            f"{short(c.edge.tokens_per_second)}|{short(c.alone.tokens_per_second)}",
            f"{c.edge.first * 1e3:.0f}|{c.alone.first * 1e3:.0f}",
            f"{spec.get('mean_acceptance_length', 0.0):.2f}",
            f"{spec.get('draft_acceptance_rate', 0.0):.0%}",
            Text(c.verdict, style="green" if c.differs_at is None else "bold red"),
        )
    return table


def _next_steps(pair: str, engine: str, model: str) -> str:
    target, draft = PAIRS[pair]
    how = "" if engine == "llama.cpp" else f" --engine {engine}"
    return f"""\
  wisp serve --target {target}{how}
  wisp edge --draft {draft} --server http://127.0.0.1:8100
  wisp generate "Hello!" --draft {draft}

and from any OpenAI client, e.g. in Python:
  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8200/v1", api_key="none")
  answer = client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello!"}}])
  print(answer.choices[0].message.content)

`wisp check-lossless` tries far more cases against a slow reference; `wisp doctor` looks at this machine."""


def _report(about: dict[str, Any], compared: list[Comparison], ok: bool, wall_s: float) -> dict[str, Any]:
    target, draft = PAIRS[about["pair"]]
    cost = measure(compared)
    return {
        "ok": ok,
        **about,
        "target": target,
        "draft": draft,
        "wall_s": round(wall_s, 2),
        "cost": {k: round(v, 3) for k, v in asdict(cost).items()} | {"speedup": round(cost.speedup, 3)},
        "remark": remark(cost),
        "samplings": SAMPLINGS,
        "comparisons": [c.report() for c in compared],
    }
