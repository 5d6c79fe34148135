"""`wisp profile`: how fast a device drafts, and how long a target's steps take.

`grid` says which steps are timed, `measure` times them on any target engine, `target` fits the cost model, judges it
on steps kept apart and writes the file that `wisp serve --cost` reads; `draft` times the draft model of a device.
"""
