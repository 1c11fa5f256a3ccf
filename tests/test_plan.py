"Plans: what a sweep says of a choice, whole in a file, and what mlx-lm makes of them"
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from optiq.formats import AS_IS, Format, parse_format
from optiq.knapsack import allocate
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.units import Unit
from optiq.plan import Plan, _isotonic, recipe, smoothed, uniform
from sweeps import block_units, make_sweep, random_sweep

# What was measured

def test_a_wider_format_measured_worse_is_not_rewarded():
    units = block_units(1, embed=False)
    odd = units[2].path
    kl = lambda u, f: {3: .5, 4: .1, 6: .3 if u.path == odd else .05, 8: .01}[f.bits]
    sweep = make_sweep(units, [Format(b, 64) for b in (3, 4, 6, 8)], kl)
    table, noise = smoothed(sweep)
    assert noise == pytest.approx(.2) and table[odd, Format(4)].mean() == table[odd, Format(6)].mean() == pytest.approx(.2)
    for target in np.arange(3, 8, .3):
        plan = allocate(sweep, target_bpw=target)
        assert plan[odd] != Format(6) and plan.solver['noise'] == noise

@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_isotonic(v):
    out = _isotonic(np.array(v)[:, None]).ravel()
    assert (np.diff(out) <= 1e-12).all() and out.mean() == pytest.approx(np.mean(v))
    if sorted(v, reverse=True) == v: assert out.tolist() == v

def test_formats_of_other_kinds_are_compared_as_measured():
    units = block_units(1, embed=False)
    fmts = [parse_format(s) for s in ('4g64', '6g128', 'mxfp4', 'mxfp8')]
    sweep = make_sweep(units, fmts, lambda u, f: dict(zip(fmts, (.1, .006, .13, .007)))[f])
    assert smoothed(sweep)[1] == 0
    for target in (4.3, 5, 6, 6.5): assert parse_format('mxfp8') not in allocate(sweep, true_bpw=target+1).counts()

@pytest.mark.parametrize('bad, said', [(-1e-6, 'a negative KL for'), (np.nan, 'NaN or infinite KL for'), (np.inf, 'NaN or inf')])
def test_broken_values_name_their_unit(bad, said):
    sweep = random_sweep(0)
    path = sweep.units[3].path
    sweep.values[path, Format(4)] = np.array([.1, bad])
    with pytest.raises(ValueError, match=f'{said}.*{path}.*4g64' if bad != np.inf else said): allocate(sweep, target_bpw=4)

def test_a_sweep_of_zeros_or_of_nothing():
    units = block_units(1)
    with pytest.raises(ValueError, match='every KL of the sweep is zero'):
        allocate(make_sweep(units, [Format(4)], lambda u, f: 0), target_bpw=4)
    with pytest.raises(ValueError, match='no values'): allocate(make_sweep(units, [], None), target_bpw=4)

# The plan

@pytest.mark.parametrize('options', [dict(target_bpw=4.5), dict(max_bytes=200_000, protect='v_proj', tie='gate_up')])
def test_json_round_trip(tmp_path, options):
    plan = allocate(random_sweep(2), **options)
    plan.save(tmp_path/'plan.json')
    again = Plan.load(tmp_path/'plan.json')
    assert again == plan and again.units == plan.units and again.solver == plan.solver and again.kl == plan.kl
    assert again.point() == plan.point() and repr(again) == repr(plan)
    found = json.loads((tmp_path/'plan.json').read_text(), parse_constant=pytest.fail)
    assert found['units'][0].keys() == {'path', 'kind', 'shape', 'block', 'dtype', 'part', 'fixed', 'format', 'kl'}

def test_json_of_a_plan_without_kl(tmp_path):
    plan = uniform(block_units(1), 4)
    plan.save(tmp_path/'plan.json')
    assert np.isnan(Plan.load(tmp_path/'plan.json').predicted_kl) and 'KL' not in repr(plan)
    (tmp_path/'other.json').write_text('[1')
    with pytest.raises(ValueError, match='is not a plan'): Plan.load(tmp_path/'other.json')

def test_shows_itself():
    plan = allocate(random_sweep(2), target_bpw=5)
    assert len(repr(plan)) < 160 and plan._repr_html_().count('<tr>') == 1+len(plan.counts())
    frame = plan.to_frame()
    assert list(frame) == ['unit', 'kind', 'block', 'format', 'params', 'kl']
    assert frame.kl.sum() == pytest.approx(plan.predicted_kl) and len(frame) == len(plan)
    plan.plot()
    uniform(plan.units, 4).plot()
    assert plan.diff(plan) == {}

def test_standard_error_is_that_of_the_sum():
    sweep = random_sweep(2, n=6)
    plan = uniform(sweep, 3)
    sums = sum(smoothed(sweep)[0][u.path, Format(3)] for u in sweep.units)
    assert plan.predicted_kl == pytest.approx(sums.mean()) and plan.predicted_kl_se == pytest.approx(sums.std(ddof=1)/6**.5)

@pytest.mark.parametrize('architecture', ['qwen3', 'qwen3_moe'])
def test_is_the_predicate_that_mlx_lm_asks(tmp_path, architecture):
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model
    model = load_model(tiny(architecture, tmp_path), lazy=True)[0]
    units = [Unit(p, p.rsplit('.', 1)[-1], tuple(m.weight.shape), None) for p, m in model.named_modules()
             if hasattr(m, 'to_quantized') and not p.endswith('mlp.gate')]
    arrays, mine = dict(tree_flatten(model.parameters())), {f'{u.path}.weight' for u in units}
    rng = np.random.default_rng(0)
    sweep = make_sweep(units, [Format(3, 64), Format(4, 32), Format(8, 64), parse_format('mxfp4')],
                       lambda u, f: rng.uniform()*4.**-f.bits, sum(v.nbytes for k, v in arrays.items() if k not in mine))
    sweep.header['params'] = params = sum(v.size for v in arrays.values())
    plan = allocate(sweep, true_bpw=6, formats=['3g64', '4g32', '8g64', 'mxfp4', 'as-is'])
    model, config = quantize_model(model, {}, group_size=32, bits=4, quant_predicate=plan)
    modules = dict(model.named_modules())
    for path, f in plan.items():
        m = modules[path]
        assert (Format(m.bits, m.group_size, m.mode) if 'scales' in m else AS_IS) == f
    assert not any('scales' in m for p, m in modules.items() if p.endswith('mlp.gate'))
    assert sum(v.nbytes for _, v in tree_flatten(model.parameters())) == plan.nbytes <= 6*params/8
    entries = {p for p, e in config['quantization'].items() if isinstance(e, dict)}
    assert entries == {p for p, f in plan.items() if f != AS_IS}

@pytest.mark.parametrize('name', ['mixed_3_6', 'mixed_4_6'])
def test_recipes_are_those_of_mlx_lm(tmp_path, name):
    from mlx.utils import tree_flatten
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model
    checkpoint = Checkpoint(tiny('llama', tmp_path))
    model = checkpoint.load()
    model, _ = quantize_model(model, {}, group_size=64, bits=4, quant_predicate=mixed_quant_predicate_builder(name, model, 64))
    modules, plan = dict(model.named_modules()), recipe(checkpoint, name)
    assert all((modules[p].bits, modules[p].group_size) == (f.bits, f.group_size) for p, f in plan.items())
    assert plan.nbytes == sum(v.nbytes for _, v in tree_flatten(model.parameters())) and plan.name == name
