"""Is a plan from a sweep with `search` as good as one from a sweep with `gptq`, if both are saved with `gptq`?

    python bench/peers/plans.py MODEL [-o plans.json]

Exact sweeps of 8 × 128 tokens in 2, 3, 4, 5, 6 and 8 bits, plans at six sizes, all rounded by `gptq` on 32 × 128 tokens and scored on
24 × 256 tokens of the other side of the bundled text.
"""
import argparse
import json
import sys
import time
from pathlib import Path

from optiq.backends.open import open_backend
from optiq.calibration import passages, token_batch
from optiq.evals.perplexity import evaluate, evaluation_tokens
from optiq.knapsack import allocate
from optiq.report import machine
from optiq.rounding import as_overrides, round_model
from optiq.sensitivity import kl_sweep

def mean_se(x): return [float(x.mean()), float(x.std(ddof=1)/len(x)**.5)]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model')
    p.add_argument('-o', '--output', type=Path, default='plans.json')
    args = p.parse_args()
    b = open_backend(args.model, 'torch')
    learned = token_batch(passages('bundled', 'train'), b.checkpoint.tokenizer, 32, 128)
    test, rows = evaluation_tokens('bundled', b.checkpoint.tokenizer, 24, 256, 'test'), []
    how = dict(rounding_tokens=learned, method='exact', progress=False)
    sweeps = {r: kl_sweep(b, learned[:8], [2, 3, 4, 5, 6, 8], rounding=r, **how) for r in ('search', 'gptq')}
    for bits in (3, 3.5, 4, 4.5, 5, 6):
        kl, row = {}, dict(target_bpw=bits)
        for name, sweep in sweeps.items():
            plan, start = allocate(sweep, target_bpw=bits), time.process_time()
            done = as_overrides(dict(round_model(b, learned, plan, 'gptq')))
            row[name] = dict(true_bpw=plan.true_bpw, predicted_kl=plan.predicted_kl, cpu_seconds=time.process_time()-start)
            kl[name] = evaluate(b, test, {'plan': done})['plan'].kl
            row[name]['kl'] = mean_se(kl[name])
        rows.append(row | dict(difference=mean_se(kl['search']-kl['gptq'])))
        args.output.write_text(json.dumps(dict(rows=rows, about=machine() | dict(model=args.model, command=' '.join(sys.argv))), indent=1)+'\n')

if __name__ == '__main__': main()
