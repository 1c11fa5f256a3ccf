"""Run notebooks as `nbdev_test` does, in less time: all of them, or those that are named

    python tools/notebooks.py [nbs/05_plan.ipynb …]

Two workers take them from a list in which the long ones come first, so that neither waits for the other at the end.
A notebook shows the figures of its full text. What it asserts holds for any text, so here sequences have half the
length or a quarter, except where an assertion is a comparison with an error bar, and a sequence that stands alone. What a sweep
measures is measured once for all of them, and so are the grids of `search` and the scores of baselines, and what a
model wrote after a prompt. A figure in which something covers a text fails (`tools/covered.py`).
"""
import gc
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

from blas import fast_blas, fast_products, keep_memory
from remember import remember_answers, remember_grids, remember_probes, remember_scores

LONG = ('33_evals.tasks', '06_rounding', '34_evals.gsm8k', '08_pipeline', 'index', '05c_refine', '46_score', '37_evals.needle', 'llm',
        '04_sensitivity', '11d_kv.rotated', '45_evals.verify', '20b_latency', '04d_measure.gradient', '04a_measure.kl', 'vlm', '11f_kv.sweep',
        '62a_show.demos', '09_serve', 'audio', '07_convert', '32a_evals.gguf', '30_report', '89b_commands.make')
WHOLE = '02_calibration', '06_rounding', '06c_gptq', '30_report', '45_evals.verify' # they assert, or call, what needs all of the text
PLAIN = '11c_kv.cache', '11ca_kv.attention' # for them MLX has its own BLAS: the last digits of products matter

def shorter(make, texts, tokenizer, n=8, seq_len=128, *args, **options):
    "`token_batch` with a quarter of the tokens in a sequence, but 32 where there are so many"
    if n > 1 and not Sequences.whole: seq_len = max(seq_len//4, min(seq_len, 32))
    return make(texts, tokenizer, n, seq_len, *args, **options)

class Sequences: whole = False

def checked(draw, canvas, *args, **options):
    "`print_figure` of matplotlib, after a look at what covers a text in the figure"
    from covered import covered
    fig = canvas.figure
    Figures.faults += covered(fig)
    engine = fig.get_layout_engine()
    fig.set_layout_engine('none') # all stays where it was, and nobody looks at the pixels
    try: return draw(canvas, *args, **options | dict(dpi=fig.dpi, bbox_inches=None))
    finally:
        if engine is not None: fig.set_layout_engine(engine)

class Figures: faults: list = []

def prepare(root: Path, fast: bool, folder: Path):
    "What a worker does before its first notebook"
    gc.disable() # while everything is imported; what was imported is no garbage
    keep_memory()
    os.environ.setdefault('MLX_DISABLE_COMPILE', '1') # on a CPU every compiled function costs seconds of a C++ compiler
    if fast:
        fast_blas()
        fast_products()
        children = [str(root/'tools'/'children'), *os.environ.get('PYTHONPATH', '').split(os.pathsep)]
        os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, children)) # the same in processes that a notebook starts
    from optiq import calibration # before any module that takes the function from it
    calibration.token_batch = partial(shorter, calibration.token_batch)
    remember_grids()
    remember_scores()
    remember_probes(folder)
    remember_answers(folder)
    from matplotlib.backend_bases import FigureCanvasBase
    draw = FigureCanvasBase.print_figure
    FigureCanvasBase.draw_idle = lambda *args, **options: None # it is drawn when it is shown
    FigureCanvasBase.print_figure = lambda canvas, *args, **options: checked(draw, canvas, *args, **options)
    import mlx_lm, torch, transformers # noqa: F401
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()
    os.chdir(root/'nbs')

def run(path: Path, root: Path, skip: list) -> tuple: # name, passed, seconds
    Sequences.whole = path.stem in WHOLE
    Figures.faults.clear()
    passed, seconds = test_nb(path, skip_flags=skip, basepath=root)
    for fault in Figures.faults: print(f'{path.name}: in a figure {fault}')
    return path.name, passed and not Figures.faults, seconds

def rank(path: Path) -> int: return LONG.index(path.stem) if path.stem in LONG else len(LONG)

def main():
    root, start = Path(__file__).parents[1], time.time()
    files = [Path(p).absolute() for p in sys.argv[1:]] or sorted(p.absolute() for p in nbglob(as_path=True))
    job = partial(run, root=root, skip=get_config().tst_flags.split())
    def workers(n, fast): return ProcessPoolExecutor(n, initializer=prepare, initargs=(root, fast, Path(folder)))
    with TemporaryDirectory() as folder, workers(1, False) as plain, workers(2, True) as pool:
        apart = plain.map(job, [f for f in files if f.stem in PLAIN])
        found = [*pool.map(job, sorted((f for f in files if f.stem not in PLAIN), key=rank)), *apart]
    for name, _, seconds in sorted(found, key=lambda row: -row[2]): print(f'{name}: {seconds:.0f} secs')
    failed = [name for name, passed, _ in found if not passed]
    if failed or not found: sys.exit(f'failed: {", ".join(failed)}' if failed else 'no notebook found')
    print(f'{len(found)} notebooks passed in {time.time()-start:.0f} s')

if __name__ == '__main__':
    from notebooks import main # a notebook becomes `__main__`, so workers look for our functions under this name
    main()
