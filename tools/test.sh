#!/usr/bin/env bash
# The code and its layers, then all notebooks, then all tests; pytest's count comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two workers, so one core each
export OPTIQ_FAST=1 # demos at small sizes
ruff check
lint-imports

log=$(mktemp)
trap 'rm -f "$log"' EXIT

nbdev_test --timing --n_workers 2 | tee "$log"
count=$(grep -c '\.ipynb: [0-9]* secs$' "$log" || true)
[ "$count" -gt 0 ] || { echo "nbdev_test found no notebook" >&2; exit 1; }
echo "$count notebooks passed"
pytest -q -n 2 --dist loadfile tests # a file in one worker, so that what its tests share is made once
