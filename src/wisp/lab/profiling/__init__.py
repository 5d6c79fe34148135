"""`wisp profile`: how fast a device drafts, and how long a target's steps take.

    grid     which steps are timed
    measure  timing them on any target engine
    target   fitting the cost model, judging it on steps kept apart, writing the file that `wisp serve --cost` reads
    draft    the draft model of a device
"""
