"What `make test` remembers between notebooks is what they would measure"
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from optiq import sensitivity
from optiq.evals import perplexity, tasks # noqa: F401, which adds `write`
from optiq.backends.torch import TorchBackend
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import uniform
from optiq.sensitivity import kl_sweep

sys.path.append(str(Path(__file__).parents[1]/'tools'))
from blas import fast_products # noqa: E402
from remember import remember_answers, remember_probes, remember_scores # noqa: E402

def test_only_what_is_new_is_measured(tmp_path, monkeypatch):
    b, asked, measure = TorchBackend(Checkpoint(tiny('llama', tmp_path/'m', shape=dict(num_hidden_layers=2)))), [], sensitivity._measure_halved
    tokens = np.random.default_rng(0).integers(20, 500, (3, 16)).astype(np.int32)
    def sweep(tokens, formats): return kl_sweep(b, tokens, formats, rounding='minmax', progress=False)
    want = sweep(tokens, [3, 4])
    def spy(b, batch, todo, *args, **options):
        asked.extend((u.path, str(fmt), row.tobytes()) for u, fmt in todo for row in batch)
        return measure(b, batch, todo, *args, **options)
    monkeypatch.setattr(sensitivity, '_complete', sensitivity._complete) # as it is now after the test
    monkeypatch.setattr(sensitivity, '_measure_halved', spy)
    remember_probes(tmp_path/'kept')
    few, got, again = sweep(tokens[:2], [4]), sweep(tokens, [3, 4]), sweep(tokens[1:], [3])
    n = len(b.checkpoint.units)
    assert len(asked) == len(set(asked)) == 3*(2*n+1) # one more to see how far no change at all measures
    for one, rows in ((few, slice(2)), (got, slice(3)), (again, slice(1, 3))):
        for key, kl in one.values.items(): np.testing.assert_allclose(kl, want.values[key][rows], rtol=1e-3, atol=1e-9)

def test_a_baseline_is_scored_once_on_a_text(tmp_path, monkeypatch):
    b, walked = TorchBackend(Checkpoint(tiny('llama', tmp_path/'m', shape=dict(num_hidden_layers=2)))), []
    one, two = np.random.default_rng(0).integers(20, 500, (2, 2, 16)).astype(np.int32)
    plans = {n: perplexity.overrides_of(uniform(b.checkpoint, n)) for n in (3, 4)} | {'halved': {'lm_head': lambda w: w/2}}
    want, real = {t: perplexity.evaluate(b, x, plans) for t, x in enumerate((one, two))}, perplexity.evaluate
    def spy(model, tokens, variants={}, **options):
        walked.append([*variants])
        return real(model, tokens, variants, **options)
    monkeypatch.setattr(perplexity, 'evaluate', spy)
    remember_scores()
    for t, x in enumerate((one, one, two)):
        got = perplexity.evaluate(b, x, plans)
        assert [*got] == ['reference', *plans]
        for name, s in got.items(): assert (s.tokens == want[t//2][name].tokens).all()
    assert walked == [[3, 4, 'halved'], ['halved'], [3, 4, 'halved']]

def test_what_was_written_once_is_not_written_again(tmp_path, monkeypatch):
    b, asked, write = TorchBackend(Checkpoint(tiny('llama', tmp_path/'m', shape=dict(num_hidden_layers=2)))), [], TorchBackend.write
    prompts = [[5, 6, 7], [8, 9], [8, 9, 10, 11]]
    want = write(b, prompts, 12, 0)
    def spy(self, prompts, *args, **options):
        asked.append(prompts)
        return write(self, prompts, *args, **options)
    monkeypatch.setattr(TorchBackend, 'write', spy)
    remember_answers(tmp_path/'kept')
    assert b.write(prompts[:2], 6, 0) == [x[:6] for x in want[:2]]
    assert b.write(prompts, 6, 0) == [x[:6] for x in want] and asked[1:] == [prompts[2:]]
    assert b.write(prompts, 4, 0) == [x[:4] for x in want] and len(asked) == 2
    assert b.write(prompts, 12, 0) == want and asked[2:] == [prompts] # longer than before
    with b.swapped(perplexity.overrides_of(uniform(b.checkpoint, 2))):
        want = write(b, prompts, 12, 0)
        assert b.write(prompts, 12, 0) == want and asked[3:] == [prompts] # other weights

def test_products_in_float32_are_those_of_mlx(monkeypatch):
    for place, name in ((mx, 'quantized_matmul'), (mx, 'matmul'), (mx, 'addmm'), (mx.array, '__matmul__'),
                        (mx.fast, 'scaled_dot_product_attention')): monkeypatch.setattr(place, name, getattr(place, name))
    real, attend = mx.quantized_matmul, mx.fast.scaled_dot_product_attention
    unpacked, unpack = [], mx.dequantize
    monkeypatch.setattr(mx, 'dequantize', lambda w, *args, **options: unpacked.append(w) or unpack(w, *args, **options))
    fast_products()
    r = np.random.default_rng(0)
    def normal(*shape): return mx.array(r.standard_normal(shape, np.float32))
    x, w, q = normal(3, 64), normal(32, 64), normal(1, 2, 5, 32)
    for bits in (2, 3, 4, 5, 6, 8):
        for rows in (w, normal(2, 3, 32, 64)): # a weight, and a cache
            packed, step, bias = mx.quantize(rows, 32, bits)
            for transpose in (True, False):
                a, how = x if transpose else x[:, :32], dict(transpose=transpose, group_size=32, bits=bits)
                a = mx.broadcast_to(a, (*rows.shape[:-2], *a.shape))
                for _ in range(2): # unpacked now, and before
                    want, got = real(a, packed, step, bias, **how), mx.quantized_matmul(a, packed, step, bias, **how)
                    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
                step[0] = step[0]*2 # in place
                np.testing.assert_allclose(mx.quantized_matmul(a, packed, step, bias, **how), real(a, packed, step, bias, **how),
                                           rtol=1e-4, atol=1e-4)
    assert sum(p.ndim == 2 for p in unpacked) == 6*3 # once in both directions, and again after each change
    for want, got in ((x@w.T, lambda t: t(x)@t(w.T)), (mx.addmm(w[:3, :32], x, w.T), lambda t: mx.addmm(t(w[:3, :32]), t(x), t(w.T))),
                      (attend(q, q, q, scale=.2, mask='causal'),
                       lambda t: mx.fast.scaled_dot_product_attention(t(q), t(q), t(q), scale=.2, mask='causal'))):
        for half in (mx.bfloat16, mx.float16):
            out = got(lambda a: a.astype(half))
            assert out.dtype == half
            assert float(mx.abs(out.astype(mx.float32)-want).max()) < .02*float(mx.abs(want).max())
