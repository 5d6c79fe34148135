"""`make bench-step`: what the host does for one verification step, beside what vLLM's own host does for one of its own.

One process holds the same model twice: in vLLM's engine core as it comes, drafting by n-grams, and in the same core
under our verifier and target engine. Both verify four draft tokens for each of so many sequences a step, at T = 0.7
with top-p, half of them with log probabilities. Ours has twice as many sessions, and the two halves alternate, as
they do when each drafts while the other is verified. The two sides take turns, step by step, in one thread.

Thread CPU time is told, by where it goes, without the forward pass (`_model_forward`, `compute_logits`), without the
choice of tokens (theirs: `_sample`; ours: the device's part of `choose`), and without drafting.

    stopwatch.py  exclusive thread CPU time of some methods
    sides.py      the two sides
    compare.py    turns, medians, the table
"""
