#!/usr/bin/env bash
# What bench/sweep.py and the two conversions need a GPU for, in one go: bench/gpu.sh MODEL TEXT_FOLDER OUT [PEER]
set -uo pipefail
model=$1 text=$2 out=$3 peer=${4:-}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
run() { echo "== $*"; timeout "$limit" "$@" 2>&1 | tr '\r' '\n' | grep -v -e '^ *[0-9]*%' -e '^$' | tail -60; }
limit=150 run python3 bench/sweep.py --model "$model" --text "$text/valid.txt" --n 8 --only replay,shortcuts -o "$out/sweep-gpu.json"
for target in "4.5 4,8" "3.5 3,4"; do
    set -- $target
    limit=90 run python3 -m optiq.cli convert "$model" --target-bpw "$1" --candidate-bits "$2" --calibration "$text/valid.txt" \
        --evaluation "$text/test.txt" -o "/tmp/out-$1" --json | tee "$out/convert-$1.log"
    cp "/tmp/out-$1/optiq/sweep.json" "$out/sweep-$1.json"
done
limit=160 run python3 bench/sweep.py --model "$model" --text "$text/valid.txt" --only mlx -o "$out/sweep-gpu.json"
[ -z "$peer" ] || limit=120 run python3 bench/sweep.py --model "$model" --text "$text/valid.txt" --only peer --peer "$peer" -o "$out/sweep-gpu.json"
