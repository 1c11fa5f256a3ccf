"""Seconds and memory of a conversion with each rounding: one plan, one process each, the sweep not counted.

    python3 bench/peers/times.py --model MODEL --calibration valid.txt [--plan 4g64] [--n 32] [--seq-len 128] -o times.json

`load_s` opens the model for the calibration pass (a sweep has done that before), `round_s` learns and rounds, `write_s` packs, saves, and compares
what was saved tensor by tensor. Seconds of the clock, and of all cores together (`cpu_…`), which another program's load changes little. Peak memory is that of the whole process; `before_gb` is what it held before it rounded.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

def one(args):
    "Convert once, in this process"
    from optiq.backends.open import open_backend
    from optiq.calibration import passages, token_batch
    from optiq.convert import convert
    from optiq.formats import quantize_minmax
    from optiq.plan import uniform
    from optiq.models import Checkpoint
    from optiq.rounding import round_to_files
    c, t, cpu = Checkpoint(args.model), [time.perf_counter()], [time.process_time()]
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    def tick():
        t.append(time.perf_counter())
        cpu.append(time.process_time())
    text = passages(args.calibration, 'all' if Path(args.calibration).is_file() else 'train')
    tokens, plan = token_batch(text, c.tokenizer, args.n, args.seq_len), uniform(c, args.plan)
    tick()
    b = open_backend(c, args.backend)
    tick()
    before = peak()
    with TemporaryDirectory() as d:
        quantizer = quantize_minmax if args.rounding == 'minmax' else round_to_files(b, tokens, plan, args.rounding, d, progress=False)
        tick()
        convert(c, plan, Path(d)/'out', quantizer=quantizer)
        tick()
    spent = lambda t, name='': dict(zip((f'{name}load_s', f'{name}round_s', f'{name}write_s'), (b-a for a, b in zip(t[1:], t[2:])))) | {f'{name}conversion_s': t[-1]-t[2]}
    print(json.dumps(spent(t) | spent(cpu, 'cpu_') | dict(before_gb=before, peak_gb=peak())))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='demo')
    p.add_argument('--calibration', default='bundled')
    p.add_argument('--plan', default='4g64', help='a format for all')
    p.add_argument('--n', type=int, default=32, help='calibration sequences')
    p.add_argument('--seq-len', type=int, default=128)
    p.add_argument('--backend', default='torch')
    p.add_argument('--repeat', type=int, default=2, help='rounds; the faster one counts')
    p.add_argument('--roundings', default='minmax,search,gptq')
    p.add_argument('--rounding', help='this one, in this process')
    p.add_argument('-o', '--output', default='times.json')
    args = p.parse_args()
    if args.rounding: one(args); sys.exit()
    from optiq.report import machine
    runs = {r: [] for r in args.roundings.split(',')}
    for _ in range(args.repeat):
        for rounding, found in runs.items():
            out = subprocess.run([sys.executable, *sys.argv, '--rounding', rounding], capture_output=True, text=True)
            if out.returncode: sys.exit(out.stderr[-2000:])
            found.append(json.loads(out.stdout.splitlines()[-1]))
            print(rounding, found[-1], flush=True)
    best = {r: min(found, key=lambda x: x['conversion_s']) for r, found in runs.items()}
    for r in best.values():
        for k in ('', 'cpu_'): r[f'{k}times_minmax'] = r[f'{k}conversion_s']/best['minmax'][f'{k}conversion_s']
    Path(args.output).write_text(json.dumps(dict(about=dict(model=args.model, calibration=f'{args.n} × {args.seq_len} tokens', plan=args.plan,
        command=' '.join(sys.argv), **machine()), best=best, runs=runs), indent=1, ensure_ascii=False)+'\n')
    print(json.dumps(best, indent=1))
