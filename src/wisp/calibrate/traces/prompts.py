"""Prompts for traces: JSONL files with `id`, `domain`, `split` and `text` in each line.

Splits: "train"; "test_prompts", prompts kept apart from domains that are trained on; "test_domain", all prompts
of a domain that is never trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from wisp.core.errors import ConfigError

SPLITS = ("train", "test_prompts", "test_domain")


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user's message. `id` is unique over all files."""

    id: str
    domain: str
    split: str
    text: str


def load_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, or of the *.jsonl files of a folder in order of name. Raises ConfigError."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    prompts = [prompt for file in files for prompt in _read(file)]
    if not prompts:
        raise ConfigError(f"{path} has no prompts: expected a .jsonl file, or a folder of such files")
    _check(prompts)
    return prompts


def _read(path: Path) -> Iterable[Prompt]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield msgspec.json.decode(line, type=Prompt)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None


def _check(prompts: list[Prompt]) -> None:
    seen: set[str] = set()
    held_out = {p.domain for p in prompts if p.split == "test_domain"}
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(f"two prompts have the id {prompt.id!r}")
        seen.add(prompt.id)
        if prompt.split not in SPLITS:
            raise ConfigError(f"prompt {prompt.id!r}: split is one of {', '.join(SPLITS)}")
        if not prompt.text.strip() or not prompt.domain.replace("_", "").isalnum():
            raise ConfigError(f"prompt {prompt.id!r} needs a text, and a domain of letters, digits and _")
        if prompt.domain in held_out and prompt.split != "test_domain":
            raise ConfigError(f"prompt {prompt.id!r}: its domain is held out, so its split is test_domain")
