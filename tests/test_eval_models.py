"Evaluations of real checkpoints against independent computations, and what they refuse"
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from optiq.arrays import top
from optiq.backends.mlx import MLXBackend
from optiq.backends.torch import TorchBackend
from optiq.calibration import block_hashes, fingerprint, overlap, passages, token_batch
from optiq.convert import convert
from optiq.evals import harness as harness_module
from optiq.evals.gsm8k import gsm8k, questions
from optiq.evals.kl import _merged, reference, score_against
from optiq.evals.needle import _margins, needle, _needle_trials, _smallest_margin
from optiq.evals.perplexity import evaluate, evaluation_tokens, overrides_of, check_calibration
from optiq.report import Report
from optiq.score import run_task, same_words, text_tokens
from optiq.evals.tasks import compose
from optiq.evals.throughput import throughput
from optiq.evals.verify import verify
from optiq.formats import Format
from optiq.knapsack import allocate
from optiq.plan import uniform
from optiq.folder import _demo
from optiq.models import Checkpoint
from optiq.sensitivity import kl_sweep

@pytest.fixture(scope='module')
def b(): return TorchBackend(Checkpoint('demo'))

@pytest.fixture(scope='module')
def m(): return MLXBackend(Checkpoint('demo'))

@pytest.fixture(scope='module')
def tokens(b): return evaluation_tokens('bundled', b.checkpoint.tokenizer, n=3, seq_len=48)

@pytest.fixture(scope='module')
def plan(b): return overrides_of(uniform(b.checkpoint, Format(4)))

@pytest.fixture(scope='module')
def saved(b, tmp_path_factory):
    "The _demo model, measured on a little text and converted"
    folder = tmp_path_factory.mktemp('saved')
    calibration = token_batch(passages('bundled'), b.checkpoint.tokenizer, 2, 64)
    sweep = kl_sweep(b, calibration, [4, 8], progress=False, rounding='minmax')
    convert('demo', allocate(sweep, target_bpw=4.5), folder/'m', sweep)
    return folder/'m'

# perplexity and KL

def test_perplexity_of_smollm2_is_that_of_transformers(shared):
    folder = shared.resolve().parent/'models'/'smollm2'
    if not folder.is_dir(): pytest.skip('needs SmolLM2 beside the shared folder')
    from transformers import AutoModelForCausalLM
    c = Checkpoint(folder)
    tokens = text_tokens(c, str(shared/'data'/'wikitext2'/'test.txt'), 2, 128)
    ids = torch.tensor(tokens).long()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(): want = float(model(input_ids=ids, labels=ids).loss.exp())
    assert evaluate(c, tokens)['reference'].perplexity == pytest.approx(want, rel=5e-5)

@pytest.mark.parametrize('top_k', [8, 64, None])
def test_stored_reference_bounds_the_kl_from_below(b, tokens, plan, tmp_path, top_k):
    exact = evaluate(b, tokens, {'u': plan})['u']
    s = score_against(reference(b, tokens, top_k, tmp_path), b, tokens, plan)
    if top_k is None: np.testing.assert_allclose(s.kl, exact.kl, atol=1e-6)
    else: assert (s.tokens[1] <= exact.tokens[1]+1e-6).all() and (s.kl > .5*exact.kl).all()
    np.testing.assert_allclose(s.nll, exact.nll, atol=1e-6)
    np.testing.assert_array_equal(s.agree, exact.agree)

def test_kl_from_disk_is_that_of_float64(b, tokens, plan, tmp_path):
    p, q = (torch.log_softmax(b.logits(tokens, v).double(), -1) for v in ({}, plan))
    want = (p.exp()*(p-q)).sum(-1).mean(1).numpy()
    got = score_against(reference(b, tokens, None, tmp_path), b, tokens, plan).kl
    np.testing.assert_allclose(got, want, atol=1e-5)

def test_both_libraries_store_and_score_alike(b, m, tokens, plan, tmp_path):
    want = score_against(reference(b, tokens, 32, tmp_path/'t'), b, tokens, plan)
    got = score_against(reference(m, tokens, 32, tmp_path/'m'), m, tokens, plan)
    np.testing.assert_allclose(got.kl, want.kl, rtol=1e-3)
    z = m.logits(tokens[:1, :4])
    ids = top(z, 5)
    assert (np.array(ids) == torch.tensor(m.numpy(z)).topk(5).indices.numpy()).all()
    np.testing.assert_allclose(m.numpy(m.xp.logsumexp(_merged(m, z, ids), axis=-1)), m.numpy(m.xp.logsumexp(z, axis=-1)), rtol=1e-6)

