"What `make test` remembers between notebooks is what they would measure"
import sys
from pathlib import Path
import numpy as np
from optiq import sensitivity
from optiq.evals import perplexity
from optiq.backends.torch import TorchBackend
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import uniform
from optiq.sensitivity import kl_sweep

sys.path.append(str(Path(__file__).parents[1]/'tools'))
from remember import remember_probes, remember_scores # noqa: E402

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
