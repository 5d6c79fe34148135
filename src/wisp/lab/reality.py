"""Holds `lab.replay` against reality: a verifier process, an edge, a socket between them, and both models.

`live` lets a real edge generate what a trace was recorded of, and notes every event that its `Drafter` sees.
`fed_back` gives these events, with their times, to a fresh `Drafter` whose proposals and verdicts come from the
trace. `measure_ahead` times drafting ahead over a line with an added delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import httpx
import msgspec

from wisp.api.backend import Generation
from wisp.core.drafter import Action, Drafter
from wisp.core.drafting import Ahead, Policies
from wisp.core.messages import Draft, Open, Verdict
from wisp.core.pace import Pace
from wisp.core.sampling import Sampling
from wisp.core.signals import Signal
from wisp.core.work import Committed
from wisp.edge import backend
from wisp.edge.backend import EdgeBackend
from wisp.edge.link import VerifierLink
from wisp.edge.tokenizers import TokenizerCache
from wisp.engines.base import DraftEngine, Proposal
from wisp.lab.children import Children, free_ports
from wisp.lab.devices import Device, Link, Server
from wisp.lab.replay import MAX_DRAFT, Bench, Generated, proposal, task_of, verdict_on
from wisp.lab.traces.format import Trace
