"Latency: what a token reads, what is learned from one point, and what a speed costs; no test depends on how fast this machine is"
import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from mlx.utils import tree_flatten

import optiq.chips as L
from optiq.formats import AS_IS, Format
from optiq.knapsack import allocate
from optiq.plan import uniform
from optiq.chips import Speed, load_chip, measure_plan, save_chip, _stand_in
from optiq.latency import Speeds, calibrate, compare_speeds, latency, predict_speeds, speed_frontier, _speed_range
from optiq.roofline import _BANDWIDTH, CHIPS, Chip, Latency, _active_shape, _cache_reads, chip_named, _experts_per_token
from optiq.roofline import _interpolate, reads_of, skeleton
from optiq.models import Checkpoint
from optiq.units import Unit
from optiq.measure.sweep import Sweep
from optiq.material.configs import _CONFIGS, hub_config
from optiq.material.tiny import tiny

@pytest.fixture(scope='module')
def demo(): return Checkpoint('demo')

@pytest.fixture(scope='module')
def reads(demo): return reads_of(demo.load(), demo.config)

def made_up(units, bits=(3, 4, 6, 8), seed=0, other=1000):
    "A sweep in which wider is better"
    rng, fmts = np.random.default_rng(seed), [Format(b, 64) for b in bits]
    scale = {u.path: np.exp(rng.normal(-5, 1)) for u in units}
    values = {(u.path, f): scale[u.path]*4.**-f.bits*np.exp(rng.normal(0, .1, 4)) for u in units for f in fmts}
    return Sweep(units, fmts, values, dict(model='made up', params=sum(u.params for u in units), other_bytes=other))

# what a token reads

def test_a_tied_embedding_is_read_whole_and_an_untied_one_row_by_row():
    for tie in (True, False):
        config = hub_config('qwen3', dict(tie_word_embeddings=tie))
        r = reads_of(skeleton(config), config)
        assert r.active['model.embed_tokens'] == ((512, 128) if tie else (1, 128))
        assert ('lm_head' in r.active) != tie

def test_experts_count_as_often_as_they_are_visited():
    config = hub_config('qwen3_moe')
    r = reads_of(skeleton(config), config)
    u = next(u for u in r.units if u.kind == 'experts.up_proj')
    assert u.shape == (8, 128, 128) and r.active[u.path] == (2*128, 128)
    assert r.nbytes(u, Format(4, 64)) == u.nbytes(Format(4, 64))*2//8
    assert _experts_per_token(dict(text_config=dict(moe_topk=6))) == 6
    with pytest.raises(ValueError, match='does not say how many experts'): _experts_per_token(dict(model_type='x'))

@pytest.mark.parametrize('path', ['vision_tower.blocks.0.attn.qkv', 'model.visual.blocks.1.mlp.fc1', 'audio_tower.layers.0.fc1',
                                  'multi_modal_projector.linear_1', 'thinker.audio_tower.proj1'])
def test_towers_are_not_read(path):
    assert _active_shape(Unit(path, 'fc1', (64, 128), None), None, {}) == (0, 128)

def test_blocks_of_the_language_model_are_no_tower(reads):
    assert all(rows > 0 for rows, _ in reads.active.values())
    assert _active_shape(Unit('language_model.model.layers.0.mlp.up_proj', 'up_proj', (64, 128), 0), None, {}) == (64, 128)

def test_total_is_what_is_stored_if_everything_is_read(demo, reads):
    assert reads.total(demo.formats) == sum(a.nbytes for _, a in tree_flatten(demo.load().parameters()))

def test_the_cache_is_what_a_run_leaves(demo):
    from mlx_lm.models.cache import make_prompt_cache
    model = demo.load()
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, 7), mx.int32), cache=cache))
    kept = sum(x[..., :c.offset, :].nbytes for c in cache for x in c.state[:2])
    assert _cache_reads(model, 7) == kept and _cache_reads(model, 0) == 0

