"""A hook of mkdocs: links into the source, which a code host follows, become references to the API pages.

    [cost.py](../src/wisp/core/verify/cost.py)  ->  [cost.py][wisp.core.verify.cost]

Code outside `wisp.core` and `wisp.engines` has no page: of its links the text stays.
"""

from __future__ import annotations

import re
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\((?:\.\./)+((?:src|benchmarks|tools|tests|data)\b[^)]*)\)")
_PAGES = ("wisp.core", "wisp.engines")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return _LINK.sub(_replaced, markdown)


def _replaced(link: re.Match[str]) -> str:
    text, path = link.groups()
    name = path.removeprefix("src/").removesuffix(".py").strip("/").replace("/", ".")
    return f"[{text}][{name}]" if name.startswith(_PAGES) else text
