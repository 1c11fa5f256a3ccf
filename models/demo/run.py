"""`make demo`: convert the demo model at both published profiles, compare, print one table, draw its figures.

    python models/demo/run.py [-o optiq_output/demo] [--problems 60]
"""
import argparse
import time
from pathlib import Path

import matplotlib

from optiq.show.demo import Sizes
from optiq.show.demos import llm

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', type=Path, default=Path('optiq_output/demo'))
    p.add_argument('--problems', type=int, default=60)
    args, start = p.parse_args(), time.time()
    matplotlib.use('Agg')
    found = llm('demo', out=args.o, sizes=Sizes(n_evaluation=16, eval_len=256, problems=args.problems))
    report = found.tables[0]
    report.rows[0]['name'] = 'bfloat16'
    report.about |= dict(seconds=round(time.time()-start), command='make demo')
    found.save(args.o, overwrite=True)
    report.save(args.o/'demo.json')
    print(f'{report}\n\n{report.about["seconds"]} s; models, figures and demo.json are in {args.o}')

if __name__ == '__main__': main()
