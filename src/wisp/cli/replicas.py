"""`wisp replicas list`, `drain`, `restart` and `scale`, which a router carries out."""

from __future__ import annotations

from typing import Annotated

import typer

from wisp.cli.options import Json

app = typer.Typer(
    help="Look at the replicas behind a router, drain, restart and scale them.", no_args_is_help=True
)
Router = Annotated[str, typer.Option(help="Address of the router; its key is taken from WISP_API_KEY.")]
Name = Annotated[str, typer.Argument(help="As `wisp replicas list` calls it.")]


def _carry_out(server: str, json: bool, action: str = "", body: dict[str, object] | None = None) -> None:
    from wisp.router.admin import ask, show

    show(ask(server, action, body), as_json=json)


@app.command(name="list")
def list_replicas(server: Router = "http://127.0.0.1:8100", json: Json = False) -> None:
    """Show them."""
    _carry_out(server, json)


@app.command()
def drain(name: Name, server: Router = "http://127.0.0.1:8100", json: Json = False) -> None:
    """Move a replica's sessions to the others, and end it."""
    _carry_out(server, json, f"/{name}/drain", {})


@app.command()
def restart(name: Name, server: Router = "http://127.0.0.1:8100", json: Json = False) -> None:
    """Move a replica's sessions to the others, and start it afresh: with what is installed now."""
    _carry_out(server, json, f"/{name}/restart", {})


@app.command()
def scale(
    count: Annotated[int, typer.Argument(help="How many there shall be.", min=1)],
    server: Router = "http://127.0.0.1:8100",
    json: Json = False,
) -> None:
    """Start more replicas, or drain the youngest."""
    _carry_out(server, json, "/scale", {"replicas": count})