def test_a_window_bounds_the_cache_and_a_state_does_not_grow():
    from mlx_lm.models.cache import KVCache, RotatingKVCache
    class Model:
        def __init__(self, kind): self.layers, self.kind = [None], kind
        def make_cache(self): return [self.kind()]
        def __call__(self, ids, cache):
            x = mx.zeros((1, 2, ids.shape[1], 64), mx.bfloat16)
            cache[0].update_and_fetch(x, x)
    row = 2*2*64*2
    assert _cache_reads(Model(KVCache), 1000) == 1000*row
    window = Model(lambda: RotatingKVCache(max_size=512))
    assert [_cache_reads(window, n) for n in (100, 512, 5000)] == [100*row, 512*row, 512*row]
    config = hub_config('qwen3_5')
    hybrid = skeleton(config) # most of its layers keep a state of fixed size
    assert _cache_reads(hybrid, 0) > 0 and _cache_reads(hybrid, 2000)-_cache_reads(hybrid, 1000) == _cache_reads(hybrid,
                                                                                                                 1000)-_cache_reads(hybrid, 0)

# chips

def test_the_table_has_each_chip_once_and_none_that_was_never_made():
    assert CHIPS.keys() == _BANDWIDTH.keys() and 'M4 Ultra' not in CHIPS
    assert {f'M{i}{s}' for i in range(1, 6) for s in ('', ' Pro', ' Max')} <= CHIPS.keys()
    assert all(c.bandwidth > 0 and not c.measured for c in CHIPS.values())

@pytest.mark.parametrize('name', ['M2 Ultra', 'm2 ultra', 'Apple M2  Ultra'])
def test_a_chip_has_several_spellings(name): assert chip_named(name) is CHIPS['M2 Ultra']

def test_unknown_chips_and_unmeasured_formats_are_refused(demo):
    with pytest.raises(ValueError, match='no chip .M9 Mega. in the table, which has M1, .* optiq measures it'): latency(demo, 'M9 Mega')
    with pytest.raises(ValueError, match='6g64 was not measured on here, which has 4g64'):
        Chip('here', 10, factors={'4g64': 1.}, measured=True).factor(Format(6, 64), (8, 64))
    with pytest.raises(ValueError, match='`context` is -1'): latency(demo, 'M1', context=-1)
    with pytest.raises(ValueError, match='leave out the chip'): predict_speeds(demo, chip='M1', measure=True)

def test_published_factor_of_three_bits():
    assert CHIPS['M1'].factor(Format(3, 64)) == 1.08 and CHIPS['M1'].factor(Format(4, 64)) == CHIPS['M1'].factor('kv') == 1

def test_interpolation_is_exact_at_measured_shapes_and_flat_outside():
    found = [[64, 64, 3.], [64, 256, 2.], [256, 64, 5.], [1024, 1024, 1.]]
    assert [_interpolate(found, (r, w)) for r, w, _ in found] == [f for *_, f in found]
    assert _interpolate(found, (1, 64)) == 3 and _interpolate(found, (9999, 9999)) == 1
    assert 1 < _interpolate(found, (512, 256)) < 5

# the roofline and what is learned

CHIP = st.builds(Chip, st.just('c'), st.floats(1, 5000), st.floats(0, 200), st.floats(0, 500), st.floats(0, 300), st.floats(0, 500))

@settings(max_examples=60, deadline=None)
@given(CHIP, st.floats(1e-3, 100), st.sampled_from([3, 4, 8]))
def test_the_calibration_point_is_exact_and_nothing_becomes_negative(reads, chip, ms, bits):
    lat = Latency(chip, replace(reads, cache=lambda n: 0))
    taught = lat.learn(uniform(reads, bits), ms, name='x')
    assert taught.ms(uniform(reads, bits)) == pytest.approx(ms, rel=1e-6)
    assert taught.overhead > -1e-9 and taught.host > -1e-9 and taught.weights(uniform(reads, bits)) > 0
    assert taught.ms(uniform(reads, 8)) >= taught.ms(uniform(reads, 4))*(1-1e-9)

def test_the_roofline_term_by_term(reads):
    chip = Chip('c', 10, 7, 11, factors={'4g64': 2., 'kv': 3.}, measured=True)
    lat, plan = Latency(chip, reads, context=100), uniform(reads, 4)
    stored = sum(u.nbytes(Format(4, 64)) for u in reads.units)
    want = (2*stored+reads.other_bytes+3*100*10_240)/10e6+(7*10+11)/1e3
    assert lat.ms(plan) == pytest.approx(want) and lat.tps(plan) == pytest.approx(1e3/want)
    assert lat.fixed+sum(lat(u, plan[u.path]) for u in reads.units) == pytest.approx(want)
    assert replace(lat, context=200).ms(plan) > lat.ms(plan)

