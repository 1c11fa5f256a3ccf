"""An exact sweep in the shape of Qwen3-8B on one GPU: what each way costs in precision, what it brings in speed, and how long gptq takes.

    python bench/exact.py --only ways,whole,gptq,mlx -o exact-gpu.json

Weights are random, made on the card: times and arithmetic are those of the shape, and nothing here says how sensitive a real model is.
`ways`   products of a few blocks in each arithmetic: seconds, and how far the KL of 8-bit probes is off float64's
`whole`  all units in five formats on 8 × 512 tokens, as `kl_sweep` does it
`gptq`   all units at 4 bits from 32 × 512 tokens, and where the time goes
`share`  all units in two formats, by this process alone or by all that torchrun started: how much faster several GPUs are
`experts` `search` of the experts of one block of Qwen3-30B-A3B in MLX: one after another, several at a time, and with recorded steps
`mlx`    random weights in the shape of Qwen3-0.6B: all probes against one forward pass a probe, MLX on CUDA
"""
import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import optiq.backends.torch as torch_backend
import optiq.measure.kl as kl_module
from optiq.backends.near import Near
from optiq.backends.torch import TorchBackend
from optiq.formats import Format
from optiq.material.tiny import _hub_tensors, _shard_header, _write, _write_tokenizer, hub_config
from optiq.measure.kl import measure, probes
from optiq.models import Checkpoint
from optiq.report import machine

GPU = __import__('torch').cuda
SMALL = {} if GPU.is_available() else dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, head_dim=64) # to try it
FORMATS = [Format(3), Format(4), Format(5), Format(6), Format(8)]

def checkpoint(folder, layers):
    "The shape of Qwen3-8B with so many layers; its file is a hole, since weights are drawn on the card"
    config = hub_config('qwen3', '8B') | dict(num_hidden_layers=layers, max_window_layers=layers) | SMALL
    out = Path(folder)/f'{layers}'
    out.mkdir()
    _write(out/'config.json', config)
    _write_tokenizer(out)
    head = _shard_header(shapes := _hub_tensors(config), 'bfloat16')
    with open(out/'model.safetensors', 'wb') as f:
        f.write(head)
        f.truncate(len(head)+2*sum(int(np.prod(s)) for s in shapes.values()))
    c = Checkpoint(out)
    c.__dict__['fingerprint'] = 'random weights'
    return c

def drawn(c, dtype):
    "A transformers model with random weights of bfloat16"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device('cuda' if SMALL == {} else 'cpu'): model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(c.folder), dtype=torch.float32)
    for p in model.parameters(): p.data = p.data.bfloat16().to(dtype)
    return model

torch_backend._load_torch = drawn

def opened(c, dtype='float32'):
    start = time.perf_counter()
    b = TorchBackend(c, dtype=dtype)
    print(f'opened {c.folder.name} layers in {dtype}: {time.perf_counter()-start:.1f} s', flush=True)
    return b

def timed(f):
    if GPU.is_available(): GPU.synchronize()
    start = time.perf_counter()
    out = f()
    if GPU.is_available(): GPU.synchronize()
    return time.perf_counter()-start, out

@contextmanager
def tf32(on=True):
    import torch
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try: yield
    finally: torch.backends.cuda.matmul.allow_tf32 = before

def two_tf32(key, x, w, multiply): # the weights are bfloat16, which TF32 holds
    import torch
    high = (x.view(torch.int32) & -8192).view(torch.float32)
    return multiply(high, w)+multiply(x-high, w)

def three_bf16(key, x, w, multiply):
    import torch
    narrow, out, rows = w.bfloat16().T, 0, x.reshape(-1, x.shape[-1])
    for _ in range(3):
        part = rows.bfloat16()
        out, rows = out+(torch.mm(part, narrow, out_dtype=torch.float32) if part.is_cuda else part.float() @ narrow.float()), rows-part
    return out.reshape(*x.shape[:-1], -1)

def one_bf16(key, x, w, multiply): return multiply(x.bfloat16(), w.bfloat16()).float()

class NearTF32(Near): # differences in TF32, the reference in float32
    def _keep(self, *args):
        with tf32(False): return super()._keep(*args)

