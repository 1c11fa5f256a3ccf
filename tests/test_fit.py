"What fits a machine: from the config alone, to the byte where bytes are counted, and honest about quality"
import json

import pytest
from click.testing import CliRunner

from optiq import fit as module
from optiq.cli import main
from optiq.fit import _Outline, what_fits
from optiq.formats import parse_format
from optiq.kv.layout import cache_bytes
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.pipeline import optimize
from optiq.request import Caps, Texts, Weights
from sweeps import make_sweep

GB = 2**30

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny('qwen3', tmp_path_factory.mktemp('fit')/'m', shape=dict(num_hidden_layers=2))

@pytest.fixture
def bare(folder, tmp_path): # no weights
    (tmp_path/'config.json').write_bytes((folder/'config.json').read_bytes())
    return tmp_path

@pytest.mark.parametrize('architecture', ['qwen3', 'qwen3_moe', 'llama'])
def test_a_config_tells_what_the_checkpoint_holds(architecture, tmp_path):
    whole = tiny(architecture, tmp_path/'m')
    c, o = Checkpoint(whole), _Outline(whole)
    assert [(u.path, u.shape, u.dtype, u.block) for u in o.units] == [(u.path, u.shape, u.dtype, u.block) for u in c.units]
    assert (o.params, o.other_bytes) == (c.params, c.other_bytes)
    assert cache_bytes(o, 512) == cache_bytes(c, 512)

def test_no_weight_is_read(bare):
    found = what_fits(bare, 8*GB, 256)
    assert found.rows[0]['plan'] == 'as it is' and found.rows[0]['kl'] == 0

def test_plans_fill_what_is_left(bare, monkeypatch):
    monkeypatch.setattr(module, '_PROGRAM', 0)
    monkeypatch.setattr(module, '_usable', lambda m: m)
    o = _Outline(bare)
    o.context = 256
    rest = cache_bytes(o, 256)+module._working_bytes(o, 256)
    three, four = (module.uniform(o, b).nbytes for b in (3, 4))
    row, = what_fits(bare, rest+(three+four)//2, 256, formats=[3, 4, 8]).rows
    assert row['plan'] == 'mixed' and 3 < row['nominal_bpw'] < 4 and row['size'] <= row['weights'] and row['uniform'] == '3g64'
    without = repr(what_fits(bare, rest+(three+four)//2, 256, formats=[3, 4, 8]))
    assert row['kl'] is None and 'not known, since no sweep of this model was given' in without and 'predicts' not in without
    none = what_fits(bare, rest+three//4, 256)
    assert none.rows[0]['plan'] is None and 'nothing fits' in repr(none) and '<table' in none._repr_html_()
    sweep = make_sweep(o.units, [parse_format(b) for b in (3, 4)], lambda u, f: [4.**-f.bits]*2)
    sweep.header |= dict(params=o.params, other_bytes=o.other_bytes)
    found = what_fits(bare, rest+(three+four)//2, 256, sweep=sweep)
    known, = found.rows
    assert known['kl'] > 0 and known['kl_se'] is not None and 'KL is what the sweep predicts' in repr(found)

def test_machines_and_this_one(bare):
    found = what_fits(bare, context=256)
    assert [r['memory'] for r in found.rows] == ['here', *(gb*GB for gb in module._MACHINES)]
    assert module._usable(16*GB) == 16*GB*2//3 and module._usable(64*GB) == 48*GB

def test_quantized_and_unknown_models_are_refused(bare):
    config = json.loads((bare/'config.json').read_text())
    (bare/'config.json').write_text(json.dumps(config | dict(quantization=dict(bits=4, group_size=64))))
    with pytest.raises(ValueError, match='quantized already .*; give the model that it was made from'): _Outline(bare)
    (bare/'config.json').write_text(json.dumps(config | dict(model_type='no_such')))
    with pytest.raises(ValueError, match="cannot build a model of type 'no_such' from its config.json"): _Outline(bare)
    for odd in dict(num_key_value_heads=0), dict(rope_theta=[]): # it can be built, and no token goes through it
        (bare/'config.json').write_text(json.dumps(config | odd))
        with pytest.raises(ValueError, match='mlx-lm cannot (build|run) a model of type .* from its config.json'): what_fits(bare, context=64)

@pytest.mark.parametrize('given, size', [('16GB', 16*GB), ('16', 16*GB), ('1.5 gb', 3*GB//2), ('800MiB', 800*2**20)])
def test_sizes(given, size, bare):
    r = CliRunner().invoke(main, ['fit', str(bare), '--memory', given, '--context', '256', '--json'])
    assert r.exit_code == 0 and json.loads(r.output)['rows'][0]['memory'] == size

@pytest.mark.parametrize('given', ['much', '-1', '0', '16TB extra', 'auto'])
def test_what_is_no_size(given, bare):
    r = CliRunner().invoke(main, ['fit', str(bare), '--memory', given])
    assert r.exit_code == 2 and 'is not a size, such as 16GB' in r.output

def test_convert_takes_what_this_machine_leaves(folder, monkeypatch):
    o = _Outline(folder)
    least = cache_bytes(o, 256)+module.uniform(o, 4).nbytes
    monkeypatch.setattr(module, '_here', lambda: (least+10_000+module._working_bytes(o, 256), 'as the test says'))
    few = Texts(n_calibration=1, seq_len=16, n_evaluation=1, eval_len=16)
    ask = Weights([4, 8], rounding='minmax', verify=False, compare=False)
    r = optimize(str(folder), caps=Caps(max_memory='auto', context=256), texts=few, weights=ask)
    assert r['plan'].solver['caps']['max_memory'] == pytest.approx(least+10_000) and r['plan'].nbytes+cache_bytes(o, 256) <= least+10_000
    monkeypatch.setattr(module, '_here', lambda: (1000, 'as the test says'))
    with pytest.raises(ValueError, match='less than a step of .* needs at 256 tokens'):
        optimize(str(folder), caps=Caps(max_memory='auto', context=256), texts=few, weights=ask)
    r = CliRunner().invoke(main, ['convert', str(folder), '--target-memory', 'auto', '--context', '256', '--dry-run'])
    assert r.exit_code == 1 and 'less than a step' in r.output
