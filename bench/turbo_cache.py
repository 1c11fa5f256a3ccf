"""How good, and how fast, are rotated caches? Every part writes its figures when it is done.

    python bench/turbo_cache.py --only speed -o nbs/results/turbo-speed.json
    python bench/turbo_cache.py --only kl,compare --model MODEL --text FOLDER -o nbs/results/turbo-smollm2.json
    python bench/turbo_cache.py --only needle -o nbs/results/turbo-needle.json

`speed`    decode tokens/s and peak memory, random weights at the shapes of Qwen3-0.6B and Llama-3.1-8B, on MLX's default device
`prefill`  seconds and peak memory of a prompt, the same models
`checks`   attention of one query against attention in float32 over the same numbers unpacked
`attention` microseconds of one layer's attention at a step
`prompt`   milliseconds of the parts of one layer's attention, for a chunk of a prompt
`kl`       KL of whole models with every token quantized, rotated against affine and KIVI-style formats, and an allocation
`compare`  error of attention on one model's keys and values, beside mlx-vlm's TurboQuant (where it is installed)
`needle`   retrieval on the demo model: hit rate with Wilson intervals, and _margins

On a CPU: python bench/turbo_cache.py --only speed --shapes smollm2-135m --contexts 1024,4096 --kinds 'fp16;affine 4 bits;tq4;tq4, dequantized first'

FOLDER holds valid.txt (calibration) and test.txt (evaluation). `--shapes tiny` is a rehearsal for any machine.
"""
import argparse
import gc
import json
import sys
import time
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

def save(args, done, name, figures):
    from optiq.report import machine
    done[name] = figures | dict(about=machine() | dict(gpu=gpu_name(), command=command()))
    Path(args.o).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f'{args.o}.part')
    part.write_text(json.dumps(done, indent=1)+'\n')
    part.rename(args.o)

def command():
    "As it was called, without the folders of this machine"
    return ' '.join(['python bench/turbo_cache.py', *(a.rstrip('/').rsplit('/', 1)[-1] if a.startswith('/') else a for a in sys.argv[1:])])

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
          'smollm2-135m': dict(model_type='llama', hidden_size=576, num_hidden_layers=30, intermediate_size=1536, num_attention_heads=9,
                               num_key_value_heads=3, head_dim=64, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
                               rope_theta=1e5, rms_norm_eps=1e-5),
          'tiny': dict(model_type='llama', hidden_size=256, num_hidden_layers=2, intermediate_size=512, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=128, vocab_size=1024, tie_word_embeddings=True, max_position_embeddings=2**17,
                       rope_theta=5e5, rms_norm_eps=1e-5)}

def shape_of(name, layers=None): return SHAPES[name] | (dict(num_hidden_layers=layers) if layers else {})

