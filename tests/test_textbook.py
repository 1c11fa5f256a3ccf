"What is measured, rounded and compared, against the textbook's formula written out in plain Python"
import math
import statistics
from importlib import import_module
from itertools import product
from types import SimpleNamespace as Some
import mlx.core as mx
import numpy as np
import pytest
import torch

from optiq import chips, polish
from optiq.backends.mlx import MLXBackend
from optiq.backends.stream import _read_rows
from optiq.backends.torch import TorchBackend
from optiq.calibration import block_hashes, encode, fingerprint, overlap, passages
from optiq.convert import _check_sizes
from optiq.evals import throughput as speed
from optiq.evals.gsm8k import _right
from optiq.evals.perplexity import Score, evaluation_tokens, check_overlap
from optiq.report import mean_figure, _paired
from optiq.evals.wer import _wer_figure
from optiq.formats import Format, quantize_dequantize
from optiq.knapsack import allocate
from optiq.why import _price_ranges
from optiq.frontier import Frontier
from optiq.plan import Plan, mean_se, uniform
from optiq.kv.layout import KVLayer, KVLayout
from optiq.models import Checkpoint
from optiq.units import Unit
from optiq.job import _read_texts
from optiq.request import Texts
from optiq.arrays import to_mlx
from optiq.roofline import Chip, Latency, _cache_reads, reads_of
from optiq.gptq import gptq
from optiq.grid import search
from optiq.statistics import Inputs
from optiq.measure.gradient import _second_order
from optiq.measure.kl import kl_divergence
from optiq.measure.sweep import Sweep, fingerprint_of
from optiq.sensitivity import kl_sweep
from optiq.material.tiny import tiny
from optiq.kv.precondition import key_statistics
from optiq.refine import Verified, verified

TWO = dict(num_hidden_layers=2, max_window_layers=2)

@pytest.fixture(scope='module')
def c(tmp_path_factory): return Checkpoint(tiny('qwen3', tmp_path_factory.mktemp('tied')/'m', shape=TWO))

@pytest.fixture(scope='module')
def b(c): return TorchBackend(c)

@pytest.fixture(scope='module')
def tokens(c): return np.random.default_rng(0).integers(0, c.vocabulary, (2, 24)).astype(np.int32)

def numbers(x): return np.float64(x.numpy() if isinstance(x, torch.Tensor) else np.array(x))

def textbook_kl(z_p, z_q): # (…, V)
    log = [z-np.logaddexp.reduce(z, axis=-1, keepdims=True) for z in (np.float64(z_p), np.float64(z_q))]
    return (np.exp(log[0])*(log[0]-log[1])).sum(-1)

# rounding

def textbook_gptq(w, h, scale, bias, top): # w, scale, bias (rows, columns), h (columns, columns), all float64
    "One column after another, each error handed on at once (Frantar et al. 2022), then each column again, given all others"
    u, w0, q = np.linalg.cholesky(np.linalg.inv(h)).T, w, np.zeros_like(w)
    w = w.copy()
    for k in range(w.shape[1]):
        q[:, k] = np.clip(np.round((w[:, k]-bias[:, k])/scale[:, k]), 0, top)
        error = (w[:, k]-bias[:, k]-scale[:, k]*q[:, k])/u[k, k]
        for j in range(k+1, w.shape[1]): w[:, j] -= error*u[k, j]
    for k in range(w.shape[1]):
        left = w0-scale*q-bias
        best = w0[:, k]+(left @ h[:, k]-left[:, k]*h[k, k])/h[k, k]
        q[:, k] = np.clip(np.round((best-bias[:, k])/scale[:, k]), 0, top)
    return q

@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('lib', ['torch', 'mlx'])
def test_gptq_is_the_textbooks_loop_bit_for_bit(bits, lib):
    "Three blocks of columns, so errors are handed on within a block and across"
    rng, d = np.random.default_rng(bits), 160
    x = rng.standard_normal((600, d)) @ (np.eye(d)+.4*rng.standard_normal((d, d)))*rng.uniform(.3, 2, d)
    w, stats, fmt = torch.tensor(rng.standard_normal((5, d))).float(), Inputs(), Format(bits, 32)
    stats.add(torch.tensor(x).float())
    if lib == 'mlx': w, stats = to_mlx(w), Inputs(to_mlx(stats.moments), stats.count)
    got = gptq(w, fmt, stats)
    h = numbers(stats.moments)/600
    order = np.argsort(-np.diag(h), kind='stable')
    s, bias = (np.repeat(numbers(a), 32, 1)[:, order] for a in (got.scales, got.biases))
    h = h[order][:, order]+.01*np.diag(h).mean()*np.eye(d)
    want = np.zeros((5, d))
    want[:, order] = textbook_gptq(numbers(w)[:, order], h, s, bias, 2**bits-1)
    assert np.array_equal(numbers(got.codes), want)