WAYS = { # name ▸ TF32 allowed, what answers for products, narrow type, class
    'float32': (False, None, None, Near), 'TF32': (True, None, None, Near), 'TF32, two products': (True, two_tf32, None, Near),
    'bfloat16, three products': (False, three_bf16, None, Near), 'bfloat16': (False, one_bf16, None, Near),
    'differences in TF32': (True, None, 'float32', NearTF32), 'differences in float16': (False, None, 'float16', Near),
    'differences in bfloat16': (False, None, 'bfloat16', Near)}

def by(way, b, f):
    "Run in one arithmetic"
    allowed, answer, b.narrow, kl_module.Near = WAYS[way]
    with tf32(allowed), b.products(answer) if answer else tf32(allowed): return f()

def ways(args, folder):
    import torch
    rng, layers = np.random.default_rng(0), 6
    c = checkpoint(folder, layers)
    tokens = rng.integers(0, c.vocabulary, (8, 512)).astype(np.int32)
    todo = [p for p in [(c.units[0], Format(None, None, 'as-is')), *probes(c.units, [Format(8), Format(4)])] if p[0].block in (None, 0) and p[0].kind != 'lm_head']
    b = opened(c, 'float64')
    b.narrow = None
    took, truth = timed(lambda: measure(b, tokens[:2], todo))
    found = dict(float64=dict(seconds_2_sequences=took, kl_8_bits=truth[[i for i, p in enumerate(todo) if p[1].bits == 8]].mean(1).tolist()))
    del b
    GPU.empty_cache()
    b, eight, four = opened(c), *([i for i, p in enumerate(todo) if p[1].bits == k] for k in (8, 4))
    for way in WAYS:
        kl = by(way, b, lambda: measure(b, tokens[:2], todo))
        took, _ = timed(lambda: by(way, b, lambda: measure(b, tokens, todo)))
        off = kl.mean(1)/np.where(truth.mean(1) > 0, truth.mean(1), 1)-1
        found[way] = dict(seconds=took, as_is=float(kl[0].mean()), off_8={k: float(f(abs(off[eight]))) for k, f in dict(median=np.median, most=np.max).items()},
                          off_4=float(np.median(abs(off[four]))), bias_8=float(off[eight].mean()), as_is_part=float(kl[0].mean()/np.median(truth[eight].mean(1))))
        print(way, json.dumps(found[way]), flush=True)
    b.narrow, kl_module.Near = 'bfloat16', Near
    found['graph'] = graph(b, tokens)
    return dict(layers=layers, tokens=[8, 512], probes=len(todo), found=found)

def graph(b, tokens):
    "One block, many streams: as it is, and replayed as a CUDA graph"
    import torch
    states, out = b.embed(tokens), {}
    for k in (1, 8):
        x, near = torch.cat([states]*k), Near(b)
        with near.kept(): b.run_block(0, states)
        def run():
            with near.beside(): return b.run_block(0, x)
        try:
            run()
            plain = min(timed(run)[0] for _ in range(3))
            g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g): run()
            out[k] = dict(plain=plain, graph=min(timed(g.replay)[0] for _ in range(3)))
        except Exception as e: out[k] = f'{type(e).__name__}: {e}'[:300]
    print('graph', out, flush=True)
    return out

