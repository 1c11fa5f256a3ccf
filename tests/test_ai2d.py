"Letters in what models write, and questions from files"
import json
import pytest
from optiq.evals.ai2d import _as_choice, _letter_of, questions_of

ANIMALS = ['fox', 'field mouse', 'grass', 'mouse']
CASES = [
    ('B', 'B'), ('B.', 'B'), ('b', 'B'), ('b)', 'B'), ('(B)', 'B'), ('[b]', 'B'), (' C\n', 'C'), ('**D**', 'D'), ('`A`', 'A'), ('Ｂ', 'B'),
    ('B. field mouse', 'B'), ('C: grass', 'C'), ('A) fox', 'A'), ('- D', 'D'), ('# C', 'C'), ('A', 'A'), ('a', 'A'), ('A.', 'A'),
    ('Answer: B', 'B'), ('answer is c', 'C'), ('The answer is (b).', 'B'), ('The correct answer is **C**.', 'C'),
    ('The correct option is D', 'D'), ('The answer is option C.', 'C'), ('The answer should be B, not A.', 'B'), ('Option D', 'D'),
    ('I choose B', 'B'), ('I would pick (c).', 'C'), (r'\boxed{B}', 'B'), (r'$\boxed{\text{D}}$', 'D'),
    (r'So the answer is $\boxed{\mathrm{C}}$.', 'C'), ('Answer = A', 'A'), ('A or B? The answer is B.', 'B'),
    ('The arrow from A leads to B. Answer: C', 'C'), ('Answer: A. Wait, the answer is C.', 'C'), ('B because A is wrong', 'B'),
    ('A because the fox eats it', 'A'), ('A is right', 'A'), ('It is D.', 'D'), ("It's not A, it's C.", 'C'), ('Not A but B', 'B'),
    ('Rather than B, D', 'D'), ('A mouse eats the grass, so the answer is D.', 'D'), ('A fox', 'A'), ('a field mouse', 'B'), ('fox', 'A'),
    ('The field mouse.', 'B'), ('Grass!', 'C'), ('It is the mouse', 'D'), ('I think it is the fox.', 'A'), ('I', None),
    ('<think>A? B? No.</think>\nC', 'C'), ('<think>It may be A', None), ('C\n\nQuestion: and B?\nA', 'C'), ('C</s>', 'C'),
    ('B<|im_end|>', 'B'), ('A and C', None), ('A, B', None), ('The answer is A or B.', None), ('Either C or D', None),
    ('A. fox\nB. field mouse\nC. grass\nD. mouse', None), ('A. fox\nB. field mouse\nC. grass\nD. mouse\nAnswer: D', 'D'), ('E', None),
    ('The answer is E.', None), ('', None), ('?', None), ('None of them', None), ('The fox eats the grass', None), ('Because', None),
    ("I can't tell", None), ("It's the hawk", None), ('A lion', None)]

@pytest.mark.parametrize('text,want', CASES)
def test_letter(text, want): assert _letter_of(text, ANIMALS) == want

def test_numbers_and_long_lists():
    assert _letter_of('There are 2 arrows.', ['0', '1', '2', '3']) == 'C' and _letter_of('12', ['1', '2']) is None
    assert _letter_of('The answer is H.', list('stuvwxyz')) == 'H' and _letter_of('I', list('rstuvwxyz')) == 'I'

def test_answers_of_a_file(tmp_path):
    assert [_as_choice(a, ['x', 'y', '1'], 'f') for a in (1, 'B', 'y', '1')] == [1, 1, 1, 2]
    for bad in (3, -1, 'D', 'z', '', None):
        with pytest.raises(ValueError, match='not one of the 3 options'): _as_choice(bad, ['x', 'y', '1'], 'f')
    with pytest.raises(FileNotFoundError, match='questions.jsonl is missing'): questions_of(tmp_path)
    (tmp_path/'questions.jsonl').write_text(json.dumps(dict(image='a.png', question='What?', options=['x', 'y'], answer='y'))+'\n{"image": 1}\n')
    with pytest.raises(ValueError, match='line 2 lacks question'): questions_of(tmp_path)
    (tmp_path/'questions.jsonl').write_text(json.dumps(dict(image='a.png', question='What?', options=['x', 'y'], answer='y'))+'\n')
    found, = questions_of(tmp_path)
    assert found['answer'] == 'B' and found['image'] == tmp_path/'a.png'
    with pytest.raises(ValueError, match='has 1 questions, not 2'): questions_of(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match='give ai2d'): questions_of('nowhere')

def test_questions_of_the_hub(monkeypatch):
    "AI2D as `datasets` gives it, and a line that helps where it cannot be had"
    import datasets
    rows = [dict(image=None, question='What eats grass?', options=['fox', 'mouse', 'hawk', 'snake'], answer=str(i)) for i in (1, 3)]
    monkeypatch.setattr(datasets, 'load_dataset', lambda name, split: rows if (name, split) == ('lmms-lab/ai2d', 'test') else None)
    assert [q['answer'] for q in questions_of('ai2d')] == ['B', 'D'] and questions_of('ai2d', 1)[0]['options'] == rows[0]['options']
    with pytest.raises(ValueError, match='has 2 questions, not 3'): questions_of('ai2d', 3)
    def gone(name, split): raise OSError('no network')
    monkeypatch.setattr(datasets, 'load_dataset', gone)
    with pytest.raises(ConnectionError, match='cannot be fetched .OSError.; give `questions` diagrams'): questions_of('ai2d')
