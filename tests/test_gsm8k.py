"The scorer on hand-made hard cases, the prompt, and files of responses"
import json
from fractions import Fraction

import pytest

from optiq.evals.gsm8k import _SHOTS, _extract, first_answer, _prompt_for, questions, _right, score_responses

HARD = [ # response, the number it gives
    # a #### with a number
    ('16 - 3 - 4 = 9 eggs, 9 * 2 = 18.\n#### 18', '18'),
    ('####18', '18'),
    ('####   18   ', '18'),
    ('#### 18.', '18'),
    ('#### 18.0', '18'),
    ('#### 18.00 dollars', '18'),
    ('#### $18', '18'),
    ('#### $ 18', '18'),
    ('#### 1,234', '1234'),
    ('#### $70,000', '70000'),
    ('#### 1,234,567.89', '1234567.89'),
    ('#### 1,00,000', '100000'), # Indian grouping
    ('#### -5', '-5'),
    ('#### \u22125', '-5'), # a real minus sign
    ('#### -$5', '-5'),
    ('#### $-5', '-5'),
    ('#### -$1,250.50', '-1250.5'),
    ('#### +7', '7'),
    ('#### 25%', '25'),
    ('#### 12.5 %', '12.5'),
    ('#### .5', '.5'),
    ('#### 3/4', '3/4'),
    ('#### 0', '0'),
    ('#### 007', '7'),
    ('#### €45', '45'),
    ('#### £1,200', '1200'),
    ('#### US$300', '300'),
    ('#### Rs. 500', '500'),
    ('#### USD 20', '20'),
    ('#### 18 dollars a day', '18'),
    ('#### Janet makes 18 dollars', '18'),
    ('#### 18 (not 20)', '18'),
    ('#### 9 * 2 = 18', '18'),
    ('#### 9 * 2 = $18 dollars', '18'),
    ('#### **18**', '18'),
    ('#### \\boxed{18}', '18'),
    ('#### \\$18', '18'),
    ('#### $\\frac{3}{4}$', '3/4'),
    ('#### $1{,}200$', '1200'),
    ('#### 1 1/2', '3/2'),
    ('#### 1.5e3', '1500'),
    ('#### Rs.500', '500'),
    ('#### 18/day', '18'),
    ('#### 5 - $3 = $2', '2'),
    ('#### 2.5 million', '2500000'),
    ('#### $3 billion', '3000000000'),
    ('#### 18 I hope these 2 lines help.', '18'),
    ('#### 18\nI checked it 3 times.', '18'),
    ('#### 18\n\nThat is all 5 of them.', '18'),
    ('#### The answer is 42', '42'),
    ('#### 18\n#### 18', '18'),
    ('#### 17\nNo, wait.\n#### 18', '18'), # the last one counts
    ('#### 5\nSo it is 5 + 13.\n#### 18', '18'),
    ('She has 18.\n####', '18'), # no number after it: the last number of the text
    ('#### done\n18', '18'),
    # no ####: the last number of the first answer
    ('The answer is 18.', '18'),
    ('It costs $18.50.', '18.5'),
    ('16 - 3 - 4 = 9 and 9 * 2 = 18', '18'),
    ('20-30', '30'), # a range, not -30
    ('5-3=2', '2'),
    ('10 - 18 = -8', '-8'),
    ('The change is -8 degrees', '-8'),
    ('from 5 to -3', '-3'),
    ('The total is 1,234,567 people.', '1234567'),
    ('He ate 1/2 of it', '1/2'),
    ('They are 1, 2, 3', '3'), # a list, no thousands
    ('They are 1,2,3', '3'),
    ('about 40 %', '40'),
    ('It weighs 18kg', '18'),
    ('It is 18m long', '18'),
    ('On the 3rd', '3'),
    ('The area is 18 m2', '18'), # no digit of a word
    ('The area is 18 m^2', '18'),
    ('The area is 18 m²', '18'),
    ('18 people had COVID_19', '18'),
    ('**Answer: 18**', '18'),
    ('$\\boxed{42}$', '42'),
    ('so x=18', '18'),
    ('so x = $18.', '18'),
    ('(18)', '18'),
    ('"18"', '18'),
    ('12\u202f500', '12500'),
    ('12\u00a0500 people', '12500'),
    ('2 million people', '2000000'),
    ('18.5.', '18.5'),
    ('18...', '18'),
    ('', None), ('I cannot say.', None), ('####', None), ('m2', None),
    # text after the answer
    ('#### 18\n\nTom has 5 apples and gets 2 more. He has 7.\n#### 7', '18'), # the next problem, without a label
    ('#### 18\nTom has 5 apples.\nHe gets 2 more.\n#### 7', '18'),
    ('#### 17\n\nWait, that is wrong. It is 18.\n#### 18', '18'),
    ('The answer is 26.\nAsk me if you want 3 more examples!', '26'),
    ('The answer is 26. I used 2 steps.', '26'),
    ('The final answer is: $13 * 2 = $26. It took 2 steps.', '26'),
    ('The answer is not known, but there are 26', '26'),
    ('#### '+'7'*5000, None), # no quantity
    # a second question that the model made up
    ('#### 18\n\nQuestion: Tom has 5 apples.\nAnswer: He has 5.\n#### 5', '18'),
    ('The answer is 18.\n\nQuestion: Tom has 5 apples.', '18'),
    ('She has 18.\nQ: What are 2 + 2?\nA: 4', '18'),
    ('She has 18.\n\nQuestion 2: What are 2 + 2?\n#### 4', '18'),
    ('She has 18.\n### Question 7. What is it?\n#### 4', '18'),
    ('She has 18.\n**Question:** 2 + 2?\n#### 4', '18'),
    ('She has 18.\nProblem 5: 2 + 2?\n#### 4', '18'),
    ('She has 18.\nNext question: 2 + 2?\n#### 4', '18'),
    ('#### 18\n\nTom has 5 apples. How many are 2 more?\nHe has 7.\n#### 7', '18'),
    ('#### 18<|endoftext|>Question: 5\n#### 5', '18'),
    ('#### 18<|im_end|>\n<|im_start|>user\n5', '18'),
    ('#### 18</s>#### 7', '18'),
    ('18 [INST] and 5 more? [/INST] 23', '18'),
    ('#### 18\nHuman: and 5 more?\n#### 23', '18'),
    ('\n\n #### 18', '18'),
    ('Question: what is asked? The sum.\n#### 18', '18'), # repeats the question before it answers
    ('The question is how many: 18.', '18'),
]

