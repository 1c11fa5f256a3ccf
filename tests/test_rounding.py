"Rounding: packed as MLX packs, no worse than what it replaces, the same in the sweep and in the file"
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
import torch

from optiq.backends.mlx import MLXBackend
from optiq.backends.parts import ReplayBackend
from optiq.backends.stream import StreamingBackend
from optiq.backends.torch import TorchBackend
from optiq.convert import check_saved, convert, overrides_of_saved, stored_bytes
from optiq.evals.perplexity import evaluate
from optiq.families.samples import batch_for
from optiq.formats import AFFINE_BITS, _AFFINE_GROUPS, AS_IS, Format
from optiq.plan import make_plan, uniform
from optiq.models import Checkpoint
from optiq.pipeline import optimize, trade_off
from optiq.request import Caps, Texts, Weights
from optiq.arrays import pack_codes, to_mlx
from optiq.polish import dwq
from optiq.rounding import RoundTrips, round_model, round_to_files
from optiq.aim import aimed, Gap
from optiq.gptq import _compensated, gptq, _gptq_all, _prepared
from optiq.grid import _MinMax
from optiq.gptq import _second_look
from optiq.grid import search
from optiq.statistics import Inputs, Statistics
from optiq.measure.kl import measure, probes
from optiq.sensitivity import kl_sweep, sweep_quantizer
from optiq.material.tiny import tiny
from optiq.refine import _joint_kl, verified

BACKENDS = dict(torch=TorchBackend, mlx=MLXBackend, stream=StreamingBackend)

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    return {a: Checkpoint(tiny(a, root/a)) for a in ('llama', 'qwen3_moe')}

def tokens_for(c, n=2, T=48): return np.random.default_rng(0).integers(0, c.vocabulary, (n, T)).astype(np.int32)

def correlated(n=400, width=128, seed=0):
    "Inputs with strong correlations and very different sizes"
    g = torch.manual_seed(seed)
    x = torch.randn(n, width, generator=g) @ torch.randn(width, width, generator=g)*torch.rand(width, generator=g)**2
    stats = Inputs()
    stats.add(x)
    return stats

def weight(rows=24, width=128, dtype=torch.bfloat16): return torch.randn(rows, width, generator=torch.manual_seed(1)).to(dtype)

def cost(w, r, h):
    d = w.float()-r.dequantize().float()
    return float(((d @ h)*d).sum())

@pytest.mark.parametrize('backend', ['torch', 'mlx'])
@pytest.mark.parametrize('rounding', ['search', 'gptq'])
def test_an_expert_that_no_token_reached(models, rounding, backend):
    c = models['qwen3_moe']
    b, tokens, fmt = BACKENDS[backend](c), tokens_for(c, 1, 2), Format(4, 32) # two tokens, two experts each, of eight
    plan = {u.path: fmt for u in c.units}
    with pytest.warns(UserWarning, match='saw no calibration token'): sweep = kl_sweep(b, tokens, [fmt], rounding=rounding, progress=False)
    assert all(np.isfinite(v).all() for v in sweep.values.values())
    done, path = dict(round_model(b, tokens, plan, rounding)), 'model.layers.0.mlp.switch_mlp.up_proj'
    idle = sweep.header['experts'][0].index(0)
    plain = search(b.unit_weight(path)[idle], fmt)
    assert mx.array_equal(to_mlx(done[path].dequantize()[idle]), to_mlx(plain.dequantize()))

def test_inputs_that_are_all_zero_weigh_alike():
    w, nothing = weight(), Inputs()
    nothing.add(torch.zeros(9, 128))
    assert torch.equal(search(w, Format(3), nothing).dequantize(), search(w, Format(3)).dequantize())

