"""Messages with every field filled in, for tests of the wire format and for fuzzing it."""

from __future__ import annotations

from wisp.core.protocol.constraints import Constraints, Grammar
from wisp.core.protocol.messages import Device, Open
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.slo import Slo

CONSTRAINTS = Constraints(
    ((7, -0.5),), 1.0, -1.0, 1.5, ((1, 2), (3,)), (4, 5), (6,), Grammar("regex", "a+", (8, 9))
)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OPEN = Open(
    "session1", 1, [5], Sampling(0.5, 1, 0.25, 0.0, 9, 2, (3,), CONSTRAINTS), 4, 2, [6], [7], False, True, 3,
    Slo(1.0, 2.0), ":1", "of-one", "d", Device(0.5, 1.0), TRACE,
)  # fmt: skip
