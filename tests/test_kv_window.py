"Quantized sliding windows: what mlx-lm does with a window as it is, on every road that a cache takes"
import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchRotatingKVCache, KVCache, LRUPromptCache, RotatingKVCache
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache, trim_prompt_cache

from kv_models import run_together
from optiq.formats import AS_IS, nbytes, parse_format
from optiq.kv.cache import MixedKVCache, _mixed_bytes, mixed_caches, use_kv_config
from optiq.kv.config import kv_config, read_kv_config, save_kv_config
from optiq.kv.layout import kv_layout, own_caches
from optiq.kv.rotated import TurboQuantKVCache, turbo_cache
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import uniform

def gemma3(folder): return Checkpoint(tiny('gemma3', folder, dtype='float32')).load()

def gpt_oss(folder):
    "Sinks, experts, and a window in every other layer"
    from mlx_lm.models.gpt_oss import Model, ModelArgs
    mx.random.seed(0)
    model = Model(ModelArgs(num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2, vocab_size=512, hidden_size=64,
        intermediate_size=64, head_dim=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=16))
    for layer in model.layers: layer.self_attn.sinks = mx.random.normal((4,))
    mx.eval(model.parameters())
    return model

@pytest.fixture(scope='module', params=[gemma3, gpt_oss], ids=['gemma3', 'gpt_oss'])
def windowed(request, tmp_path_factory):
    "A model, formats of all its layers, and prompts that end before, at and beyond the end of its window of 16"
    model = request.param(tmp_path_factory.mktemp('w')/'m')
    layout = kv_layout(model, 64)
    formats = read_kv_config(kv_config(uniform(layout, '8g64'), layout), model)
    formats = {i: (k, parse_format('4g32')) for i, (k, _) in formats.items()}
    ids = np.random.default_rng(1).integers(20, 500, 60).tolist()
    return model, formats, [ids[:n] for n in (7, 16, 41)], mx.array(ids)[None]

def caches_of(windowed): return mixed_caches(*windowed[:2])
def run(model, prompt, caches, n=24): return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=caches)]

def test_windows_are_units_counted_up_to_their_end(windowed):
    model, formats, *_ = windowed
    for context in (10, 256):
        layout = kv_layout(model, context)
        assert not layout.left and [u.shape[0] for u in layout.units[:4:2]] == [min(context, 16), context]
        if context < 256: continue # layers that read everything grow by 256 tokens
        plan = {u.path: formats[int(u.path.split('.')[1])][u.kind == 'values'] for u in layout.units}
        assert _mixed_bytes(layout, formats, context) == sum(u.nbytes(plan[u.path]) for u in layout.units)
        assert _mixed_bytes(layout, {}, context) == layout.nbytes == sum(u.nbytes(AS_IS) for u in layout.units)

@pytest.mark.parametrize('keys, values', [('as-is', 'as-is'), ('8g64', '4g64'), ('mxfp4', '5g32'), ('tq3', '8g64')])
def test_a_ring_holds_the_last_tokens(keys, values):
    ours, theirs = MixedKVCache(keys, values, RotatingKVCache(16, keep=2)), RotatingKVCache(16, keep=2)
    x = mx.random.normal((2, 1, 2, 70, 64))
    codec = lambda f, a: MixedKVCache(f, f, RotatingKVCache(100)).update_and_fetch(a, a)[0].dense()
    want = [codec(f, a) for f, a in zip((keys, values), x)] # what a format makes of each token
    for at, n in ((0, 5), (5, 1), (6, 20), (26, 1), (27, 1), (28, 15), (43, 3)) + tuple((46+i, 1) for i in range(16)):
        mine = ours.update_and_fetch(*x[:, :, :, at:at+n])
        held = theirs.update_and_fetch(*(w[:, :, at:at+n] for w in want))
        assert all(mx.allclose(m.dense(), h, atol=2e-2 if 'tq' in keys else 0) for m, h in zip(mine, held))
        assert ours.offset == theirs.offset and ours.size() == theirs.size() and ours.is_trimmable() == theirs.is_trimmable()
    size = sum(nbytes(parse_format(f), (2, 64), 4) for f in (keys, values))
    assert ours.nbytes == 16*size

def test_same_logits_however_the_text_comes_in(windowed):
    model, *_, ids = windowed
    def by(step, caches): return mx.concatenate([model(ids[:, t:t+step], cache=caches) for t in range(0, 60, step)], 1)
    whole = by(60, caches_of(windowed))
    for step in (33, 7, 1): assert abs(by(step, caches_of(windowed))-whole).max() < 1e-3
    assert abs(by(60, own_caches(model))-whole).max() > 1e-2

