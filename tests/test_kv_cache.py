"The KV cache: layers, sweep, allocation, config, attention, mlx-lm's protocol and its own generators"
import copy
import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, LRUPromptCache, load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache

import optiq.kv.cache as kv
from optiq.backends.mlx import MLXBackend
from optiq.backends.torch import TorchBackend
from optiq.evals.perplexity import overrides_of
from optiq.formats import ALL_FORMATS, AS_IS, FAMILIES, Format, divides, nbytes, parse_format, quantize_dequantize
from optiq.knapsack import allocate
from optiq.plan import uniform
from optiq.kv.cache import BatchMixedKVCache, MixedKVCache, attend, cache_bytes, generate_with_mixed_kv, memory_table, mixed_caches, use_kv_config
from optiq.kv.config import kv_config, read_kv_config, save_kv_config
from optiq.kv.layout import KVLayer, KVLayout, kv_layers, kv_layout, own_caches
from optiq.kv.sweep import at_context, combine, joint_plan, kv_sweep
from optiq.models import Checkpoint
from optiq.pipeline import Cache, Caps, Job, Texts, Weights, optimize
from optiq.measure.sweep import Sweep
from optiq.sensitivity import kl_sweep
from optiq.material.tiny import tiny

SHAPES = [(64, '4g64', '3g32'), (256, '3g64', '5g128'), (128, '6g64', 'mxfp4'), (96, '2g32', 'as-is')]

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny('qwen3', tmp_path_factory.mktemp('kv')/'m', shape=dict(num_hidden_layers=3), dtype='float32')

@pytest.fixture(scope='module')
def backend(folder): return TorchBackend(Checkpoint(folder))

@pytest.fixture(scope='module')
def tokens(): return np.random.default_rng(0).integers(20, 500, (2, 24)).astype(np.int32)

@pytest.fixture(scope='module')
def sweep(backend, tokens): return kv_sweep(backend, tokens, [3, 4, 8], context=64, progress=False)

@pytest.fixture(scope='module', params=SHAPES, ids=str)
def served(request, tmp_path_factory):
    "A float32 model of a head width, its config, and prompts"
    dim, keys, values = request.param
    shape = dict(num_hidden_layers=2, head_dim=dim)
    model = Checkpoint(tiny('qwen3', tmp_path_factory.mktemp('served')/'m', shape=shape, dtype='float32')).load()
    rows = [dict(layer=l.index, heads=l.heads, key_dim=l.key_dim, value_dim=l.value_dim, keys=keys, values=values) for l in kv_layers(model)]
    config = dict(optiq='kv_config', version=1, model='tiny', layers=rows)
    ids = np.random.default_rng(1).integers(20, 500, 96)
    return model, config, [ids[:n].tolist() for n in (40, 23, 5)], mx.array(ids)[None]

def run(model, prompt, caches, n=10):
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=caches)]

def caches_of(served): return mixed_caches(served[0], read_kv_config(served[1], served[0]))

# What is cached

def test_layers_that_are_left_alone(tmp_path):
    found = {n: kv_layers(Checkpoint(tiny(n, tmp_path/n), model_type='llm').load()) for n in ('gemma3', 'qwen3_5', 'qwen3_moe')}
    assert [bool(l.left) for l in found['gemma3']] == [True, False, True, False]
    assert found['gemma3'][0].window == 16 and found['gemma3'][0].nbytes(1000) == found['gemma3'][0].nbytes(16)
    assert [l.left for l in found['qwen3_5'][:3]] == ['recurrent state']*3 and found['qwen3_5'][3].block == 3
    assert all(l.constant > 0 and l.nbytes(1) == l.nbytes(9999) for l in found['qwen3_5'][:3])
    assert not any(l.left for l in found['qwen3_moe'])

@pytest.mark.parametrize('attention, why', [
    (lambda sdpa: lambda q, k, v, **o: sdpa(q, k+0, v+0, **o), 'attention does not read what it holds (MLA)'),
    (lambda sdpa: lambda q, k, v, **o: sdpa(sdpa(q, k, v, **o), k, v, **o), 'later layers read it too')])
