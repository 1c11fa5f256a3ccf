"While you wait: an estimate takes a moment, every long step says how long it takes, and `progress=False` says nothing"
import time

import numpy as np
import pytest

from optiq import kl_sweep
from optiq.backends.torch import TorchBackend
from optiq.calibration import passages, token_batch
from optiq.formats import Format
from optiq.material.tiny import tiny
from optiq.measure.estimate import _grown_by, estimate
from optiq.models import Checkpoint
from optiq.progress import _bar, _many, _quiet, _waiting
from optiq.sensitivity import _Task

@pytest.fixture(scope='module')
def model(tmp_path_factory): return Checkpoint(tiny('llama', tmp_path_factory.mktemp('m')/'llama'))

TOKENS = np.random.default_rng(0).integers(11, 500, (4, 24)).astype(np.int32)

@pytest.mark.parametrize('shape', [(1, 100_000), (2, 10_000)])
def test_an_estimate_runs_short_texts_alone(model, monkeypatch, shape):
    b, ran = TorchBackend(model), []
    real = TorchBackend.run_block
    def spy(self, i, states, overrides={}):
        ran.append(states.shape[1])
        return real(self, i, states, overrides)
    monkeypatch.setattr(TorchBackend, 'run_block', spy)
    long, short = (estimate(b, [4], s) for s in (shape, (shape[0], 512)))
    assert max(ran) <= 2**14
    assert long['bytes'] == short['bytes']*shape[1]//512 or long['passes'] != short['passes']
    assert long['seconds'] > 5*short['seconds']

def test_no_estimate_runs_a_text_longer_than_the_sweep(model, monkeypatch):
    "A model may know no position beyond"
    real, seen = TorchBackend.embed, []
    monkeypatch.setattr(TorchBackend, 'embed', lambda self, batch, *a: (seen.append(batch.shape[1]), real(self, batch, *a))[1])
    estimate(TorchBackend(model), [4], (1, 600))
    assert max(seen) == 512

def test_a_length_is_the_sum_of_what_grows_with_it_and_with_its_square():
    def seconds(n, a, c): return a*n+c*n*n
    for a, c in ((1, 0), (0, 1), (2., 1e-3)):
        known = {n: seconds(n, a, c) for n in (512, 1024, 2048)}
        assert _grown_by(known, 100_000) == pytest.approx(seconds(100_000, a, c))
    assert _grown_by({512: 1., 1024: 1.5}, 4096) == 6 # noise is no negative part

def test_a_shortcut_shows_how_far_it_is(model, capsys):
    b = TorchBackend(model)
    for method, words in (('gradient', ['gradients']), ('screened', ['gradients', 'measurements'])):
        kl_sweep(b, TOKENS, [4, 8], method=method, targets=[5], rounding='minmax')
        said = capsys.readouterr().err
        assert all(w in said for w in words)
        kl_sweep(b, TOKENS, [4, 8], method=method, targets=[5], rounding='minmax', progress=False)
        assert capsys.readouterr().err == ''

def test_a_digest_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    import optiq.models as models
    monkeypatch.setattr(models, '_tensor_digest', lambda *a: time.sleep(.15) or b'')
    c = Checkpoint(tiny('llama', tmp_path/'m', shape=dict(num_hidden_layers=1))) # 2 s of waiting, and a bar shows itself after 1
    c.fingerprint
    assert f'reading {c.name}' in capsys.readouterr().err
    del c.fingerprint
    with _quiet(): c.fingerprint
    assert capsys.readouterr().err == ''

def test_a_text_that_takes_long_shows_how_far_it_is(model, monkeypatch, capsys):
    from optiq import calibration
    real = calibration._ids_of
    monkeypatch.setattr(calibration, '_ids_of', lambda *a: time.sleep(.1) or real(*a))
    token_batch(passages('bundled'), model.tokenizer, 100, 64)
    assert 'tokens of the text' in capsys.readouterr().err

def test_what_nobody_can_look_into_is_named(capsys):
    with _waiting('opening a file'): time.sleep(1.3)
    with _waiting('opening another'): pass
    with _quiet(), _waiting('opening a third'): time.sleep(1.2)
    with _quiet(False), _quiet(), _quiet(False): list(_bar('steps', of=[1, 2]))
    assert 'opening a file … 00:0' in (said := capsys.readouterr().err) and 'another' not in said and 'third' not in said and 'steps' not in said

def test_the_choice_of_a_method_says_that_it_times(model, monkeypatch, capsys):
    import optiq.measure.estimate as e
    import optiq.sensitivity as s
    real = e._timing_of
    monkeypatch.setattr(s, '_surely_quick', lambda *a: False)
    monkeypatch.setattr(e, '_timing_of', lambda *a: time.sleep(1.2) or real(*a))
    task = _Task(TorchBackend(model), TOKENS, [Format(4), Format(8)])
    task.choose(600.)
    assert 'timing the steps' in capsys.readouterr().err

def test_a_wait_that_is_broken_off_leaves_no_thread(monkeypatch):
    import threading
    before = threading.active_count()
    with pytest.raises(KeyError), _waiting('opening'): raise KeyError
    def interrupted(self):
        start(self)
        raise KeyboardInterrupt
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, 'start', interrupted)
    with pytest.raises(KeyboardInterrupt), _waiting('opening'): pass
    assert threading.active_count() == before

def test_without_stderr_nothing_is_said(monkeypatch):
    monkeypatch.setattr('sys.stderr', None)
    with _waiting('opening'): assert list(_bar('steps', of=[1, 2])) == [1, 2]

def test_a_log_is_told_less_often_than_a_terminal(capsys):
    for _ in _bar('steps', of=range(30)): time.sleep(.05)
    assert 1 <= capsys.readouterr().err.count('steps') <= 3

def test_progress_is_silenced_through_options_that_are_passed_on(model, monkeypatch, capsys):
    from optiq.kv import sweep
    real = sweep.open_backend
    monkeypatch.setattr(sweep, 'open_backend', lambda *a: list(_bar('opening', of=[1])) and real(*a))
    sweep.kv_sweep(TorchBackend(model), TOKENS, [4], progress=False)
    assert capsys.readouterr().err == ''

def test_one_thing_is_no_plural(): assert [_many(n, 'plan') for n in (0, 1, 2)] == ['0 plans', '1 plan', '2 plans']
