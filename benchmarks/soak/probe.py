"""How long /health takes, asked by a process of its own: `python -m benchmarks.soak.probe PORT...`.

Each look is a connection, as a load balancer's is. At the end of its standard input it prints, by port, the
milliseconds of each answer, and how many were none: refused connections (nobody listens), others.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time

EVERY_S = 0.1
TIMEOUT_S = 10.0


def look(port: int) -> float:
    """Milliseconds. Raises OSError or HTTPException."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        connection.getresponse().read()
    finally:
        connection.close()
    return (time.monotonic() - began) * 1e3


def main() -> None:
    ports = [int(word) for word in sys.argv[1:]]
    found = {port: {"ms": list[float](), "refused": 0, "failed": 0} for port in ports}
    over = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    while not over.wait(EVERY_S):
        for port in ports:
            seen = found[port]
            try:
                seen["ms"].append(round(look(port), 2))  # type: ignore[attr-defined]
            except ConnectionRefusedError:
                seen["refused"] += 1  # type: ignore[operator]
            except (OSError, http.client.HTTPException):
                seen["failed"] += 1  # type: ignore[operator]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