def test_search_minds_how_large_the_inputs_are():
    rng = np.random.default_rng(0)
    w, size = torch.tensor(rng.standard_normal((16, 128))).float(), np.exp(rng.normal(0, 2, 128))
    stats = Inputs(whole=False)
    stats.add(torch.tensor(rng.standard_normal((500, 128))*size).float())
    def cost(r): return float((stats.importance()*(w-r.dequantize())**2).sum())
    assert cost(search(w, Format(3, 64), stats)) < .7*cost(search(w, Format(3, 64)))

def test_importance_is_the_mean_square_of_each_input():
    x = np.random.default_rng(0).standard_normal((3, 7, 32)).astype(np.float32)
    for whole in (True, False):
        stats = Inputs(whole=whole)
        for row in x: stats.add(torch.tensor(row))
        assert np.allclose(stats.importance(), (x.reshape(-1, 32)**2).mean(0), rtol=1e-5)

def test_dwq_goes_downhill(monkeypatch):
    "The optimizer that mlx-lm is handed lowers a loss"
    import mlx_lm.quant.dwq, mlx_lm.utils
    given, student = [], Some(freeze=lambda: None, eval=lambda: None)
    monkeypatch.setattr(mlx_lm.utils, 'load_model', lambda folder, **how: (student, {}))
    monkeypatch.setattr(mlx_lm.utils, 'save_model', lambda *a, **k: None)
    monkeypatch.setattr(mlx_lm.quant.dwq, 'dwq_quantize', lambda *a, **k: given.extend(a))
    source = Some(model_type='llm', name='m', trust_remote_code=False, load=lambda: None, units=[Some(dtype='bfloat16')])
    polish.dwq('nowhere', source, np.zeros((6, 4), int), valid=2, batch_size=2, learning_rate=.1)
    x = mx.array(1.)
    for _ in range(3): x = given[2].apply_gradients(dict(x=2*x), dict(x=x))['x'] # of x², whose least is at 0
    assert 0 < float(x) < .9

# KL, and what is made of it

def test_a_sweeps_values_are_the_mean_kl_of_all_tokens(c, b, tokens):
    "Every block of the model, and an embedding that is also the head in both its roles"
    assert c.tied
    found = kl_sweep(b, tokens, [Format(3, 64)], progress=False, rounding='minmax')
    z_p = b.numpy(b.logits(tokens))
    for u in c.units:
        z_q = b.numpy(b.logits(tokens, {u.path: lambda w: quantize_dequantize(w, Format(3, 64))}))
        assert np.allclose(found.values[u.path, Format(3, 64)], textbook_kl(z_p, z_q).mean(1), rtol=2e-3), u.path

def test_a_pass_that_was_cut_off_is_made_again(b, tokens, tmp_path):
    file = tmp_path/'s.jsonl'
    whole = kl_sweep(b, tokens, [Format(3, 64)], out=file, progress=False, rounding='minmax')
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(''.join(lines[:-3]))
    again = kl_sweep(b, tokens, [Format(3, 64)], out=file, progress=False, rounding='minmax')
    assert all(np.array_equal(v, again.values[k]) for k, v in whole.values.items())

def test_kl_is_of_the_reference_to_the_model_and_not_the_other_way_round():
    z_p, z_q = np.random.default_rng(0).normal(0, 3, (2, 5, 40)).astype(np.float32)
    there, back = textbook_kl(z_p, z_q), textbook_kl(z_q, z_p)
    assert abs(there-back).min() > .05
    for xp in (torch, mx):
        array = torch.tensor if xp is torch else mx.array
        assert np.allclose(kl_divergence(xp, array(z_p), array(z_q)), there, rtol=1e-4)

def test_gradients_are_squared_and_halved(b, tokens):
    "The second-order estimate: half the sum of g²Δ², over all tokens"
    todo = [(u, Format(4, 64)) for u in b.checkpoint.units[:4]]
    g = b.gradients(tokens, 7)
    for (u, f), got in zip(todo, _second_order(b, tokens, todo, seed=7)):
        w = b.unit_weight(u.path)
        step = (quantize_dequantize(w, f).double()-w.double()).numpy()
        assert got == pytest.approx(((np.float64(g[u.path])*step)**2).sum()/2/48, rel=1e-4)

