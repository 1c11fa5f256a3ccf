"What is saved is what was measured: one model in two libraries, one rounding on every road, and a check that says when not"
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from optiq.backends.mlx import MLXBackend
from optiq.backends.open import _AGREED, open_backend
from optiq.backends.parts import ReplayBackend
from optiq.backends.stream import StreamingBackend
from optiq.backends.torch import TorchBackend
from optiq.convert import as_saved, convert
from optiq.evals.verify import _expected, verify
from optiq.formats import AS_IS, quantize_minmax
from optiq.knapsack import allocate
from optiq.plan import Plan, check_noise, uniform
from optiq.models import Checkpoint, _said_for_mlx
from optiq.pipeline import optimize
from optiq.request import Caps, Texts, Weights
from optiq.measure.sweep import Sweep
from optiq.sensitivity import kl_sweep
from optiq.material.configs import _CONFIGS, _SILU
from optiq.material.tiny import tiny

OLMO2 = dict(_SILU, architectures=['Olmo2ForCausalLM'], rope_theta=500000., rope_scaling=None, tie_word_embeddings=False)

def changed(folder, change):
    "Rewrite a folder's config.json"
    config = json.loads((folder/'config.json').read_text())
    change(config)
    (folder/'config.json').write_text(json.dumps(config))
    return folder

def as_transformers_5(config):
    "Rope's numbers in `rope_parameters` alone"
    if isinstance(config.get('text_config'), dict): as_transformers_5(config['text_config'])
    if 'rope_theta' not in config: return
    scaling = {{'type': 'rope_type'}.get(k, k): v for k, v in (config.pop('rope_scaling', None) or dict(rope_type='default')).items()}
    rope = dict({k: 'default' if v == 'mrope' else v for k, v in scaling.items()}, rope_theta=config.pop('rope_theta'))
    local = config.pop('rope_local_base_freq', None)
    if local: rope = dict(full_attention=rope, sliding_attention=dict(rope_type='default', rope_theta=local))
    config['rope_parameters'] = rope

def two_heads(folder, same=False):
    "A head of its own in a folder that says that it has none"
    file = next(folder.glob('model*.safetensors'))
    w = mx.load(str(file))
    table = w['model.embed_tokens.weight']
    mx.save_safetensors(str(file), w | {'lm_head.weight': table if same else table[::-1]}, dict(format='pt'))
    return folder

def logits(folder):
    "What anyone's loader computes"
    return np.array(load_model(folder)[0](mx.arange(24)[None]).astype(mx.float32))

# One model in two libraries

@pytest.mark.parametrize('architecture', ['llama', 'mistral', 'olmo2', 'qwen3', 'gemma3'])
def test_rope_is_read_wherever_it_stands(tmp_path, architecture, monkeypatch):
    monkeypatch.setitem(_CONFIGS, 'olmo2', OLMO2)
    old, new = tiny(architecture, tmp_path/'old'), changed(tiny(architecture, tmp_path/'new'), as_transformers_5)
    assert 'rope_theta' not in json.loads((new/'config.json').read_text())
    open_backend(str(new), 'torch') # agrees with MLX
    for f in (old, new): convert(str(f), uniform(Checkpoint(f), 8), tmp_path/f'{f.name}-8')
    np.testing.assert_array_equal(logits(tmp_path/'new-8'), logits(tmp_path/'old-8'))

@pytest.mark.parametrize('architecture', ['qwen2_vl', 'qwen3_vl'])
def test_rope_is_read_in_models_of_several_parts(tmp_path, architecture):
    old, new = tiny(architecture, tmp_path/'old'), changed(tiny(architecture, tmp_path/'new'), as_transformers_5)
    ids = dict(input_ids=np.arange(24)[None])
    z, other = (b.numpy(b.logits(ids)) for b in (ReplayBackend(Checkpoint(f)) for f in (old, new)))
    np.testing.assert_array_equal(z, other)

def test_rope_says_what_transformers_reads():
    assert _said_for_mlx(dict(rope_theta=1, rope_parameters=dict(rope_theta=2.)))['rope_theta'] == 2
    assert 'rope_scaling' not in _said_for_mlx(dict(rope_parameters=dict(rope_theta=2., rope_type='default')))
    inner = _said_for_mlx(dict(thinker_config=dict(text_config=dict(rope_parameters=dict(rope_theta=3., rope_type='yarn', factor=2)))))
    assert inner['thinker_config']['text_config']['rope_scaling'] == dict(rope_type='yarn', type='yarn', factor=2)
    older = dict(rope_theta=1., rope_scaling=dict(rope_type='linear', factor=2), rope_parameters=dict(rope_theta=9.))
    assert _said_for_mlx(older) == older

