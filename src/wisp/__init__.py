"""WISP: edge devices draft tokens, a verifier in the cloud decides them; the text is the target model's own.

`core` decides (no I/O, no clock); `engines` run models; `cloud` and `edge` are the two processes;
`api` is the OpenAI surface both share; `lab` measures; `cli` is the command line.
"""

__version__ = "0.2.0"