def random_model(shape):
    import importlib
    import mlx.core as mx
    from mlx.utils import tree_map
    module = importlib.import_module(f'mlx_lm.models.{shape["model_type"]}')
    model = module.Model(module.ModelArgs.from_dict(shape))
    model.update(tree_map(lambda a: (a*.02 if a.ndim > 1 else a).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model

PROMPTS = 'two passes', 'spread vectors', 'spread vectors, two passes'
WAYS = 'no tensor cores', '264 blocks', '1056 blocks', '2112 blocks', 'all heads at once', 'composed, all heads at once'

def cache_kinds(model):
    "Name ▸ function that makes the caches"
    from mlx_lm.models.cache import QuantizedKVCache
    from optiq.formats import parse_format
    from optiq.kv.cache import MixedKVCache
    from optiq.kv.layout import own_caches
    from optiq.kv.rotated import _make_turbo
    n = len(own_caches(model))
    affine = parse_format('4g64')
    return {'fp16': lambda: own_caches(model),
            'affine 4 bits': lambda: [MixedKVCache(affine, affine) for _ in range(n)],
            'tq4': _make_turbo(model, 4),
            'affine 4 bits, mlx-lm': lambda: [QuantizedKVCache(64, 4) for _ in range(n)],
            **{f'tq4, {way}': _make_turbo(model, 4) for way in ('composed', 'dequantized first', *WAYS, *PROMPTS)},
            'tq3': _make_turbo(model, 3), 'tq2': _make_turbo(model, 2),
            'tq4, keys preconditioned': _make_turbo(model, 4, precondition='prompt'),
            'affine 4 bits, in one part': lambda: [MixedKVCache(affine, affine) for _ in range(n)]}

def spread(D, G, bits, dtype, turns):
    "Encodes tokens with a thread for each channel, as for a single token"
    import mlx.core as mx
    from optiq.kv import kernels
    run = kernels._encoding('turbo_encode', kernels._STORED, kernels._ENCODE, D, G, bits, dtype, turns)
    def turn(x, m, mean, scale): return ((x.astype(mx.float32)-mean[:, None])/scale[:, None]) @ m
    @mx.compile
    def encode(keys, values, fixed, numbers, mean, scale, *turns_):
        if not turns: keys, values = (turn(x, m, *of) for x, m, *of in zip((keys, values), turns_, mean, scale))
        *of, _ = keys.shape
        return run(inputs=[keys, values, fixed, numbers], grid=(keys.size, 2, 1), threadgroup=(D, 1, 1),
                   output_shapes=[(*of, n) for b in bits for n in (D*b//32, 1)], output_dtypes=[mx.uint32, mx.float16]*2)
    return encode

SPREAD = lru_cache(None)(spread)

@contextmanager
def road(kind):
    "The road of attention that a kind of cache takes"
    from optiq.kv import attention, kernels
    before = attention._MANY, attention._PART, kernels._FUSED, kernels._ON_TENSOR_CORES, kernels._BLOCKS, attention._AT_ONCE, kernels._unpack, kernels._encoder
    if 'dequantized' in kind: attention._MANY = 1
    if 'one part' in kind: attention._PART = 0
    if 'composed' in kind: kernels._FUSED = False
    if 'no tensor cores' in kind: kernels._ON_TENSOR_CORES = False
    if ' blocks' in kind: kernels._BLOCKS = int(kind.split(' blocks')[0].split()[-1])
    if 'heads at once' in kind: attention._AT_ONCE = 2**27
    if 'spread' in kind: kernels._encoder = SPREAD
    if 'two passes' in kind: kernels._unpack = lambda *a: None
    try: yield
    finally: attention._MANY, attention._PART, kernels._FUSED, kernels._ON_TENSOR_CORES, kernels._BLOCKS, attention._AT_ONCE, kernels._unpack, kernels._encoder = before

def filled(model, shape, make, T, chunk=4096):
    "Caches of T tokens of random keys and values: a step's time does not depend on which"
    import mlx.core as mx
    caches, dims = make(), (1, shape['num_key_value_heads'], chunk, shape['head_dim'])
    k, v = (mx.random.normal(dims, key=mx.random.key(i)).astype(mx.bfloat16) for i in range(2))
    for t in range(0, T, chunk):
        n = min(chunk, T-t)
        for c in caches: c.update_and_fetch(k[:, :, :n], v[:, :, :n])
        mx.eval([c.state[:2] for c in caches])
    mx.clear_cache()
    return caches

def decode(model, caches, n):
    "Seconds of each of n steps; each step's token depends on the last"
    import mlx.core as mx
    def step(y): return mx.argmax(model(y, cache=caches)[:, -1:], -1)
    after = step(mx.array([[1]]))
    mx.async_eval(after)
    times = []
    for _ in range(n+1): # as mlx-lm does: the next step is queued before the last one's token is read
        y, after = after, step(after)
        mx.async_eval(after)
        y.item()
        times.append(time.perf_counter())
    mx.eval(after)
    for c in caches: c.trim(n+2)
    return np.diff(times)

def speed(args, report):
    "Kinds take turns, round by round; the median of the rounds' means, and of their ratios to affine 4 bits"
    import mlx.core as mx
    rows = [r for r in args.done.get('speed', {}).get('rows', []) if 'error' not in r]
    figures = lambda: dict(rows=rows, steps=args.steps, rounds=args.rounds, dtype='bfloat16')
    for name in args.shapes.split(','):
        model = None
        for T in args.contexts:
            have = {r['cache'] for r in rows if (r['model'], r['context']) == (name, T)}
            wanted = [k for k in (args.kinds.split(';') if args.kinds else KINDS) if k not in have]
            if not wanted: continue
            model = model or random_model(shape_of(name, args.layers))
            found = compared(model, name, T, list(dict.fromkeys([*(['affine 4 bits'] if have else []), *wanted])), args)
            rows += [r for r in found if r['cache'] not in have]
            report(figures())
        del model
        gc.collect()
        mx.clear_cache()
    return figures()

KINDS = ['fp16', 'affine 4 bits', 'tq4', 'tq4, composed', 'tq4, dequantized first', 'tq3', 'tq2', 'tq4, keys preconditioned', 'affine 4 bits, mlx-lm']

def compared(model, name, T, kinds, args):
    import mlx.core as mx
    makes, caches, times, steps, out = cache_kinds(model), {}, {}, {}, {}
    for kind in kinds:
        base = mx.get_active_memory()
        try:
            with road(kind):
                caches[kind] = filled(model, SHAPES[name], makes[kind], T)
                others = base-mx_bytes(model) # caches of other kinds
                mx.reset_peak_memory()
                decode(model, caches[kind], 2) # compiles, and grows the room
                steps[kind] = int(np.clip(args.seconds/args.rounds/np.median(decode(model, caches[kind], 3)), 3, args.steps))
            out[kind] = dict(decode_peak_bytes=mx.get_peak_memory()-others, cache_bytes=sum(c.nbytes for c in caches[kind]))
            times[kind] = []
        except Exception as e:
            caches.pop(kind, None)
            out[kind] = dict(error=f'{type(e).__name__}: {" ".join(str(e).split())[:300]}')
        print(name, T, kind, out[kind], flush=True)
    for k in range(args.rounds):
        for kind in times:
            if k > 1 and times[kind][0] > .3: continue # slow enough to be told apart
            with road(kind): times[kind].append(float(np.mean(decode(model, caches[kind], steps[kind])))) # what is done every 64 tokens counts
    rows = []
    for kind, found in out.items():
        if kind in times:
            low, mid, high = np.quantile(times[kind], (.75, .5, .25))
            found |= dict(tokens_per_s=1/mid, quartiles=[1/low, 1/high])
            if 'affine 4 bits' in times:
                ratio = np.array([a/b for a, b in zip(times['affine 4 bits'], times[kind])])
                found |= dict(of_affine=float(np.median(ratio)), of_affine_se=float(ratio.std(ddof=1)/len(ratio)**.5) if len(ratio) > 1 else None)
        rows.append(dict(model=name, context=T, cache=kind) | found)
        print(json.dumps(rows[-1]), flush=True)
    caches.clear()
    gc.collect()
    mx.clear_cache()
    return rows

def mx_bytes(model):
    from mlx.utils import tree_flatten
    return sum(a.nbytes for _, a in tree_flatten(model.parameters()))

def prefill(args, report):
    "Seconds and peak memory of a prompt; kinds take turns, round by round, and the median is what counts"
    import mlx.core as mx
    rows = list(args.done.get('prefill', {}).get('rows', []))
    figures = lambda: dict(rows=rows, chunk=args.chunk, rounds=args.rounds, dtype='bfloat16')
    for name in args.shapes.split(','):
        model = None
        for T in sorted(args.contexts):
            have = {r['cache'] for r in rows if (r['model'], r['context']) == (name, T)}
            kinds = [k for k in (args.kinds.split(';') if args.kinds else ('fp16', 'tq4', 'affine 4 bits', 'affine 4 bits, mlx-lm')) if k not in have]
            if not kinds: continue
            if time.time() > args.until: return figures()
            model = model or random_model(shape_of(name, args.layers))
            rows += prompts(model, name, T, kinds, args)
            report(figures())
        del model
        gc.collect()
        mx.clear_cache()
    return figures()

def prompts(model, name, T, kinds, args):
    "A row for each kind of cache"
    import mlx.core as mx
    def run(kind, n):
        with road(kind): return fill(model, cache_kinds(model)[kind](), n, args.chunk)
    found, errors = {k: [] for k in kinds}, {}
    for r in range(-1, args.rounds): # the first compiles
        for kind in kinds[max(r, 0) % len(kinds):]+kinds[:max(r, 0) % len(kinds)]:
            if kind in errors or time.time() > args.until and r > 0: continue
            try: found[kind] += [run(kind, 2*args.chunk if r < 0 else T)][:r+1 and 1]
            except Exception as e: errors[kind] = f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
            gc.collect()
            mx.clear_cache()
    rows = []
    for kind, runs in found.items():
        row = dict(error=errors[kind]) if kind in errors else {}
        if runs:
            each = [x['prefill_s'] for x in runs]
            row |= runs[0] | dict(prefill_s=float(np.median(each)), each=each)
            if 'fp16' in found: row['of_fp16'] = float(np.median([x/y['prefill_s'] for x, y in zip(each, found['fp16'])]))
        rows.append(dict(model=name, context=T, cache=kind) | row)
        print(json.dumps(rows[-1]), flush=True)
    return rows

def fill(model, caches, T, chunk=2048, vocab=1000):
    "Prefill without logits"
    import mlx.core as mx
    inner = model.model
    def ids(t): return mx.array(np.random.default_rng(t).integers(0, vocab, (1, min(chunk, T-t))))
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    for t in range(0, T, chunk):
        mx.eval(inner(ids(t), cache=caches), [c.state[:2] for c in caches])
        mx.clear_cache()
    return dict(prefill_s=time.perf_counter()-start, prefill_peak_bytes=mx.get_peak_memory(), cache_bytes=sum(c.nbytes for c in caches))

# attention by itself

def checks(args, report):
    "Relative distance of attention of one query on this device from attention in float32 over the same numbers"
    import mlx.core as mx
    rows = list(args.done.get('checks', {}).get('rows', []))
    for kind, *case in CHECKS:
        D, G, N, bits, T = case
        row = dict(kind=kind, head_dim=D, heads=G, queries=N, bits=bits, tokens=T+1)
        if any(row.items() <= r.items() for r in rows) or args.roads and kind not in args.roads.split(';'): continue
        if time.time() > args.until: break
        q, (k, v) = mx.random.normal((1, G*N, 1, D)).astype(mx.bfloat16), mx.random.normal((2, 1, G, T, D)).astype(mx.bfloat16)
        try:
            with road(kind): row |= far(kind, D, bits, q, k, v)
        except Exception as e: row |= dict(error=f'{type(e).__name__}: {" ".join(str(e).split())[:1500]}')
        rows.append(row)
        print(json.dumps(row), flush=True)
        report(dict(rows=rows))
    return dict(rows=rows)

FIRST = [(128, 8, 2, 4, 1000), (128, 8, 4, 4, 20000)] # head width, heads, queries a head, bits, tokens
REST = [(128, 8, 4, 3, 5000), (128, 8, 4, 2, 5000), (64, 3, 3, 4, 700), (256, 2, 4, 6, 900), (128, 2, 8, 8, 300), (32, 2, 2, 4, 200)]
ROADS = 'rotated', 'rotated, no tensor cores', 'rotated, composed', 'affine', 'affine, mlx-lm'
CHECKS = [(k, *c) for c in FIRST for k in ROADS]
EVERY = CHECKS+[(k, *c) for c in REST for k in ROADS] # many kernels to compile

def far(kind, D, bits, q, k, v): # `kind` may name a road
    "All but the last token in one go, the last one by itself, as in decoding"
    import mlx.core as mx
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as theirs
    from mlx_lm.models.cache import QuantizedKVCache
    from optiq.kv.attention import _attend
    from optiq.kv.cache import MixedKVCache
    from optiq.kv.rotated import TurboQuantKVCache
    T, scale, last = k.shape[2], D**-.5, (k[:, :, -1:]*.5, v[:, :, -1:]*.5)
    from optiq.backends import replay # noqa: F401, float32 means float32
    if kind == 'affine, mlx-lm':
        c = QuantizedKVCache(min(D, 64), bits)
        c.update_and_fetch(k, v)
        keys, values = c.update_and_fetch(*last)
        got = theirs(mx.array(q), keys, values, scale, None, min(D, 64), bits)
        kk, vv = (mx.dequantize(*(mx.contiguous(a) for a in x), group_size=min(D, 64), bits=bits, dtype=mx.float32) for x in (keys, values))
    else:
        c = MixedKVCache(f'{bits}g{min(D, 64)}', f'{bits}g{min(D, 64)}') if kind == 'affine' else TurboQuantKVCache(D, bits)
        c.update_and_fetch(k, v)
        keys, values = c.update_and_fetch(*last)
        got = _attend(q, keys, values, scale=scale)
        kk, vv = (x.codec.back(x.codec.dense(x.arrays, mx.float32))[:, :, :T+1] for x in (keys, values)) # bfloat16 would add .5 % of its own
    want = mx.fast.scaled_dot_product_attention(q.astype(mx.float32), kk, vv, scale=scale)
    return dict(relative_error=mx.sqrt(((got.astype(mx.float32)-want)**2).sum()/(want**2).sum()).item())

def attention(args, report):
    "Microseconds of one layer's attention at a step, the storing of its token included"
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache
    from optiq.kv.cache import MixedKVCache
    from optiq.kv.rotated import TurboQuantKVCache
    rows = []
    for T in args.contexts:
        for N in (4, 2):
            shape = dict(num_key_value_heads=8, head_dim=128)
            q = mx.random.normal((1, 8*N, 1, 128)).astype(mx.bfloat16)
            k, v = (mx.random.normal((1, 8, 1, 128)).astype(mx.bfloat16) for _ in 'kv')
            affine, rotated = lambda: MixedKVCache('4g64', '4g64'), lambda: TurboQuantKVCache(128, 4)
            for kind, make in {'fp16': KVCache, 'affine 4 bits': affine, 'affine 4 bits, in one part': affine, 'tq4': rotated,
                               **{f'tq4, {way}': rotated for way in ('composed', 'dequantized first', *WAYS[:4])}}.items():
                if args.kinds and kind not in args.kinds.split(';'): continue
                row = dict(context=T, queries=N, cache=kind)
                try:
                    with road(kind):
                        c, = filled(None, shape, lambda: [make()], T)
                        def step(q): return mx.fast.scaled_dot_product_attention(q, *c.update_and_fetch(k, v), scale=128**-.5, mask=None)
                        def rounds(n):
                            y, start = q, time.perf_counter()
                            for _ in range(n): y = step(y*.5+q)
                            mx.eval(y)
                            c.trim(n)
                            return (time.perf_counter()-start)/n
                        rounds(3)
                        row['us'] = 1e6*float(np.median([rounds(20) for _ in range(5)]))
                except Exception as e: row['error'] = f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
                rows.append(row)
                print(json.dumps(row), flush=True)
                report(dict(rows=rows))
    return dict(rows=rows)

def timed(f, n=5, calls=8):
    "Milliseconds of a call, the median of n times some in a row; `f` returns what is to be computed"
    import mlx.core as mx
    def several():
        start = time.perf_counter()
        mx.eval([f() for _ in range(calls)])
        mx.synchronize()
        return 1e3*(time.perf_counter()-start)/calls
    several()
    return float(np.median([several() for _ in range(n)]))

def prompt(args, report):
    "Milliseconds of the parts of one layer's attention, for a chunk of a prompt behind T tokens"
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache
    from optiq.kv.rotated import TurboQuantKVCache
    rows, shape = [], dict(num_key_value_heads=8, head_dim=128)
    for T in args.contexts:
        for N in (2, 4):
            q = mx.random.normal((1, 8*N, args.chunk, 128)).astype(mx.bfloat16)
            k, v = mx.random.normal((2, 1, 8, args.chunk, 128)).astype(mx.bfloat16)
            rotated = lambda: TurboQuantKVCache(128, 4)
            for kind, make in {'fp16': KVCache, 'tq4': rotated, **{f'tq4, {x}': rotated for x in ('all heads at once', *PROMPTS)}}.items():
              if args.kinds and kind not in args.kinds.split(';'): continue
              with road(kind):
                c, = filled(None, shape, lambda: [make()], T)
                c.update_and_fetch(k, v)
                c.trim(args.chunk)
                def store():
                    c.update_and_fetch(k, v)
                    c.trim(args.chunk)
                    return c.state[:2]
                def attend():
                    y = mx.fast.scaled_dot_product_attention(q, *c.update_and_fetch(k, v), scale=128**-.5, mask='causal')
                    c.trim(args.chunk)
                    return y
                row = dict(context=T, queries=N, cache=kind, store=timed(store), all=timed(attend))
                if kind.startswith('tq4'):
                    keys, values = c.keys_and_values()
                    row['encode'] = timed(lambda: [*map(list, keys.codec.encode_both(values.codec, k, v))])
                    row['turn'] = timed(lambda: keys.codec.turn(q))
                    row['unpack'] = timed(lambda: keys.dense())
                    codes, scales = keys.arrays
                    row['unpack, scaled in the same pass'] = timed(lambda: mx.dequantize(
                        codes, scales*2/16*mx.ones(2), scales*(1/16-1)*mx.ones(2), group_size=64, bits=4, dtype=mx.bfloat16))
                    kk, vv = keys.dense(), values.dense()
                    mx.eval(kk, vv)
                    row['attention'] = timed(lambda: mx.fast.scaled_dot_product_attention(q, kk, vv, scale=128**-.5, mask='causal'))
                    row['attention, 4 heads'] = timed(lambda: mx.fast.scaled_dot_product_attention(q[:, :4*N], kk[:, :4], vv[:, :4], scale=128**-.5, mask='causal'))
                rows.append(row)
                print(json.dumps(row), flush=True)
                report(dict(rows=rows, chunk=args.chunk))
    return dict(rows=rows, chunk=args.chunk)

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
    from optiq.backends.torch import TorchBackend
    from optiq.evals.perplexity import evaluate, overrides_of
    from optiq.formats import nbytes, parse_format
    from optiq.knapsack import allocate
    from optiq.kv.layout import kv_layout
    from optiq.kv.sweep import kv_sweep
    from optiq.models import Checkpoint
    from optiq.kv.precondition import key_statistics, preconditioned
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
        plans = {f'separate K and V, {t} bits': allocate(sweep, target_bpw=t) for t in (3, 2.5)}
        score({n: p for n, p in plans.items()} | {'K4 V2': everywhere('tq4', 'tq2')}, True)
        for r in rows:
            if r['name'] in plans: r['predicted_kl'] = plans[r['name']].predicted_kl
    return figures()

# attention on the same keys and values

def softmax(s):
    e = np.exp(s-s.max(-1, keepdims=True))
    return e/e.sum(-1, keepdims=True)

def exact_attention(q, k, v): # (H, T, D), (G, T, D)
    n, T = len(q)//len(k), q.shape[1]
    s = np.einsum('htd,hsd->hts', q, k.repeat(n, 0))/q.shape[-1]**.5
    return s, np.einsum('hts,hsd->htd', softmax(np.where(np.tri(T, dtype=bool), s, -1e9)), v.repeat(n, 0))

def errors(q, k, v, kk, vv):
    "Relative squared errors: of scores as softmax sees them, of values, of attention's output"
    (s, o), (t, p) = exact_attention(q, k, v), exact_attention(q, kk, vv)
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

def one_step(x, bits):
    "`_round_trip` with the step that is best on average, for all vectors"
    from optiq.rotation import rotation_matrix
    from optiq.turboquant import _decode_rotated, encode_rotated, _rotate
    y = _decode_rotated(*encode_rotated(_rotate(x, 42), bits, (1,)), bits)
    return (y @ rotation_matrix(y.shape[-1], 42, 'hadamard').T)[..., :x.shape[-1]]

def compare(args, report):
    import torch
    from optiq.backends.torch import TorchBackend
    from optiq.formats import Format, nbytes, parse_format, quantize_dequantize
    from optiq.kv.layout import kv_layout
    from optiq.models import Checkpoint
    from optiq.kv.precondition import key_statistics
    from optiq.turboquant import TurboQuantMSE, _round_trip
    b, seen = TorchBackend(Checkpoint(args.model)), {}
    calibration, tokens = texts(args, b.checkpoint.tokenizer)
    stats = key_statistics(b, calibration)
    with b.watching(lambda i, q, k, v: seen.update({i: [b.numpy(x)[0] for x in (q, k, v)]})): b.logits(tokens[:1])
    D, rows = seen[0][1].shape[-1], []
    def affine(x, bits, group): return quantize_dequantize(x, Format(bits, group))
    def methods(i, n):
        p, w, tq = *(stats[f'cache.{i}.{kind}'] for kind in ('keys', 'values')), lambda x, **how: _round_trip(x, n, **how)
        def by(s): return dict(to=s.keys, back=s.undo)
        true = lambda name: 8*nbytes(parse_format(name), (1, D))/D
        lloyd = TurboQuantMSE(D, n, scale='norm', rotation='hadamard')
        yield 'rotated, preconditioned', lambda k, v: (tq(k, **by(p)), tq(v, **by(w))), true(f'tq{n}')
        yield 'rotated', lambda k, v: (tq(k), tq(v)), true(f'tq{n}')
        yield 'rotated, one step for all vectors', lambda k, v: tuple(one_step(x, n) for x in (k, v)), true(f'tq{n}')
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

def needle(args, report):
    "`needle`: one code in filler; `recall`: one of many codes. The same texts for every cache, so _margins are compared in pairs"
    from scipy.stats import binomtest
    from optiq.backends.torch import TorchBackend
    from optiq.calibration import passages, token_batch
    from optiq.evals.needle import _margins
    from optiq.evals.perplexity import overrides_of
    from optiq.formats import parse_format
    from optiq.kv.layout import kv_layout
    from optiq.models import Checkpoint
    from optiq.material.mixture import recall
    from optiq.kv.precondition import key_statistics, preconditioned
    b = TorchBackend(Checkpoint('demo'))
    tokenizer, rows = b.checkpoint.tokenizer, list(args.done.get('needle', {}).get('rows', []))
    stats = key_statistics(b, token_batch(passages('bundled'), tokenizer, 4, 128))
    units, ids = kv_layout(b.checkpoint).units, lambda s: tokenizer.encode(s, add_special_tokens=False)
    for task, keys in (('needle', 1), ('recall', None)):
        for length in args.lengths if task in args.tasks.split(',') else ():
            have = {(r['bits'], r['cache']) for r in rows if (r['task'], r['length'], r['trials']) == (task, length, args.trials)}
            todo = [c for c in CACHES if c[:2] not in have and (args.caches in c[1] or c[0] == 16)]
            if not any(args.caches in c[1] for c in todo): continue
            texts, reference = recall(args.trials, length, 'test', keys=keys, count=lambda s: len(ids(s))), None
            pairs = [(ids(r['prompt']), ids(' '+r['answer'])) for r in texts]
            for bits, kind, name in [CACHES[0], *(c for c in todo if c[0] < 16)]:
                plan = overrides_of({u.path: parse_format(name) for u in units}) if bits < 16 else {}
                with preconditioned(b, stats if 'preconditioned' in kind else {}): m = _margins(b, pairs, plan)
                reference = m if reference is None else reference
                if (bits, kind) in have: continue
                hits = int((m > 0).sum())
                rows.append(dict(task=task, length=length, bits=bits, cache=kind, trials=len(m), hits=hits,
                                 wilson=list(binomtest(hits, len(m)).proportion_ci(method='wilson')), margin=mean_se(m),
                                 margin_lost=mean_se(reference-m), margin_quartiles=np.quantile(m, (.25, .5, .75)).tolist()))
                print(json.dumps(rows[-1]), flush=True)
                report(dict(rows=rows, model='demo'))
    return dict(rows=rows, model='demo')

CACHES = [(16, 'fp16', 'as-is'), *((n, 'rotated, preconditioned', f'tq{n}') for n in (4, 3, 2)), *((n, 'rotated', f'tq{n}') for n in (4, 3, 2)),
          *((n, 'affine, groups of 64', f'{n}g64') for n in (4, 3, 2))]

if __name__ == '__main__':
    pair = lambda s: tuple(int(x) for x in s.split('x'))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='speed')
    p.add_argument('--model', default='demo')
    p.add_argument('--text', default='bundled', help='folder with valid.txt and test.txt')
    p.add_argument('--tokens', type=pair, default=(6, 512), help='evaluation, sequences x tokens')
    p.add_argument('--calibration', type=pair, default=(2, 512), help='calibration, sequences x tokens')
    p.add_argument('--shapes', default='qwen3-0.6b,llama-3.1-8b')
    p.add_argument('--contexts', type=lambda s: [int(x) for x in s.split(',')], default=[65536, 4096, 32768])
    p.add_argument('--kinds', default='', help='caches to time, separated by ;')
    p.add_argument('--layers', type=int, help='of the random models; 1 is enough to let MLX compile its kernels')
    p.add_argument('--every', action='store_true', help='checks: every road at every width')
    p.add_argument('--steps', type=int, default=16, help='of a round, at most; 128 hold two placings of the newest tokens')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--seconds', type=float, default=2, help='speed: for each kind of cache, about')
    p.add_argument('--until', type=float, default=1e12, help='prefill, checks: seconds since 1970 after which nothing new is begun')
    p.add_argument('--roads', default='', help='checks: these alone, separated by ;')
    p.add_argument('--metal', action='store_true', help='on a Mac: use the kernels there')
    p.add_argument('--chunk', type=int, default=2048)
    p.add_argument('--lengths', type=lambda s: [int(x) for x in s.split(',')], default=[128, 256, 512, 1024])
    p.add_argument('--trials', type=int, default=200)
    p.add_argument('--tasks', default='needle,recall', help='needle: which of the two')
    p.add_argument('--caches', default='', help='needle: only caches with this in their name, and fp16')
    p.add_argument('-o', default='nbs/results/turbo.json')
    args = p.parse_args()
    done = args.done = json.loads(Path(args.o).read_text()) if Path(args.o).exists() else {}
    if args.every: CHECKS = EVERY
    if args.metal: __import__('optiq.kv.kernels', fromlist=['use_kernels']).use_kernels()
    for name in args.only.split(','):
        save(args, done, name, globals()[name](args, lambda f: save(args, done, name, f)))
