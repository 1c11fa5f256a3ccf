"The generated tasks: disjoint splits, seeds, right sums, unique keys; and the checkpoint that was trained on them"
import re
from itertools import islice
from pathlib import Path

import pytest

import optiq
from optiq.material import mixture as texts, problems as tasks
from optiq.material.mixture import lists, mixture, _prose, recall, _training_text
from optiq.material.problems import _KNOWN_CHAINS, _NAMES, _NEW_CHAINS, _NEW_NAMES, _NEW_STORIES, _STORIES, correct
from optiq.material.problems import held_out, word_problems

DEMO = Path(optiq.__file__).parent/'data'/'demo'

def notes(row): return re.findall(r'<<(\d+)([-+*/])(\d+)=(\d+)>>', row['answer'])

@pytest.mark.parametrize('split', ['train', 'test', 'unseen'])
def test_sums_are_right_and_the_last_is_the_answer(split):
    for row in word_problems(400, split):
        steps = notes(row)
        assert 2 <= len(steps) <= 4
        for a, op, b, c in steps: assert eval(a+op+b) == int(c), row
        assert row['answer'].endswith('\n#### '+steps[-1][-1])
        assert not re.search(r'[{}\[\]|@]', row['prompt']+row['answer']), row
        assert correct(row, ' '+row['answer']) and not correct(row, ' #### 9999')

def test_no_held_out_pair_is_added_in_training():
    def pairs(rows): return {tuple(sorted((int(a), int(b)))) for r in rows for a, op, b, _ in notes(r)
                             if op in '+-' and min(int(a), int(b)) > 9}
    train, test = pairs(word_problems(2000)), pairs(word_problems(200, 'test'))
    assert train and test and not train & test
    assert not any(map(held_out, train)) and all(map(held_out, test))

def test_names_and_templates_are_disjoint():
    assert not set(_NAMES) & set(_NEW_NAMES)
    assert not set(_STORIES) & set(_NEW_STORIES) and not set(_KNOWN_CHAINS) & set(_NEW_CHAINS)
    words = set(re.findall(r'\w+', ' '.join(r['question'] for r in word_problems(1000))))
    assert not words & set(_NEW_NAMES)
    train, test, unseen = ({r['template'] for r in word_problems(300, s)} for s in ('train', 'test', 'unseen'))
    assert not unseen & (train | test)

def test_every_template_can_be_drawn():
    import random
    for t in [*_STORIES, *_NEW_STORIES, *map(tasks._chain, _KNOWN_CHAINS[::9]), *map(tasks._chain, _NEW_CHAINS[::9])]:
        ranges, steps, *_ = tasks._parse(t)
        r = random.Random(42)
        assert any(tasks._work_out(steps, {k: r.randint(*v) for k, v in ranges.items()}) for _ in range(5000)), t

def test_seeds_reproduce():
    for f in (word_problems, lists, recall):
        assert f(5, seed=1) == f(5, seed=1) != f(5, seed=2)
    assert list(islice(_training_text(3), 20)) == list(islice(_training_text(3), 20))
    assert {o['task'] for o in islice(mixture(), 200)} == set(texts._SHARES)

@pytest.mark.parametrize('length', [128, 512, 2048])
def test_recall_key_is_unique_and_the_text_as_long_as_asked(length):
    for row in recall(20, length, 'test'):
        key = re.search(r'What is the code of the (.*)\?', row['prompt'])[1]
        assert re.findall(rf'The code of the {key} is (\d+)\.', row['prompt']) == [row['answer']]
        assert 0 <= row['depth'] <= 1
        assert length-15 <= texts._estimate_tokens(row['prompt']+' '+row['answer']) <= length

def test_recall_says_when_the_keys_do_not_fit():
    with pytest.raises(ValueError, match='do not fit'): recall(1, 128, keys=50)
    assert recall(1, 300, keys=12)[0]['prompt'].count('The code of') == 12

def test_lists_and_prose_are_disjoint():
    key = lambda r: tuple(sorted(map(int, r['answer'].split())))
    assert not {key(r) for r in lists(500)} & {key(r) for r in lists(500, 'test')}
    assert not set(_prose()) & set(_prose('test')) and min(map(len, _prose()+_prose('test'))) > 100

def test_demo_checkpoint():
    assert (DEMO/'model.safetensors').stat().st_size <= 18_000_000
    from mlx_lm import load
    model, tok = load(str(DEMO))
    row = recall(1, 256, 'test')[0]
    n = len(tok.encode(row['prompt']+' '+row['answer']))
    assert 240 <= n <= 256 # one token for a digit, one for a common word
    assert tok.decode(tok.encode(row['prompt'])) == row['prompt']
    assert tok.eos_token_id == 0 and len(model.layers) == 10
