"""How good, and how fast, are rotated caches? Every part writes its figures when it is done.

    python bench/turbo_cache.py --only speed -o nbs/results/turbo-speed.json
    python bench/turbo_cache.py --only kl,compare --model MODEL --text FOLDER -o nbs/results/turbo-smollm2.json
    python bench/turbo_cache.py --only needle -o nbs/results/turbo-needle.json

`speed`    decode tokens/s and peak memory, random weights at the shapes of Qwen3-0.6B and Llama-3.1-8B, on MLX's default device
`kl`       KL of whole models with every token quantized, rotated against affine and KIVI-style formats, and an allocation
`compare`  error of attention on one model's keys and values, beside mlx-vlm's TurboQuant (where it is installed)
`needle`   retrieval on the demo model: hit rate with Wilson intervals, and margins

FOLDER holds valid.txt (calibration) and test.txt (evaluation). `speed --only-shapes tiny` is a rehearsal for any machine.
"""
import argparse
import gc
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

def save(args, done, name, figures):
    from optiq.evals.report import machine
    done[name] = figures | dict(about=machine() | dict(gpu=gpu_name(), command='python '+' '.join(sys.argv)))
    Path(args.o).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f'{args.o}.part')
    part.write_text(json.dumps(done, indent=1)+'\n')
    part.rename(args.o)

def gpu_name():
    try:
        import torch
        if torch.cuda.is_available(): return torch.cuda.get_device_name()
    except ImportError: pass
    import mlx.core as mx
    return mx.device_info().get('device_name') if mx.default_device().type == mx.DeviceType.gpu else None

def mean_se(x): return dict(mean=float(np.mean(x)), se=float(np.std(x, ddof=1)/len(x)**.5) if len(x) > 1 else None)

# speed

SHAPES = {'qwen3-0.6b': dict(model_type='qwen3', hidden_size=1024, num_hidden_layers=28, intermediate_size=3072, num_attention_heads=16,
                             num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=2**17,
                             rope_theta=1e6, rms_norm_eps=1e-6),
          'llama-3.1-8b': dict(model_type='llama', hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
                               num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False,
                               max_position_embeddings=2**17, rope_theta=5e5, rms_norm_eps=1e-5),
          'tiny': dict(model_type='llama', hidden_size=256, num_hidden_layers=2, intermediate_size=512, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=128, vocab_size=1024, tie_word_embeddings=True, max_position_embeddings=2**17,
                       rope_theta=5e5, rms_norm_eps=1e-5)}