@pytest.mark.parametrize('name', ['hidden_act', 'hidden_activation'])
def test_an_activation_that_mlx_ignores_is_refused(tmp_path, name):
    folder = changed(tiny('llama' if name == 'hidden_act' else 'gemma3', tmp_path/'m'), lambda c: c.update({name: 'relu'}))
    for _ in range(2): # not only once
        with pytest.raises(ValueError, match=f"logits are ..% apart: {name} is 'relu', which mlx-lm ignores"): open_backend(str(folder), 'torch')
    open_backend(str(folder), 'mlx') # is what will be saved
    with pytest.raises(ValueError, match='ignores'): open_backend(str(folder), 'torch')

def test_two_heads_are_refused_and_one_stored_twice_is_not(tmp_path):
    folder = two_heads(tiny('qwen3', tmp_path/'m'))
    for backend in ('torch', 'mlx', 'stream'):
        with pytest.raises(ValueError, match='lm_head.weight is stored and differs'): open_backend(str(folder), backend)
    with pytest.raises(ValueError, match='lm_head.weight is stored and differs'):
        convert(str(folder), uniform(Checkpoint(folder), 4), tmp_path/'out')
    b = open_backend(str(two_heads(tiny('qwen3', tmp_path/'same'), same=True)), 'torch')
    convert(b, uniform(b.checkpoint, AS_IS), tmp_path/'saved')
    with pytest.raises(ValueError, match='its own forward pass differs'):
        as_saved(b, changed(tmp_path/'saved', lambda c: c.update(rope_theta=1e4)))

def test_models_are_compared_once(tmp_path, monkeypatch):
    folder = tiny('llama', tmp_path/'m')
    open_backend(str(folder), 'torch')
    assert Checkpoint(folder).fingerprint in _AGREED
    monkeypatch.setattr(TorchBackend, 'by_loader', lambda *a: pytest.fail('compared again'))
    open_backend(str(folder), 'torch')

@pytest.mark.parametrize('Backend', [TorchBackend, MLXBackend, StreamingBackend])
def test_ids_beyond_the_embedding_are_refused(tmp_path, Backend):
    b = Backend(Checkpoint(tiny('llama', tmp_path)))
    for odd in (512, 10**6, -1):
        ids = np.array([[1, 2, odd]])
        for verb in (b.embed, b.logits):
            with pytest.raises(ValueError, match=f'has 512 tokens, and id {odd} is not one'): verb(ids)
        with pytest.raises(ValueError, match='another model'): kl_sweep(b, ids, [4], progress=False)

def test_ids_of_samples_too(tmp_path):
    b = ReplayBackend(Checkpoint(tiny('qwen3_vl', tmp_path)))
    with pytest.raises(ValueError, match='is not one of them'): b.logits(dict(input_ids=np.array([[1, 9999]])))

# One rounding

@pytest.fixture(scope='module')
def source(tmp_path_factory): return tiny('qwen3', tmp_path_factory.mktemp('source'), dict(num_hidden_layers=2, max_window_layers=2))

SIZES = dict(n=2, seq_len=32, rounding_n=3)

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    "A calibration file of one's own"
    words, r = [f'word{i}' for i in range(50)], np.random.default_rng(0)
    file = tmp_path_factory.mktemp('text')/'mine.txt'
    file.write_text('\n'.join(' '.join(r.choice(words, 40)) for _ in range(60)))
    return str(file)

@pytest.fixture(scope='module')
def b(source): return open_backend(str(source), 'torch')

@pytest.fixture(scope='module')
def sweep(b, text): return kl_sweep(b, formats=[3, 8], calibration=text, progress=False, **SIZES)