def test_reference_is_computed_once_and_never_mistaken(b, tokens, tmp_path, monkeypatch):
    r = reference(b, tokens, 8, tmp_path)
    import optiq.evals.kl as kl
    monkeypatch.setattr(kl, '_compute', lambda *a: pytest.fail('computed again'))
    assert reference(Checkpoint('demo'), tokens, 8, tmp_path).folder == r.folder == reference('demo', tokens, 8, tmp_path).folder
    with pytest.raises(ValueError, match='other tokens'): score_against(r, b, tokens[:, :40])
    with pytest.raises(ValueError, match='give fewer'): reference(b, tokens, 4096, tmp_path)
    assert not [p for p in (tmp_path/'reference').iterdir() if p.name.startswith('.')] # nothing half-written

def test_positions_and_tail(b, tokens, plan):
    s = evaluate(b, tokens, {'u': plan})['u']
    mean, se = s.by_position([0, 24, 48])
    assert mean.mean() == pytest.approx(s.kl.mean()) and len(se) == 2
    assert s.kl_p99 == pytest.approx(np.quantile(s.tokens[1], .99)) and s.flips.mean() == pytest.approx(1-s.agree.mean())

def test_other_tokenizer_is_refused(b, tmp_path):
    from optiq.material.tiny import tiny
    other = Checkpoint(tiny('llama', tmp_path/'t'))
    with pytest.raises(ValueError, match='different tokenizers, so no KL'): same_words(Checkpoint('demo'), other)
    shutil.copytree(_demo(), tmp_path/'d')
    t = json.loads((tmp_path/'d'/'tokenizer.json').read_text())
    words = t['model']['vocab']
    (x, i), (y, j) = list(words.items())[100:102]
    words[x], words[y] = j, i
    (tmp_path/'d'/'tokenizer.json').write_text(json.dumps(t))
    with pytest.raises(ValueError, match='has another id'): same_words(Checkpoint('demo'), Checkpoint(tmp_path/'d'))
    with pytest.raises(ValueError, match='so no KL'): run_task('kl', str(tmp_path/'d'), 'demo', 2, seq_len=32)

def test_calibration_text_is_refused(saved, b, tmp_path):
    c, t = Checkpoint(saved), b.checkpoint.tokenizer
    own = token_batch(passages('bundled'), t, 2, 64)
    for tokens in (own, own.reshape(1, 128)[:, 3:99], own[::-1, 1:]): # as they were, shifted, in another order
        with pytest.raises(ValueError, match='calibration text of'): check_calibration(c, tokens)
    check_calibration(c, evaluation_tokens('bundled', t, 8, 128))
    check_calibration(Checkpoint('demo'), own) # was not calibrated
    text = tmp_path/'t.txt'
    text.write_text('\n'.join(p.replace('\n', ' ') for p in passages('bundled')))
    with pytest.raises(ValueError, match='calibration text'):
        (tmp_path/'t.jsonl').write_text('\n'.join(json.dumps(dict(text=t.decode(own.reshape(-1)[k:k+128]))) for k in (0,)))
        run_task('perplexity', str(saved), n=1, seq_len=100, source=str(tmp_path/'t.jsonl'))

def test_overlap_of_other_text_is_none():
    r = np.random.default_rng(0)
    a, c = r.integers(0, 4096, (2, 8, 128))
    assert overlap(block_hashes(a), c) == 0 and overlap(block_hashes(a), a) == 1 and overlap([], a) == 0
    assert fingerprint(a) != fingerprint(c)

def test_too_many_samples():
    with pytest.raises(ValueError, match='give less `n`'): run_task('perplexity', 'demo', n=10**6)
    with pytest.raises(ValueError, match='two tokens'): run_task('perplexity', 'demo', n=2, limit=1)

def test_kl_task(saved, tmp_path):
    r = run_task('kl', str(saved), 'demo', 3, seq_len=48, cache=tmp_path)
    a, row = r.rows
    assert a['name'] == 'demo' and a['kl'] == a['kl_high'] == 0 and 'perplexity' in Report.compare(r).verdicts
    assert row['kl_low'] < row['kl'] < row['kl_high'] and row['kl_n'] == 3
    assert row['kl_p99'] > row['kl'] and 0 < row['flips'] < 1 and r.about['by_position'][0]['start'] == 0
    with pytest.raises(ValueError, match='as `baseline`'): run_task('kl', 'demo', n=2)

# word problems

