"Whisper and Qwen3-ASR are given transcripts and sound as mlx-audio and transformers give them"
import json
import apart
import numpy as np
import pytest

pytest.importorskip('mlx_audio')
import mlx.core as mx
from optiq.families.audio import load_speech, _qwen3_asr_sample, speech_samples, transcribe, _whisper_sample
from optiq.material.speech import Clip, RATE, clips
from optiq.material.tiny import tiny

@pytest.fixture(scope='module')
def asr(tmp_path_factory): return load_speech(tiny('qwen3_asr', tmp_path_factory.mktemp('asr')/'m', dtype='float32'))

@pytest.fixture(scope='module')
def whisper(shared):
    folder = shared.resolve().parent/'models'/'whisper'
    if not folder.is_dir(): pytest.skip('needs Whisper tiny.en beside the shared folder')
    return folder

def test_qwen3_asr_predicts_the_transcript_where_it_is_scored(asr):
    heard = clips('bundled', n=2)
    for clip, s in zip(heard, speech_samples(asr, heard)):
        ids, scored = s['input_ids'][0], s['scored'][0].astype(bool)
        assert asr._tokenizer.decode(ids[1:][scored[:-1]]) == clip.text and scored[-1]
        z = asr(**{k: mx.array(v) for k, v in s.items() if k != 'scored'})
        assert z.shape == (1, len(ids), 512) and bool(mx.isfinite(z).all())
        sound = (ids == asr.config.audio_token_id).sum()
        assert sound == asr.get_audio_features(mx.array(s['input_features']), mx.array(s['feature_attention_mask'])).shape[0]

def test_qwen3_asr_hears_what_its_own_extractor_hears(asr):
    "`_preprocess_audio` on the hub's form of the checkpoint, against transformers; its audio tokens are those of the prompt"
    transformers = pytest.importorskip('transformers')
    clip, = clips('bundled', n=1)
    features, mask, n = asr._preprocess_audio(clip.audio)
    want = transformers.WhisperFeatureExtractor(feature_size=128)(clip.audio, sampling_rate=RATE, return_attention_mask=True,
                                                                 truncation=False, padding=True, return_tensors='np')
    np.testing.assert_allclose(np.array(features), want['input_features'], atol=1e-5)
    assert np.array(mask).sum() == want['attention_mask'].sum() == round(clip.seconds*100)
    s = _qwen3_asr_sample(asr, clip)
    assert (s['input_ids'] == asr.config.audio_token_id).sum() == n
    np.testing.assert_array_equal(s['input_features'], np.array(features))

def test_units_and_sizes_of_the_real_qwen3_asr():
    "307 Linear layers, 111 in the encoder, and the published sizes"
    from mlx.utils import tree_flatten
    from mlx_audio.stt.models.qwen3_asr import Model, ModelConfig
    from optiq.units import block_lists, find_units
    from optiq.material.configs import hub_config
    real = Model(ModelConfig.from_dict(hub_config('qwen3_asr', '0.6B')))
    units = [u for u in find_units(real, block_lists(real, 'audio'), 'audio') if u.kind != 'embed']
    decoder, params = [u for u in units if u.part == 'decoder'], sum(v.size for _, v in tree_flatten(real.parameters()))
    size = lambda bits: (16*params-(16-bits)*sum(u.params for u in decoder))/8/2**20
    assert (len(units), len(decoder)) == (307, 196) and [round(size(k), 1) for k in (16, 5)] == [1492.4, 914.9]

def test_sound_reaches_the_logits(asr):
    a, b = clips('bundled', n=2)
    x, y = (_qwen3_asr_sample(asr, Clip('c', a.text, audio[:60000])) for audio in (a.audio, b.audio))
    run = lambda s: np.array(asr(**{k: mx.array(v) for k, v in s.items() if k != 'scored'}))
    assert np.abs(run(x)-run(y)).max() > 1e-3

