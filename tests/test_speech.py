"Sound comes in as one channel at 16 kHz with its own transcript, or not at all"
import numpy as np
import pytest

soundfile = pytest.importorskip('soundfile')
pytest.importorskip('mlx_audio')
from optiq.material.speech import RATE, _beeps, clips, _folder_clips, _librispeech, _morse, _read_sound

def tone(rate, seconds=.5, hertz=440): return .3*np.sin(2*np.pi*hertz*np.arange(int(rate*seconds))/rate)

def pitch(x): return np.abs(np.fft.rfft(x)).argmax()*RATE/len(x)

@pytest.mark.parametrize('suffix', ['wav', 'flac', 'ogg'])
@pytest.mark.parametrize('rate, channels', [(8000, 1), (16000, 2), (44100, 2), (48000, 1)])
def test_any_rate_and_channels(tmp_path, suffix, rate, channels):
    file = tmp_path/f'a.{suffix}'
    soundfile.write(file, np.stack([tone(rate)]*channels, 1), rate)
    x = _read_sound(file)
    assert x.dtype == np.float32 and x.ndim == 1 and abs(len(x)-RATE/2) <= 2
    assert abs(pitch(x)-440) < 4 and abs(np.abs(x).max()-.3) < .06
    np.testing.assert_array_equal(x, _read_sound(file.read_bytes()))

def test_opus(tmp_path):
    soundfile.write(tmp_path/'a.ogg', tone(16000), 16000, format='OGG', subtype='OPUS')
    assert abs(pitch(_read_sound(tmp_path/'a.ogg'))-440) < 4

def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path/'a.wav', np.stack([tone(RATE), np.zeros(RATE//2)], 1), RATE, subtype='FLOAT')
    np.testing.assert_allclose(_read_sound(tmp_path/'a.wav'), tone(RATE)/2, atol=1e-6)

def test_what_cannot_be_used_is_an_error_of_one_line(tmp_path):
    good = tmp_path/'good.flac'
    soundfile.write(good, tone(RATE), RATE)
    (tmp_path/'cut.flac').write_bytes(good.read_bytes()[:30])
    (tmp_path/'text.wav').write_text('no sound')
    for name, x in ('silent.wav', np.zeros(100)), ('empty.wav', np.zeros(0)): soundfile.write(tmp_path/name, x, RATE)
    soundfile.write(tmp_path/'nan.wav', np.array([0, np.nan]), RATE, subtype='FLOAT')
    for name, word in [('cut.flac', 'not sound'), ('text.wav', 'not sound'), ('silent.wav', 'silent'), ('empty.wav', 'empty'),
                       ('nan.wav', 'finite'), ('missing.wav', 'not sound')]:
        with pytest.raises(ValueError, match=word) as e: _read_sound(tmp_path/name)
        assert name in str(e.value) and '\n' not in str(e.value)

def folder(path, n=12):
    for i in range(n):
        soundfile.write(path/f'{i:02}.wav', tone(RATE, .1, 300+10*i), RATE)
        (path/f'{i:02}.txt').write_text(f'number {i}\n of many')
    return path

def test_a_folder_is_split(tmp_path):
    train, test, every = (_folder_clips(folder(tmp_path), s) for s in ('train', 'test', 'all'))
    assert len(every) == 12 and sorted(train+test) == every and train and test
    assert every[3][:2] == ('03.wav', 'number 3 of many')
    found = clips(tmp_path, 'all', 5)
    assert [c.name for c in found] == [c.name for c in clips(tmp_path, 'all', 5)] == sorted(c.name for c in found)
    assert [c.name for c in clips(tmp_path, 'all', 5, seed=1)] != [c.name for c in found]
    assert len({c.key for c in clips(tmp_path, 'all')}) == 12 and len(clips(tmp_path, 'all', 99, fewer=True)) == 12
    with pytest.raises(ValueError, match='12 clips'): clips(tmp_path, 'all', 13)

def test_transcripts(tmp_path):
    folder(tmp_path, 2)
    (tmp_path/'00.txt').write_text(' \n')
    with pytest.raises(ValueError, match='00.txt is empty'): clips(tmp_path, 'all')
    (tmp_path/'00.txt').unlink()
    with pytest.raises(FileNotFoundError, match='00.wav has no transcript.*00.txt'): clips(tmp_path, 'all')
    (tmp_path/'none').mkdir()
    with pytest.raises(FileNotFoundError, match='no sound files'): clips(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='librispeech, bundled'): clips(tmp_path/'nowhere')

def test_beeps_are_disjoint_and_long_enough():
    a, b = _beeps('train', 40), _beeps('test', 40)
    assert not {t for _, t, _ in a} & {t for _, t, _ in b}
    assert all(4 < len(x)/RATE < 30 and np.abs(x).max() <= .31 for _, _, x in a+b)
    assert len(_morse('tt')) > len(_morse('ee')) and abs(pitch(_morse('tttt'))-600) < 5

def test_librispeech_by_name(tmp_path, monkeypatch):
    "The real code on files of the form that the hub has"
    import datasets
    folder(tmp_path, 3)
    soundfile.write(tmp_path/'long.wav', tone(RATE, 31), RATE)
    files = sorted(tmp_path.glob('*.wav'))
    rows = datasets.Dataset.from_dict(dict(id=[f.stem for f in files], text=['SOME WORDS']*4, audio=[
        dict(bytes=f.read_bytes(), path=f.name) for f in files])).cast_column('audio', datasets.Audio(sampling_rate=RATE))
    asked = []
    def load(*args, **kwargs):
        asked.append((*args, kwargs['split']))
        return rows.to_iterable_dataset()
    monkeypatch.setattr(datasets, 'load_dataset', load)
    assert {n for n, _, _ in _librispeech('train')} == {'00', '01', '02'} and len(_librispeech('test')) == 4
    found = clips('librispeech', 'all', 2)
    assert len(found) == 2 and found[0].text == 'some words' and found[0].audio.dtype == np.float32
    assert {a[-1] for a in asked} == {'validation', 'test'} and asked[0][:2] == ('openslr/librispeech_asr', 'clean')

def test_without_a_network():
    with pytest.raises(ConnectionError, match='folder of sound files'): clips('librispeech', n=1)
