"Every model can be measured with one of its blocks in memory, whatever its blocks hand to each other"
import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from optiq import statistics
from optiq.backends.mlx import MLXBackend
from optiq.backends.open import _within, open_backend
from optiq.backends.stream import StreamedModel, StreamingBackend
from optiq.chat import side_by_side
from optiq.convert import convert
from optiq.evals.perplexity import _Text, _together, evaluate
from optiq.evals.verify import verify
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.pipeline import compare
from optiq.plan import uniform
from optiq.rounding import round_model
from optiq.score import run_task
from optiq.sensitivity import kl_sweep

TOKENS = np.random.default_rng(0).integers(11, 500, (2, 12)).astype(np.int32)
CHAINS, OTHERS = ('llama', 'qwen3_moe'), ('gemma4_e', 'nanbeige')

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "architecture ▸ a checkpoint, made once"
    folder, made = tmp_path_factory.mktemp('m'), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1]/'bench')
        import families
    def model(name):
        if name in made: return made[name]
        if name in CHAINS: tiny(name, folder/name, dtype='float32')
        else:
            at = ('special', 'Gemma 4 E type') if name == 'gemma4_e' else ('mlx-lm', name)
            families.write_checkpoint(folder/name, *families.config_of(*at, families.read_table()), 'mlx', False)
        return made.setdefault(name, Checkpoint(folder/name))
    return model

def replayed(b):
    states = b.embed(TOKENS)
    for i in range(b.n_blocks): states = b.run_block(i, states)
    return b.numpy(b.head(states))

@pytest.mark.parametrize('name', [*CHAINS, *OTHERS])
def test_streaming_takes_the_way_that_the_blocks_allow(models, name):
    c = models(name)
    b, whole = open_backend(c, 'stream'), MLXBackend(c)
    assert type(b) is (StreamingBackend if name in CHAINS else StreamedModel) and whole.chain == (name in CHAINS)
    assert np.allclose(replayed(b), replayed(whole), atol=1e-4)

def test_what_gptq_keeps_of_a_block_counts_under_a_cap(tmp_path, monkeypatch):
    "Inputs of the full-precision model are kept if they fill an eighth of the cap at most; else the block runs again for them"
    c, cap = Checkpoint(tiny('llama', tmp_path/'m', shape=dict(num_hidden_layers=2), dtype='float32')), 2**25
    tokens, plan = np.random.default_rng(0).integers(11, 500, (32, 64)).astype(np.int32), uniform(c, '4g32')
    def rounded():
        b = open_backend(c, 'stream')
        b.keep_to(cap)
        gc.collect(), mx.clear_cache(), mx.reset_peak_memory()
        before, found = mx.get_active_memory(), {}
        for path, r in round_model(b, tokens, plan): found[path] = np.array(r.codes)
        return mx.get_peak_memory()-before, found
    peak, mine = rounded()
    monkeypatch.setattr(statistics._KeptInputs, 'nbytes', 0) # as if it were nothing
    more, kept = rounded()
    assert peak < cap and more-peak > 6*32*64*c.config['hidden_size'], (peak, more)
    for u in c.units: assert u.block != 0 or (mine[u.path] == kept[u.path]).all(), u # later states are summed in another order

@pytest.mark.parametrize('rounding', ['minmax', 'search'])
def test_a_sweep_of_a_model_that_is_no_chain(models, rounding):
    c, how = models('gemma4_e'), dict(rounding=rounding, progress=False)
    want, mine = (kl_sweep(open_backend(c, b), TOKENS, ['2g32'], **how) for b in ('mlx', 'stream'))
    assert want.values.keys() == mine.values.keys()
    for k, v in want.values.items(): assert np.allclose(mine.values[k], v, rtol=.02, atol=1e-7), k

def test_one_block_is_in_memory_at_a_time(models):
    "The arrays of blocks that MLX holds while a text passes are never those of two blocks"
    c = models('gemma4_e')
    gc.collect(), mx.clear_cache()
    before, most = mx.get_active_memory(), 0
    b = open_backend(c, 'stream')
    outside = c.params-sum(u.params for u in c.units if u.block is not None)
    largest = max(sum(u.params for u in c.units if u.block == i) for i in range(c.n_blocks))
    states = b.embed(TOKENS)
    b.numpy(b.head(states)) # the ends are there from now on
    for i in range(b.n_blocks):
        states = b.run_block(i, states)
        mx.clear_cache()
        most = max(most, mx.get_active_memory()-before)
    assert 4*outside < most < 4*(outside+2*largest)+2**20, (most, outside, largest)

