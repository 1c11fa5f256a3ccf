"""What mixed formats buy in the KV cache, and what they cost in memory and time.

    python bench/kv_cache.py --model MODEL --calibration FILE --evaluation FILE [--only quality,kernels …] -o results.json

`quality`   sweep, allocation at 5, 4 and 3 bits with keys and values apart and tied, uniform formats; KL predicted and
            measured (PyTorch)
`combined`  one allocation over weights and cache; full and quantized weights × caches as they are, 8, 4 bits, mixed (PyTorch)
`three`     how far below uniform 3 bits allocation can get in the same bytes: several ways, each scored (PyTorch)
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

from optiq.backends.torch import TorchBackend
from optiq.calibration import passages, token_batch
from optiq.evals.perplexity import evaluate, evaluation_tokens, overrides_of
from optiq.report import machine, score_row
from optiq.formats import AS_IS, Format, divides, parse_format, quantize_dequantize
from optiq.knapsack import allocate, pose
from optiq.plan import uniform
from optiq.kv.attention import _attend
from optiq.kv.cache import MixedKVCache, _mixed_bytes, memory_table
from optiq.kv.config import kv_config, read_kv_config
from optiq.kv.layout import kv_layout, own_caches
from optiq.kv.sweep import configurations, _helped, joint_plan, kv_sweep
from optiq.models import Checkpoint
from optiq.measure.sweep import Sweep
from optiq.material.tiny import tiny
from optiq.refine import _alternatives, _improve, _joint_kl

GPU = mx.default_device().type == mx.DeviceType.gpu

def texts(args, c):
    "Calibration and evaluation tokens, from disjoint text"
    whole = Path(args.evaluation).is_file() and args.evaluation != args.calibration
    tokens = token_batch(passages(args.calibration, 'all' if whole else 'train'), c.tokenizer, args.n, args.seq_len)
    return tokens, evaluation_tokens(args.evaluation, c.tokenizer, args.n_evaluation, args.eval_len, 'all' if whole else 'test')

def plans_of(sweep):
    "Uniform formats, and allocations with keys and values apart and tied"
    found = {f'uniform {f}': uniform(sweep, f) for f in sweep.formats}
    for t in (5, 4, 3):
        found |= {f'mixed {t}': allocate(sweep, target_bpw=t), f'tied {t}': allocate(sweep, target_bpw=t, tie='cache')}
    return found

def row(name, p, score, same):
    "Figures of one plan: on evaluation text, and predicted and measured on the calibration text"
    found = score_row(name, p, score) | dict(predicted_kl=p.predicted_kl, predicted_kl_se=p.predicted_kl_se,
        calibration_kl=float(same.kl.mean()), kl_sequences=score.kl.tolist(), counts={str(f): k for f, k in p.counts().items()})
    print('{name:14} {nominal_bpw:.3f} bits  KL {kl:.4f} ± {kl_se:.4f}  perplexity {perplexity:.2f}  on calibration text: '
          'predicted {predicted_kl:.4f}, measured {calibration_kl:.4f}'.format(**found), flush=True)
    return found

def quality(args):
    c = Checkpoint(args.model)
    b, (tokens, scored) = TorchBackend(c), texts(args, c)
    start = time.perf_counter()
    sweep = kv_sweep(b, tokens, args.formats.split(','), context=args.context, out=args.sweep, progress=False)
    took, plans = time.perf_counter()-start, plans_of(sweep)
    overrides = {n: overrides_of(p) for n, p in plans.items()}
    scores, same = evaluate(b, scored, overrides), evaluate(b, tokens, overrides)
    rows = [row(n, p, scores[n], same[n]) for n, p in plans.items()]
    config = kv_config(plans['mixed 5'], kv_layout(c, args.context))
    return dict(model=c.name, tokens=list(tokens.shape), scored=list(scored.shape), sweep_s=took, noise=sweep.header['noise'],
                rows=rows, reference_perplexity=scores['reference'].perplexity, layers=config['layers'],
                memory=memory_table(kv_layout(c), read_kv_config(config)),
                sensitivity=[dict(unit=p, format=str(f), kl=sweep.kl(p, f), se=sweep.se(p, f)) for p, f in sweep.values])

def combined(args):
    c = Checkpoint(args.model)
    b, (tokens, scored) = TorchBackend(c), texts(args, c)
    everything = kv_layout(c, args.context).nbytes+c.other_bytes+sum(u.nbytes(AS_IS) for u in c.units)
    limit = args.limit*2**20 or int(.3*everything)
    joint = joint_plan(b, tokens, limit, args.context, args.weight_formats.split(','), args.formats.split(','), progress=False, rounding='minmax')
    report, changed = configurations(b, scored, joint, [Format(8), Format(4)])
    print(report, f'\n{len(changed)} of {len(joint["cache"])} units of the cache change format between the weights', flush=True)
    both = overrides_of(joint['weights']) | overrides_of(joint['cache'])
    return dict(model=c.name, tokens=list(tokens.shape), scored=list(scored.shape), context=args.context, limit_mb=limit/2**20,
                rows=report.rows, changed=changed, units=len(joint['cache']),
                predicted_kl=joint['weights'].predicted_kl+joint['cache'].predicted_kl,
                calibration_kl=float(evaluate(b, tokens, {'joint': both})['joint'].kl.mean()))

def three(args):
    "How far below uniform 3-bit groups of 64 can allocation get, in the same bytes? Several ways, each scored on evaluation text"
    c = Checkpoint(args.model)
    b, (tokens, scored) = TorchBackend(c), texts(args, c)
    more = token_batch(passages(args.calibration, 'train'), c.tokenizer, 3*args.n, args.seq_len)
    affine, rotated = [f'{n}g{g}' for n in (2, 3, 4) for g in (32, 64, 128)]+['5g64', '6g64'], [f'tq{n}' for n in (2, 3, 4, 5)]
    plain, found = ['2g64', '3g64', '4g64', '5g64', '6g64'], dict(model=c.name, tokens=list(tokens.shape), scored=list(scored.shape), rows=[])
    with _helped(b, tokens, [parse_format('tq3')]):
        def add(plans, **more):
            scores = evaluate(b, scored, {n: overrides_of(p) for n, p in plans.items()})
            found['flat'] = flat = found.get('flat') or scores['uniform 3g64'].kl.tolist()
            found['rows'] += [against(n, p, scores[n].kl, np.array(flat)) for n, p in plans.items()]
            args.keep('three', found | more)
        whole = kv_sweep(b, tokens, affine+rotated, context=args.context, out=args.sweep, progress=False)
        base, flat = uniform(whole, '3g64'), uniform(whole, 'tq3')
        asked = {'keys and values apart': (plain, {}), 'tied': (plain, dict(tie='cache')), 'groups of 32, 64, 128': (affine, {}),
                 'rotated beside affine': (affine+rotated, {}), 'rotated alone': (rotated, {}),
                 'rotated alone, bytes of tq3': (rotated, dict(max_bytes=flat.nbytes))}
        plans = {n: allocate(some(whole, fs), **dict(max_bytes=base.nbytes) | o) for n, (fs, o) in asked.items()}
        add({'uniform 3g64': base, 'uniform tq3': flat} | plans)
        plan, tried = searched(b, tokens, some(whole, plain), base)
        add({'apart, measured jointly': plan}, tried=tried)
        long = kv_sweep(b, more, plain, context=args.context, out=args.sweep and f'{args.sweep}.more', progress=False)
        add({'apart, on three times the text': allocate(long, max_bytes=base.nbytes)}, tried=tried, more=list(more.shape))
    return found | dict(tried=tried, more=list(more.shape))

def some(sweep, formats):
    "A sweep of fewer formats"
    keep = [parse_format(f) for f in formats]
    return Sweep(sweep.units, keep, {k: v for k, v in sweep.values.items() if k[1] in keep}, sweep.header)

def searched(b, tokens, sweep, base):
    "The plan that measured best among near-optimal ones, then measured again around, until nothing gets better"
    q = pose(sweep, max_bytes=base.nbytes)
    plan = q.solve('exact')
    tried = {'allocated': plan, 'uniform': base} | _alternatives(q, plan)
    kl = _joint_kl(b, tokens, tried)
    best = min(tried, key=lambda n: kl[n].mean())
    best, history = _improve(b, tokens, q, tried, kl, best, 0, 1, quantize_dequantize)
    best = min(tried, key=lambda n: kl[n].mean())
    return tried[best], dict(kept=best, rounds=history, joint={n: float(kl[n].mean()) for n in tried})

def against(name, plan, kl, flat):
    "KL of a plan, and its ratio to uniform 3g64 with an interval over sequences drawn again"
    draws = np.random.default_rng(0).integers(0, len(kl), (4000, len(kl)))
    low, high = np.quantile(kl[draws].mean(1)/flat[draws].mean(1), [.025, .975])
    found = dict(name=name, nominal_bpw=plan.nominal_bpw, true_bpw=plan.true_bpw, predicted_kl=plan.predicted_kl, kl=float(kl.mean()),
                 kl_se=float(kl.std(ddof=1)/len(kl)**.5), ratio=float(kl.mean()/flat.mean()), ratio_95=[float(low), float(high)],
                 counts={str(f): k for f, k in plan.counts().items()}, formats={p: str(f) for p, f in plan.items()})
    print('{name:48} {nominal_bpw:.3f} / {true_bpw:.3f} bits  KL {kl:.4f} ± {kl_se:.4f}  of uniform {ratio:.3f} {ratio_95}'.format(**found), flush=True)
    return found

def kernels(args):
    out = {}
    for dim in (64, 96, 128, 256):
        for f in map(parse_format, ('2g32', '3g64', '4g64', '5g64', '6g64', '8g64', 'mxfp4', 'as-is')):
            if divides(f, (1, dim)): out[f'{f} {dim}'] = worst_difference(f, dim)
    return out

def worst_difference(f, dim):
    "Largest difference between attention over a stored cache and over its dense form, in float32; or the error"
    k, v = mx.random.normal((2, 1, 2, 300, dim))
    stored, worst = MixedKVCache(f, f).update_and_fetch(k, v), 0
    for many in (1, 5, 64):
        q, how = mx.random.normal((1, 8, many, dim)), dict(scale=dim**-.5, mask='causal' if many > 1 else None)
        want = mx.fast.scaled_dot_product_attention(q, *(s.dense() for s in stored), **how)
        try: worst = max(worst, abs(_attend(q, *stored, **how)-want).max().item())
        except Exception as e: return f'{type(e).__name__}: {e}'
    print(f, dim, worst, flush=True)
    return worst

SMALL = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
LARGE = dict(num_hidden_layers=8, hidden_size=1024, intermediate_size=2048, num_attention_heads=16, num_key_value_heads=8,
             head_dim=128, vocab_size=4096, max_position_embeddings=65536)

def random_model(folder):
    model = Checkpoint(tiny('qwen3', folder, shape=LARGE if GPU else SMALL, dtype='bfloat16' if GPU else 'float32')).load()
    mx.eval(model.parameters())
    return model

def caches_of(model, kind):
    from mlx_lm.models.cache import QuantizedKVCache
    if kind == 'dense': return own_caches(model)
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
    kinds = {}
    with tempfile.TemporaryDirectory() as d:
        model = random_model(f'{d}/m')
        layout = kv_layout(model, args.long)
        for kind in ('dense', '8g64/8g64', '5g64/3g64', '4g64/4g64', 'tq4/tq4'):
            for _ in range(2 if GPU else 1): # the first one compiles
                mx.clear_cache()
                mx.reset_peak_memory()
                before = mx.get_active_memory()
                caches, _ = prefill(model, kind, args.long, args.chunk if GPU else 512)
                after, held = mx.get_peak_memory()-before, sum(c.nbytes for c in caches)
                del caches
            pair = None if kind == 'dense' else tuple(map(parse_format, kind.split('/')))
            predicted = _mixed_bytes(layout, {l.index: pair for l in layout.layers} if pair else {}, args.long)
            kinds[kind] = dict(peak_mb=after/2**20, cache_mb=held/2**20, predicted_mb=predicted/2**20)
            print(kind, kinds[kind], flush=True)
    return dict(tokens=args.long, chunk=args.chunk if GPU else 512, kinds=kinds)

def speed(args):
    if not GPU: return dict(rows=[], note='a CPU says nothing of a GPU: not timed')
    rows = []
    with tempfile.TemporaryDirectory() as d:
        model = random_model(f'{d}/m')
        for n in map(int, args.lengths.split(',')):
            for kind in ('dense', 'mlx-lm 8', 'mlx-lm 4', '8g64/8g64', '4g64/4g64', '5g64/3g64'):
                rows.append(timed(model, kind, n, args))
                print(rows[-1], flush=True)
    return dict(rows=rows, steps=args.steps, chunk=args.chunk)

def timed(model, kind, n, args):
    "Tokens per second of a prompt of n tokens and of the steps after it, median with quartiles"
    prefill(model, kind, min(n, 2*args.chunk), args.chunk)
    start = time.perf_counter()
    caches, z = prefill(model, kind, n, args.chunk)
    first, times = time.perf_counter()-start, []
    for _ in range(args.steps+2):
        start = time.perf_counter()
        z = model(z.argmax(-1)[:, None], cache=caches)[:, -1]
        mx.eval(z)
        times.append(time.perf_counter()-start)
    low, median, high = (1/np.quantile(times[2:], [.75, .5, .25])).tolist()
    return dict(context=n, kind=kind, prefill_tok_s=n/first, decode_tok_s=median, quartiles=[low, high],
                cache_mb=sum(c.nbytes for c in caches)/2**20)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='demo')
    p.add_argument('--calibration', default='bundled')
    p.add_argument('--evaluation', default='bundled')
    p.add_argument('--only', default='quality,combined,kernels,peak,speed')
    p.add_argument('--formats', default='2g64,3g64,4g64,5g64,6g64,8g64')
    p.add_argument('--weight-formats', default='3g64,4g64,6g64,8g64')
    sizes = dict(n=4, seq_len=256, n_evaluation=4, eval_len=512, context=16384, limit=0, long=8192, chunk=2048, steps=30)
    for name, default in sizes.items():
        p.add_argument(f'--{name.replace("_", "-")}', type=int, default=default)
    p.add_argument('--lengths', default='4096,16384,32768')
    p.add_argument('--sweep', help='file of the sweep of `quality`, to resume from')
    p.add_argument('-o', default='nbs/results/kv.json')
    args = p.parse_args()
    out = Path(args.o)
    done = json.loads(out.read_text()) if out.exists() else {}
    cuda = __import__('torch').cuda
    about = machine() | dict(gpu=cuda.get_device_name() if cuda.is_available() else None, mlx_device=str(mx.default_device()),
                             command=' '.join(Path(a).name if a.startswith('/') else a for a in sys.argv))
    def keep(name, figures):
        done[name] = figures | dict(about=about)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(done, indent=1)+'\n')
    args.keep = keep
    for name in args.only.split(','):
        print('==', name, flush=True)
        start = time.perf_counter()
        try: keep(name, globals()[name](args) | dict(seconds=time.perf_counter()-start))
        except Exception as e:
            if os.environ.get('OPTIQ_DEBUG'): raise
            print(f'{name} failed: {type(e).__name__}: {e}', file=sys.stderr)