@pytest.mark.parametrize('bits, group', list(product(AFFINE_BITS, _AFFINE_GROUPS)))
def test_codes_are_packed_as_mlx_packs_them(bits, group):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 5, 256))
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        s, b = (mx.random.normal((2, 5, 256//group)).astype(dtype) for _ in range(2))
        got = mx.dequantize(mx.array(pack_codes(codes, bits)), s, b, group, bits)
        want = mx.array(codes).astype(dtype).reshape(2, 5, -1, group)*s[..., None]+b[..., None]
        assert mx.array_equal(got, want.reshape(got.shape))

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('fmt', [Format(2, 32), Format(3, 64), Format(5, 128), Format(6, 64), Format(8, 32), Format(4, 32, 'mxfp4')])
def test_round_trip_is_what_a_loader_computes(dtype, fmt):
    w, stats = weight(dtype=getattr(torch, dtype)), correlated()
    for x, s in ((w, stats), (to_mlx(w), Inputs(to_mlx(stats.moments), stats.count))):
        for r in (search(x, fmt), search(x, fmt, s), gptq(x, fmt, s)):
            t = r.stored()
            opened = mx.dequantize(t['weight'], t['scales'], t.get('biases'), fmt.group_size, fmt.bits, fmt.mode, dtype=getattr(mx, dtype))
            assert mx.array_equal(opened, to_mlx(r.dequantize())) and opened.dtype == getattr(mx, dtype)

@pytest.mark.parametrize('bits', AFFINE_BITS)
def test_each_way_beats_the_one_before(bits):
    w, stats, fmt = weight(), correlated(), Format(bits, 64)
    d = torch.diag(stats.importance())
    assert cost(w, search(w, fmt, stats), d) < cost(w, _MinMax(w, fmt), d)
    assert cost(w, gptq(w, fmt, stats), stats.moments) < cost(w, search(w, fmt, stats), stats.moments)

def test_second_look_never_hurts():
    w, stats = weight().float(), correlated()
    h, order, u = _prepared(torch, stats)
    columns = w.T[order]
    for bits in (2, 3, 4):
        s = torch.full_like(columns, 6/(2**bits-1))
        b, top = torch.full_like(columns, -3), torch.full((len(w),), 2.**bits-1)
        codes = _compensated(torch, columns, s, b, top, u)
        loss = lambda q: float(((h @ (columns-s*q-b))*(columns-s*q-b)).sum())
        again = _second_look(torch, columns, codes, s, b, top, h)
        assert loss(again) <= loss(codes)*(1+1e-5) and again.min() >= 0 and again.max() <= 2**bits-1
        assert (again == again.round()).all()

@pytest.mark.parametrize('shape', [(96, 64), (5, 8, 64), (1, 96, 64)])
def test_each_core_searches_a_part_of_its_own(shape, monkeypatch):
    "Matrices, experts, and rows of a single expert: the codes of one thread, and as many threads afterwards as before"
    from optiq import grid
    w, before, inside, real = torch.randn(shape, generator=torch.manual_seed(0)), torch.get_num_threads(), [], grid._fit_grid
    monkeypatch.setattr(grid, '_fit_grid', lambda *a: (inside.append(torch.get_num_threads()), real(*a))[1])
    try:
        torch.set_num_threads(1)
        want = search(w, Format(4, 32))
        assert {*inside} == {1} and len(inside) == 1
        torch.set_num_threads(3)
        got = search(w, Format(4, 32))
        assert torch.get_num_threads() == 3 and {*inside} == {1} and len(inside) > 3
    finally: torch.set_num_threads(before)
    assert all(torch.equal(getattr(got, k), getattr(want, k)) for k in ('codes', 'scales', 'biases'))

def test_the_time_of_all_formats_does_not_depend_on_their_order(models, monkeypatch):
    "Inputs are heard once; a search takes longer than min-max, by which other modes are rounded"
    import optiq.rounding as r
    monkeypatch.setattr(r, '_time_rounding', lambda b, t, plan, m: r._RoundingTime(
        .5, 10. if any(f.mode == 'affine' and f != AS_IS for f in plan.values()) else 1.))
    b, fmts = TorchBackend(models['llama']), [Format(4, 32), Format(4, 32, 'mxfp4'), Format(8, 32)]
    for order in (fmts, fmts[::-1], [fmts[1], fmts[0], fmts[2]]):
        assert RoundTrips(b, tokens_for(models['llama']), order, 'search').seconds() == .5+2*10+1
    assert RoundTrips(b, tokens_for(models['llama']), fmts[1:2], 'search').seconds() == .5+1

def test_without_correlation_gptq_is_nearest():
    w, stats = weight(), Inputs(torch.eye(128)*1000, 1000)
    a, b = gptq(w, Format(3, 64), stats), search(w, Format(3, 64), stats)
    assert (a.codes == b.codes).float().mean() > .999 and (a.scales == b.scales).all()

def test_many_formats_at_once_are_the_same_as_each_alone():
    w, stats = weight(), correlated()
    formats = [Format(2, 32), Format(4, 64), Format(8, 128), Format(4, 16, 'nvfp4')]
    for f, r in zip(formats, _gptq_all([w]*len(formats), formats, stats)):
        alone = gptq(w, f, stats)
        assert r.fmt == f and (r.dequantize() == alone.dequantize()).float().mean() > .999

def test_constant_and_zero_groups():
    w = torch.zeros(4, 128, dtype=torch.bfloat16)
    w[1] = 1.5
    w[2, :64] = -.25
    for r in (search(w, Format(4, 64)), gptq(w, Format(2, 64), correlated())): assert torch.allclose(r.dequantize(), w, atol=1e-3)

def test_expert_with_few_tokens_falls_back_to_search():
    w, many, few, none = weight(72).reshape(3, 24, 128), correlated(), correlated(n=4), Inputs()
    r = gptq(w, Format(3, 64), [many, few, none])
    assert (r.dequantize()[0] == gptq(w[0], Format(3, 64), many).dequantize()).all()
    assert (r.dequantize()[1] == search(w[1], Format(3, 64), few).dequantize()).all()
    assert (r.dequantize()[2] == search(w[2], Format(3, 64)).dequantize()).all()

@pytest.mark.parametrize('architecture', ['llama', 'qwen3_moe'])
def test_backends_hear_the_same(models, architecture):
    c = models[architecture]
    tokens = tokens_for(c)
    heard = [Statistics(kind(c), tokens) for kind in BACKENDS.values()]
    for u in c.units:
        mine = [s[u.path] for s in heard]
        if mine[0] is None: assert u.kind == 'embed' and not c.tied and mine == [None]*3; continue
        parts = [m if isinstance(m, list) else [m] for m in mine]
        for a, b, d in zip(*parts):
            assert a.count == b.count == d.count
            if not a.count: continue
            assert np.allclose(a.moments, b.moments, rtol=1e-3, atol=1e-2) and np.allclose(b.moments, d.moments, rtol=1e-4, atol=1e-3)
        if len(u.shape) > 2: assert sum(p.count for p in parts[0]) == tokens.size*c.config['num_experts_per_tok']
        else: assert parts[0][0].count == tokens.size

def test_layers_with_the_same_input_share_statistics(models):
    c = models['llama']
    stats = Statistics(TorchBackend(c), tokens_for(c))
    q, k, o = (stats[f'model.layers.1.self_attn.{n}_proj'] for n in 'qko')
    assert q is k and q is not o

@pytest.mark.parametrize('backend', BACKENDS)
def test_a_rounded_model_is_saved_as_it_was_scored(models, backend, tmp_path):
    c = models['qwen3_moe']
    some = [Format(3, 32), AS_IS, Format(4, 32, 'mxfp4'), Format(6, 64)]
    plan = make_plan(c, {u.path: some[i % 4] for i, u in enumerate(c.units)})
    (tmp_path/'parts').mkdir()
    quantizer = round_to_files(BACKENDS[backend](c), tokens_for(c), plan, 'gptq', tmp_path/'parts', progress=False)
    assert set(quantizer) == {p for p, f in plan.items() if f != AS_IS}
    saved = convert(c, plan, tmp_path/'out', quantizer=quantizer)
    assert saved.formats == dict(plan) and stored_bytes(saved) == plan.nbytes
    check_saved(tmp_path/'out', plan, c, quantizer)
    with pytest.raises(ValueError, match='not those that were measured'): check_saved(tmp_path/'out', plan, c)
    with pytest.raises(ValueError, match='not 8g32'): quantizer[c.units[0].path](None, Format(8, 32))

def test_the_sweep_scores_with_the_rounding_that_saves(models, tmp_path):
    c = models['llama']
    b, tokens, formats = TorchBackend(c), tokens_for(c), [Format(2, 32), Format(4, 32)]
    out = tmp_path/'gptq.jsonl'
    sweep = kl_sweep(b, tokens, formats, rounding='gptq', out=out, progress=False)
    todo = probes(c.units, formats)
    alone = RoundTrips(b, tokens, formats, 'gptq')
    stored = {u.path: gptq(b.unit_weight(u.path), formats[0], alone.stats[u.path]) for u in c.units if u.block == 1}
    want = measure(b, tokens, [p for p in todo if p[0].path in stored and p[1] == formats[0]],
                   {p: (lambda w, fmt, r=r: r.dequantize()) for p, r in stored.items()}).mean(1)
    assert np.allclose([sweep.kl(p, formats[0]) for p in stored], want, rtol=1e-3)
    with pytest.raises(ValueError, match='quantizer'): kl_sweep(b, tokens, formats, out=out, progress=False, rounding='minmax')
    with pytest.raises(ValueError, match='no rounding'): kl_sweep(b, tokens, formats, rounding='gtpq', progress=False)
    quick = {r: kl_sweep(b, tokens, formats, rounding=r, method='gradient') for r in ('minmax', 'gptq')}
    name = quick['gptq'].header['fingerprint']['quantizer']
    assert name.startswith('gptq, ') and name.endswith(', gradient')
    assert all(quick['gptq'].kl(p, formats[0]) != quick['minmax'].kl(p, formats[0]) for p in stored)
    screened = kl_sweep(b, tokens, formats, rounding='gptq', method='screened', targets=[3], progress=False)
    one, other = ([x.kl(p, formats[0]) for p in screened.header['exact']] for x in (screened, sweep))
    assert np.allclose(one, other, rtol=1e-3)

def test_plans_are_verified_with_the_rounding_that_saves(models, tmp_path, monkeypatch):
    from optiq import rounding
    c, asked, plain = models['llama'], [], rounding._round_all
    tokens, formats = tokens_for(c), [Format(3, 32), Format(4, 32)]
    b = TorchBackend(c)
    sweep = kl_sweep(b, tokens, formats, rounding='search', progress=False)
    quantize, _ = sweep_quantizer(b, tokens, formats, 'search', blocks=True)
    monkeypatch.setattr(rounding, '_round_all', lambda w, fmts, *more: (asked.append(fmts), plain(w, fmts, *more))[1])
    kl = _joint_kl(b, tokens, {'a': uniform(c, formats[0]), 'b': uniform(c, formats[1])}, quantize)
    assert sorted(map(str, asked)) == sorted(str([f]) for f in formats for u in c.units) # every unit once in each format that plans hold
    v = verified(b, tokens, sweep, target_bpw=3.5, n=2, quantize=quantize, progress=False)
    assert v.tried.keys() > {'allocated'} and set(kl) == {'a', 'b'}
    saved = convert(c, v.plan, tmp_path/'out', quantizer=round_to_files(b, tokens, v.plan, 'search', tmp_path, progress=False))
    got = evaluate(b, tokens, {'saved': overrides_of_saved(saved)})['saved'].kl
    np.testing.assert_allclose(got, v.kl[v.kept], rtol=1e-5)
    assert not np.allclose(got, _joint_kl(b, tokens, {'x': v.plan})['x'], rtol=1e-3) # min-max is something else
    few = Texts(n_calibration=2, seq_len=32, n_evaluation=1, eval_len=32)
    r = optimize(str(c.folder), caps=Caps(target_bpw=4), weights=Weights(formats, rounding='gptq', compare=False), texts=few,
                 backend='torch')
    assert r['verified'].kept in r['verified'].tried and r['figures']['calibration_kl'] > 0
    r['sweep'].save(tmp_path/'s.json')
    curve = trade_off(str(c.folder), (3, 4), ['all'], weights=Weights(sweep=tmp_path/'s.json'), texts=few, verify=1, backend='torch')
    assert curve['figures']['about']['rounding'] == 'gptq'

def test_errors_of_a_conversion(models, tmp_path):
    c = models['llama']
    for wrong, says in ((dict(rounding='best'), 'no rounding'), (dict(polish='wax'), 'no polish'), (dict(polish='dwq'), 'give an output')):
        with pytest.raises(ValueError, match=says): optimize(str(c.folder), weights=Weights(**wrong))
    kl_sweep(c, tokens_for(c), [4, 8], out=tmp_path/'s.jsonl', progress=False, rounding='minmax')
    with pytest.raises(ValueError, match='give `rounding` minmax'):
        optimize(str(c.folder), weights=Weights(rounding='gptq', sweep=tmp_path/'s.jsonl'))

def test_dwq_trains_scales_and_nothing_else(models, tmp_path):
    c = models['llama']
    plan, tokens = uniform(c, Format(3, 32)), tokens_for(c, 6, 16)
    convert(c, plan, tmp_path/'plain')
    convert(c, plan, tmp_path/'polished', polish=lambda d: dwq(d, c, tokens, valid=2, batch_size=2, learning_rate=1e-3))
    a, b = (mx.load(str(tmp_path/d/'model.safetensors')) for d in ('plain', 'polished'))
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)
    assert all(mx.array_equal(a[k], b[k]) for k in a if not k.endswith(('scales', 'biases')))
    assert any(not mx.array_equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match='too few'): dwq(tmp_path/'polished', c, tokens, valid=2)
    with pytest.raises(ValueError, match='needs 12 calibration sequences'): dwq(tmp_path/'polished', c, tokens)

def test_few_tokens_are_not_trusted(monkeypatch):
    "With fewer tokens than columns, damping by their number rounds better for inputs that were not seen"
    def loss(seed):
        r = np.random.default_rng(seed)
        x = (r.standard_normal((2048, 256)) @ (r.standard_normal((256, 256))*np.geomspace(3, .03, 256)[:, None])).astype(np.float32)
        w, stats = mx.array(r.standard_normal((64, 256)).astype(np.float32)), Inputs()
        stats.add(mx.array(x[:100]))
        return float((((w-gptq(w, Format(3, 64), stats).dequantize()) @ mx.array(x[100:]).T)**2).mean())
    damped = [loss(seed) for seed in range(3)]
    monkeypatch.setattr('optiq.gptq._shrinkage', lambda h, n: 0.)
    assert all(a < .98*loss(seed) for seed, a in enumerate(damped))

def test_what_is_learned_while_parts_are_changed_is_of_the_model_as_it_was(tmp_path):
    b = ReplayBackend(Checkpoint(tiny('qwen3_vl', tmp_path)))
    samples, units = batch_for(b.checkpoint, 'bundled', 1), b.checkpoint.units
    path = next(u.path for u in units if u.block is not None and 'language' in u.path)
    alone, during = (Statistics(b, samples, False) for _ in range(2))
    want = b.numpy(alone[path].importance())
    with b.swapped({u.path: lambda w: 0*w for u in units if u.block is None}): got = b.numpy(during[path].importance())
    np.testing.assert_array_equal(got, want)

def carried(n, noise, seed=0):
    "Inputs of a full-precision model, and the same after errors that depend on them, with noise"
    g = torch.manual_seed(seed)
    x = torch.randn(n, 128, generator=g) @ torch.randn(128, 128, generator=torch.manual_seed(7))
    error = x @ torch.randn(128, 128, generator=torch.manual_seed(8))*.02
    return x, x+error+noise*torch.randn(n, 128, generator=g)

def heard_with_gap(x, errors, lack, of_output=False):
    stats, gap = Inputs(), Gap(of_output=of_output)
    for part, d in zip(errors.split(200), lack.split(200)):
        stats.add(part)
        gap.add(part, d)
    return stats, gap

@pytest.mark.parametrize('of_output', [False, True])
@pytest.mark.parametrize('xp', ['torch', 'mlx'])
def test_a_changed_weight_makes_up_for_errors_on_text_that_it_was_not_learned_from(xp, of_output):
    w, (x, y), (x2, y2) = weight(), carried(2000, .1), carried(500, .1, 1)
    lack = (x-y) @ w.float().T if of_output else x-y
    stats, gap = heard_with_gap(x, y, lack, of_output)
    if xp == 'mlx':
        stats = Inputs(to_mlx(stats.moments), stats.count)
        gap = Gap(to_mlx(gap.first), [to_mlx(r) for r in gap.lacks], gap.count, of_output)
        made = torch.from_numpy(np.array(aimed([to_mlx(w)], gap, stats)[0].astype(mx.float32)))
    else:
        made, = aimed([w], gap, stats)
        assert made.dtype == w.dtype
    def lost(v): return float(((x2 @ w.float().T-y2 @ v.float().T)**2).sum())
    assert lost(made) < .3*lost(w)

def test_what_one_half_of_the_text_does_not_confirm_is_left_alone():
    w, (x, y) = weight(dtype=torch.float32), carried(400, 0)
    noise = torch.randn(400, 128, generator=torch.manual_seed(3))
    stats, gap = heard_with_gap(x, y, noise)
    made, = aimed([w], gap, stats)
    full = w @ sum(gap.lacks) @ torch.linalg.inv(stats.moments+.01*stats.moments.diagonal().mean()*torch.eye(128))
    assert (made-w).norm() < .2*full.norm() # a regression alone fits the noise
    few, none = heard_with_gap(x[:20], y[:20], noise[:20]), heard_with_gap(x, y, 0*noise)
    assert aimed([w], few[1], few[0])[0] is w and torch.equal(aimed([w], none[1], none[0])[0], w)

@pytest.mark.parametrize('backend', ['torch', 'mlx'])
def test_only_the_last_matrix_of_a_block_is_added_to_the_states(models, backend):
    from optiq.rounding import _is_added, _Passage
    from optiq.statistics import Chunks
    c = models['llama']
    b, heard = BACKENDS[backend](c), {}
    chunks = Chunks(b, tokens_for(c))
    p = _Passage(b, uniform(c, '4g32'), c.unit, chunks, {}, chunks.embed(), chunks.embed())
    behind, *_ = chunks.run(0, p.states, lambda path, x, experts=None: heard.setdefault(path, x))
    found = {path.split(".")[-1]: _is_added(p, 0, path, x, behind) for path, x in heard.items()}
    assert found['down_proj'] and not any(v for k, v in found.items() if k != 'down_proj'), found
