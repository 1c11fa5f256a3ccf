"Whole plans, measured: the best is kept, and what the curve says was measured"
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from click.testing import CliRunner

from optiq.backends.mlx import MLXBackend
from optiq.backends.torch import TorchBackend
from optiq.calibration import passages, token_batch
from optiq.cli import main
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.formats import AS_IS, Format, parse_format
from optiq.knapsack import allocate, pose
from optiq.plan import Plan, recipe, uniform
from optiq.models import Checkpoint
from optiq.pipeline import optimize, trade_off
from optiq.job import _find_sweep
from optiq.request import Caps, Texts, Weights, _narrowed
from optiq.measure.kl import measure, probes
from optiq.measure.sweep import Sweep
from optiq.sensitivity import kl_sweep
from optiq.material.tiny import tiny
from optiq.refine import _around, _joint_kl, _solve_again, verified, _within

@pytest.fixture(scope='module')
def b(): return TorchBackend(Checkpoint('demo'))

@pytest.fixture(scope='module')
def tokens(b): return token_batch(passages('bundled'), b.checkpoint.tokenizer, 3, 48)

@pytest.fixture(scope='module')
def sweep(b, tokens): return kl_sweep(b, tokens, [2, 3, 4, 8], progress=False, rounding='minmax')

def mean(v, name): return v.kl[name].mean()

# Around a plan

@pytest.mark.parametrize('architecture, Backend', [('qwen3', TorchBackend), ('qwen3', MLXBackend), ('llama', TorchBackend)])
def test_replay_around_a_plan_is_the_plan_with_one_change(tmp_path, architecture, Backend):
    b = Backend(Checkpoint(tiny(architecture, tmp_path, dict(tie_word_embeddings=architecture == 'qwen3'))))
    batch = np.random.default_rng(0).integers(0, b.checkpoint.vocabulary, (2, 12)).astype(np.int32)
    base = uniform(b.checkpoint, 4)
    todo = probes(b.checkpoint.units, [Format(2), Format(8), AS_IS])
    todo = [p for p in todo if p[0].block in (None, 1)]
    got = measure(b, batch, todo, base=overrides_of(base))
    variants = {str(p): overrides_of(base.formats | {p[0].path: p[1]}) for p in todo}
    want = evaluate(b, batch, variants)
    np.testing.assert_allclose(got, [want[str(p)].kl for p in todo], rtol=2e-3, atol=1e-7)

def test_around_agrees_with_whole_plans(b, tokens, sweep):
    plan = allocate(sweep, target_bpw=3.5)
    paths = {u.path for u in plan.units[:1]+plan.units[20:22]}
    values = _around(b, tokens, plan, paths, {p: sweep.formats for p in paths})
    assert len(values) == 3*4 and all(v.shape == (3,) for v in values.values())
    whole = _joint_kl(b, tokens, {(path, f): replace(plan, formats=plan.formats | {path: f}) for path, f in values})
    for key, v in values.items(): np.testing.assert_allclose(v, whole[key], rtol=1e-3)

def test_equal_plans_are_measured_once(b, tokens, sweep, monkeypatch):
    import optiq.refine as module
    seen = []
    monkeypatch.setattr(module, 'evaluate', lambda b, t, variants, **k: (seen.append(list(variants)), evaluate(b, t, variants, **k))[1])
    kl = _joint_kl(b, tokens, {'a': uniform(sweep, 4), 'b': uniform(b.checkpoint, 4), 'c': uniform(sweep, 3)})
    assert seen == [['a', 'c']] and (kl['a'] == kl['b']).all() and kl['c'].mean() > kl['a'].mean()

# Verified

@pytest.mark.parametrize('options', [dict(target_bpw=2.7), dict(target_bpw=4.5, formats=[4, 8]),
    dict(max_bytes=5_000_000, protect='embed', tie='qkv'), dict(true_bpw=5, target_bpw=4.4, tie='gate_up')])
def test_what_is_kept_keeps_its_caps_and_is_best(b, tokens, sweep, options):
    v = verified(b, tokens, sweep, n=3, progress=False, **options)
    assert v.plan == v.tried[v.kept] and all(mean(v, v.kept) <= mean(v, name) for name in v.tried)
    q = pose(sweep, **options)
    assert all(q.admits(p) for p in v.tried.values())
    assert len({tuple(p.items()) for n, p in v.tried.items() if n not in v.baselines}) == len(v.tried)-len(v.baselines)
    np.testing.assert_allclose(v.kl[v.kept], evaluate(b, tokens, {'x': overrides_of(v.plan)})['x'].kl, rtol=1e-5)
    record = v.plan.solver['verified']
    assert record['joint_kl'] == pytest.approx(mean(v, v.kept)) and record['kept'] == v.kept and set(record['tried']) == set(v.tried)
    assert f'measured {record["joint_kl"]:.4g}' in repr(v.plan) and v.kept in repr(v) and '<table' in v._repr_html_()

