"Explorers: their timing and state, and a real JupyterLab in a real browser"
import json, os, time
from dataclasses import asdict
from pathlib import Path
import numpy as np
import pytest
from browser import CHROMIUM, browser, lab, until
from optiq.show.explore import Explorer, _Planner, _compare, explore, explore_kv, _targets_of
from optiq.formats import Format
from optiq.knapsack import allocate
from optiq.plan import uniform
from optiq.kv.layout import kv_layout
from optiq.latency import latency
from optiq.models import Checkpoint
from optiq.units import Unit
from optiq.measure.sweep import Sweep

FORMATS = [Format(b) for b in (3, 4, 6, 8)]

def made_up(source, formats=FORMATS, n=6, seed=0):
    "A sweep of a checkpoint's or a cache's units with made-up numbers"
    r = np.random.default_rng(seed)
    values = {(u.path, f): r.lognormal(-3-1.3*f.bits+r.normal(), .3, n) for u in source.units for f in formats}
    header = dict(optiq='sweep', model='demo', params=source.params, other_bytes=source.other_bytes, units=[asdict(u) for u in source.units],
                  fingerprint=dict(model='demo', tokens='none', quantizer='minmax', formats=[str(f) for f in formats]),
                  **getattr(source, 'header', {}))
    return Sweep(source.units, formats, values, header)

@pytest.fixture(scope='module')
def sweep(): return made_up(Checkpoint('demo'))

def test_a_step_of_the_slider_is_quick():
    units = [Unit('embed', 'embed', (50000, 1024), None)]+[Unit(f'layers.{i}.{k}', k, (1024, 1024), i) for i in range(43) for k in 'abcdefg']
    class Source: units, params, other_bytes = None, 1, 0
    Source.units = units
    x = Explorer(made_up(Source), value=4.5)
    def step(v):
        start = time.process_time() # other programs may have the core meanwhile
        x.drag(v).html()
        return time.process_time()-start
    assert len(units) == 302 and np.median([step(v) for v in np.linspace(3.1, 7.9, 25)]) < .2

@pytest.mark.parametrize('by', ['nominal bits', 'MB', 'tokens per second'])
def test_every_kind_of_cap_is_kept(sweep, by):
    target = _targets_of(latency('demo', 'M3 Max', 512))[by]
    p = _Planner(sweep, FORMATS, target)
    low, high = p.ends
    assert low < high
    for v in np.linspace(low, high, 5):
        for exact in (False, True):
            got = target.read(p.plan(v, exact))
            assert got >= v*(1-1e-6) if by == 'tokens per second' else got <= v*(1+1e-6)
    assert p.plan(low-9) == p.plan(low) and p.plan(high+9) == p.plan(high)

def test_at_rest_it_is_the_allocation(sweep):
    assert Explorer(sweep, value=4.3).plan == allocate(sweep, target_bpw=4.3)

def test_formats_can_be_switched_off(sweep):
    x = Explorer(sweep, value=5).choose(['4', '8g64'])
    assert set(map(str, x.plan.values())) == {'4g64', '8g64'} and x.plan == allocate(sweep, target_bpw=5, formats=[4, 8])
    assert x.choose([]).plan == allocate(sweep, target_bpw=5, formats=[4, 8])
    assert x.choose(['4']).plan == uniform(sweep, 4)

def test_page_has_what_a_screen_reader_needs(sweep):
    data = explore(sweep)._repr_mimebundle_()
    assert 'application/vnd.jupyter.widget-view+json' not in data # there is no kernel here
    assert 'role="img" aria-label="Heat map' in data['text/html'] and 'Heat map' in data['text/plain']
    assert 'tokens per second' in data['text/html'] and '≤' in data['text/html']

def test_a_model_that_is_not_there_costs_the_speed_only(sweep):
    other = Sweep(sweep.units, sweep.formats, sweep.values, sweep.header | dict(model='no-such-model'))
    assert explore(other).lat is None
    with pytest.raises(ValueError, match='no chip'): explore(sweep, chip='Z80')

def test_kept_plan_is_compared(sweep):
    x = Explorer(sweep, value=4).keep()
    assert 'differ' in x.drag(6).html() and 'kept' in x.html()
    assert 'kept' not in x.keep(False).html()

