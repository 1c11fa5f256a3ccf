"optiq convert, from the outside: the saved model, the errors, the promises"
import json
import os
import shutil
from types import SimpleNamespace

import mlx.core as mx
import pytest
from click.testing import CliRunner

import apart
from optiq.cli import main
from optiq.convert import check_saved, convert, stored_bytes
from optiq.files import whole_folder
from optiq.formats import AS_IS, Format
from optiq.plan import make_plan, uniform
from optiq.models import Checkpoint
from optiq.material.tiny import tiny

@pytest.fixture(scope='module')
def llama(tmp_path_factory): return tiny('llama', tmp_path_factory.mktemp('llama')/'model')

def process(*args, env={}):
    "The command in a process of its own"
    return apart.run('-m', 'optiq.cli', *args, env=os.environ | env)

def optiq(*args):
    "The command in this process, which has everything imported"
    r = CliRunner().invoke(main, [*map(str, args)], prog_name='optiq')
    return SimpleNamespace(returncode=r.exit_code, stdout=r.stdout, stderr=r.stderr)

def mixed(c):
    "A plan with four formats"
    some = [Format(4, 64), Format(8, 32), Format(4, 32, 'mxfp4'), AS_IS, Format(3, 128)]
    return make_plan(c, {u.path: some[i % 5] for i, u in enumerate(c.units)})

@pytest.mark.parametrize('architecture', ['qwen3', 'qwen3_moe', 'qwen3_5', 'gemma3', 'phi3', 'mistral'])
def test_mixed_plan_round_trip(architecture, tmp_path):
    c = Checkpoint(tiny(architecture, tmp_path/'source'), model_type='llm')
    plan = mixed(c)
    saved = convert(c, plan, tmp_path/'out')
    card = (saved.folder/'README.md').read_text(encoding='utf-8')
    assert 'predicted' not in card and 'sweep.json' not in card # nobody measured this plan
    assert saved.formats == dict(plan) and stored_bytes(saved) == plan.nbytes
    entries = json.loads((saved.folder/'config.json').read_text())['quantization']
    assert all(path in entries for path in plan)
    check_saved(tmp_path/'out', plan, c)

def test_plain_mlx_lm_opens_it_without_optiq(llama, tmp_path):
    out = tmp_path/'out'
    convert(str(llama), uniform(Checkpoint(llama), Format(4)), out)
    code = (f'import sys, mlx_lm; m, t = mlx_lm.load({str(out)!r}); '
            'print(repr(mlx_lm.generate(m, t, "hello", max_tokens=5))); assert "optiq" not in sys.modules')
    r = apart.run('-c', code)
    assert r.returncode == 0, r.stderr

def test_a_wrong_tensor_is_found(llama, tmp_path):
    c = Checkpoint(llama)
    plan = uniform(c, Format(4))
    convert(c, plan, tmp_path/'out')
    file = tmp_path/'out'/'model.safetensors'
    weights = dict(mx.load(str(file)).items())
    name = f'{c.units[3].path}.scales'
    weights[name] = weights[name]*1.01
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={'format': 'mlx'})
    with pytest.raises(ValueError, match=c.units[3].path): check_saved(tmp_path/'out', plan, c)
    with pytest.raises(ValueError, match='not 8g64'): check_saved(tmp_path/'out', uniform(c, Format(8)))

def test_command_writes_one_json_object(llama, tmp_path):
    out = tmp_path/'out'
    r = process('convert', llama, '--target-bpw', 5, '--n-calibration', 2, '--seq-len', 32, '--n-samples', 2, '-o', out, '--json')
    assert r.returncode == 0, r.stderr
    figures = json.loads(r.stdout)
    assert r.stdout.count('\n') == 1
    for key in ('output nominal_bpw true_bpw size_mb predicted_kl kl kl_se perplexity reference_perplexity seconds baselines').split():
        assert key in figures
    assert all({'name', 'true_bpw', 'size_mb', 'kl', 'perplexity'} <= set(b) for b in figures['baselines'])
    assert {b['name'] for b in figures['baselines']} >= {'uniform 4g64', 'mixed_3_6', 'mixed_4_6'}
    assert figures['nominal_bpw'] <= 5 and figures['size_mb']*2**20 == stored_bytes(Checkpoint(out))
    assert (out/'optiq'/'plan.json').is_file() and (out/'optiq'/'sweep.json').is_file() and (out/'README.md').is_file()
    again = tmp_path/'again'
    r = optiq('convert', llama, '--sweep', out/'optiq'/'sweep.json', '--target-bpw', 6, '--n-samples', 2, '--skip-baselines',
              '-o', again, '--json')
    assert r.returncode == 0 and json.loads(r.stdout)['nominal_bpw'] <= 6
    b = optiq('benchmark', again, '--baseline', llama, '--n-samples', 2, '--seq-len', 64, '--json')
    assert b.returncode == 0 and len(json.loads(b.stdout)['rows']) == 2

