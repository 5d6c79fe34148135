"""Explanations of HTTP answers that are not a verifier's, and of proxies that cannot be used."""

from __future__ import annotations

import os
import ssl
from urllib.parse import urlsplit
from urllib.request import getproxies

import msgspec
from websockets.exceptions import InvalidProxy

LONGEST = 300  # characters of a text from elsewhere, in errors and logs

_PROXIES = ("all_proxy", "https_proxy", "http_proxy", "socks_proxy", "wss_proxy", "ws_proxy")


class Error(msgspec.Struct):
    """OpenAI's error object, as far as it is read here."""

    message: str = ""
    code: str | None = None


class _Body(msgspec.Struct):
    error: Error


def error_in(body: bytes) -> Error | None:
    """The error in the body of a WISP server's answer; None if no WISP server wrote it."""
    try:
        error = msgspec.json.decode(body, type=_Body).error
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    error.message = plain(error.message)
    return error


def plain(text: str) -> str:
    """A text from elsewhere, made fit for one line of a log."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line[:LONGEST])


def stranger(status: int, location: str | None = None) -> str:
    """Why an answer with this status, which is not WISP's own, is of no use, and how to mend it."""
    if location and 300 <= status < 400:
        return (
            f"HTTP {status}: redirected to {plain(location)}, which is not followed; if the verifier is there, "
            "give that address. A network that wants a sign-in does the same"
        )
    if status == 404:
        return "HTTP 404: there is no WISP at this path; is the address right, to the end?"
    if status == 407:
        return "HTTP 407: the proxy asks for a name and password; they go into its address in HTTPS_PROXY"
    return (
        f"HTTP {status}, and not from a WISP verifier: a proxy, a network's sign-in page or another server "
        f"answers there{', or there is no WISP at this path' if status == 403 else ''}"
    )


def reason(error: Exception, url: str) -> str:
    """Why `url` could not be reached; if a proxy from the environment is at fault, also how to mend it."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    # A certificate that is not trusted is a ValueError, too, and an OSError; "no" names hosts that need no proxy.
    odd = isinstance(error, ValueError | OverflowError) and not isinstance(error, OSError)
    if isinstance(error, InvalidProxy) or (odd and getproxies().keys() - {"no"}):
        what = "the proxy's address is none"  # which is not repeated here: it may hold a password
    elif isinstance(error, ImportError) and "socks" in str(error).lower():  # websockets' or httpx's
        what = "a SOCKS proxy needs packages: pip install python-socks socksio"
    elif isinstance(error, ConnectionRefusedError):
        return "connection refused"  # asyncio repeats the address, and both event loops the number
    elif isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted: {error.verify_message}. If it is yours: SSL_CERT_FILE=cert.pem"
        )
    else:
        return plain(str(error)) or type(error).__name__
    named = sorted(name for name in os.environ if name.lower() in _PROXIES)
    return f"{what} (from {', '.join(named) or 'the system'}); without a proxy: NO_PROXY={urlsplit(url).hostname}"
