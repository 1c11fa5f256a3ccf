"Sensitivities of keys and values: sweep, allocation, and the whole road"
import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from optiq.backends.mlx import MLXBackend
from optiq.backends.torch import TorchBackend
from optiq.evals.perplexity import overrides_of
from optiq.formats import Format, parse_format, quantize_dequantize
from optiq.knapsack import allocate
from optiq.kv.cache import _mixed_bytes, generate_with_mixed_kv, memory_table, mixed_caches, use_kv_config
from optiq.kv.config import STATISTICS, kv_config, read_kv_config
from optiq.kv.layout import KVLayer, KVLayout, kv_layout
from optiq.kv.precondition import rotates
from optiq.kv.sweep import at_context, _combine, joint_plan, kv_sweep
from optiq.material.tiny import tiny
from optiq.measure.sweep import Sweep
from optiq.models import Checkpoint
from optiq.pipeline import optimize
from optiq.job import _Job
from optiq.request import Cache, Caps, Texts
from optiq.plan import uniform
from optiq.sensitivity import kl_sweep

# Sweep and allocation

@pytest.fixture(scope='module')
def sweep(backend, tokens): return kv_sweep(backend, tokens, [3, 4, 8], context=64, progress=False)

@pytest.mark.parametrize('dim, advice', [(96, 'groups of 32, such as 4g32'), (80, 'multiple of 32')])
def test_heads_that_no_candidate_fits_are_told_before_anything_is_measured(dim, advice, tmp_path, monkeypatch):
    model = tiny('qwen3', tmp_path/'m', shape=dict(num_hidden_layers=1, head_dim=dim))
    monkeypatch.setattr(_Job, 'open', None)
    for options in (dict(weights=None), dict(caps=Caps(max_bytes=2**22, context=64))):
        with pytest.raises(ValueError, match=f'cache.0.keys.*{dim} wide.*{advice}'): optimize(str(model), cache=Cache(), **options)

def test_replay_equals_plain_passes(backend, sweep, tokens):
    from optiq.measure.kl import kl_divergence
    z = backend.logits(tokens)
    for path, f in list(sweep.values)[::4]:
        got = kl_divergence(backend.xp, z, backend.logits(tokens, {path: partial(quantize_dequantize, fmt=f)})).mean().item()
        assert got == pytest.approx(sweep.kl(path, f), rel=1e-3, abs=1e-9)

def test_backends_agree_and_the_cache_does_what_was_scored(backend, folder, tokens, sweep):
    plan = allocate(sweep, target_bpw=4)
    m, model = MLXBackend(backend.checkpoint), Checkpoint(folder).load()
    x, y = backend.numpy(backend.logits(tokens, overrides_of(plan))), m.numpy(m.logits(tokens, overrides_of(plan)))
    formats = read_kv_config(kv_config(plan, kv_layout(model)), model)
    z = np.array(model(mx.array(tokens), cache=mixed_caches(model, formats)))
    assert abs(x-y).max() < 1e-3 and abs(y-z).max() < 1e-4 and abs(z-m.numpy(m.logits(tokens))).max() > 1e-2

def test_mlx_sweep_equals_torch_sweep(backend, sweep, tokens):
    other = kv_sweep(MLXBackend(backend.checkpoint), tokens, [3], progress=False)
    for (p, f), v in other.values.items(): assert v == pytest.approx(sweep.values[p, f], rel=.02, abs=1e-7)

def test_hooks_leave_nothing_behind(backend, tokens):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table
    before, fused, z = table['sdpa'], mx.fast.scaled_dot_product_attention, backend.numpy(backend.logits(tokens))
    with pytest.raises(RuntimeError), backend.swapped({'cache.0.keys': lambda k: k*0}): raise RuntimeError
    m = MLXBackend(backend.checkpoint)
    blocks = m.model.layers
    with pytest.raises(RuntimeError), m.swapped({'cache.0.keys': lambda k: k*0}): raise RuntimeError
    assert table['sdpa'] is before and mx.fast.scaled_dot_product_attention is fused and m.model.layers is blocks
    assert (backend.numpy(backend.logits(tokens)) == z).all()