def test_plans_survive_their_file(b, tokens, sweep, tmp_path):
    plan = verified(b, tokens, sweep, n=1, progress=False, target_bpw=4.5).plan
    plan.save(tmp_path/'p.json')
    assert Plan.load(tmp_path/'p.json').solver == plan.solver

def test_baselines_are_those_that_fit(sweep):
    q = pose(sweep, target_bpw=4.5, formats=[4, 8])
    found = _within(q, q.solve())
    assert {'uniform 4g32', 'uniform nvfp4'} <= set(found) and not {'uniform 4g64', 'uniform 8g64', 'uniform 3g32'} & set(found)
    assert 'mixed_4_6' in found and recipe(sweep, 'mixed_4_6') == found['mixed_4_6']
    tied = pose(sweep, target_bpw=4.5, formats=[4, 8], tie='qkv') # the recipes give v_proj more than q_proj
    assert {n for n in _within(tied, tied.solve())} == {n for n in found if n.startswith('uniform')}
    safe = pose(sweep, target_bpw=5, formats=[4, 8], protect='embed')
    assert _within(safe, safe.solve()) == {} # none of them protects

def upside_down(sweep): # has everything so
    wrong = Sweep(sweep.units, sweep.formats, {k: v.copy() for k, v in sweep.values.items()}, sweep.header)
    for u in wrong.units:
        for f in wrong.formats: wrong.values[u.path, f] = 1e-6*4.**-f.bits/np.maximum(sweep.values[u.path, f], 1e-9)
    return wrong

def test_a_baseline_that_wins_is_kept_and_named(b, tokens, sweep):
    wrong = upside_down(sweep)
    v = verified(b, tokens, wrong, n=0, rounds=0, progress=False, target_bpw=4.5, formats=[4, 8])
    assert v.kept in v.baselines and f'{v.kept} measured better than every plan that was allocated' in repr(v)
    assert v.plan == v.tried[v.kept] and v.plan.solver['method'] == 'baseline' and v.plan.solver['caps'] == {'target_bpw': 4.5}

@pytest.mark.parametrize('only, baseline', [(None, True), ([4, 8], False), (['4g32', '8g64'], True)])
def test_what_is_kept_is_made_of_the_candidates_that_were_named(b, tokens, sweep, only, baseline):
    wrong = upside_down(sweep)
    v = verified(b, tokens, wrong, n=0, rounds=0, progress=False, target_bpw=4.5, formats=[4, 8], only=only)
    assert (v.kept in v.baselines) == baseline and {*v.baselines} < {*v.tried} and all(n in repr(v) for n in v.baselines)
    if only: assert {*v.plan.values()} <= {*map(parse_format, only)}
    assert ('measured better, but not all its formats are candidates' in repr(v)) == bool(only)

@pytest.mark.parametrize('words, named', [
    ([], None), (['--candidate-bits', '4,8'], ['4g64', '8g64']), (['--group-size', '32'], ['4g32', '8g32']),
    (['--formats', 'mxfp4'], ['mxfp4'])])
def test_the_command_knows_whether_candidates_were_named(monkeypatch, words, named):
    from optiq import pipeline
    seen = []
    monkeypatch.setattr(pipeline, 'optimize', lambda *args, weights, **more: seen.append(weights))
    CliRunner().invoke(main, ['convert', 'demo', '--dry-run', *words])
    assert (seen[0].formats and [str(f) for f in seen[0].formats]) == named

def test_measured_again_where_the_sum_is_off(b, tokens, sweep):
    v = verified(b, tokens, sweep, n=4, progress=False, target_bpw=2.3, formats=[2, 3, 4])
    first = v.rounds[0]
    assert abs(first['joint']-first['forecast']) > .15*first['forecast'] and first['units'] > 0
    assert 'solved again 1' in v.tried or len(v.rounds) == 1
    still = verified(b, tokens, sweep, n=4, progress=False, target_bpw=2.3, formats=[2, 3, 4], tolerance=9)
    assert len(still.rounds) == 1 and still.rounds[0]['units'] == 0 and mean(v, v.kept) <= mean(still, still.kept)

