#!/usr/bin/env bash
# Every measurement that this machine can make, on MODEL (the demo model by default), into OUT (bench_output by default).
# The figures in nbs/results say with which command and on what they were made.
set -uo pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-demo} text=${TEXT:-bundled} out=${OUT:-bench_output} python=.venv/bin/python failed=0
mkdir -p "$out"
run() { echo "== $*"; "$python" "$@" || { echo "failed: $*" >&2; failed=1; }; }
run bench/sweep.py --model "$model" --text "$text" --n 2 --only replay,shortcuts,memory -o "$out/sweep.json"
run bench/kv_cache.py --model "$model" --calibration "$text" --evaluation "$text" -o "$out/kv.json"
run bench/turbo_cache.py --only kl,needle -o "$out/turbo.json"
run bench/evals.py --trials 20 --problems 100 -o "$out/evals.json"
run bench/peers/ours.py --model "$model" --only uniform,sweeps,ours -o "$out/peers.json"
exit $failed
