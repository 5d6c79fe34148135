"""Which family of calls a chat template writes, and the parser for it."""

from __future__ import annotations

import functools

from wisp.api.tools.harmony import Harmony
from wisp.api.tools.json_calls import DeepSeek, Hermes, KimiK2, Llama3, Mistral
from wisp.api.tools.markup import Parser
from wisp.api.tools.object_calls import Gemma4, Pythonic
from wisp.api.tools.tag_calls import Dsml, Glm, KimiK3, QwenXml

PARSERS: dict[str, type[Parser]] = {
    "hermes": Hermes,
    "qwen-xml": QwenXml,
    "llama3": Llama3,
    "llama4": Pythonic,
    "mistral": Mistral,
    "deepseek": DeepSeek,
    "dsml": Dsml,
    "harmony": Harmony,
    "glm": Glm,
    "kimi-k2": KimiK2,
    "kimi-k3": KimiK3,
    "gemma4": Gemma4,
}
DEFAULT = "hermes"  # what most models without a format of their own have been trained on

# Texts that only one family's templates contain; the first that is found decides.
_SIGNS = (
    ("<|channel|>", "harmony"),
    ("<|tool_call>", "gemma4"),
    ("<|tool_calls_section_begin|>", "kimi-k2"),
    ("<|open|>", "kimi-k3"),
    ("｜DSML｜", "dsml"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<arg_key>", "glm"),
    ("<function=", "qwen-xml"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_start|>", "llama4"),
    ("<|header_start|>", "llama4"),
    ("<|start_header_id|>", "llama3"),
    ("<tool_call>", "hermes"),
)


@functools.lru_cache(maxsize=64)
def family_of(template: str | None) -> str:
    """The name of the family whose calls the chat template writes; the default where it writes none."""
    return next((name for sign, name in _SIGNS if sign in (template or "")), DEFAULT)