def test_a_sweep_resumes_and_refuses_another(backend, tokens, tmp_path, sweep):
    out = tmp_path/'kv.jsonl'
    first = kv_sweep(backend, tokens, [4], out=out, progress=False)
    out.write_bytes(out.read_bytes()[:-300])
    again = kv_sweep(backend, tokens, [4], out=out, progress=False)
    assert all((first.values[k] == again.values[k]).all() for k in first.values)
    with pytest.raises(ValueError, match='measured on something else: .*units'): kl_sweep(backend, tokens, [4], out=out, progress=False,
        rounding='minmax')
    with pytest.raises(ValueError, match='measured on something else: weights'):
        kv_sweep(backend, tokens, [4], weights=uniform(backend.checkpoint, 4), out=out, progress=False)
    sweep.save(tmp_path/'s.json')
    back = at_context(Sweep.load(tmp_path/'s.json'), 7)
    assert back.units == kv_layout(backend.checkpoint, 7).units and set(back.values) == set(sweep.values)

def test_quantized_weights_are_in_place_during_the_sweep(backend, tokens, sweep):
    weights = uniform(backend.checkpoint, '3g32')
    on_quantized = kv_sweep(backend, tokens, [3], weights=weights, progress=False)
    with backend.swapped(overrides_of(weights)): z = backend.logits(tokens)
    key = ('cache.1.keys', Format(3))
    change = overrides_of(weights) | {key[0]: partial(quantize_dequantize, fmt=key[1])}
    from optiq.measure.kl import kl_divergence
    want = kl_divergence(backend.xp, z, backend.logits(tokens, change)).mean().item()
    assert on_quantized.kl(*key) == pytest.approx(want, rel=1e-3) and on_quantized.kl(*key) != pytest.approx(sweep.kl(*key), rel=1e-3)

def test_a_token_alone_attends_to_itself(backend, tokens):
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='keys changed nothing: a token alone .*`seq_len`'):
        kv_sweep(backend, tokens[:, :1], [3], progress=False)

def test_a_perturbation_that_never_arrives_is_refused(backend, tokens, monkeypatch):
    from contextlib import nullcontext
    monkeypatch.setattr(TorchBackend, 'attention', lambda self, changes: nullcontext())
    with pytest.raises(ValueError, match='nothing'): kv_sweep(backend, tokens, [3], progress=False)

@settings(max_examples=20, deadline=None)
@given(st.floats(3, 8))
def test_allocation_holds_its_cap(sweep, bits):
    apart, tied = allocate(sweep, target_bpw=bits), allocate(sweep, target_bpw=bits, tie='cache')
    assert apart.nominal_bpw <= bits+1e-9 and apart.predicted_kl <= tied.predicted_kl+1e-12
    assert all(tied[f'cache.{i}.keys'] == tied[f'cache.{i}.values'] for i in range(3))

def test_bytes_at_a_context(sweep):
    at = at_context(sweep, 4096)
    plan = allocate(at, max_bytes=uniform(at, 4).nbytes)
    formats = read_kv_config(kv_config(plan, KVLayout(tuple(KVLayer(**l) for l in at.header['layers']), context=4096)))
    assert _mixed_bytes(kv_layout_of(at), formats, 4096) == plan.nbytes <= uniform(at, 4).nbytes

def kv_layout_of(sweep): return KVLayout(tuple(KVLayer(**l) for l in sweep.header['layers']), sweep.header['model'], sweep.header['context'])

def test_memory_is_what_was_said(sweep):
    plan = allocate(sweep, target_bpw=4)
    layout = kv_layout_of(sweep)
    rows = memory_table(layout, read_kv_config(kv_config(plan, layout)), (256, 1024))
    assert rows[1]['bytes'] == 4*rows[0]['bytes'] and rows[0]['fp16_bytes'] == KVLayout(layout.layers, context=256).nbytes
    assert rows[0]['bytes'] == 4*plan.nbytes # planned at 64 tokens

# The whole road

def test_one_allocation_over_weights_and_cache(backend, tokens):
    joint = joint_plan(backend, tokens, 1.5*2**20, 512, [3, 8], [3, 8], progress=False)
    assert joint['weights'].nbytes+joint['cache'].nbytes <= 1.5*2**20
    smaller = _combine(joint['weight_sweep'], joint['cache_sweep'])
    assert allocate(smaller, max_bytes=1.4*2**20).predicted_kl >= allocate(smaller, max_bytes=1.5*2**20).predicted_kl
    few = kl_sweep(backend, tokens[:1], [4], progress=False, rounding='minmax')
    with pytest.raises(ValueError, match='different numbers of sequences'): _combine(few, joint['cache_sweep'])

