"Allocation: what was asked becomes a problem, and is clear about what cannot be had"
import json
import subprocess
import sys
from types import SimpleNamespace

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from optiq.formats import AS_IS, Format
from optiq.knapsack import allocate, pareto, _stability
from optiq.budget import Budget
from optiq.why import _price_ranges
from optiq.kv.layout import cache_bytes
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.units import Unit
from optiq.plan import uniform
from sweeps import KINDS, block_units, brute_force, make_sweep, nominal, property_test, random_sweep, stored

@property_test
@given(st.integers(0, 10**6), st.floats(3, 8), st.randoms())
def test_order_of_units_does_not_matter(seed, target, random):
    sweep = random_sweep(seed)
    other = SimpleNamespace(**vars(sweep))
    other.units = random.sample(sweep.units, len(sweep.units))
    assert allocate(sweep, target_bpw=target) == allocate(other, target_bpw=target)

@property_test
@given(st.integers(0, 10**6), st.floats(3.01, 8))
def test_bytes_and_true_bits(seed, target):
    sweep = random_sweep(seed, 6)
    large = uniform(sweep, 8)
    cap = uniform(sweep, 3).nbytes+int((large.nbytes-uniform(sweep, 3).nbytes)*(target-3)/5)
    plan = allocate(sweep, max_bytes=cap)
    assert plan.nbytes <= cap and plan.nbytes == stored(sweep, plan)
    again = allocate(sweep, true_bpw=8*cap/plan.params)
    assert again == plan and again.true_bpw == 8*plan.nbytes/sweep.header['params']

def test_the_ends_themselves_can_be_had():
    sweep = random_sweep(1)
    for bits in (3, 8):
        flat = uniform(sweep, bits)
        for caps in (dict(target_bpw=bits), dict(true_bpw=flat.true_bpw), dict(max_bytes=flat.nbytes)):
            assert allocate(sweep, **caps) == flat

def test_as_is_is_a_candidate_when_asked_for():
    sweep = random_sweep(3)
    assert AS_IS not in allocate(sweep, target_bpw=7).counts()
    plan = allocate(sweep, target_bpw=9, formats=[4, 8, 'as-is'])
    assert AS_IS in plan.counts() and plan.nominal_bpw <= 9
    assert allocate(sweep, target_bpw=16, formats=[4, 'as-is']).predicted_kl == 0

def test_a_unit_that_no_format_fits_stays_and_counts():
    units = [*block_units(1), Unit('model.odd', 'odd', (64, 100), None, 'float32')]
    sweep = make_sweep(units, [Format(4), Format(8)], lambda u, f: 4.**-f.bits)
    plan = allocate(sweep, target_bpw=7.5)
    assert plan['model.odd'] == AS_IS and plan('model.odd') is False and uniform(sweep, 4)['model.odd'] == AS_IS
    least = uniform(sweep, 4).nominal_bpw
    assert least > 4.2
    with pytest.raises(ValueError, match='below the smallest possible') as e: allocate(sweep, target_bpw=4.2)
    said = float(str(e.value).split('possible, ')[1].split()[0])
    assert least <= said < least+.01 and allocate(sweep, target_bpw=said) == uniform(sweep, 4)

# Protection and ties

@property_test
@given(st.integers(0, 10**6), st.floats(5.8, 8), st.sampled_from(['embed', 'first', 'last', 'v_proj', '*.mlp.*', 'lm_head']))
def test_protection(seed, target, name):
    sweep = random_sweep(seed)
    hit = {'embed': lambda u: u.kind == 'embed', 'lm_head': lambda u: u.kind == 'embed', 'first': lambda u: u.block == 0,
           'last': lambda u: u.block == 1, 'v_proj': lambda u: u.kind == name, '*.mlp.*': lambda u: '.mlp.' in u.path}[name]
    pins = [u.path for u in sweep.units if hit(u)]
    least = nominal(sweep, {u.path: Format(8 if u.path in pins else 3) for u in sweep.units})
    if least > target:
        with pytest.raises(ValueError, match='too small for protect.*smallest at which') as e:
            allocate(sweep, target_bpw=target, protect=name)
        said = float(str(e.value).split()[-2])
        assert said-.01 <= least <= said
        target = said
    plan, free = allocate(sweep, target_bpw=target, protect=name), allocate(sweep, target_bpw=target)
    assert plan.nominal_bpw <= target+1e-9 and all(plan[p] == Format(8) for p in pins)
    assert plan.solver['wishes_cost'] == pytest.approx(plan.predicted_kl-free.predicted_kl, abs=1e-12)
    assert plan.solver['wishes_cost'] >= -1e-12

