"NaN in a tensor is an error of one line wherever a model is measured, and no figure is NaN: what is not known is null"
import json
import shutil
from math import nan
from types import SimpleNamespace
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from optiq.backends.open import open_backend
from optiq.backends.finite import check_logits
from optiq.cli import main
from optiq.convert import convert
from optiq.evals.kl import reference, score_against
from optiq.models import Checkpoint
from optiq.plan import uniform
from optiq.report import Report, mean_figure, _paired
from optiq.sensitivity import kl_sweep
from optiq.material.tiny import tiny

FEW = ['--n-samples', 1]
SWEEP, CONVERT = ['--samples', 1, '--rounding', 'minmax'], ['--target-bpw', 5, *FEW, '--n-calibration', 1, '--rounding', 'minmax']
TEXT = {'sweep': [*SWEEP, '--seq-len', 32], 'convert': CONVERT, 'pareto': [*SWEEP, '--seq-len', 32], 'perplexity': [*FEW, '--seq-len', 32],
        'kl': [*FEW, '--seq-len', 32], 'benchmark': [*FEW, '--seq-len', 32, '--no-speed'], 'verify': [], 'kv-cache': [*FEW, '--seq-len', 32]}
PARTS = dict(sweep=SWEEP, convert=CONVERT, benchmark=FEW, verify=[])
MODELS = dict( # what is damaged: a norm, the row of an embedding, a bias
    llama=('layers.1.input_layernorm.weight', 'embed_tokens.weight', 'layers.0.self_attn.k_proj.bias'),
    qwen3_vl=('visual.blocks.1.norm1.weight', 'language_model.embed_tokens.weight', 'visual.blocks.0.attn.qkv.bias'),
    qwen3_asr=('audio_tower.layers.0.final_layer_norm.weight', 'model.embed_tokens.weight', 'audio_tower.layers.0.fc1.bias'))
SHAPES = dict(
    llama=dict(attention_bias=True, num_hidden_layers=2), qwen3_vl=dict(text_config=dict(num_hidden_layers=1)),
    qwen3_asr=dict(thinker_config=dict(text_config=dict(num_hidden_layers=1), audio_config=dict(encoder_layers=1))))

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A checkpoint of each kind, and its copies with NaN in one tensor"
    def made(architecture):
        folder = tmp_path_factory.mktemp(architecture)
        tiny(architecture, folder/'whole', shape=SHAPES[architecture])
        for name in MODELS[architecture]: damage(shutil.copytree(folder/'whole', folder/name), name)
        return folder
    return {a: made(a) for a in MODELS}

def damage(folder, end):
    file = folder/'model.safetensors'
    w = dict(mx.load(str(file)).items())
    name, = [k for k in w if k.endswith(end)]
    w[name] = mx.array(np.array(w[name].astype(mx.float32))).astype(w[name].dtype)
    w[name][0] = nan # of the embedding, the row of '<|endoftext|>'
    if end.endswith('embed_tokens.weight'): w[name][:] = nan
    mx.eval(w)
    mx.save_safetensors(str(file), w, {'format': 'pt'})

def optiq(*args): return CliRunner().invoke(main, [str(a) for a in args], prog_name='optiq')

def cases():
    for a, tensors in MODELS.items():
        for t in tensors: # of models of several parts, which take longer, each tensor by one command and the first by all
            for c in TEXT if a == 'llama' else PARTS if t == tensors[0] else ['benchmark']: yield pytest.param(a, t, c, id=f'{a} {t} {c}')

@pytest.mark.parametrize('architecture, tensor, command', list(cases()))
def test_a_damaged_model_is_refused_in_one_line(models, tmp_path, architecture, tensor, command):
    whole, odd = models[architecture]/'whole', models[architecture]/tensor
    more = (TEXT if architecture == 'llama' else PARTS)[command]
    words = ['eval', odd, '--task', command] if command in ('perplexity', 'kl') else [command, odd]
    if command == 'kl' or command == 'benchmark': words += ['--baseline', whole]
    if command in ('sweep', 'convert', 'pareto', 'kv-cache'): words += ['-o', tmp_path/'out']
    r = optiq(*words, *more)
    assert r.exit_code == 1, r.output
    said = r.stderr.strip().splitlines()[-1] if command != 'verify' else r.stdout
    assert 'NaN' in said and tensor.split('.')[-2] in said
    assert command == 'verify' or said.startswith('error: ')
    assert not (tmp_path/'out').is_dir()
    left = tmp_path/'out'
    assert not left.is_file() or 'NaN' not in left.read_text()

