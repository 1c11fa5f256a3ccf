"Memory that runs out: every stage of the road goes on with smaller batches, and what remains is one line that names a remedy"
import numpy as np
import pytest
from click.testing import CliRunner

from optiq import cli, kl_sweep
from optiq.backends.replay import Backend
from optiq.backends.torch import TorchBackend
from optiq.evals.kl import reference, score_against
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.kv.layout import cache_bytes
from optiq.kv.sweep import kv_sweep
from optiq.material.tiny import tiny
from optiq.measure.gradient import gradient_sweep, screened_sweep
from optiq.measure.sweep import _tokens_per_expert
from optiq.models import Checkpoint
from optiq.plan import uniform
from optiq.readers import OutOfMemory, _checked
from optiq.rounding import round_model
from optiq.statistics import Statistics

TOKENS = np.random.default_rng(0).integers(11, 500, (6, 16)).astype(np.int32)
LESS = 'memory runs out.*give fewer or shorter sequences'

class Small(TorchBackend):
    "A model that holds so many sequences at once"
    most = 99
    def check(self, x):
        if len(x) > self.most: raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB')
    def run_block(self, i, states, overrides={}):
        self.check(states)
        return super().run_block(i, states, overrides)
    def head(self, states, overrides={}):
        self.check(states)
        return super().head(states, overrides)
    def logits(self, batch, overrides={}):
        self.check(batch)
        return super().logits(batch, overrides)

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('m')
    return {name: Checkpoint(tiny(name, folder/name, dtype='float32')) for name in ('llama', 'qwen3_moe')}

def values(sweep): return np.array([*sweep.values.values()])
def codes(b, method):
    plan = uniform(b.checkpoint, '4g32')
    return {p: np.array(v) for path, r in round_model(b, TOKENS, plan, method) for p, v in ((f'{path}.{k}', v) for k, v in r.stored().items())}
def scores(b, tokens=TOKENS):
    found = evaluate(b, tokens, {'4': overrides_of(uniform(b.checkpoint, 4))})
    return np.array([[s.nll, s.kl, s.agree] for s in found.values()])
def stored(b, folder):
    kept = reference(b, TOKENS, 16, folder)
    s = score_against(kept, b, TOKENS, overrides_of(uniform(b.checkpoint, 4)))
    return np.array([s.nll, s.kl, s.agree])

STAGES = dict(
    sweep=lambda b, d: values(kl_sweep(b, TOKENS, [4], rounding='minmax', progress=False)),
    searched=lambda b, d: values(kl_sweep(b, TOKENS, [4], rounding='search', progress=False)),
    cache=lambda b, d: values(kv_sweep(b, TOKENS, [4], progress=False)),
    gradient=lambda b, d: values(gradient_sweep(b, TOKENS, [4])),
    screened=lambda b, d: values(screened_sweep(b, TOKENS, [4, 8], [5], first=2)),
    score=lambda b, d: scores(b),
    stored=lambda b, d: stored(b, d),
    search=lambda b, d: codes(b, 'search'),
    gptq=lambda b, d: codes(b, 'gptq'))

@pytest.mark.parametrize('stage', STAGES)
def test_every_stage_goes_on_with_smaller_batches(models, tmp_path, stage):
    "As if you had given such batches"
    full, by_hand = (Small(models['llama']) for _ in range(2))
    by_hand.fits = 2*TOKENS.shape[1]
    want = STAGES[stage](by_hand, tmp_path/'by hand')
    full.most = 2
    got = STAGES[stage](full, tmp_path/'full')
    assert full.fits <= 2*TOKENS.shape[1]
    if isinstance(want, dict): assert want.keys() == got.keys() and all((got[k] == want[k]).all() for k in want)
    else: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-9)
    full.most = 0
    with pytest.raises(ValueError, match=LESS) as e: STAGES[stage](full, tmp_path/'nothing')
    assert '\n' not in str(e.value) and (stage not in ('sweep', 'searched', 'cache') or '`max_memory`' in str(e.value))

def test_a_late_failure_rounds_nothing_twice(models, monkeypatch):
    b, plan = Small(models['llama']), uniform(models['llama'], '4g32')
    want = codes(Small(models['llama']), 'gptq')
    real, ran = Small.run_block, []
    def later(self, i, states, overrides={}):
        ran.append(i)
        if i == b.n_blocks-1 and len(states) > 3: raise MemoryError
        return real(self, i, states, overrides)
    monkeypatch.setattr(Small, 'run_block', later)
    found = [path for path, _ in round_model(b, TOKENS, plan, 'gptq')]
    assert len(found) == len({*found}) == len({p.rpartition('.')[0] for p in want}) and b.fits == 3*TOKENS.shape[1]

def test_what_is_never_reached_is_left_out(models, monkeypatch):
    "A walk that ends has ended, whatever it did not meet"
    import optiq.rounding as r
    b = Small(models['llama'])
    monkeypatch.setattr(r, '_one_after_another', lambda *a: [[('model.embed_tokens', None)]])
    assert [*round_model(b, TOKENS, uniform(b.checkpoint, '4g32'), 'gptq')] == [('model.embed_tokens', None)]

