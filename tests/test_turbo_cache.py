"The rotated cache inside mlx-lm: exactness, protocol, bytes, and what it refuses"
import copy
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache

from optiq.formats import parse_format
from optiq.plan import uniform
from optiq.kv.attention import _attend, _attend_dense, _attend_packed, codec_of
from optiq.kv.cache import MixedKVCache, _cache_of, use_kv_config
from optiq.kv.config import STATISTICS, kv_config
from optiq.kv.layout import kv_layout, own_caches
from optiq.kv.precondition import KeyPrecondition, load_preconditions, save_preconditions, turned
from optiq.kv.rotated import TurboQuantKVCache, _encode_one, _scaled, _TurboQuantStateCache, turbo_cache
from optiq.kv.rotated import use_turbo_cache
from optiq.turboquant import _round_trip

def small_model(head_dim=64, heads=4, kv_heads=2, layers=2, seed=0):
    "A random Llama whose predictions vary"
    from mlx_lm.models.llama import Model, ModelArgs
    mx.random.seed(seed)
    model = Model(ModelArgs(model_type='llama', hidden_size=64, num_hidden_layers=layers, intermediate_size=64, rms_norm_eps=1e-5,
                            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=96))
    model.update(nn.utils.tree_map(lambda a: a*3 if a.ndim > 1 else a, model.parameters()))
    mx.eval(model.parameters())
    return model

@pytest.fixture(scope='module')
def model(): return small_model()

ids = mx.array(np.random.default_rng(0).integers(0, 96, (1, 50)))

def precondition(heads=2, D=64, seed=0):
    r = np.random.default_rng(seed)
    return KeyPrecondition(r.standard_normal((heads, 1, D)).astype(np.float32), np.exp(r.standard_normal((heads, 1, D))*.3).astype(np.float32))

def filled(D=64, Dv=None, tokens=40, heads=2, seed=0, **options):
    "A cache, what went in, and what attention gets"
    r = np.random.default_rng(seed)
    k, v = (mx.array(r.standard_normal((1, heads, tokens, d)).astype(np.float32)) for d in (D, Dv or D))
    c = TurboQuantKVCache(D, **options)
    return c, k, v, c.update_and_fetch(k, v)

# attention