def test_compare(sweep):
    a, b = allocate(sweep, target_bpw=4), allocate(sweep, target_bpw=6)
    c = _compare(a, b)
    assert len(c.to_frame()) == len(a.diff(b)) and 'units differ' in repr(c)
    with pytest.raises(ValueError, match='different models'): _compare(a, uniform(sweep.units[:5], 4))

def test_cache_grows_with_the_context():
    x = explore_kv(made_up(kv_layout('demo')), 4096, value=5)
    before = x.plan
    assert x.at(8192).plan.size_mb == pytest.approx(2*before.size_mb) and dict(x.plan) == dict(before)
    x.measure_by('MB')
    assert x.at(4096).plan.size_mb == pytest.approx(before.size_mb, rel=.05)

def test_cache_explorer_refuses_weights(sweep):
    with pytest.raises(ValueError, match='explore'): explore_kv(sweep)

def test_controls_without_a_kernel(sweep):
    x = Explorer(sweep, value=4)
    box = x.widget()
    bar, slider, page = box.children
    slider.value = 5.
    assert x.value == pytest.approx(5) and 'exact' in page.value # no loop to wait for rest in
    bar.children[0].value = 'MB'
    assert slider.description == 'MB' and slider.max == pytest.approx(x.planner.ends[1]) and slider.value == pytest.approx(x.plan.size_mb)
    bar.children[-2].value = False # 8 bits
    assert Format(8) not in x.formats and slider.max == pytest.approx(x.planner.ends[1])

TABLE = "document.querySelector('.optiq-explorer table')?.innerText"
NOTEBOOK = "[...(window.jupyterapp?.shell?.widgets('main') ?? [])][0]"
WHOLE = "document.querySelector('.optiq-explorer')?.innerText"

@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium: apt-get install chromium')
def test_in_jupyterlab(tmp_path, sweep):
    pytest.importorskip('jupyterlab')
    pytest.importorskip('websocket')
    sweep.save(tmp_path/'sweep.json')
    code = ('from optiq.progress import _bar\nfrom optiq.measure.sweep import Sweep\nfrom optiq.show.explore import explore\n'
            'print(*(c.__name__ for c in type(_bar(show=False)).__mro__))\nexplore(Sweep.load("sweep.json"), value=4.5)')
    cell = dict(cell_type='code', id='a', metadata={}, source=code, outputs=[], execution_count=None)
    spec = dict(kernelspec=dict(display_name='Python 3', language='python', name='python3'))
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=[cell], metadata=spec, nbformat=4, nbformat_minor=5)))
    with lab(tmp_path) as address, browser(tmp_path/'chromium') as page:
        page.send('Page.navigate', url=f'{address}/lab/tree/x.ipynb?reset')
        until(lambda: page.js(f"{NOTEBOOK}?.context?.isReady && {NOTEBOOK}.sessionContext.session?.kernel?.status == 'idle'"), what='notebook')
        page.js(f"jupyterapp.shell.activateById({NOTEBOOK}.id)")
        page.js("jupyterapp.commands.execute('application:toggle-left-area').catch(() => 0)")
        page.js("jupyterapp.commands.execute('notebook:run-all-cells')")
        before = until(lambda: page.js(TABLE), what='explorer')
        bits = lambda text: float(text.split('plan')[-1].split()[0])
        assert 4.4 < bits(before) <= 4.5
        assert 'tqdm_notebook' in page.js("document.querySelector('.jp-OutputArea-output pre').innerText") # bars are widgets
        for _ in page.drag('.optiq-explorer .noUi-handle', 120): # held: fast answers
            until(lambda: page.js(TABLE) != before, what='numbers follow the slider')
        moved = until(lambda: 'exact' in page.js(WHOLE) and page.js(TABLE), what='exact at rest')
        assert bits(moved) > bits(before)+.3
        page.js("[...document.querySelectorAll('.optiq-explorer button')].find(b => b.innerText.includes('compare')).click()")
        for _ in page.drag('.optiq-explorer .noUi-handle', -160): pass
        until(lambda: 'units differ' in page.js(WHOLE), what='comparison')
        assert page.js("document.querySelectorAll('.optiq-explorer svg polygon').length") > 2
        shot = Path(os.environ.get('OPTIQ_SCREENSHOT') or tmp_path/'explore.png')
        page.screenshot(shot)
        assert shot.stat().st_size > 20000