def random_model(shape):
    import importlib
    import mlx.core as mx
    from mlx.utils import tree_map
    module = importlib.import_module(f'mlx_lm.models.{shape["model_type"]}')
    model = module.Model(module.ModelArgs.from_dict(shape))
    model.update(tree_map(lambda a: (a*.02 if a.ndim > 1 else a).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model

def cache_kinds(model):
    from mlx_lm.models.cache import QuantizedKVCache
    from optiq.formats import parse_format
    from optiq.kv_cache import MixedKVCache, own_caches
    from optiq.turbo_cache import make_turbo
    n = len(own_caches(model))
    affine = parse_format('4g64')
    return {'fp16': lambda: own_caches(model),
            'affine 4 bits, mlx-lm': lambda: [QuantizedKVCache(64, 4) for _ in range(n)],
            'affine 4 bits, mixed': lambda: [MixedKVCache(affine, affine) for _ in range(n)],
            'tq4': make_turbo(model, 4), 'tq4, dequantized first': make_turbo(model, 4),
            'tq4, keys preconditioned': make_turbo(model, 4, precondition='prompt'),
            'tq3': make_turbo(model, 3), 'tq2': make_turbo(model, 2)}

def fill(model, caches, T, chunk=2048, vocab=1000):
    "Prefill without logits; peak memory and seconds"
    import mlx.core as mx
    mx.clear_cache()
    mx.reset_peak_memory()
    start, inner = time.perf_counter(), model.model
    for t in range(0, T, chunk):
        ids = mx.array(np.random.default_rng(t).integers(0, vocab, (1, min(chunk, T-t))))
        mx.eval(inner(ids, cache=caches), [c.state[:2] for c in caches])
        mx.clear_cache()
    return dict(prefill_s=time.perf_counter()-start, prefill_peak_bytes=mx.get_peak_memory())

def decode(model, caches, n):
    "Seconds of each of n steps, after a few that warm up; each step's token depends on the last"
    import mlx.core as mx
    mx.clear_cache()
    mx.reset_peak_memory()
    def step(y): return mx.argmax(model(y, cache=caches)[:, -1:], -1)
    y = mx.array([[1]])
    for _ in range(4):
        y = step(y)
        mx.eval(y)
    times, start = [], time.perf_counter()
    after = step(y)
    mx.async_eval(after)
    for _ in range(n): # as mlx-lm does: the next step is queued before the last one's token is read
        y, after = after, step(after)
        mx.async_eval(after)
        y.item()
        times.append(time.perf_counter())
    mx.eval(after)
    gaps = np.diff([start, *times])[1:]
    return dict(tokens_per_s=float(1/np.median(gaps)), decode_peak_bytes=mx.get_peak_memory())

def one_speed(model, kind, make, T, args):
    import mlx.core as mx
    from optiq import kv_cache
    before = kv_cache.MANY
    try:
        caches = make()
        out = fill(model, caches, T, args.chunk)
        if 'dequantized' in kind: kv_cache.MANY = 1
        out |= decode(model, caches, args.steps) | dict(cache_bytes=sum(c.nbytes for c in caches))
    except Exception as e: out = dict(error=f'{type(e).__name__}: {" ".join(str(e).split())[:300]}')
    finally: kv_cache.MANY = before
    caches = None
    gc.collect()
    mx.clear_cache()
    return out

def speed(args, report):
    import mlx.core as mx
    rows = []
    for name in args.shapes.split(','):
        model = random_model(SHAPES[name])
        kinds = {k: v for k, v in cache_kinds(model).items() if not args.kinds or k in args.kinds.split(';')}
        for T in args.contexts:
            for kind, make in kinds.items():
                row = dict(model=name, context=T, cache=kind) | one_speed(model, kind, make, T, args)
                rows.append(row)
                print(json.dumps(row), flush=True)
                report(dict(rows=rows, steps=args.steps, chunk=args.chunk, dtype='bfloat16'))
        del model, kinds, make
        gc.collect()
        mx.clear_cache()
    return dict(rows=rows, steps=args.steps, chunk=args.chunk, dtype='bfloat16')

# quality

def texts(args, tokenizer):
    from optiq.calibration import passages, token_batch
    from optiq.evals.perplexity import evaluation_tokens
    source, split = ((f'{args.text}/valid.txt', 'all') if args.text != 'bundled' else ('bundled', 'train'))
    calibration = token_batch(passages(source, split), tokenizer, *args.calibration)
    source, split = ((f'{args.text}/test.txt', 'all') if args.text != 'bundled' else ('bundled', 'test'))
    return calibration, evaluation_tokens(source, tokenizer, *args.tokens, split=split)

def per_channel(x, fmt):
    "Keys as KIVI has them: each channel on its own, in groups of tokens"
    from optiq.formats import quantize_dequantize
    return quantize_dequantize(x.swapaxes(-1, -2).contiguous(), fmt).swapaxes(-1, -2)

def kivi(layout, bits):
    from optiq.formats import Format, quantize_dequantize
    return {u.path: partial(per_channel if u.kind == 'keys' else quantize_dequantize, fmt=Format(bits, 32)) for u in layout.units}

def kl(args, report):
    from optiq.backends import TorchBackend
    from optiq.evals.perplexity import evaluate, overrides_of
    from optiq.formats import nbytes, parse_format
    from optiq.knapsack import allocate
    from optiq.kv_cache import kv_layout, kv_sweep
    from optiq.models import Checkpoint
    from optiq.turbo_cache import key_statistics, preconditioned
    b = TorchBackend(Checkpoint(args.model))
    calibration, tokens = texts(args, b.checkpoint.tokenizer)
    layout, stats, rows = kv_layout(b.checkpoint), key_statistics(b, calibration), []
    D = layout.units[0].shape[-1]
    everywhere = lambda k, v=None: {u.path: parse_format(k if u.kind == 'keys' else v or k) for u in layout.units}
    bits = lambda plan: float(np.mean([8*nbytes(f, (1, u.shape[-1]))/u.shape[-1] for u in layout.units for f in [plan[u.path]]]))
    def score(plans, condition, extra={}):
        variants = {n: overrides_of(p) for n, p in plans.items()} | {n: o for n, (o, _) in extra.items()}
        scores = evaluate(b, tokens, variants, batch=1)
        for n, s in scores.items():
            if n == 'reference' and rows: continue
            if n != 'reference' and not s.kl.max() > 1e-7: raise ValueError(f'{n} changed nothing: the cache is not quantized')
            real = 16. if n == 'reference' else extra[n][1] if n in extra else bits(plans[n])
            rows.append(dict(name=n, preconditioned=condition and n != 'reference', real_bits=real, kl=mean_se(s.kl), agreement=mean_se(s.agree),
                             perplexity=s.perplexity, dnll=mean_se(s.nll-scores['reference'].nll)))
            print(json.dumps(rows[-1]), flush=True)
        report(figures())
    def figures(): return dict(model=b.checkpoint.name.rstrip('/').split('/')[-1], head_dim=D, tokens=list(tokens.shape),
                               calibration=list(calibration.shape), rows=rows)
    with preconditioned(b, stats): score({f: everywhere(f) for f in ('tq4', 'tq3', 'tq2')}, True)
    score({f: everywhere(f) for f in ('tq4', 'tq3', 'tq2', '4g64', '3g64', '2g64')}, False,
          {f'KIVI-style {n} bits': (kivi(layout, n), n+1.) for n in (4, 2)})
    with preconditioned(b, stats):
        sweep = kv_sweep(b, calibration[:2, :256], ['tq2', 'tq3', 'tq4'], progress=False)
        plans = {f'separate K and V, {t} bits': allocate(sweep, target_bits=t) for t in (3, 2.5)}
        score({n: p for n, p in plans.items()} | {'K4 V2': everywhere('tq4', 'tq2')}, True)
        for r in rows:
            if r['name'] in plans: r['predicted_kl'] = plans[r['name']].predicted_kl
    return figures()

# attention on the same keys and values

def softmax(s):
    e = np.exp(s-s.max(-1, keepdims=True))
    return e/e.sum(-1, keepdims=True)

def attention(q, k, v): # (H, T, D), (G, T, D)
    n, T = len(q)//len(k), q.shape[1]
    s = np.einsum('htd,hsd->hts', q, k.repeat(n, 0))/q.shape[-1]**.5
    return s, np.einsum('hts,hsd->htd', softmax(np.where(np.tri(T, dtype=bool), s, -1e9)), v.repeat(n, 0))

def errors(q, k, v, kk, vv):
    "Relative squared errors: of scores as softmax sees them, of values, of attention's output"
    (s, o), (t, p) = attention(q, k, v), attention(q, kk, vv)
    T = s.shape[-1]
    seen, n = np.tri(T)[None], np.arange(1, T+1)[None, :, None]
    centre = lambda a: (a-(a*seen).sum(-1, keepdims=True)/n)*seen
    return dict(scores=float((centre(t-s)**2).sum()/(centre(s)**2).sum()), values=float(((v-vv)**2).sum()/(v**2).sum()),
                output=float(((o-p)**2).sum()/(o**2).sum()))

def their_quantizer(bits, D, seed):
    import mlx.core as mx
    from mlx_vlm.turboquant import _TurboQuantMSECodec
    codec = _TurboQuantMSECodec(D, bits, seed)
    def apply(x):
        state = codec.quantize(mx.array(x)[None])
        return np.array(codec.dequantize(state)).reshape(x.shape), 8*sum(a.nbytes for a in state)/x.size
    return apply

def compare(args, report):
    import torch
    from optiq.backends import TorchBackend
    from optiq.formats import Format, nbytes, parse_format, quantize_dequantize
    from optiq.kv_cache import kv_layout
    from optiq.models import Checkpoint
    from optiq.turbo_cache import key_statistics, watch_attention
    from optiq.turboquant import TurboQuantMSE, round_trip
    b, seen = TorchBackend(Checkpoint(args.model)), {}
    calibration, tokens = texts(args, b.checkpoint.tokenizer)
    stats = key_statistics(b, calibration)
    with watch_attention(b, lambda i, q, k, v: seen.update({i: [b.numpy(x)[0] for x in (q, k, v)]})): b.logits(tokens[:1])
    D, rows = seen[0][1].shape[-1], []
    def affine(x, bits, group): return quantize_dequantize(x, Format(bits, group))
    def methods(i, n):
        p, tq = stats[f'cache.{i}.keys'], lambda x: round_trip(x, n)
        true = lambda name: 8*nbytes(parse_format(name), (1, D))/D
        lloyd = TurboQuantMSE(D, n, scale='norm', rotation='hadamard')
        yield 'rotated, preconditioned', lambda k, v: (round_trip(k, n, to=p.keys, back=p.undo), tq(v)), true(f'tq{n}')
        yield 'rotated', lambda k, v: (tq(k), tq(v)), true(f'tq{n}')
        yield 'as published (Lloyd-Max, norm)', lambda k, v: tuple(lloyd.dequantize(*lloyd.quantize(x)) for x in (k, v)), true(f'tq{n}')
        yield 'affine, groups of 64', lambda k, v: (affine(k, n, 64), affine(v, n, 64)), n+32/64
        yield 'KIVI-style, groups of 32', lambda k, v: (per_channel(torch.tensor(k), Format(n, 32)).numpy(), affine(v, n, 32)), n+1.
        try: theirs = [their_quantizer(n, D, s) for s in (0, 1)] # as its cache does: another seed for values
        except ImportError: return
        yield 'mlx-vlm TurboQuant', lambda k, v: (theirs[0](k)[0], theirs[1](v)[0]), theirs[0](seen[i][1])[1]
    for n in (4, 3, 2):
        found = {}
        for i, (q, k, v) in seen.items():
            for name, f, bits in methods(i, n):
                found.setdefault((name, bits), []).append(errors(q, k, v, *f(k, v)))
        for (name, bits), es in found.items():
            rows.append(dict(name=name, bits=n, real_bits=bits) | {m: mean_se([e[m] for e in es]) for m in ('scores', 'values', 'output')})
            print(json.dumps(rows[-1]), flush=True)
        report(dict(rows=rows, tokens=tokens.shape[1], layers=len(seen)))
    return dict(rows=rows, tokens=tokens.shape[1], layers=len(seen), model=b.checkpoint.name.rstrip('/').split('/')[-1],
                mlx_vlm=__import__('importlib.metadata', fromlist=['version']).version('mlx-vlm'))

# retrieval

def wilson(hits, n, z=1.96):
    p, c = hits/n, z*z/n
    half = z*(p*(1-p)/n+c/(4*n))**.5
    return [(p+c/2-half)/(1+c), (p+c/2+half)/(1+c)]

def trials(b, rows, overrides, tokenizer, batch=8):
    "Of each row: whether all tokens of the answer are the most likely ones, and the smallest margin among them"
    out = []
    for k in range(0, len(rows), batch):
        some = [(tokenizer.encode(r['prompt']), tokenizer.encode(' '+r['answer'])) for r in rows[k:k+batch]]
        longest = max(len(p)+len(a) for p, a in some)
        ids = np.zeros((len(some), longest), np.int32) # padding stands behind, where causal attention does not look
        for row, (p, a) in zip(ids, some): row[:len(p)+len(a)] = p+a
        z = b.numpy(b.logits(ids, overrides))
        for j, (p, a) in enumerate(some):
            zs = z[j, len(p)-1:len(p)+len(a)-1].astype(np.float64)
            right = zs[range(len(a)), a].copy()
            zs[range(len(a)), a] = -np.inf
            out.append(float((right-zs.max(-1)).min()))
    return np.array(out)

def needle(args, report):
    from optiq.backends import TorchBackend
    from optiq.evals.perplexity import overrides_of
    from optiq.formats import parse_format
    from optiq.kv_cache import kv_layout
    from optiq.models import Checkpoint
    from optiq.tasks import recall
    from optiq.calibration import passages, token_batch
    from optiq.turbo_cache import key_statistics, preconditioned
    b = TorchBackend(Checkpoint('demo'))
    tokenizer, rows = b.checkpoint.tokenizer, []
    stats = key_statistics(b, token_batch(passages('bundled'), tokenizer, 4, 128))
    units, count = kv_layout(b.checkpoint).units, lambda s: len(tokenizer.encode(s))
    for task, keys in (('needle', 1), ('recall', None)):
        for length in args.lengths:
            texts = recall(args.trials, length, 'test', keys=keys, count=count)
            for bits in (16, 4, 3, 2):
                plan = overrides_of({u.path: parse_format(f'tq{bits}') for u in units}) if bits < 16 else {}
                with preconditioned(b, stats): margins = trials(b, texts, plan, tokenizer)
                hits = int((margins > 0).sum())
                rows.append(dict(task=task, length=length, bits=bits, trials=len(texts), hits=hits, wilson=wilson(hits, len(texts)),
                                 margin=mean_se(margins), margin_quartiles=[float(x) for x in np.quantile(margins, (.25, .5, .75))]))
                print(json.dumps(rows[-1]), flush=True)
                report(dict(rows=rows))
    return dict(rows=rows)

if __name__ == '__main__':
    pair = lambda s: tuple(int(x) for x in s.split('x'))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='speed')
    p.add_argument('--model', default='demo')
    p.add_argument('--text', default='bundled', help='folder with valid.txt and test.txt')
    p.add_argument('--tokens', type=pair, default=(6, 512), help='evaluation, sequences x tokens')
    p.add_argument('--calibration', type=pair, default=(2, 512), help='calibration, sequences x tokens')
    p.add_argument('--shapes', default='qwen3-0.6b,llama-3.1-8b')
    p.add_argument('--contexts', type=lambda s: [int(x) for x in s.split(',')], default=[4096, 32768, 65536])
    p.add_argument('--kinds', default='', help='caches to time, separated by ;')
    p.add_argument('--steps', type=int, default=48)
    p.add_argument('--chunk', type=int, default=2048)
    p.add_argument('--lengths', type=lambda s: [int(x) for x in s.split(',')], default=[128, 256, 512])
    p.add_argument('--trials', type=int, default=200)
    p.add_argument('-o', default='nbs/results/turbo.json')
    args = p.parse_args()
    done = json.loads(Path(args.o).read_text()) if Path(args.o).exists() else {}
    for name in args.only.split(','):
        save(args, done, name, globals()[name](args, lambda f: save(args, done, name, f)))
