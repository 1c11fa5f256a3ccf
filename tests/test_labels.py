"Names, legends and ticks in every figure that a function draws, measured in what matplotlib's renderer draws"
import os
import subprocess
import sys
from inspect import unwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from optiq.evals.needle import _plot_needle
from optiq.formats import Format
from optiq.frontier import Frontier
from optiq.knapsack import allocate, pareto
from optiq.kv.layout import KVLayer, KVLayout
from optiq.kv.sweep import plot_kv
from optiq.labels import _label, _legend, _marks
from optiq.latency import Speeds, plot_frontier
from optiq.measure.sweep import Sweep
from optiq.plan import uniform
from optiq.report import Report
from optiq.show.plots import plot_kv_analysis, plot_memory
from sweeps import block_units, random_sweep

root = Path(__file__).parents[1]
sys.path[:0] = [str(root/'tools'), str(root/'nbs'/'results')]
from covered import covered # noqa: E402

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def figure(drawn): return np.ravel(drawn)[0].figure

def test_a_letter_that_the_font_lacks_is_no_warning():
    code = 'import optiq.labels, matplotlib.pyplot as plt; plt.title("\U0001f4a5 模型"); plt.savefig("/dev/null", format="png")'
    assert not subprocess.run([sys.executable, '-c', code], capture_output=True, check=True, env=os.environ | dict(MPLBACKEND='agg')).stderr

# The measure itself

def one(**how):
    ax = plt.subplots()[1]
    ax.errorbar([1, 2, 3], [1, 2, 3], [1, 1, 1], marker='o', capsize=3, label='some points', **how)
    return ax

SPOILED = dict(
    marker=(lambda ax: ax.annotate('name', (2, 2)), "'name' is covered by a mark"),
    error=(lambda ax: ax.annotate('name', (2, 2.6), ha='center'), "'name' is covered by a mark"),
    end=(lambda ax: ax.annotate('name', (2.01, 3), va='center'), "'name' is covered by a mark"),
    legend=(lambda ax: ax.legend(loc='center'), "'some points' is covered by a mark"),
    dot=(lambda ax: (ax.scatter([1.5], [3.5]), ax.text(1.5, 3.5, 'name')), "'name' is covered by a mark"),
    bar=(lambda ax: (ax.bar(2.5, 1), ax.text(2.4, .5, 'name')), "'name' is covered by a mark"),
    texts=(lambda ax: (ax.text(1.1, 3.5, 'name'), ax.text(1.15, 3.5, 'other')), "'name' and 'other' overlap"),
    title=(lambda ax: (ax.set_title('a title'), ax.text(.5, 1.03, 'name', transform=ax.transAxes)), "'name' and 'a title' overlap"),
    ticks=(lambda ax: ax.set_xticks([1, 1.05], ['one', 'other']), "'one' and 'other' overlap"))

@pytest.mark.parametrize('case', SPOILED)
def test_what_covers_a_text_is_seen(case):
    ax, (spoil, said) = one(), SPOILED[case]
    assert covered(ax.figure) == []
    spoil(ax)
    assert covered(ax.figure) == [said]

def test_a_look_changes_nothing():
    import io
    def picture(fig):
        out = io.BytesIO()
        fig.savefig(out, format='rgba')
        return out.getvalue()
    fig, axes = plt.subplots(1, 2, layout='constrained')
    axes[0].imshow(np.eye(3))
    axes[0].text(1, 1, 'in a cell') # may stand on a heat map
    axes[1].plot([1, 2], [1, 2], 'k-', label='a line') # may be crossed
    axes[1].text(1.45, 1.5, 'on a line')
    axes[1].legend()
    before, engine, canvas = picture(fig), fig.get_layout_engine(), fig.canvas
    assert covered(fig) == []
    assert picture(fig) == before and fig.canvas is canvas and type(fig.get_layout_engine()) is type(engine)

# Names and legends

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('dpi, scale', [(72, 'linear'), (200, 'log')])
def test_names_cover_nothing(seed, dpi, scale):
    x, y = np.exp(np.random.default_rng(seed).normal(size=(2, 18)))
    ax = plt.subplots(figsize=(6, 4), dpi=dpi)[1]
    ax.errorbar(x, y, y/9, ls='', marker='s', capsize=2, label='points')
    ax.scatter(x*1.1, y, 20)
    ax.set(xscale=scale, yscale=scale)
    _legend(ax)
    _label(ax, [(f'name {i}', *at) for i, at in enumerate(zip(x, y))], color='C1')
    assert [t.get_text() for t in ax.texts] == [f'name {i}' for i in range(18)] and covered(ax.figure) == []
    ax.figure.set_dpi(2*dpi) # as a notebook saves it
    assert covered(ax.figure) == []

def test_a_name_has_a_line_to_its_point_where_it_is_not_near():
    ax = plt.subplots()[1]
    ax.plot([0, 1, .5], [0, 1, .5], 'o')
    ax.plot(*np.random.default_rng(0).normal(.5, .02, (2, 30)), 'x')
    _label(ax, [('alone', 1, 1), ('in a crowd', .5, .5)])
    assert [t.arrow_patch is not None for t in ax.texts] == [False, True] and covered(ax.figure) == []

