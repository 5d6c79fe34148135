"""Tokens and log probabilities as OpenAI writes them."""

from __future__ import annotations

from wisp.engines.base import Tokenizer

_LOWEST_LOGPROB = -9999.0  # OpenAI's value for "impossible"; JSON has no infinity


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as text. Parts of characters are spelt out, as OpenAI does: they are keys, and must differ."""
    piece = tokenizer.piece(token)
    try:
        return piece.decode("utf-8") or control_name(token)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def control_name(token: int) -> str:
    """The name, in vLLM's spelling, of a token that has no text."""
    return f"token_id:{token}"


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
