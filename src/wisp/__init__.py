"""WISP: edge devices draft tokens, a verifier decides them; the text is the target model's own.

`core` decides (no I/O, no clock); `engines` run models; `server` and `edge` are the two processes, `router` puts
several servers behind one address; `api` is the OpenAI surface of all three; `calibrate` measures what decisions start
from, `sim` simulates and emulates fleets, `check` proves that an installation works; `cli` is the command line.
"""

__version__ = "0.2.0"