def quantized(bits):
    from mlx_lm.models.cache import QuantizedKVCache
    return lambda model: [QuantizedKVCache(group_size=64, bits=bits) for _ in model.layers]

def test_batches_caches_and_libraries_write_alike(b, m):
    prompts = [f'Question: Sort {x}.\nAnswer:' for x in ('9 4 7', '31 2 15 8', '5 1')]
    want = compose(b, prompts, 24)
    assert want == compose(m, prompts, 24) == [t for p in prompts for t in compose(m, [p], 24)]
    from mlx_lm.models.cache import KVCache, make_prompt_cache
    class Lone(KVCache):
        @property
        def merge(self): raise AttributeError('cannot be merged')
    assert want == compose(m, prompts, 24, make_cache=make_prompt_cache) # _merged into a batch
    assert want == compose(m, prompts, 24, make_cache=lambda model: [Lone() for _ in model.layers]) # one by one
    with pytest.raises(ValueError, match='MLX backend'): compose(b, prompts, 4, make_cache=make_prompt_cache)

def test_stop_strings_end_a_text_and_are_not_part_of_it(b, m):
    prompts = ['Question: Sort 9 4 7 3 1 8.\nAnswer:', 'Question: Sort 9 2.\nAnswer:']
    whole = compose(b, prompts, 40)
    stop = (whole[0][4:6],)
    for x in (b, m):
        got = compose(x, prompts, 40, stop)
        assert got[0] == whole[0][:whole[0].index(stop[0])]
    t = b.checkpoint.tokenizer
    ids = m.write([t.encode(prompts[0])], 40, t.eos_token_id, stop)[0]
    assert len(ids) < len(t.encode(whole[0])) # really stopped

def test_word_problems_resume_and_refuse(b, tmp_path, monkeypatch):
    rows, out = questions('word-problems', 6), tmp_path/'a.jsonl'
    ask = partial(gsm8k, b, rows, shots=0, figure='word_problems', batch=2)
    want = ask(out=tmp_path/'whole.jsonl')
    ask_few = gsm8k(b, rows[:4], shots=0, figure='word_problems', batch=2, out=out)
    assert ask_few.rows[0]['word_problems_n'] == 4
    out.write_bytes(out.read_bytes()[:-30]) # cut short inside the fourth answer
    import optiq.evals.gsm8k as module
    asked, was = [], module.answers
    monkeypatch.setattr(module, 'answers', lambda b, r, *a: asked.extend(r) or was(b, r, *a))
    assert ask(out=out).rows == want.rows and len(asked) == 4 # the third was in one batch with the fourth, and is asked again
    assert out.read_text() == (tmp_path/'whole.jsonl').read_text()
    line = json.loads(out.read_text().splitlines()[1])
    assert {'question', 'answer', 'prompt', 'response', 'extracted', 'right'} <= set(line)
    with pytest.raises(ValueError, match='shots'): gsm8k(b, rows, shots=1, figure='word_problems', out=out)
    with pytest.raises(ValueError, match='other questions'): gsm8k(b, rows[::-1], shots=0, figure='word_problems', out=out)
    with pytest.raises(ValueError, match='no questions'): gsm8k(b, [])

def test_writing_and_the_short_cut_agree(b):
    rows = questions('word-problems', 8)
    fast, slow = (gsm8k(b, rows, shots=0, new_tokens=160, figure=f) for f in ('word_problems', 'gsm8k'))
    assert fast.rows[0]['items']['word_problems'] == slow.rows[0]['items']['gsm8k']

# needles

def test_margin_is_right_minus_best_wrong():
    z = np.array([[3., 1., 0.], [0., 5., 4.5]])
    assert _smallest_margin(z, [0, 1]) == .5 and _smallest_margin(z, [1, 1]) == -2

def test_padding_and_caches_do_not_change_a_margin(b, m):
    t = b.checkpoint.tokenizer
    rows = _needle_trials(t, (96, 160), (0., 1.), 1)
    assert all(len(t.encode(r['prompt']+' '+r['answer'])) <= r['length'] for r in rows)
    pairs = [(t.encode(r['prompt']), t.encode(' '+r['answer'])) for r in rows]
    together = _margins(b, pairs)
    np.testing.assert_allclose(together, [_margins(b, [p])[0] for p in pairs], atol=1e-3)
    np.testing.assert_allclose(together, _margins(m, pairs), atol=1e-2)
    from mlx_lm.models.cache import make_prompt_cache
    np.testing.assert_allclose(together, _margins(m, pairs, {}, make_prompt_cache), atol=1e-2)
    assert abs(together-_margins(m, pairs, {}, quantized(4))).max() > .01 # the cache under test was really used
    with pytest.raises(ValueError, match='MLX backend'): _margins(b, pairs, {}, make_prompt_cache)

