"""Holds `sim.replay` against reality: a verifier process, a real edge, a socket between them, and both models.

`edge.Edge.generate` lets a real edge generate what a trace was recorded of, and notes what its `Drafter`
sees. `ahead.measure_ahead` times drafting ahead with that, over a line with an added delay and with a paced device
(`distance`), and sets beside it what a replay predicts.
"""
