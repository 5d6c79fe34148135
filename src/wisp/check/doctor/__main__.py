"""The child of `wisp.check.doctor.engine`: prints a line of JSON after each check."""

import json
import sys
from dataclasses import asdict

from wisp.check.doctor.check import guarded
from wisp.check.doctor.engine import ENGINE, vllm_self_test

if __name__ == "__main__":
    for name, check in ({"vllm": vllm_self_test} if sys.argv[1:] == ["vllm"] else ENGINE).items():
        print(json.dumps(asdict(guarded(name, check))), flush=True)
