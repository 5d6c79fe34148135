"""The command line: one thin command each. Every flag has an environment variable WISP_<COMMAND>_<FLAG>, and
`wisp --config FILE` takes any of them from a TOML file with a table per command."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Two pools of spinning threads on one machine ruin each other; this must be set before llama.cpp loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import typer

from wisp import __version__
from wisp.core.errors import ConfigError, WispError

if TYPE_CHECKING:
    from wisp.core.cost import Coefficients
    from wisp.engines.emulated import Written

app = typer.Typer(
    name="wisp",
    help="Distributed speculative LLM serving: edges draft, a verifier decides, the text is the target's own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "WISP", "help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never download anything.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine (default: one per core).", min=1)]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log JSON lines.")]
Server = Annotated[str, typer.Option(help="Address of the verifier.")]
Model = Annotated[str, typer.Option(help="A catalogue name, a path, or hf:user/repo/file.gguf.")]
Draft = Annotated[str, typer.Option(help="A model as for --target, ngram, ngram+MODEL, or none.")]
Drafting = Annotated[str, typer.Option(help="gain[:LONGEST], predictor[:P], confidence:P or fixed:K.")]
DraftAhead = Annotated[bool, typer.Option(help="Draft on while a draft is in flight; costs energy.")]
SloClasses = Annotated[
    Any,
    typer.Option(
        parser=lambda given: given,  # a file's name or, from --config, its tables
        metavar="PATH",
        help="TOML file of SLO classes for the header x-slo-class: [NAME] with ttft_ms, tpot_ms.",
    ),
]
PredictorFile = Annotated[Path | None, typer.Option(help="From `wisp train` (default: the one that ships).")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"wisp {__version__}")
        raise typer.Exit


@app.callback()
def _configure(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file with a table per command.")] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    if config is not None:
        ctx.default_map = _read_config(config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    group = typer.main.get_command(app)
    known = {name: {p.name for p in c.params} for name, c in getattr(group, "commands", {}).items()}
    defaults: dict[str, Any] = {}
    for command, table in tables.items():
        if command not in known or not isinstance(table, dict):
            raise ConfigError(
                f"{path}: [{command}] is not a command; tables are named {', '.join(sorted(known))}"
            )
        defaults[command] = {k.replace("-", "_"): v for k, v in table.items()}
        if unknown := sorted(defaults[command].keys() - known[command]):
            raise ConfigError(f"{path}: [{command}] has no {unknown[0]}; see wisp {command} --help")
    return defaults


@app.command()
def serve(
    target: Annotated[
        str, typer.Option(help="A catalogue name, a path, hf:user/repo/file.gguf; or hardware, emulated.")
    ],
    engine: Annotated[
        str,
        typer.Option(help="llama.cpp, vllm (docs/vllm.md), or emulated: timing without a model."),
    ] = "llama.cpp",
    mode: Annotated[
        str | None,
        typer.Option(
            help="exact: bit-identical in any batch (llama.cpp's default); fast: quicker, may tie (vLLM's only one).",
            show_default=False,
        ),
    ] = None,
    batching: Annotated[str, typer.Option(help="laxity, wisp, continuous or fcfs.")] = "laxity",
    cost: Annotated[
        Path | None, typer.Option(help="Cost profile to start from, written by `wisp profile --target`.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8100,
    api_keys: Annotated[
        Path | None, typer.Option(help="TOML file of API keys; read again when it changes.")
    ] = None,
    slo_classes: SloClasses = None,
    slots: Annotated[
        int | None,
        typer.Option(
            help="Sequences whose KV is held at once (8; vllm: 64; emulated: the hardware's).",
            min=1,
            max=4096,
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and output per session (2048; emulated: the hardware's).", min=16
        ),
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Emulated: room for KV, in tokens (default: the hardware's).", min=16)
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(help="Emulated: say what these traces say (default: a hash).")
    ] = None,
    output_tokens: Annotated[
        str, typer.Option(help="With --traces: fewest and most tokens of an answer.")
    ] = "100-300",
    acceptance: Annotated[
        float | None,
        typer.Option(
            help="With --traces: share of draft tokens to agree (default: as recorded).", min=0, max=1
        ),
    ] = None,
    threads: Threads = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="vllm: accelerators to split the target over.", min=1)
    ] = 1,
    gpu_memory: Annotated[
        float, typer.Option(help="vllm: share of an accelerator's memory to take.", min=0.1, max=1.0)
    ] = 0.9,
    max_sessions: Annotated[
        int, typer.Option(help="Open sessions before new ones are refused.", min=1)
    ] = 1024,
    park_s: Annotated[float, typer.Option(help="Seconds that a session outlives its edge.", min=0)] = 60.0,
    forecast: Annotated[
        bool, typer.Option(help="Refuse at once, with Retry-After, a request whose SLO could not be kept.")
    ] = True,
    drain_s: Annotated[float, typer.Option(help="Seconds to finish sessions on SIGTERM.", min=0)] = 30.0,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key.")] = None,
    event_log: Annotated[
        Path | None, typer.Option(help="Record every event, for replay. Holds prompts!")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Verifiers behind this address.", min=1, max=64)] = 1,
    launcher: Annotated[
        str | None, typer.Option(help="Where replicas run: local (on the ports above) or ray.")
    ] = None,
    gpus_per_replica: Annotated[float, typer.Option(help="GPUs that Ray gives each.", min=0)] = 0.0,
    offline: Offline = False,
    log_level: LogLevel = "info",
    log_json: LogJson = False,
) -> None:
    """Run a verifier: edges on a WebSocket, OpenAI clients on HTTP, one port. A single key may be in WISP_API_KEYS."""
    from wisp.api.attainment import read_slo_classes
    from wisp.api.keys import Keyring
    from wisp.api.process import Listen, event_loop_factory, run_app, set_up_logging
    from wisp.cloud.app import CloudApp, Settings
    from wisp.core.batching import batching_policy
    from wisp.engines.build import check_engine, fetch_target, load_target, served_name
    from wisp.engines.models import RichProgress

    set_up_logging(log_level, json_lines=log_json)
    keys = Keyring(api_keys, os.environ.get("WISP_API_KEYS"))
    listen = Listen(host, port, tls_cert, tls_key)
    listen.check(keyed=bool(keys))
    batching_policy(batching)
    check_engine(engine, mode=mode, kv_tokens=kv_tokens)
    start, written = _emulation(target, engine, slots, context, kv_tokens, traces, output_tokens, acceptance)
    if cost is not None:
        from wisp.lab.profiling.target import read_cost

        start, measured_on = read_cost(cost)
        if measured_on not in ("", served_name(target)):
            logging.getLogger("wisp.serve").warning(
                "%s was measured on %s, and %s is served: the cost model will have to find its way",
                cost.name, measured_on, served_name(target),
            )  # fmt: skip
    with RichProgress() as progress:
        fetch_target(target, engine=engine, offline=offline, progress=progress)
    settings = Settings(
        served_name(target), batching, max_sessions, park_s, drain_s, event_log, start,
        read_slo_classes(slo_classes) if slo_classes else {}, forecast,
    )  # fmt: skip
    of_engine: dict[str, Any] = {
        "engine": engine,
        "mode": mode,
        "slots": slots,
        "context": context,
        "threads": threads,
        "tensor_parallel": tensor_parallel,
        "memory": gpu_memory,
        "offline": offline,
        "kv_tokens": kv_tokens,
    }
    if replicas > 1 or launcher is not None:
        from wisp.front.command import serve_replicas
        from wisp.front.replica import ReplicaSpec

        if written is not None:
            raise ConfigError("--traces does not go with replicas: leave out --replicas and --launcher")
        secret = os.environ.get("WISP_API_KEYS")
        spec = ReplicaSpec("", target, of_engine, settings, listen, "", api_keys, secret, log_level, log_json)
        serve_replicas(spec, keys, replicas, launcher or "local", gpus_per_replica)
        return
    if gpus_per_replica:
        raise ConfigError("--gpus-per-replica goes with --launcher ray")
    cloud = CloudApp(settings, keys, lambda: load_target(target, **of_engine, written=written))

    async def run() -> None:
        await run_app(cloud.asgi, listen, cloud.drain, cloud.ended)
        if cloud.failed is not None:
            raise cloud.failed

    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(run())


def _emulation(
    target: str, engine: str, slots: int | None, context: int | None, kv_tokens: int | None,
    traces: Path | None, output_tokens: str, acceptance: float | None,
) -> tuple[Coefficients | None, Written | None]:  # fmt: skip
    """Where the cost model of an emulated engine starts, and its text if that comes from traces."""
    if engine != "emulated":
        if traces is not None or acceptance is not None:
            raise ConfigError("--traces and --acceptance are for --engine emulated: a model has its own text")
        return None, None
    from wisp.engines.build import emulated_hardware
    from wisp.lab.sim.profiled import profiled
    from wisp.lab.sim.written import written

    if traces is None and acceptance is not None:
        raise ConfigError("--acceptance is of what traces say; give --traces too")
    start = profiled(emulated_hardware(target, slots=slots, context=context, kv_tokens=kv_tokens))
    return start, written(traces, output_tokens, acceptance) if traces is not None else None


replicas_app = typer.Typer(
    help="Look at the replicas of a front, drain, restart and scale them.", no_args_is_help=True
)
app.add_typer(replicas_app, name="replicas")
Front = Annotated[str, typer.Option(help="Address of the front; its key is taken from WISP_API_KEY.")]
Name = Annotated[str, typer.Argument(help="As `wisp replicas list` calls it.")]


@replicas_app.command(name="list")
def list_replicas(server: Front = "http://127.0.0.1:8100", json: Json = False) -> None:
    """Show them."""
    from wisp.front.admin import ask, show

    show(ask(server), as_json=json)


@replicas_app.command()
def drain(name: Name, server: Front = "http://127.0.0.1:8100", json: Json = False) -> None:
    """Move a replica's sessions to the others, and end it."""
    from wisp.front.admin import ask, show

    show(ask(server, f"/{name}/drain", {}), as_json=json)