def test_a_model_in_few_bits_is_streamed(models, tmp_path):
    c = models('llama')
    four = convert(c, uniform(c, '4g32'), tmp_path/'four')
    b = open_backend(four, 'stream')
    assert type(b) is StreamedModel and np.allclose(replayed(b), replayed(MLXBackend(four)), atol=1e-4)

def test_too_large_for_memory_means_streamed(models, monkeypatch):
    from optiq.backends import open as opening
    monkeypatch.setattr(opening, 'available_memory', lambda: 1000)
    assert type(open_backend(models('gemma4_e'))) is StreamedModel
    monkeypatch.setattr('optiq.backends.stream.available_memory', lambda: 1000)
    assert type(open_backend(models('gemma4_e')).by_loader(models('llama'))) is StreamedModel

def test_what_hands_other_states_along_is_no_chain(models, monkeypatch):
    "Where nobody can look at the ends, states beside the last answer are never taken for part of a chain"
    b = StreamingBackend(models('llama'))
    assert b.chain
    del b._chain
    kind = type(b.model.model)
    def forward(self, ids, cache=None, **_):
        h = x = self.embed_tokens(ids)
        for layer in self.layers: h = layer(h, mask=x)
        return self.norm(h)
    monkeypatch.setattr(kind, '__call__', forward)
    assert not b.chain

@pytest.fixture
def unlimited():
    "MLX's limits, which hold for the whole process, are as before when a test ends"
    had = mx.set_cache_limit(2**30), mx.set_memory_limit(2**40)
    mx.set_cache_limit(had[0])
    mx.set_memory_limit(had[1])
    yield
    mx.set_cache_limit(had[0])
    mx.set_memory_limit(had[1])

SCORED = dict( # how a model is scored, within some memory or none
    perplexity=lambda cache, **k: run_task('perplexity', 'demo', n=2, seq_len=64, **k),
    kl=lambda cache, **k: run_task('kl', 'demo', 'demo', n=2, seq_len=64, cache=cache, **k),
    compare=lambda cache, **k: compare('demo', n=2, seq_len=64, **k),
    side_by_side=lambda cache, **k: side_by_side('demo', 'demo', n=2, seq_len=64, prompts=[], **k).report)

@pytest.mark.parametrize('how', SCORED)
def test_less_memory_gives_the_same_scores(how, tmp_path, unlimited):
    score = SCORED[how]
    want, mine = (score(tmp_path/name, backend='stream', **k).rows[-1]
                  for name, k in (('all', {}), ('less', dict(max_memory=2**20))))
    figures = [k for k in ('perplexity', 'kl', 'agreement') if k in want]
    assert 'perplexity' in figures
    for k in figures: assert np.isclose(mine[k], want[k], rtol=1e-5, atol=1e-7), k

def test_less_memory_means_fewer_sequences_at_a_time(unlimited):
    b, tokens = open_backend('demo', 'stream'), np.random.default_rng(0).integers(11, 500, (8, 32)).astype(np.int32)
    batches = _Text(b, tokens, batch=2).batches
    whole, want = _together(b, batches), evaluate(b, tokens, batch=2)['reference']
    parts, mine = _together(_within(b, 2**20), batches), evaluate(b, tokens, batch=2)['reference']
    assert len(whole) == 1 < len(parts) and np.allclose(mine.nll, want.nll, rtol=1e-5)

@pytest.mark.parametrize('how', SCORED)
def test_a_cap_on_a_model_that_is_held_is_refused(how, tmp_path):
    with pytest.raises(ValueError, match='`max_memory` has no effect on demo.*`backend` stream$'):
        SCORED[how](tmp_path, backend='mlx', max_memory=2**30)

def test_verify_keeps_to_a_cap_and_refuses_one_without_effect(tmp_path, unlimited):
    c = Checkpoint('demo')
    convert(c, uniform(c, '4g64'), tmp_path/'4')
    assert verify(str(tmp_path/'4'), 'demo', backend='stream', max_memory=2**20).ok
    with pytest.raises(ValueError, match='`max_memory` has no effect on demo'):
        verify(str(tmp_path/'4'), 'demo', backend='mlx', max_memory=2**30)