def test_an_untied_head_is_the_head():
    units = [*block_units(1), Unit('lm_head', 'lm_head', (512, 128), None)]
    sweep = make_sweep(units, [Format(4), Format(8)], lambda u, f: 4.**-f.bits*(u.kind != 'lm_head')+1e-9)
    plan = allocate(sweep, target_bpw=6.5, protect=('lm_head',))
    assert plan.solver['wishes'][0]['units'] == ['lm_head'] and plan['lm_head'] == Format(8)

@property_test
@given(st.integers(0, 10**6), st.floats(3, 8), st.sampled_from(['qkv', 'kv', 'gate_up', ('qkv', 'gate_up'), 'function']))
def test_ties(seed, target, tie):
    sweep = random_sweep(seed)
    plan = allocate(sweep, target_bpw=target, tie=(lambda u: u.block) if tie == 'function' else tie)
    kinds = dict(qkv=KINDS[:3], kv=KINDS[1:3], gate_up=KINDS[3:5], function=KINDS)
    for t in [tie] if isinstance(tie, str) else tie:
        for block in (0, 1): assert len({plan[u.path] for u in sweep.units if u.block == block and u.kind in kinds[t]}) == 1
    assert plan.nominal_bpw <= target+1e-9
    assert plan.predicted_kl >= allocate(sweep, target_bpw=target).predicted_kl*(1-1e-9)

def test_twins_share_a_format():
    "Two units that a loader fills from one array; the wide one would be worth its bytes for one of them alone"
    sweep = random_sweep(5, 5)
    first, last = sweep.units[0], sweep.units[-1]
    sweep.units[-1] = replace(last, twin=first.path, shape=first.shape)
    loss = {first.path: 1e-6, last.path: 1.}
    sweep.values = {(p, f): loss.get(p, 1e-3)*x/x*4.**(3-f.bits) for (p, f), x in sweep.values.items()}
    for target in (3.5, 4.5, 6):
        plan = allocate(sweep, target_bpw=target)
        assert plan[first.path] == plan[last.path]

def test_ties_are_optimal_too():
    sweep = random_sweep(5, 5)
    q, k = [u.path for u in sweep.units][:2]
    plan = allocate(sweep, target_bpw=4.7, tie=lambda u: 'pair' if u.path in (q, k) else None)
    best = brute_force(sweep, lambda c: nominal(sweep, c) <= 4.7, same=lambda c: c[q] == c[k])
    assert plan.predicted_kl == pytest.approx(best, rel=1e-8)

# Errors

@pytest.mark.parametrize('options, said', [
    (dict(target_bpw=2.5), r'target_bpw 2\.5 is below the smallest possible, 3\.00 bits; the largest is 8\.00'),
    (dict(target_bpw=8.5), r'above the largest possible, 8\.00 bits; the smallest is 3\.00'),
    (dict(true_bpw=20), 'true_bpw 20 is above'), (dict(max_bytes=10), r'max_bytes 10 is below .* bytes \('),
    (dict(max_bytes=10**9), 'max_bytes 1,000,000,000 is above'), (dict(target_bpw=9, max_bytes=60_000), 'target_bpw 9 is above'),
    (dict(), 'no cap'), (dict(max_ms=1), 'costs_ms'), (dict(max_memory=10**6), 'cache_bytes'),
    (dict(max_memory=10**5, cache=10**5), 'max_memory 100,000 is below the smallest possible, .* bytes'),
    (dict(target_bpw=float('nan')), '`target_bpw` is nan, and should be a number above 0'),
    (dict(target_bpw=4, formats=[]), 'no candidate formats'), (dict(target_bpw=4, formats=[5]), '5g64 was not measured'),
    (dict(target_bpw=4, protect='nothing'), "'nothing' matches no unit"), (dict(target_bpw=4, tie='vk'), "no tie 'vk'"),
    (dict(target_bpw=4, method='best'), "no method 'best'"),
    (dict(target_bpw=5, true_bpw=6, method='greedy'), 'takes one cap')])
def test_what_cannot_be_had_is_said_in_one_line(options, said):
    with pytest.raises(ValueError, match=said) as e: allocate(random_sweep(0), **options)
    assert '\n' not in str(e.value)

def test_ties_without_a_common_format():
    units = [Unit('a.k_proj', 'k_proj', (8, 64), 0), Unit('a.v_proj', 'v_proj', (8, 100), 0)]
    with pytest.raises(ValueError, match='no format fits them all'):
        allocate(make_sweep(units, [Format(4)], lambda u, f: .1), target_bpw=9, tie='kv')