def test_needle_report(b):
    r = needle(b, (96,), (0., .5, 1.), 2)
    row = r.rows[0]
    assert row['needle_n'] == 6 and [c['depth'] for c in row['grid']] == [0., .5, 1.] and sum(c['n'] for c in row['grid']) == 6
    assert row['items']['needle'] == [int(x > 0) for x in row['items']['margin']]
    assert _needle_trials(b.checkpoint.tokenizer, (96,), (0.,), 2) == _needle_trials(b.checkpoint.tokenizer, (96,), (0.,), 2)
    with pytest.raises(ValueError, match='grid is empty'): needle(b, (), (0.,), 2)
    with pytest.raises(ValueError, match='tokens at most'): needle(b, (10**6,), (0.,), 1)
    with pytest.raises(ValueError, match='spread over 20 cells; give a multiple of 20 as `n`'): run_task('needle', 'demo', n=30)

# speed, harness, verification

def test_throughput():
    r = throughput('demo', 16, 4, repeats=2)
    row = r.rows[0]
    for k in ('prompt_tps', 'decode_tps', 'peak_mb'): assert 0 < row[f'{k}_low'] <= row[k] <= row[f'{k}_high'] and row[f'{k}_n'] == 2
    assert {'cpu', 'mlx', 'device', 'date'} <= set(r.about)
    with pytest.raises(ValueError, match='two new ones'): throughput('demo', 16, 1)

def test_harness_names_the_remedy(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(ImportError, match=r'pip install "mlx-lm\[evaluate\]"'): run_task('harness:mmlu', 'demo')

def test_harness_hands_over_and_reads_back(monkeypatch):
    seen = {}
    class Eval:
        __version__ = '0'
        @staticmethod
        def simple_evaluate(**kw):
            seen.update(kw)
            return dict(samples={'b': [dict(doc_id=0, filter='none', acc=1.)],
                                 'a': [dict(doc_id=1, filter='none', acc=0.), dict(doc_id=0, filter='none', acc=1.)]})
    monkeypatch.setattr(harness_module, '_adapter', lambda: (Eval, lambda path, **kw: ('adapter', path)))
    r = run_task('harness:arc', 'demo', 'demo', n=3)
    row = r.rows[0]
    assert seen['tasks'] == ['arc'] and seen['limit'] == 3 and row['harness:arc'] == 2/3 and row['items']['harness:arc'] == [1, 0, 1]
    assert 'harness:arc' in r.metrics and 'arc' in repr(r)
    with pytest.raises(ValueError, match='run lm-eval itself'): harness_module._items_of(dict(samples=dict(x=[dict(doc_id=0, bleu=1)])), 'x')

TASK = '''task: local_sums
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
'''

def test_the_harness_itself_on_a_task_of_our_own(tmp_path, monkeypatch):
    "Where lm-eval is installed: its own loop on local data, without a network"
    pytest.importorskip('lm_eval')
    from lm_eval.tasks import TaskManager
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'cache'))
    rows = [dict(question=f'{n} + {n+3} =', choices=[str(2*n+3), str(2*n+5)], answer=0) for n in range(6)]
    (tmp_path/'sums.jsonl').write_text('\n'.join(map(json.dumps, rows))+'\n')
    (tmp_path/'sums.yaml').write_text(TASK.format(file=tmp_path/'sums.jsonl'))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    row = harness_module.harness('demo', 'local_sums', limit=4, batch=2, task_manager=tasks).rows[0]
    assert row['harness:local_sums_n'] == 4 and len(row['items']['harness:local_sums']) == 4
    assert row['harness:local_sums'] == np.mean(row['items']['harness:local_sums'])

def held(checks): return {n: h for n, h, _ in checks.rows}

def test_verify_a_conversion(saved):
    v = verify(saved, 'demo')
    assert v.ok and all(held(v).values()), v
    assert json.loads(json.dumps(v.figures()))['ok'] is True and '✓' in repr(v) and '<table>' in v._repr_html_()
    assert verify(saved).ok and held(verify(saved))['KL'] is None

def broken(saved, tmp_path, change):
    shutil.copytree(saved, tmp_path/'x')
    change(tmp_path/'x')
    return verify(tmp_path/'x', 'demo')

def edit(file, f):
    d = json.loads(file.read_text())
    f(d)
    file.write_text(json.dumps(d))

