"A model in another type: all that is written is of it, bytes are as predicted, and a weight beyond its end is named"
import json

import mlx.core as mx
import numpy as np
import pytest

from optiq.backends.open import open_backend
from optiq.convert import convert, stored_bytes
from optiq.evals.perplexity import evaluate
from optiq.material.tiny import tiny
from optiq.folder import read_header
from optiq.models import Checkpoint, _check_overflow
from optiq.pipeline import optimize
from optiq.request import Cache
from optiq.plan import make_plan, uniform

@pytest.fixture(scope='module', params=['bfloat16', 'float32'])
def folder(request, tmp_path_factory):
    return tiny('qwen3', tmp_path_factory.mktemp('dtype')/'m', shape=dict(num_hidden_layers=1), dtype=request.param)

@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_all_that_is_written_is_of_the_type(folder, dtype, tmp_path):
    c = Checkpoint(folder, dtype=dtype)
    plan = uniform(c, 4) if dtype == 'float16' else make_plan(c, dict.fromkeys([c.units[0].path], uniform(c, 4)[c.units[0].path]))
    saved = convert(c, plan, tmp_path/'out')
    kinds = {t['dtype'] for f in saved.files for t in read_header(f).values()}
    assert kinds == {'U32', dict(float16='F16', bfloat16='BF16')[dtype]} and stored_bytes(saved) == plan.nbytes
    config = json.loads((saved.folder/'config.json').read_text())
    assert {config[k] for k in ('dtype', 'torch_dtype') if k in config} <= {dtype}

@pytest.mark.parametrize('backend', ['torch', 'mlx', 'stream'])
def test_every_backend_rounds_what_will_be_saved(folder, backend, tmp_path):
    c = Checkpoint(folder, dtype='float16')
    b, tokens = open_backend(c, backend), np.arange(32).reshape(2, 16)
    for u in (c.units[0], c.units[1]):
        if backend != 'stream' or u.block is not None: assert str(b.unit_weight(u.path).dtype).endswith('float16')
    assert np.isfinite(evaluate(b, tokens)['reference'].nll).all()

def test_a_sweep_of_another_type_is_another(folder):
    assert Checkpoint(folder, dtype='float16').fingerprint == Checkpoint(folder).fingerprint+' as float16'

def test_a_weight_beyond_the_end_is_named(tmp_path):
    folder = tiny('qwen3', tmp_path/'m', shape=dict(num_hidden_layers=1))
    file = next(folder.glob('*.safetensors'))
    arrays = dict(mx.load(str(file)))
    name = next(k for k in arrays if k.endswith('o_proj.weight'))
    arrays[name][0, 0] = -1e5
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, metadata=dict(format='pt'))
    _check_overflow(Checkpoint(folder, dtype='bfloat16'))
    with pytest.raises(ValueError, match=rf'{name} holds 99,840, and float16 ends at 65,504; leave the type'):
        optimize(str(folder), dtype='float16')

def test_what_is_no_type_and_a_cache(folder):
    with pytest.raises(ValueError, match="`dtype` 'int8' is not one of float16, bfloat16"): Checkpoint(folder, dtype='int8')
    with pytest.raises(ValueError, match='`dtype` has no effect on a cache'): optimize(str(folder), weights=None, cache=Cache(), dtype='float16')
