"""`make soak`: a router, two verifiers and an edge as processes, a hundred thousand short sessions, and faults.

    phase      target                       what is done
    steady     a hash, fast steps           users that leave, connections of devices that break; memory is measured
    faults     a hash, fast steps           every kind of `faults.KINDS`, again and again
    pair       the tiny pair                every kind of death
    overload   a hash, slow steps           2x and 5x of what can be served

In every phase the whole text of each session is compared with the target's own.
"""