def test_mla_and_shared_caches_are_recognised(folder, monkeypatch, attention, why):
    import mlx_lm.models.qwen3 as qwen3
    model = Checkpoint(folder).load()
    monkeypatch.setattr(qwen3, 'scaled_dot_product_attention', attention(qwen3.scaled_dot_product_attention))
    assert {l.left for l in kv_layers(model)} == {why}
    with pytest.raises(ValueError, match='nothing of this cache can be quantized.*3 layers'): kv_layout(model)

def test_layout_counts_only_what_can_be_quantized(tmp_path):
    c = Checkpoint(tiny('gemma3', tmp_path/'g'))
    layout = kv_layout(c, 1000)
    assert [u.path for u in layout.units] == ['cache.1.keys', 'cache.1.values', 'cache.3.keys', 'cache.3.values']
    assert layout.other_bytes == 2*16*2*256*2 and layout.nbytes == layout.other_bytes+sum(u.nbytes(AS_IS) for u in layout.units)
    assert list(layout.left) == [0, 2]
    with pytest.raises(ValueError, match='context of 0'): kv_layout(c, 0)

def test_what_was_installed_does_not_hide_the_models_own_caches(served):
    model, config, *_ = served
    use_kv_config(use_kv_config(model, config), config)
    assert {type(c).__name__ for c in make_prompt_cache(model)} == {'MixedKVCache'}
    assert {type(c) for c in own_caches(model)} == {KVCache} and not any(l.left for l in kv_layers(model))
    del model.make_cache
    assert {type(c) for c in make_prompt_cache(model)} == {KVCache}

@pytest.mark.parametrize('dim, advice', [(96, 'groups of 32, such as 4g32'), (80, 'multiple of 32')])
def test_heads_that_no_candidate_fits_are_told_before_anything_is_measured(dim, advice, tmp_path, monkeypatch):
    model = tiny('qwen3', tmp_path/'m', shape=dict(num_hidden_layers=1, head_dim=dim))
    monkeypatch.setattr(Job, 'open', None)
    for options in (dict(weights=None), dict(caps=Caps(max_bytes=2**22, context=64))):
        with pytest.raises(ValueError, match=f'cache.0.keys.*{dim} wide.*{advice}'): optimize(str(model), cache=Cache(), **options)

# Sweep and allocation

def test_replay_equals_plain_passes(backend, sweep, tokens):
    from optiq.measure.kl import kl_divergence
    z = backend.logits(tokens)
    for path, f in list(sweep.values)[::4]:
        got = kl_divergence(backend.xp, z, backend.logits(tokens, {path: partial(quantize_dequantize, fmt=f)})).mean().item()
        assert got == pytest.approx(sweep.kl(path, f), rel=1e-3, abs=1e-9)

def test_backends_agree_and_the_cache_does_what_was_scored(backend, folder, tokens, sweep):
    plan = allocate(sweep, target_bits=4)
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

def test_a_perturbation_that_never_arrives_is_refused(backend, tokens, monkeypatch):
    from contextlib import nullcontext
    monkeypatch.setattr(TorchBackend, 'attention', lambda self, changes: nullcontext())
    with pytest.raises(ValueError, match='nothing'): kv_sweep(backend, tokens, [3], progress=False)

@settings(max_examples=20, deadline=None)
@given(st.floats(3, 8))
def test_allocation_holds_its_cap(sweep, bits):
    apart, tied = allocate(sweep, target_bits=bits), allocate(sweep, target_bits=bits, tie='cache')
    assert apart.nominal_bits <= bits+1e-9 and apart.predicted_kl <= tied.predicted_kl+1e-12
    assert all(tied[f'cache.{i}.keys'] == tied[f'cache.{i}.values'] for i in range(3))

def test_bytes_at_a_context(sweep):
    at = at_context(sweep, 4096)
    plan = allocate(at, max_bytes=uniform(at, 4).nbytes)
    formats = read_kv_config(kv_config(plan, KVLayout(tuple(KVLayer(**l) for l in at.header['layers']), context=4096)))
    assert cache_bytes(kv_layout_of(at), formats, 4096) == plan.nbytes <= uniform(at, 4).nbytes

