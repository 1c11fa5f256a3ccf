#!/usr/bin/env bash
# What the caches need a GPU for, most important first, resuming from OUT: bench/cache-gpu.sh speed|quality OUT [MODEL TEXT_FOLDER]
# `speed` (6 minutes on two GPUs, one for each shape of model) wants MLX for CUDA and the GPUs to itself; `quality` (7 minutes) runs in PyTorch. TEXT_FOLDER holds valid.txt and test.txt.
set -uo pipefail
what=$1 out=$2 model=${3:-demo} text=${4:-bundled}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MLX_PTX_CACHE_DIR=${MLX_PTX_CACHE_DIR:-/tmp/mlx-ptx}
mkdir -p "$out" "$MLX_PTX_CACHE_DIR"
end=$(($(date +%s)+${LIMIT:-600})) gpus=$(nvidia-smi -L | wc -l) shapes='qwen3-0.6b llama-3.1-8b'
run() {
    local left=$((end-$(date +%s))) most=$1; shift
    [ $left -gt 8 ] || return
    echo "== $*"
    timeout -k 5 $((left < most ? left : most)) python3 "$@" 2>&1 | tr '\r' '\n' | grep -v -i -e warning -e '^ *[0-9]*%' -e '^$'
}
has() { python3 -c "import json, sys; sys.exit(sys.argv[2] not in json.load(open(sys.argv[1])))" "$out/$1" "$2" 2>/dev/null; }
warm() { # MLX compiles a kernel at its first use, which takes seconds: every kind of cache by itself, on one layer, so that all compile at once
    local n=0 all="fp16;affine 4 bits;tq4;tq4, composed;tq4, dequantized first;tq3;tq2;tq4, keys preconditioned" kinds k shape
    IFS=';' read -ra kinds <<< "$all"
    for shape in $shapes; do for k in "${kinds[@]}"; do
        n=$((n+1)); mkdir -p /tmp/warm/$n
        CUDA_VISIBLE_DEVICES=$((n % gpus)) MLX_PTX_CACHE_DIR=/tmp/warm/$n timeout 150 python3 bench/turbo_cache.py --only speed --layers 1 \
            --shapes $shape --contexts 4096 --kinds "$k" --rounds 1 -o /tmp/warm/$n.json >/tmp/warm/$n.log 2>&1 &
    done; done
    wait
    for k in /tmp/warm/*/; do cp -rn "$k". "$MLX_PTX_CACHE_DIR"/; done
    echo "== compiled: $(ls "$MLX_PTX_CACHE_DIR" | wc -l) files"
}
speed() { # of one shape, on one GPU
    local o="-o $out/turbo-speed-$1.json" n
    export CUDA_VISIBLE_DEVICES=$2
    for n in 4096 65536 32768; do run 150 bench/turbo_cache.py --only speed --shapes $1 --contexts $n --rounds 21 --seconds 4 $o; done # each length is saved when it is done
    run 100 bench/turbo_cache.py --only prefill --shapes $1 --contexts 4096,32768,65536 --rounds 1 --kinds 'fp16;affine 4 bits;tq4' $o
    if [ "$1" = qwen3-0.6b ]; then
        run 60 bench/turbo_cache.py --only attention --contexts 65536,4096 $o
        run 120 bench/turbo_cache.py --only checks --every --until $((end-15)) $o
    fi
}
if [ "$what" = speed ]; then
    [ -d /tmp/warm ] || warm
    gpu=0
    for shape in $shapes; do
        if [ $gpus -gt 1 ]; then speed $shape $gpu & else speed $shape 0; fi
        gpu=$((gpu+1))
    done
    wait
    for n in 512 1024; do
        CUDA_VISIBLE_DEVICES=$((n/512 % gpus)) run 200 bench/turbo_cache.py --only needle --tasks recall --lengths $n -o "$out/turbo-recall-$n.json" &
    done
    wait
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
