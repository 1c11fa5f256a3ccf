"A unit that moved nothing is never taken for one that costs nothing"
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optiq.backends.open import open_backend
from optiq.formats import Format
from optiq.knapsack import allocate, pareto, pose
from optiq.material.tiny import tiny
from optiq.measure.sweep import texts_for
from optiq.models import Checkpoint
from optiq.plan import Plan, _silent
from optiq.sensitivity import kl_sweep
from sweeps import block_units, make_sweep

DEAD = 'model.layers.1.'

@pytest.fixture(scope='module')
def b(tmp_path_factory):
    "A model whose second block adds nothing"
    folder = tiny('llama', tmp_path_factory.mktemp('models')/'llama', dtype='float32')
    tensors = load_file(folder/'model.safetensors')
    for name in tensors:
        if name.startswith(DEAD) and ('o_proj' in name or 'down_proj' in name): tensors[name] *= 0
    save_file(tensors, folder/'model.safetensors', {'format': 'pt'})
    return open_backend(str(folder), 'mlx')

@pytest.fixture(scope='module')
def tokens(b): return np.random.default_rng(0).integers(0, b.checkpoint.vocabulary, (2, 32)).astype(np.int32)

@pytest.mark.parametrize('method', ['exact', 'gradient', 'screened'])
def test_they_get_the_widest_candidate_and_a_line(b, tokens, tmp_path, method):
    with pytest.warns(UserWarning, match=f'7 of .* units moved nothing .* {DEAD}'):
        sweep = kl_sweep(b, tokens, ['4g32', '8g32'], method=method, targets=[6], rounding='minmax', progress=False)
    assert all(np.isfinite(v).all() for v in sweep.values.values())
    dead = [u.path for u in b.checkpoint.units if u.path.startswith(DEAD)]
    assert _silent(sweep) == dead and len(dead) == 7
    p = allocate(sweep, target_bpw=6)
    assert {p[path] for path in dead} == {Format(8, 32)} and len(p.counts()) == 2
    assert p.solver['silent'] == sorted(dead) and '7 that moved nothing have the widest' in repr(p)
    assert 'it moved nothing' in repr(p.why(dead[0], sweep))
    p.save(tmp_path/'plan.json')
    assert Plan.load(tmp_path/'plan.json').solver['silent'] == sorted(dead)

def made_up(noise=None, dead=0.):
    units = block_units(2)
    sweep = make_sweep(units, [Format(4, 32), Format(8, 32)], lambda u, f: [dead, dead] if u.block == 1 else [1/f.bits, 2/f.bits])
    if noise is not None: sweep.header['noise'] = noise
    return sweep

def test_noise_is_nothing_either_and_little_is_something():
    assert len(_silent(made_up())) == len(_silent(made_up(1e-12, 1e-12))) == 6
    assert _silent(made_up(1e-12, 1e-9)) == _silent(made_up(None, 1e-12)) == []
    assert 'silent' not in allocate(made_up(1e-12, 1e-9), target_bpw=6).solver

def test_a_cap_that_leaves_no_room_says_so():
    with pytest.raises(ValueError, match='6 units that moved nothing .* longer or more calibration'): allocate(made_up(), target_bpw=4)
    sweep = made_up()
    assert all(p[u.path] == Format(8, 32) for p in pareto(sweep, profiles=('quality',)) for u in sweep.units if u.block == 1)
    q = pose(sweep, target_bpw=6)
    assert q.admits(q.solve()) and not q.admits(allocate(made_up(1e-12, 1e-9), target_bpw=4.5))

def test_sequences_grow_until_a_part_wakes_up(b, capsys):
    c = Checkpoint(b.checkpoint.folder)
    c.config = dict(c.config, index_topk=64)
    assert texts_for(c, 'bundled', 2, 32, 0)[0].shape == (2, 128)
    said = capsys.readouterr().err
    assert '128 tokens instead of 32, about 4 times the time' in said and 'index_topk 64' in said
    assert texts_for(c, 'bundled', 2, 65, 0)[0].shape == (2, 65) and not capsys.readouterr().err
    c.config = dict(text_config=dict(index_topk=64, max_position_embeddings=100))
    assert texts_for(c, 'bundled', 1, 32, 0)[0].shape == (1, 100)