def test_marks_are_where_they_are_drawn():
    ax = plt.subplots()[1]
    ax.plot([1, 2, np.nan], [1, 2, 3], 'o', ms=10)
    ax.plot([1, 2], [2, 1], '-')
    ax.set(xlim=(0, 1.5), ylim=(0, 3))
    ax.figure.draw_without_rendering()
    (box,) = _marks(ax) # the second one is cut off, the third is none, a line has no marks
    assert np.allclose(np.mean(box.get_points(), 0), ax.transData.transform((1, 1))) and box.width == pytest.approx(10*100/72+2)

@pytest.mark.parametrize('error, beside', [(.1, False), (9, True)])
def test_a_legend_goes_where_it_covers_nothing(error, beside):
    ax = plt.subplots()[1]
    ax.errorbar(np.arange(20), np.linspace(0, 1, 20), error, label='a series with errors')
    ax.set_ylim(-1, 2)
    _legend(ax)
    assert (ax.get_legend().get_window_extent().x0 > ax.bbox.x1) == beside and covered(ax.figure) == []

# Every function that draws

def of_weights(n=30):
    s = random_sweep(1, blocks=n)
    return Sweep(s.units, s.formats, s.values, s.header | dict(model='/a/very/long/path/that/no/title/has/room/for/'*3+'model'))

def of_cache(layers=12, seed=0, width=3.):
    layout, rng = KVLayout(tuple(KVLayer(i, i, 4, 64, 64) for i in range(layers)), 'made up', 4096), np.random.default_rng(seed)
    fmts = [Format(4, 64), Format(8, 64)]
    values = {(u.path, f): np.exp(rng.normal(-7-f.bits/4, width, 4)) for u in layout.units for f in fmts}
    return Sweep(layout.units, fmts, values, dict(model='made up', params=layout.params, other_bytes=layout.other_bytes) | layout.header)

def report(n=8, seed=0):
    rng = np.random.default_rng(seed)
    def row(i): return dict(name=f'model number {i}', true_bpw=3+i/2, size_mb=9., kl=np.exp(-i+rng.normal()), kl_se=.1*np.exp(-i), kl_n=9,
                            perplexity=5+rng.random(), perplexity_se=.3, agreement=1-.03*i, agreement_se=.01)
    return Report([row(i) for i in range(n)])

def curve(seed):
    s = random_sweep(seed, blocks=3)
    return pareto(Sweep(s.units, s.formats, s.values, s.header), None, 'all')

def speeds(seed):
    x, rng = np.linspace(80, 140, 7), np.random.default_rng(seed)
    return Speeds([dict(name=f'uniform {b}g64', size_mb=1, true_bpw=b, predicted=v, measured=v*(1+rng.normal()/20), spread=v/20,
                        calibration=b == 4) for b, v in zip(range(2, 9), x)], {})

def fronts(seed):
    s = random_sweep(seed, blocks=3)
    plans = [allocate(s, target_bpw=b) for b in np.linspace(3.1, 7.9, 14)]
    lat = SimpleNamespace(tps=lambda p: 900-90*p.true_bpw, chip=SimpleNamespace(name='a chip'), context=512)
    return unwrap(plot_frontier)(Frontier(plans, [uniform(s, f) for f in s.formats]), lat)

def analysis(seed):
    s = of_cache(seed=seed)
    return plot_kv_analysis(s, allocate(s, target_bpw=5), [dict(context=4**k, fp16_bytes=2**(20+k), bytes=2**(18+k)) for k in range(5, 9)])

def memory(n):
    return plot_memory([dict(name=f'weights {i}, some cache', weight_mb=9+i, cache_mb=7., kl=None if i % 3 == 2 else .1**i) for i in range(n)])

def needle(value):
    grid = [dict(length=n, depth=d, hits=3, trials=4, n=4, margin=-1.5, margin_se=.1) for n in (128, 256, 1024, 4096) for d in (0, .25, .5, 1)]
    return _plot_needle(dict(name='a model', grid=grid), value=value)

def front_page(_):
    import show
    return show.frontier()

DRAWN = {'Sweep.plot': (lambda n: of_weights(n).plot(), (2, 12, 30)), 'Plan.plot': (lambda n: uniform(block_units(n), 4).plot(), (2, 12, 64)),
         'Frontier.plot': (lambda seed: curve(seed).plot(), range(4)), 'Report.plot': (lambda seed: report(seed=seed).plot(), range(4)),
         'Report.panels': (lambda n: report(n).panels(), (1, 8)), 'Speeds.plot': (lambda seed: speeds(seed).plot(), range(4)),
         'plot_frontier': (fronts, range(3)), 'plot_kv': (lambda seed: plot_kv(of_cache(seed=seed)), range(4)),
         'plot_kv_analysis': (analysis, range(3)), 'plot_memory': (memory, (2, 9)), 'needle': (needle, ('hits', 'margin')),
         'frontier of the front page': (front_page, [0])}

@pytest.mark.parametrize('name, draw, case', [pytest.param(n, f, c, id=f'{n} {c}') for n, (f, cases) in DRAWN.items() for c in cases])
def test_nothing_covers_a_text(name, draw, case): assert covered(figure(draw(case))) == []
