"The demo model's outlier channels: wherever its figures stand, a sentence says that they were planted, and what they cost"
import json
import sys
from pathlib import Path

import pytest

from optiq.models import Checkpoint
from optiq.show.demo import Demo

root = Path(__file__).parents[1]

def share(name): # of word problems that uniform 3 bits solve
    rows = json.loads((root/'nbs'/'results'/f'{name}.json').read_text())['rows']
    return next(f'{100*r["word_problems"]:.0f} %' for r in rows if r['name'] == 'uniform 3')

def test_the_note_is_what_was_measured():
    d = Demo('llm', [], {}, dict(model='demo'))
    assert f'solve {share("demo-unplanted")} of its word problems, not {share("demo")}.' in d.note
    assert d.note in repr(d) and d.note.splitlines()[1] in d._repr_html_() and Demo('llm', [], {}, dict(model='other')).note == ''

PAGES = ['index', *(f'guide/{n}' for n in ('how_it_works', 'profiles', 'read_a_sweep')),
         *(f'results/{n}' for n in ('scores', 'weights', 'cache', 'kv', 'rounding')),
         *(f'demos/{n}' for n in ('llm', 'pareto', 'kv-cache', 'combined'))]

@pytest.mark.parametrize('page', ['README.md', *(f'nbs/{p}.ipynb' for p in PAGES)])
def test_pages_with_its_figures_say_so(page): assert 'models/demo/README.md#planted-outlier-channels' in (root/page).read_text()

def test_they_come_out_exactly(tmp_path, monkeypatch):
    import numpy as np
    from optiq.backends.torch import TorchBackend
    monkeypatch.syspath_prepend(str(root/'models'/'demo'))
    monkeypatch.delitem(sys.modules, 'run', raising=False)
    import run
    b, other = TorchBackend(Checkpoint('demo')), TorchBackend(run.unplanted(tmp_path/'demo'))
    ids = np.arange(32)[None]
    assert (b.logits(ids) == other.logits(ids)).all()
    assert sum((b.unit_weight(u.path) != other.unit_weight(u.path)).any() for u in b.checkpoint.units) > 50