def test_files_of_a_run(folder, text, tmp_path):
    options = dict(weights=None, cache=Cache([4, 8]), texts=Texts(text, n_calibration=2, seq_len=32, n_evaluation=2), backend='torch')
    result = optimize(str(folder), tmp_path/'kv', Caps(target_bpw=5., context=256), **options)
    assert {'kv_config.json', 'sweep.json', 'plan.json', 'table.txt'} <= {f.name for f in (tmp_path/'kv').iterdir()}
    assert not (tmp_path/'kv.sweep.jsonl').exists() and result['plan'].nominal_bpw <= 5
    json.dumps(result['figures'])
    assert read_kv_config(tmp_path/'kv'/'kv_config.json', Checkpoint(folder).load())
    with pytest.raises(FileExistsError, match='or `overwrite` it'): optimize(str(folder), tmp_path/'kv', **options)
    with pytest.raises(ValueError, match='below the smallest possible, 4.00 bits'): optimize(str(folder), caps=Caps(target_bpw=3.), **options)
    assert optimize(str(folder), caps=Caps(max_bytes=3*10**5, context=256), **options)['plan'].nbytes <= 3*10**5

def test_a_model_and_its_cache(folder, text, tmp_path):
    result = optimize(str(folder), tmp_path/'m', Caps(max_bytes=1.5*2**20, context=512), cache=Cache(), backend='torch',
                      texts=Texts(text, n_calibration=2, seq_len=32, n_evaluation=2))
    assert result['figures']['bytes'] <= 1.5*2**20 and json.dumps(result['figures']) and result['weights'].rounding == 'search'
    saved = Checkpoint(tmp_path/'m')
    assert read_kv_config(tmp_path/'m'/'kv_config.json', saved.load()) and (tmp_path/'m'/'optiq'/'kv_sweep.json').exists()
    assert kv_sweep(TorchBackend(saved), np.arange(20, 52)[None], [3], progress=False).values

# Rotated candidates and the statistics that come with them

@pytest.fixture(scope='module')
def rotated(folder, text, tmp_path_factory):
    "A run of the command line with rotated and affine candidates"
    from click.testing import CliRunner
    from optiq.cli import main
    out = tmp_path_factory.mktemp('rotated')/'kv'
    r = CliRunner().invoke(main, ['kv-cache', str(folder), '--formats', 'tq2,tq4,8g64', '--target-bits', '4', '--calibration', text,
        '--n-samples', '2', '--seq-len', '32', '--eval-samples', '2', '--context', '256', '--backend', 'torch', '-o', str(out), '--json'])
    assert r.exit_code == 0, r.output
    return out, json.loads(r.stdout.splitlines()[-1])

def test_statistics_are_stored_with_the_config_and_used(rotated, folder, text):
    from optiq.calibration import passages, token_batch
    from optiq.kv.precondition import key_statistics, load_preconditions, preconditioned
    from optiq.kv.rotated import TurboQuantKVCache, turbo_cache
    out, figures = rotated
    names = {f'cache.{r["layer"]}.{k}' for r in figures['layers'] for k in ('keys', 'values') if r[k].startswith('tq')}
    assert names and json.loads((out/'kv_config.json').read_text())['statistics'] == STATISTICS
    assert set(load_preconditions(out/STATISTICS)) == names == set(figures['statistics'])
    c = Checkpoint(folder)
    tokens = token_batch(passages(text, 'train'), c.tokenizer, 2, 32)
    b, model = TorchBackend(c), c.load()
    stats = key_statistics(b, tokens)
    found = read_kv_config(out/'kv_config.json', model)
    for i, pair in found.items():
        for f, kind in zip(pair, ('keys', 'values')):
            assert getattr(f, 'precondition', None) == (stats[f'cache.{i}.{kind}'] if rotates(f) else None)
    made = mixed_caches(model, found)
    assert {type(x) for x in made} == {TurboQuantKVCache} and [x.formats for x in made] == list(found.values())
    assert [x.formats for x in turbo_cache(model, kv_config=out/'kv_config.json')] == list(found.values())
    with preconditioned(b, stats): # what was scored is what the cache does; a border between codes may fall to either side
        plan = {f'cache.{i}.{k}': f for i, p in found.items() for k, f in zip(('keys', 'values'), p)}
        want = b.numpy(b.logits(tokens[:1], overrides_of(plan)))
    got, plain = (np.array(model(mx.array(tokens[:1]), cache=mixed_caches(model, f))) for f in (found, {}))
    assert abs(got-want).mean() < .1*abs(plain-want).mean()

