"""Where the sensitivity of a model that sees sits, and what widths cost it: on the witness, a trained Qwen3-VL of 10.6 M parameters.

    python bench/vlm.py [--model models/witness] [--only sweep,compare,accuracy,shape] -o nbs/results/vlm-witness.json

`sweep`     KL of each unit at each width on diagrams, and each part of the model (vision, projector, language) at 4 bits
`compare`   KL and accuracy of full precision, mlx-vlm's default 4 bits (the vision tower at 16), uniform 4 bits everywhere and
            OptiQ at the bytes of either, rounded plainly and with a search or GPTQ
`shape`     random weights in the shape of Qwen3-VL-2B: Linear layers found, and bytes against what mlx-vlm saves (12 GB of disk)

Everything is written after each step. On a Linux CPU it is ten times as fast with OpenBLAS preloaded (LD_PRELOAD).
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from optiq.backends import open_backend
from optiq.calibration import fingerprint
from optiq.evals.ai2d import ai2d
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.evals.report import Report, joined, machine, score_row
from optiq.formats import AS_IS, Format
from optiq.knapsack import allocate, make_plan, uniform
from optiq.models import Checkpoint, read_header
from optiq.rounding import as_overrides, round_model
from optiq.sensitivity import Sweep, kl_sweep
from optiq.tiny import tiny
from optiq.vlm import samples

WIDTHS = [Format(2, 64), Format(3, 64), Format(4, 64), Format(4, 32), Format(5, 64), Format(6, 64), Format(8, 64)]
PARTS = 'vision', 'projector', 'language'

def default_plan(c, **options):
    "What mlx-vlm's own conversion makes of a model, read from what it saved"
    from mlx_vlm.convert import convert
    with tempfile.TemporaryDirectory() as d:
        convert(str(c.folder), f'{d}/out', quantize=True, q_bits=4, q_group_size=64, **options)
        saved = Checkpoint(f'{d}/out')
        stored = sum(t['data_offsets'][1]-t['data_offsets'][0] for f in saved.files for t in read_header(f).values())
        return make_plan(c, {u.path: saved.formats[u.path] for u in c.units}, 'mlx-vlm 4 bits, vision at 16'), stored

def sweep(args, b, done):
    calibration = samples(b.checkpoint, n=args.n)
    start = time.time()
    found = kl_sweep(b, calibration, WIDTHS, progress=False)
    seconds, frame = time.time()-start, found.to_frame()
    scored = samples(b.checkpoint, n=args.eval_n, split='test')
    whole = {p: overrides_of(make_plan(b.checkpoint, {u.path: WIDTHS[2] if u.part == p else AS_IS for u in b.checkpoint.units})) for p in PARTS}
    joint = evaluate(b, scored, whole)
    units = [dict(unit=r.unit, part=r.part, kind=r.kind, block=b.checkpoint.unit[r.unit].block, format=r.format,
                  params=int(r.params), kl=float(r.kl), se=float(r.se)) for r in frame.itertuples()]
    found.save(args.sweep)
    def mean(x): return dict(kl=float(x.mean()), se=float(x.std(ddof=1)/len(x)**.5), n=len(x))
    return dict(seconds=round(seconds), samples=args.n, calibration=fingerprint(calibration), units=units,
                params={p: sum(u.params for u in b.checkpoint.units if u.part == p) for p in PARTS},
                whole_part_at_4_bits={p: mean(joint[p].kl) for p in PARTS}, evaluation=fingerprint(scored))

def compare(args, b, done):
    c, found, calibration = b.checkpoint, Sweep.load(args.sweep), samples(b.checkpoint, n=args.rounding_n)
    scored, four = samples(c, n=args.eval_n, split='test'), uniform(c, Format(4, 64))
    default, stored = default_plan(c)
    if default.nbytes != stored: raise RuntimeError(f'mlx-vlm saved {stored} bytes, the plan says {default.nbytes}')
    plans = {'bfloat16': make_plan(c, c.formats), 'mlx-vlm 4 bits, vision at 16': default, 'uniform 4 bits': four,
             'optiq, bytes of uniform': allocate(found, max_bytes=four.nbytes), 'optiq, bytes of mlx-vlm': allocate(found, max_bytes=default.nbytes, formats=[*WIDTHS, AS_IS])}
    variants = {n: overrides_of(p) for n, p in plans.items() if n != 'bfloat16'}
    for method in args.rounding.split(','):
        for n in ('uniform 4 bits', 'optiq, bytes of uniform'):
            plans[f'{n}, {method}'] = plans[n]
            variants[f'{n}, {method}'] = as_overrides(dict(round_model(b, calibration, plans[n], method)))
    scores = evaluate(b, scored, variants)
    rows, on = [], fingerprint(scored)
    for n, p in plans.items():
        row = score_row(n, p, scores['reference' if n == 'bfloat16' else n], on)
        if args.questions: row = joined(row, ai2d(b, args.questions, 'diagrams', free=False, overrides=variants.get(n, {}), name=n, size=p).rows[0])
        row.pop('perplexity', None)
        rows.append(row | dict(nbytes=int(p.nbytes), raised=raised(c, p)))
        print(n, f'KL {row["kl"]:.4f} ± {row["kl_se"]:.4f}', f'{p.nbytes:,} bytes', row.get('diagrams'), flush=True)
    report = Report.compare(Report(rows, dict(samples=args.eval_n, questions=args.questions)))
    kl = {r['name']: r['kl'] for r in rows}
    best = min((n for n in kl if n.startswith('optiq, bytes of uniform')), key=kl.get)
    return dict(report=dict(optiq='report', rows=report.rows, about=report.about), best=best, ratio=kl[best]/kl['uniform 4 bits'],
                ratio_same_rounding=kl['optiq, bytes of uniform']/kl['uniform 4 bits'])

def raised(c, plan) -> dict:
    "Of each part's units, the share that has more than 4 bits, and its mean bits"
    def of(part): return [u for u in c.units if u.part == part]
    return {p: dict(units=len(of(p)), above_4=sum(plan[u.path].bits > 4 for u in of(p)), below_4=sum(plan[u.path].bits < 4 for u in of(p)),
                    mean_bits=float(np.average([plan[u.path].bits for u in of(p)], weights=[u.params for u in of(p)]))) for p in PARTS} \
        if AS_IS not in set(plan.values()) else {}

def shape(args, b, done):
    with tempfile.TemporaryDirectory(dir=args.disk) as d:
        c = Checkpoint(tiny('qwen3_vl', f'{d}/model', shape='2B'))
        linear = [n for n, m in c.load().named_modules() if type(m).__name__ == 'Linear']
        plan, stored = default_plan(c)
        kinds = {p: sum(u.part == p for u in c.units) for p in PARTS}
        return dict(weights='random', params=int(c.params), linear_layers=len(linear), units=len(c.units), by_part=kinds,
                    linear_without_unit=len(set(linear)-{u.path for u in c.units}), planned_bytes=int(plan.nbytes), saved_bytes=int(stored))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='models/witness')
    p.add_argument('--only', default='sweep,compare,shape')
    p.add_argument('--n', type=int, default=16, help='diagrams to calibrate on')
    p.add_argument('--rounding-n', type=int, default=64, help='diagrams that rounding learns from')
    p.add_argument('--rounding', default='search,gptq')
    p.add_argument('--eval-n', type=int, default=100, help='held-out diagrams for KL')
    p.add_argument('--questions', type=int, default=400, help='held-out questions for accuracy')
    p.add_argument('--disk', help='folder for temporary files')
    p.add_argument('-o', type=Path, default=Path('nbs/results/vlm-witness.json'))
    args = p.parse_args()
    args.sweep = args.o.with_suffix('.sweep.json')
    done = json.loads(args.o.read_text()) if args.o.exists() else {}
    b = open_backend(Checkpoint(args.model))
    from importlib.metadata import version
    about = machine() | {'mlx-vlm': version('mlx-vlm'), 'openblas': 'openblas' in os.environ.get('LD_PRELOAD', '')}
    for name in args.only.split(','):
        start = time.time()
        done[name] = globals()[name](args, b, done)
        done[name]['about'] = about | dict(command='python '+' '.join(sys.argv), seconds=round(time.time()-start))
        args.o.parent.mkdir(parents=True, exist_ok=True)
        args.o.write_text(json.dumps(done, indent=1)+'\n')
        print(name, f'{time.time()-start:.0f} s', flush=True)

if __name__ == '__main__': main()
