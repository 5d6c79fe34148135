"""WISP's own request field, `wisp`. Without it, answers are as any OpenAI client expects.

"wisp": {"rounds": true, "draft": false}
"""

from __future__ import annotations

from typing import Any

import msgspec

from wisp.api.fields import Fields, refuse


class Extras(msgspec.Struct, frozen=True):
    """rounds: tell where each token is from, and what each round took. draft: may this request be drafted for?"""

    rounds: bool = False
    draft: bool = True


def parse_extras(given: dict[str, Any] | None) -> Extras:
    """The field `wisp` of a request. Raises RequestError 400."""
    given = given or {}
    own = Fields(given, "wisp")
    known = Extras.__struct_fields__
    for name in given:
        if name not in known:
            refuse(f"wisp.{name}", f"there is no such field; there are {' and '.join(known)}")
    return Extras(own.flag("rounds"), own.get("draft") is None or own.flag("draft"))
