"""`make demo`: convert the demo model at both published profiles, compare, print one table, draw one figure.

    python models/demo/run.py [-o optiq_output/demo] [--problems 60]
"""
import argparse
import json
import time
from pathlib import Path

import matplotlib

from optiq.backends import open_backend
from optiq.calibration import passages, token_batch
from optiq.convert import convert, overrides_of_saved
from optiq.evals.perplexity import evaluate, evaluation_tokens, overrides_of
from optiq.evals.report import Report, machine, score_row
from optiq.evals.tasks import score_rows, task_rows
from optiq.formats import Format
from optiq.knapsack import allocate, make_plan, recipe, uniform
from optiq.sensitivity import kl_sweep

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', type=Path, default=Path('optiq_output/demo'))
    p.add_argument('--problems', type=int, default=60)
    args = p.parse_args()
    start, b = time.time(), open_backend('demo')
    c = b.checkpoint
    tokens = token_batch(passages('bundled'), c.tokenizer, 8, 128)
    scored = evaluation_tokens('bundled', c.tokenizer, 16, 256)
    sweep = kl_sweep(b, tokens, [3, 4, 8])
    plans = {'optiq 4.5 (4,8)': allocate(sweep, target_bits=4.5, formats=[4, 8]),
             'optiq 3.5 (3,4)': allocate(sweep, target_bits=3.5, formats=[3, 4])}
    variants = {}
    for name, plan in plans.items():
        saved = convert(c, plan, args.o/f'demo-{plan.nominal_bits:.1f}bpw', sweep, overwrite=True, calibration='bundled text')
        variants[name] = overrides_of_saved(saved)
    others = {f'uniform {n}': uniform(c, Format(n)) for n in (4, 3)} | {n: recipe(c, n) for n in ('mixed_4_6', 'mixed_3_6')}
    variants |= {n: overrides_of(q) for n, q in others.items()}
    scores, rows = evaluate(b, scored, variants), task_rows(args.problems)
    table = []
    for name, size in {'bfloat16': make_plan(c, c.formats), **plans, **others}.items():
        row = score_row(name, size, scores['reference' if name == 'bfloat16' else name])
        row.pop('agreement'), row.pop('agreement_se'), row.pop('nominal_bpw')
        for task in ('word_problems', 'recall'):
            share = score_rows(b, rows[task], variants.get(name, {}))
            row |= {task: share.value, f'{task}_se': share.se, f'{task}_n': share.n}
        table.append(row)
    report = Report(table, dict(model='demo', text='bundled, test side, 16 × 256 tokens', seconds=round(time.time()-start),
                                command='make demo', **machine()))
    print(report)
    matplotlib.use('Agg')
    report.plot().figure.savefig(args.o/'demo.png', dpi=150, bbox_inches='tight')
    report.save(args.o/'demo.json')
    print(f'\n{json.dumps({k: report.about[k] for k in ("seconds", "cpu", "cores")})}\nmodels, {args.o}/demo.png and demo.json written')

if __name__ == '__main__': main()