def kv_layout_of(sweep): return KVLayout(tuple(KVLayer(**l) for l in sweep.header['layers']), sweep.header['model'], sweep.header['context'])

# Config

@pytest.mark.parametrize('change, message', [
    (dict(optiq='plan'), 'is no kv_config'), (dict(version=2), 'version 2, and this optiq reads 1'),
    (dict(layers=None), 'layers is null, and should be a list'), (dict(layers=[{}]), r'layers\[0\] lacks layer and heads')])
def test_broken_configs(served, change, message):
    with pytest.raises(ValueError, match=message): read_kv_config(served[1] | change, served[0])

@pytest.mark.parametrize('change, message', [
    (dict(keys='7g64'), "keys is '7g64', and should be a format"), (dict(values='what'), "values is 'what', and should be a format"),
    (dict(heads=17), r'layer 0 has heads and widths \(17'), (dict(layer=5), 'layer'), (dict(key_dim=1), 'heads and widths')])
def test_layers_that_do_not_fit(served, change, message):
    model, config, *_ = served
    rows = [config['layers'][0] | change, *config['layers'][1:]]
    if 'layer' in change: rows, message = rows[1:], 'it has 1 layers, this model has 2'
    with pytest.raises(ValueError, match=message): read_kv_config(config | dict(layers=rows), model)

def test_config_on_disk(served, tmp_path):
    model, config, *_ = served
    save_kv_config(config, tmp_path/'c.json')
    assert json.loads((tmp_path/'c.json').read_text()) == config
    assert read_kv_config(tmp_path/'c.json', model) == read_kv_config(config)
    (tmp_path/'c.json').write_text('{')
    with pytest.raises(ValueError, match='c.json is no kv_config'): read_kv_config(tmp_path/'c.json')

def test_layers_that_cannot_be_quantized_are_refused(tmp_path):
    c = Checkpoint(tiny('gemma3', tmp_path/'g'))
    layout = kv_layout(c, 64)
    config = kv_config(uniform(layout, 4), layout)
    assert config['layers'][0]['left'].startswith('sliding window') and config['layers'][0]['keys'] == 'as-is'
    caches = mixed_caches(c.load(), read_kv_config(config, c.load()))
    assert [type(x).__name__ for x in caches] == ['RotatingKVCache', 'MixedKVCache']*2
    config['layers'][0]['keys'] = '4g64'
    with pytest.raises(ValueError, match='layer 0 cannot be quantized: sliding window'): read_kv_config(config, c.load())

# Storage and attention

@pytest.mark.parametrize('dim', [64, 96, 128, 192, 256])
def test_every_format_stores_what_was_scored(dim):
    for f in (*ALL_FORMATS, AS_IS):
        if not divides(f, (1, dim)): continue
        for dtype in (mx.float32, mx.bfloat16, mx.float16):
            x = mx.random.normal((1, 2, 256, dim)).astype(dtype)
            cache = MixedKVCache(f, f)
            keys, _ = cache.update_and_fetch(x, x)
            assert mx.array_equal(keys.dense(), quantize_dequantize(x, f)) and keys.dense().dtype == dtype
            assert cache.nbytes == 2*nbytes(f, x.shape, x.itemsize), f

@pytest.mark.parametrize('mask', ['none', 'causal', 'bool', 'float', 'per head', 'sinks'])
@pytest.mark.parametrize('L', [1, 5, 40])
def test_attention_equals_dense(mask, L, monkeypatch):
    monkeypatch.setattr(kv, 'AT_ONCE', 1) # one head at a time
    q, (k, v) = mx.random.normal((2, 8, L, 64)), mx.random.normal((2, 2, 4, 50, 64))
    keys, values = MixedKVCache('4g64', '3g32').update_and_fetch(k, v)
    options = dict(causal=dict(mask='causal'), bool=dict(mask=create_causal_mask(L, 50-L, left_padding=mx.array([3, 0]))),
                   float=dict(mask=mx.random.normal((2, 1, L, 50))), sinks=dict(mask='causal', sinks=mx.random.normal((8,))))
    options['per head'] = dict(mask=mx.random.normal((2, 8, L, 50)))
    o = options.get(mask, {})
    want = mx.fast.scaled_dot_product_attention(q, keys.dense(), values.dense(), scale=.125, **o)
    assert abs(mx.fast.scaled_dot_product_attention(q, keys, values, scale=.125, **o)-want).max() < 1e-5