def test_solve_again_changes_only_what_was_measured_and_takes_what_is_better(sweep):
    q = pose(sweep, target_bpw=4, formats=[3, 4, 8])
    plan = q.solve()
    a, z = [u for u in sweep.units if u.kind == 'q_proj'][:2]
    values = {(u.path, f): np.full(3, 1+x) for u, xs in ((a, (.3, .2, 0)), (z, (.5, .4, .39)))
              for f, x in zip([Format(3), Format(4), Format(8)], xs)}
    for u in (a, z): # forecasts are joint KLs: both tables agree on the plan itself
        values = {k: v-values[u.path, plan[u.path]]+1 if k[0] == u.path else v for k, v in values.items()}
    new, forecast = _solve_again(q, plan, values)
    assert set(new.diff(plan)) <= {a.path, z.path} and new.nominal_bpw <= 4 and forecast <= 1+1e-12
    assert forecast == pytest.approx(1+sum(values[u.path, new[u.path]].mean()-1 for u in (a, z)))

def test_another_models_sweep_is_refused(b, sweep, tokens, tmp_path):
    other = Checkpoint(tiny('llama', tmp_path))
    with pytest.raises(ValueError, match='the sweep is of another model'):
        verified(TorchBackend(other), tokens, sweep, target_bpw=4, progress=False)
    sweep.save(tmp_path/'s.json')
    with pytest.raises(ValueError, match='was measured on another model'):
        _find_sweep(TorchBackend(other), tokens, [Format(4)], tmp_path/'s.json', None)
    tuned = Sweep(sweep.units, sweep.formats, sweep.values, sweep.header | dict(fingerprint=dict(model='a fine-tune')))
    with pytest.raises(ValueError, match='was measured on something else: model'): _find_sweep(b, tokens, [Format(4)], tuned, None)
    with pytest.raises(ValueError, match='has no 6g64; it has 2g64, 3g64'):
        _find_sweep(b, tokens, [Format(6), AS_IS], tmp_path/'s.json', None)

# The road and the curve

def test_the_road_verifies_by_default(b, sweep, tmp_path):
    options = dict(texts=Texts(n_calibration=2, seq_len=32, n_evaluation=2, eval_len=32), backend='torch')
    sweep.save(tmp_path/'s.json')
    a, z = (optimize('demo', weights=Weights([4, 8], sweep=tmp_path/'s.json', verify=v), **options) for v in (None, False))
    f = a['figures']
    assert f['verified']['kept'] in {r['name'] for r in f['verified']['tried']} and z['figures']['verified'] is None
    assert f['calibration_kl'] <= z['figures']['calibration_kl']*(1+1e-6)
    assert f['calibration_kl'] == pytest.approx(a['verified'].kl[a['verified'].kept].mean())
    assert {Format(4), Format(8)} >= set(z['plan'].values()) # of the sweep's four formats, those that were asked for
    json.dumps(f, allow_nan=False)

def made_up(c, formats):
    r = np.random.default_rng(0)
    values = {(u.path, f): np.exp(-f.bits+.1*r.standard_normal(2)) for u in c.units for f in formats}
    header = dict(optiq='sweep', model=c.name, params=c.params, other_bytes=c.other_bytes, units=[asdict(u) for u in c.units],
                  fingerprint=dict(model=c.fingerprint, tokens='made up', quantizer='minmax', backend='torch', device='cpu',
                                   formats=[str(f) for f in formats]))
    return Sweep(c.units, formats, values, header)

def test_candidates_are_what_the_sweep_holds_unless_named(tmp_path):
    c = Checkpoint(tiny('llama', tmp_path/'m', dict(num_hidden_layers=1)))
    name, sweep = str(c.folder), made_up(c, [Format(b) for b in (2, 3, 4, 8)])
    narrow = _narrowed(sweep, [4, 8])
    narrow.save(tmp_path/'s.json')
    options = dict(caps=Caps(target_bpw=2.5), texts=Texts('no such text')) # which is found out later
    with pytest.raises(FileNotFoundError, match='no such text'): optimize(name, weights=Weights(sweep=sweep), **options)
    for wrong in (Weights(sweep=tmp_path/'s.json'), Weights([4, 8], sweep=sweep)):
        with pytest.raises(ValueError, match='below the smallest possible'): optimize(name, weights=wrong, **options)
    with pytest.raises(ValueError, match='dwq trains a model that is written'): optimize(name, weights=Weights(polish='dwq'))
    for source, low in ((narrow, 4), (sweep, 3)):
        curve = trade_off(name, weights=Weights(sweep=source))['frontier']
        assert min(p.solver['caps']['target_bpw'] for p in curve) == low and curve.curves().keys() >= {'quality', 'all'}
    curve = trade_off(name, (3, 4), weights=Weights([3, 4], sweep=sweep))['frontier']
    assert curve.curves().keys() == {'compact', 'all'} and not {Format(2), Format(8)} & {f for p in curve for f in p.values()}
    with pytest.raises(ValueError, match='6g64 was not measured'): trade_off(name, weights=Weights([6], sweep=sweep))
    with pytest.raises(ValueError, match='below the smallest possible'): trade_off(name, (3,), weights=Weights(sweep=narrow))