@replicas_app.command()
def restart(name: Name, server: Front = "http://127.0.0.1:8100", json: Json = False) -> None:
    """Move a replica's sessions to the others, and start it afresh: with what is installed now."""
    from wisp.front.admin import ask, show

    show(ask(server, f"/{name}/restart", {}), as_json=json)


@replicas_app.command()
def scale(
    count: Annotated[int, typer.Argument(help="How many there shall be.", min=1)],
    server: Front = "http://127.0.0.1:8100",
    json: Json = False,
) -> None:
    """Start more replicas, or drain the youngest."""
    from wisp.front.admin import ask, show

    show(ask(server, "/scale", {"replicas": count}), as_json=json)


@app.command()
def edge(
    draft: Draft,
    drafting: Drafting = "gain",
    ahead: DraftAhead = True,
    energy: Annotated[
        float, typer.Option(help="Least chance of use for a token drafted ahead.", min=0, max=1)
    ] = 0.1,
    slots: Annotated[int, typer.Option(help="Sessions whose context the drafter holds at once.", min=1)] = 8,
    predictor: PredictorFile = None,
    server: Server = "http://127.0.0.1:8100",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8200,
    api_keys: Annotated[Path | None, typer.Option(help="TOML file of keys for this endpoint.")] = None,
    threads: Threads = None,
    give_up_s: Annotated[
        float, typer.Option(help="Seconds without a verifier before answers fail.", min=0)
    ] = 30.0,
    keep_alive_s: Annotated[float, typer.Option(help="Seconds between keep-alive comments.", min=0.1)] = 10.0,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key.")] = None,
    offline: Offline = False,
    log_level: LogLevel = "info",
    log_json: LogJson = False,
) -> None:
    """Run an edge: an OpenAI endpoint on this device. Its key to the verifier is taken from WISP_API_KEY; a single
    key for its own endpoint may be in WISP_API_KEYS."""
    from wisp.api.keys import Keyring
    from wisp.api.process import Listen, event_loop_factory, run_app, set_up_logging
    from wisp.core.drafting import Ahead
    from wisp.edge.app import EdgeApp
    from wisp.engines.build import drafting_policies, load_drafter
    from wisp.engines.models import RichProgress

    set_up_logging(log_level, json_lines=log_json)
    keys = Keyring(api_keys, os.environ.get("WISP_API_KEYS"))
    listen = Listen(host, port, tls_cert, tls_key)
    listen.check(keyed=bool(keys))
    policies = drafting_policies(drafting, predictor)
    with RichProgress() as progress:
        drafter, fingerprint = load_drafter(
            draft, slots=slots, threads=threads, offline=offline, progress=progress
        )

    async def run() -> None:
        device = EdgeApp(
            server,
            api_key=os.environ.get("WISP_API_KEY"),
            keys=keys,
            drafter=drafter,
            fingerprint=fingerprint,
            policies=policies,
            ahead=Ahead(energy) if ahead else None,
            give_up_s=give_up_s,
            keep_alive_s=keep_alive_s,
        )
        await run_app(device.asgi, listen, device.drain)

    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(run())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message; '-' reads standard input.")],
    server: Server = "http://127.0.0.1:8100",
    draft: Draft = "none",
    drafting: Drafting = "gain",
    ahead: DraftAhead = True,
    predictor: PredictorFile = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.", min=0)] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Default: drawn, and reported.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the prompt as it is, without a chat template.")
    ] = False,
    threads: Threads = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Generate once, streamed; tokens are coloured by origin: accepted draft green, the target's own plain."""
    from wisp.core.drafting import Ahead
    from wisp.edge.once import Request, generate_once
    from wisp.engines.build import drafting_policies, load_drafter
    from wisp.engines.models import RichProgress

    policies = drafting_policies(drafting, predictor)
    with RichProgress() as progress:
        drafter, fingerprint = load_drafter(draft, threads=threads, offline=offline, progress=progress)
    text = sys.stdin.read() if prompt == "-" else prompt
    request = Request(text, system, raw, temperature, top_p, top_k, min_p, seed, max_tokens)
    key = os.environ.get("WISP_API_KEY")
    ahead_of = Ahead() if ahead else None
    asyncio.run(generate_once(request, server, key, drafter, fingerprint, policies, ahead_of, as_json=json))


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A catalogue name, hf:user/repo/file.gguf, or a path.")] = "",
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Download a model, or list the catalogue."""
    from wisp.lab.commands import list_models, pull_model

    pull_model(name, offline=offline, as_json=json) if name else list_models(as_json=json)


@app.command()
def demo(
    pair: Annotated[str, typer.Option(help="qwen2.5-coder or tiny.")] = "qwen2.5-coder",
    engine: Annotated[str, typer.Option(help="The verifier's: llama.cpp or vllm.")] = "llama.cpp",
    drafting: Drafting = "fixed:4",
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.", min=2)] = 48,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Start a verifier and an edge, and show that speculative text is the target's own, token for token."""
    from wisp.lab.demo import run_demo

    raise typer.Exit(
        run_demo(pair, engine=engine, drafting=drafting, max_tokens=max_tokens, offline=offline, as_json=json)
    )