# Why, the frontier, stability

@property_test
@given(st.lists(st.floats(.001, 1), min_size=2, max_size=6, unique=True))
def test_price_ranges_are_what_a_unit_buys(kl):
    kl, cost = np.array(sorted(kl, reverse=True)), np.arange(len(kl))*3.+2
    ranges = _price_ranges(kl, cost)
    for price in np.geomspace(1e-6, 1, 50)*1.0123:
        j = (kl+price*cost).argmin()
        assert ranges[j, 0]*(1-1e-9) <= price <= ranges[j, 1]*(1+1e-9)

def test_why():
    sweep = random_sweep(4, n=8)
    plan = allocate(sweep, target_bpw=5)
    path = next(p for p, f in plan.items() if f == Format(6))
    why = plan.why(path, sweep)
    chosen = next(r for r in why.rows if r['format'] == plan[path])
    assert why.price == pytest.approx(plan.solver['prices']['target_bpw'], rel=1e-6) and path in repr(why) and '◀' in repr(why)
    assert [r['bytes'] for r in why.rows] == [next(u for u in sweep.units if u.path == path).nbytes(f) for f in sweep.formats]
    for r in why.rows: # at a target inside its range, the unit gets that format
        if r['bits'] and r['bits'][1]-r['bits'][0] > .5:
            assert allocate(sweep, target_bpw=sum(r['bits'])/2)[path] == r['format']
    assert chosen['bits'][0]-.3 <= 5 <= chosen['bits'][1]+.3
    with pytest.raises(ValueError, match='is not a unit'): plan.why('nowhere', sweep)

def test_why_of_protected_tied_and_uniform():
    sweep = random_sweep(4)
    plan = allocate(sweep, target_bpw=6, protect='embed', tie='qkv')
    assert '(protect embed)' in repr(plan.why('model.embed_tokens', sweep))
    assert 'q_proj + ' in repr(plan.why('model.layers.0.self_attn.k_proj', sweep)) or '(tied)' in repr(
        plan.why('model.layers.0.self_attn.k_proj', sweep))
    assert 'true bits' in repr(uniform(sweep, 4).why('model.embed_tokens', sweep))
    assert 'never' not in repr(allocate(sweep, max_bytes=uniform(sweep, 4).nbytes).why(sweep.units[0], sweep)).split('\n')[0]
    odd = uniform(sweep, 5)
    with pytest.raises(ValueError, match='5g64 was not measured'): odd.why('model.embed_tokens', sweep)

def test_pareto():
    sweep = random_sweep(6)
    curve = pareto(sweep, (3, 3.5, 4, 6, 8), ('compact', 'quality', 'all'))
    names = [p['name'] for p in curve.points()]
    assert names[:11] == ['compact 3', 'compact 3.5', 'compact 4', 'quality 4', 'quality 6', 'quality 8',
                          'all 3', 'all 3.5', 'all 4', 'all 6', 'all 8'] and len(set(names)) == len(names)
    assert {f'uniform {f}' for f in sweep.formats} | {'mixed_2_6', 'mixed_3_4'} <= set(names)
    assert {f.bits for p in curve[:3] for f in p.values()} == {3, 4}
    assert all(p['target'] is None or p['nominal_bpw'] <= p['target']+1e-9 for p in curve.points())
    for p in curve.points(): assert {'name', 'target', 'nominal_bpw', 'true_bpw', 'size_mb', 'predicted_kl', 'kl', 'kl_se'} <= set(p)
    assert all(p['kl'] is None for p in curve.points()) and curve.versus() == []
    json.dumps(curve.points(), allow_nan=False)
    assert '<table' in curve._repr_html_() and repr(curve).count('\n') == len(names)
    curve.plot()
    flats = {p.name: p for p in curve.baselines}
    assert set(flats)-set(curve.rivals) == {'mixed_2_6'} # it is smaller than anything that was measured
    for name, plan in curve.rivals.items():
        assert plan.nbytes <= flats[name].nbytes
        assert not plan.predicted_kl > flats[name].predicted_kl*(1+1e-9)

def test_what_was_measured_is_compared_sequence_by_sequence():
    curve = pareto(random_sweep(6), (4,))
    rng, flat = np.random.default_rng(0), 'uniform 4g64'
    hard = rng.uniform(1, 9, 16) # sequences differ far more than plans do
    curve.scores = {flat: hard, f'all at {flat}': hard-rng.uniform(.1, .2, 16)}
    found, = curve.versus()
    assert found['verdict'] == 'lower' and found['difference'] == pytest.approx(-.15, abs=.02) and found['difference_se'] < .01
    curve.scores[f'all at {flat}'] = hard+np.tile([.1, -.1], 8)
    assert curve.versus()[0]['verdict'] == 'no difference shown' and 'no difference shown' in repr(curve)
    measured = [p for p in curve.points() if p['kl'] is not None]
    assert len(measured) == 2 and measured[1]['kl_se'] == pytest.approx(hard.std(ddof=1)/4)
    curve.plot()

