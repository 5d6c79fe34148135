"""Tokens and log probabilities as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Mapping

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


_NAMES: dict[
    tuple[str, frozenset[str]], Mapping[int, str]
] = {}  # by the tokenizer's fingerprint and control tokens


def written(tokenizer: Tokenizer, token: int) -> bytes:
    """A token as it is written in a prompt: control tokens, which have no text, by their names."""
    return tokenizer.piece(token) or _control_tokens(tokenizer).get(token, "").encode()


def _control_tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    """Their names, by id."""
    key = (tokenizer.fingerprint, tokenizer.controls)
    names = _NAMES.get(key)
    if names is None:
        ids = {text: tokenizer.encode(text, add_bos=False, parse_special=True) for text in tokenizer.controls}
        names = {found[0]: text for text, found in ids.items() if len(found) == 1}
        if len(_NAMES) >= 16:
            _NAMES.clear()
        _NAMES[key] = names
    return names


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