def test_a_model_that_waits_for_the_cpu_is_as_fast_in_every_format(reads):
    lat = Latency(Chip('c', 1e5, 1, host=100), reads)
    taught = lat.learn(uniform(reads, 4), 1.3, name='x')
    assert taught.ms(uniform(reads, 8)) == taught.ms(uniform(reads, 3)) == pytest.approx(1.3)
    assert taught.chip.dispatch == lat.chip.dispatch # the device was not what it waited for

def test_what_is_learned_carries_over_to_another_depth():
    def of(depth):
        config = hub_config('qwen3', dict(num_hidden_layers=depth))
        return reads_of(skeleton(config), config)
    a, b = of(4), of(8)
    taught = Latency(Chip('c', 100, 5), a).learn(uniform(a, 4), 1., name='x')
    assert Latency(taught.chip, b).overhead == pytest.approx(2*taught.overhead)

# speeds and budgets

@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 99))
def test_a_plan_is_as_fast_as_was_asked(reads, where, seed):
    sweep, lat = made_up(reads.units, seed=seed), Latency(CHIPS['M1'], reads, 100)
    low, high = _speed_range(lat, sweep.formats)
    tps = 1e3/(low+where*(high-low))
    assert lat.tps(allocate(sweep, **lat.budget(tps, sweep.formats), method='lagrange')) >= tps*(1-1e-9)

def test_speeds_out_of_range_name_both_ends(reads):
    lat = Latency(CHIPS['M1'], reads)
    low, high = _speed_range(lat, [Format(4, 64), Format(8, 64)])
    for tps, what in ((1e3/low*1.01, 'out of reach'), (1e3/high*.99, 'slower than every plan')):
        with pytest.raises(ValueError, match=f'{what}: on M1 .* 4g64, 8g64 give {1e3/high:.4g} to {1e3/low:.4g} tok/s'):
            lat.budget(tps, [4, 8])
    for tps in (0, -3, float('nan')):
        with pytest.raises(ValueError, match='`tps` is .*a number above 0'): lat.budget(tps, [4, 8])
    bound = replace(lat, chip=replace(lat.chip, host=1e3))
    with pytest.raises(ValueError, match='the CPU alone takes 10 ms per token'): bound.budget(1e3/low, [4, 8])
    assert bound.budget(100, [4, 8])['max_ms'] == pytest.approx(high)

def test_the_frontier_runs_from_fastest_to_slowest_and_beats_uniform(reads):
    sweep, lat = made_up(reads.units), Latency(CHIPS['M3 Max'], reads)
    front = speed_frontier(sweep, lat, 6)
    speeds, kls = [lat.tps(p) for p in front], [p.predicted_kl for p in front]
    assert speeds == sorted(speeds, reverse=True) and kls == sorted(kls, reverse=True)
    for u in front.baselines:
        best = allocate(sweep, max_ms=lat.ms(u)*(1+1e-12), costs_ms=lat)
        assert best.predicted_kl <= u.predicted_kl*(1+1e-9)

def test_the_calibration_point_is_left_out_of_the_mean(tmp_path, reads):
    lat, plans = Latency(CHIPS['M1'], reads), {p.name: p for p in (uniform(reads, b) for b in (3, 4, 8))}
    lat = lat.learn(plans['uniform 4g64'], 2., name='uniform 4g64')
    measured = {'uniform 4g64': Speed(np.array([500.]), 0), 'uniform 8g64': Speed(np.array([100., 110., 90.]), 0)}
    s = compare_speeds(lat, plans, measured)
    assert s.mean_error == pytest.approx(abs(lat.tps(plans['uniform 8g64'])/100-1))
    assert s.errors().keys() == measured.keys() and '+0.0% *' in repr(s) and '±' in s._repr_html_()
    s.save(tmp_path/'s.json')
    assert repr(Speeds.load(tmp_path/'s.json')) == repr(s)
    assert len(s.to_frame()) == 3
    alone = compare_speeds(lat, plans)
    assert alone.mean_error is None and 'measured' not in repr(alone)

# measuring, and the file it is kept in

