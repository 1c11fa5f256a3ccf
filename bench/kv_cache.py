"""What mixed formats buy in the KV cache, and what they cost in memory and time.

    python bench/kv_cache.py --model MODEL --calibration FILE --evaluation FILE [--only quality,combined,kernels,peak,speed] -o results.json

`quality`   sweep, allocation at 5, 4 and 3 bits with keys and values apart and tied, uniform formats; KL predicted and measured (PyTorch)
`combined`  one allocation over weights and cache; full and quantized weights × fp16, 8, mixed and 4-bit cache (PyTorch)
`kernels`   both products of attention with a stored cache against their dense form, every width and head width (MLX, this device)
`peak`      peak memory of a prompt of --long tokens, and exact bytes of the cache, mixed against as it is (MLX, random weights)
`speed`     tokens per second at several lengths, mixed against as it is and mlx-lm's own 4 and 8 bits (MLX, random weights)
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from optiq.backends import TorchBackend
from optiq.calibration import passages, token_batch
from optiq.evals.perplexity import evaluate, evaluation_tokens, overrides_of
from optiq.evals.report import machine, score_row
from optiq.formats import Format, divides, parse_format
from optiq.knapsack import allocate, uniform
from optiq.kv_cache import (MixedKVCache, attend, cache_bytes, configurations, joint_plan, kv_config, kv_layout, kv_sweep,
                            memory_table, own_caches, read_kv_config)
from optiq.models import Checkpoint
from optiq.tiny import tiny

def texts(args, c):
    "Calibration and evaluation tokens, from disjoint text"
    split = 'all' if Path(args.calibration).is_file() else 'train'
    return (token_batch(passages(args.calibration, split), c.tokenizer, args.n, args.seq_len),
            evaluation_tokens(args.evaluation, c.tokenizer, args.eval_n, args.eval_len, 'all' if Path(args.evaluation).is_file() else 'test'))

def quality(args):
    c = Checkpoint(args.model)
    b, (tokens, scored) = TorchBackend(c), texts(args, c)
    start = time.perf_counter()
    sweep = kv_sweep(b, tokens, args.formats.split(','), context=args.context, out=args.sweep, progress=False)
    took = time.perf_counter()-start
    plans = {f'uniform {f}': uniform(sweep, f) for f in sweep.formats}
    few = [f for f in sweep.formats if f.bits <= 4] # what an average of 3 bits is made of
    plans |= {f'mixed {t}': allocate(sweep, target_bits=t) for t in (5, 4, 3)}
    plans |= {f'tied {t}': allocate(sweep, target_bits=t, tie='cache') for t in (5, 4, 3)}
    plans |= {'mixed 3 of 2,3,4': allocate(sweep, target_bits=3, formats=few)}
    overrides = {n: overrides_of(p) for n, p in plans.items()}
    scores, same = evaluate(b, scored, overrides), evaluate(b, tokens, overrides)
    rows = [score_row(n, p, scores[n]) | dict(predicted_kl=p.predicted_kl, predicted_kl_se=p.predicted_kl_se, kl_sequences=scores[n].kl.tolist(),
            calibration_kl=float(same[n].kl.mean()), counts={str(f): k for f, k in p.counts().items()}) for n, p in plans.items()]
    for r in rows: print(f'{r["name"]:18} {r["nominal_bpw"]:.3f} KL {r["kl"]:.4f} ± {r["kl_se"]:.4f}  calibration: predicted {r["predicted_kl"]:.4f}, '
                         f'measured {r["calibration_kl"]:.4f}  perplexity {r["perplexity"]:.2f}', flush=True)
    config = kv_config(plans['mixed 5'], kv_layout(c, args.context))
    return dict(model=c.name, tokens=list(tokens.shape), scored=list(scored.shape), sweep_s=took, noise=sweep.header['noise'], rows=rows,
                reference_perplexity=scores['reference'].perplexity, memory=memory_table(kv_layout(c), read_kv_config(config)), layers=config['layers'],
                sensitivity=[dict(unit=p, format=str(f), kl=sweep.kl(p, f), se=sweep.se(p, f)) for p, f in sweep.values])

def combined(args):
    c = Checkpoint(args.model)
    b, (tokens, scored) = TorchBackend(c), texts(args, c)
    limit = args.limit*2**20 if args.limit else int(.3*(kv_layout(c, args.context).nbytes+sum(u.params*u.itemsize for u in c.units)))
    joint = joint_plan(b, tokens, limit, args.context, args.weight_formats.split(','), args.formats.split(','), progress=False)
    report, changed = configurations(b, scored, joint, [Format(8), Format(4)])
    print(report, f'\n{len(changed)} of {len(joint["cache"])} units of the cache change format between the weights', flush=True)
    predicted = joint['weights'].predicted_kl+joint['cache'].predicted_kl
    measured = evaluate(b, tokens, {'joint': overrides_of(joint['weights']) | overrides_of(joint['cache'])})['joint'].kl.mean()
    return dict(model=c.name, tokens=list(tokens.shape), scored=list(scored.shape), context=args.context, limit_mb=limit/2**20, rows=report.rows,
                changed=changed, units=len(joint['cache']), predicted_kl=predicted, calibration_kl=float(measured))

def kernels(args):
    out = {}
    for dim in (64, 96, 128, 256):
        for name in ('2g32', '3g64', '4g64', '5g64', '6g64', '8g64', 'mxfp4', 'as-is'):
            f = parse_format(name)
            if not divides(f, (1, dim)): continue
            k, v = mx.random.normal((2, 1, 2, 300, dim)).astype(mx.float32)
            cache = MixedKVCache(f, f)
            stored = cache.update_and_fetch(k, v)
            worst = 0
            for many in (1, 5, 64):
                q = mx.random.normal((1, 8, many, dim))
                mask = 'causal' if many > 1 else None
                want = mx.fast.scaled_dot_product_attention(q, *(s.dense() for s in stored), scale=dim**-.5, mask=mask)
                try: worst = max(worst, abs(attend(q, *stored, scale=dim**-.5, mask=mask)-want).max().item())
                except Exception as e: worst = f'{type(e).__name__}: {e}'; break
            out[f'{name} {dim}'] = worst
            print(name, dim, worst, flush=True)
    return out

def random_model(d, args):
    shape = json.loads(args.shape) if args.shape else dict(num_hidden_layers=8, hidden_size=1024, intermediate_size=2048, num_attention_heads=16,
                                                           num_key_value_heads=8, head_dim=128, vocab_size=4096, max_position_embeddings=65536)
    return Checkpoint(tiny('qwen3', d, shape=shape)).load()

def caches_of(model, kind):
    from mlx_lm.models.cache import QuantizedKVCache
    if kind == 'fp16': return own_caches(model)
    if kind.startswith('mlx-lm'): return [QuantizedKVCache(64, int(kind[-1])) for _ in own_caches(model)]
    return [MixedKVCache(*kind.split('/')) for _ in own_caches(model)]

def prefill(model, kind, n, chunk):
    caches, ids = caches_of(model, kind), mx.arange(n)[None] % 4000
    for t in range(0, n, chunk):
        z = model(ids[:, t:t+chunk], cache=caches)[:, -1]
        mx.eval(z, [c.state for c in caches])
        mx.clear_cache()
    return caches, z

def peak(args):
    out = {}
    with tempfile.TemporaryDirectory() as d:
        model = random_model(f'{d}/m', args)
        mx.eval(model.parameters())
        for kind in ('fp16', '8g64/8g64', '5g64/3g64', '4g64/4g64'):
            for _ in range(2): # the first one compiles
                mx.clear_cache(); mx.reset_peak_memory()
                before = mx.get_active_memory()
                caches, _ = prefill(model, kind, args.long, args.chunk)
                row = dict(peak_mb=(mx.get_peak_memory()-before)/2**20, cache_mb=sum(c.nbytes for c in caches)/2**20)
                del caches
            layout = kv_layout(model, args.long)
            pair = tuple(map(parse_format, kind.split('/'))) if '/' in kind else None
            row['predicted_mb'] = cache_bytes(layout, {l.index: pair for l in layout.layers} if pair else {}, args.long)/2**20
            out[kind] = row
            print(kind, row, flush=True)
    return dict(tokens=args.long, chunk=args.chunk, kinds=out)

def speed(args):
    rows = []
    with tempfile.TemporaryDirectory() as d:
        model = random_model(f'{d}/m', args)
        mx.eval(model.parameters())
        for n in map(int, args.lengths.split(',')):
            for kind in ('fp16', 'mlx-lm 8', 'mlx-lm 4', '8g64/8g64', '4g64/4g64', '5g64/3g64'):
                prefill(model, kind, min(n, 2*args.chunk), args.chunk)
                start = time.perf_counter()
                caches, z = prefill(model, kind, n, args.chunk)
                first = time.perf_counter()-start
                times = []
                for _ in range(args.steps+2):
                    start = time.perf_counter()
                    z = model(z.argmax(-1)[:, None], cache=caches)[:, -1]
                    mx.eval(z)
                    times.append(time.perf_counter()-start)
                times = np.array(times[2:])
                rows.append(dict(context=n, kind=kind, prefill_tok_s=n/first, decode_tok_s=1/float(np.median(times)), cache_mb=sum(c.nbytes for c in caches)/2**20,
                                 quartiles=(1/np.quantile(times, [.75, .25])).tolist()))
                print(rows[-1], flush=True)
                del caches
    return dict(rows=rows, steps=args.steps, chunk=args.chunk)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='demo')
    p.add_argument('--calibration', default='bundled')
    p.add_argument('--evaluation', default='bundled')
    p.add_argument('--only', default='quality,combined,kernels,peak,speed')
    p.add_argument('--formats', default='2g64,3g64,4g64,5g64,6g64,8g64')
    p.add_argument('--weight-formats', default='3g64,4g64,6g64,8g64')
    for name, default in dict(n=4, seq_len=256, eval_n=4, eval_len=512, context=16384, limit=0, long=8192, chunk=2048, steps=30).items():
        p.add_argument(f'--{name.replace("_", "-")}', type=int, default=default)
    p.add_argument('--lengths', default='4096,16384,32768')
    p.add_argument('--shape', help='JSON, changes to the small Qwen3 for `peak` and `speed`')
    p.add_argument('--sweep', help='file of the sweep of `quality`, to resume from')
    p.add_argument('-o', default='nbs/results/kv.json')
    args = p.parse_args()
    out = Path(args.o)
    done = json.loads(out.read_text()) if out.exists() else {}
    gpu = __import__('torch').cuda
    about = machine() | dict(gpu=gpu.get_device_name() if gpu.is_available() else None, mlx_device=str(mx.default_device()), command=' '.join(sys.argv))
    for name in args.only.split(','):
        print('==', name, flush=True)
        start = time.perf_counter()
        try: done[name] = globals()[name](args) | dict(seconds=time.perf_counter()-start, about=about)
        except Exception as e:
            if os.environ.get('OPTIQ_DEBUG'): raise
            print(f'{name} failed: {type(e).__name__}: {e}', file=sys.stderr)
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(done, indent=1)+'\n')
