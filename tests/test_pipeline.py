"The one road: weights, a cache, or both under one budget, and what it refuses before anything is opened"
import numpy as np
import pytest
from click.testing import CliRunner

from optiq import request
from optiq.cli import main
from optiq.files import journal_of
from optiq.formats import Format
from optiq.job import _Job
from optiq.kv.config import read_kv_config
from optiq.material.tiny import tiny
from optiq.measure.sweep import Sweep
from optiq.models import Checkpoint
from optiq.pipeline import optimize, trade_off
from optiq.request import Cache, Caps, Texts, Weights, caps_for, _check_weights, subject, _texts_of
from optiq.plan import Plan

BOTH = 'weights and cache together'

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    file, r = tmp_path_factory.mktemp('text')/'t.txt', np.random.default_rng(3)
    words = 'the river was low that summer so the ferry waited until the evening tide'.split()
    file.write_text('\n'.join(' '.join(r.permutation(words*3))+f' {i}' for i in range(60)))
    return str(file)

@pytest.fixture(scope='module')
def model(tmp_path_factory): return str(tiny('qwen3', tmp_path_factory.mktemp('road')/'m', shape=dict(num_hidden_layers=1), dtype='float32'))

@pytest.fixture(scope='module')
def few(text): return dict(texts=Texts(text, n_calibration=2, seq_len=32, n_evaluation=1), backend='torch')

@pytest.mark.parametrize('what, caps, says', [
    ('weights', Caps(max_memory=9), '`max_memory` needs `context`'), ('weights', Caps(chip='M1'), '`target_tps`'),
    ('weights', Caps(context=9), '`context` counts for'),
    ('a cache', Caps(max_memory=9, context=9), '`max_memory` has no effect on a cache'),
    ('a cache', Caps(target_tps=9), '`target_tps` has no effect'),
    (BOTH, Caps(max_bytes=9, target_bpw=4), '`target_bpw` has no effect beside `cache`'), (BOTH, Caps(), 'needs `max_bytes`'),
    (BOTH, None, 'needs `max_bytes`')])
def test_a_cap_that_does_not_count_is_refused(what, caps, says):
    with pytest.raises(ValueError, match=says): caps_for(caps, what)

def test_defaults():
    def aim(caps, weights=None, cache=None):
        return _Job(Checkpoint('demo'), None, caps_for(caps, subject(weights, cache)), weights, cache, Texts(), 'auto', False).aim()
    assert aim(None, Weights()) == dict(target_bpw=4.5) and aim(None, cache=Cache()) == dict(target_bpw=5)
    assert aim(Caps(context=9), cache=Cache()) == dict(target_bpw=5)
    assert aim(Caps(max_bytes=9), cache=Cache()) == {} == aim(Caps(target_bpw=3), Weights())
    assert caps_for(None, 'weights') == Caps() and caps_for(Caps(context=9), 'a cache') == Caps(context=9)
    assert _texts_of(None, 'weights') == Texts(n_calibration=8, seq_len=128, n_evaluation=16, eval_len=256)
    assert _texts_of(None, BOTH).eval_len == 128
    assert _texts_of(None, 'a cache') == Texts(n_calibration=5, seq_len=512, n_evaluation=4, eval_len=512)

@pytest.mark.parametrize('weights, what, says', [
    (Weights(polish='dwq'), BOTH, '`polish`'), (Weights(verify=True), BOTH, '`verify`'), (Weights(compare=True), BOTH, '`compare`'),
    (Weights(compare=False), BOTH, '`compare`'),
    (Weights(rounding='minmax', rounding_n=4), 'weights', '`rounding_n` has no effect'),
    (Weights(verify=True), 'a curve', '`verify` has no effect on a curve'),
    (Weights(rounding='best'), BOTH, "no rounding 'best'"), (Weights(polish='dwq'), 'weights', 'give an output')])
def test_a_wish_about_weights_that_nobody_fulfils_is_refused(weights, what, says):
    with pytest.raises(ValueError, match=says): _check_weights(weights, what, None)

ALONE = '--rounding minmax --no-verify --skip-baselines --n-evaluation 1'
@pytest.mark.parametrize('command, formats, bits', [
    (f'convert {{}} {ALONE}', '2,3', 2.5), (f'convert {{}} {ALONE}', '6', 6), (f'convert {{}} {ALONE} --leave embed', '4,8', None),
    ('kv-cache {} --n-evaluation 1', 'tq3,4g64', 3.5), ('kv-cache {} --n-evaluation 1', '6,8', 7),
    ('sweep {} -o s.jsonl --rounding minmax --method screened', '2,3', None)])
def test_a_default_target_never_fails(model, text, tmp_path, monkeypatch, command, formats, bits):
    "No number that nobody gave stands in the way: where candidates or wishes do not reach the default, the target lies halfway"
    monkeypatch.chdir(tmp_path)
    few = f'--calibration {text} --seq-len 32 --backend torch --n-calibration 2 --json'
    by = '--formats' if 'g' in formats else '--candidate-bits'
    r = CliRunner().invoke(main, f'{command.format(model)} {by} {formats} {few}'.split())
    assert r.exit_code == 0, r.output
    if command.startswith('sweep'): return
    found, = (tmp_path/'optiq_output').iterdir()
    plan = Plan.load(found/('plan.json' if 'kv' in command else 'optiq/plan.json'))
    assert found.name == ('m-kv' if 'kv' in command else f'm-{plan.solver["caps"]["target_bpw"]:g}bpw')
    assert bits is None or plan.nominal_bpw <= bits == plan.solver['caps']['target_bpw']

