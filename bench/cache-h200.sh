#!/usr/bin/env bash
# What nbs/results holds of rotated caches, the latency model and streamed conversions on one GPU, step by step: bench/cache-h200.sh STEP OUT
set -uo pipefail
step=$1 out=$2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MLX_PTX_CACHE_DIR=${MLX_PTX_CACHE_DIR:-/tmp/mlx-ptx} HF_HUB_OFFLINE=1
mkdir -p "$out" "$MLX_PTX_CACHE_DIR"
run() { local most=$1; shift; echo "== $*"; timeout -k 5 "$most" python3 "$@" 2>&1 | tr '\r' '\n' | grep -v -i -e warning -e '^ *[0-9]*%' -e '^search' -e '^scoring' -e '^ *$'; }
attention="fp16;tq4;tq4, no tensor cores;tq4, 264 blocks;tq4, 1056 blocks;tq4, 2112 blocks"
case $step in
warm) # MLX compiles a kernel at its first use, which takes seconds: all at once, each process with a folder of its own
    n=0
    one() { n=$((n+1)); mkdir -p /tmp/warm/$n; MLX_PTX_CACHE_DIR=/tmp/warm/$n timeout 170 "$@" >/tmp/warm/$n.log 2>&1 & }
    for k in fp16 tq4 'tq4, no tensor cores'; do one python3 bench/turbo_cache.py --only attention --contexts 4096 --kinds "$k" -o /tmp/warm/a$n.json; done
    one python3 bench/turbo_cache.py --only attention --contexts 32768 --kinds 'tq4, no tensor cores' -o /tmp/warm/b.json
    one python3 bench/turbo_cache.py --only attention --contexts 4096 --kinds 'tq4, composed' -o /tmp/warm/d.json
    one python3 bench/turbo_cache.py --only checks -o /tmp/warm/c.json
    one python3 bench/turbo_cache.py --only prefill --shapes qwen3-0.6b --layers 1 --contexts 4096 --kinds 'fp16;tq4' -o /tmp/warm/p.json
    for bits in 3,4 4,6 6,8; do one python3 bench/latency.py --shapes tiny --bits $bits -o /tmp/warm/l$bits.json; done
    for bits in 3 4 6 8; do one python3 -c "
import mlx.core as mx
for a, b in ((4096, 4096), (12288, 4096), (4096, 12288), (151936, 4096), (1024, 4096)):
    w = mx.quantize(mx.random.normal((a, b)).astype(mx.bfloat16), 64, $bits)
    mx.eval(mx.quantized_matmul(mx.ones((1, 1, b), mx.bfloat16), *w, group_size=64, bits=$bits), mx.dequantize(*(x[:1] for x in w), group_size=64, bits=$bits))"; done
    wait
    for k in /tmp/warm/*/; do cp -rn "$k". "$MLX_PTX_CACHE_DIR"/; done
    touch /tmp/warm/done;;
checks) run 60 bench/turbo_cache.py --only checks --roads 'rotated;rotated, no tensor cores' -o "$out/turbo-checks.json";;
attention) run 60 bench/turbo_cache.py --only attention --contexts 65536,32768,4096 --kinds "$attention" -o "$out/turbo-attention.json";;
decode)
    for shape in qwen3-0.6b llama-3.1-8b; do
        run 100 bench/turbo_cache.py --only speed --shapes $shape --contexts 32768,65536,4096 --kinds 'fp16;tq4' --rounds 15 --seconds 3 -o "$out/turbo-speed-$shape.json"
    done;;
prefill)
    for shape in qwen3-0.6b llama-3.1-8b; do
        run 60 bench/turbo_cache.py --only prefill --shapes $shape --contexts 32768,65536 --kinds 'fp16;tq4;tq4, all heads at once' -o "$out/turbo-speed-$shape.json"
    done;;
latency) run 170 bench/latency.py --shapes 8B --bits 3,4,6,8 --rounds 25 --seconds 40 --context 2048 --contexts '' -o "$out/latency.json";;
memory) run 280 bench/memory.py --shape 8B --folder /tmp/m8 --max-memory 12 --n 2 --seq-len 64 --n-evaluation 4 --skip-baselines -o "$out/memory.json";;
memory-moe) run 280 bench/memory.py --shape 30B-A3B --layers 8 --folder /tmp/m30 --max-memory 16 --rounding minmax --n 2 --seq-len 64 --n-evaluation 4 --skip-baselines -o "$out/memory-moe.json";;
esac
exit 0