@pytest.mark.parametrize('tensor', MODELS['llama'])
@pytest.mark.parametrize('backend', ['torch', 'mlx', 'stream', None])
def test_from_python_too_by_every_backend_and_in_a_conversion_alone(models, tmp_path, backend, tensor):
    odd = models['llama']/tensor
    with pytest.raises(ValueError, match=r'model\.safetensors: .* NaN') as e:
        if backend: kl_sweep(str(odd), formats=['4g32'], n=1, seq_len=32, rounding='minmax', backend=backend, progress=False)
        else: convert(odd, uniform(Checkpoint(odd), '4g32'), tmp_path/'out')
    assert tensor.split('.')[-2] in str(e.value) and not (tmp_path/'out').exists()

@pytest.mark.parametrize('side', ['model', 'baseline'])
def test_neither_side_of_a_comparison_may_be_damaged(models, side):
    whole, odd = models['llama']/'whole', models['llama']/MODELS['llama'][0]
    pair = (odd, whole) if side == 'model' else (whole, odd)
    r = optiq('benchmark', pair[0], '--baseline', pair[1], *TEXT['benchmark'])
    assert r.exit_code == 1 and 'NaN' in r.stderr

def test_one_sequence_has_no_error_and_json_says_null(models, tmp_path):
    "`json` would write NaN, which other readers refuse"
    whole = models['llama']/'whole'
    def refuse(constant): raise AssertionError(constant)
    words = dict(TEXT, latency=['--chip', 'M3 Max'])
    for command, more in words.items():
        start = ['eval', whole, '--task', command] if command in ('perplexity', 'kl') else [command, whole]
        if command in ('kl', 'benchmark'): start += ['--baseline', whole]
        if command in ('sweep', 'convert', 'pareto', 'kv-cache'): start += ['-o', tmp_path/command]
        r = optiq(*start, *more, '--json')
        assert r.exit_code == 0, r.output
        json.loads(r.stdout.splitlines()[-1], parse_constant=refuse)
        files = [tmp_path/command] if (tmp_path/command).is_file() else (tmp_path/command).rglob('*.json*')
        for file in files:
            parts = [file.read_text()] if file.suffix == '.json' else file.read_text().split('\n')
            for text in filter(None, parts): json.loads(text, parse_constant=refuse)

@pytest.mark.parametrize('value', [nan, float('inf'), -float('inf')])
def test_logits_that_are_no_numbers(value):
    b = SimpleNamespace(xp=np, checkpoint=SimpleNamespace(name='m', load=lambda: SimpleNamespace(parameters=lambda: dict(w=mx.ones(2)))))
    huge = np.full((2, 3), 3e38, np.float32) # whose sum is too large for float32
    with np.errstate(over='ignore'): assert check_logits(b, huge) is huge
    with pytest.raises(ValueError, match='^m computes logits that are not numbers, though'): check_logits(b, np.array([[1., value, 0.]]))

def test_predictions_that_are_no_numbers_are_not_taken_from_the_disk(models, tmp_path):
    tokens, b = np.arange(2, 18)[None], open_backend(models['llama']/'whole')
    stored = reference(b, tokens, None, tmp_path)
    file = stored.folder/'logits.npy'
    z = np.load(file)
    z[0, 3, 5] = nan
    np.save(file, z)
    with pytest.raises(ValueError, match='remove it'): score_against(reference(b, tokens, None, tmp_path), b, tokens)

@pytest.mark.parametrize('damage', [lambda b: b[:-9], lambda b: b'', lambda b: b'hello'])
def test_damaged_predictions_are_named_with_the_remedy(models, tmp_path, damage):
    tokens, b = np.arange(2, 18)[None], open_backend(models['llama']/'whole')
    folder = reference(b, tokens, 4, tmp_path).folder
    for file in sorted(folder.glob('[a-z]*.*')): # not the list of them
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        with pytest.raises(ValueError, match=f'^{folder} holds a damaged .*; remove the folder') as e: reference(b, tokens, 4, tmp_path)
        assert '\n' not in str(e.value)
        file.write_bytes(whole)
    assert reference(b, tokens, 4, tmp_path).perplexity > 1

def test_items_that_are_no_numbers():
    for f in (lambda: mean_figure('kl', [1., nan]), lambda: _paired([1., 2.], [nan, 2.])):
        with pytest.raises(ValueError, match='not a number'): f()

def test_one_item_shows_no_difference():
    rows = [dict(name=n) | mean_figure('margin', [x], 'same') for n, x in (('a', 1.), ('b', 2.))]
    assert rows[0]['margin_se'] is None and rows[0]['margin_low'] is None
    found = Report.compare(*(Report([r]) for r in rows))
    assert found.verdicts['margin']['winner'] is None and 'nan' not in repr(found)
    assert json.dumps(found.rows, allow_nan=False)