def test_the_dtype_is_part_of_what_a_sweep_depends_on(tokens):
    "And so is everything else that its numbers depend on"
    def of(model='m', dtype='torch.float32', name='torch', tokens=tokens, formats=(Format(4, 64),), quantizer='minmax'):
        return fingerprint_of(Some(checkpoint=Some(fingerprint=model), dtype=dtype, name=name), tokens, list(formats), quantizer)
    others = [of(model='n'), of(dtype='torch.bfloat16'), of(name='mlx'), of(tokens=tokens[:1]), of(formats=[Format(8, 64)]),
              of(quantizer='search')]
    assert all(x != of() for x in others) and fingerprint(tokens) != fingerprint(tokens.reshape(1, -1))

def test_rows_are_read_from_where_they_stand(c):
    u = c.units[0]
    whole, rows = _read_rows(c, u, slice(0, u.shape[0])), np.array([3, 4, 9, 200, 201])
    assert mx.array_equal(_read_rows(c, u, rows), whole[mx.array(rows)])
    assert mx.array_equal(whole, MLXBackend(c).unit_weight(u.path))

def test_both_libraries_hold_the_same_tensors(tmp_path):
    "Gate and up of experts are halves of one tensor in PyTorch"
    c = Checkpoint(tiny('qwen3_moe', tmp_path/'m', shape=dict(num_hidden_layers=1)))
    mine, theirs = TorchBackend(c), MLXBackend(c)
    for u in c.units:
        a, b = mine.unit_weight(u.path).float(), theirs.unit_weight(u.path).astype(mx.float32)
        assert np.array_equal(numbers(a), numbers(b)), u.path

# errors of figures

ITEMS = [.3, 1.1, .2, .9, 2.5, .4]

def textbook_se(x): return statistics.stdev(x)/math.sqrt(len(x))

def test_a_standard_error_has_n_minus_one_in_it():
    x, se = np.array(ITEMS), textbook_se(ITEMS)
    sweep = Sweep([], [], {('u', Format(4, 64)): x}, {})
    score = Score(x, x, x, np.stack([x, x, x])[:, :, None])
    for got in (mean_se(x)[1], sweep.se('u', Format(4, 64)), mean_figure('kl', x)['kl_se'], score.by_position([0, 1])[1][0],
                score.perplexity_se/score.perplexity): assert got == pytest.approx(se)
    assert sweep.se('u', '4g64') == sweep.se('u', 4) == sweep.se('u', Format(4, 64))
    with pytest.raises(ValueError, match='was not measured'): sweep.se('u', 3)

def test_errors_of_differences_are_those_of_the_differences():
    "Sequences differ far more than models do, so an unpaired error would be a hundred times as large"
    a, b = np.array(ITEMS), np.array(ITEMS)+np.array([.01, .02, .01, .03, .02, .01])
    se = textbook_se(list(a-b))
    assert (_paired(a, b)['high']-_paired(a, b)['low'])/2 == pytest.approx(2.5705818*se) # Student's t of five degrees of freedom
    one, other = (Plan([Unit('u', 'q_proj', (8, 64), 0)], {'u': Format(4, 64)}, 512, 0, name=n) for n in ('flat', 'plan'))
    found, = Frontier([], [one], {'flat': other}, dict(plan=a, flat=b)).versus()
    assert found['difference_se'] == pytest.approx(se) and found['verdict'] in ('lower', 'the same plan')
    row = Verified(one, 'a', dict(a=one, b=one), dict(a=a, b=b)).row('b')
    assert row['difference_se'] == pytest.approx(se) and row['difference'] == pytest.approx(.1/6)

def test_a_rates_error_is_that_of_drawing_as_many_files():
    e = np.random.default_rng(0).poisson(2, 50)
    f = _wer_figure([dict(words=10, substitutions=int(x), insertions=0, deletions=0) for x in e])
    assert f['wer_se'] == pytest.approx(textbook_se(e.tolist())/10, rel=.05)
    assert f['wer_high']-f['wer_low'] == pytest.approx(2*1.96*f['wer_se'], rel=.05)

def test_the_plan_that_measured_best_is_kept(monkeypatch, b, tokens):
    sweep = kl_sweep(b, tokens, [Format(3, 64), Format(8, 64)], progress=False, rounding='minmax')
    monkeypatch.setattr('optiq.refine._joint_kl', lambda b, tokens, plans, *_: {n: np.full(2, i+1.) for i, n in enumerate(plans)})
    found = verified(b, tokens, sweep, rounds=0, progress=False, target_bpw=5)
    assert found.kept == 'allocated' and len(found.tried) > 2

