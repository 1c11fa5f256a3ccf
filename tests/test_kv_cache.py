"The mixed cache: storage, attention, mlx-lm's protocol and its own generators"
import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, LRUPromptCache, load_prompt_cache, save_prompt_cache, trim_prompt_cache

import optiq.kv.attention as kv
from kv_models import caches_of, run, run_together
from optiq.backends.torch import TorchBackend
from optiq.formats import ALL_FORMATS, AS_IS, FAMILIES, divides, nbytes, parse_format, quantize_dequantize
from optiq.kv.attention import _attend
from optiq.kv.cache import MixedKVCache, generate_with_mixed_kv, mixed_caches, use_kv_config
from optiq.kv.config import kv_config, read_kv_config
from optiq.kv.layout import kv_layout, own_caches
from optiq.kv.sweep import kv_sweep
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import uniform

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
    monkeypatch.setattr(kv, '_AT_ONCE', 1) # one head at a time
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
        class codec(kv._Dense):
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
        monkeypatch.setattr(kv, '_MANY', many)
        assert abs(_attend(q, keys, values, scale=.1)-want).max() < 1e-2
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

@pytest.mark.parametrize('name', ['RotatingMixedKVCache', 'BatchTurboQuantKVCache', 'TurboQuantStateCache'])
def test_a_class_of_another_version_is_refused_in_one_line(tmp_path, name):
    MixedKVCache('4g64', '3g32') # mlx-lm knows our names from the first cache on
    save_prompt_cache(file := str(tmp_path/'f.safetensors'), [type(name, (KVCache,), dict(state=[mx.zeros(3)]))()])
    with pytest.raises(ValueError, match='^this cache was saved by another version.*make it again$'): load_prompt_cache(file)

@pytest.mark.parametrize('state', [(40, '4g64', '3g32'), [[mx.zeros(3)], '4g64', '3g32', 2], ('No', [], ['4g64'], ['3g32'], None, None), [40]])
def test_a_file_of_another_version_is_refused_in_one_line(tmp_path, state):
    class Older(MixedKVCache): state = property(lambda self: given)
    given, Older.__name__, file = state, 'MixedKVCache', str(tmp_path/'o.safetensors')
    save_prompt_cache(file, [Older('4g64', '3g32')])
    with pytest.raises(ValueError, match='^this cache was saved by another version.*make it again$'): load_prompt_cache(file)

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
        assert run_together(model, prompts, 10) == alone
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
    batch = [MixedKVCache.merge([copy.deepcopy(s[i]) for s in singles[:2]]) for i in range(2)]
    last = [MixedKVCache.merge([copy.deepcopy(singles[2][i])]) for i in range(2)]
    for b, l in zip(batch, last): b.extend(l)
    z = model(mx.array([[7]]*3), cache=batch)
    assert all(abs(z[i]-steps[i][0]).max() < 1e-4 for i in range(3))
    for b in batch: assert b.trim(1) == 1
    assert [b.extract(1).offset for b in batch] == [23, 23]
    one = model(mx.array([[7]]), cache=[b.extract(2) for b in batch])
    assert abs(one-steps[2]).max() < 1e-4
    for b in batch: b.filter(mx.array([1, 2]))
    assert batch[0].size() == 23 and batch[0].caches[0].left_padding.tolist() == [0, 18]
    z = model(mx.array([[7]]*2), cache=batch)
    assert all(abs(z[i]-steps[i+1][0]).max() < 1e-4 for i in range(2))
    again = [MixedKVCache.from_state(b.state) for b in batch]
    assert again[0].nbytes == batch[0].nbytes and again[0].caches[0].left_padding.tolist() == [0, 18]

def test_batches_refuse_what_they_cannot_hold():
    k = mx.ones((1, 1, 3, 64))
    a, b = MixedKVCache('4g64', '4g64'), MixedKVCache('4g64', '3g64')
    with pytest.raises(ValueError, match='different formats'): MixedKVCache.merge([a, b])
    a.update_and_fetch(k, k)
    batch = MixedKVCache.merge([a, MixedKVCache('4g64', '4g64')])
    assert batch.caches[0].left_padding.tolist() == [0, 3] and batch.extract(1).empty() is False
    with pytest.raises(ValueError, match='empty BatchKVCache'): batch.prepare(left_padding=[1, 0])
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
