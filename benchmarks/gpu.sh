#!/usr/bin/env bash
# Everything that wants a GPU, in under ten minutes: `benchmarks/gpu.sh`; `benchmarks/gpu.sh --tiny` is a dry run on a CPU.
# In this order; a part that cannot run is skipped by name, and one that fails or hangs leaves the others alone:
#   self-test        with vLLM: that of every start
#   bits             logits of one row against several, with the libraries' kernels and with fixed shapes
#   steps-qwen3-8b   step times of random weights in that shape; overlap; a profile to emulate
#   choice           the fused choice of tokens, equal to the rule, beside plain torch
#   host             with vLLM: the host's share of a step, beside vLLM's own
#   depth-1, -2      with vLLM: streamed requests to a verifier and to an edge before it, with one step in flight and two
#   steps-qwen3-32b  as for 8b
# --target, --slots, --out and --only may be given, and PYTHON set. What became of each part is in summary.json, beside
# the figures. A profile can be emulated: `wisp serve --engine emulated --target docs/results/gpu/qwen3-8b.toml`.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu.everything "$@"
