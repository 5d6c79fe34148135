"""Figures that both the command line and the servers name. They are here, as `wisp --help` loads no server."""

PARK_S = 60.0  # that a session outlives its edge
DRAIN_S = 30.0  # to finish sessions at the end
MAX_SESSIONS = 1024  # open at once
MOST_REPLICAS = 64  # of one router, which looks at each of them several times a second
