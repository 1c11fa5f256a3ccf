"Models whose pass calls blocks twice, not at all, or in another order than they are numbered"
from functools import partial
from types import SimpleNamespace
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn

from optiq.backends.mlx import MLXBackend
from optiq.backends.parts import ReplayBackend
from optiq.backends.torch import TorchBackend
from optiq.formats import Format
from optiq.rounding import as_overrides, round_model
from optiq.statistics import Statistics
from optiq.units import Unit

ROUTES = {'in order': (0, 1, 2, 3), 'a block twice': (0, 1, 0, 1, 2, 3), 'a block that is not reached': (0, 2, 3),
          'another order': (2, 3, 0, 1), 'all of it': (3, 0, 2, 0)}
D, V, F4 = 64, 96, Format(4, 32)

def weights():
    r = np.random.default_rng(0)
    named = {f'blocks.{i}.{k}': (D, D) for i in range(4) for k in ('fc', 'out')}
    return {k: r.standard_normal(s).astype('f4')/8 for k, s in dict(embed=(V, D), **named, lm_head=(V, D)).items()}

class Block(nn.Module):
    def __init__(self): self.fc, self.out = (nn.Linear(D, D, bias=False) for _ in range(2))
    def __call__(self, x): return x+self.out(mx.tanh(self.fc(x)))

class Model(nn.Module):
    def __init__(self, route):
        self.embed, self.lm_head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.blocks, self.route = [Block() for _ in range(4)], route
        self.load_weights([(f'{k}.weight', mx.array(w)) for k, w in weights().items()])
    def __call__(self, ids):
        x = self.embed(ids)
        for i in self.route: x = self.blocks[i](x)
        return self.lm_head(x)

class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = (torch.nn.Linear(D, D, bias=False) for _ in range(2))
    def forward(self, x): return x+self.out(self.fc(x).tanh())

class TorchModel(torch.nn.Module):
    def __init__(self, route):
        super().__init__()
        self.embed, self.lm_head = torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False)
        self.blocks, self.route = torch.nn.ModuleList(TorchBlock() for _ in range(4)), route
        self.load_state_dict({f'{k}.weight': torch.from_numpy(w) for k, w in weights().items()})
    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for i in self.route: x = self.blocks[i](x)
        return SimpleNamespace(logits=self.lm_head(x))

class Parts(ReplayBackend):
    def raw(self, sample): return self.model(mx.array(sample['input_ids']))

def opened(kind, route):
    "A backend of a model of this route, without a checkpoint on disk"
    units = [Unit(p, p.split('.')[-1], w.shape, int(p[7]) if 'blocks' in p else None, 'float32') for p, w in weights().items()]
    b = object.__new__(kind)
    b.checkpoint = SimpleNamespace(units=units, unit={u.path: u for u in units}, n_blocks=4, blocks={'blocks': 4}, vocabulary=V,
                                   name='made here', tied=False, text_only=False)
    b.n_blocks, b.xp, b.device = 4, torch if kind is TorchBackend else mx, 'cpu'
    b.dtype, b.model = b.xp.float32, (TorchModel if kind is TorchBackend else Model)(route)
    if kind is TorchBackend:
        b.model.requires_grad_(False).config = SimpleNamespace()
        b.blocks, named = list(b.model.blocks), dict(b.model.named_parameters())
        b.slots = {u.path: (named[f'{u.path}.weight'], None) for u in units}
    return b

def by_hand(route, ids, changed):
    "The logits, with nothing of the package"
    w = {k: x.astype('f8')*(.8 if k in changed else 1) for k, x in weights().items()}
    x = w['embed'][ids]
    for i in route: x = x+np.tanh(x @ w[f'blocks.{i}.fc'].T) @ w[f'blocks.{i}.out'].T
    return x @ w['lm_head'].T

def change(paths): return {p: lambda w: w*.8 for p in paths}
def close(z, want): return np.allclose(z, want, rtol=1e-4, atol=1e-4)

kinds = pytest.mark.parametrize('kind', [Parts, MLXBackend, TorchBackend])
routes = pytest.mark.parametrize('route', ROUTES.values(), ids=ROUTES)

