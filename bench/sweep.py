"""How fast is the sweep, and how good are its shortcuts? Ratios are measured side by side in one run.

    python bench/sweep.py --model MODEL --text FILE [--only replay,shortcuts,plans,mlx,memory,peer] [--peer FOLDER] -o results.json

`replay`     all probes by block replay, against one full forward pass per probe and sequence (PyTorch)
`shortcuts`  gradient and screened sweeps against the exact one
`plans`      KL of the plans of exact, screened and gradient sweeps at equal bits on the test text (--test), pairwise
`mlx`        replay against full passes, MLX, random weights in the shape of Qwen3-0.6B
`memory`     peak memory of the streaming sweep, random weights in the shape of Qwen3-1.7B
`peer`       mlx-optiq's own sweep on the same checkpoint, tokens and widths; FOLDER holds its unpacked wheel

Where a baseline would take long, a part of its probes is timed and the total scaled up; `of` says how many were timed.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from optiq.backends.mlx import MLXBackend
from optiq.backends.torch import TorchBackend
from optiq.calibration import passages, token_batch
from optiq.evals.perplexity import evaluate, evaluation_tokens, overrides_of
from optiq.report import machine
from optiq.formats import Format
from optiq.measure.gradient import agreement, gradient_sweep, screened_sweep
from optiq.knapsack import allocate
from optiq.models import Checkpoint
from optiq.measure.estimate import estimate
from optiq.measure.kl import kl_divergence, measure, perturb, probes
from optiq.rounding import as_overrides, round_model
from optiq.sensitivity import kl_sweep
from optiq.material.tiny import tiny

WIDTHS = [Format(3), Format(4), Format(8)]

def sync(b):
    if isinstance(b, TorchBackend) and b.on_gpu: b.xp.cuda.synchronize()

def seconds(b, f):
    start = time.perf_counter()
    out = f()
    sync(b)
    return time.perf_counter()-start, out

def plain(b, tokens, todo):
    "One forward pass per probe and sequence, as a tool without replay does it"
    out, reference = [], [b.logits(t[None]) for t in tokens]
    for p in todo:
        with b.swapped(perturb(p)):
            out.append([float(kl_divergence(b.xp, z, b.forward(t[None])).mean()) for t, z in zip(tokens, reference)])
    return np.array(out)

def against_plain(b, tokens, part):
    "Time of replay for all probes, of plain passes for every part-th, and how far they differ"
    todo = probes(b.checkpoint.units, WIDTHS)
    plain(b, tokens, todo[:2]), measure(b, tokens, todo[:8])
    if b.on_gpu: measure(b, tokens, todo)
    told, repeats = estimate(b, WIDTHS, tokens)['seconds'], 3 if b.on_gpu else 1
    def timed(): return sorted((seconds(b, lambda: measure(b, tokens, todo)) for _ in range(repeats)), key=lambda t: t[0])[repeats//2]
    fast, kl = timed()
    slow, want = seconds(b, lambda: plain(b, tokens, todo[::part]))
    got, large = kl[::part], want > 1e-6
    return dict(probes=len(todo), tokens=list(tokens.shape), replay_s=fast, estimate_s=told,
                plain_s=slow*len(todo)/len(todo[::part]), of=len(todo[::part]), ratio=slow*len(todo)/len(todo[::part])/fast,
                largest_relative_difference=float(abs(got/want-1)[large].max()))

def replay(args, c, tokens):
    b = TorchBackend(c)
    return against_plain(b, tokens[:2], 3 if b.on_gpu else 9)

def shortcuts(args, c, tokens):
    b = TorchBackend(c)
    gradient_sweep(b, tokens[:2], [Format(4)])
    exact_s, exact = seconds(b, lambda: kl_sweep(b, tokens, [4, 8], progress=False, rounding='minmax'))
    one_s, one = seconds(b, lambda: kl_sweep(b, tokens, [4], progress=False, rounding='minmax'))
    fast_s, fast = seconds(b, lambda: gradient_sweep(b, tokens, [4]))
    screened_s, screened = seconds(b, lambda: screened_sweep(b, tokens, [4, 8], [4.5]))
    plans = {n: allocate(s, target_bpw=4.5) for n, s in dict(exact=exact, screened=screened).items()}
    joint = evaluate(b, tokens, {n: overrides_of(p) for n, p in plans.items()})
    kl = {n: float(joint[n].kl.mean()) for n in plans}
    return dict(tokens=list(tokens.shape), exact_4_bits_s=one_s, gradient_s=fast_s, gradient_cost=fast_s/one_s,
                gradient_4_bits=agreement(fast, one, Format(4)), exact_s=exact_s, screened_s=screened_s,
                screened_cost=screened_s/exact_s, screened_units=len(screened.header['exact']), units=len(exact.units),
                screened_spread=screened.header['spread'], kl=kl, screened_excess=kl['screened']/kl['exact']-1)

def plans(args, c, tokens):
    "Sweeps by three methods on the same tokens, each with its plans rounded by search; differences sequence by sequence"
    b, targets = TorchBackend(c), [3.5, 4, 4.5, 5, 6]
    test = evaluation_tokens(args.test, c.tokenizer, args.test_n, 256, 'all' if Path(args.test).is_file() else 'test')
    took, made, rows, known = {}, {}, [], {}
    for method in ('exact', 'screened', 'gradient'):
        took[method], made[method] = seconds(b, lambda: kl_sweep(b, tokens, [3, 4, 5, 6, 8], method=method, targets=targets, progress=False))
    for t in targets:
        for method, sweep in made.items():
            plan = allocate(sweep, target_bpw=t)
            key = tuple(map(str, plan.values()))
            if key not in known: known[key] = evaluate(b, test, {'plan': as_overrides(dict(round_model(b, tokens, plan, 'search')))})['plan'].kl
            kl = known[key]
            rows.append(dict(target=t, method=method, true_bpw=plan.true_bpw, bytes=plan.nbytes, kl=float(kl.mean()), kl_each=kl.tolist()))
    for r in rows:
        exact = next(x for x in rows if x['target'] == r['target'])
        d = np.array(r['kl_each'])-exact['kl_each']
        r |= dict(excess=float(d.mean()/exact['kl']), excess_se=float(d.std(ddof=1)/len(d)**.5/exact['kl']))
        print({k: v for k, v in r.items() if k != 'kl_each'}, flush=True)
    return dict(tokens=list(tokens.shape), test=list(test.shape), seconds=took, measured={m: len(s.header.get('exact', s.units)) for m, s in made.items()}, units=len(c.units), rows=rows)

def mlx(args, c, tokens):
    with tempfile.TemporaryDirectory() as d:
        b = MLXBackend(Checkpoint(tiny('qwen3', f'{d}/model', shape='0.6B')))
        ids = np.random.default_rng(0).integers(0, b.checkpoint.vocabulary, (2, 128)).astype(np.int32)
        return against_plain(b, ids, 10 if b.on_gpu else 100)|dict(tf32=os.environ.get('MLX_ENABLE_TF32'))

STREAM = """
import sys, resource, numpy as np
from optiq.backends.stream import StreamingBackend
from optiq.models import Checkpoint
from optiq.sensitivity import kl_sweep
c = Checkpoint(sys.argv[1])
ids = np.random.default_rng(0).integers(0, c.vocabulary, (1, 16)).astype(np.int32)
import time; start = time.time()
kl_sweep(StreamingBackend(c), ids, [4], progress=False, rounding='minmax')
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024, time.time()-start)
"""

def memory(args, c, tokens):
    with tempfile.TemporaryDirectory() as d:
        folder = tiny('qwen3', f'{d}/model', shape='1.7B')
        size = sum(f.stat().st_size for f in Path(folder).glob('*.safetensors'))
        out = subprocess.run([sys.executable, '-c', STREAM, str(folder)], capture_output=True, text=True)
        if out.returncode: raise RuntimeError(out.stderr[-2000:])
        peak, took = map(float, out.stdout.split()[-2:])
        return dict(bytes_on_disk=size, peak_bytes=peak, seconds=took, tokens=[1, 16], probes=197, preload=os.environ.get('LD_PRELOAD'))

PEER = """
import sys, time, json, numpy as np
sys.path.insert(0, sys.argv[1])
import mlx.core as mx, mlx_lm.utils
from pathlib import Path
import optiq.core.sensitivity as s
model = mlx_lm.utils.load_model(Path(sys.argv[2]))[0]
tokens = [mx.array(t)[None] for t in json.loads(sys.argv[3])]
every, all_units = int(sys.argv[4]), s._quantizable_linears
def warm(*a): return all_units(*a)[:1]
def part(*a): return all_units(*a)[::every]
run = lambda: s.analyze_sensitivity_exact(model, lambda: [((t,), {}) for t in tokens], candidate_bits=[3, 4, 8], n_calibration=len(tokens))
s._quantizable_linears = warm; run()
s._quantizable_linears = part; start, cpu = time.time(), time.process_time(); done = len(run())
from importlib.metadata import version
print(json.dumps(dict(seconds=time.time()-start, cpu=time.process_time()-cpu, units=done, of=len(all_units(model, 64)), mlx_lm=version('mlx-lm'), mlx=version('mlx'))))
"""

OURS = """
import sys, time, json, numpy as np
from optiq.backends.torch import TorchBackend
from optiq.formats import Format
from optiq.measure.estimate import estimate
from optiq.measure.kl import measure, probes
from optiq.models import Checkpoint
b, tokens, widths = TorchBackend(Checkpoint(sys.argv[1])), np.array(json.loads(sys.argv[2])), [Format(3), Format(4), Format(8)]
todo = probes(b.checkpoint.units, widths)
measure(b, tokens, todo if b.on_gpu else todo[:8])
told, start, cpu = estimate(b, widths, tokens)['seconds'], time.time(), time.process_time()
measure(b, tokens, todo)
print(json.dumps(dict(seconds=time.time()-start, cpu=time.process_time()-cpu, estimate_s=told, units=len(b.checkpoint.units))))
"""

def peer(args, c, tokens):
    """Each in a process of its own: as installed, then with OpenBLAS preloaded for both, where OPENBLAS names it.
    Seconds of the cores, of all threads, stand beside those of the clock: other work on the machine leaves them nearly as they are."""
    every, texts = 1 if os.environ.get('CUDA_VISIBLE_DEVICES') else args.every, json.dumps(tokens[:2].tolist())
    def run(preload, python, *argv):
        r = subprocess.run([python, '-c', *argv], env=os.environ | dict(LD_PRELOAD=preload), capture_output=True, text=True)
        if r.returncode: raise RuntimeError(r.stderr[-2000:])
        return json.loads(r.stdout.strip().splitlines()[-1])
    found = {}
    for name, preload in dict(default='', openblas=os.environ.get('OPENBLAS')).items():
        if preload is None: continue
        ours = run(preload, sys.executable, OURS, str(c.folder), texts)
        theirs = run(preload, args.peer_python, PEER, args.peer, str(c.folder), texts, str(every))
        total, cpu = (theirs[k]/theirs['units']*ours['units'] for k in ('seconds', 'cpu'))
        found[name] = dict(ours_s=ours['seconds'], estimate_s=ours['estimate_s'], seconds_for_our_units=total, ratio=total/ours['seconds'],
                           cpu_seconds=[cpu, ours['cpu']], cpu_ratio=cpu/ours['cpu'], units_timed=theirs['units'], units_it_scores=theirs['of'], versions={k: theirs[k] for k in ('mlx', 'mlx_lm')})
        print(name, json.dumps(found[name]), flush=True)
    return dict(theirs=found, tokens=[2, tokens.shape[1]])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='demo')
    p.add_argument('--text', default='bundled')
    p.add_argument('--only', default='replay,shortcuts,mlx,memory')
    p.add_argument('--n', type=int, default=8)
    p.add_argument('--test', default='bundled', help='plans: the text that they are scored on')
    p.add_argument('--test-n', type=int, default=64, help='plans: its sequences, of 256 tokens')
    p.add_argument('--every', type=int, default=50)
    p.add_argument('--peer')
    p.add_argument('--peer-python', default=sys.executable, help="the peer's own environment, for `peer`")
    p.add_argument('-o', default='nbs/results/sweep.json')
    args = p.parse_args()
    c = Checkpoint(args.model)
    tokens = token_batch(passages(args.text, 'all' if Path(args.text).is_file() else 'train'), c.tokenizer, args.n, 128)
    out = Path(args.o)
    done = json.loads(out.read_text()) if out.exists() else {}
    gpu = __import__('torch').cuda
    about = machine()|dict(gpu=gpu.get_device_name() if gpu.is_available() else None, load=os.getloadavg()[0], command=' '.join(sys.argv))
    for name in args.only.split(','):
        try: done[name] = globals()[name](args, c, tokens)|dict(about=about)
        except Exception as e:
            if os.environ.get('OPTIQ_DEBUG'): raise
            print(f'{name} failed: {type(e).__name__}: {e}', file=sys.stderr)
            continue
        print(name, json.dumps({k: v for k, v in done[name].items() if k != 'about'}, indent=1), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(done, indent=1)+'\n')
