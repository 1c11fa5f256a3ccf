"Calibration text: named, seeded, disjoint from evaluation, never replaced in silence"
import json
from itertools import islice

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from optiq.backends.mlx import MLXBackend
from optiq.backends.torch import TorchBackend
from optiq.calibration import before, block_hashes, fingerprint, overlap, passages, token_batch, unscored
from optiq.evals.kl import reference, score_against
from optiq.evals.needle import _pairs_of
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.score import text_tokens
from optiq.formats import Format
from optiq.measure.gradient import _second_order
from optiq.plan import uniform
from optiq.models import Checkpoint
from optiq.measure.kl import kl_divergence, perturb, probes
from optiq.sensitivity import kl_sweep
from optiq.material.tiny import tiny

LINES = [f'Passage number {i} is long enough to count, because it says the same thing more than once: {i}, {i}, {i}, {i}, {i}.'
         for i in range(60)]

class Letters:
    def encode(self, text, **_): return [ord(c) for c in text]

def write(path, suffix):
    if suffix == 'txt': path.write_text('\n'.join(LINES))
    elif suffix == 'jsonl': path.write_text('\n'.join(json.dumps(dict(text=t)) for t in LINES))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.table(dict(text=LINES)), path)

@pytest.mark.parametrize('suffix', ['txt', 'jsonl', 'parquet'])
def test_files(tmp_path, suffix):
    path = tmp_path/f'text.{suffix}'
    write(path, suffix)
    train, test, every = (passages(path, s) for s in ('train', 'test', 'all'))
    assert every == LINES and sorted(train+test) == sorted(LINES) and not set(train) & set(test) and test

def test_questions_and_answers(tmp_path):
    path = tmp_path/'qa.jsonl'
    path.write_text(json.dumps(dict(question='q'*80, answer='a'*80)))
    assert passages(path, 'all')[0].startswith('Question: qqq')
    path.write_text(json.dumps(dict(foo=1)))
    with pytest.raises(ValueError, match='foo'): passages(path, 'all')

def test_what_cannot_be_had_is_an_error_that_names_alternatives(tmp_path):
    with pytest.raises(ConnectionError, match='or bundled'): passages('wikitext2')
    with pytest.raises(FileNotFoundError, match='bundled, wikitext2'): passages('nowhere.txt')
    (tmp_path/'short.txt').write_text('too short\n')
    with pytest.raises(ValueError, match='100 characters'): passages(tmp_path/'short.txt', 'all')
    (tmp_path/'short.txt').write_text('')
    with pytest.raises(ValueError, match='short.txt has no text on the all side'): passages(tmp_path/'short.txt', 'all', -1)

def test_tokens_are_seeded_and_of_fixed_length():
    a, b, c = (token_batch(LINES, Letters(), 3, 50, seed) for seed in (1, 1, 2))
    assert a.shape == (3, 50) and (a == b).all() and not (a == c).all()
    assert fingerprint(a) == fingerprint(b) != fingerprint(c) != fingerprint(a.reshape(5, 30))
    in_order = token_batch(LINES, Letters(), 2, 20, None)
    assert ''.join(map(chr, in_order.ravel())) == LINES[0][:40] and in_order.dtype == np.int32
    with pytest.raises(ValueError, match='need 1000000'): token_batch(LINES, Letters(), 1000, 1000)
    there = sum(len(t)+1 for t in LINES)//20
    assert token_batch(LINES, Letters(), 1000, 20, fewer=True).shape == (there, 20)

def test_bundled_sides_are_disjoint():
    test = islice(passages('bundled', 'test', min_chars=-1), 500) # of 2,000: each takes 4 ms to make
    assert not set(passages('bundled', min_chars=-1)) & set(test)

# What a tokenizer puts before a text

