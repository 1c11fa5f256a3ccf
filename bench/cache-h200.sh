#!/usr/bin/env bash
# What nbs/results holds of rotated caches, the latency model and streamed conversions on one GPU, step by step: bench/cache-h200.sh STEP OUT
set -uo pipefail
step=$1 out=$2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MLX_PTX_CACHE_DIR=${MLX_PTX_CACHE_DIR:-/tmp/mlx-ptx} HF_HUB_OFFLINE=1
mkdir -p "$out" "$MLX_PTX_CACHE_DIR"
run() { local most=$1; shift; echo "== $*"; timeout -k 5 "$most" python3 "$@" 2>&1 | stdbuf -oL tr '\r' '\n' | grep --line-buffered -v -i -e warning -e '^ *[0-9]*%' -e '^search' -e '^scoring' -e '^ *$'; }
attention="fp16;tq4"
case $step in
warm) # MLX compiles a kernel at its first use, which takes seconds: all at once, each process with a folder of its own
    n=0
    one() { n=$((n+1)); mkdir -p /tmp/warm/$n; MLX_PTX_CACHE_DIR=/tmp/warm/$n timeout 170 "$@" >/tmp/warm/$n.log 2>&1 & }
    for k in fp16 tq4; do
        one python3 bench/turbo_cache.py --only attention --contexts 4096 --kinds "$k" -o /tmp/warm/a$n.json
        for shape in qwen3-0.6b llama-3.1-8b; do
            one python3 bench/turbo_cache.py --only speed,prefill --shapes $shape --layers 1 --contexts 4096 --kinds "$k" --rounds 1 -o /tmp/warm/s$n.json
        done
    done
    one python3 bench/turbo_cache.py --only checks --roads rotated -o /tmp/warm/c.json
    for bits in 3 4 6 8; do one python3 -c "
import mlx.core as mx
for a, b in ((4096, 4096), (12288, 4096), (4096, 12288), (151936, 4096), (1024, 4096)):
    w = mx.quantize(mx.random.normal((a, b)).astype(mx.bfloat16), 64, $bits)
    for n in (1, 512): mx.eval(mx.quantized_matmul(mx.ones((1, n, b), mx.bfloat16), *w, group_size=64, bits=$bits), mx.dequantize(*(x[:1] for x in w), group_size=64, bits=$bits))"; done
    wait
    for k in /tmp/warm/*/; do cp -rn "$k". "$MLX_PTX_CACHE_DIR"/; done
    touch /tmp/warm/done;;
checks) run 60 bench/turbo_cache.py --only checks --roads 'rotated' -o "$out/turbo-checks.json";;
attention) run 60 bench/turbo_cache.py --only attention --contexts 65536,32768,4096 --kinds "$attention" -o "$out/turbo-attention.json";;
decode) # rounds of 128 steps, so that what is done every 64 tokens is in them
    for shape in qwen3-0.6b llama-3.1-8b; do
        run 100 bench/turbo_cache.py --only speed --shapes $shape --contexts 32768,65536 --kinds 'fp16;tq4' --rounds 9 --seconds 9 --steps 128 -o "$out/turbo-speed-$shape.json"
    done;;
prefill)
    for shape in qwen3-0.6b llama-3.1-8b; do
        run 150 bench/turbo_cache.py --only prefill --shapes $shape --contexts 32768,65536 --rounds 5 --kinds 'fp16;tq4;tq4, all heads at once;tq4, spread vectors;tq4, spread vectors, two passes' -o "$out/turbo-prefill-$shape.json"
    done;;
latency-alone) # a token goes off as one graph, so that the device has all of it before it begins
    MLX_MAX_OPS_PER_BUFFER=4000 MLX_MAX_MB_PER_BUFFER=1000000 run 200 bench/latency.py --alone nbs/results/latency-h200.json --shapes 8B --context 2048 -o "$out/latency-2k.json";;
latency) run 170 bench/latency.py --shapes 8B --bits 3,4,6,8 --rounds 25 --seconds 40 --context 2048 --contexts '' -o "$out/latency.json";;
memory) run 400 bench/memory.py --shape 8B --folder "${FOLDER:-/tmp/m8}" --max-memory 12 --n 2 --seq-len 64 --n-evaluation 4 -o "$out/memory.json";; # in a control group of 12 GiB
memory-moe) run 1300 bench/memory.py --shape 30B-A3B ${LAYERS:+--layers $LAYERS} --folder "${FOLDER:-/tmp/m30}" --max-memory 16 --n 2 --seq-len 64 --n-evaluation 4 --skip-baselines -o "$out/memory-moe.json";; # of 16 GiB
esac
exit 0
