"Wishes: each takes formats away from the units that it names, its price is told, a slip of the pen is found"
import json

import pytest
from click.testing import CliRunner

from optiq.cli import main
from optiq.formats import AS_IS, Format
from optiq.knapsack import allocate, pose
from optiq.material.tiny import tiny
from optiq.pipeline import optimize
from optiq.request import Caps, Texts, Weights
from optiq.plan import Plan, uniform
from optiq.wishes import _pinned, _wishes_for
from sweeps import brute_force, nominal, random_sweep

WISHES = [dict(pin={'v_proj': 8}), dict(pin='embed=3,*.up_proj=4'), dict(ceiling={'*.mlp.*': 4}), dict(floor='first=4'), dict(leave='lm_head'),
          dict(ceiling={'*.mlp.*': 4}, pin={'q_proj': 8}), dict(protect='embed', ceiling={'embed': 4})]

@pytest.mark.parametrize('wish', WISHES)
@pytest.mark.parametrize('seed, target', [(1, 3.4), (2, 4.7), (3, 6.5)])
def test_plans_keep_them_and_the_price_is_the_difference(seed, wish, target):
    sweep = random_sweep(seed)
    try: plan = allocate(sweep, target_bpw=target, **wish)
    except ValueError as e:
        assert 'too small for' in str(e)
        return
    free = allocate(sweep, target_bpw=target)
    assert plan.nominal_bpw <= target+1e-9 and plan.solver['wishes_cost'] == pytest.approx(plan.predicted_kl-free.predicted_kl, abs=1e-12)
    for w in _wishes_for(sweep.units, **wish):
        for p in w.paths:
            f = plan[p]
            assert {'pin': f == w.fmt, 'leave': f == AS_IS, 'ceiling': w.fmt and f.bits and f.bits <= w.fmt.bits,
                    'floor': w.fmt and (f.bits or 16) >= (w.fmt.bits or 16), 'protect': f == Format(4)}[w.kind]

def test_it_is_the_best_of_those_that_keep_them():
    sweep = random_sweep(7, 5)
    path = sweep.units[2].path
    best = brute_force(sweep, lambda c: nominal(sweep, c) <= 5, same=lambda c: c[path].bits <= 4)
    assert allocate(sweep, target_bpw=5, ceiling={path: 4}).predicted_kl == pytest.approx(best)

def test_a_pinned_format_is_no_candidate_of_the_others():
    sweep = random_sweep(3)
    plan = allocate(sweep, target_bpw=6, formats=[4, 8], pin='v_proj=3')
    assert {p for p, f in plan.items() if f == Format(3)} == {u.path for u in sweep.units if u.kind == 'v_proj'}
    assert _pinned('a=3,b=8g32', 128) == [Format(3, 128), Format(8, 32)]

def test_a_plan_below_the_candidates_can_be_had_by_pinning():
    sweep = random_sweep(3)
    plan = allocate(sweep, target_bpw=4, formats=[8], pin={'*': 3})
    assert plan == uniform(sweep, 3) and plan.solver['wishes_cost'] is None and 'wished' not in repr(plan)

def test_each_wish_has_its_own_price(tmp_path):
    sweep = random_sweep(5)
    plan = allocate(sweep, target_bpw=5, pin={'embed': 8}, ceiling={'q_proj': 3})
    a, b = plan.solver['wishes']
    for row, rest in ((a, dict(ceiling={'q_proj': 3})), (b, dict(pin={'embed': 8}))):
        assert row['cost'] == pytest.approx(plan.predicted_kl-allocate(sweep, target_bpw=5, **rest).predicted_kl, abs=1e-12)
    plan.save(tmp_path/'plan.json')
    again = Plan.load(tmp_path/'plan.json')
    assert again == plan and again.solver['wishes'] == [a, b] and '(pin embed=8g64)' in repr(again.why('model.embed_tokens', sweep))

def test_plans_from_elsewhere_are_held_against_them():
    sweep = random_sweep(5)
    q = pose(sweep, target_bpw=5, ceiling={'v_proj': 4})
    assert q.admits(uniform(sweep, 4)) and q.admits(allocate(sweep, target_bpw=4.5, ceiling={'v_proj': 4}))
    assert not pose(sweep, target_bpw=5, pin={'v_proj': 8}).admits(uniform(sweep, 4))

@pytest.mark.parametrize('wish, said', [
    (dict(pin={'*.v_porj': 4}), r"`pin` '\*\.v_porj' matches no unit; near to it are .*v_proj"),
    (dict(leave='lm_haed'), r"`leave` 'lm_haed' matches no unit; near to it are lm_head"),
    (dict(ceiling='v_proj'), r"`ceiling` 'v_proj' is not NAME=FORMAT, such as lm_head=8g64"), (dict(floor='=4'), 'not NAME=FORMAT'),
    (dict(pin={'v_proj': 5}), '5g64 was not measured'), (dict(pin={'v_proj': 'wide'}), "'wide' is not a format"),
    (dict(pin={'v_proj': 8}, ceiling={'v_proj': 4}),
     r'pin v_proj=8g64 and ceiling v_proj=4g64 leave no format for model\.layers.*v_proj, which can have')])
def test_what_cannot_be_had_is_said(wish, said):
    with pytest.raises(ValueError, match=said) as e: allocate(random_sweep(0), target_bpw=5, **wish)
    assert '\n' not in str(e.value)

def test_the_pipeline_measures_what_is_pinned(tmp_path):
    few = Texts(n_calibration=1, seq_len=16, n_evaluation=1, eval_len=16)
    asked = Weights([4, 8], rounding='minmax', pin='*.o_proj=6', ceiling={'v_proj': 4}, verify=False, compare=False)
    model = tiny('qwen3', tmp_path/'m', shape=dict(num_hidden_layers=1))
    r = optimize(str(model), caps=Caps(target_bpw=7), texts=few, weights=asked)
    assert {p for p, f in r['plan'].items() if f == Format(6)} == {p for p in r['plan'] if p.endswith('o_proj')}
    assert all(f == Format(4) for p, f in r['plan'].items() if p.endswith('v_proj'))
    assert [w['kind'] for w in r['figures']['wishes']] == ['pin', 'ceiling']
    r['sweep'].save(tmp_path/'s.json')
    curve = ['pareto', str(tmp_path/'s.json'), '--profiles', 'all', '--json']
    said = CliRunner().invoke(main, [*curve, '--leave', '*.o_porj'])
    assert said.exit_code == 1 and '--leave' in said.output and 'near to it are o_proj' in said.output
    found = CliRunner().invoke(main, [*curve, '--floor', 'embed=8', '--targets', '6'])
    assert found.exit_code == 0 and json.loads(found.stdout)['points']
