"""`make demo`: convert the demo model at both published profiles, compare, print one table, draw its figures.

    python models/demo/run.py [-o optiq_output/demo] [--problems 60] [--unplanted]

The demo model has outlier channels that were planted after training (models/demo/README.md). `--unplanted` takes them out
first, which does not change what the model computes, and runs the same: how much of the loss at low bits is theirs?
"""
import argparse
import shutil
import time
from pathlib import Path

import matplotlib

from optiq.show.demo import Sizes
from optiq.show.demos import llm

def unplanted(folder):
    "The demo model as it was before its channels were planted"
    from train import plant_folder # beside this file

    from optiq.models import Checkpoint
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Checkpoint('demo').folder, folder)
    plant_folder(folder, .4, 42, -1) # strength and seed of the card
    c = Checkpoint(folder)
    c.name = 'demo' # it is asked what the demo model is asked
    return c

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', type=Path, default=Path('optiq_output/demo'))
    p.add_argument('--problems', type=int, default=60)
    p.add_argument('--unplanted', action='store_true', help='without the channels that were planted')
    args, start = p.parse_args(), time.time()
    matplotlib.use('Agg')
    model = unplanted(args.o/'source'/'demo') if args.unplanted else 'demo'
    found = llm(model, out=args.o, sizes=Sizes(n_evaluation=16, eval_len=256, problems=args.problems))
    report = found.tables[0]
    report.rows[0]['name'] = 'bfloat16'
    report.about |= dict(seconds=round(time.time()-start), command='make demo')
    if args.unplanted: report.about |= dict(command='python models/demo/run.py --unplanted',
                                            model='demo, without the channels that were planted')
    found.save(args.o, overwrite=True)
    report.save(args.o/'demo.json')
    print(f'{report}\n\n{found.note}\n\n{report.about["seconds"]} s; models, figures and demo.json are in {args.o}')

if __name__ == '__main__': main()
