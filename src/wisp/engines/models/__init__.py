"""The model catalogue and `pull`: from a name to a checked file on this machine.

    resolve("qwen2.5-coder-1.5b")        a name of the catalogue
    resolve("hf:user/repo/file.gguf")    any GGUF file of the Hugging Face hub
    resolve("./my.gguf")                 a file that is already here

`cards.py` says which models there are, `store.py` keeps files on disk, `hub.py` and `packages.py` are the
two places that files come from, and `pulling.py` puts them together.
"""

from wisp.engines.models.cards import PAIRS, ModelCard, catalogue, drafter_for
from wisp.engines.models.device import here
from wisp.engines.models.progress import Progress, RichProgress
from wisp.engines.models.pulling import is_cached, pull, resolve
from wisp.engines.models.store import cache_dir

__all__ = [
    "PAIRS",
    "ModelCard",
    "Progress",
    "RichProgress",
    "cache_dir",
    "catalogue",
    "drafter_for",
    "here",
    "is_cached",
    "pull",
    "resolve",
]
