"""`wisp profile`: how fast a device drafts, and how long a target's steps take.

`grid` chooses the steps, `measure` times them on any target engine, `target` fits the cost model, judges it
on steps kept apart and writes the file that `wisp serve --cost` reads; `draft` times the draft model of a device.
"""
