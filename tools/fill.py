"Re-run notebooks in place, honouring nbdev's directives, so that the site shows the outputs of a real run"
import sys
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.utils import str2bool
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

def fill(path):
    path = Path(path).absolute()
    front = getattr(NBProcessor(path, procs=FrontmatterProc, process=True).nb, 'frontmatter_', {})
    if str2bool(front.get('skip_exec', False)): return
    skip_flags = set(get_config().tst_flags.split())
    directives = {c.id: getattr(c, 'directives_', {}) for c in NBProcessor(path).nb.cells}
    def skipped(cell):
        found = directives[cell.id]
        return (cell.cell_type != 'code' or 'nbdev_export(' in cell.source
                or found.get('eval:', [''])[0] == 'false' or skip_flags & found.keys())
    nb = read_nb(path)
    with working_directory(path.parent): CaptureShell(path).run_all(nb, exc_stop=True, preproc=skipped)
    for cell in nb.cells: drop_bars(cell)
    clean_nb(nb)
    write_nb(nb, path)

def drop_bars(cell):
    "Progress bars are for those who wait, not for those who read"
    for o in cell.get('outputs', []):
        if o.get('name') == 'stderr':
            o['text'] = [line for line in ''.join(o['text']).splitlines(True) if '\r' not in line and '[INFO]' not in line and line.strip()]
    if cell.cell_type == 'code': cell['outputs'] = [o for o in cell.get('outputs', []) if o.get('name') != 'stderr' or o['text']]

if __name__ == '__main__':
    for path in sys.argv[1:] or nbglob(as_path=True): fill(path)