# what a cap allows

def test_a_cap_is_kept_to_the_byte():
    rng, fmts = np.random.default_rng(0), [Format(3, 32), Format(4, 64), Format(8, 128)]
    units = [Unit(f'model.layers.0.u{i}', f'u{i}', (8*(i+1), 128), 0) for i in range(3)]
    values = {(u.path, f): rng.uniform(.5, 1.5, 2)*4.**-f.bits for u in units for f in fmts}
    sweep = Sweep(units, fmts, values, dict(model='m', params=sum(u.params for u in units), other_bytes=0))
    sizes = sorted({sum(u.nbytes(f) for u, f in zip(units, pick)) for pick in product(fmts, repeat=3)})
    for less, size in zip(sizes, sizes[1:]):
        for method in ('exact', 'lagrange', 'greedy'):
            assert allocate(sweep, max_bytes=size-1, method=method).nbytes <= less
        assert allocate(sweep, max_bytes=size).nbytes <= size
    free = allocate(sweep, max_bytes=sizes[-1]) # a byte more would buy nothing
    assert free.solver['prices'] == dict(max_bytes=0.) and free.gap == 0

def test_nominal_bits_are_the_average_over_weights():
    small, large = Unit('a', 'q_proj', (8, 64), 0), Unit('b', 'v_proj', (24, 64), 0)
    assert Plan([small, large], dict(a=Format(8, 64), b=Format(4, 64)), 2048, 0).nominal_bpw == 5

def test_each_format_is_bought_between_two_prices():
    found = _price_ranges(np.array([4., 1., 0.]), np.array([1., 2., 3.])) # 3 KL for the first byte more, 1 for the second
    assert found.tolist() == [[3., math.inf], [1., 3.], [0., 1.]]

def test_a_saved_model_is_neither_smaller_nor_larger_than_its_plan(monkeypatch, c):
    plan = uniform(c, 4)
    for off in (-1, 1):
        monkeypatch.setattr('optiq.convert.stored_bytes', lambda saved: plan.nbytes+off)
        with pytest.raises(ValueError, match='were predicted'): _check_sizes(Some(formats=dict(plan), folder='m'), plan)

# which side of a text

def test_evaluation_keeps_to_its_own_side(tmp_path, c):
    file = tmp_path/'t.txt'
    file.write_text('\n'.join(f'Passage {i} says in many words that {i*i} is the square of {i}, '*3 for i in range(400)))
    learn, score, both = (passages(file, side) for side in ('train', 'test', 'all'))
    assert not set(learn) & set(score) and set(learn) | set(score) == set(both) and len(both) == 400
    want = [t for p in score for t in encode(c.tokenizer, p+'\n')][:64]
    t = _read_texts(c, Texts(str(file), n_calibration=2, seq_len=32, n_evaluation=2, eval_len=32))
    for found in (evaluation_tokens(str(file), c.tokenizer, 2, 32), t.scored): assert found.ravel().tolist() == want
    assert overlap(block_hashes(t.learned), t.scored) == 0

def test_calibration_text_is_found_wherever_it_begins(tokens):
    text = np.random.default_rng(0).integers(0, 500, 1000).astype(np.int32)
    share = overlap(block_hashes(text[None, :640]), text[None, 7:519])
    assert share > .9
    with pytest.raises(ValueError, match='calibration text'): check_overlap(share)
    check_overlap(overlap(block_hashes(text[None, :480]), text[None, 500:980]))

# answers

@pytest.mark.parametrize('answer, response, ok', [
    ('#### 18', 'She starts with 18 eggs and sells 9 of them for 2 dollars.\n#### 20', False),
    ('#### 7', 'A week has 7 days, so the answer is 21.', False), ('#### 3', '3 + 4 = 7\n#### 7', False), ('#### 7', '3 + 4 = 7\n#### 7', True)])
def test_a_number_on_the_way_is_no_answer(answer, response, ok): assert _right(answer, response) is ok

# time

class Clock:
    now = 0.
    def perf_counter(self): return self.now
    def tokens(self, *seconds): # a decoding loop whose tokens take so long
        def steps(*args, **kwargs):
            for s in seconds:
                self.now += s
                yield 0, None
        return steps