def test_a_family_joins_as_one_row(monkeypatch, tmp_path):
    class Halves:
        "Keeps float16 under another name, negated"
        takes = staticmethod(lambda bits, group: bits == 7 and group is None)
        divides = staticmethod(lambda f, shape: True)
        nbytes = staticmethod(lambda f, shape, itemsize: 2*int(np.prod(shape)))
        quantize_dequantize = staticmethod(
            lambda x, f: -((-x).astype(mx.float16).astype(x.dtype)) if isinstance(x, mx.array) else x.half().to(x.dtype))
        class codec(kv.Dense):
            def encode(self, x): return [-x.astype(mx.float16)]
            def product(self, a, arrays, transpose): return super().product(a, [arrays[0].astype(a.dtype)], transpose)
            def turn(self, q): return -q
            def back(self, out): return -out
    monkeypatch.setitem(FAMILIES, 'halves', Halves)
    f = parse_format('halves7')
    assert str(f) == 'halves7' and parse_format(str(f)) == f and nbytes(f, (4, 80)) == 640
    with pytest.raises(ValueError): parse_format('halves3')
    q, (k, v) = mx.random.normal((1, 4, 3, 80)), mx.random.normal((2, 1, 2, 20, 80))
    keys, values = MixedKVCache(f, f).update_and_fetch(k, v)
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=.1)
    for many in (1, 100):
        monkeypatch.setattr(kv, 'MANY', many)
        assert abs(attend(q, keys, values, scale=.1)-want).max() < 1e-2
    c = Checkpoint(tiny('qwen3', tmp_path/'m', shape=dict(num_hidden_layers=2, head_dim=80)))
    with pytest.raises(ValueError, match='no candidate fits cache.0.keys, 80 wide'): kv_sweep(TorchBackend(c), np.arange(20, 52)[None], [4])
    s = kv_sweep(TorchBackend(c), np.arange(20, 52)[None], [f], progress=False)
    assert len(s.values) == 4

# mlx-lm's protocol

def test_same_logits_however_the_text_comes_in(served):
    model, _, _, ids = served
    def by(step, caches): return mx.concatenate([model(ids[:, t:t+step], cache=caches) for t in range(0, ids.shape[1], step)], 1)
    whole = by(96, caches_of(served))
    for step in (40, 7, 1): assert abs(by(step, caches_of(served))-whole).max() < 1e-4
    assert abs(by(96, own_caches(model))-whole).max() > 1e-2

def test_files_copies_and_trimming(served, tmp_path):
    model, _, prompts, _ = served
    want = run(model, prompts[0], caches_of(served))
    caches = caches_of(served)
    model(mx.array(prompts[0][:-1])[None], cache=caches)
    copied = copy.deepcopy(caches)
    save_prompt_cache(str(tmp_path/'c.safetensors'), caches)
    save_prompt_cache(str(tmp_path/'e.safetensors'), caches_of(served))
    loaded, empty = (load_prompt_cache(str(tmp_path/f'{n}.safetensors')) for n in 'ce')
    assert repr(loaded[0]) == repr(caches[0]) and empty[0].empty() and not loaded[0].empty()
    assert run(model, prompts[0][-1:], loaded) == run(model, prompts[0][-1:], copied) == run(model, prompts[0], empty) == want
    model(mx.array(prompts[1])[None], cache=caches)
    assert trim_prompt_cache(caches, len(prompts[1])) == len(prompts[1])
    assert run(model, prompts[0][-1:], caches) == want
    assert caches[0].trim(10**6) > 0 and caches[0].offset == 0

