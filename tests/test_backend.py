"A backend that nobody in the package has heard of goes through every stage, under its own name"
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention, silu

from optiq.backends.open import open_backend
from optiq.backends.replay import Backend
from optiq.backends.stream import StreamingBackend
from optiq.evals.kl import reference, score_against
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.kv.precondition import key_statistics
from optiq.kv.sweep import kv_sweep
from optiq.material.tiny import tiny
from optiq.measure.gradient import gradient_sweep
from optiq.measure.kl import kl_divergence
from optiq.models import Checkpoint
from optiq.pipeline import optimize
from optiq.plan import uniform
from optiq.refine import verified
from optiq.request import Caps, Texts, Weights
from optiq.rounding import as_overrides, round_model
from optiq.sensitivity import kl_sweep

def normed(x): return x/x.square().mean(-1, keepdim=True).add(1e-6).sqrt()

class Toy(Backend):
    "The matrices of a llama, multiplied by hand, without its norms' weights and its positions"
    name, xp, dtype, hear, see = 'toy', torch, torch.float32, None, None
    def cast(self, x): return x.float()
    def typed(self, x, dtype): return x.to(getattr(torch, dtype))
    def done(self, x): return x
    def numpy(self, x): return x.detach().numpy()

    def __init__(self, checkpoint):
        self.checkpoint, self.n_blocks, self.changes = checkpoint, checkpoint.n_blocks, {}
        self.w = {u.path: load_file(checkpoint.files[0])[f'{u.path}.weight'].float() for u in checkpoint.units}
        self.blocks = [lambda x, i=i: self.run(i, x) for i in range(self.n_blocks)]

    # the model
    def times(self, x, path):
        if self.hear and path in self.heard: self.hear(path, x, None)
        return x @ self.w[path].T
    def run(self, i, x):
        h, at = normed(x), f'model.layers.{i}.'
        q, k, v = (self.times(h, f'{at}self_attn.{n}_proj').unflatten(-1, (-1, 64)).transpose(1, 2) for n in 'qkv')
        k, v = (self.changes.get(i, {}).get(kind, lambda a: a)(a) for kind, a in (('keys', k), ('values', v)))
        if self.see: self.see(i, q, k, v)
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x+self.times(y, f'{at}self_attn.o_proj')
        h = normed(x)
        return x+self.times(silu(self.times(h, f'{at}mlp.gate_proj'))*self.times(h, f'{at}mlp.up_proj'), f'{at}mlp.down_proj')
    def forward(self, batch):
        x = self.w['model.embed_tokens'][torch.as_tensor(np.asarray(batch)).long()]
        for i, block in enumerate(self.blocks): x = block(x)
        return self.times(normed(x), 'lm_head')

    # the verbs
    def block(self, i): return self.blocks[i]
    def unit_weight(self, path): return self.typed(self.w[path], self.checkpoint.unit[path].dtype)
    def stand_ins(self, answer): return self.having(blocks=[lambda x, i=i: answer(i, x) for i in range(self.n_blocks)])
    def attention(self, changes): return self.having(changes=changes)
    def watching(self, see): return self.having(see=see)
    def reweighted(self, overrides):
        return self.having(w=self.w | {p: f(self.unit_weight(p)).float() for p, f in overrides.items()})
    def listening(self, hear, block):
        return self.having(hear=hear, heard={u.path for u in self.checkpoint.units if u.block == block})
    def gradients(self, batch, seed, skip=0):
        with self.having(w={p: w.clone().requires_grad_() for p, w in self.w.items()}):
            log_p = self.logits(batch)[:, skip:].log_softmax(-1).flatten(0, 1)
            y = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
            return dict(zip(self.w, torch.autograd.grad(log_p.gather(1, y).sum(), [*self.w.values()])))

    @contextmanager
    def having(self, **new):
        before = {k: getattr(self, k, None) for k in new}
        vars(self).update(new)
        try: yield
        finally: vars(self).update(before)

@pytest.fixture(scope='module')
def b(tmp_path_factory):
    shape = dict(num_hidden_layers=2, initializer_range=.2)
    return Toy(Checkpoint(tiny('llama', tmp_path_factory.mktemp('toy')/'m', shape=shape), model_type='llm'))

@pytest.fixture(scope='module')
def tokens(b): return np.random.default_rng(0).integers(0, b.checkpoint.vocabulary, (4, 64)).astype(np.int32)

@pytest.fixture(scope='module')
def sweep(b, tokens): return kl_sweep(b, tokens, [3, 8], progress=False, rounding='minmax')

def plain(b, tokens, overrides):
    "KL of each sequence by two forward passes, nothing replayed"
    return kl_divergence(torch, b.logits(tokens), b.logits(tokens, overrides)).mean(-1).numpy()

