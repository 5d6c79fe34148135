"""Every `wisp` command that a page shows is one that there is, with flags that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from wisp.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
APP: Any = get_command(app)
USAGE: Any = typer.BadParameter.__bases__[0]  # typer has a click of its own
_SETTING = re.compile(r"[A-Z_]+=\S*")


def commands(text: str) -> list[list[str]]:
    """The words behind each `wisp`, in blocks of shell."""
    lines = [line for block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation over several lines: none of ours
            continue
        while words and _SETTING.fullmatch(words[0]):
            words = words[1:]
        if words and Path(words[0]).name == "wisp" and len(words) > 1 and words[1] != "...":
            found.append(words[1:])
    return found


def problem(words: list[str]) -> str:
    """What is wrong with it; "" if nothing is."""
    command, context = APP, None
    try:
        while hasattr(command, "commands"):
            context = command.make_context(None, words[:], parent=context)
            words = [*context._protected_args, *context.args]
            if not words:
                return ""
            _, command, words = command.resolve_command(context, words)
        command.make_context(None, words, parent=context)
    except USAGE as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_of_a_page_are_understood(page: Path) -> None:
    found = commands(page.read_text())
    assert {" ".join(words): said for words in found if (said := problem(words))} == {}


def test_commands_that_there_are_not_are_found() -> None:
    text = "```sh\nKEY=x .venv/bin/wisp serve --target a --tarjet b  # a slip\nwisp sim walk mixed\nwisp doctor\n```"
    assert [bool(problem(words)) for words in commands(text)] == [True, True, False]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 35