def test_greedy_and_bounded(asr):
    clip, = clips('bundled', n=1)
    assert transcribe(asr, clip.audio, 6) == transcribe(asr, clip.audio, 6)
    assert len(asr._tokenizer.encode(transcribe(asr, clip.audio, 6))) <= 40

def test_code_in_a_checkpoint_is_refused(tmp_path):
    folder = tiny('qwen3_asr', tmp_path)
    file = folder/'tokenizer_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(auto_map=dict(AutoTokenizer=['evil.Tokenizer', None]))))
    with pytest.raises(ValueError, match='auto_map') as e: load_speech(folder)
    assert '\n' not in str(e.value)

def test_other_families_are_named():
    class Model: pass
    Model.__module__ = 'mlx_audio.stt.models.parakeet.parakeet'
    with pytest.raises(ValueError, match='parakeet.*whisper, qwen3_asr'): speech_samples(Model(), [])

ONE = dict(thinker_config=dict(text_config=dict(num_hidden_layers=1), audio_config=dict(encoder_layers=1)))

@pytest.fixture(scope='module')
def one(tmp_path_factory):
    "A Qwen3-ASR of one layer on each side; nothing is written into it"
    return tiny('qwen3_asr', tmp_path_factory.mktemp('one')/'m', shape=ONE)

def short_clips(folder, n):
    "The first two seconds of some clips, enough to measure on"
    soundfile = pytest.importorskip('soundfile')
    folder.mkdir(exist_ok=True)
    for clip in clips('bundled', n=n):
        soundfile.write(folder/f'{clip.text}.wav', clip.audio[:32000], RATE)
        (folder/f'{clip.text}.txt').write_text(clip.text)
    return folder

def optiq(*args):
    from click.testing import CliRunner
    from optiq.cli import main
    return CliRunner().invoke(main, [str(a) for a in args])

def test_the_whole_road(tmp_path, one):
    "optiq convert and optiq eval --task wer on Qwen3-ASR; a process without optiq opens what was written"
    model, out, short = one, tmp_path/'out', short_clips(tmp_path/'short', 2)
    r = optiq('convert', model, '--model-type', 'audio', '--calibration', short, '--evaluation', 'bundled', '--target-bpw', 5,
              '--n-calibration', 1, '--rounding-samples', 1, '--n-samples', 1, '--no-verify', '--skip-baselines', '-o', out, '--json')
    figures = json.loads(r.stdout.splitlines()[-1])
    assert r.exit_code == 0 and 0 < figures['kl'] < 1 and figures['nominal_bpw'] <= 5
    code = f"""import sys, numpy as np, mlx.core as mx
from mlx_audio.stt import load
model = load({str(out)!r})
print(type(model.model.embed_tokens).__name__, type(model.audio_tower.layers[0].fc1).__name__, 'optiq' in sys.modules)
model.generate(mx.array(np.sin(np.arange(16000, dtype=np.float32)/5)), max_tokens=3, temperature=0.)"""
    done = apart.run('-c', code, cwd=tmp_path)
    assert done.stdout.split() == ['QuantizedEmbedding', 'Linear', 'False'], done.stderr
    r = optiq('eval', out, '--task', 'wer', '--baseline', model, '--evaluation', 'bundled', '--n-samples', 1, '-o', tmp_path/'a.jsonl', '--json')
    found = json.loads(r.stdout.splitlines()[-1])
    assert r.exit_code == 0 and found['metric'] == 'wer' and found['n'] == 1 and found['baseline']['value'] >= 0
    assert set(found) >= {'task', 'metric', 'value', 'low', 'high', 'n', 'baseline', 'p_value'}
    assert len((tmp_path/'a.jsonl').read_text().splitlines()) == 2