@kinds
@routes
def test_replay_is_the_models_own_pass(kind, route):
    "Each unit alone and all together, block by block"
    b, ids = opened(kind, route), np.random.default_rng(1).integers(0, V, (1, 12))
    paths = [*b.checkpoint.unit]
    for changed in *([p] for p in paths), paths:
        def at(i): return change(p for p in changed if b.checkpoint.unit[p].block == i)
        x = b.embed(ids, at(None))
        for i in range(4): x = b.run_block(i, x, at(i))
        assert close(b.numpy(b.head(x, at(None))), by_hand(route, ids, changed)), changed

@routes
def test_a_sweep_of_samples_starts_before_the_first_call(route):
    b, sample = opened(Parts, route), dict(input_ids=np.random.default_rng(1).integers(0, V, (1, 12)))
    passed, z = b.record(sample)
    assert close(b.numpy(z), by_hand(route, sample['input_ids'], ()))
    for p, u in b.checkpoint.unit.items():
        z = b.head(passed.at(u.block), change([p]))
        assert close(b.numpy(z), by_hand(route, sample['input_ids'], [p])), p

@kinds
@routes
@pytest.mark.parametrize('method', ['search', 'gptq'])
def test_all_units_are_rounded(kind, route, method):
    "With less error than min-max leaves, wherever a block is met"
    b, ids = opened(kind, route), np.random.default_rng(1).integers(0, V, (8, 64))
    plan = dict.fromkeys(b.checkpoint.unit, F4)
    done, simple = (dict(round_model(b, ids, plan, m)) for m in (method, 'minmax'))
    assert {*done} == {*b.checkpoint.unit}
    def off(found):
        return np.mean([((b.numpy(b.logits(r[None], as_overrides(found)))-by_hand(route, r[None], ()))**2).mean() for r in ids])
    assert off(done) < off(simple)

@routes
def test_every_call_of_a_block_is_heard(route):
    b, ids = opened(Parts, route), np.random.default_rng(1).integers(0, V, (2, 12))
    heard = Statistics(b, ids, False)
    found = {u.block: heard[p].count if heard[p] else 0 for p, u in b.checkpoint.unit.items() if u.block is not None}
    assert found == {i: ids.size*route.count(i) for i in range(4)}

@pytest.mark.parametrize('second', [5, 12], ids=['a part of the picture', 'all of it'])
def test_gptq_compares_a_block_that_is_met_twice_call_by_call(second):
    "As a tower that sees tiles and then the whole picture: other rows, or as many of them"
    from optiq.rounding import _hear_next, _Passage
    from optiq.statistics import Chunks
    class Twice(Model):
        def __call__(self, ids):
            x = self.embed(ids)
            return self.lm_head(mx.concatenate([self.blocks[0](x), self.blocks[0](3*x[:, :second])], 1))
    b, ids = opened(Parts, (0,)), np.random.default_rng(1).integers(0, V, (8, 12))
    b.model = Twice(())
    assert {*dict(round_model(b, ids, dict.fromkeys(b.checkpoint.unit, F4)))} == {*b.checkpoint.unit}
    chunks, units = Chunks(b, ids), {u.path: u for u in b.checkpoint.units if u.block == 0}
    p = _Passage(b, {}, units, chunks, {}, chunks.embed(), chunks.embed())
    p.hear_clean(0, units)
    for left in units, {'blocks.0.out': units['blocks.0.out']}: # nothing is rounded yet, so nothing is lacking
        heard, gap = _hear_next(p, 0, left)
        assert gap.count == heard[next(iter(left))].count > 0 and all(float(abs(x).max()) < 1e-5 for x in gap.lacks)

def test_a_path_is_taken_where_an_annotation_says_so(tmp_path):
    "A file or a folder may be a Path everywhere; a name may not"
    from pathlib import Path
    from optiq import kl_sweep
    from optiq.evals.perplexity import evaluation_tokens
    from optiq.knapsack import allocate
    from optiq.latency import latency, predict_speeds
    from optiq.models import Checkpoint
    from optiq.pipeline import compare
    from optiq.request import Caps, Texts, Weights
    from optiq.score import perplexity, run_task
    from optiq.show.explore import explore
    here, text = Path(Checkpoint('demo').folder), tmp_path/'t.txt'
    text.write_text('\n'.join(f'A line of {n} words that is long enough to be read, and says nothing else at all.'*2 for n in range(200)))
    few = dict(n=2, seq_len=16)
    assert kl_sweep(here, formats=[4], calibration=text, rounding='minmax', progress=False, **few).values
    assert evaluation_tokens(text, Checkpoint('demo').tokenizer, 2, 16).shape == (2, 16)
    for report in (compare(here, evaluation=text, **few), perplexity(here, source=text, **few), run_task('perplexity', here, n=2, seq_len=16)):
        report.save(tmp_path/'r.json')
    sweep = type('', (), {})
    for refused in (lambda: latency(here, chip=Path('M3 Max')), lambda: predict_speeds(here, chip=Path('M3 Max')),
                    lambda: explore(sweep, chip=Path('x')), lambda: allocate(sweep, tie=Path('qkv')), lambda: Caps(chip=Path('x')),
                    lambda: Weights(protect=Path('embed')), lambda: kl_sweep(here, backend=Path('mlx')), lambda: run_task(Path('kl'), here)):
        with pytest.raises(ValueError, match='^`.*, and should be') as e: refused()
        assert '\n' not in str(e.value)
    assert Texts(calibration=text).calibration == text

