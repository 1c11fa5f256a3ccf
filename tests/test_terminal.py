"What is shown: five nouns in Jupyter, tables in a terminal, demos by name"
import json
import warnings
import click
import numpy as np
import pytest
from click.testing import CliRunner
from optiq.cli import main
from optiq.command import Command
from optiq.show.demo import _published
from optiq.show.demos import audio, find_demo, names, vlm
from optiq.report import Report, fit, _table
from optiq.formats import AS_IS, Format
from optiq.knapsack import allocate
from optiq.frontier import Frontier
from optiq.plan import uniform
from optiq.models import Checkpoint
from optiq.measure.sweep import Sweep

@pytest.fixture(scope='module')
def sweep():
    c, r = Checkpoint('demo'), np.random.default_rng(0)
    fmts = [Format(b) for b in (3, 4, 8)]
    return Sweep(c.units, fmts, {(u.path, f): r.lognormal(-f.bits, .3, 4) for u in c.units for f in fmts},
                 dict(model='demo', params=c.params, other_bytes=c.other_bytes))

def rows(n=3):
    return [dict(name=f'optiq 4.5 (4,8) {i}', nominal_bpw=4.5, true_bpw=5., size_mb=123.4, kl=.1, kl_se=.01, perplexity=12., perplexity_se=1.,
                 agreement=.9, agreement_se=.1, gsm8k=.5, gsm8k_low=.4, gsm8k_high=.6, gsm8k_n=9, needle=.5) for i in range(n)]

def test_the_five_nouns_in_jupyter(sweep):
    plan = allocate(sweep, target_bpw=4.5)
    for noun in (Format(4, 64), Format(8, 32, 'mxfp8'), AS_IS, sweep.units[0], sweep.units[1], sweep, plan, Report(rows())):
        html = noun._repr_html_()
        assert '<table' in html and '</table>' in html and len(repr(noun)) < 2000
    assert '4.500' in Format(4, 64)._repr_html_() and 'bytes' in sweep.units[0]._repr_html_()

def test_frames_are_tidy(sweep):
    plan = allocate(sweep, target_bpw=4.5)
    assert len(sweep.to_frame()) == 3*len(sweep.units) and len(plan.to_frame()) == len(plan) and len(Report(rows()).to_frame()) == 3

def test_plots_draw_on_the_axes_they_are_given(sweep):
    from matplotlib.figure import Figure
    for noun in (sweep, allocate(sweep, target_bpw=4.5), Report(rows()), Frontier([uniform(sweep, 4)])):
        ax = Figure().subplots()
        assert noun.plot(ax) is ax and ax.has_data()

def test_wide_tables_fit_a_terminal(sweep):
    text = fit(_table(rows()))
    assert max(map(len, text.splitlines())) <= 80 and text.count('optiq 4.5 (4,8) 2') > 1
    assert all(x in text for x in ('perplexity', 'agreement', 'GSM8K', 'needle'))
    flat = [uniform(sweep, f) for f in sweep.formats]
    curve = Frontier([allocate(sweep, target_bpw=t) for t in (4, 5)], flat, scores={p.name: np.full(4, .1) for p in flat})
    assert max(map(len, repr(curve).splitlines()[:6])) <= 80

def test_fit_keeps_every_cell():
    table = [[f'{c}{r}'*4 for c in 'abcdefghijklm'] for r in range(3)]
    text = fit(table)
    assert max(map(len, text.splitlines())) <= 80 and all(x in text for r in table for x in r)
    assert fit([['a', 'b'], ['x'*90, '1']]).count('x'*90) == 1 # what cannot fit is not lost

def test_published_figures_are_marked():
    for name in ('llm', 'vlm', 'audio', 'pareto', 'hardware', 'kv-cache', 'combined'):
        assert _published(name)
        for t in _published(name):
            assert 'not measured here' in repr(t) and 'not measured here' in t._repr_html_()
            assert all(len(r) == len(t.columns) for r in t.rows) and max(map(len, repr(t).splitlines()[1:])) <= 80

def test_demos_are_found_by_name():
    assert {'llm', 'vlm', 'audio', 'pareto', 'hardware', 'kv-cache', 'combined'} == set(names())
    with pytest.raises(ValueError, match='no demo .*kv-cache'): find_demo('models') # a module, and no demo
    assert find_demo('vlm') is vlm and find_demo('audio') is audio

def test_demo_on_the_command_line(tmp_path):
    r = CliRunner().invoke(main, ['demo', 'kv-cache', '--fast', '--json', '-o', str(tmp_path/'d')])
    assert r.exit_code == 0, r.stderr
    d = json.loads(r.stdout)
    assert d['demo'] == 'kv-cache' and d['about']['cpu'] and len(d['published']) == 3
    assert {p.name for p in (tmp_path/'d').iterdir()} == {'.optiq', 'tables.txt', 'demo.json', 'kv-analysis.png'}
    r = CliRunner().invoke(main, ['demo', 'kv-cache', '--chip', 'M1'])
    assert r.exit_code == 2 and '--chip' in r.stderr

def test_a_warning_of_a_command_is_one_line():
    @click.command(cls=Command)
    def warn(): click.echo(warnings.formatwarning('some units\n moved nothing', UserWarning, 'sweep.py', 5), nl=False)
    before = warnings.formatwarning
    assert CliRunner().invoke(warn).stdout == 'warning: some units moved nothing\n' and warnings.formatwarning is before

def test_help_tells_the_default_rounding(monkeypatch):
    from optiq import request, rounding
    def told(command): return ' '.join(CliRunner().invoke(main, [command, '--help']).stdout.split())
    for name, before in dict(convert='that of --sweep, or', sweep='[default:', pareto='that of --sweep, or').items():
        assert f'[{"|".join(rounding.QUANTIZERS)}]' in told(name) and f'{before} {request.ROUNDING}]' in told(name)
    for module in (request, rounding): monkeypatch.setattr(module, 'ROUNDING', 'something else')
    assert 'or something else]' in told('convert')