def test_random_weights_stand_in_for_every_format(reads, demo):
    fmts = [Format(3, 64), Format(8, 32), Format(4, 32, 'mxfp4'), Format(4, 16, 'nvfp4'), Format(8, 32, 'mxfp8'), AS_IS]
    plan = {u.path: fmts[i % len(fmts)] for i, u in enumerate(reads.units)}
    model = _stand_in(skeleton(demo.config), plan)
    modules = dict(model.named_modules())
    for u in reads.units:
        m = modules[u.path]
        assert sum(m[k].nbytes for k in ('weight', 'scales', 'biases') if k in m) == u.nbytes(plan[u.path])
    z = model(mx.array([[1, 2, 3]]))
    assert np.isfinite(np.array(z.astype(mx.float32))).all()

def test_a_saved_chip_comes_back_and_another_file_is_refused(tmp_path):
    chip = Chip('c', 10, factors={'4g64': [[8, 64, 1.5]], 'kv': 1.}, measured=True)
    save_chip(chip, [dict(name='x')], tmp_path/'a'/'c.json')
    with pytest.warns(UserWarning, match='is not kept, so we measure it again'): save_chip(chip, [], tmp_path/'a'/'c.json'/'d.json')
    assert load_chip(tmp_path/'a'/'c.json') == (chip, [dict(name='x')])
    assert [p.name for p in (tmp_path/'a').iterdir()] == ['c.json']
    for text in ('{"optiq": "chip"', '[]', '{"optiq": "plan"}'):
        (tmp_path/'b.json').write_text(text)
        with pytest.raises(ValueError, match='remove it, and optiq measures the chip again'): load_chip(tmp_path/'b.json')

@pytest.fixture
def instant(monkeypatch):
    "Measurements that take no time: 2 ns per byte, and 5 ms per token"
    calls = []
    def product(fmt, shape, *args, **kw):
        calls.append((str(fmt), tuple(shape)))
        size = L.nbytes(fmt, shape)
        return dict(seconds=1e-6+2e-9*size, nbytes=size, format=str(fmt), shape=list(shape), raw=[])
    monkeypatch.setattr(L, '_measure_product', product)
    monkeypatch.setattr(L, '_measure_overheads', lambda *a, **k: dict(dispatch=10., constant=20., host=5., host_constant=1., raw={}))
    monkeypatch.setattr(L, '_measure_attention', lambda *a: dict(seconds_per_byte=1e-9))
    monkeypatch.setattr(L, '_stream_reads', lambda: SimpleNamespace(nbytes=10**6))
    monkeypatch.setattr(L, '_per_step', lambda *a, **k: dict(seconds=1e-3))
    monkeypatch.setattr(L, '_decode_once', lambda *a: 200.)
    return calls

def test_only_what_is_missing_is_measured(instant, demo, tmp_path):
    lat = latency(demo, formats=[4], folder=tmp_path)
    first, shapes = len(instant), len(lat.reads.shapes())+len(lat.reads.shapes(beside=True))
    assert first == 1+2*shapes and lat.chip.bandwidth == pytest.approx(1) # the empty product, 4g64 and as is
    assert lat.chip.factor(Format(4, 64), (512, 256)) == pytest.approx(2*(1-2304/73728)) # less the empty product
    latency(demo, formats=[4], folder=tmp_path)
    assert len(instant) == first
    latency(demo, formats=[4, 8], folder=tmp_path)
    assert len(instant) == first+shapes and {f for f, _ in instant[first:]} == {'8g64'}
    assert len(list(tmp_path.iterdir())) == 1 and L.version('mlx') in next(tmp_path.iterdir()).name

def test_what_runs_beside_a_longer_product_has_a_price_of_its_own(reads, instant, demo, tmp_path):
    assert {p.rsplit('.', 1)[1] for p in reads.beside}-{'up_proj', 'gate_proj'} == {'k_proj', 'v_proj'} and len(reads.beside) == 3*reads.layers
    lat = latency(demo, formats=[4], folder=tmp_path)
    keys, plan = next(u for u in lat.reads.units if u.kind == 'k_proj'), uniform(lat.reads, 4)
    cheap = replace(lat, chip=replace(lat.chip, beside={'4g64': [[*lat.reads.active[keys.path], .5]]}))
    assert cheap(keys, Format(4, 64)) == pytest.approx(.5*keys.nbytes(Format(4, 64))/lat.chip.bandwidth/1e6)
    assert cheap.device(plan) < lat.device(plan) and cheap.chip.factor(AS_IS, keys.shape, True) == lat.chip.factor(AS_IS, keys.shape)
    old = {k: v for k, v in json.loads(next(tmp_path.iterdir()).read_text())['chip'].items() if k != 'beside'}
    L.write_json(tmp_path/'old.json', dict(optiq='chip', chip=old, points=[dict(name='x')])) # of an earlier version
    assert load_chip(tmp_path/'old.json') == (replace(lat.chip, beside={}), []) # what was learned with its prices is not true of ours

