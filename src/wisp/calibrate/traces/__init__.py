"""Traces: the tokens of target and drafter at every position of a text, so that drafting can be replayed.

    prompts.py     prompts from JSONL files
    statistics.py  recorded statistics of a draft distribution
    record.py      prompts in, trace files out: group by group, resumable
    target.py      phase 1: the target's text
    draft.py       phases 2 and 3: the drafter along that text, and beyond each rejection
    format.py      the files
    command.py     `wisp trace`

Output does not depend on drafts, so one trace replays any drafting policy exactly.
"""

from wisp.calibrate.traces.format import OffPath, Trace, TraceSet
from wisp.calibrate.traces.statistics import COLUMNS

__all__ = ["COLUMNS", "OffPath", "Trace", "TraceSet"]