@pytest.mark.parametrize('weights', [None, Weights(rounding='minmax')])
def test_a_cap_on_bytes_says_what_the_cache_is_counted_at(model, few, weights):
    with pytest.raises(ValueError, match='below the smallest possible, .*; the cache is counted at 16,384 tokens, which `context` changes'):
        optimize(model, None, Caps(max_bytes=9), weights=weights, cache=Cache(), **few)

def test_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match='nothing to choose'): optimize('demo', weights=None)
    assert [subject(w, c) for w, c in ((Weights(), None), (None, Cache()), (Weights(), Cache()))] == ['weights', 'a cache', BOTH]

def test_both_do_what_each_alone_can(model, few, text, tmp_path):
    "Protection, ties, a sweep that was saved, and rounding by search reach the plan of weights and cache together"
    caps, wish = Caps(max_bytes=430_000, context=256), dict(protect='embed', tie='qkv')
    first = optimize(model, None, caps, cache=Cache(), weights=Weights(rounding_n=4, **wish), **few)
    assert first['weights']['model.embed_tokens'] == Format(8)
    assert first['weights'].rounding == 'search' and first['figures']['bytes'] <= caps.max_bytes
    for b in Checkpoint(model).units: # the three of one attention share a format
        if b.path.endswith('q_proj'): assert len({first['weights'][b.path.replace('q_proj', x)] for x in ('q_proj', 'k_proj', 'v_proj')}) == 1
    first['weight_sweep'].save(tmp_path/'s.json')
    again = optimize(model, tmp_path/'m', caps, cache=Cache(), weights=Weights(sweep=tmp_path/'s.json', rounding_n=4, **wish), **few)
    assert dict(again['weights']) == dict(first['weights']) and dict(again['cache']) == dict(first['cache'])
    assert again['figures']['rows'] == first['figures']['rows'] and not journal_of(tmp_path/'m').exists()
    assert dict(Plan.load(tmp_path/'m'/'optiq'/'plan.json')) == dict(again['weights']) and read_kv_config(tmp_path/'m'/'kv_config.json')
    with pytest.raises(ValueError, match='`sweep` holds 2 sequences, and the cache is to be measured on 3'):
        optimize(model, None, caps, cache=Cache(), weights=Weights(sweep=tmp_path/'s.json'), texts=Texts(text, n_calibration=3, seq_len=32))

def test_what_is_scored_on_may_not_be_calibrated_on(model, text, tmp_path):
    "Of a cache too"
    copy = tmp_path/'copy.txt'
    copy.write_text(open(text).read())
    for options in (dict(weights=None, cache=Cache()), dict(), dict(cache=Cache(), caps=Caps(max_bytes=430_000, context=256))):
        with pytest.raises(ValueError, match='is calibration text'):
            optimize(model, texts=Texts(text, str(copy), n_calibration=20, seq_len=128, n_evaluation=20, eval_len=128), **options)

def test_a_sweep_alone_measures_nothing(tmp_path):
    c = Checkpoint('demo')
    fmts = [Format(4), Format(8)]
    values = {(u.path, f): np.full(2, np.exp(-f.bits)) for u in c.units for f in fmts}
    sweep = Sweep(c.units, fmts, values, dict(model='demo', params=c.params, other_bytes=c.other_bytes,
                                        fingerprint=dict(quantizer='search', model=c.fingerprint)))
    assert trade_off('demo', (4, 8), weights=Weights(sweep=sweep))['frontier']
    for name, options in (('texts', dict(texts=Texts(n_calibration=3))), ('rounding_n', dict(weights=Weights(sweep=sweep, rounding_n=3)))):
        with pytest.raises(ValueError, match=f'`{name}` has no effect: nothing is measured'):
            trade_off('demo', (4, 8), **dict(weights=Weights(sweep=sweep)) | options)
    with pytest.raises(ValueError, match='`polish` has no effect on a curve'): trade_off('demo', weights=Weights(polish='dwq'))
    assert request._load_sweep(sweep) is sweep

def test_a_conversion_says_how_long_it_takes_before_and_after(tmp_path, capsys):
    model = tiny('qwen3', tmp_path/'m')
    found = optimize(str(model), texts=Texts(n_calibration=1, seq_len=32, n_evaluation=1, eval_len=32),
                     weights=Weights([4, 8], verify=False, compare=False, rounding_n=2))
    said = capsys.readouterr().err
    assert said.index(' in all') < said.index('took ') and 'times the' in said and 'announced' in said
    assert found['figures']['expected_seconds'] > 0

@pytest.mark.parametrize('wish', [dict(method='exact', time_budget=60.),
                                  dict(method='exact', sweep='s.json'), dict(time_budget=60., sweep='s.json')])
def test_a_method_without_effect_is_refused(wish, monkeypatch):
    monkeypatch.setattr(request, '_rounding_for', lambda *a: 'search')
    with pytest.raises(ValueError, match='has no effect'): request._check_weights(Weights(**wish), 'weights', None)