def test_room_grows_past_a_step(served):
    model, _, _, ids = served
    long = mx.concatenate([ids]*6, 1)
    caches, once = caches_of(served), caches_of(served)
    for t in range(0, 576, 100): z = model(long[:, t:t+100], cache=caches)
    assert abs(model(long, cache=once)[:, -1]-z[:, -1]).max() < 1e-4
    assert caches[0].size() == 576 and not hasattr(caches[0], 'bits') and not hasattr(caches[0], 'to_quantized')

def test_batches_of_unequal_lengths(served):
    model, config, prompts, _ = served
    alone = [run(model, p, caches_of(served)) for p in prompts]
    use_kv_config(model, config)
    try:
        generator, got = BatchGenerator(model, max_tokens=10), {}
        ids = generator.insert(prompts, [10]*3)
        for _ in range(60):
            answer = generator.next()
            for r in answer if isinstance(answer, list) else [x for part in answer for x in part or []]:
                if hasattr(r, 'token'): got.setdefault(r.uid, []).append(r.token)
        assert [got[i] for i in ids] == alone
        tokens = [[int(t) for t, *_ in speculative_generate_step(mx.array(p), model, model, max_tokens=10, num_draft_tokens=3)] for p in prompts]
        assert tokens == alone
    finally: del model.make_cache

def test_merge_filter_extend_extract(served):
    model, _, prompts, _ = served
    def filled(p):
        caches = caches_of(served)
        model(mx.array(p)[None], cache=caches)
        return caches
    singles = [filled(p) for p in prompts]
    steps = [model(mx.array([[7]]), cache=copy.deepcopy(c)) for c in singles]
    batch = [BatchMixedKVCache.merge([copy.deepcopy(s[i]) for s in singles[:2]]) for i in range(2)]
    last = [BatchMixedKVCache.merge([copy.deepcopy(singles[2][i])]) for i in range(2)]
    for b, l in zip(batch, last): b.extend(l)
    z = model(mx.array([[7]]*3), cache=batch)
    assert all(abs(z[i]-steps[i][0]).max() < 1e-4 for i in range(3))
    for b in batch: assert b.trim(1) == 1
    assert [b.extract(1).offset for b in batch] == [23, 23]
    one = model(mx.array([[7]]), cache=[b.extract(2) for b in batch])
    assert abs(one-steps[2]).max() < 1e-4
    for b in batch: b.filter(mx.array([1, 2]))
    assert batch[0].size() == 23 and batch[0].left_padding.tolist() == [0, 18]
    z = model(mx.array([[7]]*2), cache=batch)
    assert all(abs(z[i]-steps[i+1][0]).max() < 1e-4 for i in range(2))
    again = [BatchMixedKVCache.from_state(b.state) for b in batch]
    assert again[0].nbytes == batch[0].nbytes and again[0].left_padding.tolist() == [0, 18]

def test_batches_refuse_what_they_cannot_hold():
    k = mx.ones((1, 1, 3, 64))
    a, b = MixedKVCache('4g64', '4g64'), MixedKVCache('4g64', '3g64')
    with pytest.raises(ValueError, match='different formats'): MixedKVCache.merge([a, b])
    a.update_and_fetch(k, k)
    batch = MixedKVCache.merge([a, MixedKVCache('4g64', '4g64')])
    assert batch.left_padding.tolist() == [0, 3] and batch.extract(1).empty() is False
    with pytest.raises(ValueError, match='empty cache'): batch.prepare(left_padding=[1, 0])
    empty = MixedKVCache.merge([MixedKVCache('4g64', '4g64')]*2)
    assert empty.empty() and empty.offset.tolist() == [0, 0] and empty.extract(0).empty()

def test_prefixes_in_mlx_lms_own_store(served):
    model, _, prompts, _ = served
    caches, store = caches_of(served), LRUPromptCache(max_size=4)
    model(mx.array(prompts[0])[None], cache=caches)
    store.insert_cache('m', prompts[0], caches)
    found, rest = store.fetch_nearest_cache('m', prompts[0][:30]+[3, 4])
    assert rest == [3, 4] and found[0].offset == 30
    assert run(model, rest, found) == run(model, prompts[0][:30]+[3, 4], caches_of(served))

