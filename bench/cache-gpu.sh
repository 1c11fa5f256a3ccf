#!/usr/bin/env bash
# What the caches need a GPU for, most important first, resuming from OUT: bench/cache-gpu.sh speed|quality OUT [MODEL TEXT_FOLDER]
# `speed` (6 minutes) wants MLX for CUDA and a GPU to itself; `quality` (7 minutes) runs in PyTorch. TEXT_FOLDER holds valid.txt and test.txt.
set -uo pipefail
what=$1 out=$2 model=${3:-demo} text=${4:-bundled}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
end=$(($(date +%s)+${LIMIT:-420}))
run() {
    local left=$((end-$(date +%s))) most=$1; shift
    [ $left -gt 8 ] || return
    echo "== $*"
    timeout -k 5 $((left < most ? left : most)) python3 "$@" 2>&1 | tr '\r' '\n' | grep -v -e '^ *[0-9]*%' -e '^$'
}
has() { python3 -c "import json, sys; sys.exit(sys.argv[2] not in json.load(open(sys.argv[1])))" "$out/$1" "$2" 2>/dev/null; }
if [ "$what" = speed ]; then
    o="-o $out/turbo-speed.json"
    run 90 bench/turbo_cache.py --only checks --until $(($(date +%s)+75)) $o
    for shape in qwen3-0.6b llama-3.1-8b; do run 130 bench/turbo_cache.py --only speed --shapes $shape $o; done
    run 40 bench/turbo_cache.py --only attention --contexts 65536,4096 $o
    run 150 bench/turbo_cache.py --only prefill --until $((end-25)) $o
    run 200 bench/turbo_cache.py --only checks --every --until $((end-15)) $o
else
    texts="--calibration $text/valid.txt --evaluation $text/test.txt --n 4 --seq-len 256 --eval-n 16 --eval-len 512"
    [ "$text" = bundled ] && texts='--n 4 --seq-len 256 --eval-n 16 --eval-len 256'
    run 150 bench/turbo_cache.py --only needle -o "$out/turbo-needle.json"
    has kv.json combined || run 200 bench/kv_cache.py --only combined --model "$model" $texts --context 16384 -o "$out/kv.json"
    has kv.json quality || run 120 bench/kv_cache.py --only quality --model "$model" $texts -o "$out/kv.json"
    has kv-rotated.json combined || run 150 bench/kv_cache.py --only combined --model "$model" $texts --context 16384 \
        --formats tq2,tq3,tq4,4g64,6g64,8g64 -o "$out/kv-rotated.json"
fi
exit 0