@pytest.fixture(scope='module', params=[TorchBackend, MLXBackend], ids=['torch', 'mlx'])
def greeted(request, tmp_path_factory):
    "A model whose tokenizer begins every text with a token of its own, and its tokens"
    folder = tiny('llama', tmp_path_factory.mktemp('bos')/'m', shape=dict(num_hidden_layers=2), dtype='float32')
    file = str(folder/'tokenizer.json')
    t = Tokenizer.from_file(file)
    t.post_processor = TemplateProcessing(single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
    t.save(file)
    b = request.param(Checkpoint(folder))
    return b, token_batch(LINES, b.checkpoint.tokenizer, 2, 33)

def in_text(b, tokens, overrides={}): # ▸ (n, T-1, V) logits after the first position
    return b.logits(tokens, overrides)[:, 1:]

def test_every_sequence_begins_as_the_tokenizer_begins_a_text(greeted):
    b, tokens = greeted
    t = b.checkpoint.tokenizer
    assert before(t) == [0] and (tokens[:, 0] == 0).all() and tokens.shape == (2, 33) and unscored(b.checkpoint, tokens) == 1
    del_bos = tokens[:, 1:]
    assert t.decode(del_bos[0]) in '\n'.join(t.decode(t(line)['input_ids'][1:]) for line in LINES)
    assert unscored(b.checkpoint, del_bos) == 0 and fingerprint(tokens) != fingerprint(del_bos)
    with pytest.raises(ValueError, match='no room for text'): token_batch(LINES, t, 1, 1)
    with pytest.raises(ValueError, match='two tokens at least'): text_tokens(b.checkpoint, n=1, seq_len=2)
    demo = Checkpoint('demo')
    assert before(demo.tokenizer) == [] and unscored(demo, np.zeros((2, 4), np.int32)) == 0

def test_what_is_predicted_before_all_text_is_scored_nowhere(greeted, tmp_path):
    b, tokens = greeted
    sweep = kl_sweep(b, tokens, [Format(3)], progress=False, rounding='minmax')
    z = in_text(b, tokens)
    for u, f in probes(b.checkpoint.units, [Format(3)])[::4]:
        want = b.numpy(kl_divergence(b.xp, z, in_text(b, tokens, perturb((u, f))))).mean(1)
        np.testing.assert_allclose(sweep.values[u.path, f], want, rtol=1e-3, atol=1e-9)
    plan = overrides_of(uniform(b.checkpoint, 3))
    score, z_q = evaluate(b, tokens, {'3': plan}), in_text(b, tokens, plan)
    np.testing.assert_allclose(score['3'].kl, b.numpy(kl_divergence(b.xp, z, z_q)).mean(1), rtol=1e-3)
    np.testing.assert_allclose(score['3'].agree, (b.numpy(z.argmax(-1)) == b.numpy(z_q.argmax(-1))).mean(1))
    log_p = b.numpy(z)-np.log(np.exp(b.numpy(z).astype(float)).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p[:, :-1], tokens[:, 2:, None].astype(int), -1)[..., 0].mean(1)
    np.testing.assert_allclose(score['reference'].nll, nll, rtol=1e-4)
    stored = reference(b, tokens, None, tmp_path)
    again = score_against(stored, b, tokens, plan)
    np.testing.assert_allclose(again.kl, score['3'].kl, rtol=1e-3)
    assert stored.perplexity == pytest.approx(score['reference'].perplexity, rel=1e-4)
    assert again.tokens.shape == score['3'].tokens.shape == (3, 2, 32)

def test_the_gradient_does_not_see_it_either(greeted, monkeypatch):
    b, tokens = greeted
    todo = probes(b.checkpoint.units, [Format(3)])[1:4]
    want = _second_order(b, tokens, todo)
    if b.name == 'torch':
        logits = b.logits
        monkeypatch.setattr(b, 'logits', lambda batch: b.xp.cat([0*logits(batch)[:, :1], logits(batch)[:, 1:]], 1))
        assert _second_order(b, tokens, todo) == want
    monkeypatch.setattr('optiq.measure.gradient.unscored', lambda c, tokens: 0)
    assert _second_order(b, tokens, todo) != want

def test_prompts_have_it_and_answers_have_not(greeted):
    t = greeted[0].checkpoint.tokenizer
    (prompt, answer), = _pairs_of(t, [dict(prompt='The river', answer='low')])
    assert prompt == t('The river')['input_ids'] and 0 not in answer

def test_calibration_text_is_known_again_behind_it(greeted):
    b, tokens = greeted
    sweep = kl_sweep(b, tokens, [Format(3)], progress=False, method='gradient', rounding='minmax')
    text = tokens[:, 1:].reshape(1, -1)
    assert overlap(sweep.header['blocks'], text) == overlap(block_hashes(tokens[:, 1:]), text) == 1
