"""`wisp check-lossless`: a proof that the text is the target's own."""

from __future__ import annotations

from typing import Annotated

import typer

from wisp.cli.options import Json, Offline


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
    depth: Annotated[
        int | None,
        typer.Option(help="Steps in flight (default: 1 and 2 in turn).", min=1, max=2, show_default=False),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Hold the speculative path against a slow reference decoder, under interleaving, eviction and resumption."""
    from wisp.check.lossless import run_check

    raise typer.Exit(
        run_check(
            pair, engine=engine, mode=mode, cases=cases, seed=seed, depth=depth, offline=offline, as_json=json
        )
    )