def test_prompt_files_keep_the_statistics(rotated, folder, tmp_path):
    model, ids = Checkpoint(folder).load(), mx.array(np.arange(20, 60))[None]
    caches = use_kv_config(model, rotated[0]/'kv_config.json').make_cache()
    model(ids, cache=caches)
    save_prompt_cache(str(tmp_path/'p.safetensors'), caches)
    loaded = load_prompt_cache(str(tmp_path/'p.safetensors'))
    assert [x.formats for x in loaded] == [x.formats for x in caches]
    assert abs(model(ids[:, :3], cache=loaded)-model(ids[:, :3], cache=caches)).max() == 0
    assert caches[0].merge([caches[0], caches[0]]).extract(1).formats == caches[0].formats

@pytest.mark.parametrize('change, message', [
    (lambda d: (d/STATISTICS).unlink(), 'key_statistics.safetensors, which is not beside it'),
    (lambda d: mx.save_safetensors(str(d/STATISTICS), {'x': mx.zeros(1)}), 'holds no key statistics'),
    (lambda d: kv_statistics(d, 3), r"statistics of layer 0's keys have shape \(3, 1, 64\), not \(2, 1, 128\)")])
def test_statistics_that_do_not_fit(rotated, folder, tmp_path, change, message):
    import shutil
    d = shutil.copytree(rotated[0], tmp_path/'kv')
    change(d)
    with pytest.raises(ValueError, match=message): read_kv_config(d/'kv_config.json', Checkpoint(folder).load())

def kv_statistics(d, heads):
    from optiq.kv.precondition import KeyPrecondition, save_preconditions
    save_preconditions({'cache.0.keys': KeyPrecondition(*np.ones((2, heads, 1, 64), np.float32))}, d/STATISTICS)

def test_a_config_without_its_file_says_so(rotated):
    d = json.loads((rotated[0]/'kv_config.json').read_text())
    with pytest.raises(ValueError, match='this kv_config was made with the statistics of'): read_kv_config(d)

def test_statistics_are_part_of_a_sweeps_fingerprint(backend, tokens, tmp_path):
    from optiq.kv.precondition import key_statistics, preconditioned
    assert backend.statistics is None
    kv_sweep(backend, tokens, ['tq3'], out=tmp_path/'s.jsonl', progress=False)
    with preconditioned(backend, key_statistics(backend, tokens)):
        with pytest.raises(ValueError, match='statistics'): kv_sweep(backend, tokens, ['tq3'], out=tmp_path/'s.jsonl', progress=False)
        a = evaluate_(backend, tokens, '4g64')
    assert backend.statistics is None and a == evaluate_(backend, tokens, '4g64') # affine formats have no use for them

def evaluate_(b, tokens, f):
    return b.numpy(b.logits(tokens, overrides_of({'cache.0.keys': parse_format(f)}))).tolist()

def test_a_model_and_its_rotated_cache(folder, text, tmp_path):
    optimize(str(folder), tmp_path/'m', Caps(max_bytes=1.2*2**20, context=512), cache=Cache(['tq3', 'tq4']), backend='torch',
             texts=Texts(text, n_calibration=2, seq_len=32, n_evaluation=2))
    model, where = Checkpoint(tmp_path/'m').load(), tmp_path/'m'/'kv_config.json'
    found = read_kv_config(where, model)
    assert len(found) == 3 and all(f.precondition is not None for pair in found.values() for f in pair)
    assert (tmp_path/'m'/'optiq'/STATISTICS).is_file() and not list((tmp_path/'m').glob('key*'))
    model(mx.array([[3, 4, 5]]), cache=mixed_caches(model, found))

def test_generation_and_server_take_the_statistics(rotated, folder):
    from mlx_lm import generate, load
    from optiq.serve import _find_config
    from optiq.kv.rotated import turbo_cache
    file = _find_config(Checkpoint(folder).folder, rotated[0]/'kv_config.json')
    model, tokenizer = load(str(folder))
    text = generate_with_mixed_kv(model, tokenizer, [30, 31, 32], kv_config=file, max_tokens=12)
    assert text and text == generate(model, tokenizer, [30, 31, 32], prompt_cache=turbo_cache(model, kv_config=file), max_tokens=12)
    served = use_kv_config(model, file).make_cache() # what the server's provider calls
    assert [c.formats for c in served] == list(read_kv_config(file).values())
    assert any(getattr(f, 'precondition', None) for c in served for f in c.formats)