def test_generate(served):
    model, config, prompts, _ = served
    class Tokenizer:
        eos_token_ids, bos_token = set(), None
        def encode(self, s, **_): return [ord(x) % 400+20 for x in s]
    for name in ('prompt_cache', 'kv_bits', 'max_kv_size'):
        with pytest.raises(ValueError, match=f'{name} and kv_config exclude'):
            generate_with_mixed_kv(model, Tokenizer(), 'x', kv_config=config, **{name: 4})

def test_generate_on_the_demo_model():
    from mlx_lm import generate, load
    c = Checkpoint('demo')
    model, tokenizer = load(str(c.folder))
    layout = kv_layout(model)
    config = kv_config(uniform(layout, 8), layout)
    text = generate_with_mixed_kv(model, tokenizer, 'Three boxes', kv_config=config, max_tokens=8)
    same = generate(model, tokenizer, 'Three boxes', prompt_cache=mixed_caches(model, read_kv_config(config)), max_tokens=8)
    assert text == same and text and not hasattr(model, 'make_cache')

# The whole road

def test_memory_is_what_was_said(sweep):
    plan = allocate(sweep, target_bits=4)
    layout = kv_layout_of(sweep)
    rows = memory_table(layout, read_kv_config(kv_config(plan, layout)), (256, 1024))
    assert rows[1]['bytes'] == 4*rows[0]['bytes'] and rows[0]['fp16_bytes'] == KVLayout(layout.layers, context=256).nbytes
    assert rows[0]['bytes'] == 4*plan.nbytes # planned at 64 tokens

def test_one_allocation_over_weights_and_cache(backend, tokens):
    joint = joint_plan(backend, tokens, 1.5*2**20, 512, [3, 8], [3, 8], progress=False)
    assert joint['weights'].nbytes+joint['cache'].nbytes <= 1.5*2**20
    smaller = combine(joint['weight_sweep'], joint['cache_sweep'])
    assert allocate(smaller, max_bytes=1.4*2**20).predicted_kl >= allocate(smaller, max_bytes=1.5*2**20).predicted_kl
    few = kl_sweep(backend, tokens[:1], [4], progress=False, rounding='minmax')
    with pytest.raises(ValueError, match='different numbers of sequences'): combine(few, joint['cache_sweep'])

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp('text')/'t.txt'
    words, r = 'the river was low that summer so the ferry waited until the evening tide'.split(), np.random.default_rng(3)
    file.write_text('\n'.join(' '.join(r.permutation(words*3))+f' {i}' for i in range(60)))
    return str(file)

def test_files_of_a_run(folder, text, tmp_path):
    options = dict(weights=None, cache=Cache([4, 8]), texts=Texts(text, n=2, seq_len=32, eval_n=2), backend='torch')
    result = optimize(str(folder), tmp_path/'kv', Caps(target_bits=5., context=256), **options)
    assert {'kv_config.json', 'sweep.json', 'plan.json', 'table.txt'} <= {f.name for f in (tmp_path/'kv').iterdir()}
    assert not (tmp_path/'kv.sweep.jsonl').exists() and result['plan'].nominal_bits <= 5
    json.dumps(result['figures'])
    assert read_kv_config(tmp_path/'kv'/'kv_config.json', Checkpoint(folder).load())
    with pytest.raises(FileExistsError, match='--overwrite'): optimize(str(folder), tmp_path/'kv', **options)
    with pytest.raises(ValueError, match='below the smallest possible, 4.00 bits'): optimize(str(folder), caps=Caps(target_bits=3.), **options)
    assert optimize(str(folder), caps=Caps(max_bytes=3*10**5, context=256), **options)['plan'].nbytes <= 3*10**5

def test_a_model_and_its_cache(folder, text, tmp_path):
    result = optimize(str(folder), tmp_path/'m', Caps(max_bytes=1.5*2**20, context=512), cache=Cache(), backend='torch',
                      texts=Texts(text, n=2, seq_len=32, eval_n=2))
    assert result['figures']['bytes'] <= 1.5*2**20 and json.dumps(result['figures']) and result['weights'].rounding == 'search'
    saved = Checkpoint(tmp_path/'m')
    assert read_kv_config(tmp_path/'m'/'kv_config.json', saved.load()) and (tmp_path/'m'/'optiq'/'kv_sweep.json').exists()
    assert kv_sweep(TorchBackend(saved), np.arange(20, 52)[None], [3], progress=False).values

