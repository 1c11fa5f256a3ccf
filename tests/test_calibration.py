"Calibration text: named, seeded, disjoint from evaluation, never replaced in silence"
import json

import numpy as np
import pytest

from optiq.calibration import fingerprint, passages, token_batch

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
    with pytest.raises(ConnectionError, match='--calibration bundled'): passages('wikitext2')
    with pytest.raises(FileNotFoundError, match='bundled, wikitext2'): passages('nowhere.txt')
    (tmp_path/'short.txt').write_text('too short\n')
    with pytest.raises(ValueError, match='100 characters'): passages(tmp_path/'short.txt', 'all')

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
    assert not set(passages('bundled')) & set(passages('bundled', 'test'))
