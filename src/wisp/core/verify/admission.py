"""Admission: limits per API key, and fair shares between keys.

Limits are token buckets with a capacity of one minute. Fairness is the virtual token counter of Sheng et al. (OSDI
2024): the least served key goes first. A key that returns after a pause starts at the level of the least served
active key, so a pause earns no claim. `places` decides when all sessions are taken.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from wisp.core.errors import ProtocolError

PROMPT_WEIGHT = 0.25  # service of one prompt token, in output tokens: prefill is cheaper by far


class KeyLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one key; 0 means none."""

    sessions: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


class Refusal(ProtocolError):
    """A session is refused for now. `retry_after`: seconds."""

    def __init__(self, code: str, message: str, retry_after: float) -> None:
        super().__init__(code, message)
        self.retry_after = retry_after


class _Bucket:
    """A token bucket: fills at `per_minute` and holds as much. Tokens that are served anyway may overdraw it."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.rate = per_minute / 60.0
        self.size = float(per_minute)
        self.level = self.size
        self.at = now

    def fill(self, now: float) -> None:
        self.level = self.level_at(now)
        self.at = now

    def level_at(self, now: float) -> float:
        return min(self.size, self.level + (now - self.at) * self.rate)

    def wait(self, amount: float, level: float) -> float:
        return max(0.0, (amount - level) / self.rate)


class KeyUsage(msgspec.Struct):
    """Usage of a key since the start; `sessions` are those open now."""

    sessions: int = 0
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Admission:
    """Limits and shares of all keys. `now` is in seconds."""

    def __init__(self, max_sessions: int, limits: dict[str, KeyLimits] | None = None) -> None:
        self.max_sessions = max_sessions
        self.limits = limits or {}
        self.usage: dict[str, KeyUsage] = {}
        self.shares: dict[str, float] = {}  # service per key, in output tokens
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        self._open = 0

    def set_limits(self, limits: dict[str, KeyLimits]) -> None:
        """Replace all limits (the key file was read again). Keys with unchanged limits keep their buckets."""
        changed = {key for key, old in self.limits.items() if limits.get(key) != old}
        for key in changed:
            self._requests.pop(key, None)
            self._tokens.pop(key, None)
        self.limits = limits

    def opened(self, now: float, key: str, free_place: Callable[[], bool] = lambda: False) -> None:
        """Count a new session. Raises Refusal, and then counts only the refusal.

        free_place: called if all places are taken; returns True if it has freed one with `closed`.
        """
        usage = self.usage.setdefault(key, KeyUsage())
        try:
            self._check(now, key, free_place)
        except Refusal:
            usage.refused += 1
            raise
        if usage.sessions == 0:
            active = [self.shares[k] for k, u in self.usage.items() if u.sessions and k in self.shares]
            self.shares[key] = max(self.shares.get(key, 0.0), min(active, default=0.0))
        usage.sessions += 1
        usage.requests += 1
        self._open += 1

    def turned_away(self, key: str) -> None:
        """A session was refused before its key's limits were checked."""
        self.usage.setdefault(key, KeyUsage()).refused += 1

    def richer(self, key: str) -> str | None:
        """The key with most sessions, if it has at least two more than `key`."""
        usage = self.usage.get(key)
        mine = usage.sessions if usage else 0
        most, rich = max(((u.sessions, name) for name, u in self.usage.items()), default=(0, ""))
        return rich if most > mine + 1 else None

    def closed(self, key: str) -> None:
        self.usage[key].sessions -= 1
        self._open -= 1

    def served(self, now: float, key: str, prompt_tokens: int, output_tokens: int) -> None:
        """Charge the tokens that a step has served to a key."""
        usage = self.usage[key]
        usage.prompt_tokens += prompt_tokens
        usage.output_tokens += output_tokens
        self.shares[key] = self.shares.get(key, 0.0) + output_tokens + PROMPT_WEIGHT * prompt_tokens
        bucket = self._tokens.get(key)
        if bucket is not None:
            bucket.fill(now)
            bucket.level -= prompt_tokens + output_tokens

    def ask(self, now: float, key: str) -> None:
        """Raises the Refusal that `opened` would raise for the limits of `key`, without counting anything."""
        limits = self.limits.get(key)
        if limits is None:
            return
        usage = self.usage.get(key)
        if limits.sessions and usage is not None and usage.sessions >= limits.sessions:
            raise Refusal("rate_limit_exceeded", f"this key may have {limits.sessions} sessions open", 1.0)
        for per_minute, buckets, least, what in (
            (limits.tokens_per_minute, self._tokens, 0.0, "use {} tokens a minute"),
            (limits.requests_per_minute, self._requests, 1.0, "send {} requests a minute"),
        ):
            bucket = buckets.get(key)
            if not per_minute or bucket is None:  # an unused bucket is full
                continue
            level = bucket.level_at(now)
            if level < least or level <= 0.0:
                message = f"this key may {what.format(per_minute)}"
                raise Refusal("rate_limit_exceeded", message, bucket.wait(1.0, level))

    def _check(self, now: float, key: str, free_place: Callable[[], bool]) -> None:
        """Charge the request. Raises Refusal."""
        self.ask(now, key)
        if self._open >= self.max_sessions and not free_place():
            raise Refusal("overloaded", f"all {self.max_sessions} sessions of this verifier are in use", 1.0)
        limits = self.limits.get(key)
        if limits is not None and limits.tokens_per_minute:
            self._tokens.setdefault(key, _Bucket(limits.tokens_per_minute, now)).fill(now)
        if limits is not None and limits.requests_per_minute:
            bucket = self._requests.setdefault(key, _Bucket(limits.requests_per_minute, now))
            bucket.fill(now)
            bucket.level -= 1.0