def test_experts_are_counted_once(models):
    b, c = Small(models['qwen3_moe']), models['qwen3_moe']
    want = _tokens_per_expert(Small(c), TOKENS)
    b.most = 1
    assert _tokens_per_expert(b, TOKENS) == want
    heard = Statistics(b, TOKENS, False)
    other = Statistics(Small(c), TOKENS, False)
    experts = [u.path for u in c.units if len(u.shape) > 2]
    assert experts and all([s.count for s in heard[p]] == [s.count for s in other[p]] for p in experts)

def test_scores_that_are_known_are_kept_when_batches_are_cut(models):
    from optiq.evals.perplexity import _Text
    b, ticks = Small(models['llama']), []
    variants = {str(n): overrides_of(uniform(b.checkpoint, n)) for n in (4, 8)}
    text = _Text(b, TOKENS, {'4': variants['4']})
    text.run()
    b.most = 2
    text.add(variants)
    text.run(ticks.append)
    want = evaluate(Small(models['llama']), TOKENS, variants)
    for name, s in text.scores().items(): np.testing.assert_allclose(s.tokens, want[name].tokens, rtol=1e-3, atol=1e-6)
    assert sum(ticks) == pytest.approx(1) and len(text.batches) > 1

def test_short_texts_go_in_large_batches_after_long_ones_did_not(models, monkeypatch):
    "What fits is counted in tokens, also where texts of both lengths walk together"
    from optiq.evals.perplexity import _Text
    b, seen, real = Small(models['llama']), [], Small.check
    want = scores(b)
    b.most = 2
    np.testing.assert_allclose(scores(b), want, rtol=1e-4, atol=1e-9)
    assert b.fits == 2*TOKENS.shape[1]
    b.most = 99
    monkeypatch.setattr(Small, 'check', lambda self, x: (seen.append(tuple(x.shape[:2])), real(self, x))[1])
    scores(b, TOKENS[:, :4])
    assert {n for n, T in seen} == {6}
    seen.clear()
    beside = _Text(b, TOKENS[:, :8])
    evaluate(b, TOKENS, beside=[beside])
    assert {n*T for n, T in seen} == {2*16, 4*8, 2*8} and len(beside.scores()['reference'].nll) == 6

def test_the_error_names_the_argument_of_what_was_called():
    @_checked
    def inner(max_memory: float = 1.): raise MemoryError
    @_checked
    def middle(n: int = 1): return inner()
    @_checked
    def outer(states_memory: float = 1.): return middle()
    for f, name in ((inner, 'max_memory'), (middle, 'max_memory'), (outer, 'states_memory')):
        with pytest.raises(OutOfMemory, match=rf'memory runs out.*or a smaller `{name}`') as e: f()
        assert e.value.__cause__ is not e.value # or whoever walks along the causes never ends

@pytest.mark.parametrize('words', [['sweep', 'demo', '-o', 'x.jsonl', '--n-calibration', '2', '--seq-len', '16', '--rounding', 'minmax'],
                                   ['eval', 'demo', '--task', 'perplexity', '--n-evaluation', '2', '--seq-len', '16']])
def test_a_command_names_its_option(monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    def full(*a, **k): raise RuntimeError('[metal::malloc] Attempting to allocate 9 bytes')
    monkeypatch.setattr(Backend, 'run_block', full)
    r = CliRunner().invoke(cli.main, words)
    last = r.output.strip().splitlines()[-1]
    assert r.exit_code == 1 and last.startswith('error: ') and 'memory runs out' in last and '--max-memory' in last and '`' not in last

@pytest.mark.parametrize('words', [['convert', 'demo', '--target-size'], ['kv-cache', 'demo', '--target-size'],
                                   ['convert', 'demo', '--context', '512', '--target-memory']])
def test_a_size_takes_the_same_forms_everywhere(monkeypatch, tmp_path, words):
    from optiq import pipeline
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, '_Job', lambda c, out, caps, *a: (_ for _ in ()).throw(ValueError(f'caps {caps}')))
    def cap(text):
        said = CliRunner().invoke(cli.main, [*words, text]).output
        return said[said.index('caps Caps'):].split('(given')[0]
    assert cap('9MB') == cap('9') == cap('9.0 MiB') == cap('9216kb') and f'={9*2**20},' in cap('9')
    assert f'={2**19},' in cap('.5') and f'={2**20*1000},' in cap('1e3') and f'={2**30},' in cap('1GB')
    for none in ('9XB', '0', '1e-7', '1e99'):
        assert f'{none} is not a size, such as 16GB or a number of MB' in CliRunner().invoke(cli.main, [*words, none]).output

def test_the_cache_is_counted_in_one_way(models):
    from optiq.fit import what_fits
    c = models['llama']
    for context in (1, 300, 512): assert what_fits(c.folder, 8*2**30, context).rows[0]['cache'] == cache_bytes(c, context)
    with pytest.raises(ValueError, match='`context` is 0'): what_fits(c.folder, context=0)

def test_an_error_that_only_speaks_of_what_is_allocated_is_no_lack_of_memory():
    from optiq.readers import is_full
    for words in ('Placeholder storage has not been allocated on MPS device!', 'its data is not allocated yet',
                  'it was deallocated'):
        assert not is_full(RuntimeError(words))
    for words in ('[malloc] Unable to allocate 4096 bytes.', "DefaultCPUAllocator: can't allocate memory",
                  'MPS backend out of memory (MPS allocated: 1 GB)'):
        assert is_full(RuntimeError(words))
