"""Links between pages, to headings and to the source lead somewhere, also where mkdocs does not look."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1[^\n]*$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_SOURCE = re.compile(r"<(?:img|a)\b[^>]*?(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


@cache
def anchors(page: Path) -> frozenset[str]:
    """What a link may name behind `#`, as code hosts and mkdocs make it of headings."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in _HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain).strip().lower().replace(" ", "-")
        again = sum(other == slug for other in found)
        found.append(slug)
        if again:
            found.append(f"{slug}-{again}")
            found.append(f"{slug}_{again}")
    return frozenset(found)


def links(text: str) -> list[str]:
    text = _CODE.sub("", text)
    return [*_LINK.findall(text), *_SOURCE.findall(text)]


def problem(page: Path, link: str) -> str:
    """What is wrong with a link on this page; "" if nothing is. Other sites are not asked."""
    if re.match(r"(https?://|mailto:)\S+", link):
        return ""
    path, _, anchor = unquote(link).partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return f"{link}: there is no such file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"{link}: {target.name} has no such heading"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert [found for link in links(page.read_text()) if (found := problem(page, link))] == []


def test_links_that_lead_nowhere_are_found() -> None:
    text = (
        "[a](nothing.md) [b](usage.md#nothing) [c](../src/wisp/nothing.py) ![d](images/nothing.png) `[e](x)`"
    )
    page = ROOT / "docs" / "architecture.md"
    assert [problem(page, link).split(":")[0] for link in links(text)] == links(text)
    assert len(links(text)) == 4
    assert problem(page, "usage.md#slos") == problem(page, "../src/wisp") == ""
    assert sum(len(links(p.read_text())) for p in PAGES) > 200
