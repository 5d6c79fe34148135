"""Commands for a device: `wisp edge`, an OpenAI endpoint, and `wisp generate`, a single generation."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from wisp.cli.options import (
    HISTORY_TOKENS,
    AllowedHosts,
    BatchRows,
    CorsOrigins,
    Draft,
    DraftAhead,
    Drafting,
    FlashAttention,
    GpuLayers,
    HistoryTokens,
    HttpKeepAlive,
    Json,
    KvType,
    LogFormat,
    LogLevel,
    Offline,
    PredictorFile,
    ServedModelName,
    Server,
    SloClasses,
    TensorSplit,
    Threads,
    ToolParser,
)
from wisp.cli.renamed import LogJson
from wisp.core.draft.patience import GIVE_UP_S
from wisp.core.errors import ConfigError


def edge(
    draft: Annotated[
        str,
        typer.Option(
            help="A model as for --target, ngram, ngram+MODEL, none; or auto: the best one on this device, else ngram "
            "(also where no verifier is there within 10 s of the start)."
        ),
    ] = "auto",
    drafting: Drafting = "gain",
    ahead: DraftAhead = True,
    energy: Annotated[
        float, typer.Option(help="Least chance of use for a token drafted ahead.", min=0, max=1)
    ] = 0.1,
    slots: Annotated[int, typer.Option(help="Sessions whose context the drafter holds at once.", min=1)] = 8,
    history_tokens: HistoryTokens = None,
    predictor: PredictorFile = None,
    server: Server = "http://127.0.0.1:8100",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8200,
    api_keys: Annotated[Path | None, typer.Option(help="TOML file of keys for this endpoint.")] = None,
    slo_classes: SloClasses = None,
    threads: Threads = None,
    kv_type: KvType = "",
    gpu_layers: GpuLayers = None,
    flash_attention: FlashAttention = "auto",
    tensor_split: TensorSplit = "",
    batch_rows: BatchRows = None,
    give_up_s: Annotated[
        float, typer.Option(help="Seconds without a verifier before answers fail.", min=0)
    ] = GIVE_UP_S,
    keep_alive_s: Annotated[
        float, typer.Option(help="Seconds between keep-alive comments in a stream.", min=0.1)
    ] = 10.0,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key.")] = None,
    allowed_hosts: AllowedHosts = "",
    cors_origins: CorsOrigins = "",
    served_model_name: ServedModelName = "",
    tool_parser: ToolParser = "",
    http_keep_alive_s: HttpKeepAlive = 75.0,
    offline: Offline = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
    log_json: LogJson = False,
) -> None:
    """Run an edge: an OpenAI endpoint on this device.

    Its key to the verifier is taken from WISP_API_KEY; keys for its own endpoint may also be in WISP_API_KEYS,
    separated by commas.
    """
    from wisp.api.attainment import read_slo_classes
    from wisp.api.generating import ApiOptions, model_names, parser_name
    from wisp.api.keys import Keyring
    from wisp.api.logs import set_up_logging
    from wisp.api.process import Listen, event_loop_factory, run_app
    from wisp.api.tracing import set_up_tracing
    from wisp.api.web_guard import host_names, web_origins
    from wisp.core.draft.policies import Ahead
    from wisp.edge.address import session_url
    from wisp.edge.app import EdgeApp
    from wisp.edge.finding import find_drafter
    from wisp.engines.base import DraftEngine
    from wisp.engines.build import drafting_policies, load_drafter
    from wisp.engines.models import RichProgress
    from wisp.engines.options import EngineOptions

    set_up_logging(log_level, form="json" if log_json else log_format)
    set_up_tracing("wisp-edge")
    session_url(server)  # before a model is loaded
    keys = Keyring(api_keys, os.environ.get("WISP_API_KEYS"))
    listen = Listen(
        host, port, tls_cert, tls_key, host_names(allowed_hosts), http_keep_alive_s, web_origins(cors_origins)
    )
    listen.check(keyed=bool(keys))
    policies = drafting_policies(drafting, predictor)
    options = ApiOptions(
        model_names(served_model_name),
        parser_name(tool_parser),
        keep_alive_s,
        read_slo_classes(slo_classes) if slo_classes else {},
    )
    engine = EngineOptions(
        kv_type=kv_type, gpu_layers=gpu_layers, flash_attention=flash_attention, tensor_split=tensor_split,
        batch_rows=batch_rows,
    )  # fmt: skip
    listen.try_port()
    api_key = os.environ.get("WISP_API_KEY")
    drafter: DraftEngine | None
    if draft == "auto":
        drafter, fingerprint = find_drafter(server, api_key, slots=slots, threads=threads, options=engine)
    else:
        with RichProgress() as progress:
            drafter, fingerprint = load_drafter(
                draft, slots=slots, threads=threads, offline=offline, progress=progress, options=engine
            )
    if history_tokens is None:
        history_tokens = usual_history(drafter.name if drafter is not None else "none")

    async def run() -> None:
        device = EdgeApp(
            server,
            api_key=api_key,
            keys=keys,
            drafter=drafter,
            fingerprint=fingerprint,
            policies=policies,
            ahead=Ahead(energy) if ahead else None,
            give_up_s=give_up_s,
            history_tokens=history_tokens,
            options=options,
        )
        await run_app(device.asgi, listen, device.drain, keyed=bool(keys))

    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(run())


def usual_history(drafter: str) -> int:
    """Tokens of earlier answers, for n-grams alone. Where texts do not repeat as a whole, a model, which `ngram+MODEL`
    has, too, is right more often."""
    return HISTORY_TOKENS if drafter == "ngram" else 0


def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message; '-' reads standard input.")],
    server: Server = "http://127.0.0.1:8100",
    draft: Draft = "none",
    drafting: Drafting = "gain",
    ahead: DraftAhead = True,
    predictor: PredictorFile = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.", min=0, max=2**31)] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Default: drawn, and reported.", min=-(2**63), max=2**64 - 1)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=2**31)] = 256,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the prompt as it is, without a chat template.")
    ] = False,
    threads: Threads = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Generate once, streamed; tokens are coloured by origin: accepted draft green, the target's own plain.

    Its key to the verifier is taken from WISP_API_KEY.
    """
    from wisp.core.draft.policies import Ahead
    from wisp.edge.address import session_url
    from wisp.edge.once import Request, generate_once
    from wisp.engines.build import drafting_policies, load_drafter
    from wisp.engines.models import RichProgress

    session_url(server)  # before a model is loaded
    policies = drafting_policies(drafting, predictor)
    text = standard_input() if prompt == "-" else sound(prompt, "the prompt")
    system = sound(system, "--system") if system is not None else None
    with RichProgress() as progress:
        drafter, fingerprint = load_drafter(draft, threads=threads, offline=offline, progress=progress)
    request = Request(text, system, raw, temperature, top_p, top_k, min_p, seed, max_tokens)
    key = os.environ.get("WISP_API_KEY")
    ahead_of = Ahead() if ahead else None
    asyncio.run(generate_once(request, server, key, drafter, fingerprint, policies, ahead_of, as_json=json))


def standard_input() -> str:
    """All of it. Raises ConfigError if it is no UTF-8, whatever the locale says of it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sound(sys.stdin.read(), "standard input")


def sound(text: str, what: str) -> str:
    """`text`, if it was UTF-8: Python lets other bytes through, and stumbles on them later. Raises ConfigError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} is no UTF-8") from None
    return text
