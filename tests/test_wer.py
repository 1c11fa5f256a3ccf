"Word _errors are jiwer's on what Whisper's normaliser leaves, rates add up, and answers are kept"
import json
from pathlib import Path
import numpy as np
import pytest

pytest.importorskip('jiwer')
pytest.importorskip('mlx_audio')
from optiq.report import Report, test as paired_test
from optiq.evals.wer import _errors, _normalizer, _wer_figure, wer_report, _word_errors, write_down
from optiq.material.speech import clips

CASES = [('a b c', 'a x c d', (3, 1, 1, 0)), ('one', '', (1, 0, 0, 1)), ('a b', 'a b', (2, 0, 0, 0)), ('uh', 'a word', (0, 0, 2, 0)),
         ("I don't see twenty five colours.", 'i do not see 25 colors', (6, 0, 0, 0))]

@pytest.mark.parametrize('said, written, want', CASES)
def test_errors(said, written, want):
    assert tuple(_word_errors(said, written)[k] for k in ('words', 'substitutions', 'insertions', 'deletions')) == want

def test_normaliser_is_whispers():
    "The two libraries that keep it agree"
    import whisper_normalizer
    other = pytest.importorskip('transformers.models.whisper.english_normalizer')
    table = Path(whisper_normalizer.__file__).parent/'normalizers'/'english.json'
    reference = other.EnglishTextNormalizer(json.loads(table.read_text()))
    for text in ["I'm paying twenty-five dollars and fifty cents, Mr. Smith's colour isn't grey; uh, we've 1,234 splendours (noise) [x]",
                 'It was the 21st of May, nineteen ninety-nine; $3.50, 50 %', 'double oh seven', "y'all ain't gonna wanna",
                 'one hundred and one point five million', 'Crème brûlée — naïve!']:
        assert _normalizer()(text) == reference(text)

def counts(e, w=10): return [dict(words=w, substitutions=int(k), insertions=0, deletions=0) for k in e]

def test_rate_and_interval():
    f = _wer_figure(counts([1, 2, 3]))
    assert f['wer'] == .2 and f['wer_n'] == 3 and f['wer_low'] < .2 < f['wer_high'] and np.mean(f['items']['wer']) == pytest.approx(.2)
    assert _wer_figure(counts([1])+counts([0], 90))['wer'] == .01 # a long file counts for more
    alone = _wer_figure(counts([1]))
    assert alone['wer'] == .1 and alone['wer_low'] is None # no interval from one file
    with pytest.raises(ValueError, match='no word'): _wer_figure(counts([1, 2], 0))

def test_interval_covers():
    "In about 95 of 100 repetitions the interval holds the true rate"
    r = np.random.default_rng(1)
    found = [_wer_figure(counts(r.poisson(1.5, 60)), draws=400) for _ in range(200)]
    assert .88 < np.mean([f['wer_low'] <= .15 <= f['wer_high'] for f in found]) <= 1

def test_pairing():
    r = np.random.default_rng(0)
    hard = r.poisson(2, 40)
    a, b = (dict(name=n) | _wer_figure(counts(e), 'same') for n, e in (('a', hard), ('b', hard+r.integers(0, 2, 40))))
    t = paired_test(b, a, 'wer')
    assert t['p_value'] < .001 and t['low'] < b['wer']-a['wer'] < t['high']
    assert a['wer_high'] > b['wer_low'] # apart, the intervals overlap
    assert Report.compare(Report([a]), Report([b])).verdicts['wer']['winner'] == 'a'

def test_what_was_written_is_kept(tmp_path):
    heard, out, calls = clips('bundled', 'all', 4), tmp_path/'answers.jsonl', []
    def listen(clip):
        calls.append(clip.name)
        if len(calls) == 3: raise KeyboardInterrupt
        return clip.text.upper()
    with pytest.raises(KeyboardInterrupt): write_down(listen, heard, out)
    done = write_down(listen, heard, out)
    assert len(calls) == 5 and len(done) == 4 and not sum(map(_errors, done))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 5 and lines[4]['response'] == heard[3].text.upper() and lines[4]['words'] == 4
    with pytest.raises(ValueError, match='other'): write_down(listen, heard, out, dict(new_tokens=3))
    with pytest.raises(ValueError, match='other'): write_down(listen, heard[::-1], out)
    report = wer_report(dict(name='m'), done)
    report.save(tmp_path/'r.json')
    assert Report.load(tmp_path/'r.json').about['responses'][0]['answer'] == heard[0].text and report.about['words'] == 16