@pytest.mark.parametrize('what, word', [('corrupt', 'not sound'), ('silent', 'silent'), ('alone', 'no transcript')])
def test_bad_speech_is_one_line(tmp_path, one, what, word):
    soundfile = pytest.importorskip('soundfile')
    model, folder = one, tmp_path/'speech'
    folder.mkdir()
    if what == 'corrupt': (folder/'a.wav').write_bytes(b'RIFF and nothing else')
    else: soundfile.write(folder/'a.wav', np.zeros(800)+(what == 'alone')*np.sin(np.arange(800)), RATE)
    if what != 'alone': (folder/'a.txt').write_text('a word')
    for r in (optiq('eval', model, '--task', 'wer', '--evaluation', folder),
              optiq('convert', model, '--calibration', folder, '--evaluation', 'bundled', '--n-calibration', 1, '-o', tmp_path/'o')):
        assert r.exit_code == 1 and word in r.output and r.output.startswith('error: ') and r.output.count('\n') == 1
    assert not (tmp_path/'o').exists()

def test_any_rate_and_channels_are_heard_alike(tmp_path, asr):
    "A stereo clip at 8 kHz goes through the command, and the model is given nearly what it is given at 16 kHz, mono"
    soundfile, mlx_resample = pytest.importorskip('soundfile'), pytest.importorskip('mlx_audio.resample')
    clip, = clips('bundled', n=1)
    low = mlx_resample.resample_audio_array(clip.audio[:32000], RATE, 8000)
    for name, x, rate in ('a', clip.audio[:32000], RATE), ('b', np.stack([low, low], 1), 8000):
        soundfile.write(tmp_path/f'{name}.wav', x, rate)
        (tmp_path/f'{name}.txt').write_text('bread cloud')
    a, b = (s['input_features'] for s in speech_samples(asr, clips(tmp_path, 'all')))
    assert a.shape == b.shape and np.abs(a-b)[:, :64].mean() < .05 < np.abs(a).mean() # the bands that 8 kHz holds
    r = optiq('eval', tiny('qwen3_asr', tmp_path/'m', shape=ONE), '--task', 'wer', '--evaluation', tmp_path, '--json')
    found = json.loads(r.stdout.splitlines()[-1])
    assert r.exit_code == 0 and found['n'] == 2

def test_few_clips_are_enough_to_round_on(tmp_path, one):
    "Rounding would learn from 32 clips; who asks for two and has two gets two, and who asks for three is told so"
    from optiq.models import Checkpoint
    from optiq.job import _read_texts
    from optiq.request import Texts
    c = Checkpoint(one)
    short_clips(tmp_path, 2)
    assert len(_read_texts(c, Texts(tmp_path, 'bundled', n_calibration=2, n_evaluation=1), 32).learned) == 2
    with pytest.raises(ValueError, match='2 clips.* 3 are asked for'): _read_texts(c, Texts(tmp_path, 'bundled', n_calibration=3,
                                                                                            n_evaluation=1), 32)

def test_a_text_model_is_no_speech_model(tmp_path):
    r = optiq('convert', 'demo', '--model-type', 'audio', '-o', tmp_path/'o')
    assert r.exit_code == 1 and 'audio' in r.output and r.output.count('\n') == 1 and not (tmp_path/'o').exists()
    r = optiq('eval', 'demo', '--task', 'wer', '--evaluation', 'bundled', '--n-samples', '1')
    assert r.exit_code == 1 and r.output.count('\n') == 1, r.output

@pytest.fixture(scope='module')
def cabbage(whisper, shared): # clip, transformers' model and features, what it writes
    "A clip of real speech, and what transformers makes of it"
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    clip = next(c for c in clips(shared/'data'/'speech', 'all') if c.name == 'fleurs-en-003.ogg')
    reference = transformers.WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()
    features = transformers.WhisperFeatureExtractor.from_pretrained(whisper)(clip.audio, sampling_rate=RATE, return_tensors='pt').input_features
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(whisper)
    written = tokenizer.decode(reference.generate(features, max_new_tokens=60)[0], skip_special_tokens=True).strip()
    assert 'cabbage juice' in written
    return clip, reference, features, written

