"Scores against independent computations"
import numpy as np
import pytest
import torch

from optiq.backends.mlx import MLXBackend
from optiq.backends.torch import TorchBackend
from optiq.evals.perplexity import evaluate, evaluation_tokens, overrides_of
from optiq.report import Report, score_row
from optiq.evals.tasks import _Share, answers
from optiq.formats import Format
from optiq.measure.gradient import agreement, gradient_sweep, screened_sweep
from optiq.plan import make_plan, uniform
from optiq.folder import _demo
from optiq.models import Checkpoint
from optiq.pipeline import compare
from optiq.sensitivity import kl_sweep

@pytest.fixture(scope='module')
def b(): return TorchBackend(Checkpoint('demo'))

@pytest.fixture(scope='module')
def tokens(b): return evaluation_tokens('bundled', b.checkpoint.tokenizer, n=4, seq_len=64)

def test_perplexity_is_that_of_transformers(b, tokens):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(_demo(), dtype=torch.float32)
    ids = torch.tensor(tokens).long()
    with torch.no_grad(): want = float(model(input_ids=ids, labels=ids).loss.exp())
    assert evaluate(b, tokens)['reference'].perplexity == pytest.approx(want, rel=1e-5)

def test_kl_is_that_of_float64(b, tokens):
    plan = overrides_of(uniform(b.checkpoint, Format(4)))
    got = evaluate(b, tokens, {'u': plan})['u']
    p, q = (torch.log_softmax(b.logits(tokens, v).double(), -1) for v in ({}, plan))
    want = (p.exp()*(p-q)).sum(-1).mean(1).numpy()
    np.testing.assert_allclose(got.kl, want, rtol=1e-5)
    np.testing.assert_allclose(got.agree, (p.argmax(-1) == q.argmax(-1)).double().mean(1))

def test_backends_give_the_same_scores(b, tokens):
    a, m = (evaluate(x, tokens, {'u': overrides_of(uniform(x.checkpoint, Format(3)))})['u'] for x in (b, MLXBackend(b.checkpoint)))
    np.testing.assert_allclose(a.kl, m.kl, rtol=1e-3)

def test_gradient_ranks_and_screening_saves(b, tokens):
    tokens = tokens[:, :32]
    exact = kl_sweep(b, tokens, [4, 8], progress=False, rounding='minmax')
    assert agreement(gradient_sweep(b, tokens, [4, 8]), exact, Format(4))['spearman'] > .85
    screened = screened_sweep(b, tokens, [4, 8], [4.5])
    assert len(screened.header['exact']) < len(exact.units)
    k = (screened.header['exact'][0], Format(4))
    np.testing.assert_allclose(screened.values[k], exact.values[k], rtol=1e-3)

def test_answers_without_and_with_writing_agree(b):
    from optiq.material.mixture import lists
    rows = lists(6, 'test')
    wrong = [r | dict(answer=r['answer'][::-1]) for r in rows] # never what the model writes, so it has to write
    assert [a.strip() for a in answers(b, rows)] == [a.strip() for a in answers(b, wrong, new_tokens=60)]

def test_wilson():
    assert _Share(8, 10).interval == pytest.approx((.4902, .9433), abs=1e-4)

def test_report_and_compare(b, tokens, tmp_path):
    s = evaluate(b, tokens)['reference']
    r = Report([score_row('x', make_plan(b.checkpoint, b.checkpoint.formats), s)], dict(text='t'))
    r.save(tmp_path/'r.json')
    assert Report.load(tmp_path/'r.json').rows == r.rows and '<table>' in r._repr_html_() and len(r.to_frame()) == 1
    rows = compare('demo', None, n=2, seq_len=64).rows
    assert len(rows) == 1 and rows[0]['true_bpw'] == 16
