"A name that matches nothing is an error that shows what would match, in Python and on the command line"
import pytest

from optiq.convert import convert
from optiq.fit import what_fits
from optiq.formats import Format
from optiq.knapsack import allocate, pareto
from optiq.material.tiny import tiny
from optiq.measure.sweep import _untested
from optiq.models import Checkpoint
from optiq.plan import Plan, make_plan, uniform
from optiq.sensitivity import kl_sweep
from sweeps import block_units, make_sweep

FORMATS = [Format(b) for b in (3, 4, 8)]
SWEEP = make_sweep(block_units(2), FORMATS, lambda u, f: 4.**-f.bits)
UNITS, FEW = SWEEP.units, make_sweep(block_units(1), FORMATS, lambda u, f: 4.**-f.bits)
LAST = 'model.layers.1.mlp.down_proj'

@pytest.mark.parametrize('call, says', [
    (lambda m: make_plan(UNITS, {'model.layers.1.mlp.down_prj': 4}),
     f"no unit has the path 'model.layers.1.mlp.down_prj'; near to it are {LAST}"),
    (lambda m: make_plan(UNITS, {'*.down_proj': 4}), 'near to it are model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj$'),
    (lambda m: Plan(UNITS, {'xyz': Format(4)}, 1, 0), "no unit has the path 'xyz'; one is model.embed_tokens$"),
    (lambda m: uniform(FEW, 4).diff(uniform(SWEEP, 4)), 'different models: 7 units here, 13 there'),
    (lambda m: uniform(SWEEP, 4).diff(uniform(FEW, 4)), 'different models'),
    (lambda m: uniform(SWEEP, 4).why('xyz', SWEEP), "'xyz' is not a unit of this plan; one is"),
    *((lambda m, k=k: allocate(SWEEP, target_bpw=4, **{k: {'down_prj': 4} if k in ('pin', 'ceiling', 'floor') else 'down_prj'}),
       f"`{k}` 'down_prj' matches no unit; near to it are down_proj") for k in ('pin', 'ceiling', 'floor', 'leave', 'protect')),
    (lambda m: allocate(SWEEP, target_bpw=4, tie='cache'),
     "`tie` 'cache' has no effect: this model has no keys and values of their own side by side; leave it out"),
    (lambda m: allocate(SWEEP, target_bpw=4, tie=('qkv', 'cache')), "'cache' has no effect"),
    (lambda m: allocate(SWEEP, target_bpw=4, tie=lambda u: u.path), 'a function has no effect'),
    (lambda m: pareto(SWEEP, (3, 3.5, 6), 'compact'), r'the target 6 does not lie in the range of compact \(3 to 4 bits\)'),
    (lambda m: what_fits(m, 2**33, 256, _untested(Checkpoint(m), FORMATS), [4, 5]), '5g64 was not measured; the sweep has 3g64, 4g64, 8g64'),
    (lambda m: convert(m, uniform(SWEEP, 4), m+'-4'), 'the plan is of another model: .* is in only one of the two'),
    (lambda m: kl_sweep(m, formats=[4, 8], n=1, seq_len=16, until='stable', progress=False), "`until` 'stable' needs `targets`"),
    (lambda m: kl_sweep(m, formats=[4, 8], n=1, seq_len=16, method='screened', targets=[3], rounding='minmax', progress=False),
     'target_bpw 3 is below the smallest possible')])
def test_a_name_that_matches_nothing(call, says, model):
    with pytest.raises(ValueError, match=says): call(model)

@pytest.fixture(scope='module')
def model(tmp_path_factory): return str(tiny('qwen3', tmp_path_factory.mktemp('names')/'m', shape=dict(num_hidden_layers=1), dtype='float32'))
