"""Where the sensitivity of a model that sees sits, and what widths cost it: on the witness, a trained Qwen3-VL of 10.6 M parameters.

    python bench/vlm.py [--model models/witness] [--only sweep,compare] -o nbs/results/vlm-witness.json

`sweep`     KL of each unit at each width on diagrams, and each part of the model (vision, projector, language) at 2, 3 and 4 bits
`compare`   KL and accuracy of full precision, mlx-vlm's default 4 bits (the vision tower at 16), uniform 4, 3 and 2 bits everywhere
            and OptiQ at the bytes of the first three, _rounded plainly and with GPTQ (at 4 bits also with a search)
`again`     the rows of `compare` that are rounded with GPTQ, measured once more on the same diagrams; the others stay
`ratios`    KL over that of the plan it competes with, from what `compare` kept of each diagram

Each step is written when it is done. The real shape of Qwen3-VL-2B is in bench/parts.py. On a Linux CPU it is ten times as fast
with OpenBLAS preloaded (LD_PRELOAD).
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from optiq.backends.open import open_backend
from optiq.calibration import fingerprint
from optiq.evals.ai2d import ai2d
from optiq.evals.perplexity import evaluate
from optiq.report import Report, joined, machine, score_row
from optiq.formats import AS_IS, Format, parse_format
from optiq.knapsack import allocate
from optiq.plan import make_plan, uniform
from optiq.folder import read_header
from optiq.models import Checkpoint
from optiq.rounding import as_overrides, round_model
from optiq.measure.sweep import Sweep
from optiq.sensitivity import kl_sweep
from optiq.families.vision import samples
from optiq.show.demos import _rounded

WIDTHS = [Format(k, 64) for k in (2, 3, 4, 5, 6)]
PARTS = 'vision', 'projector', 'language'

def default_plan(c, **options):
    "What mlx-vlm's own conversion makes of a model, read from what it saved"
    from mlx_vlm.convert import convert
    with tempfile.TemporaryDirectory() as d:
        convert(str(c.folder), f'{d}/out', quantize=True, q_bits=4, q_group_size=64, **options)
        saved = Checkpoint(f'{d}/out')
        stored = sum(t['data_offsets'][1]-t['data_offsets'][0] for f in saved.files for t in read_header(f).values())
        return make_plan(c, {u.path: saved.formats[u.path] for u in c.units}, 'mlx-vlm 4 bits, vision at 16'), stored

def mean(x): return dict(kl=float(x.mean()), se=float(x.std(ddof=1)/len(x)**.5), n=len(x))

def sweep(args, b):
    calibration = samples(b.checkpoint, n=args.n)
    start = time.time()
    found = kl_sweep(b, calibration, WIDTHS, out=args.log, progress=False, rounding='minmax')
    seconds, frame = time.time()-start, found.to_frame()
    found.save(args.sweep)
    scored, units = samples(b.checkpoint, n=args.parts_n, split='test'), b.checkpoint.units
    whole = {f'{p} {f}': make_plan(b.checkpoint, {u.path: f if u.part == p else AS_IS for u in units}) for p in PARTS for f in WIDTHS[:3]}
    joint = evaluate(b, scored, _rounded(b, whole))
    rows = [dict(unit=r.unit, part=r.part, kind=r.kind, block=b.checkpoint.unit[r.unit].block, format=r.format,
                 params=int(r.params), kl=float(f'{r.kl:.4g}'), se=float(f'{r.se:.3g}')) for r in frame.itertuples()]
    return dict(seconds=round(seconds), samples=args.n, calibration=fingerprint(calibration), units=rows,
                params={p: sum(u.params for u in units if u.part == p) for p in PARTS},
                whole_part={n: mean(joint[n].kl) for n in whole}, evaluation=fingerprint(scored))

def compare(args, b):
    c, found, calibration = b.checkpoint, Sweep.load(args.sweep), samples(b.checkpoint, n=args.rounding_n)
    scored, flat = samples(c, n=args.n_evaluation, split='test'), {k: uniform(c, Format(k, 64)) for k in (4, 3, 2)}
    default, stored = default_plan(c)
    if default.nbytes != stored: raise RuntimeError(f'mlx-vlm saved {stored} bytes, the plan says {default.nbytes}')
    plans = {'bfloat16': make_plan(c, c.formats), 'mlx-vlm 4 bits, vision at 16': default,
             'optiq, bytes of mlx-vlm': allocate(found, max_bytes=default.nbytes, formats=[*WIDTHS, AS_IS])}
    for k in (4, 3): plans |= {f'uniform {k} bits': flat[k], f'optiq, bytes of {k} bits': allocate(found, max_bytes=flat[k].nbytes)}
    plans['uniform 2 bits'] = flat[2]
    variants = _rounded(b, {n: p for n, p in plans.items() if n != 'bfloat16'})
    again = [(n, 'gptq') for n in plans if n[-6:] in ('4 bits', '3 bits') and 'vision' not in n]+[('optiq, bytes of 4 bits', 'search')]
    for n, method in again:
        plans[f'{n}, {method}'] = plans[n]
        variants[f'{n}, {method}'] = as_overrides(dict(round_model(b, calibration, plans[n], method)))
    scores, rows, on = evaluate(b, scored, variants), [], fingerprint(scored)
    print('scored', flush=True)
    for n, p in plans.items():
        row = score_row(n, p, scores['reference' if n == 'bfloat16' else n], on)
        if args.questions: row = joined(row, ai2d(b, args.questions, 'diagrams', free=False, overrides=variants.get(n, {}), name=n, size=p).rows[0])
        for k in ('perplexity', 'perplexity_se', 'agreement', 'agreement_se'): row.pop(k)
        row['items'] = dict(kl=[float(f'{x:.4g}') for x in row['items']['kl']], **{k: v for k, v in row['items'].items() if k == 'diagrams'})
        rows.append(row | dict(nbytes=int(p.nbytes), raised=raised(c, p)))
        print(n, f'KL {row["kl"]:.3g} ± {row["kl_se"]:.2g}', f'{p.nbytes:,} bytes', row.get('diagrams'), flush=True)
    report = Report.compare(Report(rows, dict(samples=args.n_evaluation, rounded_on=args.rounding_n, questions=args.questions)))
    return dict(report=dict(optiq='report', rows=report.rows, about=report.about), ratios=ratios_of(report.rows))

PAIRS = [('optiq, bytes of mlx-vlm', 'mlx-vlm 4 bits, vision at 16'),
         *((f'{p} {k} bits{r}', f'uniform {k} bits{q}') for k in (4, 3) for p, r, q in (
             ('optiq, bytes of', '', ''), ('optiq, bytes of', ', search', ''), ('optiq, bytes of', ', gptq', ''),
             ('optiq, bytes of', ', gptq', ', gptq'), ('uniform', ', gptq', ''))),
         *((f'optiq, bytes of 4 bits, {r}', 'optiq, bytes of 4 bits') for r in ('search', 'gptq'))]

def ratios_of(rows: list) -> list:
    kl = {r['name']: np.array(r['items']['kl']) for r in rows}
    return [ratio(kl, n, baseline) for n, baseline in PAIRS if {n, baseline} <= kl.keys()]

def ratio(kl, name, baseline, n=4000) -> dict:
    "Mean KL over the baseline's, and the same of geometric means, with 95 % intervals from resampled diagrams"
    x, y, i = kl[name], kl[baseline], np.random.default_rng(0).integers(0, len(kl[name]), (n, len(kl[name])))
    log = np.log(np.maximum(x, 1e-10)/np.maximum(y, 1e-10)) # what rounds to nothing in float32 counts as 1e-10
    def interval(draws): return [float(v) for v in np.quantile(draws, (.025, .975))]
    return dict(name=name, baseline=baseline, ratio=float(x.mean()/y.mean()), interval=interval(x[i].mean(1)/y[i].mean(1)),
                typical=float(np.exp(log.mean())), typical_interval=interval(np.exp(log[i].mean(1))),
                diagrams_better=int((x < y).sum()), diagrams=len(x))

def again(args, b):
    c, kept = b.checkpoint, json.loads(args.o.read_text())
    sweep = Sweep(c.units, WIDTHS, {(r['unit'], parse_format(r['format'])): np.array([r['kl']]) for r in kept['sweep']['units']},
                  dict(model=c.name, params=c.params, other_bytes=c.other_bytes))
    rows, calibration = kept['compare']['report']['rows'], samples(c, n=args.rounding_n)
    scored, before, done = samples(c, n=args.n_evaluation, split='test'), kept['compare'].get('since', kept['compare'])['about'], []
    of = {k: v for k, v in kept['compare']['report']['about'].items() if k != 'verdicts'}
    for row in sorted((r for r in rows if r['name'].endswith(', gptq')), key=lambda r: '4 bits' not in r['name']):
        name = row['name'].removesuffix(', gptq')
        flat = uniform(c, Format(int(name.split()[-2]), 64))
        plan = flat if name.startswith('uniform') else allocate(sweep, max_bytes=flat.nbytes)
        if plan.nbytes != row['nbytes']: raise RuntimeError(f'{name}: {plan.nbytes:,} bytes, not {row["nbytes"]:,}; measure `compare` once more')
        variant = as_overrides(dict(round_model(b, calibration, plan, 'gptq')))
        new = score_row(row['name'], plan, evaluate(b, scored, {row['name']: variant})[row['name']], fingerprint(scored))
        if args.questions: new = joined(new, ai2d(b, args.questions, 'diagrams', free=False, overrides=variant, name=row['name'], size=plan).rows[0])
        row |= {k: v for k, v in new.items() if k in row} | dict(items=dict(kl=[float(f'{x:.4g}') for x in new['items']['kl']], diagrams=new['items'].get('diagrams')))
        done.append(row['name'])
        print(row['name'], f'KL {row["kl"]:.3g} ± {row["kl_se"]:.2g}', row.get('diagrams'), flush=True)
        report = Report.compare(Report(rows, of))
        found = dict(report=dict(optiq='report', rows=report.rows, about=report.about), ratios=ratios_of(rows), since=dict(about=before), measured_again=done)
        args.o.write_text(json.dumps(kept | dict(compare=dict(about=kept['compare']['about']) | found), indent=1)+'\n')
    return found

def ratios(args, b):
    found = json.loads(args.o.read_text())['compare']
    return found | dict(ratios=ratios_of(found['report']['rows']))

def raised(c, plan) -> dict:
    "Of each part's units, the share that has more than 4 bits, and its mean bits"
    def of(part): return [u for u in c.units if u.part == part]
    return {p: dict(units=len(of(p)), above_4=sum(plan[u.path].bits > 4 for u in of(p)), below_4=sum(plan[u.path].bits < 4 for u in of(p)),
                    mean_bits=float(np.average([plan[u.path].bits for u in of(p)], weights=[u.params for u in of(p)]))) for p in PARTS} \
        if AS_IS not in set(plan.values()) else {}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='models/witness')
    p.add_argument('--only', default='sweep,compare')
    p.add_argument('--n', type=int, default=32, help='diagrams to calibrate on')
    p.add_argument('--rounding-n', type=int, default=64, help='diagrams that rounding learns from')
    p.add_argument('--parts-n', type=int, default=100, help='held-out diagrams on which whole parts are rounded')
    p.add_argument('--n-evaluation', type=int, default=300, help='held-out diagrams for KL')
    p.add_argument('--questions', type=int, default=200, help='held-out questions for accuracy')
    p.add_argument('--work', type=Path, default=Path('bench_output/vlm'), help='folder for the sweep, which is gone on with')
    p.add_argument('-o', type=Path, default=Path('nbs/results/vlm-witness.json'))
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.sweep, args.log = args.work/'sweep.json', args.work/'sweep.jsonl'
    done = json.loads(args.o.read_text()) if args.o.exists() else {}
    b = open_backend(Checkpoint(args.model))
    from importlib.metadata import version
    about = machine() | {'mlx-vlm': version('mlx-vlm'), 'openblas': 'openblas' in os.environ.get('LD_PRELOAD', '')}
    for name in args.only.split(','):
        start = time.time()
        made, kept = globals()[name](args, b), name if name == 'sweep' else 'compare'
        done[kept] = dict(about=about | dict(command=' '.join(['python bench/vlm.py', *(Path(a).name if a.startswith('/') else a for a in sys.argv[1:])]), seconds=round(time.time()-start))) | made
        args.o.parent.mkdir(parents=True, exist_ok=True)
        args.o.write_text(json.dumps(done, indent=1)+'\n')
        print(name, f'{time.time()-start:.0f} s', flush=True)

if __name__ == '__main__': main()