@pytest.mark.parametrize('D', [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize('bits', [(4, 3), (2, 8), (6, 5)])
def test_attention_equals_attention_with_the_simulated_keys_and_values(D, bits):
    p = precondition(D=D)
    c, k, v, (sk, sv) = filled(D, key_bits=bits[0], value_bits=bits[1], precondition=p)
    kk, vv = _round_trip(k, bits[0], to=p.keys, back=p.undo), _round_trip(v, bits[1])
    for L in (1, 3, 40):
        q = mx.random.normal((1, 6, L, D), key=mx.random.key(L))
        mask = None if L == 1 else 'causal'
        want = mx.fast.scaled_dot_product_attention(q, kk, vv, scale=D**-.5, mask=mask)
        assert abs(_attend(q, sk, sv, scale=D**-.5, mask=mask)-want).max() < 2e-4

@pytest.mark.parametrize('dtype, most', [(mx.float16, 2e-3), (mx.bfloat16, .01)])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_half_precision(dtype, most, bits):
    r = np.random.default_rng(0)
    k, v = (mx.array(r.standard_normal((1, 2, 60, 128))).astype(dtype) for _ in 'kv')
    q = mx.array(r.standard_normal((1, 4, 1, 128))).astype(dtype)
    def out(*qkv):
        q, k, v = qkv
        got = _attend(q, *TurboQuantKVCache(128, bits).update_and_fetch(k, v), scale=.1)
        assert got.dtype == q.dtype
        return np.array(got.astype(mx.float32))
    exact = out(*(x.astype(mx.float32) for x in (q, k, v)))
    assert np.linalg.norm(out(q, k, v)-exact) < most*np.linalg.norm(exact)

def test_both_roads_with_masks_and_sinks():
    c, k, v, (sk, sv) = filled(tokens=40)
    q = mx.random.normal((1, 4, 5, 64), key=mx.random.key(1))
    sinks = mx.array([.5, -1, 2, 0])
    allowed = mx.array(np.random.default_rng(1).random((1, 1, 5, 40)) > .4)
    for mask in (None, 'causal', allowed, mx.where(allowed, 0., -1e9)):
        for s in (None, sinks):
            turned_q = sk.codec.turn(q)
            a, b = (f(turned_q, sk, sv, .125, mask, s) for f in (_attend_packed, _attend_dense))
            assert abs(a-b).max() < 1e-4

def test_spare_room_is_never_seen():
    c, k, v, (sk, sv) = filled(tokens=40)
    assert c.keys[0].shape[2] == 256
    q = mx.random.normal((1, 4, 1, 64))
    before = _attend(q, sk, sv, scale=.125)
    c.keys[0][:, :, 40:], c.keys[1][:, :, 40:], c.values[1][:, :, 40:] = 2**32-1, 1e4, 1e4
    assert mx.array_equal(_attend(q, *c.keys_and_values(), scale=.125), before)

# the model

@pytest.mark.parametrize('D', [64, 80, 128])
@pytest.mark.parametrize('bits', [(4, 4), (3, 2), (8, 8)])
def test_one_pass_equals_token_by_token(D, bits):
    m = small_model(D)
    def by(step):
        caches = turbo_cache(m, key_bits=bits[0], value_bits=bits[1])
        z = mx.concatenate([m(ids[:, t:t+step], cache=caches) for t in range(0, 50, step)], 1)
        return z, caches
    (whole, a), (single, b) = by(50), by(1)
    same = np.array([(np.array(x.keys[0][:, :, :50]) == np.array(y.keys[0][:, :, :50])).mean() for x, y in zip(a, b)])
    assert (same > .98).all() # a coordinate on a border may fall to either side
    if (same == 1).all(): assert abs(whole-single).mean() < 1e-3
    assert abs(whole-m(ids)).max() > 1e-4 # it is on

def test_what_is_compiled_does_the_same():
    "Other tests run as written, since MLX compiles each function with a C++ compiler on a CPU"
    y, shapes = mx.random.normal((1, 2, 1, 64), key=mx.random.key(0)), ((1, 2, 3, 5), (1, 4, 2, 7))
    pairs = [(mx.random.normal(s), mx.random.normal((*s[:2], s[3], 1))) for s in shapes]
    def found(): return [*_encode_one(y, 4), *(_scaled(a, scales) for a, scales in pairs)]
    plain = found()
    mx.enable_compile()
    try: assert all(mx.allclose(a, b, 0, 1e-6) for a, b in zip(plain, found()))
    finally: mx.disable_compile()

def test_fewer_bits_are_farther_off(model):
    far = [abs(model(ids, cache=turbo_cache(model, b))-model(ids)).mean().item() for b in (8, 6, 5, 4, 3, 2)]
    assert far == sorted(far) and far[0] < .1*far[-1]

def test_published_snippet(tmp_path):
    from mlx_lm import load
    from optiq.core.turbo_kv_cache import TurboQuantKVCache
    from optiq.material.tiny import tiny
    model, _ = load(tiny('qwen3_5', f'{tmp_path}/m'))
    model.set_dtype(mx.float32)
    cache = model.make_cache()
    for i, layer in enumerate(model.layers):
        if hasattr(layer, 'self_attn'): cache[i] = TurboQuantKVCache(head_dim=layer.self_attn.head_dim, bits=4, seed=42+i)
    input_ids = mx.random.randint(0, 512, (1, 20))
    logits = model(input_ids, cache=cache)
    assert 0 < abs(logits-model(input_ids)).max() < abs(logits).max()
    assert [type(c).__name__ for c in turbo_cache(model)] == [type(c).__name__ for c in cache]

def test_windows_rotate_too(tmp_path):
    from mlx_lm import load
    from optiq.material.tiny import tiny
    model, _ = load(tiny('gemma3', f'{tmp_path}/m'))
    caches = turbo_cache(model)
    assert [type(c.caches[0]) for c in caches] == [RotatingKVCache, KVCache]*2 and {type(c) for c in caches} == {TurboQuantKVCache}

# protocol

@pytest.mark.parametrize('D, kb, vb', [(64, 4, 3), (128, 3, 2), (256, 3, 3), (96, 6, 5), (64, 2, 8), (576, 4, 4)])
def test_bytes_a_token(D, kb, vb):
    c, *_ = filled(D, tokens=256, heads=3, key_bits=kb, value_bits=vb, precondition=precondition(3, D))
    assert c.nbytes == 256*3*((kb+vb)*D//8+4)

def test_trim_and_replay(model):
    caches = turbo_cache(model)
    want = model(ids[:, :30], cache=caches)[:, -1]
    model(ids[:, 30:40], cache=caches)
    assert [c.trim(11) for c in caches] == [11, 11] and caches[0].size() == 29
    assert abs(model(ids[:, 29:30], cache=caches)[:, -1]-want).max() < 1e-3
    assert caches[0].trim(100) == 30 and caches[0].size() == 0

def test_prompt_files(model, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
    stats = {f'cache.{i}.keys': precondition(seed=i) for i in range(2)}
    caches = turbo_cache(model, 3, precondition=stats, seed=7)
    model(ids[:, :30], cache=caches)
    save_prompt_cache(f'{tmp_path}/p.safetensors', caches)
    loaded = load_prompt_cache(f'{tmp_path}/p.safetensors')
    assert loaded[0].formats == caches[0].formats and loaded[0].formats[0].seed == 7
    assert mx.array_equal(model(ids[:, 30:], cache=loaded), model(ids[:, 30:], cache=caches))

def test_copies_share_statistics_and_nothing_else(model):
    stats = {f'cache.{i}.keys': precondition(seed=i) for i in range(2)}
    caches = turbo_cache(model, precondition=stats)
    model(ids[:, :20], cache=caches)
    other = copy.deepcopy(caches)
    assert other[0].formats[0].precondition is stats['cache.0.keys']
    model(ids[:, 20:30], cache=other)
    assert caches[0].size() == 20 and other[0].size() == 30

def test_batches(model):
    a, b = turbo_cache(model, 3), turbo_cache(model, 3)
    model(ids[:, :40], cache=a), model(ids[:, 10:33], cache=b)
    alone = [model(ids[:, 40:41], cache=copy.deepcopy(c)) for c in (a, b)]
    together = [x.merge([x, y]) for x, y in zip(a, b)]
    assert type(together[0]) is TurboQuantKVCache and type(together[0].caches[0]) is BatchKVCache
    z = model(mx.concatenate([ids[:, 40:41]]*2), cache=together)
    assert abs(z-mx.concatenate(alone)).max() < 1e-3
    one = [c.extract(1) for c in together]
    assert type(one[0]) is TurboQuantKVCache and one[0].size() == 24
    for c in together: c.filter(mx.array([1]))
    x, y = model(ids[:, 41:42], cache=together), model(ids[:, 41:42], cache=one)
    assert abs(x-y).max() < 1e-3

def test_generators(model):
    from mlx_lm.generate import generate_step, speculative_generate_step
    m = small_model(seed=0)
    use_turbo_cache(m, 4)
    def tokens(p): return [int(t) for t, _ in generate_step(mx.array(p), m, max_tokens=12)]
    def drafted(p): return [int(t) for t, *_ in speculative_generate_step(mx.array(p), m, m, max_tokens=12, num_draft_tokens=3)]
    p = ids[0, :9].tolist()
    assert tokens(p) == drafted(p) and type(m.make_cache()[0]) is TurboQuantKVCache
    use_turbo_cache(m, 2) # again: starts from the model's own
    assert m.make_cache()[0].formats[0].bits == 2 and not hasattr(own_caches(m)[0], 'formats')

def test_threads(model):
    def begun():
        caches = turbo_cache(model)
        model(ids[:, :8], cache=caches)
        mx.eval([c.state[:2] for c in caches])
        return caches
    def work():
        with mx.stream(mx.new_stream(mx.cpu)): out.append(np.array(model(ids[:, 8:9], cache=caches)))
    caches, out = begun(), []
    t = threading.Thread(target=work)
    t.start(), t.join()
    here, = out
    assert np.array_equal(here, np.array(model(ids[:, 8:9], cache=begun())))

def test_shared_statistics_may_be_batched_and_those_of_prompts_may_not(model):
    a, b = turbo_cache(model, precondition='prompt'), turbo_cache(model, precondition='prompt')
    model(ids[:, :20], cache=a), model(ids[:, 20:40], cache=b)
    assert a[0].formats[0].precondition is not None
    with pytest.raises(ValueError, match='prompt'): a[0].merge([a[0], b[0]])

# round trips

def stated(c, path): return type(c).from_state(c.state)

def in_a_file(c, path):
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
    save_prompt_cache(f'{path}/p.safetensors', [c])
    return load_prompt_cache(f'{path}/p.safetensors')[0]

def batched(c, path): return c.merge([copy.deepcopy(c), c]).extract(1)

def extended(c, path):
    batch = c.merge([c])
    batch.extend(c.merge([copy.deepcopy(c)]))
    batch.filter(mx.array([1]))
    return type(batch).from_state(batch.state).extract(0)

def remembered(c, path): # as mlx-lm's server does
    from mlx_lm.models.cache import LRUPromptCache
    memory = LRUPromptCache()
    memory.insert_cache('model', [1, 2, 3], [c])
    return memory.fetch_nearest_cache('model', [1, 2, 3, 4])[0][0]

def copied(c, path): return copy.deepcopy(c)

ROADS = [stated, in_a_file, batched, extended, remembered, copied]
MADE = dict(affine=lambda: MixedKVCache('4g64', '3g32'), floats=lambda: MixedKVCache('mxfp8', 'as-is'),
            rotated=lambda: MixedKVCache('tq4', 'tq3'), seeded=lambda: MixedKVCache(turned('tq4', 7, precondition()), '4g64'),
            turbo=lambda: TurboQuantKVCache(64, 3), turbo_seeded=lambda: TurboQuantKVCache(64, 4, seed=7),
            turbo_helped=lambda: TurboQuantKVCache(64, 3, seed=7, precondition=precondition()),
            turbo_pair=lambda: _cache_of(*map(parse_format, ('tq3', '8g64'))),
            turbo_prompt=lambda: TurboQuantKVCache(64, 3, precondition='prompt'),
            window=lambda: MixedKVCache('4g64', '3g32', RotatingKVCache(8)),
            window_rotated=lambda: _cache_of(turned('tq4', 7, precondition()), parse_format('8g64'), 8),
            state=lambda: _TurboQuantStateCache(bits=4), state_seeded=lambda: _TurboQuantStateCache(bits=6, seed=7))

def step(c, seed, tokens=1):
    "What attention, or the recurrence, gets from a cache after some more tokens"
    r = np.random.default_rng(seed)
    k, v, q = (mx.array(r.standard_normal((1, 2, tokens, 64)).astype(np.float32)) for _ in 'kvq')
    if not isinstance(c, _TurboQuantStateCache): return _attend(q, *c.update_and_fetch(k, v), scale=.1, mask='causal' if tokens > 1 else None)
    c[0], c[1] = q[:, :, -1:], k[:, :, -1:]+(0 if c[1] is None else c[1])
    return c[1]

@pytest.mark.parametrize('road', ROADS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('kind', MADE)
@pytest.mark.parametrize('full', [True, False], ids=['full', 'empty'])
def test_a_round_trip_changes_nothing(kind, road, full, tmp_path):
    plain, c = MADE[kind](), MADE[kind]()
    if full: step(plain, 0, 20), step(c, 0, 20)
    elif not hasattr(c, 'merge') and road in (batched, extended): return
    for seed in range(2): # and another turn
        c = road(c, tmp_path)
        assert type(c) is type(plain)
        assert abs(step(c, seed+1, 3-seed)-step(plain, seed+1, 3-seed)).max() < 1e-6
    if 'prompt' in kind: return
    assert getattr(c, 'formats', None) == getattr(MADE[kind](), 'formats', None)
    fresh = MADE[kind]()
    step(fresh, 9, 5)
    both = fresh.merge([fresh, c]) # the two meet in a server's batch
    assert abs(step(both.extract(1), 5)-step(c, 5)).max() < 1e-6

def test_newest_tokens_lie_apart_until_somebody_looks(monkeypatch, tmp_path):
    "As on a GPU, but for the kernel that puts a token behind the newest ones"
    def append(self, other, keys, values, newest, n):
        one = [list(side) for side in self.encode_both(other, keys, values)]
        if n == 0: newest = [[mx.zeros((*a.shape[:2], 64, a.shape[3]), a.dtype) for a in side] for side in one]
        for old, side in zip(newest, one):
            for a, b in zip(old, side): a[:, :, n:n+1] = b
        return newest
    r = np.random.default_rng(0)
    k, v = (mx.array(r.standard_normal((1, 2, 90, 64)).astype(np.float32)) for _ in 'kv')
    def fed(c, *steps):
        for t, n in steps: c.update_and_fetch(k[:, :, t:t+n], v[:, :, t:t+n])
        return c
    singles = [(0, 9), *((t, 1) for t in range(9, 80))]
    plain = fed(TurboQuantKVCache(64, 4), *singles)
    def apart(self, other, newest, n): return [[a[:, :, :n] for a in side] for side in newest]
    for f in (append, apart): monkeypatch.setattr(type(codec_of(turned('tq4'))), f.__name__, f)
    def one(): return fed(TurboQuantKVCache(64, 4), *singles)
    c = one()
    masks = [c.make_mask(n, return_array=False, window_size=None) for n in (1, 3)]
    assert (c.offset, c.held[0].offset, c.newest[1], *masks) == (80, 73, 7, None, 'causal') and c.newest
    def same(c, like, n):
        pairs = [*zip(c.keys, like.keys), *zip(c.values, like.values)]
        return c.size() == n and all(mx.array_equal(a[:, :, :n], b[:, :, :n]) for a, b in pairs)
    assert same(copy.deepcopy(c), plain, 80) and c.newest and c.nbytes == plain.nbytes and not c.newest
    for road in (stated, in_a_file, batched, extended, remembered): assert same(road(one(), tmp_path), plain, 80)
    c = one()
    assert c.trim(5) == 5 and same(fed(c, (75, 1), (76, 8)), fed(plain, (80, 4)), 84)
    for x in (c, plain): x.trim(100)
    assert same(fed(c, (0, 1), (1, 1)), fed(plain, (0, 1), (1, 1)), 2)

def test_the_cache_of_one_text_is_no_batch():
    "mlx-vlm looks for these methods to tell which of the two it has"
    for make in (lambda: MixedKVCache('4g64', '3g32'), lambda: TurboQuantKVCache(64, 3), lambda: MixedKVCache(like=RotatingKVCache(8))):
        one = make()
        for name in ('filter', 'extend', 'extract', 'prepare', 'finalize'): assert not hasattr(one, name) and hasattr(one.merge([one]), name)

def test_what_cannot_be_one_batch(model):
    a, b = TurboQuantKVCache(64, seed=1), TurboQuantKVCache(64, seed=2)
    with pytest.raises(ValueError, match='different formats or statistics'): a.merge([a, b])
    with pytest.raises(ValueError, match='different formats or statistics'): a.merge([a]).extend(b.merge([b]))
    with pytest.raises(ValueError, match='different bits or seeds'): _TurboQuantStateCache.merge([_TurboQuantStateCache(),
        _TurboQuantStateCache(bits=4)])
    waiting = turbo_cache(model, precondition='prompt')[0]
    assert not hasattr(waiting, 'merge') and hasattr(a, 'merge')
    with pytest.raises(ValueError, match='for the cache of one text'): step(MixedKVCache(*waiting.formats, BatchKVCache([0])), 0)

def test_sixteen_clients_on_a_fresh_server(model):
    "Caches that a server remembers beside fresh ones, in the batch generator that it uses"
    from mlx_lm.generate import BatchGenerator
    layout = kv_layout(small_model())
    m = use_kv_config(small_model(), kv_config(uniform(layout, 'tq4'), layout)) # without statistics
    prompts = [ids[0, i:i+5+i % 3].tolist() for i in range(16)]
    generator, left = BatchGenerator(m, max_tokens=2), {}
    known = [type(c).from_state(c.state) for c in m.make_cache()]
    uids = generator.insert(prompts, [2]*16, caches=[known if i % 2 else m.make_cache() for i in range(16)])
    for _ in range(40):
        for r in [x for part in generator.next() for x in part or []]:
            if hasattr(r, 'token'): left[r.uid] = left.get(r.uid, 0)+1
    assert left == dict.fromkeys(uids, 2)

# preconditioning

def test_attention_does_not_see_the_preconditioner():
    "at 8 bits little else is left"
    far = []
    for p in (None, precondition()):
        c, k, v, (sk, sv) = filled(bits=8, precondition=p)
        q = mx.random.normal((1, 4, 1, 64), key=mx.random.key(2))
        far.append(abs(_attend(q, sk, sv, scale=.125)-mx.fast.scaled_dot_product_attention(q, k, v, scale=.125)).max().item())
    assert max(far) < .02

def test_it_repairs_a_bias_and_uneven_channels():
    r = np.random.default_rng(0)
    k = r.standard_normal((500, 2, 64))*np.exp(r.standard_normal(64)*1.5)+60*r.standard_normal((2, 64))
    q = r.standard_normal((500, 4, 64))*np.exp(r.standard_normal(64))
    p, centred = KeyPrecondition.of(k, q), KeyPrecondition.of(k)
    keys = mx.array(k[:100].swapaxes(0, 1)[None].astype(np.float32))
    scores = lambda k: np.einsum('qhd,hkd->hqk', q[:100, ::2], np.array(k)[0])
    def off(**steps):
        e = scores(_round_trip(keys, 3, **steps))-scores(keys)
        return (e-e.mean(-1, keepdims=True)).std() # what softmax sees
    plain, mean, both = off(), off(to=centred.keys, back=centred.undo), off(to=p.keys, back=p.undo)
    assert mean < .3*plain and both < .8*mean

def test_statistics_file(tmp_path, model):
    stats = {f'cache.{i}.keys': precondition(seed=i) for i in range(2)}
    save_preconditions(stats, tmp_path/STATISTICS)
    assert load_preconditions(tmp_path/STATISTICS) == stats
    mx.save_safetensors(f'{tmp_path}/other.safetensors', {'x.mean': mx.zeros(2)})
    with pytest.raises(ValueError, match='no key statistics'): load_preconditions(tmp_path/'other.safetensors')

def test_dead_channels_do_no_harm():
    k, q = np.zeros((10, 1, 64)), np.zeros((10, 2, 64))
    p = KeyPrecondition.of(k, q)
    assert np.isfinite(p.scale).all() and (p.scale > 0).all()

# refusals

@pytest.mark.parametrize('options, what', [(dict(bits=7), 'bits=7'), (dict(bits=1), 'bits=1'), (dict(key_bits=2.5), '2.5'),
                                           (dict(precondition='first'), 'first')])
def test_refusals(options, what):
    with pytest.raises(ValueError, match=what): TurboQuantKVCache(64, **options)

def test_wrong_head_dim():
    with pytest.raises(ValueError, match='head_dim=64.*128 wide'): TurboQuantKVCache(64).update_and_fetch(*mx.zeros((2, 1, 1, 4, 128)))

def test_zero_vectors():
    c = TurboQuantKVCache(64)
    sk, sv = c.update_and_fetch(mx.zeros((1, 1, 3, 64)), mx.zeros((1, 1, 3, 64)))
    assert abs(_attend(mx.ones((1, 2, 1, 64)), sk, sv, scale=1.)).max() == 0

@pytest.mark.parametrize('D', [64, 80])
def test_a_plain_mixed_cache_takes_rotated_formats(D):
    from optiq.kv.cache import MixedKVCache
    r = np.random.default_rng(0)
    k, v, q = (mx.array(r.standard_normal((1, 2, 30, D)).astype(np.float32)) for _ in 'kvq')
    got = _attend(q[:, :, :1], *MixedKVCache('tq4', 'tq3').update_and_fetch(k, v), scale=.1)
    want = mx.fast.scaled_dot_product_attention(q[:, :, :1], _round_trip(k, 4), _round_trip(v, 3), scale=.1)
    assert abs(got-want).max() < 2e-4

# the recurrent state

def test_state_cache(tmp_path):
    from mlx_lm import load
    from mlx_lm.models.cache import ArraysCache, load_prompt_cache, save_prompt_cache
    from optiq.material.tiny import tiny
    model, _ = load(tiny('qwen3_5', f'{tmp_path}/m'))
    model.set_dtype(mx.float32)
    assert not any(isinstance(c, _TurboQuantStateCache) for c in turbo_cache(model))
    def caches(bits): return [_TurboQuantStateCache(bits=bits) if isinstance(c, ArraysCache) else c for c in model.make_cache()]
    x = mx.random.randint(0, 512, (1, 24), key=mx.random.key(0))
    def last(cs):
        for t in range(24): z = model(x[:, t:t+1], cache=cs)
        return z
    exact, c8, c4 = last(model.make_cache()), caches(8), caches(4)
    off = [abs(last(c)-exact).mean().item() for c in (c8, c4)]
    assert 0 < off[0] < off[1]
    save_prompt_cache(f'{tmp_path}/p.safetensors', c8)
    loaded = load_prompt_cache(f'{tmp_path}/p.safetensors')
    assert abs(model(x[:, :1], cache=loaded)-model(x[:, :1], cache=copy.deepcopy(c8))).max() < 1e-5
    merged = [c.merge([c, c]) for c in loaded]
    one = [c.extract(1) for c in merged]
    assert type(one[0]) is _TurboQuantStateCache and mx.array_equal(one[0][1], loaded[0][1])
    plain = ArraysCache(2)
    plain[1] = loaded[0][1]
    assert loaded[0].nbytes-loaded[0][0].nbytes < .3*plain.cache[1].nbytes

@pytest.mark.parametrize('D', [32, 64, 128])
def test_no_product_with_a_single_group(D, monkeypatch):
    "On CUDA such a product is wrong: the same numbers in more groups, or unpacked"
    import optiq.kv.attention as attention
    k, v, q = (mx.random.normal((1, h, n, D), key=mx.random.key(h+n)) for h, n in ((2, 40), (2, 41), (4, 1)))
    pairs = ('tq4', 'tq3'), ('4g32', '4g32'), (f'4g{D}', '8g32')
    caches = [_cache_of(*map(parse_format, pair)) for pair in pairs]
    for c in caches: c.update_and_fetch(k, v[:, :, :40])
    def out(): return [_attend(q, *c.keys_and_values(), scale=.1) for c in caches]
    want, before = out(), mx.quantized_matmul
    def checked(x, w, scales, biases, transpose, **how):
        assert not transpose or scales.shape[-1] > 1
        return before(x, w, scales, biases, transpose=transpose, **how)
    monkeypatch.setattr(attention, 'GROUPS', 2)
    monkeypatch.setattr(mx, 'quantized_matmul', checked)
    for a, b in zip(out(), want): assert abs(a-b).max() < 1e-4
