"""Commands for a first try: `wisp pull`, `demo` and `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from wisp.cli.options import Drafting, Json, Offline


def pull(
    name: Annotated[str, typer.Argument(help="A catalogue name, hf:user/repo/file.gguf, or a path.")] = "",
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Download a model, or list the catalogue."""
    from wisp.check.catalogue import list_models, pull_model

    pull_model(name, offline=offline, as_json=json) if name else list_models(as_json=json)


def demo(
    pair: Annotated[
        str, typer.Option(help="tiny, qwen2.5-coder or another pair that `wisp pull` lists.")
    ] = "qwen2.5-coder",
    engine: Annotated[str, typer.Option(help="The verifier's: llama.cpp or vllm.")] = "llama.cpp",
    drafting: Drafting = "fixed:4",
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.", min=2)] = 48,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Start a verifier and an edge, and show that speculative text is the target's own, token for token."""
    from wisp.check.demo import run_demo

    raise typer.Exit(
        run_demo(pair, engine=engine, drafting=drafting, max_tokens=max_tokens, offline=offline, as_json=json)
    )


def doctor(offline: Offline = False, json: Json = False) -> None:
    """What is installed, what the engine can do here, self-checks, and what to fix."""
    from wisp.check.doctor import run_doctor

    raise typer.Exit(run_doctor(offline=offline, as_json=json))
