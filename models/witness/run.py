"""`make demo-vlm`: convert the witness at the bytes of uniform 4 bits, compare, print one table, draw one figure.

    python models/witness/run.py [-o optiq_output/vlm] [--questions 40]

Some minutes on two cores; with OpenBLAS preloaded (LD_PRELOAD, on Linux) about one.
"""
import argparse
import json
import time
from pathlib import Path

import matplotlib

from optiq.backends import open_backend
from optiq.calibration import fingerprint
from optiq.convert import convert, overrides_of_saved
from optiq.evals.ai2d import ai2d
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.evals.report import Report, joined, machine, score_row
from optiq.knapsack import allocate, default_of_vlm, make_plan, uniform
from optiq.models import Checkpoint
from optiq.sensitivity import kl_sweep
from optiq.vlm import samples

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', type=Path, default=Path('optiq_output/vlm'))
    p.add_argument('--samples', type=int, default=4, help='diagrams to calibrate on')
    p.add_argument('--scored', type=int, default=20, help='held-out diagrams for KL')
    p.add_argument('--questions', type=int, default=40, help='held-out questions for accuracy')
    args = p.parse_args()
    start, b = time.time(), open_backend(Checkpoint(Path(__file__).parent))
    c = b.checkpoint
    sweep = kl_sweep(b, samples(c, n=args.samples), [3, 4, 6])
    four = uniform(c, '4g64')
    plan = allocate(sweep, max_bytes=four.nbytes)
    saved = convert(c, plan, args.o/'witness', sweep, overwrite=True, calibration='diagrams')
    plans = {'bfloat16': make_plan(c, c.formats), 'mlx-vlm, vision at 16': default_of_vlm(c), 'uniform 4 bits': four, 'optiq': plan}
    variants = {'optiq': overrides_of_saved(saved)} | {n: overrides_of(plans[n]) for n in list(plans)[1:3]}
    scored = samples(c, n=args.scored, split='test')
    scores, rows = evaluate(b, scored, variants), []
    for name, size in plans.items():
        row = score_row(name, size, scores['reference' if name == 'bfloat16' else name], fingerprint(scored))
        for k in ('perplexity', 'perplexity_se', 'agreement', 'agreement_se'): row.pop(k)
        asked = ai2d(b, args.questions, 'diagrams', free=False, overrides=variants.get(name, {}), name=name, size=size)
        rows.append(joined(row, asked.rows[0]))
    about = dict(model='models/witness', text=f'{args.scored} held-out diagrams', command='make demo-vlm', seconds=round(time.time()-start))
    report = Report.compare(Report(rows, about | machine()))
    print(report)
    matplotlib.use('Agg')
    report.plot().figure.savefig(args.o/'vlm.png', dpi=150, bbox_inches='tight')
    report.save(args.o/'vlm.json')
    print(f'\n{json.dumps({k: report.about[k] for k in ("seconds", "cpu", "cores")})}\nmodel, {args.o}/vlm.png and vlm.json written')

if __name__ == '__main__': main()