@app.command()
def doctor(offline: Offline = False, json: Json = False) -> None:
    """What is installed, what the engine can do here, self-checks, and what to fix."""
    from wisp.lab.doctor import run_doctor

    raise typer.Exit(run_doctor(offline=offline, as_json=json))


@app.command(name="check-lossless")
def check_lossless(
    pair: Annotated[str, typer.Option(help="tiny or qwen2.5-coder.")] = "tiny",
    engine: Annotated[str, typer.Option(help="llama.cpp, or vllm with the tiny pair.")] = "llama.cpp",
    mode: Annotated[
        str | None,
        typer.Option(help="exact or fast (default: llama.cpp's exact, vLLM's fast).", show_default=False),
    ] = None,
    cases: Annotated[
        int | None, typer.Option(help="How many cases (default: 320 tiny, 12 otherwise).", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random schedules.")] = 0,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Hold the speculative path against a slow reference decoder, under interleaving, eviction and resumption."""
    from wisp.lab.lossless import run_check

    raise typer.Exit(
        run_check(pair, engine=engine, mode=mode, cases=cases, seed=seed, offline=offline, as_json=json)
    )


@app.command(name="bench-overhead")
def bench_overhead(
    sessions: Annotated[int, typer.Option(help="Sessions, each on a connection of its own.", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="Length of each measurement.", min=0.5)] = 5.0,
    json: Json = False,
) -> None:
    """What a verification costs beside the engine: a null engine, real sockets, and a bare echo for comparison."""
    from wisp.lab.overhead import run_bench

    raise typer.Exit(run_bench(sessions=sessions, seconds=seconds, as_json=json))


@app.command(name="bench-policy")
def bench_policy(
    pending: Annotated[int, typer.Option(help="Pieces of work, and sessions of a server.", min=1)] = 1000,
    json: Json = False,
) -> None:
    """What one decision of each batching policy costs, how that grows, and what a server pays for a step."""
    from wisp.lab.bench_policy import run_bench_policy

    run_bench_policy(pending, as_json=json)


@app.command(name="bench-vllm")
def bench_vllm(
    target: Annotated[str, typer.Option(help="As for `wisp serve --engine vllm`.")] = "tiny-target",
    out: Annotated[Path | None, typer.Option(help="Write the figures into this JSON file.")] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """What it costs that WISP decides the steps of vLLM: decode steps beside vLLM's own, in turn."""
    from wisp.lab.vllm_overhead import run_bench

    run_bench(target, out, as_json=json, offline=offline)


@app.command(name="bench-ahead")
def bench_ahead(
    out: Annotated[Path | None, typer.Option(help="Write a page and its data into this folder.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs with and without, in turn.", min=1)] = 3,
    json: Json = False,
) -> None:
    """Drafting ahead on real processes over a delayed line, and what a replay predicts of it. Takes minutes."""
    from wisp.lab.reality import run_ahead

    run_ahead(out, repeats=repeats, as_json=json)


@app.command()
def trace(
    target: Model,
    draft: Annotated[str, typer.Option(help="A model as for --target.")],
    prompts: Annotated[Path, typer.Option(help="JSONL file of prompts, or a folder of such files.")],
    out: Annotated[Path, typer.Option(help="Folder for the trace files.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens per prompt and sampling, at most.", min=1)] = 64,
    samplings: Annotated[str, typer.Option(help="greedy, or t and a temperature.")] = "greedy,t0.7",
    depth: Annotated[int, typer.Option(help="Tokens recorded beyond a rejected one.", min=1, max=255)] = 16,
    seed: Annotated[int, typer.Option(help="From which each trace's seed is made.")] = 0,
    mode: Annotated[str, typer.Option(help="Of the target: fast or exact.")] = "fast",
    threads: Threads = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Record what target and drafter say along the target's text, for replay. Interrupted, it goes on where it was."""
    from wisp.lab.traces.command import run_trace
    from wisp.lab.traces.record import Settings

    settings = Settings.named(samplings, max_tokens, depth, seed, mode, threads)
    run_trace(target, draft, prompts, out, settings, offline=offline, as_json=json)


@app.command()
def profile(
    draft: Annotated[str | None, typer.Option(help="The draft model to time on this device.")] = None,
    target: Annotated[str | None, typer.Option(help="The target whose steps to time, as for serve.")] = None,
    engine: Annotated[str, typer.Option(help="Of the target: llama.cpp, vllm or emulated.")] = "llama.cpp",
    mode: Annotated[
        str | None, typer.Option(help="Of the target, as for serve: exact or fast.", show_default=False)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="As for serve: sequences held at once.", min=1, max=4096)
    ] = None,
    context: Annotated[int | None, typer.Option(help="As for serve: tokens per session.", min=64)] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="As for serve --engine emulated.", min=1024)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer kinds of steps, fewer repeats.")] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count a core's time: where others keep the machine busy.")
    ] = False,
    limit_s: Annotated[float, typer.Option(help="Seconds that timing a target may take.", min=1)] = 300.0,
    out: Annotated[
        Path | None, typer.Option(help="Write the target's cost profile here, for serve --cost.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Draft steps.", min=3)] = 64,
    threads: Threads = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """How fast this device drafts (--draft), or how long a target's steps take: the cost model (--target)."""
    if (draft is None) == (target is None):
        raise ConfigError("give --draft MODEL or --target MODEL, one of the two")
    if target is not None:
        from wisp.lab.profiling.target import profile_target

        profile_target(
            target, engine=engine, mode=mode, slots=slots, context=context, threads=threads, kv_tokens=kv_tokens,
            quick=quick, cpu_time=cpu_time, limit_s=limit_s, out=out, offline=offline, as_json=json,
        )  # fmt: skip
        return
    from wisp.lab.profiling.draft import profile_draft

    assert draft is not None
    profile_draft(draft, steps=steps, threads=threads, offline=offline, as_json=json)


@app.command()
def train(
    traces: Annotated[Path, typer.Option(help="Folder or file of traces.")] = Path("data/traces"),
    out: Annotated[
        Path | None, typer.Option(help="Write the predictor here, for `wisp edge --predictor`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of rounds and of fitting.")] = 0,
    json: Json = False,
) -> None:
    """Fit a predictor of acceptance to traces, and say how good it is on prompts and domains kept apart."""
    from wisp.lab.train import run_train

    run_train(traces, out, seed=seed, as_json=json)


@app.command()
def replay(
    traces: Annotated[Path, typer.Option(help="Folder or file of traces.")] = Path("data/traces"),
    policies: Annotated[str, typer.Option(help="Which to compare, by comma; default: all.")] = "",
    predictor: PredictorFile = None,
    price: Annotated[
        float, typer.Option(help="What the verifier asks per draft token, in tokens.", min=0)
    ] = 0.0,
    limit: Annotated[int, typer.Option(help="Generations per cell of the grid.", min=1)] = 40,
    out: Annotated[
        Path | None, typer.Option(help="Write a page, its data and a plot into this folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay traces under drafting policies, over a grid of devices, links and verifiers, in virtual time."""
    from wisp.lab.grid import run_grid

    names = [p for p in policies.split(",") if p]
    run_grid(traces, names, predictor, price=price, limit=limit, out=out, as_json=json)


@app.command()
def fleet(
    scenario: Annotated[str, typer.Argument(help="A scenario that ships, or a TOML file.")],
    system: Annotated[
        str, typer.Option(help="ours, central, sled, wisp, ...; with changes: ours,ahead=no.")
    ] = "ours",
    server: Annotated[
        str, typer.Option(help="A verifier that serves the scenario (default: one is started).")
    ] = "",
    policies: Annotated[str, typer.Option(help="Batching policies to compare in turn, by comma.")] = "",
    rate: Annotated[
        float | None, typer.Option(help="Tokens per second that all users want.", min=0.1)
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices at work.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of devices and requests.")] = 1,
    window: Annotated[float | None, typer.Option(help="Seconds that count.", min=1)] = None,
    warmup: Annotated[float | None, typer.Option(help="Seconds before them.", min=0)] = None,
    against_simulator: Annotated[
        bool, typer.Option("--against-simulator", help="Simulate the same, and compare.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures into this JSON file.")] = None,
    json: Json = False,
) -> None:
    """Emulated devices by the hundred against a live verifier, in real time; every token is checked."""
    from wisp.lab.sim.fleet import run_fleet

    code = run_fleet(
        scenario,
        of=system,
        server=server,
        policies=[p for p in policies.split(",") if p],
        rate=rate,
        devices=devices,
        seed=seed,
        window_s=window,
        warmup_s=warmup,
        against_simulator=against_simulator,
        as_json=json,
        out=out,
    )
    raise typer.Exit(code)


ScenarioName = Annotated[str, typer.Argument(help="A scenario that ships, or a TOML file.")]
Rate = Annotated[
    float | None, typer.Option(help="Tokens per second that users expect (default: the scenario's).", min=0.1)
]
Jobs = Annotated[int, typer.Option(help="Processes.", min=1)]


@app.command()
def simulate(
    scenario: ScenarioName,
    system: Annotated[
        str,
        typer.Option(help="ours, wisp, central, sled, ...; with changes: ours,ahead=no,drafting=fixed:4."),
    ] = "ours",
    rate: Rate = None,
    devices: Annotated[int | None, typer.Option(help="Default: the scenario's.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 1,
    chrome_trace: Annotated[Path | None, typer.Option(help="Write a trace for chrome://tracing.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    json: Json = False,
) -> None:
    """A fleet and its verifier in virtual time: the live decisions, modelled time."""
    from wisp.lab.sim.commands import run_simulate

    run_simulate(
        scenario, system, rate=rate, devices=devices, seed=seed, chrome=chrome_trace, plot=plot, as_json=json
    )


@app.command()
def capacity(
    scenario: ScenarioName,
    policy: Annotated[
        str,
        typer.Option(help="ours, central, wisp, sled, central-speculative, central-paper or sled-paper."),
    ] = "ours",
    rate: Rate = None,
    tolerance: Annotated[
        float, typer.Option(help="Share of requests that may miss their SLO.", min=0.001, max=0.9)
    ] = 0.1,
    seeds: Annotated[int, typer.Option(help="Runs per number of devices.", min=1, max=20)] = 3,
    jobs: Jobs = 2,
    json: Json = False,
) -> None:
    """The most devices that a system serves in time, with its interval, and how far that is from the fluid bound.
    Baselines are tuned first. Runs are remembered."""
    from wisp.lab.sim.commands import run_capacity

    run_capacity(scenario, policy, rate=rate, tolerance=tolerance, seeds=seeds, jobs=jobs, as_json=json)


@app.command()
def plan(
    hardware: Annotated[str, typer.Option(help="Profile of the verifier's engine, or a TOML file.")],
    devices: Annotated[int, typer.Option(help="How many there are.", min=1)],
    device: Annotated[str, typer.Option(help="A device profile, or drafted tokens per second.")],
    rate: Annotated[float, typer.Option(help="Tokens per second that users expect.", min=0.1)],
    rtt: Annotated[float, typer.Option(help="Round trip, ms.", min=0)] = 20.0,
    prompt: Annotated[str, typer.Option(help="Fewest and most tokens.")] = "60-200",
    output: Annotated[str, typer.Option(help="Fewest and most tokens.")] = "100-300",
    simulate: Annotated[bool, typer.Option("--simulate", help="Confirm by short simulations.")] = False,
    jobs: Jobs = 2,
    json: Json = False,
) -> None:
    """How many devices to expect a verifier to carry, and whether WISP or serving centrally is the way."""
    from wisp.lab.sim.plan import run_plan, scenario_for, span

    planned = scenario_for(hardware, devices, device, rtt, rate, span(prompt), span(output))
    run_plan(planned, simulate=simulate, jobs=jobs, as_json=json)


@app.command()
def experiments(
    names: Annotated[list[str] | None, typer.Argument(help="Which pages; default: all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cells, short runs: does it work at all?")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for pages, data and plots.")] = Path("docs/results"),
    jobs: Jobs = 2,
) -> None:
    """Simulated experiments, each a page with its data and a plot."""
    from wisp.lab.sim.experiments import run_experiments

    run_experiments(names or [], quick=quick, out=out, jobs=jobs)


def main() -> None:
    """Entry point. Errors that users can mend are one line, exit code 2."""
    try:
        app()
    except WispError as error:
        typer.echo(f"wisp: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
