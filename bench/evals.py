"""Needles, word problems and KL of the demo model at full precision, uniform 4 and 3 bits and two plans; speed of any models.

    python bench/evals.py [--trials 200] [--problems 500] [--speed MODEL …] [--only-speed] -o nbs/results/evals.json

On one H100 or H200 about four minutes with the defaults. Everything is written after each step, so an interrupted run keeps
what it has. `--speed` times models with mlx-lm (prompt 512, 128 new tokens) and needs MLX on the device.
"""
import argparse
import sys
import time
from pathlib import Path

from optiq.backends.torch import TorchBackend
from optiq.calibration import fingerprint, passages, token_batch
from optiq.evals.gsm8k import gsm8k, questions
from optiq.evals.needle import needle
from optiq.evals.perplexity import evaluate, evaluation_tokens, overrides_of
from optiq.report import Report, joined, machine, score_row
from optiq.evals.throughput import throughput
from optiq.formats import Format
from optiq.knapsack import allocate
from optiq.plan import make_plan, uniform
from optiq.models import Checkpoint
from optiq.sensitivity import kl_sweep

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', type=Path, required=True)
    p.add_argument('--trials', type=int, default=200, help='needles of each length and depth')
    p.add_argument('--lengths', default='128,256,512,1024')
    p.add_argument('--problems', type=int, default=500)
    p.add_argument('--sequences', type=int, default=16, help='of 256 tokens, for KL and perplexity')
    p.add_argument('--speed', nargs='*', default=[], help='models to time')
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--only-speed', action='store_true', help='nothing but the speed of the models named')
    args = p.parse_args()
    if not args.only_speed: quality(args)
    rows = []
    for m in args.speed:
        timed = throughput(m, repeats=args.repeats)
        rows += timed.rows
        Report(rows, timed.about | dict(command='python '+' '.join(sys.argv))).save(args.o.with_name(f'{args.o.stem}-speed.json'))
        print(Report(rows[-1:]), flush=True)

def quality(args):
    "KL, perplexity, needles and word problems of five plans of the demo model"
    start, b = time.time(), TorchBackend(Checkpoint('demo'))
    c = b.checkpoint
    tokens, scored = token_batch(passages('bundled'), c.tokenizer, 8, 128), evaluation_tokens('bundled', c.tokenizer, args.sequences, 256)
    sweep = kl_sweep(b, tokens, [3, 4, 8], progress=False, rounding='minmax')
    plans = {'bfloat16': make_plan(c, c.formats), 'optiq 4.5 (4,8)': allocate(sweep, target_bpw=4.5, formats=[4, 8]),
             'uniform 4': uniform(c, Format(4)), 'optiq 3.5 (3,4)': allocate(sweep, target_bpw=3.5, formats=[3, 4]),
             'uniform 3': uniform(c, Format(3))}
    variants = {n: overrides_of(q) for n, q in plans.items()}
    scores = evaluate(b, scored, variants)
    rows = {n: score_row(n, q, scores[n], fingerprint(scored)) for n, q in plans.items()}
    about = dict(command='python '+' '.join(sys.argv), model='demo', trials=args.trials, problems=args.problems,
                 text=f'bundled, test side, {args.sequences} × 256 tokens', device=_device(b), **machine())
    def write():
        report = Report.compare(Report(list(rows.values()), about))
        report.about['seconds'] = round(time.time()-start)
        report.save(args.o)
        return report
    asked, lengths = questions('word-problems', args.problems), tuple(map(int, args.lengths.split(',')))
    for n, q in plans.items():
        found = needle(b, lengths, trials=args.trials, overrides=variants[n], name=n, size=q).rows[0]
        found = joined(found, gsm8k(b, asked, 0, 200, 512, overrides=variants[n], name=n, size=q, figure='word_problems').rows[0])
        rows[n] = joined(rows[n], found)
        write()
        print(f'{time.time()-start:4.0f} s', n, f'needle {found["needle"]:.1%}, problems {found["word_problems"]:.1%}', flush=True)
    print(write(), flush=True)

def _device(b): return b.xp.cuda.get_device_name() if b.device == 'cuda' else machine()['cpu']

if __name__ == '__main__': main()
