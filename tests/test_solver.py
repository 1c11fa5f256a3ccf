"The solver: optimal, within its caps, and quick"
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st

from optiq.formats import Format
from optiq.knapsack import allocate
from optiq.budget import budgets_of, make_problem
from optiq.units import Unit
from optiq.plan import smoothed, uniform
from optiq.solver import solve_exact, solve_greedy, solve_lagrange
from sweeps import KINDS, brute_force, make_sweep, nominal, property_test, random_sweep, stored

@property_test
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(3, 8))
def test_no_choice_is_better(seed, n_units, target):
    sweep = random_sweep(seed, n_units)
    plan = allocate(sweep, target_bpw=target)
    best = brute_force(sweep, lambda c: nominal(sweep, c) <= target+1e-12)
    assert plan.predicted_kl == pytest.approx(best, rel=1e-8)
    assert plan.nominal_bpw <= target+1e-9
    assert plan.bound <= plan.predicted_kl*(1+1e-9) and 0 <= plan.gap < 1e-6

@property_test
@given(st.integers(0, 10**6), st.floats(.05, 1), st.floats(.05, 1))
def test_two_caps_at_once(seed, a, b):
    sweep = random_sweep(seed, 4)
    rng = np.random.default_rng(seed)
    ms = {(u.path, f): rng.uniform(.5, 1)*f.bits*u.params/1e5 for u in sweep.units for f in sweep.formats}
    least = sum(min(ms[u.path, f] for f in sweep.formats) for u in sweep.units)
    most = sum(max(ms[u.path, f] for f in sweep.formats) for u in sweep.units)
    small, large = uniform(sweep, 3).nbytes, uniform(sweep, 8).nbytes
    caps = dict(max_bytes=int(small+a*(large-small)), max_ms=least+b*(most-least))
    def fits(c):
        return stored(sweep, c) <= caps['max_bytes'] and sum(ms[x] for x in c.items()) <= caps['max_ms']*(1+1e-12)
    best = brute_force(sweep, fits)
    if not np.isfinite(best):
        with pytest.raises(ValueError, match='contradictory caps: max_bytes .* and max_ms'):
            allocate(sweep, **caps, costs_ms=lambda u, f: ms[u.path, f])
        return
    plan = allocate(sweep, **caps, costs_ms=lambda u, f: ms[u.path, f])
    assert fits(plan) and plan.predicted_kl == pytest.approx(best, rel=1e-6)

@property_test
@given(st.integers(0, 10**6), st.floats(3, 8), st.sampled_from(['exact', 'lagrange', 'greedy']))
def test_nothing_that_helps_still_fits(seed, target, method):
    sweep = random_sweep(seed)
    plan, table = allocate(sweep, target_bpw=target, method=method), smoothed(sweep)[0]
    assert plan.nominal_bpw <= target+1e-9
    assert plan.bound <= plan.predicted_kl*(1+1e-9)
    for u in sweep.units:
        for f in sweep.formats:
            better = table[u.path, f].mean() < table[u.path, plan[u.path]].mean()
            assert not better or nominal(sweep, {**plan, u.path: f}) > target

@property_test
@given(st.integers(0, 10**6), st.lists(st.floats(3, 8), min_size=2, max_size=5))
def test_more_room_is_never_worse(seed, targets):
    sweep = random_sweep(seed)
    kls = [allocate(sweep, target_bpw=t).predicted_kl for t in sorted(targets)]
    assert all(b <= a*(1+1e-8) for a, b in zip(kls, kls[1:]))

@pytest.mark.parametrize('seed', range(10))
def test_greedy_is_close_on_convex_tables(seed):
    rng = np.random.default_rng(seed)
    units = [Unit(f'model.layers.{i}.mlp.{k}', k, (512, 512), i) for i in range(20) for k in KINDS]
    scale = {u.path: np.exp(rng.normal(-6, 1)) for u in units}
    sweep = make_sweep(units, [Format(b, 64) for b in (2, 3, 4, 5, 6, 8)], lambda u, f: scale[u.path]*4.**-f.bits)
    for target in (2.5, 3.7, 4.51, 5.3, 7.02):
        exact, greedy = (allocate(sweep, target_bpw=target, method=m).predicted_kl for m in ('exact', 'greedy'))
        assert exact <= greedy*(1+1e-9) and greedy <= exact*1.01

def test_three_caps():
    sweep = random_sweep(9, 4)
    ms = lambda u, f: (20-f.bits)*u.params/1e5
    caps = dict(target_bpw=6.5, max_bytes=int(uniform(sweep, 6).nbytes*.97), max_ms=sum(ms(u, Format(6)) for u in sweep.units)*1.1)
    def fits(c):
        return (nominal(sweep, c) <= 6.5 and stored(sweep, c) <= caps['max_bytes'] and sum(ms(u, c[u.path]) for u in sweep.units) <=
                caps['max_ms'])
    plan = allocate(sweep, **caps, costs_ms=ms)
    assert fits(plan) and plan.predicted_kl == pytest.approx(brute_force(sweep, fits), rel=1e-8)

@property_test
@given(st.integers(0, 10**6), st.floats(3, 7.9))
def test_what_is_left_over_buys_no_upgrade(seed, target):
    sweep = random_sweep(seed)
    plan, table, n = allocate(sweep, target_bpw=target), smoothed(sweep)[0], sum(u.params for u in sweep.units)
    left = target*n-sum(u.bits(plan[u.path])*u.params for u in sweep.units)
    upgrades = [(f.bits-plan[u.path].bits)*u.params for u in sweep.units for f in sweep.formats
                if table[u.path, f].mean() < table[u.path, plan[u.path]].mean()]
    assert left < min(upgrades, default=np.inf)

def test_three_hundred_units(capfd):
    rng = np.random.default_rng(0)
    units = [Unit(f'model.layers.{i}.mlp.{k}', k, (int(rng.integers(100, 9000))*8, 1024), i) for i in range(50) for k in KINDS]
    sweep = make_sweep(units, [Format(b, 64) for b in (2, 3, 4, 5, 6, 8)],
                       lambda u, f: np.exp(rng.normal(-7, 1))*4.**-f.bits)
    table = smoothed(sweep)[0]
    best = {}
    for target in (3.3, 4.5, 5.7):
        p = make_problem(sweep, table, sweep.formats, budgets_of(sweep, target_bpw=target))
        for f, far in ((solve_lagrange, .02), (solve_exact, 1e-8), (solve_greedy, 1)):
            start = time.process_time()
            pick, bound, _ = f(p)
            best.setdefault(f, []).append(time.process_time()-start)
            assert p.fits(pick) and bound <= p.kl_of(pick)*(1+1e-9) and p.kl_of(pick) <= bound*(1+far)
    assert min(best[solve_lagrange]) < .02 and min(best[solve_exact]) < 1
    assert capfd.readouterr().out == ''
