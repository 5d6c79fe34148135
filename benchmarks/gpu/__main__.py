"""`python -m benchmarks.gpu PART`: see `benchmarks/gpu.sh`, which runs them all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="Folder for the JSON files.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Small shapes: a dry run for a CPU.")]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def steps(
    out: Out = Path("docs/results/gpu"),
    shapes: Annotated[str, typer.Option(help="By comma.")] = "qwen3-8b",
    limit: Annotated[float, typer.Option(help="Seconds for each shape.")] = 100.0,
    tiny: Tiny = False,
) -> None:
    """Step times; the roofline's overlap; the cost model's error; a profile to emulate."""
    from benchmarks.gpu.steps import run

    run(shapes.split(","), out, tiny=tiny, limit_s=limit)


@app.command()
def choice(out: Out = Path("docs/results/gpu"), tiny: Tiny = False) -> None:
    """The fused choice of tokens against the rule and against torch."""
    from benchmarks.gpu.choice import run

    run(out, tiny=tiny)


@app.command()
def bits(
    out: Out = Path("docs/results/gpu"),
    shape: Annotated[str, typer.Option()] = "qwen3-8b",
    tiny: Tiny = False,
) -> None:
    """One row a step against several: which logits keep their bits."""
    from benchmarks.gpu.bits import run

    run(shape, out, tiny=tiny)


@app.command()
def serving(
    target: Annotated[str, typer.Option(help="As for `wisp serve --engine vllm`.")] = "tiny-target",
    slots: Annotated[int, typer.Option(help="Sessions at once.", min=1)] = 64,
    depth: Annotated[int, typer.Option(help="Steps in flight.", min=1)] = 1,
    out: Out = Path("docs/results/gpu"),
    tiny: Tiny = False,
) -> None:
    """Streamed completions of a verifier, and of an edge before it."""
    from benchmarks.gpu.serving import run

    run(target, slots, depth, out, tiny=tiny)


app()