def test_a_wrong_object_is_refused_by_the_function_it_was_given_to():
    "What a loop over all public functions, their arguments and ten wrong objects found"
    from optiq.calibration import fingerprint, shape_of
    from optiq.evals.ai2d import ai2d
    from optiq.evals.gsm8k import gsm8k
    from optiq.evals.perplexity import evaluate, overrides_of
    from optiq.evals.tasks import answers
    from optiq.evals.throughput import throughput
    from optiq.knapsack import pose
    for wrong in (lambda: gsm8k('demo', [1]), lambda: gsm8k('demo', out=5), lambda: ai2d('demo', out=5), lambda: answers('demo', [1]),
                  lambda: throughput('demo', make_cache=5), lambda: evaluate('demo', [1]), lambda: evaluate('demo', [], tick=5),
                  lambda: overrides_of({}, quantize=5), lambda: fingerprint([1]), lambda: shape_of([1]), lambda: pose(None, pin=5)):
        with pytest.raises(ValueError) as e: wrong()
        assert '\n' not in str(e.value)

def test_three_more_wrong_objects_are_named(tmp_path):
    from optiq.evals.perplexity import evaluate
    from optiq.kv.attention import codec_of
    from optiq.material.tiny import tiny
    from optiq.models import Checkpoint
    from optiq.plan import uniform
    from optiq.show.plots import plan_svg
    c = Checkpoint(tiny('llama', tmp_path/'m'))
    for wrong in (lambda: evaluate(c, np.ones((1, 8), int), {'a': 1}), lambda: codec_of(5)):
        with pytest.raises(ValueError, match='should be a Format|should have overrides or a Backend'): wrong()
    plan = uniform(c, 4)
    assert plan_svg(plan, colours={'a': 1}) == plan_svg(plan)

def test_texts_and_rows_that_are_none_are_refused(tmp_path):
    "Arguments of a right type that hold nothing, or something else"
    from optiq.evals.ai2d import ai2d
    from optiq.evals.gsm8k import gsm8k
    from optiq.evals.kl import reference, score_against
    from optiq.evals.needle import needle
    from optiq.evals.perplexity import evaluate
    from optiq.evals.tasks import answers
    from optiq.measure.estimate import estimate
    from optiq.measure.gradient import screened_sweep
    from optiq.material.tiny import tiny
    from optiq.models import Checkpoint
    c = Checkpoint(tiny('llama', tmp_path/'m'))
    one, no_text = np.ones((1, 8), int), ((), [], np.ones(8, int), np.ones((0, 8), int), np.ones((2, 0), int))
    stored = reference(c, one, 4, tmp_path/'stored')
    tokens = [partial(f, t) for t in no_text for f in (partial(evaluate, c), partial(reference, c), partial(score_against, stored, c))]
    tokens += [partial(estimate, c, [4], t) for t in (*no_text, (0, 8), ('a', 8), (8,))]
    wrong = dict(tokens=[*tokens, partial(screened_sweep, c, (), [4], [4.5])], beside=[partial(evaluate, c, one, beside=[1])],
                 rows=[partial(answers, c, [{}]), partial(answers, c, [dict(prompt=1, answer='')]), partial(gsm8k, c, [{}])],
                 questions=[partial(ai2d, c, questions=q) for q in ([1], [{}], [], (1,))],
                 lengths=[partial(needle, c, lengths=x) for x in ([object()], ['a'], [64.5])], depths=[partial(needle, c, [64], ['x'])])
    for name, calls in wrong.items():
        for call in calls:
            with pytest.raises(ValueError, match=f'^`{name}`') as e: call()
            assert '\n' not in str(e.value)