def test_calibration_is_kept_and_replaced(instant, demo, tmp_path, monkeypatch):
    table = predict_speeds(demo, [4, 8], context=16, calibrate_first=True, folder=tmp_path)
    row = next(r for r in table.rows if r.get('calibration'))
    assert row['name'] == 'uniform 4g64' and row['predicted'] == pytest.approx(200)
    again = latency(demo, context=16, formats=[4, 8], folder=tmp_path)
    assert again.point['name'] == 'uniform 4g64' and 'calibrated' in repr(again)
    monkeypatch.setattr(L, '_decode_once', lambda *a: 100.)
    table = predict_speeds(demo, [4, 8], context=16, calibrate_first=True, measure=True, folder=tmp_path)
    assert len(table.errors()) == 3 and table.mean_error > 0
    assert len(json.loads(next(tmp_path.iterdir()).read_text())['points']) == 2
    with pytest.raises(ValueError, match='cannot be calibrated on'):
        calibrate(Latency(CHIPS['M1'], again.reads), None, {}, 'x', tmp_path)

def test_decoding_is_timed_for_real(demo):
    s = measure_plan(demo, uniform(demo, 4), context=2, tokens=2, runs=2, warmup=1)
    assert len(s.runs) == 2 and (s.runs > 0).all() and s.context == 4

@pytest.mark.parametrize('family', ['qwen3', 'gemma3', 'qwen3_5', 'qwen2_vl'])
def test_each_run_goes_on_from_one_prompt(family, tmp_path, monkeypatch):
    "What is read before the clock starts is read once, and a run leaves it as it was"
    model, fed = Checkpoint(tiny(family, tmp_path/'m', dtype='float32')).load(), []
    whole = L.language(model)
    def run(self, ids, *args, whole_run=type(whole).__call__, **options):
        fed.append(ids.shape[1])
        return whole_run(self, ids, *args, **options)
    monkeypatch.setattr(type(whole), '__call__', run)
    cache, ids = L._having_read(model, 40), L._prompt(model, 3)[None]
    assert fed == [39]
    before, after = (L._speaker(model)(ids, cache=deepcopy(cache)) for _ in range(2))
    assert (before == after).all() and L.measure_decode(model, 40, 4, 2, 1).runs.shape == (2,)
    assert fed[3:] == [39]+[1]*(len(fed)-4)

@pytest.mark.parametrize('family', ['gemma3', 'qwen3_moe'])
def test_random_weights_are_those_of_the_model(family, tmp_path):
    "Also where the class of an empty model has a head, and that of an opened one has none"
    c = Checkpoint(tiny(family, tmp_path/'m'))
    model = L.hollow(c, uniform(c, 4))
    assert [u.path for u in L.find_units(model)] == [u.path for u in c.units]
    assert model(mx.zeros((1, 2), mx.int32)).shape == (1, 2, c.vocabulary)

def test_a_model_without_a_list_of_blocks_is_refused(tmp_path):
    with pytest.raises(ValueError, match='no single list of blocks'): latency(str(tiny('whisper', tmp_path/'m')), 'M4')

@pytest.mark.parametrize('family', _CONFIGS)
def test_each_family_is_timed_or_refused_in_one_line(family, tmp_path):
    c = Checkpoint(tiny(family, tmp_path/'m'))
    def timed(): return measure_plan(c, uniform(c, 4), context=2, tokens=2, runs=1, warmup=1)
    if family not in ('qwen3_asr', 'whisper'): assert (timed().runs > 0).all()
    else:
        with pytest.raises(ValueError, match='m cannot be timed, only predicted: .*not supported'): timed()
