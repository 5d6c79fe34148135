"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from wisp.cli.renamed import today

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never download anything.")]
# Beyond this they only wait for each other; llama.cpp ends with SIGSEGV at some point.
MOST_THREADS = 4 * (os.cpu_count() or 1)
Threads = Annotated[
    int | None, typer.Option(help="Threads of the engine (default: one per core).", min=1, max=MOST_THREADS)
]
KvType = Annotated[
    str,
    typer.Option(help="Type of the KV cache: f16, q8_0, q4_0, ... (vllm: fp8, ...; default: the engine's)."),
]
GpuLayers = Annotated[
    int | None,
    typer.Option(
        help="llama.cpp: layers on accelerators, -1 for all (default: all, where the build has one; exact mode: 0).",
        show_default=False,
    ),
]
FlashAttention = Annotated[str, typer.Option(help="llama.cpp: auto, on or off.")]
TensorSplit = Annotated[
    str, typer.Option(help="llama.cpp: shares of the model for each accelerator, by comma: 3,1.")
]
BatchRows = Annotated[
    int | None,
    typer.Option(
        help="llama.cpp: rows in one call, at most (default: 128; with an accelerator 512).",
        show_default=False,
    ),
]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
LogFormat = Annotated[str, typer.Option(help="text, or json: one object a line.")]
AllowedHosts = Annotated[
    str,
    typer.Option(
        help="Names, by comma, that a reverse proxy on this machine serves this port under (without keys, only "
        "loopback's own are answered)."
    ),
]
CorsOrigins = Annotated[
    str,
    typer.Option(
        help="Web pages, by comma, that may use this port from a browser: https://app.example.com, or * for all."
    ),
]
ServedModelName = Annotated[
    str, typer.Option(help="Further names, by comma, that clients may ask for the model by.")
]
ToolParser = Annotated[
    str,
    typer.Option(
        help="How the model writes tool calls: hermes, qwen-xml, llama3, ... (default: as its template)."
    ),
]
HttpKeepAlive = Annotated[
    float,
    typer.Option(help="Seconds that an idle HTTP connection is kept for its next request.", min=1, max=86400),
]
HISTORY_TOKENS = 1 << 18
HistoryTokens = Annotated[
    int | None,
    typer.Option(
        help=f"Tokens of texts kept, to draft from; 0: none ({HISTORY_TOKENS}; 0: emulated, or an edge's model).",
        min=0,
        max=1 << 28,
        show_default=False,
    ),
]
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
ScenarioName = Annotated[str, typer.Argument(help="A scenario that ships, or a TOML file.")]
Traces = Annotated[Path, typer.Option(help="Folder or file of traces.")]
Price = Annotated[float, typer.Option(help="What the verifier asks per draft token, in tokens.", min=0)]
Limit = Annotated[int, typer.Option(help="Generations per cell of the grid.", min=1)]
Rate = Annotated[
    float | None, typer.Option(help="Tokens per second that users expect (default: the scenario's).", min=0.1)
]
SYSTEMS = "wisp, paper, central, central-wisp, sled, sled-confidence or central-speculative"
SYSTEM_HELP = f"{SYSTEMS}; with changes: wisp,ahead=no,drafting=fixed:4 (docs/simulator.md lists them)."
System = Annotated[str, typer.Option("--system", "--policy", help=SYSTEM_HELP, callback=today)]
Seed = Annotated[
    int | None, typer.Option(help="Of everything that is random (default: the scenario's first one).")
]
Jobs = Annotated[int, typer.Option(help="Processes.", min=1, max=MOST_THREADS)]
