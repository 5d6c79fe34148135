#!/usr/bin/env bash
# Everything that wants a GPU, in under ten minutes: `benchmarks/gpu.sh`; `benchmarks/gpu.sh --tiny` is a dry run on a CPU.
# In this order, and a part that cannot run is skipped by name:
#   1. steps     step times of random weights in the shape of Qwen3-8B, then Qwen3-32B; overlap; a profile to emulate
#   2. choice    the fused choice of tokens, equal to the rule, beside plain torch
#   3. bits      logits of one row against several, with the libraries' kernels and with fixed shapes
#   4. the rest  with vLLM: the self-test, the host's share of a step, and streamed requests to a verifier that serves TARGET,
#                with one step in flight and with two
# PYTHON, OUT, TARGET (default: the tiny target) and SLOTS may be set. The profile that part 1 writes can be emulated:
# `wisp serve --engine emulated --target docs/results/gpu/qwen3-8b.toml`.
set -uo pipefail
cd "$(dirname "$0")/.."

TINY=${1:-}
PYTHON=${PYTHON:-python3}
TARGET=${TARGET:-tiny-target}
OUT=${OUT:-docs/results/gpu}
[ "$TINY" = "--tiny" ] && OUT=${TMPDIR:-/tmp}/wisp-gpu-dry-run
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"

has() { "$PYTHON" -c "import $1" 2>/dev/null; }
skip() { echo "skipped: $1 ($2)" | tee -a "$OUT/skipped.txt"; }
part() { # seconds, name, command: one that fails does not stop the rest
    local limit=$1 name=$2
    [ -n "$TINY" ] && limit=$((limit * 5)) # a CPU may be busy
    shift 2
    echo "--- $name"
    timeout "$limit" "$@" || skip "$name" "status $?"
}
: > "$OUT/skipped.txt"

if ! has torch; then
    skip "everything" "PyTorch is not installed"
    exit 1
fi

part 150 "steps of qwen3-8b" "$PYTHON" -m benchmarks.gpu steps --shapes qwen3-8b --limit 70 --out "$OUT" $TINY
part 150 "steps of qwen3-32b" "$PYTHON" -m benchmarks.gpu steps --shapes qwen3-32b --limit 70 --out "$OUT" $TINY
if has triton; then
    part 90 "choice" env ${TINY:+TRITON_INTERPRET=1} "$PYTHON" -m benchmarks.gpu choice --out "$OUT" $TINY
else
    skip "choice" "Triton is not installed"
fi
part 60 "bits" "$PYTHON" -m benchmarks.gpu bits --out "$OUT" $TINY

if ! has vllm; then
    skip "the self-test, the host's share, requests" "vLLM is not installed"
    exit 0
fi
part 120 "self-test" sh -c "'$PYTHON' -m wisp.cli doctor --offline --json > '$OUT/doctor.json'"
part 120 "the host's share" "$PYTHON" -m benchmarks step --target "$TARGET" --offline --out "$OUT/host.json" \
    ${TINY:+--sequences 8}
for depth in 1 2; do
    if ! "$PYTHON" -m wisp.cli serve --help | grep -q -- "--depth"; then
        [ "$depth" = 2 ] && skip "requests at depth 2" "this version has one step in flight" && continue
        DEPTH=""
    else
        DEPTH="--depth $depth"
    fi
    "$PYTHON" -m wisp.cli serve --engine vllm --target "$TARGET" --slots "${SLOTS:-64}" --context 2048 --port 8199 \
        --offline $DEPTH > "$OUT/serve-$depth.log" 2>&1 &
    SERVER=$!
    for _ in $(seq 90); do
        curl -fs http://127.0.0.1:8199/health > /dev/null && break
        kill -0 $SERVER 2>/dev/null || break
        sleep 1
    done
    part 90 "requests at depth $depth" "$PYTHON" -m benchmarks.gpu requests --server http://127.0.0.1:8199 \
        --out "$OUT" --name "requests-$depth" $TINY
    kill $SERVER 2>/dev/null
    wait $SERVER 2>/dev/null
done
echo "figures are in $OUT; skipped:" && cat "$OUT/skipped.txt"