def broken(llama, folder, what):
    "A copy of the model with something wrong"
    shutil.copytree(llama, folder)
    file = folder/'model.safetensors'
    if what == 'truncated': os.truncate(file, file.stat().st_size-1000)
    if what == 'pickle': file.rename(folder/'pytorch_model.bin')
    if what == 'no config': (folder/'config.json').unlink()
    if what == 'unknown': edit(folder/'config.json', model_type='nosuch')
    if what == 'odd layer': rename(file, 'model.layers.1.mlp.up_proj.weight', 'model.layers.1.mlp.sideways_proj.weight')
    if what == 'nan': poison(file, 'model.layers.1.mlp.up_proj.weight')
    return folder

def edit(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def rename(file, old, new):
    w = dict(mx.load(str(file)).items())
    mx.eval(w)
    w[new] = w.pop(old)
    mx.save_safetensors(str(file), w)

def poison(file, name):
    w = dict(mx.load(str(file)).items())
    mx.eval(w)
    w[name] = mx.where(mx.arange(w[name].shape[-1]) == 5, float('nan'), w[name]).astype(w[name].dtype)
    mx.save_safetensors(str(file), w)

@pytest.mark.parametrize('what, says', {
    'truncated': 'cut short', 'pickle': 'pickle', 'no config': 'config.json', 'unknown': 'nosuch',
    'odd layer': 'sideways_proj', 'nan': 'model.layers.1.mlp.up_proj'}.items())
def test_broken_models(llama, tmp_path, what, says):
    folder, out = broken(llama, tmp_path/'model', what), tmp_path/'out'
    assert_error(optiq('convert', folder, '-o', out, '--n-calibration', 1, '--seq-len', 16, '--n-samples', 1), says)
    assert not out.exists()

def assert_error(r, *says):
    "One line on stderr after any announcement, nothing on stdout, status 1, no traceback"
    assert r.returncode == 1, (r.stdout, r.stderr)
    line = r.stderr.strip().splitlines()[-1]
    assert line.startswith('error: ') and 'Traceback' not in r.stderr and not r.stdout
    for s in says: assert str(s) in line

@pytest.mark.parametrize('args, says', [
    (['--target-bpw', 3.9], ('4.00', '8.00')), (['--target-bpw', 8.1], ('4.00', '8.00')), (['--target-size', .0001], ('MB',)),
    (['--candidate-bits', 7], ('7', 'format')), (['--candidate-bits', ','], ('format',)), (['--calibration', 'no.txt'], ('no.txt',))])
def test_wrong_requests(llama, tmp_path, args, says):
    assert_error(optiq('convert', llama, '-o', tmp_path/'out', *args), *says)
    assert not list(tmp_path.iterdir())

def test_no_such_model(tmp_path):
    assert_error(process('convert', 'nobody/nothing', '-o', tmp_path/'out'), 'nobody/nothing')
    assert_error(optiq('convert', tmp_path/'missing', '-o', tmp_path/'out'), 'missing')
    debug = process('convert', tmp_path/'missing', env=dict(OPTIQ_DEBUG='1'))
    assert 'Traceback' in debug.stderr and debug.returncode == 1

def test_existing_output_is_kept(llama, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'mine.txt').write_text('precious')
    assert_error(optiq('convert', llama, '-o', tmp_path/'out'), '--overwrite')
    assert (tmp_path/'out'/'mine.txt').read_text() == 'precious'

def test_width_that_the_group_does_not_divide(tmp_path):
    model = tiny('llama', tmp_path/'model', shape=dict(intermediate_size=320))
    assert_error(optiq('convert', model, '-o', tmp_path/'out', '--group-size', 128), 'down_proj', 'use groups of 64')

def test_disk_that_fills_up(llama, tmp_path):
    "Writes fail beyond a limit, as on a full disk: nothing is left"
    code = ('import resource, sys; from optiq.convert import convert; from optiq.models import Checkpoint; '
            'from optiq.plan import uniform; from optiq.formats import Format; '
            f'c = Checkpoint({str(llama)!r}); p = uniform(c, Format(8)); '
            'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); '
            f'convert(c, p, {str(tmp_path/"out")!r})')
    r = apart.run('-c', code)
    assert r.returncode != 0 and 'there is no room' in r.stderr and not list(tmp_path.iterdir()), r.stderr
    with pytest.raises(OSError, match='free'):
        with whole_folder(tmp_path/'out', room=2**60): pass
    assert not list(tmp_path.iterdir())

def test_quantized_models_keep_what_they_have(llama, tmp_path):
    convert(str(llama), uniform(Checkpoint(llama), Format(4)), tmp_path/'out')
    c = Checkpoint(tmp_path/'out')
    assert set(c.formats.values()) == {Format(4)} == {u.kept for u in c.units}
    twice = convert(c, uniform(c, Format(4)), tmp_path/'twice')
    assert (tmp_path/'out'/'model.safetensors').read_bytes() == (twice.folder/'model.safetensors').read_bytes()