def test_several_caches_in_one_entry_are_all_counted(folder, monkeypatch):
    from mlx_lm.models.cache import ArraysCache, CacheList
    import mlx_lm.models.qwen3 as qwen3
    model = Checkpoint(folder).load()
    plain = kv_layers(model)[0]
    class Both(CacheList):
        offset = 0
        def make_mask(self, N, **options): return 'causal'
        def update_and_fetch(self, k, v):
            self.caches[0][0] = mx.zeros((1, 10), mx.bfloat16)
            return [c.update_and_fetch(k, v) for c in self.caches[1:]][0]
    monkeypatch.setattr(qwen3.Model, 'make_cache', lambda self: [Both(ArraysCache(1), KVCache(), KVCache()) for _ in self.layers], raising=False)
    found = kv_layers(model)[0]
    assert 'no plain cache' in found.left and found.nbytes(100) == 2*plain.nbytes(100)+20

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
    assert names and json.loads((out/'kv_config.json').read_text())['statistics'] == kv.STATISTICS
    assert set(load_preconditions(out/kv.STATISTICS)) == names == set(figures['statistics'])
    c = Checkpoint(folder)
    tokens = token_batch(passages(text, 'train'), c.tokenizer, 2, 32)
    b, model = TorchBackend(c), c.load()
    stats = key_statistics(b, tokens)
    found = read_kv_config(out/'kv_config.json', model)
    for i, pair in found.items():
        for f, kind in zip(pair, ('keys', 'values')):
            assert getattr(f, 'precondition', None) == (stats[f'cache.{i}.{kind}'] if kv.rotates(f) else None)
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
    (lambda d: (d/kv.STATISTICS).unlink(), 'key_statistics.safetensors, which is not beside it'),
    (lambda d: mx.save_safetensors(str(d/kv.STATISTICS), {'x': mx.zeros(1)}), 'holds no key statistics'),
    (lambda d: kv_statistics(d, 3), r"statistics of layer 0's keys have shape \(3, 1, 64\), not \(2, 1, 128\)")])
def test_statistics_that_do_not_fit(rotated, folder, tmp_path, change, message):
    import shutil
    d = shutil.copytree(rotated[0], tmp_path/'kv')
    change(d)
    with pytest.raises(ValueError, match=message): read_kv_config(d/'kv_config.json', Checkpoint(folder).load())

def kv_statistics(d, heads):
    from optiq.kv.precondition import KeyPrecondition, save_preconditions
    save_preconditions({'cache.0.keys': KeyPrecondition(*np.ones((2, heads, 1, 64), np.float32))}, d/kv.STATISTICS)

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
             texts=Texts(text, n=2, seq_len=32, eval_n=2))
    model, where = Checkpoint(tmp_path/'m').load(), tmp_path/'m'/'kv_config.json'
    found = read_kv_config(where, model)
    assert len(found) == 3 and all(f.precondition is not None for pair in found.values() for f in pair)
    assert (tmp_path/'m'/'optiq'/kv.STATISTICS).is_file() and not list((tmp_path/'m').glob('key*'))
    model(mx.array([[3, 4, 5]]), cache=mixed_caches(model, found))

def test_generation_and_server_take_the_statistics(rotated, folder):
    from mlx_lm import generate, load
    from optiq.serve import find_config
    from optiq.kv.rotated import turbo_cache
    file = find_config(Checkpoint(folder).folder, rotated[0]/'kv_config.json')
    model, tokenizer = load(str(folder))
    text = generate_with_mixed_kv(model, tokenizer, [30, 31, 32], kv_config=file, max_tokens=12)
    assert text and text == generate(model, tokenizer, [30, 31, 32], prompt_cache=turbo_cache(model, kv_config=file), max_tokens=12)
    served = use_kv_config(model, file).make_cache() # what the server's provider calls
    assert [c.formats for c in served] == list(read_kv_config(file).values())
    assert any(getattr(f, 'precondition', None) for c in served for f in c.formats)
