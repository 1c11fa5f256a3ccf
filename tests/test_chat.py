"mlx-lm's chat with our caches, and two models side by side"
import json

import pytest
from click.testing import CliRunner

from optiq import chat as module
from optiq.chat import _parted, chat, side_by_side
from optiq.cli import main
from optiq.convert import convert
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import uniform

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp('chat')
    c = Checkpoint(tiny('qwen3', place/'m', shape=dict(num_hidden_layers=1)))
    (place/'text.txt').write_text('\n\n'.join(f'The cat number {i} sat on a mat and ate {i+1} fish.' for i in range(400)))
    for bits in (4, 3): convert(c, uniform(c, bits), place/f'at{bits}')
    return place

def test_the_chat_is_that_of_the_library_with_our_caches(models, monkeypatch, tmp_path):
    seen = {}
    def look():
        model, _ = module.library.load(str(models/'at4'))
        seen.update(argv=list(module.sys.argv), caches=[type(x).__name__ for x in module.library.make_prompt_cache(model)])
    monkeypatch.setattr(module.library, 'main', look)
    before = module.library.load
    CliRunner().invoke(main, ['chat', str(models/'at4'), '--temp', '0.7'], catch_exceptions=False)
    assert seen['argv'] == ['mlx_lm.chat', '--model', str(models/'at4'), '--temp', '0.7'] and seen['caches'] == ['KVCache']
    from optiq.kv.config import save_kv_config
    from optiq.kv.layout import kv_layout
    from optiq.kv.sweep import kv_config
    layout = kv_layout(Checkpoint(models/'m'), 256)
    save_kv_config(kv_config(uniform(layout, 8), layout, {}), tmp_path/'kv.json', '')
    chat(str(models/'at4'), tmp_path/'kv.json')
    assert seen['caches'] != ['KVCache'] and module.library.load is before
    with pytest.raises(ValueError, match='--max-kv-size and .* exclude each other'):
        chat(str(models/'at4'), tmp_path/'kv.json', ['--max-kv-size', '10'])

def test_a_model_without_a_template_does_not_answer():
    with pytest.raises(ValueError, match='demo has no chat template'): chat('demo')

def test_where_answers_part():
    assert _parted([1, 2], [1, 2]) is None and _parted([1, 2], [1, 3]) == 1 and _parted([1], [1, 2]) == 1 and _parted([], [1]) == 0

def test_side_by_side(models, tmp_path):
    a, b, m = (str(models/n) for n in ('at4', 'at3', 'm'))
    how = dict(n=2, seq_len=32, prompts=['The cat'], new_tokens=8, backend='mlx', evaluation=str(models/'text.txt'))
    s = side_by_side(a, b, m, **how)
    assert [r['name'] for r in s.report.rows] == [m, a, b] and 'units differ' in repr(s) and '<table' in s._repr_html_()
    assert len(s.differ) == len(s.plans[0]) and s.report.rows[1]['kl'] < s.report.rows[2]['kl']
    assert s.answers[0]['prompt'] == 'The cat' and 0 <= s.answers[0]['parts_at'] < 8
    same = side_by_side(a, a, **how)
    assert not same.differ and same.answers[0]['parts_at'] is None
    assert 'the same 8 tokens' in repr(same) and 'have the same formats' in repr(same)

def test_scores_that_lie_beside(models):
    c = Checkpoint(models/'at4')
    header = dict(optiq='responses', settings=dict(model=c.fingerprint, shots=3))
    rows = [dict(question='1+1?', answer='#### 2', response='so 2'), dict(question='1+2?', answer='#### 3', response='4')]
    for name, h in (('mine', header), ('other', dict(header, settings=dict(model='another', shots=3)))):
        (models/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, [h, *rows]))+'\n')
    text = ['--n-evaluation', '1', '--evaluation', str(models/'text.txt'), '--backend', 'mlx', '--json']
    r = CliRunner().invoke(main, ['compare', str(models/'at4'), str(models/'at3'), *text, '--prompt', 'A', '--new-tokens', '2'])
    found = {x['name']: x for x in json.loads(r.stdout)['rows']}
    assert found[str(models/'at4')]['gsm8k'] == .5 and 'gsm8k' not in found[str(models/'at3')]
