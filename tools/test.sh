#!/usr/bin/env bash
# The code and its layers, then all notebooks, then all tests; pytest's count comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two workers, so one core each
export OPTIQ_FAST=1 # demos at small sizes
ruff check
lint-imports

# beside the notebooks; these compare caches to a digit that the order of a sum decides, so MLX multiplies by itself (tests/fast.py)
pytest -q tests/test_kv_window.py &
window=$!
trap "kill $window 2> /dev/null || true" EXIT
python tools/notebooks.py
wait $window
# a file in one worker, so that what its tests share is made once, and in the order of tests/conftest.py
OPTIQ_BLAS=torch pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests --ignore tests/test_kv_window.py
