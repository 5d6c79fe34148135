"""Fuzzing: inputs near the valid ones, by the million, against everything that reads what others have written.

mutate    changes values and bytes
targets   what is read, what may be said about it, what it may cost
running   the loop, and the judge
live      a verifier that is fed such inputs while honest sessions go on
"""