@pytest.fixture(scope='module')
def saved(b, sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')/'m'
    convert(b, allocate(sweep, target_bpw=5), folder, sweep)
    return folder

def tensors(folder): return mx.load(str(folder/'model.safetensors'))

def equal(folder, other):
    x, y = tensors(folder), tensors(other)
    return x.keys() == y.keys() and all(mx.array_equal(x[k], y[k]) for k in x)

def test_python_and_the_command_save_the_same_model(source, sweep, saved, text, tmp_path):
    assert sweep.header['fingerprint']['quantizer'].startswith('search, 3 × 32 tokens')
    r = optimize(str(source), tmp_path/'m', Caps(target_bpw=5), backend='torch',
        weights=Weights([3, 8], verify=False, compare=False, rounding_n=SIZES['rounding_n']),
        texts=Texts(text, n_calibration=SIZES['n'], seq_len=SIZES['seq_len'], n_evaluation=2, eval_len=32))
    assert r['sweep'].header['fingerprint'] == sweep.header['fingerprint'] and r['plan'].made == allocate(sweep, target_bpw=5).made
    assert equal(tmp_path/'m', saved)
    plan, again = Plan.load(saved/'optiq'/'plan.json'), Sweep.load(saved/'optiq'/'sweep.json')
    assert again.learned is None and plan.rounding == 'search' and plan.made['text']['source'] == text
    convert(str(source), plan, tmp_path/'again', again) # what it learned from is read again
    assert equal(tmp_path/'again', saved)
    convert(str(source), plan, tmp_path/'plain', again, quantizer=quantize_minmax)
    assert not equal(tmp_path/'plain', saved)

def test_a_plan_is_not_saved_as_it_was_not_measured(b, sweep, saved, text, tmp_path):
    plan = Plan.load(saved/'optiq'/'plan.json')
    with pytest.raises(ValueError, match='was made for search.* give the sweep'): convert(b, plan, tmp_path/'x')
    other = kl_sweep(b, formats=[3, 8], calibration=text, progress=False, rounding='minmax', **SIZES)
    with pytest.raises(ValueError, match='was made for search.* measured with minmax'): convert(b, plan, tmp_path/'x', other)
    lost = Sweep.load(saved/'optiq'/'sweep.json')
    lost.header['learned'] |= dict(fingerprint='of another text')
    with pytest.raises(ValueError, match='cannot be read again'): convert(b, plan, tmp_path/'x', lost)
    assert not (tmp_path/'x').exists()
    convert(b, uniform(b.checkpoint, 4), tmp_path/'flat') # nothing was measured: MLX's own rule

def test_noise_as_large_as_the_signal_is_refused(sweep):
    loud = Sweep(sweep.units, sweep.formats, sweep.values, sweep.header | dict(noise=.58))
    for f in (check_noise, lambda s: allocate(s, target_bpw=5)):
        with pytest.raises(ValueError, match='left as it is gave a KL of 0.58'): f(loud)
    check_noise(sweep)

# Verified

def rows(found): return {n: (held, seen) for n, held, seen in found.rows}

def test_what_was_measured_is_verified(source, saved, text):
    found = verify(saved, source, text, backend='torch')
    assert found.ok and 'on the calibration tokens' in rows(found)['KL'][1]
    assert rows(found)['reference'][1].endswith('rounded by search') and rows(found)['KL'][0]

def test_another_rounding_is_not(source, sweep, saved, text, tmp_path):
    plan = Plan.load(saved/'optiq'/'plan.json')
    convert(str(source), plan, tmp_path/'m', sweep, quantizer=quantize_minmax)
    found = verify(tmp_path/'m', source, text, backend='torch')
    assert not found.ok and 'made for search, and the tensors were rounded by minmax' in rows(found)['reference'][1]

@pytest.mark.parametrize('how, said', [('theta', 'KL'), ('tied', 'reference'), ('act', 'reference'), ('flag', 'opens')])
def test_another_model_of_the_same_weights_is_not_verified(tmp_path, text, how, said):
    source = tiny('qwen3' if how == 'tied' else 'mistral', tmp_path/'source', dict(num_hidden_layers=2))
    if how == 'theta': changed(source, as_transformers_5)
    b = TorchBackend(Checkpoint(source))
    sweep = kl_sweep(b, formats=[8], calibration=text, progress=False, rounding='minmax', n=2, seq_len=16)
    convert(b, uniform(sweep, 8), tmp_path/'m', sweep)
    assert verify(tmp_path/'m', source, text, backend='torch').ok
    if how == 'theta': changed(tmp_path/'m', lambda c: c.pop('rope_theta')) # as it was saved before
    if how == 'tied': two_heads(source)
    if how == 'act': changed(source, lambda c: c.update(hidden_act='relu'))
    if how == 'flag': changed(tmp_path/'m', lambda c: c.update(tie_word_embeddings=True))
    found = verify(tmp_path/'m', source, text, backend='torch')
    assert not found.ok and 'NOT' in found.verdict
    assert [n for n, held, _ in found.rows if held is False] == [said]

@pytest.mark.parametrize('forecast, measured, fits', [(.0409, .0616, False), (.0409, .0455, True), (.0357, .0345, True),
    (.2637, .5165, True), (.0048, .0045, True), (.0048, .0020, False), (2.2, 9.05, True)])
def test_a_forecast_is_held_to_its_error(sweep, forecast, measured, fits):
    plan = uniform(sweep, 8)
    plan.kl = {p: forecast/len(plan) for p in plan}
    got, low, high = _expected(plan, np.array([measured, measured]), True, None)
    assert got == pytest.approx(forecast) and (low <= measured <= high) == fits
    plan.solver['verified'] = dict(joint_kl=measured) # whole plans that were measured are held to what came out
    got, low, high = _expected(plan, np.array([measured, measured]), True, None)
    assert low <= measured <= high < 1.05*measured