def test_the_command_takes_what_the_sweep_holds(tmp_path):
    c = Checkpoint(tiny('llama', tmp_path/'m', dict(num_hidden_layers=1)))
    made_up(c, [Format(3), Format(6)]).save(tmp_path/'s.json')
    def optiq(*words): return CliRunner().invoke(main, list(map(str, words)))
    r = optiq('pareto', tmp_path/'s.json', '--json')
    assert r.exit_code == 0 and json.loads(r.output)['points'][0]['nominal_bpw'] == 3
    for words, says in ((['--bits', '3,4'], '4g64 was not measured'), (['--targets', 2], 'below the smallest possible, 3.00 bits')):
        r = optiq('pareto', tmp_path/'s.json', *words)
        assert r.exit_code == 1 and says in r.output
    r = optiq('convert', c.folder, '--sweep', tmp_path/'s.json', '--target-bpw', 2, '--dry-run')
    assert r.exit_code == 1 and 'below the smallest possible, 3.00 bits' in r.output

def test_protection_ties_and_memory_on_the_road(sweep, tmp_path):
    sweep.save(tmp_path/'s.json')
    options = dict(texts=Texts(n_calibration=2, seq_len=32, n_evaluation=2, eval_len=32), backend='torch')
    plain = Weights([3, 4, 8], sweep=tmp_path/'s.json', compare=False)
    f = optimize('demo', caps=Caps(target_bpw=5.5), weights=replace(plain, protect=('embed',), tie=('qkv',)), **options)
    assert f['plan']['model.embed_tokens'] == Format(8) and f['figures']['wishes_cost'] >= 0
    assert f['figures']['wishes'][0]['units'] == ['model.embed_tokens'] and 'wishes for 1 of them cost' in repr(f['plan'])
    m = optimize('demo', caps=Caps(max_memory=10*2**20, context=512), weights=plain, **options)['plan']
    cache = 10*2*2*128*2*512
    assert m.nbytes+cache <= 10*2**20 < m.nbytes+cache+300_000 and m.solver["caps"] == {"max_memory": 10*2**20}
    with pytest.raises(ValueError, match='max_memory. needs .context'): optimize('demo', caps=Caps(max_memory=10**7))

def test_trade_off(sweep, tmp_path):
    sweep.save(tmp_path/'s.json')
    options = dict(targets=(3, 4, 5, 8), backend='torch')
    found = trade_off(tmp_path/'s.json', **options)
    assert found['figures']['model'] == 'demo' and {p['name'].split()[0] for p in found['figures']['points']} >= {'compact', 'quality', 'all'}
    assert all(p['kl'] is None for p in found['figures']['points'])
    found = trade_off('demo', weights=Weights(sweep=tmp_path/'s.json'), verify=2, out=tmp_path/'curve',
                      texts=Texts(n_calibration=2, seq_len=32, n_evaluation=3, eval_len=32), **options)
    points = {p['name']: p for p in found['figures']['points']}
    assert points['quality 4']['kl'] is not None and points['quality 5']['kl'] is None and points['uniform 4g64']['kl_se'] > 0
    assert points['quality 4']['kl'] == points['uniform 4g64']['kl'] and points['mixed_4_6']['predicted_kl'] is None
    assert {v['baseline'] for v in found['figures']['versus']} >= {'uniform 3g64', 'uniform 4g64', 'uniform 8g64'}
    names = {f.name for f in (tmp_path/'curve').iterdir()}
    assert names == {'.optiq', 'pareto.json', 'pareto.png', 'pareto.svg', 'sweep.json', 'plans'}
    assert json.loads((tmp_path/'curve'/'pareto.json').read_text()) == json.loads(json.dumps(found['figures']))
    with pytest.raises(FileExistsError, match='or `overwrite` it'): trade_off('demo', out=tmp_path/'curve', **options)
    again = trade_off(tmp_path/'curve'/'sweep.json', **options)
    assert again['figures']['points'][0] == found['figures']['points'][0] | dict(kl=None, kl_se=None)