def test_there_are_many_cases(): assert len(HARD) >= 60 and len({r for r, _ in HARD}) == len(HARD)

@pytest.mark.parametrize('response,want', HARD)
def test_hard(response, want):
    assert _extract(response) == (None if want is None else Fraction(want))

@pytest.mark.parametrize('answer,response,ok', [
    ('so <<9*2=18>>18\n#### 18', '#### 18.0', True), ('#### 70,000', '$70000', True), ('#### 18', '#### 81', False),
    ('#### 18', '', False), ('#### 0.75', '3/4', True), ('#### 3', '#### 3.0001', False), ('#### -8', '#### 8', False), ('18', '18', True)])
def test_right(answer, response, ok): assert _right(answer, response) is ok

def test_an_answer_without_number_is_an_error():
    with pytest.raises(ValueError, match='holds no number'): _right('many', '18')

def test_first_answer_keeps_what_starts_with_a_question():
    assert first_answer('Question: a?\nAnswer: 5') == 'Question: a?\nAnswer: 5'
    assert first_answer('5\nQuestion: a?') .strip() == '5'

def test_prompt_has_the_shots_and_ends_where_the_model_goes_on():
    text = _prompt_for('How many?', 3)
    assert text.endswith('Question: How many?\nAnswer:') and text.count('Question:') == 4 and text.count('####') == 3
    assert _prompt_for('How many?', 0) == 'Question: How many?\nAnswer:'

def test_the_sums_of_the_shots_are_right():
    import re
    for question, answer in _SHOTS:
        steps = re.findall(r'([\d.]+) ([-+*/]) ([\d.]+) = ([\d.]+)', answer)
        assert steps and all(abs(eval(a+o+b)-float(c)) < 1e-9 for a, o, b, c in steps)
        assert _extract(answer) == Fraction(steps[-1][-1])

def test_gold_answers_are_found(shared):
    rows = questions(shared/'data'/'gsm8k'/'test.jsonl')
    assert len(rows) == 1319
    for r in rows:
        gold = Fraction(r['answer'].rsplit('####', 1)[1].strip().replace(',', ''))
        assert _extract(r['answer']) == gold and _right(r['answer'], r['answer'])

def test_shots_are_not_in_the_data(shared):
    for part in ('test', 'train'):
        asked = {r['question'] for r in questions(shared/'data'/'gsm8k'/f'{part}.jsonl')}
        assert not asked & {q for q, _ in _SHOTS}

def test_questions_say_what_is_wrong(tmp_path):
    p = tmp_path/'q.jsonl'
    p.write_text('{"question": "a", "answer": "1"}\n\n{"question": "b", "answer": "2"}\n')
    assert len(questions(p)) == 2 and len(questions(p, 1)) == 1
    with pytest.raises(ValueError, match='has 2 questions, not 3'): questions(p, 3)
    with pytest.raises(FileNotFoundError, match='word-problems'): questions(tmp_path/'none.jsonl')
    p.write_text('\n')
    with pytest.raises(ValueError, match='is empty'): questions(p)
    p.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match='line 1 lacks answer'): questions(p)
    p.write_text('{"question": "a", "answer": "1"}\nnonsense\n')
    with pytest.raises(ValueError, match='line 2 is not JSON'): questions(p)

def test_responses_are_scored_without_a_model(tmp_path):
    p = tmp_path/'r.jsonl'
    rows = [dict(question=str(i), answer=f'#### {i}', response=f'it is {i if i % 4 else 99}') for i in range(20)]
    p.write_text('\n'.join(map(json.dumps, rows)))
    row = score_responses(p).rows[0]
    assert row['gsm8k'] == .75 and row['gsm8k_n'] == 20
    assert row['gsm8k_low'] == pytest.approx(.5313, abs=1e-4) and row['gsm8k_high'] == pytest.approx(.8881, abs=1e-4) # by hand
    p.write_text('{"question": "a", "answer": "1"}\n')
    with pytest.raises(ValueError, match='lacks response'): score_responses(p)
