#!/usr/bin/env bash
# Every measurement in this folder, one after another.
set -euo pipefail
cd "$(dirname "$0")/.."
for script in bench/*.py; do
    [ -e "$script" ] || { echo "no measurements yet"; exit; }
    .venv/bin/python "$script"
done
