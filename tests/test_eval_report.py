"Figures, paired tests and comparisons, without a model"
import json
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from optiq.report import Report, _holm, _interval, joined, mean_figure, _metric, _paired, share_figure
from optiq.report import test as paired_rows, _verdict
from optiq.score import as_figures, _find_task, _one_figure, _perplexity_figure, run_task

def row(name, **figures): return joined(dict(name=name, nominal_bpw=4., true_bpw=4.5, size_mb=10.), *figures.values())

@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 50))
def test_mcnemar_is_the_sign_test_on_what_differs(up, down, same):
    if up+down+same < 2: return
    x, y = [1]*up+[0]*down+[1]*same, [0]*up+[1]*down+[1]*same
    n, k = up+down, min(up, down)
    want = min(1., 2*sum(comb(n, i) for i in range(k+1))/2**n) if n else 1.
    assert _paired(x, y)['p_value'] == pytest.approx(want, abs=1e-12) == _paired(y, x)['p_value']

def test_paired_t_is_the_textbook_one():
    from scipy.stats import ttest_rel
    r = np.random.default_rng(0)
    x, y = r.normal(size=30), r.normal(.5, size=30)
    got = _paired(x, y)
    assert got['p_value'] == pytest.approx(ttest_rel(x, y).pvalue)
    assert got['low'] < got['difference'] < got['high'] and (got['p_value'] < .05) == (not got['low'] < 0 < got['high'])
    assert _paired(x, x)['p_value'] == 1 and _paired([1.5], [2.])['p_value'] is None

def test_under_the_null_few_p_values_are_small():
    r = np.random.default_rng(1)
    p = [_paired(r.normal(size=20), r.normal(size=20))['p_value'] for _ in range(400)]
    assert np.mean(np.array(p) < .05) < .09

def test_figures():
    f = share_figure('gsm8k', [1]*8+[0]*2, 'x')
    assert (f['gsm8k_low'], f['gsm8k_high']) == pytest.approx((.4902, .9433), abs=1e-4) and f['gsm8k_n'] == 10
    f = mean_figure('kl', [1., 2., 3., 4.])
    assert f['kl_high']-f['kl'] == pytest.approx(3.182446*f['kl_se'], rel=1e-5) # t with 3 degrees of freedom
    f = _perplexity_figure(np.log([2., 8.]))
    assert f['perplexity'] == pytest.approx(4) and f['perplexity_low'] < 4 < f['perplexity_high']

def test_holm_is_monotone_and_never_smaller():
    p = dict(a=.01, b=.04, c=.03)
    assert _holm(p) == pytest.approx(dict(a=.03, c=.06, b=.06))

def test_a_winner_needs_the_test():
    a, b = row('a', g=share_figure('gsm8k', [1]*60+[0]*40, 'q')), row('b', g=share_figure('gsm8k', [1]*57+[0]*43, 'q'))
    assert _verdict([a, b], 'gsm8k') == dict(winner=None, text='no difference shown between a and b (p = 0.25)')
    c = row('c', g=share_figure('gsm8k', [1]*20+[0]*80, 'q'))
    assert _verdict([a, c], 'gsm8k')['winner'] == 'a'
    assert _verdict([a, b, c], 'gsm8k')['winner'] is None # beats c, not b
    other = row('d', g=share_figure('gsm8k', [1]*20+[0]*80, 'other questions'))
    assert 'no paired test' in _verdict([a, other], 'gsm8k')['text'] and paired_rows(a, other, 'gsm8k') is None
    assert _verdict([a], 'gsm8k') is None

def test_less_is_better_where_it_is():
    x, noise = np.linspace(1, 2, 20), np.random.default_rng(0).normal(size=20)/50
    a, b = (row(n, k=mean_figure('kl', x+d*(.1+noise), 'q')) for n, d in (('a', 0), ('b', 1)))
    assert _verdict([a, b], 'kl')['winner'] == 'a' and _metric('wer').better == -1 and _metric('harness:x').better == 1

def test_compare_merges_models_and_refuses_contradictions(tmp_path):
    g, k = (lambda v: share_figure('gsm8k', v, 'q')), (lambda v: mean_figure('kl', v, 't'))
    r = Report.compare(Report([row('a', g=g([1, 0, 1])), row('b', g=g([0, 0, 1]))], dict(cpu='x', n=3)),
                       Report([row('a', k=k([.1, .2])), row('c', k=k([.3, .5]))], dict(cpu='x', n=4)))
    assert [x['name'] for x in r.rows] == ['a', 'b', 'c'] and r.about['cpu'] == 'x' and 'n' not in r.about
    assert r.metrics == ['kl', 'gsm8k'] and set(r.verdicts) == {'kl', 'gsm8k'}
    assert 'no difference shown' in repr(r) and '<li>' in r._repr_html_()
    r.save(tmp_path/'r.json')
    assert Report.load(tmp_path/'r.json').verdicts == r.verdicts and 'items' not in r.to_frame()
    with pytest.raises(ValueError, match='GSM8K of a differently'): Report.compare(r, Report([row('a', g=g([1, 1, 1]))]))
    (tmp_path/'x.json').write_text('{}')
    with pytest.raises(ValueError, match='is not a report'): Report.load(tmp_path/'x.json')

def test_panels_have_one_axis_for_size_and_each_metric():
    import matplotlib
    matplotlib.use('agg')
    r = Report([row(n, g=share_figure('gsm8k', [1, 0], 'q'), k=mean_figure('kl', [.1, .2], 't')) for n in 'abc'])
    assert [a.get_title() for a in r.panels()] == ['true bits', 'KL', 'GSM8K']

def test_interval_of_what_has_none(): assert _interval(dict(x=1.), 'x') == (1., 1.) and _interval(dict(x=1., x_se=1.), 'x') == (-.96, 2.96)

def test_json_has_the_same_keys_for_model_and_baseline():
    a, b = row('a', g=share_figure('gsm8k', [1]*8+[0]*2, 'q')), row('b', g=share_figure('gsm8k', [1]*2+[0]*8, 'q'))
    f = as_figures(Report.compare(Report([a]), Report([b])), 'gsm8k')
    assert {'task', 'metric', 'value', 'low', 'high', 'n', 'baseline', 'p_value'} <= set(f)
    assert set(f['baseline']) <= set(f) and f['baseline']['value'] == .8 and f['value'] == .2 and f['p_value'] == pytest.approx(2/64)
    json.loads(json.dumps(f, allow_nan=False))
    assert as_figures(Report([a]), 'gsm8k')['baseline'] is None and _one_figure('gsm8k', 'gsm8k', a)['p_value'] is None

def test_tasks_that_do_not_exist():
    with pytest.raises(ValueError, match='there are perplexity, kl'): _find_task('mmlu')
    with pytest.raises(ValueError, match='`n` must be at least 1 sample'): run_task('gsm8k', 'demo', n=0)
