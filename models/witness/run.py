"""`make demo-vlm`: where the witness needs its bits, what it still sees with fewer, and the converted model.

    python models/witness/run.py [-o optiq_output/demo-vlm] [--fast]

The tables are printed; figures, tables and the model are written.
"""
import argparse
from pathlib import Path

import matplotlib

from optiq.show.demos import vlm as demo

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', type=Path, default=Path('optiq_output/demo-vlm'))
    p.add_argument('--fast', action='store_true', default=None, help='small sizes')
    args = p.parse_args()
    matplotlib.use('Agg')
    found = demo(Path(__file__).parent, args.fast, args.o/'witness')
    found.save(args.o, overwrite=True)
    print(f'{found!r}\n\nmodel, tables and figures written to {args.o}')

if __name__ == '__main__': main()