def whole(args, folder):
    import torch
    from optiq.sensitivity import kl_sweep
    c, out = checkpoint(folder, args.layers), {}
    tokens = np.random.default_rng(0).integers(0, c.vocabulary, (8, 512)).astype(np.int32)
    b = opened(c)
    out['memory_gb'] = GPU.memory_allocated()/2**30
    some = [(c.units[0], Format(None, None, 'as-is')), *[p for p in probes(c.units, [Format(8)]) if p[0].block in (0, len(b.blocks)//2, len(b.blocks)-1)][::4]]
    for way in ('differences in bfloat16', 'float32', 'TF32'):
        took, kl = timed(lambda: by(way, b, lambda: measure(b, tokens[:4], some)))
        out[way] = dict(seconds=took, kl=kl.mean(1).tolist(), probes=[p[0].path for p in some])
        print(way, json.dumps(out[way]), flush=True)
    b.narrow, kl_module.Near = 'bfloat16', Near
    for rounding in args.rounding.split(','):
        if GPU.is_available(): GPU.reset_peak_memory_stats()
        took, sweep = timed(lambda: kl_sweep(b, tokens, FORMATS, rounding=rounding, method='exact'))
        kl = np.array([sweep.kl(u.path, Format(8)) for u in c.units])
        out[rounding] = dict(seconds=took, probes=len(sweep.values), peak_gb=GPU.max_memory_allocated()/2**30, noise=sweep.header.get('noise'),
                             kl_8_bits=[float(np.min(kl)), float(np.median(kl)), float(np.max(kl))])
        print(rounding, json.dumps(out[rounding]), flush=True)
        out['parts'] = parts(b, tokens, rounding)
    return dict(layers=args.layers, tokens=[8, 512], formats=[str(f) for f in FORMATS], found=out)

def share(args, folder):
    "The sweep of `whole` in fewer formats; every rank of torchrun calls this on a GPU of its own"
    from optiq.sensitivity import kl_sweep
    c, formats = checkpoint(folder, args.layers), [Format(4), Format(8)]
    tokens = np.random.default_rng(0).integers(0, c.vocabulary, (8, 512)).astype(np.int32)
    b = opened(c)
    b.narrow = 'bfloat16' if GPU.is_available() else None
    took, sweep = timed(lambda: kl_sweep(b, tokens, formats, rounding=args.rounding, method='exact'))
    kl = np.array([sweep.kl(u.path, f) for u in c.units for f in formats])
    return dict(layers=args.layers, tokens=[8, 512], formats=[str(f) for f in formats], rounding=args.rounding, probes=len(sweep.values), processes=int(os.environ.get('WORLD_SIZE', 1)),
                seconds=took, kl_sum=float(kl.sum()), kl_first=kl[:8].tolist())

def parts(b, tokens, rounding):
    "Where the time goes: rounding one block in all formats, one block of 8 stacked streams, the head of one stream"
    import torch
    from optiq.sensitivity import sweep_quantizer
    quantize, _ = sweep_quantizer(b, tokens, FORMATS, rounding)
    todo = [p for p in probes(b.checkpoint.units, FORMATS) if p[0].block == 1]
    def rounded():
        for u, f in todo: (quantize[u.path] if hasattr(quantize, 'keys') else quantize)(b.unit_weight(u.path), f)
    first = timed(rounded)[0]
    states, near = b.embed(tokens), Near(b)
    with near.kept(): b.run_block(0, states)
    x = torch.cat([states]*8)
    def block():
        with near.beside(): return b.run_block(0, x)
    block()
    head = timed(lambda: kl_module.kl_of_streams(b, states, [({}, [x])]))[0]
    found = dict(rounding_a_block=first, block_of_a_stream=timed(block)[0]/8, head_of_a_stream=head/8)
    print(rounding, 'parts', found, flush=True)
    return found

def gptq(args, folder):
    import torch
    import optiq.gptq as g
    import optiq.rounding as r
    from optiq.statistics import Chunks
    spent = {}
    def clocked(name, f):
        def run(*a, **k):
            t, out = timed(lambda: f(*a, **k))
            spent[name] = spent.get(name, 0)+t
            return out
        return run
    for name in ('_prepared', '_find_grid', '_compensated', '_second_look'): setattr(g, name, clocked(name, getattr(g, name)))
    Chunks.run = clocked('walk and moments', Chunks.run)
    c = checkpoint(folder, args.gptq_layers)
    tokens = np.random.default_rng(0).integers(0, c.vocabulary, (32, 512)).astype(np.int32)
    b, plan, start, done = opened(c), {u.path: Format(4) for u in c.units}, time.perf_counter(), 0
    for path, x in r.round_model(b, tokens, plan):
        took, _ = timed(x.stored)
        spent['packing'] = spent.get('packing', 0)+took
        done += 1
        if done % 28 == 1 or path.endswith('lm_head'): print(done, path, f'{time.perf_counter()-start:.1f} s', {k: round(v, 1) for k, v in spent.items()}, flush=True)
    took = time.perf_counter()-start
    return dict(layers=args.gptq_layers, units=done, tokens=[32, 512], seconds=took, spent=spent, peak_gb=GPU.max_memory_allocated()/2**30)

def experts(args, folder):
    import mlx.core as mx
    from optiq import grid
    from optiq.statistics import Inputs
    n, rows, width = (128, 768, 2048) if SMALL == {} else (8, 32, 128)
    w = (.02*mx.random.normal((n, rows, width), key=mx.random.key(0))).astype(mx.bfloat16)
    stats = [Inputs(mx.random.uniform(shape=(width,), key=mx.random.key(k)), 1, whole=False) for k in range(n)]
    mx.eval(w, [s.moments for s in stats])
    recorded, at_once, found = grid._recorded, grid._at_once, {}
    def plain(dtype): return grid._descend
    def one_by_one(fmt): return grid._stack([grid.search(x, fmt, s) for x, s in zip(w, stats)])
    def several(fmt): return grid.search(w, fmt, stats)
    ways = {'one after another': (one_by_one, plain, at_once), 'several at a time': (several, plain, at_once), 'several at a time, recorded': (several, recorded, at_once),
            'four times as many at a time, recorded': (several, recorded, lambda w: 4*at_once(w))}
    for name, (f, step, many) in ways.items():
        grid._recorded, grid._at_once = step, many
        for bits in (4, 8):
            def run():
                r = f(Format(bits))
                mx.eval(r.codes, r.scales, r.biases)
                return r
            try:
                run()
                mx.reset_peak_memory()
                took, r = min((timed(run) for _ in range(3)), key=lambda x: x[0])
            except Exception as e: # a compiler may be missing
                found[f'{name}, {bits} bits'] = f'{type(e).__name__}: {e}'[:300]
                break
            first = found.setdefault(f'{bits}', np.array(r.codes.astype(mx.uint8)))
            found[f'{name}, {bits} bits'] = dict(seconds=took, peak_gb=mx.get_peak_memory()/2**30, same_codes=float((np.array(r.codes.astype(mx.uint8)) == first).mean()))
            print(name, bits, found[f'{name}, {bits} bits'], flush=True)
    grid._recorded, grid._at_once = recorded, at_once
    return dict(shape=[n, rows, width], found={k: v for k, v in found.items() if not k.isdigit()})

def mlx(args, folder):
    sys.path.insert(0, 'bench')
    import sweep
    import mlx.core as mx
    print(mx.device_info(), mx.default_device(), flush=True)
    from optiq.backends.mlx import MLXBackend
    from optiq.material.tiny import tiny
    b = MLXBackend(Checkpoint(tiny('qwen3', f'{folder}/m', shape='0.6B')))
    ids = np.random.default_rng(0).integers(0, b.checkpoint.vocabulary, (2, 128)).astype(np.int32)
    out = dict(free_gb=b.free_memory()/2**30)
    for narrow in ('bfloat16', None):
        b.narrow = narrow
        out[str(narrow)] = sweep.against_plain(b, ids, 40)
        print('mlx', narrow, json.dumps(out[str(narrow)]), flush=True)
    try:
        ballast = [mx.zeros((2**28,), mx.float32)+k for k in range(int(b.free_memory()/2**30)-args.left)]
        mx.eval(ballast)
        out['full'] = dict(free_gb=b.free_memory()/2**30)
        from optiq.measure.estimate import _measure_halved
        long = np.random.default_rng(0).integers(0, b.checkpoint.vocabulary, (16, 512)).astype(np.int32)
        b.narrow = 'bfloat16'
        took, (kl, many) = sweep.seconds(b, lambda: _measure_halved(b, long, probes(b.checkpoint.units, [Format(4)])[:64]))
        out['full'] |= dict(seconds=took, probes=64, at_a_time=many, finite=bool(np.isfinite(kl).all()))
    except Exception as e: out['full'] = f'{type(e).__name__}: {e}'[:500]
    print('mlx full', out['full'], flush=True)
    return out

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='ways,whole,gptq,mlx')
    p.add_argument('--layers', type=int, default=36)
    p.add_argument('--gptq-layers', type=int, default=36)
    p.add_argument('--rounding', default='search')
    p.add_argument('--left', type=int, default=6, help='GB left free where MLX is to run out of memory')
    p.add_argument('-o', default='exact-gpu.json')
    args = p.parse_args()
    out, rank = Path(args.o), int(os.environ.get('LOCAL_RANK', 0))
    if GPU.is_available(): GPU.set_device(rank)
    done = json.loads(out.read_text()) if out.exists() else {}
    about = machine() | dict(gpu=GPU.get_device_name() if GPU.is_available() else None, command=' '.join(sys.argv))
    for name in args.only.split(','):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done[name] = globals()[name](args, folder) | dict(about=about)
            print(name, f'{time.perf_counter()-start:.0f} s in all', flush=True)
        if rank == 0: out.write_text(json.dumps(done, indent=1)+'\n')