@pytest.mark.parametrize('n', [7, 16, 41])
def test_files_and_copies_in_the_middle_of_a_window(windowed, n, tmp_path):
    model, *_, ids = windowed
    ids, file = ids[0].tolist(), str(tmp_path/'c.safetensors')
    want = run(model, ids[:n+5], caches_of(windowed))
    caches = caches_of(windowed)
    for t in (ids[:n-3], *([i] for i in ids[n-3:n])): model(mx.array(t)[None], cache=caches) # a prompt, and three single tokens
    copied = copy.deepcopy(caches)
    save_prompt_cache(file, caches)
    assert run(model, ids[n:n+5], load_prompt_cache(file)) == run(model, ids[n:n+5], copied) == want
    save_prompt_cache(file, caches_of(windowed))
    assert run(model, ids[:n+5], load_prompt_cache(file)) == want

def test_trimming_and_prefixes(windowed):
    model, _, prompts, _ = windowed
    caches, store = caches_of(windowed), LRUPromptCache(max_size=4)
    model(mx.array(prompts[0])[None], cache=caches)
    assert trim_prompt_cache(caches, 3) == 3
    assert run(model, prompts[0][-3:], caches) == run(model, prompts[0], caches_of(windowed))
    assert trim_prompt_cache(caches, 3) == 0 # beyond the window, what was written over is gone
    for p in prompts:
        caches = caches_of(windowed)
        model(mx.array(p)[None], cache=caches)
        store.insert_cache('m', p, caches)
        found, rest = store.fetch_nearest_cache('m', p+[3, 4])
        assert rest == [3, 4] and run(model, rest, found) == run(model, p+[3, 4], caches_of(windowed))

def test_batches_of_unequal_lengths(windowed):
    model, formats, prompts, _ = windowed
    alone = [run(model, p, caches_of(windowed)) for p in prompts]
    model.make_cache = lambda: caches_of(windowed)
    try:
        assert run_together(model, prompts, 24) == alone
    finally: del model.make_cache

def test_merge_extend_filter_extract(windowed):
    model, _, prompts, _ = windowed
    def filled(p):
        caches = caches_of(windowed)
        model(mx.array(p)[None], cache=caches)
        return caches
    def token(caches, n=1): return model(mx.array([[7]]*n), cache=caches)
    singles = [filled(p) for p in prompts]
    steps = [[token(c) for _ in range(3)] for c in copy.deepcopy(singles)]
    batch = [type(cs[0]).merge(list(cs)) for cs in zip(*copy.deepcopy(singles[:2]))]
    for b, c in zip(batch, singles[2]): b.extend(type(c).merge([copy.deepcopy(c)]))
    z = token(batch, 3)
    assert all(abs(z[i]-steps[i][0][0]).max() < 1e-3 for i in range(3))
    assert abs(token([b.extract(2) for b in batch])-steps[2][1]).max() < 1e-3
    batch = [type(b).from_state(b.state) for b in batch]
    for b in batch: b.filter(mx.array([0, 2]))
    z = token(batch, 2)
    assert all(abs(z[j]-steps[i][1][0]).max() < 1e-3 for j, i in enumerate((0, 2)))
    assert abs(token([b.extract(0) for b in batch])-steps[0][2]).max() < 1e-3

def test_batches_refuse_what_they_cannot_hold():
    apart = [MixedKVCache(f, f, RotatingKVCache(8)) for f in ('4g64', '8g64')]
    with pytest.raises(ValueError, match='different formats'): MixedKVCache.merge(apart)
    with pytest.raises(ValueError, match='keeps its first 4 tokens'): MixedKVCache.merge([MixedKVCache(like=RotatingKVCache(8, keep=4))])
    empty = MixedKVCache.merge([MixedKVCache(like=RotatingKVCache(8))]*2)
    assert empty.empty() and empty.extract(1).empty() and isinstance(empty.caches[0], BatchRotatingKVCache)

def test_a_config_gives_windows_their_formats(tmp_path):
    c = Checkpoint(tiny('gemma3', tmp_path/'g'))
    layout = kv_layout(c, 64)
    save_kv_config(kv_config(uniform(layout, 4), layout), tmp_path/'c.json')
    model = use_kv_config(c.load(), tmp_path/'c.json')
    assert {type(x) for x in model.make_cache()} == {MixedKVCache}
    assert [type(x.caches[0]) for x in model.make_cache()] == [RotatingKVCache, KVCache]*2
    assert model.make_cache()[0].caches[0].max_size == 16 and '"window": 16' in (tmp_path/'c.json').read_text()

def test_rotated_windows(windowed):
    model, _, prompts, ids = windowed
    for options in (dict(bits=8), dict(bits=8, precondition='prompt')):
        caches = turbo_cache(model, **options)
        assert {type(c) for c in caches} == {TurboQuantKVCache} and [type(c.caches[0]) for c in caches] == [RotatingKVCache, KVCache]*2
        off = abs(model(ids, cache=caches)-model(ids, cache=own_caches(model)))
        assert off.mean() < .05 and all(c.formats[0].precondition != 'prompt' for c in caches)
