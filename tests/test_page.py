"A report in one file: all of a plan is in it, every name is escaped, nothing is fetched"
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from optiq.cli import main
from optiq.knapsack import allocate
from optiq.measure.sweep import Sweep
from optiq.plan import uniform
from optiq.show.page import _bars_svg, _page, _spans, save_page
from sweeps import random_sweep

BAD = '<script>alert(1)</script>&"\''

@pytest.fixture
def folder(tmp_path):
    s = random_sweep(1)
    plan = allocate(s, target_bpw=5, protect='embed')
    tried = {f'plan {BAD}': dict(predicted_kl=.1, joint_kl=.12), 'allocated': dict(predicted_kl=None, joint_kl=.13)}
    record = dict(kept='allocated', joint_kl=.13, joint_kl_se=.01, tried=tried)
    plan = replace(plan, model=f'source {BAD}', solver=plan.solver | dict(verified=record))
    (tmp_path/'m'/'optiq').mkdir(parents=True)
    plan.save(tmp_path/'m'/'optiq'/'plan.json')
    (tmp_path/'m'/'kv_config.json').write_text(f'{{"a": "{BAD}"}}')
    return tmp_path/'m'

def elements(html):
    found = []
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs): found.append((tag, dict(attrs)))
    Reader().feed(html)
    return found

def test_everything_is_there_and_nothing_is_fetched(folder):
    html = _page(folder)
    found = elements(html)
    assert not {'script', 'link', 'img', 'iframe', 'object'} & {t for t, _ in found}
    assert not [a for _, attrs in found for a in attrs if a.startswith('on') or a in ('src', 'href')]
    assert any("default-src 'none'" in (a.get('content') or '') for _, a in found)
    assert re.findall('<h2>(.*?)</h2>', html) == ['Formats', 'KL by tensor', 'Predicted and measured', 'Wishes', 'KV cache', 'Commands']
    assert html.count('<svg') == 2 and '0.13 ± 0.01' in html.replace('0.1300 ± 0.0100', '0.13 ± 0.01') and 'protect' in html
    assert html.count('alert(1)') == html.count('&lt;script&gt;alert(1)') > 2

def test_figures_bear_errors_where_they_are_known():
    s = random_sweep(2)
    sweep = Sweep(s.units, s.formats, s.values, s.header)
    plan = allocate(sweep, target_bpw=5)
    rows = _spans(plan, sweep)
    assert [r[2] for r in rows] == sorted((plan.kl[p] for p in plan), reverse=True) and all(r[3] > 0 for r in rows)
    assert _bars_svg(rows).count('<line') == len(rows) and _bars_svg(_spans(plan, None)).count('<line') == 0
    assert all(float(x) >= 0 for x in re.findall(r'cx="([^"]*)"', _bars_svg(rows))) and _bars_svg([]) == ''

def test_a_plan_that_was_not_measured(tmp_path):
    (tmp_path/'optiq').mkdir()
    uniform(random_sweep(1), 5).save(tmp_path/'optiq'/'plan.json')
    html = _page(tmp_path)
    assert 'no measurement of the single tensors' in html and 'This plan was not measured as a whole' in html

def test_the_file_is_not_replaced_unasked(folder, tmp_path):
    out = tmp_path/'r.html'
    assert CliRunner().invoke(main, ['report', str(folder), '-o', str(out)]).exit_code == 0 and out.read_text().startswith('<!doctype html>')
    r = CliRunner().invoke(main, ['report', str(folder), '-o', str(out)])
    assert r.exit_code == 1 and '--overwrite' in r.output
    assert CliRunner().invoke(main, ['report', str(folder), '-o', str(out), '--overwrite']).exit_code == 0
    r = CliRunner().invoke(main, ['report', str(tmp_path), '-o', str(tmp_path/'x.html')])
    assert r.exit_code == 1 and 'has no optiq/plan.json; give a folder that was converted' in r.output

def test_only_a_report_is_replaced(tmp_path):
    "Whatever flag is given: a file of somebody else, and a part of one in the way, stay as they are"
    for name in ('thesis.html', '.thesis.html.optiq-part'):
        mine = tmp_path/name
        mine.write_text('<!doctype html><html>my thesis')
        with pytest.raises(FileExistsError, match='stays as it is'): save_page('nowhere', tmp_path/'thesis.html', overwrite=True)
        assert 'my thesis' in mine.read_text()
        mine.unlink()

def luminance(colour):
    def part(x): return x/12.92 if x <= .03928 else ((x+.055)/1.055)**2.4
    return sum(k*part(int(colour[i:i+2], 16)/255) for k, i in ((.2126, 1), (.7152, 3), (.0722, 5)))

def test_figures_can_be_seen_in_the_dark_and_read_on_a_phone(folder):
    html = _page(folder)
    dark = html.split('prefers-color-scheme:dark')[1].split('</style>')[0]
    drawn = {name: re.search(rf'{name}[^{{}}]*{{[^}}]*?(#[0-9a-f]+)', dark)[1] for name in ('circle', 'line', 'rect')}
    full = {k: v if len(v) == 7 else '#'+''.join(2*c for c in v[1:]) for k, v in drawn.items()}
    paper = luminance('#181818')
    assert '#181818' in dark and all((luminance(c)+.05)/(paper+.05) > 3 for c in full.values()), full
    figures = re.findall('(<div class="wide">)?<svg([^>]*)>', html)
    assert len(figures) == 2 and all(w and 'width="760"' in attrs and 'max-width' not in attrs for w, attrs in figures)
    assert '.wide{overflow-x:auto}' in html and 'svg{' not in html.split('</style>')[0]
