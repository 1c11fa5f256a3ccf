#!/usr/bin/env bash
# Bring .venv up to date; make one if there is none that runs.
set -euo pipefail
cd "$(dirname "$0")/.."
supported='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
runs() { "$1" -c "$supported" 2>/dev/null; }

if ! runs .venv/bin/python; then
    for python in "${PYTHON:-python3.11}" python3.11 python3.12 python3.13 python3; do
        runs "$python" && break
        python=
    done
    [ -n "$python" ] || { echo "Python 3.11, 3.12 or 3.13 is needed; point PYTHON to one." >&2; exit 1; }
    "$python" -m venv --clear .venv
fi
# The distribution was once called optiq: two of them would share one command
.venv/bin/python -m pip uninstall --quiet --yes optiq 2>/dev/null || true
echo "Setting up .venv: some minutes the first time."
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