def test_decoding_is_timed_without_what_warms_up(monkeypatch):
    generate = import_module('mlx_lm.generate') # of that name there is a function, too
    clock = Clock()
    for module in (chips, speed): monkeypatch.setattr(module, 'time', clock)
    monkeypatch.setattr(chips, 'find_units', lambda model: [Some(kind='embed', shape=(9, 4))])
    monkeypatch.setattr(generate, 'generate_step', clock.tokens(9, 5, 5, .5, .5, .5, .5))
    assert chips._decode_once(Some(), 4, 4, 3) == 2
    monkeypatch.setattr(generate, 'generate_step', clock.tokens(4, .5, .5, .5, .5))
    run = speed._one_run(None, [1]*8, 5)
    assert run['prompt_tps'] == 2 and run['decode_tps'] == 2

def test_the_first_run_only_warms_up(monkeypatch, c):
    runs = iter([1., 5., 7., 6.])
    monkeypatch.setattr(speed, '_one_run', lambda *a: dict.fromkeys(('prompt_tps', 'decode_tps', 'peak_mb'), next(runs)))
    row = speed.throughput(c, 4, 2, 3).rows[0]
    assert (row['decode_tps'], row['decode_tps_low'], row['decode_tps_n']) == (6., 5., 3)

def test_a_step_takes_what_one_more_step_takes(monkeypatch):
    monkeypatch.setattr(chips, '_run_once', lambda chain, n, first: (0., 5+2*n))
    assert chips._per_step(None, 3, 10)['seconds'] == 2

def test_attention_reads_keys_and_values_of_two_bytes_each(monkeypatch, c):
    heads, width = chips._GROUPS, chips._WIDE
    monkeypatch.setattr(chips, '_attention_chain', lambda n: n)
    monkeypatch.setattr(chips, '_per_step', lambda n, *a: dict(seconds=1e-9*n*heads*width*2*2))
    assert chips._measure_attention()['seconds_per_byte'] == pytest.approx(1e-9)
    a = c.config
    grows = a['num_hidden_layers']*2*a['num_key_value_heads']*a['head_dim']*2
    model = c.load()
    assert _cache_reads(model, 48)-_cache_reads(model, 16) == 32*grows
    reads = reads_of(model, a)
    lat = [Latency(Chip('x', 100.), reads, n) for n in (16, 48)]
    plan = uniform(c, 4)
    assert lat[1].ms(plan)-lat[0].ms(plan) == pytest.approx(32*grows/100e6)
    busy = Latency(Chip('x', 100., host=1e4), reads, 16) # the CPU prepares a token while the device works on another
    assert busy.device(plan) == pytest.approx(lat[0].ms(plan)) and busy.ms(plan) == busy.host == 20

# the cache

def test_keys_are_evened_out_by_the_queries_that_meet_them(b, tokens):
    seen = {}
    def see(block, q, k, v):
        for name, x in dict(q=q, k=k).items(): seen.setdefault((block, name), []).append(x[0].numpy().swapaxes(0, 1))
    with b.watching(see):
        for row in tokens: b.logits(row[None])
    found = key_statistics(b, tokens)
    for i in range(2):
        q, k = (np.concatenate(seen[i, name]).astype(np.float64) for name in 'qk') # (tokens, heads, D)
        groups = q.reshape(len(q), k.shape[1], -1, k.shape[2])
        s = np.sqrt(k.std(0)/np.sqrt((groups**2).mean((0, 2))))
        s /= np.exp(np.log(s).mean(-1, keepdims=True))
        assert s.std() > .05 and np.allclose(found[f'cache.{i}.keys'].scale[:, 0], s, rtol=1e-3)
        assert np.allclose(found[f'cache.{i}.keys'].mean[:, 0], k.mean(0), atol=1e-4)

def test_bytes_of_a_layout_are_counted_by_heads_and_windows():
    whole, window = KVLayer(0, 0, 2, 64, 96), KVLayer(1, 1, 2, 64, 64, window=100, constant=10, left='sliding window')
    assert whole.nbytes(1000) == 1000*2*(64+96)*2 and window.nbytes(1000) == 10+100*2*128*2 and window.nbytes(50) == 10+50*2*128*2
    units = KVLayout((whole, window), 'm', 1000)
    assert {u.path: u.shape for u in units.units} == {'cache.0.keys': (1000, 2, 64), 'cache.0.values': (1000, 2, 96)}
    assert units.other_bytes == window.nbytes(1000) and units.nbytes == whole.nbytes(1000)+window.nbytes(1000)