def test_verify_finds_a_cut_file(saved, tmp_path):
    v = broken(saved, tmp_path, lambda d: (d/'model.safetensors').write_bytes((d/'model.safetensors').read_bytes()[:-100]))
    assert not v.ok and held(v) == dict(opens=False)

def test_verify_finds_another_plan(saved, tmp_path):
    def change(d):
        edit(d/'optiq'/'plan.json', lambda p: p['units'][3].update(format='8g64' if p['units'][3]['format'] != '8g64' else '4g64'))
    v = broken(saved, tmp_path, change)
    assert not v.ok and held(v)['formats'] is False and held(v)['bytes'] is False

def test_verify_finds_other_weights_and_a_wrong_promise(saved, tmp_path):
    def change(d):
        edit(d/'optiq'/'plan.json', lambda p: [u.update(kl=(u['kl'] or 0)/50) for u in p['units']])
        data = bytearray((d/'model.safetensors').read_bytes())
        data[-1001] ^= 1
        (d/'model.safetensors').write_bytes(data)
    v = broken(saved, tmp_path, change)
    assert not v.ok and held(v)['KL'] is False and held(v)['reference'] is False and held(v)['bytes'] is True

def test_verify_finds_nan(saved, tmp_path):
    import mlx.core as mx
    def change(d):
        w = mx.load(str(d/'model.safetensors'))
        name = next(k for k in w if k.endswith('scales'))
        w[name] = mx.where(mx.arange(w[name].shape[-1]) == 0, mx.array(float('nan'), w[name].dtype), w[name])
        mx.eval(w)
        mx.save_safetensors(str(d/'model.safetensors'), w, {'format': 'mlx'})
    v = broken(saved, tmp_path, change)
    assert not v.ok and held(v)['finite'] is False

def test_verify_finds_a_broken_tokenizer(saved, tmp_path):
    v = broken(saved, tmp_path, lambda d: (d/'tokenizer.json').write_text('{'))
    assert not v.ok and held(v)['tokenizer'] is False

def test_verify_full_precision_and_nothing():
    assert verify('demo').ok and held(verify('demo'))['plan.json'] is None
    v = verify('no-such-model')
    assert not v.ok and held(v) == dict(opens=False)

def test_exit_status_and_json_of_the_commands(saved, tmp_path):
    from click.testing import CliRunner
    from optiq.cli import main
    def optiq(*args): return CliRunner().invoke(main, [*map(str, args)], prog_name='optiq')
    r = optiq('verify', saved, '--reference', 'demo', '--json')
    assert r.exit_code == 0 and json.loads(r.stdout)['ok'] is True
    shutil.copytree(saved, tmp_path/'x')
    (tmp_path/'x'/'tokenizer.json').write_text('{')
    r = optiq('verify', tmp_path/'x', '--json')
    assert r.exit_code == 1 and json.loads(r.stdout)['ok'] is False
    r = optiq('eval', saved, '--task', 'perplexity', '--baseline', 'demo', '--n-samples', 3, '--limit-tokens', 96, '--seq-len', 32, '--json')
    figures = json.loads(r.stdout)
    assert r.exit_code == 0 and {'task', 'metric', 'value', 'low', 'high', 'n', 'baseline', 'p_value'} <= set(figures)
    assert figures['metric'] == 'perplexity' and figures['n'] == figures['baseline']['n'] == 3
    r = optiq('eval', saved, '--task', 'kl')
    assert r.exit_code == 1 and r.stderr.startswith('error: KL is a distance between two models') and not r.stdout

@pytest.mark.parametrize('task, option', [('perplexity', dict(exact=True)), ('perplexity', dict(out='a.jsonl')), ('recall', dict(kv='4')),
    ('needle', dict(seq_len=32)), ('wer', dict(questions='x')), ('ai2d', dict(protocol='kld')), ('harness:arc', dict(kv='4'))])
def test_a_task_refuses_an_option_without_effect(task, option):
    with pytest.raises(ValueError, match=f'`{next(iter(option))}` has no effect on {task}'): run_task(task, 'demo', **option)

def test_the_context_of_a_model_that_sees_stands_in_its_part_for_text():
    from optiq.evals.needle import _check_long
    sees = SimpleNamespace(name='it', config=dict(model_type='gemma3', text_config=dict(max_position_embeddings=64)))
    with pytest.raises(ValueError, match='it reads 64 tokens at most, and a length is 65'): _check_long(sees, 65)
    _check_long(sees, 64)