def test_profiles():
    sweep = random_sweep(6, bits=(3, 8))
    with pytest.raises(ValueError, match='4g64 was not measured; the sweep has 3g64, 8g64'): pareto(sweep, (3,), ['compact'])
    with pytest.raises(ValueError, match="no profile 'small'; there are compact, quality, all"): pareto(sweep, (3,), ['small'])
    with pytest.raises(ValueError, match='below the smallest possible, 3.00 bits; the largest is 16.00'): pareto(sweep, (2,))
    with pytest.raises(ValueError, match=r'the target 17 does not lie in the range of all \(0 to 16 bits\)'): pareto(sweep, (17,))

def test_stability():
    sweep = random_sweep(7, n=6)
    a, b = _stability(sweep, 40, target_bpw=4.5), _stability(sweep, 40, target_bpw=4.5)
    assert a == b and a.keys() == a.plan.keys() and all(0 <= s <= 1 for s in a.values())
    sure = SimpleNamespace(**vars(sweep))
    sure.values = {k: np.full(6, v.mean()) for k, v in sweep.values.items()}
    assert set(_stability(sure, 20, target_bpw=4.5).values()) == {1.}
    cap = uniform(sweep, 4).nbytes
    assert _stability(sweep, 5, target_bpw=6, max_bytes=cap, tie='kv', method='exact').plan.nbytes <= cap
    with pytest.raises(ValueError, match='one calibration sequence'): _stability(random_sweep(7, n=1), target_bpw=4.5)

def test_further_budgets():
    sweep = random_sweep(8)
    wide = Budget('wide units', lambda u, f: f.bits == 8, 2)
    plan = allocate(sweep, target_bpw=6.5, budgets=(wide,))
    assert plan.counts().get(Format(8), 0) <= 2 and plan.solver['caps'] == {'target_bpw': 6.5, 'wide units': 2}

# The KV cache

@pytest.mark.parametrize('architecture, context', [('llama', 300), ('qwen3', 256), ('gemma3', 70), ('qwen3_5', 300)])
def test_cache_bytes_are_those_of_mlx_lm(tmp_path, architecture, context):
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    checkpoint = Checkpoint(tiny(architecture, tmp_path), model_type='llm')
    model = checkpoint.load()
    cache, tokens = make_prompt_cache(model), mx.arange(context)[None] % checkpoint.vocabulary
    for t in range(context): mx.eval(model(tokens[:, t:t+1], cache=cache), [c.state for c in cache])
    assert cache_bytes(checkpoint, context) == sum(c.nbytes for c in cache) > 0
    with pytest.raises(ValueError, match='context must be at least 1 token, not 0'): cache_bytes(checkpoint, 0)

def test_memory_is_weights_and_cache():
    sweep = random_sweep(2)
    cap = uniform(sweep, 4).nbytes
    plans = [allocate(sweep, max_memory=cap+50_000, cache=c) for c in (10_000, 50_000, 60_000)]
    assert plans[1] == allocate(sweep, max_bytes=cap) and all(p.nbytes+c <= cap+50_000 for p, c in zip(plans, (10_000, 50_000, 60_000)))
    assert plans[0].predicted_kl < plans[1].predicted_kl < plans[2].predicted_kl

def test_only_the_guilty_caps_are_named():
    sweep = random_sweep(2)
    ms = lambda u, f: (20-f.bits)*u.params # the fewer bits, the slower
    fast = sum(ms(u, Format(8)) for u in sweep.units)
    with pytest.raises(ValueError, match='^contradictory caps: max_bytes .* and max_ms .* can each be met, but not together$'):
        allocate(sweep, target_bpw=7.9, max_bytes=uniform(sweep, 4).nbytes, max_ms=fast*1.01, costs_ms=ms)

def test_the_cost_of_protection_is_printed():
    plan = allocate(random_sweep(0), target_bpw=7, protect='embed')
    assert f'your wishes for 1 of them cost {plan.solver["wishes_cost"]:.2g}' in repr(plan)

def test_imports_nothing_heavy():
    code = ("import sys, optiq.knapsack; print([m for m in ('torch', 'matplotlib', 'pandas', 'transformers', 'mlx_lm', "
            "'scipy.optimize') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
