"""The sampling rule in four Triton kernels, for all sampled rows of a step at once.

    scan    reads each row's logits once: the largest, the sums of exponentials, and the arg max of logit / T + noise
            over the whole vocabulary. Noise is float32 first; where that leaves more than one id, float64 decides
    gather  for rows with top-k, top-p or min-p, and for alternatives that are reported: the few ids near the top that
            can matter, from those blocks of the logits that have any
    select  settles these rows. The arg max over all ids is the answer if it is among the kept ids; if not, all that is
            kept is likelier than it, so the arg max over those ids is the next to be tried. Nothing is sorted
    accept  along each draft, until the target says something else

Rows with constraints are written out first, by one more kernel (`edit_kernel`). Results travel back in one copy.

Bytes read, in units of the logits' size: scan reads 1. gather reads the blocks that have a candidate, so at most 1
and usually less; without top-k, top-p, min-p and alternatives it does not run. The rest reads a few ids a row. So at
most 2, unless more than `MOST` ids of a row are candidates. Then select reads that row itself: twice for each try, and
for top-k with top-p 33 times before. That is the worst case, a flat row whose bound prunes nothing: by one try for
each factor e that the kept part of its probability is below 1, plus one. A sum of float32 numbers bounds the mass
that top-p is a part of; one row in some ten thousand is so close to an edge that select sums it up exactly, one read
more.

A row of kernels' arguments that is named `..._of` has an entry for each view. A view is a row as a choice sees it:
each row, and once more without its constraints where log probabilities are asked for.
"""

from wisp.engines.vllm.kernels.accept import accept_kernel
from wisp.engines.vllm.kernels.arithmetic import DRAW, PLAIN, TEMPERED
from wisp.engines.vllm.kernels.prune import gather_kernel, select_kernel
from wisp.engines.vllm.kernels.scan import edit_kernel, scan_kernel

__all__ = [
    "DRAW", "PLAIN", "TEMPERED", "accept_kernel", "edit_kernel", "gather_kernel", "scan_kernel", "select_kernel",
]  # fmt: skip
