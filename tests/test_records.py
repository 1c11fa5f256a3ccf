"Calibration text from records: plain, pairs, dialogues through the chat template, and mixtures of sources"
import json
from collections import Counter

import numpy as np
import pytest

from optiq.calibration import passages, token_batch
from optiq.sensitivity import kl_sweep

WORDS = 'the river is long and its banks are low, '*4

class Letters:
    chat_template = None
    def encode(self, text, add_special_tokens=True): return [1]*add_special_tokens+[ord(c) for c in text]

class Chatty(Letters):
    "Writes roles in brackets, and the first token itself, as the templates of Gemma and Llama 3 do"
    chat_template = 'x'
    def apply_chat_template(self, messages, tokenize):
        if messages[0]['role'] == 'system': raise ValueError('System role not supported')
        return '\1'+''.join(f"<{m['role']}>{m['content']}" for m in messages)

def chat(i): return [dict(role='user', content=f'{i} {WORDS}'), dict(role='assistant', content=[dict(type='text', text=f'yes {i}')])]

RECORDS = dict(text=lambda i: dict(text=f'{i} {WORDS}', messages=None), prompt=lambda i: dict(prompt=f'{i} {WORDS}', completion='yes'),
               question=lambda i: dict(question=f'{i} {WORDS}', answer='yes'), messages=lambda i: dict(prompt='x', id=i, messages=chat(i)))

def write(path, rows):
    if path.suffix == '.parquet':
        pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
        pq.write_table(pa.Table.from_pylist(rows), path)
    else: path.write_text('\n'.join(map(json.dumps, rows))+'\n')
    return path

def as_text(row): return ''.join(map(chr, row))

@pytest.mark.parametrize('suffix', ['jsonl', 'parquet'])
@pytest.mark.parametrize('form', RECORDS)
def test_each_form_of_record(tmp_path, form, suffix):
    rows = [RECORDS[form](i) for i in range(40)]
    if form == 'messages' and suffix == 'parquet':
        for r in rows: r['messages'][1]['content'] = r['messages'][1]['content'][0]['text'] # a column has one type
    file = write(tmp_path/f't.{suffix}', rows)
    learn, score = passages(file), passages(file, 'test')
    assert len(learn)+len(score) == 40 and not {*learn} & {*score}
    tokens = token_batch(learn, Chatty(), 4, 300)
    assert tokens.shape == (4, 300) and (tokens[:, 0] == 1).all() and not (tokens[:, 1:] == 1).any()
    marks = dict(text=WORDS, prompt='Prompt: ', question='Question: ', messages='<user>')
    for row in tokens: assert marks[form] in as_text(row)
    if form == 'messages':
        assert '<assistant>yes' in as_text(tokens[0]) and 'user: ' not in as_text(tokens.ravel())
        with pytest.raises(ValueError, match="'messages', and this model's tokenizer has no chat"): token_batch(learn, Letters(), 1, 50)

@pytest.mark.parametrize('row, said', [({'foo': 1}, "needs 'text', 'messages', or a pair .*foo"), ({'messages': 3}, 'messages'),
    ({'messages': [{'content': 'x'}]}, r"messages\[0\] needs a 'role'"), ({'messages': ['x']}, r"messages\[0\] needs a 'role'")])
def test_a_record_that_is_none(tmp_path, row, said):
    file = write(tmp_path/'t.jsonl', [RECORDS['text'](0), row])
    with pytest.raises(ValueError, match=f't.jsonl, line 2.*{said}') as e: passages(file, 'all')
    assert '\n' not in str(e.value)

def test_a_template_that_refuses_a_dialogue_and_long_ones_stay_whole(tmp_path):
    file = write(tmp_path/'t.jsonl', [dict(messages=[dict(role='system', content=WORDS*100)])])
    texts = passages(file, 'all')
    assert len(texts) == 1
    refused = 'does not take a dialogue that begins .system: the river.*System role'
    with pytest.raises(ValueError, match=refused): token_batch(texts, Chatty(), 1, 50)
    empty = write(tmp_path/'e.jsonl', [dict(messages=None), dict(messages=[dict(role='user', content=None)]), RECORDS['messages'](0)])
    assert len(passages(empty, 'all')) == 1

def test_a_mixture_gives_each_source_its_part(tmp_path):
    a = write(tmp_path/'a.jsonl', [dict(text='a'*150+str(i)) for i in range(300)])
    b = write(tmp_path/'b.jsonl', [dict(text='b'*150+str(i)) for i in range(300)])
    source = f'{a}:3,{b}:1'
    def parts(n, **more): return Counter('b' if 'b'*20 in as_text(r) else 'a' for r in token_batch(passages(source), Letters(), n, 50, **more))
    assert parts(8) == dict(a=6, b=2) and parts(4) == dict(a=3, b=1)
    few, many = (token_batch(passages(source), Letters(), n, 50) for n in (4, 32))
    assert np.array_equal(few, many[:4]) # the first ones measure, all of them teach
    short = write(tmp_path/'c.jsonl', [dict(text='c'*150)])
    mixed = passages(f'{a}:0.5,{short}:0.5', 'all')
    assert len(token_batch(mixed, Letters(), 20, 50, fewer=True)) == 7
    with pytest.raises(ValueError, match='the text has'): token_batch(mixed, Letters(), 20, 50)
    with pytest.raises(ValueError, match='positive'): passages(f'{a}:0,{b}:1')
    with pytest.raises(FileNotFoundError, match=', or a mixture such as'): passages(f'{a}:0.5,{b}')
    odd = write(tmp_path/'d,e:1', [dict(text='d'*150)]) # a file of such a name is that file
    assert 'd'*20 in passages(odd, 'all')[0]

def test_a_sweep_on_a_mixture_knows_it_again(tmp_path):
    from optiq.measure.sweep import learned_again
    from optiq.models import Checkpoint
    mine = write(tmp_path/'mine.jsonl', [RECORDS['text'](i) for i in range(60)])
    sweep = kl_sweep('demo', None, ['8g64'], calibration=f'bundled:0.5,{mine}:0.5', n=2, seq_len=16,
                     method='gradient', rounding='minmax', progress=False)
    learned, sweep.learned = sweep.learned, None
    sweep.header['learned'] = dict(source=sweep.header['calibration'], shape=[2, 16], fingerprint=sweep.header['fingerprint']['tokens'])
    assert np.array_equal(learned_again(sweep, Checkpoint('demo')), learned)
