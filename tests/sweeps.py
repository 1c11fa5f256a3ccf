"Made-up sweeps, and every choice tried: what the tests of plans, the solver and allocation share"
import itertools
from types import SimpleNamespace

import numpy as np
from hypothesis import HealthCheck, settings

from optiq.formats import Format, divides
from optiq.units import Unit
from optiq.plan import smoothed

property_test = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

def make_sweep(units, formats, kl, other=1000):
    "A sweep from a function of unit and format that returns KL per sequence"
    values = {(u.path, f): np.atleast_1d(np.asarray(kl(u, f), float)) for u in units for f in formats if divides(f, u.shape)}
    header = dict(model='made up', params=sum(u.params for u in units)+other//2, other_bytes=other)
    return SimpleNamespace(units=units, formats=formats, values=values, header=header)

KINDS = 'q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj', 'down_proj'

def block_units(blocks, embed=True, rng=None):
    "Units as a model has them"
    rng = rng or np.random.default_rng(0)
    rows = lambda: int(rng.integers(1, 30))*8
    units = [Unit('model.embed_tokens', 'embed', (512, 128), None)] if embed else []
    return units+[Unit(f'model.layers.{i}.{"mlp" if "_proj" in k[1:] and len(k) > 6 else "self_attn"}.{k}', k, (rows(), 128), i)
                  for i in range(blocks) for k in KINDS]

def random_sweep(seed, n_units=None, bits=(3, 4, 6, 8), n=4, convex=False, blocks=2):
    rng = np.random.default_rng(seed)
    units = block_units(blocks, rng=rng)
    if n_units: units = [units[i] for i in sorted(rng.permutation(len(units))[:n_units])]
    scale = {u.path: np.exp(rng.normal(-6, 1.5)) for u in units}
    def kl(u, f):
        step = 0 if convex else rng.normal(0, .6)
        return scale[u.path]*4.**(3-f.bits)*np.exp(step)*np.exp(rng.normal(0, .2, n)-.02)
    return make_sweep(units, [Format(b, 64) for b in bits], kl)

def brute_force(sweep, fits, formats=None, same=lambda choice: True):
    "The least KL of all choices that fit, on the smoothed values"
    table, best = smoothed(sweep)[0], np.inf
    for choice in itertools.product(formats or sweep.formats, repeat=len(sweep.units)):
        choice = {u.path: f for u, f in zip(sweep.units, choice)}
        if same(choice) and fits(choice): best = min(best, sum(table[x].mean() for x in choice.items()))
    return best

def nominal(sweep, choice):
    return sum(u.bits(choice[u.path])*u.params for u in sweep.units)/sum(u.params for u in sweep.units)

def stored(sweep, choice): return sweep.header['other_bytes']+sum(u.nbytes(choice[u.path]) for u in sweep.units)