def test_it_is_taken_as_it_is(b): assert open_backend(b) is b

def test_sweep(b, tokens, sweep):
    assert sweep.header['fingerprint']['backend'] == 'toy' and len(sweep.values) == 2*len(b.checkpoint.units)
    for k, v in sweep.values.items(): assert np.allclose(v, plain(b, tokens, overrides_of(dict([k]))), rtol=1e-3, atol=1e-9), k

@pytest.mark.parametrize('rounding', ['search', 'gptq'])
def test_rounding(b, tokens, rounding):
    plan = uniform(b.checkpoint, 3)
    done = as_overrides(dict(round_model(b, tokens, plan, rounding)))
    assert {*done} == {*plan}
    assert plain(b, tokens, done).mean() < .9*plain(b, tokens, overrides_of(plan)).mean()
    found = kl_sweep(b, tokens[:1], [4], progress=False, rounding=rounding, rounding_tokens=tokens)
    assert found.header['fingerprint']['quantizer'].startswith(rounding)

def test_gradient(b, tokens, sweep):
    from scipy.stats import spearmanr
    found = gradient_sweep(b, tokens, [3, 8])
    assert {*found.values} == {*sweep.values}
    assert spearmanr(*([s.kl(*k) for k in sweep.values] for s in (found, sweep)))[0] > .9

def test_a_plan_is_verified(b, tokens, sweep):
    found = verified(b, tokens, sweep, progress=False, target_bpw=5)
    assert np.allclose(found.kl['allocated'], plain(b, tokens, overrides_of(found.tried['allocated'])), rtol=1e-3)
    assert found.kl[found.kept].mean() == min(v.mean() for v in found.kl.values())

def test_cache(b, tokens):
    found = kv_sweep(b, tokens, [4], progress=False)
    assert {p for p, _ in found.values} == {f'cache.{i}.{kind}' for i in (0, 1) for kind in ('keys', 'values')}
    for k, v in found.values.items(): assert np.allclose(v, plain(b, tokens, overrides_of(dict([k]))), rtol=1e-3), k
    served = kv_sweep(b, tokens, [4], weights=uniform(b.checkpoint, 4), progress=False)
    assert all(served.kl(*k) != found.kl(*k) for k in found.values)
    assert {*key_statistics(b, tokens)} == {p for p, _ in found.values}

def test_evaluation(b, tokens, tmp_path):
    overrides = overrides_of(uniform(b.checkpoint, 4))
    found = evaluate(b, tokens, dict(four=overrides))['four']
    assert np.allclose(found.kl, plain(b, tokens, overrides), rtol=1e-3)
    for top_k in (None, 64):
        stored = score_against(reference(b, tokens, top_k, tmp_path), b, tokens, overrides)
        assert np.allclose(stored.nll, found.nll, rtol=1e-4) and np.allclose(stored.agree, found.agree)
        assert (stored.kl <= found.kl*1.001).all()

@pytest.mark.parametrize('memory', [None, 2**28])
def test_a_streamed_model_goes_the_whole_road_with_search(memory, tmp_path, monkeypatch):
    folder = tiny('qwen3', tmp_path/'m', dict(tie_word_embeddings=False, num_hidden_layers=2, max_window_layers=2, vocab_size=600))
    monkeypatch.setattr(StreamingBackend, 'rows', 256)
    monkeypatch.setattr('optiq.backends.stream.available_memory', lambda: 0) # the saved model is streamed, too
    opened, reading = [], StreamingBackend.block
    def block(self, i):
        if self.held != i: opened.append(i)
        return reading(self, i)
    monkeypatch.setattr(StreamingBackend, 'block', block)
    def road(backend):
        return optimize(str(folder), tmp_path/backend, Caps(target_bpw=5), weights=Weights(formats=[4, 8], compare=False),
                        texts=Texts(n_calibration=1, seq_len=16, n_evaluation=1, eval_len=32), backend=backend, states_memory=memory)
    held, streamed = road('mlx'), road('stream')
    assert dict(held['plan']) == dict(streamed['plan']) and held['figures']['kl'] == pytest.approx(streamed['figures']['kl'], rel=1e-3)
    for k, kl in held['sweep'].values.items(): assert kl == pytest.approx(streamed['sweep'].values[k], rel=1e-3)
    for a, b in zip(*(sorted(p for p in (tmp_path/n).glob('*.safetensors')) for n in ('mlx', 'stream'))):
        x, y = mx.load(str(a)), mx.load(str(b))
        assert x.keys() == y.keys() and all(mx.array_equal(x[k], y[k]) for k in x)
    assert not list(tmp_path.glob('.*optiq-part')) and opened
