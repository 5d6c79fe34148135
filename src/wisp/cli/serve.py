"""`wisp serve`: a verifier, or with --replicas several behind one address."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisp.cli.options import (
    HISTORY_TOKENS,
    AllowedHosts,
    BatchRows,
    CorsOrigins,
    FlashAttention,
    GpuLayers,
    HistoryTokens,
    HttpKeepAlive,
    KvType,
    LogFormat,
    LogLevel,
    Offline,
    ServedModelName,
    SloClasses,
    TensorSplit,
    Threads,
    ToolParser,
)
from wisp.cli.renamed import Forecast, LogJson, today
from wisp.core.errors import ConfigError
from wisp.server.defaults import DRAIN_S, MAX_SESSIONS, MOST_REPLICAS, PARK_S

if TYPE_CHECKING:
    from wisp.core.verify.cost import Coefficients
    from wisp.engines.emulated import Written


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
            help="exact: bit-identical in any batch (llama.cpp's default); fast: quicker, may tie (vLLM's default).",
            show_default=False,
        ),
    ] = None,
    batching: Annotated[str, typer.Option(help="wisp, continuous, fcfs or paper.", callback=today)] = "wisp",
    depth: Annotated[
        int,
        typer.Option(
            help="Steps given to the engine at a time; 2: it need not wait for the host.", min=1, max=2
        ),
    ] = 1,
    history_tokens: HistoryTokens = None,
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
    kv_type: KvType = "",
    gpu_layers: GpuLayers = None,
    flash_attention: FlashAttention = "auto",
    tensor_split: TensorSplit = "",
    batch_rows: BatchRows = None,
    runner: Annotated[str, typer.Option(help="vllm: its model runner, v1 or v2 (docs/vllm.md).")] = "",
    quantization: Annotated[
        str, typer.Option(help="vllm: quantise weights as they are loaded: fp8, ... (default: as they are).")
    ] = "",
    prefix_caching: Annotated[
        bool, typer.Option(help="vllm: keep KV that nobody holds, for those who come back.")
    ] = True,
    max_sessions: Annotated[
        int, typer.Option(help="Open sessions before new ones are refused.", min=1)
    ] = MAX_SESSIONS,
    park_s: Annotated[float, typer.Option(help="Seconds that a session outlives its edge.", min=0)] = PARK_S,
    slo_admission: Annotated[
        bool, typer.Option(help="Refuse at once, with Retry-After, a request whose SLO could not be kept.")
    ] = True,
    forecast: Forecast = None,
    drain_s: Annotated[float, typer.Option(help="Seconds to finish sessions on SIGTERM.", min=0)] = DRAIN_S,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key.")] = None,
    allowed_hosts: AllowedHosts = "",
    cors_origins: CorsOrigins = "",
    served_model_name: ServedModelName = "",
    tool_parser: ToolParser = "",
    http_keep_alive_s: HttpKeepAlive = 75.0,
    event_log: Annotated[
        Path | None, typer.Option(help="Record every event, for replay. Holds prompts!")
    ] = None,
    replicas: Annotated[
        int, typer.Option(help="Verifiers behind this address.", min=1, max=MOST_REPLICAS)
    ] = 1,
    launcher: Annotated[
        str | None, typer.Option(help="Where replicas run: local (on the ports above) or ray.")
    ] = None,
    gpus_per_replica: Annotated[float, typer.Option(help="GPUs that Ray gives each.", min=0)] = 0.0,
    offline: Offline = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
    log_json: LogJson = False,
) -> None:
    """Run a verifier: edges on a WebSocket, OpenAI clients on HTTP, one port.

    Keys may also be in WISP_API_KEYS, separated by commas.
    """
    import msgspec

    from wisp.api.attainment import read_slo_classes
    from wisp.api.generating import model_names, parser_name
    from wisp.api.keys import Keyring
    from wisp.api.logs import set_up_logging
    from wisp.api.process import Listen, event_loop_factory, run_app
    from wisp.api.tracing import set_up_tracing
    from wisp.api.web_guard import host_names, web_origins
    from wisp.core.verify.batching import batching_policy
    from wisp.engines.build import check_engine, fetch_target, load_target, served_name
    from wisp.engines.models import RichProgress
    from wisp.engines.options import EngineOptions
    from wisp.server.app import ServerApp, Settings

    log_format = "json" if log_json else log_format
    set_up_logging(log_level, form=log_format)
    set_up_tracing("wisp-router" if replicas > 1 or launcher is not None else "wisp-serve")
    keys = Keyring(api_keys, os.environ.get("WISP_API_KEYS"))
    listen = Listen(
        host, port, tls_cert, tls_key, host_names(allowed_hosts), http_keep_alive_s, web_origins(cors_origins)
    )
    listen.check(keyed=bool(keys))
    batching_policy(batching)
    options = EngineOptions(
        kv_type=kv_type, gpu_layers=gpu_layers, flash_attention=flash_attention, tensor_split=tensor_split,
        batch_rows=batch_rows, runner=runner, quantization=quantization, prefix_caching=prefix_caching,
    )  # fmt: skip
    check_engine(engine, mode=mode, kv_tokens=kv_tokens, options=options)
    start, written = _emulation(target, engine, slots, context, kv_tokens, traces, output_tokens, acceptance)
    if cost is not None:
        from wisp.calibrate.profile.target import read_cost

        start, measured_on = read_cost(cost)
        if measured_on not in ("", served_name(target)):
            logging.getLogger("wisp.serve").warning(
                "%s was measured on %s, and %s is served: the cost model will have to find its way",
                cost.name, measured_on, served_name(target),
            )  # fmt: skip
    listen.try_port()
    with RichProgress() as progress:
        fetch_target(target, engine=engine, offline=offline, progress=progress)
    if history_tokens is None:
        # Without a model, texts repeat a few traces again and again, or nothing at all.
        history_tokens = 0 if engine in ("emulated", "null") else HISTORY_TOKENS
    settings = Settings(
        served_name(target), batching, max_sessions, park_s, drain_s, event_log, start,
        read_slo_classes(slo_classes) if slo_classes else {},
        slo_admission if forecast is None else forecast,
        model_names(served_model_name), parser_name(tool_parser), depth, history_tokens,
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
        "options": msgspec.to_builtins(options),
    }
    if replicas > 1 or launcher is not None:
        from wisp.router.command import serve_replicas
        from wisp.router.replica import ReplicaSpec

        if written is not None:
            raise ConfigError("--traces does not go with replicas: leave out --replicas and --launcher")
        secrets = os.environ.get("WISP_API_KEYS")
        spec = ReplicaSpec(
            "", target, of_engine, settings, listen, "", api_keys, secrets, log_level, log_format
        )
        serve_replicas(spec, keys, replicas, launcher or "local", gpus_per_replica)
        return
    if gpus_per_replica:
        raise ConfigError("--gpus-per-replica goes with --launcher ray")
    server = ServerApp(settings, keys, lambda: load_target(target, **of_engine, written=written))

    async def run() -> None:
        await run_app(
            server.asgi, listen, server.drain, server.ended, keyed=bool(keys), loading=lambda: server.loading
        )
        if server.failed is not None:
            raise server.failed

    with asyncio.Runner(loop_factory=event_loop_factory()) as loop:
        loop.run(run())


def _emulation(
    target: str, engine: str, slots: int | None, context: int | None, kv_tokens: int | None,
    traces: Path | None, output_tokens: str, acceptance: float | None,
) -> tuple[Coefficients | None, Written | None]:  # fmt: skip
    """Where the cost model of an emulated engine starts, and its text if that comes from traces."""
    if engine != "emulated":
        if traces is not None or acceptance is not None:
            raise ConfigError("--traces and --acceptance are for --engine emulated: a model has its own text")
        return None, None
    from wisp.calibrate.hardware import profiled
    from wisp.calibrate.traces.written import written
    from wisp.engines.build import emulated_hardware

    if traces is None and acceptance is not None:
        raise ConfigError("--acceptance is of what traces say; give --traces too")
    start = profiled(emulated_hardware(target, slots=slots, context=context, kv_tokens=kv_tokens))
    return start, written(traces, output_tokens, acceptance) if traces is not None else None