def test_whisper_sample(whisper, cabbage):
    "Features and logits are those of transformers, and greedy transcripts are the same to the letter"
    import torch
    model, (clip, reference, features, written) = load_speech(whisper), cabbage
    s = _whisper_sample(model, clip)
    tokenizer, ids = model._processor.tokenizer, s['tokens'][0]
    assert tokenizer.decode(ids[1:][s['scored'][0, :-1].astype(bool)]) == ' '+clip.text
    np.testing.assert_allclose(s['mel'][0], features[0].numpy().T, atol=1e-4)
    with torch.no_grad(): z = reference(input_features=features, decoder_input_ids=torch.tensor(s['tokens'])).logits.numpy()
    encoded = model.encoder(mx.array(s['mel']))
    def encoder(mel): # the slow part, once: it is given the same when it writes
        np.testing.assert_allclose(np.array(mel), s['mel'], atol=1e-4)
        return encoded
    model.encoder = encoder
    np.testing.assert_allclose(np.array(model(mx.array(s['mel']), mx.array(s['tokens']))), z, atol=5e-3)
    assert transcribe(model, clip.audio) == written
    with pytest.raises(ValueError, match='31 s long.*cut it'): _whisper_sample(model, Clip('long', 'x', np.ones(31*RATE, np.float32)))

PLAIN = """import sys, numpy as np, mlx.core as mx, soundfile
from mlx_audio.stt import load
model = load({out!r})
model.set_dtype(mx.float32)
model.dtype = mx.float32
sound, rate = soundfile.read({file!r}, dtype='float32')
sound = mx.array(np.pad(sound, (0, 480000-len(sound))))
print(model.generate(sound, temperature=0., sample_len={tokens}, return_timestamps=False, fp16=False).text.strip())
three = model.encoder.blocks[0].mlp1, model.decoder.blocks[0].mlp1, model.decoder.token_embedding
print(rate, 'optiq' in sys.modules, *(type(m).__name__ for m in three))"""

def written_by_mlx_audio(out, file, tokens, cwd): # text, types of three layers
    "By a converted Whisper, in a process that knows nothing of optiq"
    code = PLAIN.format(out=str(out), file=str(file), tokens=tokens)
    done = apart.run('-c', code, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    *text, last = done.stdout.strip().split('\n')
    assert last.split()[:2] == ['16000', 'False']
    return ' '.join(text), last.split()[2:]

def planned(model, formats, out): # ▸ Plan
    "Convert with a format for each part"
    from optiq.convert import check_saved, convert
    from optiq.plan import make_plan
    from optiq.models import Checkpoint
    c = Checkpoint(model)
    plan = make_plan(c, {u.path: formats['embed' if u.kind == 'embed' else u.part] for u in c.units})
    check_saved(convert(c, plan, out).folder, plan, c)
    return plan

def test_whisper_of_any_formats_opens_without_optiq(tmp_path):
    from optiq.formats import Format
    one, b = dict(encoder_layers=1, decoder_layers=1), tmp_path/'beeps.wav'
    soundfile = pytest.importorskip('soundfile')
    soundfile.write(b, clips('bundled', n=1)[0].audio, RATE)
    planned(tiny('whisper', tmp_path/'m', shape=one), dict(encoder=Format(6, 32), decoder=Format(3, 64), embed=Format(8, 128)), tmp_path/'out')
    assert written_by_mlx_audio(tmp_path/'out', b, 3, tmp_path)[1] == ['QuantizedLinear', 'QuantizedLinear', 'QuantizedEmbedding']

def test_converted_whisper_writes_the_same(whisper, cabbage, shared, tmp_path):
    from optiq.formats import AS_IS, Format
    planned(whisper, dict(encoder=AS_IS, decoder=Format(8, 64), embed=Format(6, 32)), tmp_path/'out')
    text, kinds = written_by_mlx_audio(tmp_path/'out', shared/'data'/'speech'/cabbage[0].name, 60, tmp_path)
    assert text == cabbage[3] and kinds == ['Linear', 'QuantizedLinear', 'QuantizedEmbedding']
